"""What is asked of a run between its steps, what it tells meanwhile, and what is left when something goes wrong."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nano import tiny
from safetensors.torch import load_file

from training.config.adapter import FullSettings, LoRASettings
from training.config.optim import OptimizerSettings
from training.config.precision import PrecisionSettings
from training.config.settings import TrainSettings
from training.errors import RunError, SettingError
from training.run import checkpoint, keeping, ledger, loop, memory_error
from training.run.checkpoint import newest_checkpoint, read_checkpoint
from training.run.control import Control, active
from training.run.curves import curves
from training.run.events import (
    Between,
    CheckpointSaved,
    Ended,
    Evaluated,
    Journal,
    LearningRateSet,
    LoRASaved,
    Paused,
    Resumed,
    Said,
    Sample,
    Validated,
    read_events,
    read_losses,
)
from training.run.lock import in_use, locked

SETTINGS = TrainSettings(
    steps=8,
    batch_size=2,
    adapter=LoRASettings(4),
    optimizer=OptimizerSettings(learning_rate=1e-2),
    checkpoint_step_interval=3,
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def interrupts_are_noticed():
    """A process that was started in the background ignores SIGINT until it is told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tiny.caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def run(caches, tmp_path):
    return tiny.Train(caches, tiny.store(tmp_path), SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(caches, tmp_path_factory):
    """(outcome, run folder) of the run that nothing happened to."""
    train = tiny.Train(caches, tiny.store(tmp_path_factory.mktemp("undisturbed")), SETTINGS)
    return train(), train.store.root / "cats"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def state(folder, step=8):
    """All that a checkpoint holds."""
    return load_file(folder / f"checkpoint-{step}" / "state.safetensors")


def steps(folder):
    """Step, loss, norm and learning rate of each step that counts."""
    lines = [event for event in read_events(folder / "events.jsonl") if "event" not in event]
    return [(line["step"], line["loss"], line.get("grad_norm"), line["lr"]) for line in lines]


def check_as_undisturbed(run, undisturbed, folder="cats"):
    outcome, whole = undisturbed
    assert same(state(run.store.root / folder), state(whole))
    assert same(load_file(run.store.loras / f"{folder}.safetensors"), outcome.lora)
    assert steps(run.store.root / folder) == steps(whole)
    assert run.store.read(folder).status == "finished"


def at(step, act):
    """Does something before the step after so many is taken."""

    def listen(event):
        if isinstance(event, Between) and event.step == step and event.doing == "training":
            act()

    return listen


def kinds(events, *wanted):
    return [event for event in events if isinstance(event, wanted)]


@contextmanager
def in_thread(work):
    """``work`` goes on beside; its error is this thread's."""
    failed = []

    def caught():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
    if failed:
        raise failed[0]


# --- commands


def test_stop_and_keep_hands_out_until_it_is_asked_to_go_on(run, undisturbed):
    control = Control()
    outcome = run(at(5, control.stop), control=control)
    assert (outcome.run.status, outcome.run.step, run.steps) == ("stopped", 5, 6)
    assert len(outcome.losses) == 5
    assert kinds(run.heard, Ended)[-1].status == "stopped"
    kept = load_file(run.store.loras / "cats.safetensors")
    assert same(kept, outcome.lora)
    for changes in ({}, {"steps": 7}):
        assert same(run(**changes).lora, kept)
        assert run.steps == 0
        assert "stopped and kept at step 5" in run.said[-1]
    run(request={"continue_token": 1})
    assert run.steps == 3
    check_as_undisturbed(run, undisturbed)


def test_stopped_and_kept_goes_on_where_more_steps_are_asked(run):
    control = Control()
    run(at(4, control.stop), control=control)
    outcome = run(steps=9)
    assert (run.steps, outcome.run.step, outcome.run.target) == (5, 9, 9)


def test_an_interrupt_by_command_ends_the_run_and_the_next_one_goes_on(run, undisturbed):
    control = Control()
    outcome = run(at(4, control.interrupt), control=control)
    assert (outcome.run.status, outcome.run.step) == ("interrupted", 4)
    run()
    assert run.steps == 4
    check_as_undisturbed(run, undisturbed)


def test_save_now_writes_a_checkpoint_and_a_file_and_changes_nothing(run, undisturbed):
    control = Control()
    run(at(4, control.save), control=control)
    folder = run.store.root / "cats"
    assert same(
        load_file(run.store.loras / "cats-4.safetensors"), load_file(folder / "checkpoint-4" / "lora.safetensors")
    )
    assert [event.step for event in kinds(run.heard, LoRASaved)] == [4, 8]
    assert [event.step for event in kinds(run.heard, CheckpointSaved)] == [3, 4, 6, 8]
    check_as_undisturbed(run, undisturbed)


def test_a_paused_run_takes_no_step_and_obeys_other_commands(run, undisturbed):
    control, paused, saved = Control(), threading.Event(), threading.Event()
    during = []

    def on(event):
        at(4, control.pause)(event)
        if isinstance(event, Paused):
            paused.set()
        if isinstance(event, LoRASaved):
            saved.set()
        if paused.is_set() and control.paused:
            during.append(event)

    def outside():
        assert paused.wait(60)
        control.save()
        assert saved.wait(60)
        control.resume()

    with in_thread(outside):
        run(on, control=control)
    assert {event.doing for event in kinds(during, Between)} <= {"paused"}
    assert [event.step for event in kinds(during, CheckpointSaved)] == [4]
    assert [event.step for event in kinds(run.heard, Paused, Resumed)] == [4, 4]
    check_as_undisturbed(run, undisturbed)


def test_stop_and_interrupts_end_a_pause(run, undisturbed):
    control = Control()

    def cancel(event):
        at(4, control.pause)(event)
        if isinstance(event, Between) and event.doing == "paused":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cancel, control=control)
    assert (run.store.read("cats").status, run.store.read("cats").step) == ("interrupted", 4)
    control = Control()
    control.pause()
    with in_thread(lambda: (control.wait(0.2), control.stop())):
        assert run(control=control).run.status == "stopped"
    assert run.steps == 1  # it was asked once, and took none
    run(request={"continue_token": 1})
    check_as_undisturbed(run, undisturbed)


def test_a_learning_rate_set_in_mid_run_is_state(run, undisturbed):
    control = Control()
    with pytest.raises(SettingError, match=r"-1.*choose a number above 0"):
        control.set_learning_rate(-1)

    def on(event):
        at(2, lambda: control.set_learning_rate(2e-2))(event)
        at(5, control.interrupt)(event)

    run(on, control=control)
    folder = run.store.root / "cats"
    assert [line[3] for line in steps(folder)] == pytest.approx([1e-2] * 2 + [2e-2] * 3)
    assert kinds(run.heard, LearningRateSet)[0].lr == 2e-2
    assert run.store.read("cats").learning_rate == pytest.approx(2e-2)
    outcome = run()
    assert (outcome.run.folder, run.steps) == ("cats", 3)  # the same training
    assert [line[3] for line in steps(folder)][5:] == pytest.approx([2e-2] * 3)
    assert run.store.read("cats").learning_rate == pytest.approx(2e-2)
    assert not same(outcome.lora, undisturbed[0].lora)
    branch = run(steps=9, request={"resume": "from checkpoint", "checkpoint": "cats/checkpoint-8"})
    assert branch.run.learning_rate == 0  # today's settings hold there
    assert [line[3] for line in steps(run.store.root / branch.run.folder)] == pytest.approx([1e-2])


def test_a_run_is_found_by_its_folder_from_any_thread(run):
    began = threading.Event()
    folder = run.store.root / "cats"

    def outside():
        assert began.wait(60)
        active(folder).stop()

    with in_thread(outside):
        outcome = run(at(1, began.set), steps=2000, checkpoint_step_interval=2000)
    assert outcome.run.status == "stopped"
    assert active(folder) is None


# --- validation


class Judge:
    """Draws nothing; the held-out loss is what is given, by step."""

    def __init__(self, losses, stop=()):
        self.losses, self.stop, self.asked, self.moments = losses, stop, [], []

    def due(self, step):
        self.asked.append(step)
        return step in self.losses

    def run(self, moment):
        self.moments.append(moment)
        moment.tick()
        yield Validated(moment.step, (Sample("samples/a.png", "a", "a cat", 1),))
        lower = all(self.losses[moment.step] < loss for step, loss in self.losses.items() if step < moment.step)
        yield Evaluated(moment.step, self.losses[moment.step], best=lower, stop=moment.step in self.stop)

    def sample(self, moment, prompt):
        if not prompt:
            raise SettingError("Nothing is written.")
        yield Validated(moment.step, (Sample("samples/b.png", "b", prompt, 1),), asked=True)


def test_a_validation_is_asked_for_at_each_step_and_told(run, undisturbed):
    judge, control = Judge({0: 5.0, 4: 4.0, 6: 4.5}), Control()
    at_five = []
    run(
        at(5, lambda: at_five or (at_five.append(1), control.sample("a dog "), control.sample(""))),
        control=control,
        validator=judge,
    )
    assert judge.asked == list(range(9))
    assert [moment.step for moment in judge.moments] == [0, 4, 6]
    assert all(moment.folder == run.store.root / "cats" for moment in judge.moments)
    assert [event.step for event in kinds(run.heard, Between) if event.doing == "validating"] == [0, 4, 6]
    assert [(event.step, event.asked) for event in kinds(run.heard, Validated)] == [
        (0, False),
        (4, False),
        (5, True),
        (6, False),
    ]
    assert "Nothing is written." in run.said  # and the run goes on
    best = load_file(run.store.loras / "cats-best.safetensors")
    lines = read_events(run.store.root / "cats" / "events.jsonl")
    assert [(line["step"], line["loss"]) for line in lines if line.get("event") == "Evaluated"] == [
        (0, 5.0),
        (4, 4.0),
        (6, 4.5),
    ]
    assert [line["samples"][0]["prompt"] for line in lines if line.get("event") == "Validated"][2] == "a dog"
    # no step before a validation is missing from the log when it is told
    order = [line["step"] for line in lines if line.get("event") in (None, "Validated")]
    assert order == sorted(order)
    check_as_undisturbed(run, undisturbed)
    control = Control()
    again = tiny.Train(run.caches, tiny.store(run.store.root.parent / "again"), SETTINGS)
    again(at(4, control.save), control=control)
    assert same(best, load_file(again.store.loras / "cats-4.safetensors"))


class Drawing:
    """Draws at step 4, in a thousand network calls; ``on`` is called at each, with its number."""

    def __init__(self, on):
        self.on, self.calls = on, 0

    def due(self, step):
        return step == 4 and not self.calls

    def run(self, moment):
        while self.calls < 1000:
            self.calls += 1
            self.on(self.calls)
            moment.tick()
        yield Validated(moment.step, (Sample("samples/a.png", "a", "a cat", 1),))


@pytest.mark.parametrize(("how", "status"), [("stop", "stopped"), ("interrupt", "interrupted")])
def test_what_ends_a_run_ends_a_drawing_before_its_next_step(run, undisturbed, how, status):
    control = Control()
    drawing = Drawing(lambda call: call == 7 and getattr(control, how)())
    outcome = run(control=control, validator=drawing)
    assert (outcome.run.status, outcome.run.step, drawing.calls) == (status, 4, 7)
    assert not kinds(run.heard, Validated)
    run(request={"continue_token": 1})
    check_as_undisturbed(run, undisturbed)


def test_a_pause_rests_within_a_drawing_and_other_commands_come_behind_it(run, undisturbed, monkeypatch):
    control, rests = Control(), []

    def rest(seconds):
        rests.append(drawing.calls)
        if len(rests) == 3:
            control.resume()

    drawing = Drawing(lambda call: call == 7 and (control.save(), control.pause()))
    monkeypatch.setattr(time, "sleep", rest)
    run(control=control, validator=drawing)
    assert rests == [7, 7, 7]
    assert drawing.calls == 1000
    assert [event.doing for event in kinds(run.heard, Between) if event.doing == "paused"] == ["paused"] * 3
    told = kinds(run.heard, Validated, LoRASaved)
    assert [type(event) for event in told] == [Validated, LoRASaved, LoRASaved]
    check_as_undisturbed(run, undisturbed)


class Asked:
    """Draws nothing of itself, and what it is asked for in three network calls."""

    def due(self, step):
        return False

    def sample(self, moment, prompt):
        for _ in range(3):
            moment.tick()
        return [Validated(moment.step, (Sample("samples/a.png", "a", prompt, 1),))]


def test_what_is_asked_for_in_a_pause_is_drawn_in_it(run, undisturbed, monkeypatch):
    control = Control()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the drawing waits for the pause to end"))

    def on(event):
        at(4, lambda: (control.pause(), control.sample("a cat")))(event)
        if isinstance(event, Validated):
            assert control.paused
            control.resume()

    run(on, control=control, validator=Asked())
    assert [(event.step, event.samples[0].prompt) for event in kinds(run.heard, Validated)] == [(4, "a cat")]
    check_as_undisturbed(run, undisturbed)


def test_early_stopping_keeps_what_there_is(run, undisturbed):
    outcome = run(validator=Judge({2: 1.0, 5: 2.0}, stop=(5,)))
    assert (outcome.run.status, outcome.run.step) == ("stopped", 5)
    assert "early stopping at step 5" in outcome.message
    assert any("early stopping at step 5" in note for note in run.store.read("cats").notes)
    run(validator=Judge({}))
    assert run.steps == 0
    run(request={"continue_token": 1})
    check_as_undisturbed(run, undisturbed)


def test_sampling_without_a_validator_is_a_sentence(run):
    control = Control()
    run(at(2, lambda: control.sample("a cat")), control=control)
    assert any("wire a VAE" in text for text in run.said)


# --- what is written of a run


def test_each_step_is_read_once_after_a_crash(run, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        run(at(7, lambda: signal.raise_signal(signal.SIGINT)))
    folder = run.store.root / "cats"
    # as if killed before the checkpoint, while a line was written
    for path in (folder / "checkpoint-7").iterdir():
        path.unlink()
    (folder / "checkpoint-7").rmdir()
    log = folder / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-1].rsplit(b"\n", 1)[0] + '\n{"event": "Said", "text": "é'.encode()[:-1])
    assert [line[0] for line in steps(folder)] == list(range(1, 8))
    run()
    assert run.steps == 2
    check_as_undisturbed(run, undisturbed)
    assert read_losses(log, 8) == undisturbed[0].losses
    assert len(log.read_text(errors="replace").split('"step": 7,')) > 2  # it stands there twice


def test_any_text_stays_one_line(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal(Said("one\u2028two\x85three\nfour"))
    journal(Between(1, 0.5))  # is worth no line
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["text"] == "one\u2028two\x85three\nfour"


def test_a_listener_that_fails_ends_the_run_with_everything_saved(run, undisturbed):
    def fail():
        raise LookupError("my own trouble")

    heard = []
    with pytest.raises(LookupError, match="my own trouble"):
        run(lambda event: (heard.append(event), at(5, fail)(event)))
    assert run.store.read("cats").step == 5
    assert isinstance(heard[-1], Ended)  # it is told nevertheless
    assert heard[-1].message == "my own trouble"
    assert not in_use(run.store.root)
    run()
    assert run.steps == 3
    check_as_undisturbed(run, undisturbed)


def test_what_is_set_otherwise_is_said(run):
    cosine = OptimizerSettings(learning_rate=1e-2, lr_scheduler="cosine")
    run(optimizer=cosine, steps=4)
    assert "other than" not in run.said[-1]
    run(optimizer=cosine, steps=6)
    assert run.said[-1] == "continuing from step 4; lr_scheduler cosine spans 6 steps from here on, not 4"
    run(optimizer=cosine, steps=6)
    assert run.said[-1] == "already trained: 6 steps, 6 asked"
    run(steps=1)
    assert run.said[-1].endswith("other than in cats: lr_scheduler: cosine → constant")
    run(steps=1, request={"attempt": 1})
    assert run.said[-1].endswith("other than in cats-2: pictures, captions, MODEL, kind of adapter or attempt")
    run(steps=2)
    assert run.said[-1] == "continuing from step 1"  # a rate that stays as it is


def test_a_clock_that_is_set_back_disturbs_nothing(run, undisturbed, monkeypatch):
    now, told = time.time, []
    monkeypatch.setattr(time, "time", lambda: now() - 86400 * len(told))
    control = Control()

    def on(event):
        told.append(event)
        at(5, control.interrupt)(event)

    run(on, control=control)
    run()
    check_as_undisturbed(run, undisturbed)
    found = curves(run.store.root / "cats" / "events.jsonl")
    assert found["step"] == list(range(1, 9))
    assert all(speed is None or speed > 0 for speed in found["speed"])


# --- checkpoints


def test_a_save_under_way_completes_when_it_is_interrupted(run, undisturbed, monkeypatch):
    written = checkpoint.write_tensors

    def interrupted(path, *rest):
        written(path, *rest)
        if "checkpoint-6" in str(path) and path.name == "state.safetensors":
            monkeypatch.setattr(checkpoint, "write_tensors", written)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    folder = run.store.root / "cats"
    assert (run.store.read("cats").status, run.store.read("cats").step) == ("interrupted", 6)
    assert same(
        load_file(folder / "checkpoint-6" / "lora.safetensors"), load_file(run.store.loras / "cats.safetensors")
    )
    run()
    assert run.steps == 2
    check_as_undisturbed(run, undisturbed)


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_named(run, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        run(at(7, lambda: signal.raise_signal(signal.SIGINT)))
    folder = run.store.root / "cats"
    os.truncate(folder / "checkpoint-7" / "state.safetensors", 5000)
    leftovers = [folder / ".checkpoint-6.tmp", folder / ".checkpoint-2.old"]  # of a process that was killed
    for left in leftovers:
        left.mkdir()
        (left / "state.safetensors").write_bytes(b"half")
    leftovers += [folder / ".run.json.q1w2e3.tmp", run.store.loras / ".cats.safetensors.q1w2e3.tmp"]
    others = run.store.loras / ".cats-2.safetensors.q1w2e3.tmp"
    for left in (*leftovers[2:], others):
        left.write_bytes(b"half")
    run()
    assert "continuing from step 6 (checkpoint-7 cannot be read)" in run.said[-1]
    assert not any(left.exists() for left in leftovers)
    assert others.exists()  # its run may be under way
    check_as_undisturbed(run, undisturbed)
    with pytest.raises(RunError, match="There is no checkpoint 'cats/checkpoint-7'"):
        run(steps=9, request={"resume": "from checkpoint", "checkpoint": "cats/checkpoint-7"})


def test_old_checkpoints_go_only_when_the_new_one_is_there(run, monkeypatch):
    replaced, seen = os.replace, []

    def watched(source, target):
        if Path(target).name.startswith("checkpoint-"):
            seen.append(sorted(path.name for path in Path(target).parent.glob("checkpoint-*")))
        replaced(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", watched)
    run(checkpoint_step_interval=1, checkpoints_total_limit=2)
    assert seen[4] == ["checkpoint-3", "checkpoint-4"]  # while checkpoint-5 is about to be moved there
    folders = sorted(path.name for path in (run.store.root / "cats").glob("*checkpoint-*"))
    assert folders == ["checkpoint-7", "checkpoint-8"]


def test_a_checkpoint_that_is_written_again_is_there_until_the_new_one_is(run, monkeypatch):
    removed, whole, control = shutil.rmtree, [], Control()

    def watched(path, *rest, **more):
        if Path(path).name == ".checkpoint-3.old" and Path(path).exists():
            whole.append(read_checkpoint(run.store.root / "cats" / "checkpoint-3"))
        removed(path, *rest, **more)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watched)
    run(at(3, control.save), control=control, steps=4)
    assert len(whole) == 1
    assert whole[0]


def test_killed_between_the_last_checkpoint_and_the_file_ends_properly(run, undisturbed):
    run()
    record = run.store.read("cats")
    run.store.save(replace(record, status="running"))
    run.store.file("cats").write_bytes(b"of an earlier step")
    outcome = run()
    assert run.steps == 0
    assert same(outcome.lora, undisturbed[0].lora)
    check_as_undisturbed(run, undisturbed)


@pytest.mark.parametrize("fused", [False, True])
def test_what_ends_a_run_while_weights_change_leaves_the_last_checkpoint(run, monkeypatch, fused):
    """Some weights are of the new step then, and some of the old one."""
    changes = {}
    if fused:
        clipped = OptimizerSettings(learning_rate=1e-3, fused_backward=True, grad_clip_method="update")
        changes = {"adapter": FullSettings(), "optimizer": clipped}
    whole = tiny.Train(run.caches, tiny.store(run.store.root.parent / "whole"), SETTINGS)
    whole(**changes)
    stepped, calls = loop.step_optimizer, []
    module = sys.modules["training.optim.backward"] if fused else loop
    every = len(newest_weights(whole)) if fused else 1

    def cut(optimizer, finite):
        calls.append(1)
        if len(calls) == 4 * every + (every // 2 or 1):
            if not fused:
                for group in optimizer.param_groups:
                    del group["params"][1:]  # as far as it came
                stepped(optimizer, finite)
            raise KeyboardInterrupt
        stepped(optimizer, finite)

    monkeypatch.setattr(module, "step_optimizer", cut)
    with pytest.raises(KeyboardInterrupt):
        run(**changes)
    monkeypatch.setattr(module, "step_optimizer", stepped)
    assert newest_checkpoint(run.store.root / "cats").step == run.store.read("cats").step == 3
    run(**changes)
    assert run.steps == 5
    assert same(state(run.store.root / "cats"), state(whole.store.root / "cats"))
    assert steps(run.store.root / "cats") == steps(whole.store.root / "cats")


def newest_weights(train):
    return [key for key in state(train.store.root / "cats") if key.startswith("adapter.")]


# --- one process at a time


def test_a_run_in_use_is_refused_and_a_killed_process_holds_nothing(run, tmp_path, undisturbed):
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from training.run.lock import locked\n"
        f"with locked(Path({str(run.store.root)!r}), 'cats'): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=rf"'cats' is in use by process {child.pid} on .* for 0 minutes"):
                run()
            assert in_use(run.store.root) == {"cats"}
            assert not (run.store.root / "cats").exists()
            assert run(name="dogs").run.folder == "dogs"
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    assert not in_use(run.store.root)
    run()
    check_as_undisturbed(run, undisturbed)


def test_on_a_disk_without_locks_what_is_written_there_counts(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    file = tmp_path / ".locks" / "cats.lock"
    with locked(tmp_path, "cats"):
        claim = json.loads(file.read_text())
    assert file.read_text() == ""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        file.write_text(json.dumps({**claim, "process": child.pid, "since": time.time() - 7200}))
        assert in_use(tmp_path) == {"cats"}
        with pytest.raises(RunError, match=rf"process {child.pid} on {socket.gethostname()} for 2\.0 hours\. Stop"):
            locked(tmp_path, "cats").__enter__()
    assert not in_use(tmp_path)  # that process has ended
    file.write_text(json.dumps({**claim, "computer": "elsewhere"}))
    with pytest.raises(RunError, match=rf"on elsewhere for .* \(if that has ended, delete {re.escape(str(file))}"):
        locked(tmp_path, "cats").__enter__()
    file.unlink()
    with locked(tmp_path, "cats"):
        assert json.loads(file.read_text())["process"] == os.getpid()


# --- disk


@contextmanager
def files_no_larger_than():
    """A function that limits the size of files, in bytes, until the end of the block."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(("size", "what"), [(6000, "checkpoint"), (300, "log")])
def test_a_full_disk_loses_nothing_that_was_saved(run, undisturbed, size, what):
    with files_no_larger_than() as limit, pytest.raises(RunError, match=r"disk of .*cats is full.*step 3 is whole"):
        run(at(5, lambda: limit(size)))
    folder = run.store.root / "cats"
    assert run.store.read("cats").step == newest_checkpoint(folder).step == 3
    assert run.store.read("cats").status == ("failed" if what == "checkpoint" else "running")  # no room to say more
    assert "is full" in kinds(run.heard, Ended)[-1].message
    assert not list(run.store.loras.glob("*"))
    run()
    assert run.steps == 5
    check_as_undisturbed(run, undisturbed)
    assert not list(folder.glob(".*"))


def test_a_disk_without_room_for_a_checkpoint_is_seen_before_the_first_step(run, monkeypatch):
    monkeypatch.setattr(keeping, "SPARE_BYTES", 2**62)
    with pytest.raises(RunError, match=r"is full: a checkpoint of step 0 needs 0\.00 GB and .* are free"):
        run()
    assert run.steps == 0


# --- not a number


def poisoned(folder, numbers, monkeypatch):
    """The tiny caches, with latents that are not a number."""
    encode, seen = tiny._encode, []

    def broken(pictures):
        latents = encode(pictures)
        for row in range(len(latents)):
            if len(seen) in numbers:
                latents[row] = torch.nan
            seen.append(1)
        return latents

    monkeypatch.setattr(tiny, "_encode", broken)
    return tiny.caches(folder)


def test_a_poisoned_picture_is_skipped_counted_and_said_while_others_train(run, tmp_path, monkeypatch):
    run.caches = poisoned(tmp_path / "poisoned", {2}, monkeypatch)
    outcome = run(steps=24, batch_size=1)
    log = read_events(run.store.root / "cats" / "events.jsonl")
    bad = [line["step"] for line in log if "event" not in line and line["loss"] is None]
    assert 1 <= len(bad) <= 10
    assert len(outcome.losses) == 24 - len(bad)
    assert f"{len(bad)} steps skipped, not a number" in outcome.message
    assert sum("such steps change no weight" in text for text in run.said) == 1
    assert all(torch.isfinite(weight).all() for weight in outcome.lora.values())
    assert any(weight.abs().max() > 0 for key, weight in outcome.lora.items() if "lora_B" in key)
    assert all(torch.isfinite(value.float()).all() for value in state(run.store.root / "cats", 24).values())


def test_where_all_is_poisoned_the_run_ends_and_changes_nothing(run, tmp_path, monkeypatch):
    run.caches = poisoned(tmp_path / "poisoned", set(range(9)), monkeypatch)
    with pytest.raises(RunError, match=r"not a number for \d+ steps in a row, which changed no weight"):
        run(steps=40, checkpoint_step_interval=100)
    assert run.steps <= ledger.READ_EVERY + 1
    assert run.store.read("cats").status == "failed"
    assert not list(run.store.loras.glob("*"))


def test_good_checkpoints_outlive_any_number_of_bad_attempts(run, undisturbed):
    """The run ends before the first bad step, and queueing it again wears nothing out."""

    def break_at(step):
        model = tiny.transformer()
        return at(step, lambda: model.final_layer.linear.weight.fill_(torch.nan)), model

    on, model = break_at(4)
    with pytest.raises(RunError, match="not a number"):
        run(on, model=model, steps=40, checkpoint_step_interval=100)
    folder = run.store.root / "cats"
    assert (run.store.read("cats").step, newest_checkpoint(folder).step) == (4, 4)
    whole = tiny.Train(run.caches, tiny.store(run.store.root.parent / "whole"), SETTINGS)
    assert same(load_file(run.store.loras / "cats.safetensors"), whole(steps=4).lora)
    for _ in range(3):
        on, model = break_at(4)
        with pytest.raises(RunError, match="not a number"):
            run(on, model=model, steps=40, checkpoint_step_interval=100, checkpoints_total_limit=1)
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    run()
    assert run.steps == 4
    check_as_undisturbed(run, undisturbed)


# --- memory


@pytest.mark.parametrize("of", ["the GPU", "the CPU"])
def test_out_of_memory_tells_the_forecast_and_what_would_fit_and_keeps_the_state(run, undisturbed, monkeypatch, of):
    computed, calls = loop.losses_of, []

    def allocate(*arguments):
        calls.append(1)
        if len(calls) == 6:
            if of == "the GPU":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            torch.empty(2**55)
        return computed(*arguments)

    monkeypatch.setattr(loop, "losses_of", allocate)
    monkeypatch.setattr(memory_error, "device_memory", lambda device: 402 * 10**6)
    with pytest.raises(RunError, match=r"Out of memory in step 6; what was trained before is kept\. The forecast was"):
        run()
    assert (run.store.read("cats").status, run.store.read("cats").step) == ("failed", 5)
    assert "Out of memory in step 6" in kinds(run.heard, Ended)[-1].message
    monkeypatch.setattr(loop, "losses_of", computed)
    run()
    assert run.steps == 3
    check_as_undisturbed(run, undisturbed)


def test_what_would_fit_follows_from_the_memory_that_is_there(monkeypatch):
    config = replace(tiny.CONFIG, dim=384, ffn_dim=1024, layers=3, heads=4, kv_heads=2, axes_dim=(32, 32, 32))
    settings = TrainSettings(batch_size=8, precision=PrecisionSettings(gradient_checkpointing=False))

    measured = []
    measure = memory_error.measure

    def once(*arguments):
        measured[:] = measured or [measure(*arguments)]
        return measured[0]

    monkeypatch.setattr(memory_error, "measure", once)

    def said(there):
        monkeypatch.setattr(memory_error, "device_memory", lambda device: there)
        return memory_error.what_would_fit(config, settings, (64, 64), torch.zeros(1), torch.float32)

    plenty, none = said(10**12), said(None)
    assert "other programs seem to hold the rest" in plenty
    assert "gradient_checkpointing = true" in none
    saved = {name: float(size) for name, size in re.findall(r"([\w.]+ = [\w.-]+) \(saves ([\d.]+) GB\)", none)}
    needed = float(none.split("The forecast was ")[1].split(" GB")[0])
    assert len(saved) >= 2
    largest = max(saved, key=saved.get)
    between = sorted(saved.values())[-2:]
    there = int((needed - sum(between) / 2) * 10**9)  # room with the best switch, and with no other
    only = said(there)
    assert f"It would fit with {largest} (saves" in only
    assert only.count("saves") == 1
    assert "several of them together" in said(1)


def test_a_forecast_that_fails_hides_no_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(memory_error, "measure", broken)
    told = memory_error.what_would_fit(tiny.CONFIG, SETTINGS, (8, 8), torch.zeros(1), torch.float32)
    assert "switch gradient_checkpointing on" in told


def test_run_json_is_whole_json(run):
    run()
    text = (run.store.root / "cats" / "run.json").read_text()
    assert json.loads(text)["notes"]
