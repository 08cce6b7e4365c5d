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
# The sample that SimpleTuner's users have, changed only in paths, model, sizes, steps, and trackers that need a login.
SAMPLE = {
    "base_model_precision": "int8-torchao",
    "checkpoint_step_interval": 3,
    "data_backend_config": "config/lumina2/multidatabackend.json",
    "disable_bucket_pruning": True,
    "eval_steps_interval": 3,
    "evaluation_type": "clip",
    "flow_schedule_auto_shift": True,
    "gradient_checkpointing": True,
    "hub_model_id": "lumina2-lora",
    "learning_rate": 1e-4,
    "lora_alpha": 16,
    "lora_rank": 16,
    "lora_type": "standard",
    "lr_scheduler": "constant",
    "max_train_steps": 6,
    "model_family": "lumina2",
    "model_type": "lora",
    "num_train_epochs": 0,
    "optimizer": "adamw_bf16",
    "output_dir": "output/lumina2",
    "pretrained_model_name_or_path": "lumina2-nano",
    "push_checkpoints_to_hub": False,
    "push_to_hub": False,
    "quantize_via": "cpu",
    "report_to": "none",
    "seed": 42,
    "tracker_project_name": "lumina2-training",
    "tracker_run_name": "lumina2-lora",
    "train_batch_size": 4,
    "use_ema": True,
    "vae_batch_size": 1,
    "validation_disable_unconditional": True,
    "validation_guidance": 4.0,
    "validation_guidance_rescale": 0.0,
    "validation_negative_prompt": "ugly, cropped, blurry, low-quality, mediocre average",
    "validation_num_inference_steps": 4,
    "validation_prompt": "A photo-realistic image of a cat",
    "validation_prompt_library": False,
    "validation_resolution": "64x64",
    "validation_seed": 42,
    "validation_step_interval": 3,
    "--user_prompt_library": "config/user_prompt_library.json",
}
DATASETS = [
    {
        "id": "lumina2-training",
        "type": "local",
        "crop": True,
        "crop_aspect": "square",
        "crop_style": "center",
        "resolution": 64,
        "minimum_image_size": 32,
        "maximum_image_size": 128,
        "target_downsample_size": 64,
        "resolution_type": "pixel_area",
        "cache_dir_vae": "cache/vae/lumina2/training",
        "instance_data_dir": str(ROOT / "assets" / "nano" / "style"),
        "caption_strategy": "textfile",
        "metadata_backend": "discovery",
    },
    {
        "id": "text-embeds",
        "type": "local",
        "dataset_type": "text_embeds",
        "default": True,
        "cache_dir": "cache/text/lumina2",
        "disabled": False,
        "write_batch_size": 128,
    },
]


def start(folder, *arguments, wait=True):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(ROOT), *map(str, arguments), "--device", "cpu", "--json"]
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
    found, _ = start(tmp_path, "train", "--config", json.loads(made.stdout)["config"])
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
    """Both train the same, loss for loss, from one cache, and each goes on with the other's run."""
    output = server.base / "output" / "lumina2"
    same = {"base_model_precision": "no_change", "validation_disable": True, "evaluation_type": "none",
            "eval_steps_interval": None, "output_dir": str(output)}  # fmt: skip
    file = write(tmp_path, **same)
    datasets = [{key: value for key, value in DATASETS[0].items() if key != "cache_dir_vae"}]
    (file.parent / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    def queue(path):
        server.run(
            {
                "model": node("Lumina2LoadDiffusers", folder="lumina2-nano (bundled)", dtype="auto"),
                "config": node("Lumina2LoadConfig", file=str(path), adopt_our_defaults=False),
                "data": node("Lumina2LoadDatasetConfig", file=["config", 2]),
                "latents": node("Lumina2CacheLatents", dataset=["data", 0], vae=["model", 2], batch_size=1),
                "texts": node("Lumina2CacheTextEmbeds", dataset=["data", 0], clip=["model", 1],
                              system_prompt="superior", max_tokens=256),
                "train": node("TrainLumina2LoRA", model=["model", 0], latents=["latents", 0], embeds=["texts", 0],
                              config=["config", 0], run_name="", steps=1, learning_rate=1.0, rank=1, batch_size=1,
                              seed=0, resume="continue"),
            }
        )  # fmt: skip

    queue(file)
    run = output / "lumina2-lora"
    by_node = losses(run)
    assert len(by_node) == 6
    kept = {path.name for path in (output / ".cache").rglob("*.safetensors")}
    start(tmp_path, "train", "--config", file, "--tracker_run_name", "by command")
    assert losses(output / "by command") == by_node
    start(tmp_path, "train", "--config", file, "--output_dir", "out", "--tracker_run_name", "own caches")
    assert losses(tmp_path / "out" / "own caches") == pytest.approx(by_node, rel=1e-4)
    # validation's negative prompt is embedded on the command line, and nothing else is made again
    assert len({path.name for path in (output / ".cache").rglob("*.safetensors")} - kept) <= 1
    longer, _ = start(tmp_path, "train", "--config", file, "--max_train_steps", 8)
    assert "continuing from step 6" in longer["message"]
    assert Path(longer["file"]) == server.base / "models" / "loras" / "lumina2" / "lumina2-lora.safetensors"

    elsewhere = {"max_train_steps": 10, "data_backend_config": str(file.parent / "multidatabackend.json")}
    queue(write(tmp_path / "longer", **same, **elsewhere))
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["step"] == 10
    assert losses(run)[:6] == by_node
    assert not (output / "lumina2-lora-2").exists()


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
