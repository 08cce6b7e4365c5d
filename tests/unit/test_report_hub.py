"""Pushing to a hub: a small one on this machine, asked by huggingface_hub itself."""

import json
import threading

import pytest
import torch
import yaml
from local_hub import local_hub
from PIL import Image
from safetensors.torch import load, save_file

from training.cache.facts import DatasetFacts
from training.config.report import ReportSettings
from training.config.settings import TrainSettings
from training.errors import ModelError, RunError, SettingError
from training.report import hub as hub_module
from training.report.hub import hub_name, push, push_file, push_run
from training.report.login import check_logins, login_problems
from training.report.reporters import reporters
from training.report.story import About
from training.run.events import CheckpointSaved, Ended, Journal, Sample, Started, StepDone, Validated, to_all
from training.run.folder import Run, RunStore

TOKEN = "hf_SecretOfThisTest"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with local_hub(TOKEN) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_module, "WAITS_S", (0.01, 0.01, 0.01))
        yield found


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "output", tmp_path / "loras")


def lora(path, width=2304):
    path.parent.mkdir(parents=True, exist_ok=True)
    name, rows = "diffusion_model.layers.0.attention.qkv", width + 2 * width // 3
    tensors = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, path, {"modelspec.title": "cats", "ss_steps": "6", "lumina2_trainer.settings": "{}"})


class Told:
    """A run whose events are told by hand, with the files that a real one would write."""

    def __init__(self, store, settings, **options):
        self.store, self.said, self.width = store, [], 2304
        chosen = TrainSettings(steps=6, batch_size=2).written()
        self.run = Run("cats", "cats", "id", "running", 0, 6, settings=chosen)
        self.folder = store.path(store.save(self.run))
        listener = reporters(settings, store, self.said.append, **options)
        self.tell = to_all([Journal(self.folder / "events.jsonl"), listener])

    def start(self, step=0):
        self.tell(Started(self.run, step))

    def steps(self, first, last):
        for step in range(first, last + 1):
            self.tell(StepDone(step, 1 / step, 1e-4, 0.1, 1000.0 + step))

    def sample(self, step, prompt="a cat | on <a> mat"):
        path = f"samples/{step:06d}-cat.png"
        (self.folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (step * 20, 0, 0)).save(self.folder / path)
        self.tell(Validated(step, (Sample(path, "cat", prompt, 42),)))

    def checkpoint(self, step):
        path = self.folder / f"checkpoint-{step}"
        lora(path / "lora.safetensors", self.width)
        (path / "checkpoint.json").write_text(json.dumps({"identity": "id", "step": step}))
        self.tell(CheckpointSaved(step, path))

    def end(self, step=6, status="finished"):
        lora(self.store.file("cats"), self.width)
        self.tell(Ended(status, step, "", 1.0))


def whole(told):
    """A run of six steps with two checkpoints and three validations."""
    told.start()
    told.sample(0)
    for step in (3, 6):
        told.steps(step - 2, step)
        told.sample(step)
        told.checkpoint(step)
    told.end()


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_checkpoints_and_the_end_are_pushed(hub, store):
    told = Told(store, ReportSettings(push_to_hub=True, push_checkpoints_to_hub=True, hub_model_id="us/cats"))
    whole(told)
    repo = hub.repos["us/cats"]
    assert told.said == []
    assert repo["private"]
    assert repo["commits"][-1] == "6 steps"
    assert repo["files"].keys() == {
        "README.md", "cats.safetensors", "pytorch_lora_weights.safetensors",
        "checkpoints/cats-3.safetensors", "checkpoints/cats-6.safetensors",
        "samples/000000-cat.png", "samples/000003-cat.png", "samples/000006-cat.png",
    }  # fmt: skip
    assert repo["files"]["cats.safetensors"] == store.file("cats").read_bytes()
    assert repo["files"]["README.md"] == (told.folder / "README.md").read_bytes()
    assert not (told.folder / ".outbox").exists()


def test_a_bad_hour_of_the_hub_loses_nothing(hub, store):
    hub.failures = [500] * 6  # the first checkpoint is given up after four tries, the second comes through at the third
    told = Told(store, ReportSettings(push_checkpoints_to_hub=True, push_to_hub_background=False))
    told.start()
    told.checkpoint(3)
    assert len(told.said) == 1
    assert "did not get “step 3”" in told.said[0]
    assert "the hub has a bad day (HTTP 500)" in told.said[0]
    assert "me/cats" not in hub.repos or hub.repos["me/cats"]["commits"] == []
    told.checkpoint(4)
    files = hub.repos["me/cats"]["files"]
    assert {"checkpoints/cats-3.safetensors", "checkpoints/cats-4.safetensors"} < files.keys()
    assert hub.commits_asked == 7
    assert len(told.said) == 1


def test_a_checkpoint_that_was_pruned_or_left_by_a_crash_is_still_pushed(hub, store):
    import shutil

    hub.failures = [403]
    settings = ReportSettings(push_checkpoints_to_hub=True, push_to_hub_background=False)
    told = Told(store, settings)
    told.start()
    told.checkpoint(3)
    assert hub.commits_asked == 1, "what is refused is not tried again"
    shutil.rmtree(told.folder / "checkpoint-3")
    again = Told(store, settings)
    again.start(step=3)
    assert "checkpoints/cats-3.safetensors" in hub.repos["me/cats"]["files"]


def test_a_hub_that_is_down_neither_ends_a_run_nor_holds_it_up(hub, store, monkeypatch):
    hub.failures = [503] * 99
    monkeypatch.setattr(hub_module, "WAITS_S", (3600.0,))
    monkeypatch.setattr(hub_module, "CLOSING_S", 0.2)
    told = Told(store, ReportSettings(push_to_hub=True, push_checkpoints_to_hub=True))
    whole(told)
    assert any("was not over in time" in sentence for sentence in told.said)
    assert store.file("cats").exists()
    for thread in threading.enumerate():
        if thread.name == "hub":
            thread.join(30)
    hub.failures = []
    monkeypatch.setattr(hub_module, "WAITS_S", ())
    assert push_run(store, told.run, ReportSettings()) == f"{hub.url}/me/cats"
    files = hub.repos["me/cats"]["files"]
    assert {"cats.safetensors", "README.md", "checkpoints/cats-3.safetensors"} < files.keys()


def test_a_run_goes_on_while_a_push_is_under_way(hub, store):
    told = Told(store, ReportSettings(push_checkpoints_to_hub=True))
    told.start()
    hub.lock.acquire()  # the hub answers nobody
    told.checkpoint(3)
    told.steps(4, 6)
    assert "me/cats" not in hub.repos
    hub.lock.release()
    told.end()
    assert "checkpoints/cats-3.safetensors" in hub.repos["me/cats"]["files"]
    assert [t.name for t in threading.enumerate() if t.name == "hub"] == []


def test_nothing_is_pushed_that_was_not_asked_for(hub, store):
    whole(Told(store, ReportSettings()))
    told = Told(store, ReportSettings(push_to_hub=True))
    told.start()
    told.end(3, "interrupted")
    assert hub.repos == {}
    assert (told.folder / "README.md").exists(), "the card is written whatever is pushed"


def test_a_repository_that_is_public_stays_so_and_that_is_said(hub, store):
    hub.repos["me/cats"] = {"private": False, "files": {}, "commits": []}
    told = Told(store, ReportSettings(push_to_hub=True))
    whole(told)
    assert not hub.repos["me/cats"]["private"]
    assert any("me/cats is public on the hub already" in sentence for sentence in told.said)


def test_the_card_tells_what_was_trained_and_how_to_use_it(hub, store):
    about = About(
        base_model="Alpha-VLLM/Lumina-Image-2.0",
        trigger="zorblax",
        datasets=(DatasetFacts("cats", 20, 1, False, ("64×64",)),),
        sampling={"steps": 12, "guidance": 4.5},
    )
    settings = ReportSettings(push_to_hub=True, model_card_note="For *tests*.", model_card_safe_for_work=False)
    told = Told(store, settings, about=about)
    whole(told)
    card = hub.repos["me/cats"]["files"]["README.md"].decode()
    head = front_matter(card)
    assert (head["license"], head["base_model"]) == ("apache-2.0", "Alpha-VLLM/Lumina-Image-2.0")
    assert (head["pipeline_tag"], head["library_name"]) == ("text-to-image", "diffusers")
    assert {"lora", "comfyui", "not-for-all-audiences"} < set(head["tags"])
    assert head["instance_prompt"] == "zorblax"
    assert head["widget"] == [{"text": "a cat | on <a> mat", "output": {"url": "samples/000006-cat.png"}}]
    theirs = load(hub.repos["me/cats"]["files"]["pytorch_lora_weights.safetensors"])
    assert "transformer.layers.0.attn.to_q.lora_A.weight" in theirs
    for wanted in (
        "For *tests*.", "a cat \\| on &lt;a> mat", "![](samples/000000-cat.png)", "`cats.safetensors`", "| cats | 20 |",
        'load_lora_weights("cats", weight_name="pytorch_lora_weights.safetensors")', "guidance_scale=4.5",
        "| batch_size | `2` |", "Write `zorblax` in the prompt",
    ):  # fmt: skip
        assert wanted in card
    assert all(file in hub.repos["me/cats"]["files"] for file in ("samples/000000-cat.png", "samples/000006-cat.png"))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    changed = card.split("defaults of Lumina2 Trainer:")[1].split("<details>")[0]
    assert changed.split("| --- | --- |\n")[1].split("\n")[:2] == ["| batch_size | `2` |", "| steps | `6` |"]
    assert changed.count("\n|") == 4


def test_the_card_claims_no_base_and_no_path_that_it_does_not_know(store):
    told = Told(store, ReportSettings())
    told.width = 48
    told.run.settings["lora_init_lora"] = "/home/somebody/secret place/start.safetensors"
    whole(told)
    card = (told.folder / "README.md").read_text()
    assert "base_model" not in front_matter(card)
    assert "license" not in front_matter(card)
    assert "somebody" not in card
    assert 'from_pretrained("the base model\'s folder"' in card
    assert "`start.safetensors`" in card
    told.width = 2304
    told.start(6)
    told.end()
    assert front_matter((told.folder / "README.md").read_text())["base_model"] == "Alpha-VLLM/Lumina-Image-2.0"


@pytest.mark.parametrize("folder", ["cats", "猫 style 2", "a..b--", "..", "-x-", "x" * 120])
def test_every_run_has_a_name_that_the_hub_allows(folder):
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(hub_name(folder))
    ReportSettings(hub_model_id=hub_name(folder))


def test_a_file_that_is_no_runs_is_pushed_with_a_card(hub, tmp_path):
    lora(tmp_path / "given.safetensors")
    url = push_file(tmp_path / "given.safetensors", "me/given", False, "Mine.", print, tmp_path / "work")
    files = hub.repos["me/given"]["files"]
    assert url == f"{hub.url}/me/given"
    assert not hub.repos["me/given"]["private"]
    assert files.keys() == {"given.safetensors", "README.md"}
    assert "Mine." in files["README.md"].decode()
    assert "| ss_steps | `6` |" in files["README.md"].decode()
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(ModelError, match=r"bad\.safetensors cannot be read"):
        push_file(tmp_path / "bad.safetensors", "me/given", True, "", print, tmp_path / "work")


def test_what_cannot_be_pushed_is_said_in_a_sentence(hub, store, tmp_path, monkeypatch):
    run = Run("gone", "gone", "id", "finished", 6, 6, settings=TrainSettings(steps=6).written())
    store.save(run)
    with pytest.raises(RunError, match=r"gone\.safetensors is not there"):
        push_run(store, run, ReportSettings())
    lora(tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"'a/b/c' is no name that the hub allows"):
        push({"x.safetensors": tmp_path / "x.safetensors"}, "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RunError, match=r"me/x was not pushed: .*HTTP 401"):
        push({"x.safetensors": tmp_path / "x.safetensors"}, "me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="nobody is logged in"):
        push({"x.safetensors": tmp_path / "x.safetensors"}, "me/x")
    assert hub.repos == {}


def test_logins_are_checked_before(hub, monkeypatch):
    settings = ReportSettings(push_to_hub=True, hub_model_id="us/cats")
    check_logins(settings)
    check_logins(ReportSettings())
    assert hub.repos == {}, "checking changes nothing"
    with pytest.raises(SettingError, match=r"may not write to them/cats. Choose an owner among me, us"):
        check_logins(ReportSettings(push_to_hub=True, hub_model_id="them/cats"))
    hub.role = "read"
    with pytest.raises(SettingError, match="the token may only read"):
        check_logins(settings)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SettingError, match="does not accept the token") as raised:
        check_logins(settings)
    assert "hf_wrong" not in str(raised.value)
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in" in login_problems(settings)[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in login_problems(ReportSettings(push_checkpoints_to_hub=True))[0]
