"""Runs in a real server: interrupted anywhere, stopped and kept, beside each other, and ComfyUI as it was before."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from comfy_server import ServerError
from graphs import pictures, run_json, sampled, workflow
from listening import Page
from PIL import Image
from safetensors.torch import load_file

from training.cache.store import Store
from training.run.checkpoint import read_checkpoint
from training.run.events import read_events

LIMIT_S = 120
STEPS = 40
PICTURES = 100


@pytest.fixture
def page(server):
    with Page(server.url) as page:
        yield page


def progress(node, at_least):
    """A message that a node has done so much."""
    return lambda m: m["type"] == "progress" and m["data"]["node"] == node and m["data"]["value"] >= at_least


def of_run(run, **wanted):
    """A message about a run, in which something stands."""
    return lambda m: (
        m["type"] == "lumina2.run"
        and m["data"]["run_id"] == run
        and all(m["data"][name] == value for name, value in wanted.items())
    )


def interrupt(server, identity):
    """Press Cancel; the prompt ends by it."""
    server.ask("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        server.wait(identity)


def folder(server, run):
    return server.base / "output" / "lumina2" / run


def lora(server, run):
    return load_file(server.base / "models" / "loras" / "lumina2" / f"{run}.safetensors")


def losses(server, run):
    """Loss by step, each once."""
    lines = [event for event in read_events(folder(server, run) / "events.jsonl") if "event" not in event]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def calm(server):
    """The run that nothing happens to."""
    server.run(workflow("calm", steps=STEPS))
    return losses(server, "calm"), lora(server, "calm")


def check_as_calm(server, run, calm):
    record = run_json(server, run)
    assert (record["status"], record["step"], record["target"]) == ("finished", STEPS, STEPS)
    assert losses(server, run) == calm[0]
    assert same(lora(server, run), calm[1])


# --- interrupts


def draw_many(place, seed):
    """Pictures that no other test caches; their names are their captions."""
    place.mkdir()
    chance = np.random.default_rng(seed)
    for number in range(PICTURES):
        Image.fromarray(chance.integers(0, 256, (64, 64, 3), np.uint8)).save(place / f"{place.name} {number}.png")
    return place


@pytest.mark.parametrize(("what", "store"), [("latents", "latents"), ("texts", "text")])
def test_an_interrupt_while_caching_keeps_what_is_encoded(server, page, tmp_path, what, store):
    def entries():
        return len(Store(str(folder(server, ".cache") / store)).open().keys())

    many = draw_many(tmp_path / f"many {what}", len(what))
    graph = workflow(f"interrupted {what}", steps=3, folder=str(many))
    graph["data"]["inputs"]["caption_strategy"] = "filename"
    graph["latents"]["inputs"]["batch_size"] = 1
    before = entries()
    identity = server.queue(graph)
    page.wait(progress(what, 10))
    interrupt(server, identity)
    reached = page.count(progress(what, 1))
    there = entries() - before
    assert reached - 2 <= there < PICTURES  # at once, and with what was encoded
    assert not folder(server, f"interrupted {what}").exists()
    page.messages.clear()
    server.run(graph)
    assert entries() - before >= PICTURES
    assert page.count(progress(what, 1)) <= PICTURES - there + 5  # the rest, not all of them again
    assert run_json(server, f"interrupted {what}")["step"] == 3


def test_an_interrupt_during_steps_is_gone_on_from_exactly(server, page, calm):
    for reached in (9, 21):
        identity = server.queue(workflow("cut in steps", steps=STEPS))
        page.wait(progress("train", reached))
        interrupt(server, identity)
        record = run_json(server, "cut in steps")
        assert record["status"] == "interrupted"
        # the step that was under way is the last one; all that was told is at most a step behind
        told = max(m["data"]["value"] for m in page.messages if progress("train", 0)(m))
        assert reached <= record["step"] <= told + 1
        assert len(losses(server, "cut in steps")) == record["step"]
        assert lora(server, "cut in steps")
        page.messages.clear()
    server.run(workflow("cut in steps", steps=STEPS))
    check_as_calm(server, "cut in steps", calm)


def test_an_interrupt_during_a_validation_ends_the_drawing(server, page, calm):
    slow = 400  # sampler steps
    graph = workflow("cut in drawing", steps=STEPS, vae=["model", 2])
    settings = {
        **{"validation_prompt": "red apple", "validation_negative_prompt": "", "validation_resolution": "64x64"},
        **{"validation_num_inference_steps": slow, "validation_guidance": 4.0, "validation_seed": 3},
        **{"num_validation_images": 1, "validation_step_interval": 6, "disable_benchmark": True},
    }
    graph["validation"] = node("Lumina2ValidationSettings", **settings)
    graph["texts"]["inputs"]["validation"] = ["validation", 0]
    identity = server.queue(graph)
    page.wait(of_run("cut in drawing", doing="validating", step=6))
    interrupt(server, identity)
    record = run_json(server, "cut in drawing")
    assert (record["status"], record["step"]) == ("interrupted", 6)
    assert not list(folder(server, "cut in drawing").rglob("*.png"))
    assert page.count(lambda m: progress("train", 6)(m)) < slow // 2  # one message before each sampler step
    graph["validation"]["inputs"]["validation_num_inference_steps"] = 4
    server.run(graph)
    drawn = {path.parent.name for path in folder(server, "cut in drawing").rglob("*.png")}
    assert drawn == {f"step-{step}" for step in (6, 12, 18, 24, 30, 36, STEPS)}
    check_as_calm(server, "cut in drawing", calm)


def test_an_interrupt_while_saving_lets_the_save_complete(server, calm):
    graph = workflow("cut in saving", steps=STEPS)
    graph["config"] = saving_each_step(server)
    graph["train"]["inputs"]["config"] = ["config", 0]
    run = folder(server, "cut in saving")
    for already in (0, 12):
        identity = server.queue(graph)
        deadline = time.monotonic() + LIMIT_S
        while not (saving := [int(p.name.split("-")[1].split(".")[0]) for p in run.glob(".checkpoint-*.tmp")]) or (
            saving[0] < already + 5
        ):
            assert time.monotonic() < deadline
        interrupt(server, identity)
        assert run_json(server, "cut in saving")["status"] == "interrupted"
        assert run_json(server, "cut in saving")["step"] >= saving[0]
        assert not list(run.glob(".checkpoint-*"))
        checkpoints = [read_checkpoint(path) for path in run.glob("checkpoint-*")]
        assert len(checkpoints) == 3
        assert all(checkpoints)
    server.run(graph)
    check_as_calm(server, "cut in saving", calm)


def saving_each_step(server):
    known = server.ask("/object_info/Lumina2TrainingSettings")["Lumina2TrainingSettings"]["input"]
    inputs = {**known.get("required", {}), **known.get("optional", {})}
    chosen = {}
    for name, (kind, *options) in inputs.items():
        values = kind if isinstance(kind, list) else (options[0].get("options") if options else None)
        if options and "default" in options[0]:
            chosen[name] = options[0]["default"]
        elif values:
            chosen[name] = values[0]
    return node("Lumina2TrainingSettings", **{**chosen, "checkpoint_step_interval": 1, "checkpoints_total_limit": 3})


# --- commands


def test_stop_and_keep_lets_the_graph_finish(server, page, calm):
    graph = workflow("kept", steps=STEPS) | sampled("kept picture", ["train", 0])
    identity = server.queue(graph)
    page.wait(progress("train", 8))
    server.ask("/lumina2/stop", {"run_id": "kept"})
    server.wait(identity)
    record = run_json(server, "kept")
    assert record["status"] == "stopped"
    assert 8 <= record["step"] < STEPS
    assert len(losses(server, "kept")) == record["step"]
    loaded = {"file": node("LoraLoaderModelOnly", model=["model", 0], lora_name="lumina2/kept.safetensors",
                           strength_model=1.0)}  # fmt: skip
    server.run({"model": workflow()["model"], **loaded, **sampled("kept file", ["file", 0])})
    assert np.array_equal(pictures(server, "kept picture")[0], pictures(server, "kept file")[0])
    page.wait(of_run("kept", status="stopped"))
    graph["train"]["inputs"]["continue_token"] = 1
    server.run(graph)
    check_as_calm(server, "kept", calm)


def test_pausing_saving_and_other_commands_over_http_change_no_loss(server, page, calm):
    identity = server.queue(workflow("commanded", steps=STEPS))
    page.wait(progress("train", 5))
    server.ask("/lumina2/pause", {"run_id": "commanded"})
    page.wait(of_run("commanded", doing="paused"))
    server.ask("/lumina2/save", {"run_id": "commanded"})
    server.ask("/lumina2/sample", {"run_id": "commanded", "prompt": "a cat"})
    deadline = time.monotonic() + LIMIT_S
    while not list((server.base / "models" / "loras" / "lumina2").glob("commanded-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    paused_at = {m["data"]["step"] for m in page.messages if of_run("commanded", doing="paused")(m)}
    assert len(paused_at) == 1
    server.ask("/lumina2/resume", {"run_id": "commanded"})
    server.wait(identity)
    (saved,) = (server.base / "models" / "loras" / "lumina2").glob("commanded-*")
    assert saved.name == f"commanded-{paused_at.pop()}.safetensors"
    check_as_calm(server, "commanded", calm)


# --- beside each other


def test_two_trainings_in_one_graph_go_one_after_the_other(server):
    first, second = workflow("one of two", steps=12), workflow("two of two", steps=12, seed=7)
    server.run({**first, "second": second["train"]})

    def times(run):
        lines = read_events(folder(server, run) / "events.jsonl")
        return [line["time"] for line in lines if "event" not in line]

    assert (run_json(server, "one of two")["status"], run_json(server, "two of two")["status"]) == ("finished",) * 2
    early, late = sorted((times("one of two"), times("two of two")))
    assert len(early) == len(late) == 12
    assert early[-1] <= late[0]


def test_two_that_are_alike_are_one_run(server):
    graph = workflow("alike", steps=12)
    outputs = server.run({**graph, "again": graph["train"]})
    assert outputs["train"]["lumina2"] == outputs["again"]["lumina2"] == [{"run_id": "alike"}]
    assert len(losses(server, "alike")) == 12
    lines = (folder(server, "alike") / "events.jsonl").read_text().splitlines()
    assert sum("event" not in json.loads(line) for line in lines) == 12
    assert not folder(server, "alike-2").exists()


def test_a_prompt_queued_meanwhile_runs_after_the_training(server, page):
    training = server.queue(workflow("with one behind", steps=30))
    page.wait(progress("train", 2))
    drawing = server.queue({"model": workflow()["model"], **sampled("meanwhile", ["model", 0])})
    server.wait(training)
    server.wait(drawing)

    def moment(identity, kind):
        messages = server.ask(f"/history/{identity}")[identity]["status"]["messages"]
        return next(content["timestamp"] for name, content in messages if name == kind)

    assert moment(training, "execution_success") <= moment(drawing, "execution_start")
    assert run_json(server, "with one behind")["step"] == 30
    assert pictures(server, "meanwhile")[0].std() > 10


def test_the_same_picture_before_and_after_a_training(server):
    """To the bit: the latent, with the model that was trained on, its LoRA off."""

    def drawn(name):
        graph = {"model": workflow()["model"], **sampled(name, ["model", 0])}
        graph["latent"] = node("SaveLatent", samples=[f"{name} sampler", 0], filename_prefix=name)
        server.run(graph)
        (file,) = Path(server.base / "output").glob(f"{name}_*.latent")
        return load_file(file)["latent_tensor"]

    before = drawn("before it")
    server.run(workflow("between two pictures", steps=6, learning_rate=1e-2))
    after = drawn("after it")
    assert (before == after).all()
