"""Training in a real server: once for the same settings, into a file that ComfyUI's own loader reads."""

import json
import time

import numpy as np
import pytest
from comfy_server import ServerError
from graphs import pictures, run_json, sampled, workflow
from PIL import Image
from safetensors.torch import load_file


def lora(server, folder):
    return load_file(server.base / "models" / "loras" / "lumina2" / f"{folder}.safetensors")


def events(server, folder):
    """What was logged of each step, also of those that a later line replaces."""
    file = server.base / "output" / "lumina2" / folder / "events.jsonl"
    return [event for event in map(json.loads, file.read_text().splitlines()) if "event" not in event]


def same(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


@pytest.fixture(scope="module")
def trained(start):
    """A server of its own in which the first run was trained."""
    server = start()
    server.run(workflow())
    return server


def test_the_loss_is_logged_and_the_run_is_written_down(trained):
    record = run_json(trained, "style")
    assert (record["status"], record["step"], record["target"]) == ("finished", 12, 12)
    assert [event["step"] for event in events(trained, "style")] == list(range(1, 13))
    assert len(lora(trained, "style")) == 2 * 5 * 8  # A and B of five layers in eight blocks


def test_comfyui_own_loader_reads_the_file_and_draws_what_validate_sample_draws(trained):
    loaded = {
        "loader": {
            "class_type": "LoraLoader",
            "inputs": {
                "model": ["model", 0],
                "clip": ["model", 1],
                "lora_name": "lumina2/style.safetensors",
                "strength_model": 1.0,
                "strength_clip": 1.0,
            },
        }
    }
    drawing = {
        "model": ["model", 0],
        "clip": ["model", 1],
        "vae": ["model", 2],
        "prompts": "red apple",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "steps": 10,
        "guidance": 4.0,
        "seed": 3,
        "system_prompt": "superior",
        "lora": "lumina2/style.safetensors",
        "strengths": "0, 1",
    }
    validated = {
        "draw": {"class_type": "Lumina2ValidateSample", "inputs": drawing},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["draw", 0], "filename_prefix": "validated"}},
        "grid": {"class_type": "SaveImage", "inputs": {"images": ["draw", 1], "filename_prefix": "grid"}},
    }
    base = sampled("base", ["model", 0])
    trained.run({**workflow(), **loaded, **sampled("loaded", ["loader", 0]), **validated, **base})
    trained.run({**workflow(), **sampled("handed out", ["train", 0])})
    assert "lora key not loaded" not in trained.log.read_text()
    assert "NOT LOADED" not in trained.log.read_text()
    (before,), (through_loader,), (handed_out,) = (pictures(trained, n) for n in ("base", "loaded", "handed out"))
    without, with_lora = pictures(trained, "validated")
    assert np.array_equal(without, before)
    assert np.array_equal(with_lora, through_loader)
    assert np.array_equal(handed_out, through_loader)
    assert np.abs(with_lora - without).mean() > 1
    assert len(events(trained, "style")) == 12  # nothing was trained for any of this
    assert pictures(trained, "grid")[0].shape[0] > 192


def test_queueing_again_trains_nothing_also_after_a_restart_and_going_back_finds_the_first(trained):
    first = lora(trained, "style")
    trained.run(workflow())
    trained.run(workflow(learning_rate=5e-4))
    assert run_json(trained, "style-2")["status"] == "finished"
    trained.stop()
    trained.start()
    for settings in ({}, {"learning_rate": 5e-4}, {"steps": 5}):
        trained.run(workflow(**settings))
    assert len(events(trained, "style")) == len(events(trained, "style-2")) == 12
    assert same(lora(trained, "style"), first)
    assert not same(lora(trained, "style-2"), first)
    folders = {path.name for path in (trained.base / "output" / "lumina2").iterdir()}
    assert folders == {".cache", ".locks", "style", "style-2"}
    trained.run(workflow(steps=14))
    assert len(events(trained, "style")) == 14


def test_train_draw_train_equals_a_fresh_server(trained, start):
    """Inference between two trainings, with the first LoRA on the shared weights, changes nothing of the second."""
    trained.run({**workflow(), **sampled("between", ["train", 0])})
    trained.run(workflow(run_name="second", seed=7))
    fresh = start()
    fresh.run(workflow(run_name="second", seed=7))
    assert same(lora(trained, "second"), lora(fresh, "second"))
    fresh.stop()


def test_interrupt_keeps_what_was_trained_and_queueing_goes_on_from_there(trained):
    identity = trained.queue(workflow(run_name="long", steps=400))
    deadline = time.monotonic() + 200
    place = trained.base / "output" / "lumina2" / "long"
    while not (place / "events.jsonl").exists() or not events(trained, "long"):
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.2)
    trained.ask("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        trained.wait(identity)
    record = run_json(trained, "long")
    assert record["status"] == "interrupted"
    assert 10 <= record["step"] < 400
    assert len(events(trained, "long")) == record["step"]
    assert lora(trained, "long")
    trained.run(workflow(run_name="long", steps=record["step"] + 2))
    assert run_json(trained, "long")["step"] == record["step"] + 2
    assert len(events(trained, "long")) == record["step"] + 2


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "does not exist. Choose the folder"),
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: (folder.mkdir(), Image.new("RGB", (64, 64)).save(folder / "a.png")), "add a.txt, or choose"),
    ],
    ids=["no folder", "no pictures", "no captions"],
)
def test_a_first_time_users_mistakes_give_a_sentence(trained, tmp_path, prepare, sentence):
    prepare(tmp_path / "mine")
    with pytest.raises(ServerError, match=sentence):
        trained.run(workflow(folder=str(tmp_path / "mine")))
