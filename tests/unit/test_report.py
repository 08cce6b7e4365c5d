"""Trackers, the page and webhooks: what a real training tells, read back with the tools that it is meant for."""

import base64
import http.server
import json
import math
import re
import threading
import xml.etree.ElementTree
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from local_hub import local_hub
from PIL import Image

from training.cache.facts import file_metadata
from training.cache.given import keep_given
from training.cache.store import Store
from training.cache.texts import Validation
from training.config.adapter import LoRASettings
from training.config.dataset import CaptionSettings, MixSettings
from training.config.optim import OptimizerSettings
from training.config.report import ReportSettings
from training.config.settings import Config, TrainSettings, deciding
from training.config.validation import ValidationSettings
from training.errors import SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.report import hub, webhooks
from training.report.courier import Courier, RefusedError, try_again
from training.report.login import check_logins, login_problems
from training.report.page import loss_chart, page
from training.report.reporters import reporters
from training.report.story import About, Story, about_run
from training.run.curves import curves
from training.run.events import Ended, Evaluated, Said, Sample, Started, StepDone, Validated
from training.run.folder import Run, RunStore
from training.run.session import Request, train_lora

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)
SETTINGS = TrainSettings(
    steps=8,
    batch_size=2,
    adapter=LoRASettings(4),
    optimizer=OptimizerSettings(learning_rate=1e-2),
    checkpoint_step_interval=4,
)
PROMPT = "a <b>red</b> cat & “dog”"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """wandb writes where the run is and asks nobody; nobody is logged in."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "output" / "lumina2", tmp_path / "loras" / "lumina2")


@pytest.fixture
def caches(tmp_path):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn((4, 4, 4 + 4 * (n > 2)), generator=generator) for n in range(5)]
    texts = [torch.randn(2 + n, 8, generator=generator).bfloat16() for n in range(5)]
    stores = Store(str(tmp_path / "latents")), Store(str(tmp_path / "text"))
    return keep_given(latents, texts, torch.randn(1, 8, generator=generator), *stores, MixSettings())


def train(caches, store, tell, settings=SETTINGS, name="cats"):
    """A real training; ``tell`` is given sample pictures too, as a validation would send them."""
    torch.manual_seed(0)
    transformer = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in transformer.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)

    def listen(event):
        tell(event)
        if isinstance(event, Started) and event.step == 0:
            tell(picture(store, event.run, 0))
        if isinstance(event, Ended):
            assert event.status == "finished"

    return train_lora(transformer, *caches, settings, Request(name), store, lambda latents: latents * 0.5, listen)


def picture(store, run, step):
    path = f"samples/{step:06d}-cat.png"
    (store.path(run) / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (40, 24), (200, 30 + step, 10)).save(store.path(run) / path)
    return Validated(step, (Sample(path, "cat", PROMPT, 42, score=23.5),), {"clip/mean": 23.5})


class Receiver:
    """An address that is told; ``answers`` are the statuses of the next requests, then 204."""

    def __init__(self):
        self.requests, self.answers = [], []


@contextmanager
def receiver():
    found = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append((self.path, dict(self.headers), body))
            self.send_response(found.answers.pop(0) if found.answers else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def wandb_records(folder):
    """The runs that wandb wrote offline, in the order of their folders: rows of the history, the config, the ids."""
    from wandb.proto import wandb_internal_pb2

    history, config, ids = [], {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        ids.append(file.stem.removeprefix("run-"))
        for content in leveldb_log(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history += [items] if items else []
            changed = [*record.run.config.update, *record.config.update]
            config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in changed}
    return history, config, ids


def leveldb_log(content, block=32768, header=7):
    """Records of wandb's files: parts with a checksum, a length and a kind (whole, first, middle, last) in blocks."""
    at, record = header, b""
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_holds_what_was_trained(caches, store):
    said = []
    settings = ReportSettings(report_to="wandb", tracker_project_name="cats project")
    tell = reporters(settings, store, said.append)
    outcome = train(caches, store, tell)
    folder = store.root / "cats"
    history, config, ids = wandb_records(folder)
    assert said == []
    losses = {row["step"]: row["train_loss"] for row in history if "train_loss" in row}
    assert losses == {step: pytest.approx(loss) for step, loss in enumerate(outcome.losses, 1)}
    assert config["learning_rate"] == 1e-2
    assert config["run"] == "cats"
    shown = next(row for row in history if "samples/cat.path" in row)
    kept = next(folder.glob(f"wandb/offline-run-*/files/{shown['samples/cat.path']}"))
    assert Image.open(kept).getpixel((5, 5)) == (200, 30, 10)
    assert PROMPT in shown["samples/cat.caption"]
    assert PROMPT in [row.get("prompts/cat") for row in history]
    assert 23.5 in [row.get("clip/mean") for row in history]

    more = train(caches, store, tell, replace(SETTINGS, steps=12))
    history, _, both = wandb_records(folder)
    assert both == ids * 2, "a run that goes on is the same run"
    losses = {row["step"]: row["train_loss"] for row in history if "train_loss" in row}
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] == pytest.approx(more.losses[-1])


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(name)}, found


def test_tensorboard_holds_what_was_trained(caches, store, tmp_path):
    said = []
    settings = ReportSettings(report_to=["tensorboard"])
    outcome = train(caches, store, reporters(settings, store, said.append))
    losses, found = scalars(store.root / "cats" / "tensorboard", "train_loss")
    assert said == []
    assert losses == {step: pytest.approx(loss) for step, loss in enumerate(outcome.losses, 1)}
    assert scalars(store.root / "cats" / "tensorboard", "learning_rate")[0][8] == pytest.approx(1e-2)
    (drawn,) = found.Images("samples/cat")
    assert (drawn.step, drawn.width, drawn.height) == (0, 40, 24)
    texts = {tag.removesuffix("/text_summary") for tag in found.Tags()["tensors"]}
    assert {"prompts/cat", "settings"} <= texts
    elsewhere = ReportSettings(report_to="tensorboard", logging_dir=str(tmp_path / "logs"))
    train(caches, store, reporters(elsewhere, store, said.append), name="dogs")
    assert len(scalars(tmp_path / "logs" / "dogs", "train_loss")[0]) == 8


def test_tensorboard_forgets_what_a_run_that_goes_on_had_logged_of_later_steps(store):
    run = store.save(Run("cats", "cats", "id", "running", 0, 8))
    tell = reporters(ReportSettings(report_to="tensorboard"), store, print)
    tell(Started(run, 0))
    for step in range(1, 7):
        tell(StepDone(step, 1.0, 1e-4, None, 0.0))
    tell(Ended("interrupted", 6, "", 1.0))
    tell(Started(run, 4))
    tell(StepDone(5, 2.0, 1e-4, None, 0.0))
    tell(Ended("finished", 5, "", 1.0))
    assert scalars(store.path(run) / "tensorboard", "train_loss")[0] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2}


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_trackers_are_closed_however_a_run_ends(store, status):
    import wandb

    run = store.save(Run("cats", "cats", "id", "running", 0, 8))
    tell = reporters(ReportSettings(report_to="wandb"), store, print)
    tell(Started(run, 0))
    assert wandb.run is not None
    tell(Ended(status, 0, "", 1.0))
    assert wandb.run is None


def test_a_trackers_trouble_is_said_once_and_ends_nothing(caches, store, monkeypatch):
    from training.report import trackers

    class Broken:
        def __init__(self, *_):
            pass

        def log(self, values, step):
            raise ValueError("no room on their side")

        log_pictures = log

        def close(self, failed):
            pass

    said = []
    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else name)
    outcome = train(caches, store, reporters(ReportSettings(report_to="wandb, tensorboard"), store, said.append))
    assert len(outcome.losses) == 8
    assert len(said) == 2
    assert "tensorboard, which is not installed. Run `pip install tensorboard`" in said[0]
    assert said[1] == (
        "wandb was not told of everything: ValueError: no room on their side. The training goes on without it."
    )
    with pytest.raises(SettingError, match="pip install tensorboard"):
        check_logins(ReportSettings(report_to="tensorboard"))
    assert login_problems(ReportSettings(report_to="all")) == []


def test_what_the_user_does_is_not_swallowed(store):
    class CancelledError(Exception):
        pass

    def say(sentence):
        raise CancelledError

    run = store.save(Run("cats", "cats", "id", "running", 0, 8))
    tell = reporters(ReportSettings(webhook_config={"webhook_type": "raw", "callback_url": "http://x"}), store, say)
    tell(Started(run, 0))
    tell._collect("something to say")
    with pytest.raises(CancelledError):
        tell(StepDone(1, 1.0, 1e-4, None, 0.0))


def test_wandbs_login_is_checked_before(monkeypatch):
    settings = ReportSettings(report_to="wandb")
    check_logins(settings)  # offline asks nobody
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(SettingError, match=r"nobody is logged in.*wandb login.*WANDB_MODE=offline"):
        check_logins(settings)

    def refuses(**_):
        raise ValueError("invalid credentials")

    monkeypatch.setattr("wandb.login", refuses)
    with pytest.raises(SettingError, match=r"not accepted \(invalid credentials\)"):
        check_logins(settings)


def test_the_page_is_whole_and_asks_nobody(caches, store):
    outcome = train(caches, store, reporters(ReportSettings(report_to="simpletuner"), store, print))
    folder = store.root / "cats"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script" not in text
    tree = xml.etree.ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>|(?<=<img)[^>]*>", "", text, flags=re.I)
                                            .replace("<img", "<img/>").replace(" class=changed", ""))  # fmt: skip
    words = "".join(tree.itertext())
    assert PROMPT in words
    assert "finished · 8 of 8 steps" in words
    assert "gradient_accumulation_steps" in words
    (shown,) = re.findall(r'<a href="(.*?)"><img src="data:image/jpeg;base64,(.*?)"', text)
    assert shown[0] == "samples/000000-cat.png"
    assert base64.b64decode(shown[1])[:2] == b"\xff\xd8"
    line = tree.find(".//polyline").get("points").split()
    assert len(line) == len(outcome.losses)


def test_the_chart_shows_what_it_was_given(tmp_path):
    file = tmp_path / "events.jsonl"
    lines = [{"step": n, "loss": 5.0 if n == 50 else 2.0 - n / 100, "lr": 1e-4, "time": n} for n in range(1, 101)]
    lines += [{"step": 101, "loss": None, "lr": 1e-4, "time": 101}]
    lines += [{"event": "Evaluated", "step": n, "loss": 2.0 - n / 100} for n in (50, 100)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = xml.etree.ElementTree.fromstring(f"<div>{loss_chart(curves(file))}</div>")
    points = [tuple(map(float, p.split(","))) for p in chart.find(".//polyline").get("points").split()]
    heights = [y for _, y in points]
    assert all(map(math.isfinite, heights))
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert heights[0] < heights[-1], "a loss that falls goes down the page"
    assert max(heights) - min(heights) > 150, "one outlier does not press the rest together"
    assert [mark[0].text for mark in chart.findall(".//circle")] == [
        "step 50: held-out loss 1.5",
        "step 100: held-out loss 1",
    ]
    assert "No step was logged" in loss_chart(curves(tmp_path / "none"))


def test_a_long_history_of_samples_stays_one_page(store):
    run = store.save(Run("cats", "cats", "id", "running", 0, 1000))
    story = Story(run, store.path(run))
    for step in range(0, 1000, 10):
        story.add(picture(store, run, step % 200))
    shown = page(story, About())
    assert shown.count("<img") == 12
    assert len(shown) < 40_000


def test_webhooks_are_told_in_order(caches, store, monkeypatch):
    with receiver() as raw, receiver() as discord:
        monkeypatch.setenv("DISCORD", f"{discord.url}/api/webhooks/1/SecretOfDiscord")
        config = [
            {
                "webhook_type": "raw",
                "callback_url": f"{raw.url}/tell",
                "auth_token": "SecretOfRaw",
                "log_level": "debug",
            },
            {"webhook_type": "discord", "webhook_url": "{env:DISCORD}", "message_prefix": "home", "send_video": True},
        ]
        said = []
        settings = ReportSettings(webhook_config=config, webhook_reporting_interval=1)
        train(caches, store, reporters(settings, store, said.append))
        assert said == []
        told = [json.loads(body) for _, _, body in raw.requests]
        assert [each["type"] for each in told] == [
            "training.status",  # begins
            "notification",  # sample of the base
            "training.status",  # a step, then none for a second
            "training.checkpoint",
            "training.checkpoint",
            "training.status",  # over
        ]
        assert told[0]["job_id"] == "cats"
        assert told[-1]["data"] == {"status": "completed"}
        assert told[-1]["progress"]["percent"] == 100
        assert told[2]["progress"]["metrics"]["train_loss"] > 0
        assert base64.b64decode(told[1]["images"][0])[:4] == b"\x89PNG"
        assert raw.requests[0][1]["X-Api-Key"] == "SecretOfRaw"

        path, headers, body = discord.requests[1]
        assert path == "/api/webhooks/1/SecretOfDiscord"
        from email import message_from_bytes

        form = message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
        message, file = form.get_payload()
        assert json.loads(message.get_payload())["content"] == "`(home)` cats: samples of step 0: cat"
        assert file.get_filename() == "0.png"
        assert file.get_payload(decode=True) == (store.root / "cats" / "samples" / "000000-cat.png").read_bytes()


def test_a_webhook_that_fails_is_tried_again_and_named_without_its_address(store, monkeypatch):
    monkeypatch.setattr(webhooks, "WAITS_S", (0.01, 0.01))
    run = store.save(Run("cats", "cats", "id", "running", 0, 8))
    with receiver() as told:
        url = f"{told.url}/SecretOfTheAddress"
        config = {"webhook_type": "raw", "callback_url": url, "log_level": "error"}
        said = []
        tell = reporters(ReportSettings(webhook_config=config), store, said.append)
        told.answers = [500, 429]
        tell(Started(run, 0))
        tell(Said("nothing that an error is"))
        tell(Ended("failed", 3, "broken", 1.0))
        assert (len(told.requests), said) == (3, []), "the first two were answered with errors"
        assert json.loads(told.requests[-1][2])["severity"] == "error"
        told.answers = [404]
        tell(Started(run, 3))
        tell(Ended("failed", 3, "broken", 1.0))
        assert len(told.requests) == 4, "what does not exist is not asked again"
    tell(Started(run, 3))
    tell(Ended("failed", 3, "broken", 1.0))
    assert said[0] == "The raw webhook at 127.0.0.1 was not told: it answered with HTTP 404."
    assert len(said) == 2
    assert "SecretOfTheAddress" not in str(said)


def test_a_value_that_is_no_number_is_still_told(store):
    run = store.save(Run("cats", "cats", "id", "running", 0, 8))
    with receiver() as told:
        tell = reporters(ReportSettings(webhook_config={"webhook_type": "raw", "callback_url": told.url}), store, print)
        tell(Started(run, 0))
        tell(Evaluated(3, math.nan))
        tell(Ended("finished", 3, "", 1.0))
        assert json.loads(told.requests[1][2])["data"] == {"step": 3, "loss": None}


def test_no_secret_is_in_anything_that_a_run_writes(caches, store, tmp_path, monkeypatch, capfd):
    """Every file under the run, its LoRA, what was said and printed, packed streams of the PNGs included."""
    from huggingface_hub import constants

    secrets = {
        "HF_TOKEN": "hf_SecretToken",
        "WANDB_API_KEY": "5ecre7" * 6 + "5ecr",
        "ADDRESS": "SecretAddress",
        "KEY": "SecretKey",
    }
    with local_hub(secrets["HF_TOKEN"]) as server, receiver() as told:
        for name in ("HF_TOKEN", "WANDB_API_KEY"):
            monkeypatch.setenv(name, secrets[name])
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "WAITS_S", (0.01,))
        server.failures, told.answers = [500], [404] * 3
        config = {"webhook_type": "raw", "callback_url": f"{told.url}/SecretAddress", "auth_token": "SecretKey"}
        settings = ReportSettings(
            report_to="all", push_to_hub=True, push_checkpoints_to_hub=True, webhook_config=config
        )
        check_logins(settings)
        said = []
        train(caches, store, reporters(settings, store, said.append))
        (store.root / "cats" / "settings.json").write_text(json.dumps(settings.public()))
        assert server.repos["me/cats"]["files"], "the token was used"
        assert told.requests[0][1]["X-Api-Key"] == "SecretKey"
        pushed = {f"hub/{path}": content for path, content in server.repos["me/cats"]["files"].items()}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    everything = {str(path): path.read_bytes() for path in files} | pushed
    for path in files:
        if path.suffix == ".png":
            everything[f"{path} metadata"] = str(Image.open(path).info).encode()
    everything["said"] = (str(said) + repr(settings.webhooks()) + "".join(capfd.readouterr())).encode()
    found = {(place, name) for place, text in everything.items() for name, s in secrets.items() if s.encode() in text}
    assert found == set()


def test_settings_are_simpletuners_and_decide_no_weight():
    settings = ReportSettings(report_to="wandb,local")
    assert settings.trackers == ("simpletuner", "wandb")
    assert ReportSettings(report_to="all").trackers == ("simpletuner", "tensorboard", "wandb")
    assert ReportSettings(report_to="none").trackers == ()
    assert Config({"report_to": "wandb", "learning_rate": 1}).report == ReportSettings(report_to="wandb")
    assert ReportSettings(**settings.public()) == settings
    names = {each.name for each in fields(ReportSettings)}
    assert not names & {*TrainSettings().written(), *deciding(TrainSettings())}
    assert ReportSettings().model_card_private is True


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"report_to": "comet_ml"}, r"report_to is 'comet_ml'; choose one of simpletuner, tensorboard, wandb"),
        ({"push_to_hub": "true"}, r"push_to_hub is 'true'; choose true or false"),
        ({"hub_model_id": "a/b/c"}, r"hub_model_id is 'a/b/c'; write name or owner/name"),
        ({"hub_model_id": "my lora"}, r"hub_model_id is 'my lora'"),
        ({"tracker_project_name": " "}, "tracker_project_name"),
        ({"webhook_reporting_interval": 0}, "choose at least 1 second"),
        ({"webhook_config": {"webhook_type": "slack", "webhook_url": "https://Secret"}}, "choose one of discord, raw"),
        ({"webhook_config": {"webhook_type": "raw", "callback_url": "Secret"}}, "callback_url is no web address"),
        ({"webhook_config": {"webhook_type": "discord"}}, "webhook_url is no web address"),
        ({"webhook_config": "{broken Secret"}, "webhook_config is no JSON"),
        ({"webhook_config": [1]}, "each entry is an object"),
        (
            {"webhook_config": {"webhook_type": "raw", "callback_url": "{env:NOT_SET_HERE}"}},
            "NOT_SET_HERE, which is not",
        ),
    ],
)
def test_settings_that_are_not_possible_are_said(values, sentence):
    with pytest.raises(SettingError, match=sentence) as raised:
        ReportSettings(**values)
    assert "Secret" not in str(raised.value)


def test_webhooks_may_lie_in_a_file(tmp_path):
    file = tmp_path / "webhooks.json"
    settings = ReportSettings(webhook_config=str(file))
    assert "cannot be read (No such file or directory)" in login_problems(settings)[0]
    file.write_text('{"webhook_type": "raw", "callback_url": "https://example.org/x", "ssl_no_verify": "true"}')
    (found,) = settings.webhooks()
    assert (found.host, found.ssl_no_verify) == ("example.org", True)
    assert settings.public()["webhook_config"] == str(file)


def test_facts_of_the_datasets_hold_no_path(caches, tmp_path):
    latents, texts = caches
    chosen = ValidationSettings(validation_num_inference_steps=3, validation_guidance=5.0)
    about = about_run(latents, replace(texts, validation=Validation((), "", "Draw.", 256, chosen)), "me/base")
    (facts,) = about.datasets
    assert (facts.pictures, facts.sizes) == (5, ("32×32", "64×32"))
    assert about.base_model == "me/base"
    assert about.sampling == {"steps": 3, "guidance": 5.0, "negative_prompt": "", "system_prompt": "Draw."}
    assert about_run(latents, texts).sampling == {}
    assert about_run(latents, replace(texts, triggers=("zorblax", "a mug"))).trigger == "zorblax, a mug"
    about.keep(tmp_path)
    assert About.read(tmp_path) == about
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    assert About.read(tmp_path / "nowhere") == About()


def test_a_courier_keeps_the_order_and_gives_up_the_oldest():
    taken, gate, got, lost = threading.Event(), threading.Event(), [], []

    def deliver(parcel):
        taken.set()
        gate.wait(10)
        if parcel == 4:
            raise RefusedError("no")
        got.append(parcel)

    courier = Courier("test", deliver, lambda parcel, error: lost.append(parcel), (), most=3)
    courier.add(0)
    assert taken.wait(10)
    for parcel in range(1, 6):
        courier.add(parcel)
    gate.set()
    assert courier.close(10)
    assert got == [0, 3, 5]
    assert lost == [1, 2, 4]


def test_tries_are_counted():
    calls = []

    def fails():
        calls.append(1)
        raise OSError

    for waits, error in (((1, 1, 1), OSError), ((), OSError)):
        calls.clear()
        with pytest.raises(error):
            try_again(fails, waits, lambda seconds: True)
        assert len(calls) == len(waits) + 1
    calls.clear()
    with pytest.raises(OSError):  # noqa: PT011
        try_again(fails, (1, 1, 1), lambda seconds: False)
    assert len(calls) == 1


def test_a_file_says_what_it_was_trained_on(caches):
    latents, texts = caches
    (part,) = latents.parts
    latents = replace(latents, parts=(replace(part, mix=replace(part.mix, repeats=2)),))
    said = file_metadata(latents, replace(texts, triggers=("zorblax", "a mug")))
    assert said["modelspec.trigger_phrase"] == "zorblax, a mug"
    assert (said["ss_num_train_images"], said["ss_num_reg_images"]) == ("15", "0")
    assert json.loads(said["ss_dataset_dirs"]) == {part.id: {"n_repeats": 3, "img_count": 5}}
    assert said["modelspec.resolution"] == "32x32"
    assert "modelspec.trigger_phrase" not in file_metadata(latents, texts)


@pytest.mark.parametrize(
    ("captions", "triggers"),
    [
        (CaptionSettings(trigger_word=" zorblax ", instance_prompt=("a dog",)), ("zorblax",)),
        (CaptionSettings("instanceprompt", instance_prompt=("a photo of zorblax", "zorblax")),
         ("a photo of zorblax", "zorblax")),
        (CaptionSettings(instance_prompt=("unused",)), ()),
    ],
)  # fmt: skip
def test_what_calls_up_the_pictures(captions, triggers):
    assert captions.triggers == triggers
