"""``init``: a commented configuration for a folder of pictures and a size of memory, ready to train."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..config.settings import check_run_name
from ..data.sources import EXTENSIONS
from ..errors import DataError, SettingError
from ..run.forecast import PRESETS, Preset
from .answer import Answer
from .pipeline import NANO
from .plan import PLUGIN

MODEL = "Alpha-VLLM/Lumina-Image-2.0"
_SIDE_PX = {NANO: 64}  # what a model was trained on; 1024 for all others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with the pictures")
    parser.add_argument("--out", type=Path, help="where the files go; default: config/<name of the folder>")
    parser.add_argument("--memory", type=int, default=12, help="of the GPU in GB: 8, 12, 16, 24 or more")
    parser.add_argument("--model", default=MODEL, help=f"a hub id, a folder, or {NANO}")
    parser.add_argument("--trigger", default="", help="a word that calls up what is learned")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plain", action="store_true", help="without comments, which SimpleTuner does not read")


def run(options: argparse.Namespace) -> Answer:
    """Write ``config.json`` and ``multidatabackend.json``.

    Raises:
        DataError: there are no pictures.
        SettingError: the files are there already, or no preset fits the memory.
    """
    folder: Path = options.folder.expanduser().absolute()
    pictures = (
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    )
    if not pictures:
        raise DataError(f"{folder} holds no pictures; name the folder that does.")
    sizes = [size for size in PRESETS if size <= options.memory]
    if not sizes:
        raise SettingError(f"memory is {options.memory} GB; the smallest preset is for {min(PRESETS)} GB.")
    name = check_run_name(re.sub(r"[^\w\-. ]+", "-", folder.name).strip(" .-") or "lumina2")
    out: Path = (options.out or Path("config") / name).expanduser()
    targets = [out / "config.json", out / "multidatabackend.json"]
    there = [str(path) for path in targets if path.exists()]
    if there:
        raise SettingError(f"{there[0]} is there already; remove it, or choose another folder with --out.")
    captioned = sum(path.with_suffix(".txt").is_file() for path in pictures)
    config = _config(options, name, pictures, PRESETS[max(sizes)])
    datasets = _datasets(options, name, folder, captioned == len(pictures))
    out.mkdir(parents=True, exist_ok=True)
    blocks = ",\n".join(_block(rows, options.plain, "  ") for rows in datasets)
    targets[0].write_text(_block(config, options.plain, "") + "\n", encoding="utf-8")
    targets[1].write_text(f"[\n{blocks}\n]\n", encoding="utf-8")
    found = {"config": str(targets[0]), "datasets": str(targets[1]), "pictures": len(pictures), "captions": captioned}
    start = f'python "{PLUGIN}" train --config "{targets[0]}"'
    told = f"{len(pictures)} pictures, {captioned} with captions. Look through {targets[0]}, then:\n{start}"
    return Answer({**found, "command": start}, told)


Rows = list[tuple[str, Any, str]]  # option, value, comment


def _config(options: argparse.Namespace, name: str, pictures: list[Path], preset: Preset) -> Rows:
    side = _SIDE_PX.get(options.model, 1024)
    prompt = _first_caption(pictures, options.trigger)
    return [
        ("model_family", "lumina2", ""),
        ("pretrained_model_name_or_path", options.model, "a hub id, or a folder in diffusers' layout"),
        ("data_backend_config", "multidatabackend.json", "the pictures"),
        ("output_dir", str(Path("output") / "lumina2"), "each run has a folder in it"),
        ("tracker_run_name", name, "names the run and its LoRA file"),
        ("model_type", "lora", "full trains the model itself: more memory, learning_rate 1e-5"),
        ("lora_type", "standard", ""),
        ("lora_rank", preset.rank, "how much it can learn: 8 to 32 for most uses"),
        ("lora_alpha", preset.rank, "as large as the rank: the LoRA acts as it is"),
        ("lora_dropout", 0.0, ""),
        ("max_train_steps", options.steps, "500 to 2000 for most LoRAs"),
        ("num_train_epochs", 0, "max_train_steps decides"),
        ("train_batch_size", min(preset.batch_size, len(pictures)), "pictures a step"),
        ("learning_rate", 1e-4, "5e-5 is the gentler side"),
        ("lr_scheduler", "constant", ""),
        ("optimizer", "adamw_bf16", ""),
        ("max_grad_norm", 1.0, ""),
        ("grad_clip_method", "norm", ""),
        ("mixed_precision", "bf16", ""),
        ("base_model_precision", preset.precision.base_model_precision, "int8-torchao halves the model's memory"),
        ("quantize_via", "cpu", ""),
        ("gradient_checkpointing", True, "off is quicker and needs far more memory"),
        ("flow_schedule_auto_shift", True, "noise levels that suit the pictures' size"),
        ("caption_dropout_probability", 0.1, ""),
        ("disable_bucket_pruning", True, "no picture is left out"),
        ("seed", 42, ""),
        ("checkpoint_step_interval", max(1, options.steps // 4), "where a stopped run goes on"),
        ("checkpoints_total_limit", 3, ""),
        ("validation_prompt", prompt, "drawn while training"),
        ("validation_negative_prompt", "blurry, low quality", ""),
        ("validation_disable_unconditional", True, ""),
        ("validation_step_interval", max(1, options.steps // 4), ""),
        ("validation_guidance", 4.0, ""),
        ("validation_num_inference_steps", 30, ""),
        ("validation_resolution", f"{side}x{side}", ""),
        ("validation_seed", 42, ""),
        ("report_to", "none", "tensorboard, wandb, or simpletuner for a page in the run's folder"),
    ]


def _datasets(options: argparse.Namespace, name: str, folder: Path, captioned: bool) -> list[Rows]:
    side = _SIDE_PX.get(options.model, 1024)
    rows: Rows = [
        ("id", name, ""),
        ("type", "local", ""),
        ("instance_data_dir", str(folder), ""),
        ("resolution", side, "pictures are scaled to about this number squared"),
        ("resolution_type", "pixel_area", ""),
        ("crop", True, ""),
        ("crop_aspect", "preserve", "the picture's own aspect, cut to multiples of 64"),
        ("crop_style", "center", ""),
    ]
    if captioned:
        rows.append(("caption_strategy", "textfile", "cat.txt beside cat.png, each line a variant"))
        if options.trigger:
            rows += [("instance_prompt", options.trigger, ""), ("prepend_instance_prompt", True, "")]
    elif options.trigger:
        rows += [("caption_strategy", "instanceprompt", ""), ("instance_prompt", options.trigger, "")]
    else:
        rows.append(("caption_strategy", "filename", "not every picture has a .txt file: their names are captions"))
    text: Rows = [
        ("id", "text-embeds", ""),
        ("type", "local", ""),
        ("dataset_type", "text_embeds", ""),
        ("default", True, ""),
        ("write_batch_size", 128, ""),
    ]
    return [rows, text]


def _first_caption(pictures: list[Path], trigger: str) -> str:
    path = pictures[0].with_suffix(".txt")
    words = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    said = words[0] if words else pictures[0].stem.replace("_", " ")
    return (f"{trigger} {said}" if words else trigger) if trigger else said


def _block(rows: Rows, plain: bool, indent: str) -> str:
    """JSON, one option a line, each with its comment behind it."""
    lines = []
    for number, (name, value, comment) in enumerate(rows):
        comma = "," if number < len(rows) - 1 else ""
        note = f"  // {comment}" if comment and not plain else ""
        lines.append(f"{indent}  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}{comma}{note}")
    return f"{indent}{{\n" + "\n".join(lines) + f"\n{indent}}}"
