"""What queueing does in a real server, whatever was queued before: nothing is overwritten or trained twice."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from comfy_server import Server, ServerError
from graphs import run_json, workflow
from safetensors.torch import load_file

from training.run.events import read_events

PICTURES = Path(__file__).resolve().parents[2] / "assets" / "nano" / "style"
NAMES = ("butterfly", "dog-face", "guitar", "crying-face")
A, B = 1e-3, 5e-4
LIMIT_S = 120


@dataclass
class Desk:
    """Somebody who queues the same graph again and again, with something changed."""

    server: Server
    pictures: Path

    @property
    def runs(self):
        return self.server.base / "output" / "lumina2"

    @property
    def loras(self):
        return self.server.base / "models" / "loras" / "lumina2"

    def graph(self, name="rule", pictures=None, **train):
        chosen = {"steps": 4, "learning_rate": A, "folder": str(pictures or self.pictures), "batch_size": 1}
        return workflow(name, **{**chosen, **train})

    def trained(self):
        """Steps logged in each folder, also those that a later line replaces."""
        return {
            log.parent.name: sum('"event"' not in line for line in log.read_text().splitlines())
            for log in self.runs.glob("*/events.jsonl")
        }

    def queue(self, **changed):
        """What queueing it trained: the steps by folder, those without any left out."""
        before = self.trained()
        self.server.run(self.graph(**changed))
        return {name: n - before.get(name, 0) for name, n in self.trained().items() if n > before.get(name, 0)}

    def step_reached(self, run, step):
        """Waits until a run that goes on has logged so many steps."""
        deadline = time.monotonic() + LIMIT_S
        while self.trained().get(run, 0) < step:
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.05)

    def stopped(self, run, **changed):
        """Queues a run, and presses Stop and keep when something was trained; the step it has."""
        identity = self.server.queue(self.graph(run, **changed))
        self.step_reached(run, 1)
        self.server.ask("/lumina2/stop", {"run_id": run})
        self.server.wait(identity)
        record = run_json(self.server, run)
        assert record["status"] == "stopped"
        return record["step"]

    def lora(self, run):
        return load_file(self.loras / f"{run}.safetensors")

    def forget(self):
        """Clear ComfyUI's own cache, which it does between two prompts: the next one is not to be the first of them."""
        self.server.ask("/free", {"unload_models": True, "free_memory": True})
        image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
        self.server.run({"image": image, "shown": {"class_type": "PreviewImage", "inputs": {"images": ["image", 0]}}})


@pytest.fixture(scope="module")
def desk(start, tmp_path_factory):
    pictures = tmp_path_factory.mktemp("rules") / "pictures"
    pictures.mkdir()
    for name in NAMES:
        for kind in ("png", "txt"):
            shutil.copy(PICTURES / f"{name}.{kind}", pictures)
    return Desk(start(), pictures)


def same(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def say(picture, text):
    picture.with_suffix(".txt").write_text(text)


def new_times(folder):
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))


@pytest.mark.parametrize("fresh", [False, True], ids=["ComfyUI remembers", "ComfyUI forgot"])
def test_the_table(desk, fresh, tmp_path):
    """Row by row, each with what queueing it trains. The second time through, nothing but a new name's runs."""
    caption = desk.pictures / f"{NAMES[0]}.txt"
    said = caption.read_text()
    moved, copied = tmp_path / "elsewhere", tmp_path / "copy"
    shutil.copytree(desk.pictures, copied)
    new_times(copied)
    name = "forgot" if fresh else "rule"
    second, third, fourth, fifth = (f"{name}-{n}" for n in range(2, 6))
    table = [
        ("the first time", {}, {name: 4}),
        ("the same again", {}, {}),
        ("more steps", {"steps": 6}, {name: 2}),
        ("fewer steps", {"steps": 3}, {}),
        ("another learning rate", {"learning_rate": B, "steps": 6}, {second: 6}),
        ("the first one again", {"steps": 6}, {}),
        ("the other one again", {"learning_rate": B, "steps": 6}, {}),
        ("one caption changed", {"caption": "something else"}, {third: 4}),
        ("and changed back", {"caption": said}, {}),
        ("once more from the start", {"attempt": 1}, {fourth: 4}),
        ("the attempt before", {"attempt": 0}, {}),
        ("the dataset copied, with new file times", {"pictures": copied}, {}),
        ("the dataset moved", {"pictures": moved}, {}),
        ("from a checkpoint", {"steps": 7, "resume": "from checkpoint", "checkpoint": f"{name}/checkpoint-4"},
         {fifth: 3}),
        ("and again", {"steps": 7, "resume": "from checkpoint", "checkpoint": f"{name}/checkpoint-4"}, {}),
        ("as at first", {}, {}),
    ]  # fmt: skip
    files: dict[Path, bytes] = {}
    for row, changed, expected in table:
        if "caption" in changed:
            caption.write_text(changed["caption"])
        if changed.get("pictures") == moved:
            desk.pictures.rename(moved)
        if fresh:
            desk.forget()
        found = desk.queue(name=name, **{key: value for key, value in changed.items() if key != "caption"})
        if moved.exists():
            moved.rename(desk.pictures)
        assert found == expected, row
        for file, content in files.items():
            own = file.stem == next(iter(expected), None)  # a run may replace its own file
            assert own or file.read_bytes() == content, f"{row}: {file.name} was overwritten"
        files = {file: file.read_bytes() for file in desk.loras.glob("*.safetensors")}
    for folder in (name, second, third, fourth, fifth):
        record = run_json(desk.server, folder)
        assert (record["status"], record["name"]) == ("finished", name)
        steps = [event["step"] for event in read_events(desk.runs / folder / "events.jsonl") if "event" not in event]
        begin = 4 if folder == fifth else 0
        assert steps == list(range(begin + 1, record["step"] + 1))
    assert not same(desk.lora(name), desk.lora(second))
    assert not same(desk.lora(fourth), desk.lora(name))  # of 4 steps and of 6


def test_after_stop_and_keep_it_is_handed_out_until_more_is_asked(desk):
    step = desk.stopped("kept", steps=60)
    kept = desk.lora("kept")
    for changed in ({}, {"steps": 50}, {"steps": step}, {"steps": 1}):
        desk.forget()
        assert desk.queue(name="kept", **{"steps": 60, **changed}) == {}
        assert same(desk.lora("kept"), kept)
    assert desk.queue(name="kept", steps=60, continue_token=1) == {"kept": 60 - step}
    assert run_json(desk.server, "kept")["status"] == "finished"
    assert desk.queue(name="kept", steps=60, continue_token=1) == {}
    assert desk.queue(name="undisturbed", steps=60) == {"undisturbed": 60}
    assert same(desk.lora("kept"), desk.lora("undisturbed"))


def test_after_stop_and_keep_more_steps_go_on(desk):
    step = desk.stopped("kept too", steps=40)
    assert desk.queue(name="kept too", steps=41) == {"kept too": 41 - step}


def test_an_interrupted_run_goes_on_after_a_restart(desk):
    identity = desk.server.queue(desk.graph("cut", steps=60))
    desk.step_reached("cut", 1)
    desk.server.ask("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        desk.server.wait(identity)
    step = run_json(desk.server, "cut")["step"]
    assert 0 < step < 60
    desk.server.stop()
    desk.server.start()
    assert desk.queue(name="cut", steps=60) == {"cut": 60 - step}
    assert desk.queue(name="cut", steps=60) == {}
    assert same(desk.lora("cut"), desk.lora("undisturbed"))
    assert desk.queue() == {}  # of the server before


def test_what_was_deleted_by_hand(desk):
    """The LoRA alone is written again; a LoRA whose run is gone is somebody's own, and stays."""
    file = desk.loras / "rule.safetensors"
    before = desk.lora("rule")
    file.unlink()
    desk.forget()
    assert desk.queue(steps=6) == {}
    assert same(desk.lora("rule"), before)
    shutil.rmtree(desk.runs / "rule")
    content = file.read_bytes()
    desk.forget()
    assert desk.queue(steps=6) == {"rule-6": 6}
    assert file.read_bytes() == content
    assert same(desk.lora("rule-6"), before)


def test_a_deleted_run_is_trained_again_under_its_name(desk):
    assert desk.queue(name="gone", steps=3) == {"gone": 3}
    first = desk.lora("gone")
    desk.server.ask("/lumina2/delete", {"run_id": "gone"})
    assert not (desk.runs / "gone").exists()
    assert not (desk.loras / "gone.safetensors").exists()
    assert desk.queue(name="gone", steps=3) == {"gone": 3}
    assert same(desk.lora("gone"), first)
