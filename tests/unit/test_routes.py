"""What the page is told of runs: lists, curves, pictures, predictions; and what deleting one takes with it."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings
from training.config.optim import OptimizerSettings
from training.config.settings import TrainSettings
from training.errors import RunError, SettingError
from training.files import write_json
from training.run import history
from training.run.control import Control, reachable
from training.run.curves import curves, last_events
from training.run.events import CheckpointSaved, Ended, Evaluated, Journal, Sample, Started, StepDone, Validated
from training.run.folder import Run, RunStore
from training.run.lock import locked

SETTINGS = TrainSettings(steps=100, optimizer=OptimizerSettings(learning_rate=1e-3))


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs", tmp_path / "loras", tmp_path / "models")


def add_run(store, folder="style", name=None, settings=SETTINGS, step=100, status="finished", **more):
    """A run as training leaves it: its file, a checkpoint, a log and a LoRA."""
    run = Run(
        name=name or folder,
        folder=folder,
        identity=f"identity of {folder}",
        status=status,
        step=step,
        target=settings.steps,
        settings=json.loads(json.dumps(settings.written())),
        **more,
    )
    store.save(run)
    add_checkpoint(store, run, step)
    Journal(store.path(run) / "events.jsonl").write([Started(run, 0), *steps(1, step), Ended(status, step, "done", 9)])
    add_lora(store, folder, run)
    return run


def add_checkpoint(store, run, step):
    place = store.path(run) / f"checkpoint-{step}"
    write_json(place / "checkpoint.json", {"identity": run.identity, "step": step})
    save_file({"w": torch.zeros(5)}, place / "state.safetensors")
    save_file({"w": torch.zeros(3)}, place / "lora.safetensors", metadata(run))


def add_lora(store, stem, run):
    store.loras.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(2)}, store.loras / f"{stem}.safetensors", metadata(run))


def metadata(run):
    return {"lumina2_trainer.identity": run.identity, "modelspec.title": run.folder}


def steps(first, last, loss=lambda step: 1 / step):
    return [
        StepDone(n, loss(n), 1e-3, 0.5, 1000 + n / 4, 7_000_000_000, {"sigma_q1": 0.1}) for n in range(first, last + 1)
    ]


def test_curves_of_a_long_run_are_small_and_keep_every_spike(store):
    run = add_run(store)
    file = store.path(run) / "events.jsonl"
    file.unlink()
    noise = random.Random(0)
    spikes = {noise.randrange(1, 50_001): 9.0 + n for n in range(5)}
    parts = {f"a dataset with a name {n}": 0.123456789 for n in range(9)}
    told = [replace(each, parts=parts) for each in steps(1, 50_000, lambda n: spikes.get(n, noise.random()))]
    evals = [Evaluated(n, noise.random()) for n in range(50, 50_001, 50)]
    Journal(file).write([Started(run, 0), *told, *evals])
    found = curves(file)
    answer = json.dumps(found) + json.dumps(history.summary(store, run))
    assert len(answer) <= 64 * 1024
    assert set(spikes.values()) <= set(found["loss"]["max"])
    assert found["step"][-1] == 50_000
    mean = sum(found["loss"]["mean"]) / len(found["loss"]["mean"])
    assert mean == pytest.approx(sum(each.loss for each in told) / len(told), rel=1e-2)
    assert found["speed"][1] == pytest.approx(4, rel=1e-3)
    assert len(found["eval"]["step"]) <= 400
    assert found["eval"]["step"][0] == 50


def test_what_was_added_since_is_told_alone_and_a_rewind_is_told(store):
    run = add_run(store, step=30)
    journal = Journal(store.path(run) / "events.jsonl")
    first = curves(journal.file)
    assert (first["step"], first["from"]) == (list(range(1, 31)), 0)
    assert curves(journal.file, first["next"])["step"] == []

    journal.write(steps(31, 33))
    with journal.file.open("a") as file:
        file.write('{"step": 34, "loss": 0.')  # being written just now
    more = curves(journal.file, first["next"])
    assert (more["step"], more["from"]) == ([31, 32, 33], None)
    with journal.file.open("a") as file:
        file.write("5}\n")
    assert curves(journal.file, more["next"])["step"] == [34]

    journal.write([Started(run, 20), *steps(21, 22)])
    again = curves(journal.file, more["next"])
    assert (again["step"], again["from"]) == ([21, 22], 20)
    assert curves(journal.file)["step"] == list(range(1, 23))
    assert curves(journal.file, 10**9)["step"] == list(range(1, 23)), "a file that became shorter is read anew"


def test_losses_that_were_no_number_are_gaps(store, tmp_path):
    file = tmp_path / "events.jsonl"
    Journal(file).write([StepDone(1, None, 1e-3, None, 5.0), StepDone(2, 0.5, 1e-3, 0.1, 5.5)])
    found = curves(file)
    assert found["loss"] == {"min": [None, 0.5], "max": [None, 0.5], "mean": [None, 0.5]}
    assert found["memory"] == [None, None]
    assert curves(tmp_path / "nothing")["step"] == []


def test_the_list_tells_what_goes_on_and_what_ended(store):
    add_run(store, "done", step=100)
    cut = add_run(store, "cut", step=40, status="running")
    going = add_run(store, "going", step=40, status="running")
    control = Control()
    with reachable(store.path(going), control), locked(store.root, "elsewhere"):
        found = {each["run_id"]: each for each in history.summaries(store)}
        assert {name: each["status"] for name, each in found.items()} == {
            "done": "finished",
            "cut": "interrupted",
            "going": "running",
        }
        assert found["going"]["mine"]
        assert not found["cut"]["mine"]
        assert found["done"]["message"] == "done"
        assert found["done"]["loss"] == pytest.approx(sum(1 / n for n in range(81, 101)) / 20)
        control.pause()
        assert history.summary(store, going)["status"] == "paused"
    with locked(store.root, "cut"):
        assert history.summary(store, cut)["status"] == "running", "another process trains it"
    (store.root / "done" / "run.json").write_text("{")
    assert "done" not in {each["run_id"] for each in history.summaries(store)}


def test_a_run_shows_its_settings_checkpoints_and_log(store):
    settings = TrainSettings(steps=50, batch_size=2, adapter=LyCORISSettings(algo="lokr", factor=8))
    run = add_run(store, settings=settings, step=50)
    Journal(store.path(run) / "events.jsonl").write([Evaluated(50, 0.25), CheckpointSaved(50, Path("x"))])
    found = history.describe(store, run)
    assert found["changed"] == {
        "steps": [50, 1000],
        "batch_size": [2, 1],
        "lycoris_factor": [8, -1],
    }
    assert [each["step"] for each in found["checkpoints"]] == [50]
    assert found["checkpoints"][0]["bytes"] > 0
    assert found["file"]["name"] == "style.safetensors"
    assert found["eval"] == {"50": 0.25}
    assert [each["event"] for each in found["log"]] == ["Started", "Ended", "Evaluated", "CheckpointSaved"]


def test_samples_are_told_by_prompt_and_step(store):
    run = add_run(store)
    shown = [Sample(f"samples/step-{step}/0.png", "apple", "a red apple", 7, score=20.0) for step in (0, 50)]
    Journal(store.path(run) / "events.jsonl").write([Validated(0, (shown[0],)), Validated(50, (shown[1],), asked=True)])
    found = history.samples(store, run)
    assert found["prompts"] == [{"name": "apple", "prompt": "a red apple", "seed": 7}]
    assert [(row["step"], row["asked"], row["pictures"][0]["path"]) for row in found["rows"]] == [
        (0, False, "samples/step-0/0.png"),
        (50, True, "samples/step-50/0.png"),
    ]


def test_no_picture_outside_of_the_run_is_given(store, tmp_path):
    run, other = add_run(store), add_run(store, "other")
    secret = tmp_path / "secret.png"
    samples = store.path(run) / "samples"
    samples.mkdir()
    for path in (secret, samples / "ok.png", store.path(other) / "theirs.png"):
        path.write_bytes(b"png")
    (samples / "link.png").symlink_to(secret)
    (samples / "text.txt").write_text("no picture")
    (samples / "folder").symlink_to(tmp_path)
    assert history.picture(store, run, "samples/ok.png") == (samples / "ok.png").resolve()
    for path in (
        "samples/link.png",
        "samples/folder/secret.png",
        "samples/text.txt",
        "samples/none.png",
        "../other/theirs.png",
        "../../secret.png",
        str(secret),
        "",
        "run.json",
    ):
        with pytest.raises(RunError, match="has no picture"):
            history.picture(store, run, path)


@pytest.mark.parametrize("folder", ["", ".", "..", "../runs/style", "style/", ".locks", "none", "/etc", "link"])
def test_only_folders_of_runs_are_found(store, tmp_path, folder):
    run = add_run(store)
    (tmp_path / "outside").mkdir()
    (store.root / "link").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "outside" / "run.json", {**run.__dict__, "folder": "link"})
    assert history.find(store, "style").folder == "style"
    with pytest.raises(RunError, match="no training run"):
        history.find(store, folder)


def test_deleting_takes_the_folder_and_its_own_files_and_nothing_else(store):
    run = add_run(store)
    neighbour = add_run(store, "style-2")
    for stem in ("style-ema", "style-400", "style-best"):
        add_lora(store, stem, run)
    add_lora(store, "style-of-mine", replace(run, identity="somebody else's"))
    (store.loras / "style-notes.safetensors").write_bytes(b"no safetensors")
    gone = history.delete(store, run)
    assert set(gone) == {
        "style",
        "style.safetensors",
        "style-ema.safetensors",
        "style-400.safetensors",
        "style-best.safetensors",
    }
    assert not (store.root / "style").exists()
    assert {path.stem for path in store.loras.iterdir()} == {"style-2", "style-of-mine", "style-notes"}
    assert history.find(store, "style-2").identity == neighbour.identity
    assert [path.name for path in store.root.iterdir() if path.is_dir() and path.name != ".locks"] == ["style-2"]


def test_a_run_that_goes_on_is_not_deleted(store):
    run = add_run(store, status="running")
    with reachable(store.path(run), Control()), pytest.raises(RunError, match="Stop it first"):
        history.delete(store, run)
    with locked(store.root, run.folder), pytest.raises(RunError, match="Stop it first"):
        history.delete_checkpoint(store, run, 100)
    assert (store.path(run) / "checkpoint-100").exists()
    assert (store.loras / "style.safetensors").exists()
    history.delete_checkpoint(store, run, 100)
    assert not (store.path(run) / "checkpoint-100").exists()


def test_a_checkpoint_is_put_where_loaders_find_it(store):
    run = add_run(store)
    add_checkpoint(store, run, 50)
    assert history.publish(store, run, 50) == "style-50.safetensors"
    assert (store.loras / "style-50.safetensors").read_bytes() == (
        store.path(run) / "checkpoint-50" / "lora.safetensors"
    ).read_bytes()
    with pytest.raises(RunError, match="no LoRA of step 51"):
        history.publish(store, run, 51)
    add_lora(store, "style-100", add_run(store, "style-100"))
    with pytest.raises(RunError, match="is another run's"):
        history.publish(store, run, 100)


def test_what_run_will_do_is_told_from_the_family(store):
    def told(settings=SETTINGS, name="style", token=0):
        found = history.predict(store, name, settings, token)
        return found.does, found.folder, found.step

    assert told() == ("new", "style", 0)
    run = add_run(store)
    assert told() == ("trained", "style", 100)
    assert told(replace(SETTINGS, steps=60)) == ("trained", "style", 100)
    assert told(replace(SETTINGS, steps=200)) == ("continues", "style", 100)
    assert told(replace(SETTINGS, seed=1)) == ("changed", "style-2", 0)
    assert history.predict(store, "style", replace(SETTINGS, seed=1, batch_size=2), 0).differs == ("batch_size", "seed")
    assert told(replace(SETTINGS, checkpoint_step_interval=7)) == ("trained", "style", 100), "it decides no weight"
    assert told(replace(SETTINGS, adapter=FullSettings()))[0] == "changed"
    assert told(replace(SETTINGS, adapter=LoRASettings(rank=8)))[0] == "changed"

    store.save(replace(run, status="stopped", step=40, target=100))
    add_checkpoint(store, run, 40)
    (store.path(run) / "checkpoint-100" / "checkpoint.json").unlink()
    assert told() == ("kept", "style", 40)
    assert told(token=1) == ("continues", "style", 40)
    add_run(store, "style-2", name="style", settings=replace(SETTINGS, seed=1))
    assert told(replace(SETTINGS, seed=1)) == ("trained", "style-2", 100)
    assert told(replace(SETTINGS, seed=2)) == ("changed", "style-3", 0)
    with pytest.raises(SettingError, match="cannot be a folder"):
        told(name="a/b")


def test_the_last_events_are_read_without_the_rest(tmp_path):
    file = tmp_path / "events.jsonl"
    Journal(file).write(steps(1, 3000))
    found = last_events(file)
    assert found[-1]["step"] == 3000
    assert 100 < len(found) < 1000
    assert last_events(tmp_path / "none") == []


def test_the_page_says_everything_in_both_languages():
    folder = Path(__file__).resolve().parents[2] / "web" / "js"
    scripts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.mjs")}
    block = scripts["words.mjs"].partition("const WORDS = {")[2].partition("\n};")[0]
    words = re.findall(r'(\w+): \[\s*"((?:[^"\\]|\\.)+)",\s*"((?:[^"\\]|\\.)+)",?\s*\]', block)
    assert len(words) == len(re.findall(r"^  \w+: \[", block, re.MULTILINE)), "each has two texts"
    for key, english, chinese in words:
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), key
    known, text = {key for key, *_ in words}, "\n".join(scripts.values())
    assert set(re.findall(r'\bsay\("(\w+)"', text)) <= known
    unused = {key for key in known if not re.search(rf'"{key}"|\b{key}:', text.replace(block, ""))}
    assert unused == set()
