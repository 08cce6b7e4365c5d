"""Trainings by command line on the nano model, as a user starts them; and the same run in ComfyUI."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "simpletuner"
# The sample that SimpleTuner's users have, changed only in paths, model, sizes, steps, and trackers that need a login.
SAMPLE = json.loads((SAMPLES / "config.json").read_text()) | {
    "checkpoint_step_interval": 3,
    "eval_steps_interval": 3,
    "max_train_steps": 6,
    "pretrained_model_name_or_path": "lumina2-nano",
    "push_checkpoints_to_hub": False,
    "push_to_hub": False,
    "report_to": "none",
    "validation_num_inference_steps": 4,
    "validation_resolution": "64x64",
    "validation_step_interval": 3,
    "--user_prompt_library": "config/user_prompt_library.json",
}
DATASETS = json.loads((SAMPLES / "multidatabackend.json").read_text())
DATASETS[0] |= {
    "resolution": 64,
    "minimum_image_size": 32,
    "maximum_image_size": 128,
    "target_downsample_size": 64,
    "instance_data_dir": str(ROOT / "assets" / "nano" / "style"),
}


def start(folder, *arguments, wait=True, without_comfyui=False):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    python = [sys.executable, "-I"]
    if without_comfyui:  # whatever of it is imported fails
        for name in ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server"):
            (folder / "poison").mkdir(exist_ok=True)
            (folder / "poison" / f"{name}.py").write_text("raise ImportError('there is no ComfyUI')")
        environment["PYTHONPATH"] = str(folder / "poison")
        python = [sys.executable]
    command = [*python, str(ROOT), *map(str, arguments), "--device", "cpu", "--json"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return process
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out), err


def write(folder, **changed):
    place = folder / "config" / "lumina2"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({**SAMPLE, **changed}), encoding="utf-8")
    (place / "multidatabackend.json").write_text(json.dumps(DATASETS), encoding="utf-8")
    (folder / "config" / "user_prompt_library.json").write_text('{"fruit": "red apple"}', encoding="utf-8")
    return place / "config.json"


def losses(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if "event" not in event]


def test_the_sample_trains_and_goes_on(tmp_path):
    file = write(tmp_path)
    cached, _ = start(tmp_path, "cache", "--config", file)
    assert (cached["latents"], cached["captions"], cached["skipped"]) == (16, 16, [])
    entries = set((tmp_path / "cache").rglob("*.safetensors"))
    found, told = start(tmp_path, "train", "--config", file)
    assert set((tmp_path / "cache").rglob("*.safetensors")) == entries, "nothing is encoded twice"
    run = tmp_path / "output" / "lumina2" / "lumina2-lora"
    assert (found["status"], found["step"], found["folder"]) == ("finished", 6, str(run))
    assert Path(found["file"]).is_file()
    assert Path(found["file"]).with_stem("lumina2-lora-ema").is_file()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    drawn = {path.relative_to(run / "samples").as_posix() for path in run.rglob("*.png")}
    assert {name for name in drawn if "-ema" not in name} == {
        f"step-{step}/{name}-0.png" for step in (0, 3, 6) for name in ("fruit", "validation")
    }
    assert any("-ema" in name for name in drawn)
    for place in ("cache/vae/lumina2/training", "cache/text/lumina2"):
        assert list((tmp_path / place).glob("*.safetensors"))
    assert "no dataset is of dataset_type eval" in told
    assert "lora_dropout 0.1 (ours 0.0)" in told
    written = json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"]
    assert (written["base_model_precision"], written["grad_clip_method"]) == ("int8-torchao", "value")
    first = losses(run)
    assert len(first) == 6

    longer, told = start(tmp_path, "train", "--config", run / "config.json", "--max_train_steps", 8)
    assert longer["step"] == 8
    assert "continuing from step 6" in longer["message"], "the configuration that the run keeps is its own"
    assert losses(run)[:6] == first


def test_init_then_train_with_nothing_between(tmp_path):
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for path in (ROOT / "assets" / "nano" / "concept").glob("zorblax-0[1-4].*"):
        (pictures / path.name).write_bytes(path.read_bytes())
    made = subprocess.run(
        [sys.executable, "-I", str(ROOT), "init", pictures, "--model", "lumina2-nano", "--steps", "4", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, _ = start(tmp_path, "train", "--config", json.loads(made.stdout)["config"], without_comfyui=True)
    assert (found["run"], found["status"], found["step"]) == ("my pictures", "finished", 4)
    drawn, _ = start(tmp_path, "validate", "--config", found["folder"] + "/config.json", "--lora", found["file"])
    assert [picture["weights"] for picture in drawn["pictures"]] == ["base", "my pictures"]
    files = [(tmp_path / "samples" / picture["file"]).read_bytes() for picture in drawn["pictures"]]
    assert files[0] != files[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C", "SIGTERM"])
def test_a_signal_stops_after_the_step_with_everything_saved(tmp_path, number):
    file = write(tmp_path, max_train_steps=100_000, validation_disable=True, checkpoint_step_interval=100_000)
    process = start(tmp_path, "train", "--config", file, wait=False)
    run = tmp_path / "output" / "lumina2" / "lumina2-lora"
    while not (run / "events.jsonl").exists() or not losses(run):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    found = json.loads(out)
    assert found["status"] == "interrupted"
    assert (run / f"checkpoint-{found['step']}").is_dir()
    assert Path(found["file"]).is_file()


def test_one_run_in_comfyui_and_on_the_command_line(server, tmp_path):
    """Both train the sample, loss for loss, from one cache, and each goes on with the other's run."""
    output = server.base / "output" / "lumina2"
    shared = {
        "output_dir": str(output),
        "--user_prompt_library": str(tmp_path / "config" / "user_prompt_library.json"),
    }
    file = write(tmp_path, **shared)
    caches = [{"cache_dir_vae": str(tmp_path / "vae")}, {"cache_dir": str(tmp_path / "text")}]
    datasets = [{**entry, **place} for entry, place in zip(DATASETS, caches, strict=True)]
    (file.parent / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    def queue(path, **others):
        server.run(
            {
                "model": node("Lumina2LoadDiffusers", folder="lumina2-nano (bundled)", dtype="auto"),
                "config": node("Lumina2LoadConfig", file=str(path), adopt_our_defaults=False),
                "data": node("Lumina2LoadDatasetConfig", file=["config", 2], config=["config", 0]),
                "latents": node("Lumina2CacheLatents", dataset=["data", 0], vae=["model", 2], batch_size=3,
                                config=["config", 0]),
                "texts": node("Lumina2CacheTextEmbeds", dataset=["data", 0], clip=["model", 1],
                              system_prompt="none", max_tokens=7, config=["config", 0]),
                "train": node("TrainLumina2LoRA", model=["model", 0], latents=["latents", 0], embeds=["texts", 0],
                              config=["config", 0], run_name="", steps=1, learning_rate=1.0, rank=1,
                              batch_size=1, seed=0, resume="continue", **others),
            }
        )  # fmt: skip

    queue(file, vae=["model", 2])
    run = output / "lumina2-lora"
    by_node = losses(run)
    assert len(by_node) == 6
    drawn = {path.relative_to(run).as_posix() for path in run.rglob("*.png")}
    kept = set(tmp_path.rglob("*.safetensors"))
    assert {path.parent.name for path in kept} == {"vae", "text"}, "the folders of the dataset file"
    start(tmp_path, "train", "--config", file, "--tracker_run_name", "by command")
    other = output / "by command"
    assert losses(other) == by_node
    assert {path.relative_to(other).as_posix() for path in other.rglob("*.png")} == drawn
    assert set(tmp_path.rglob("*.safetensors")) == kept, "one cache: nothing is encoded twice"

    quiet = ["--validation_disable", "--eval_loss_disable", "--evaluation_type", "none"]
    own = [{**entry, **{name: "own/" + name for name in place}} for entry, place in zip(DATASETS, caches, strict=True)]
    (file.parent / "own.json").write_text(json.dumps(own), encoding="utf-8")
    elsewhere = ["--output_dir", "out", "--data_backend_config", str(file.parent / "own.json")]
    start(tmp_path, "train", "--config", file, *elsewhere, *quiet)
    assert losses(tmp_path / "out" / "lumina2-lora") == pytest.approx(by_node, rel=1e-4)

    longer, _ = start(tmp_path, "train", "--config", file, "--max_train_steps", 7, *quiet)
    assert "continuing from step 6" in longer["message"], "begun in ComfyUI"
    assert Path(longer["file"]) == server.base / "models" / "loras" / "lumina2" / "lumina2-lora.safetensors"
    begun = {"max_train_steps": 7, "validation_disable": True, "tracker_run_name": "by command"}
    queue(write(tmp_path / "longer", **shared, **begun, data_backend_config=str(file.parent / "multidatabackend.json")))
    assert json.loads((other / "run.json").read_text(encoding="utf-8"))["step"] == 7, "begun on the command line"
    assert losses(other)[:6] == by_node
    assert not (output / "by command-2").exists()


def test_two_processes_train_one_run(tmp_path):
    file = write(tmp_path, validation_disable=True, eval_steps_interval=None, evaluation_type="none", use_ema=False)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT)]
    command = [*launcher, "train", "--config", str(file), "--json", "--train_batch_size", "2"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (found,) = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert (found["status"], found["step"]) == ("finished", 6)
    alone, _ = start(tmp_path, "train", "--config", file, "--train_batch_size", "2", "--gradient_accumulation_steps",
                     "2", "--tracker_run_name", "alone")  # fmt: skip
    both, one = (losses(tmp_path / "output" / "lumina2" / name) for name in ("lumina2-lora", "alone"))
    assert both == pytest.approx(one, rel=1e-4)
    assert alone["step"] == 6
