"""What a configuration needs that this machine lacks: asked before anything is downloaded or encoded."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter.adapter import add_adapter
from ..config.adapter import started_anyhow
from ..config.settings import TrainSettings
from ..errors import Lumina2Error
from ..model.config import TransformerConfig
from ..model.linear import computed_in
from ..model.precision import choose_computing, fast_bf16
from ..run.forecast import GB, Forecast, Measured, Shape, forecast, measure, savings
from .pipeline import Model, find_model, stored_in
from .plan import Plan

_TOKENS = 128  # of a caption, for the forecast
_LARGE = 10**9  # parameters: more than that takes days on a CPU
_PACKAGES = {
    "bnb-": ("bitsandbytes", "ao-adamw8bit, or adamw_bf16"),
    "ao-": ("torchao", "adamw_bf16"),
    "optimi-": ("optimi", "adamw_bf16"),
    "prodigy": ("prodigyopt", "adamw_bf16"),
    "adamw_schedulefree": ("schedulefree", "adamw_bf16"),
}


@dataclass(frozen=True)
class Finding:
    """Something that this machine lacks; ``fatal``: a training would not start."""

    text: str
    fatal: bool = False


def look_around(plan: Plan, device: torch.device, download: bool = False) -> list[Finding]:
    """Everything that is missing, each in a sentence with its remedy; nothing is loaded and nothing written.

    Args:
        download: a model that is not here would be fetched, so that it is not missing.
    """
    settings = plan.config.settings()
    found = [*of_datasets(plan), *_of_validation(plan)]
    model: Model | None = None
    measures = TransformerConfig()
    try:
        model = find_model(plan.config.places, plan.config.folders)
        measures = model.measures()
    except Lumina2Error as error:
        found.append(Finding(str(error), fatal=not download))
    found += _of_device(settings, device, measures)
    found += _of_packages(settings)
    measured, peak = _forecast(plan, settings, device, measures)
    found += _of_memory(settings, measured, peak, device)
    return found + list(_of_disk(plan, settings, peak))


def of_datasets(plan: Plan) -> Iterator[Finding]:
    """What is missing of the pictures."""
    for each in plan.datasets:
        folder = each.source.instance_data_dir
        if each.source.type == "local" and not Path(folder).is_dir():
            yield Finding(f'Dataset "{each.id}": instance_data_dir {folder} is no folder here; correct it.', fatal=True)
        enough = 0 < each.geometry.minimum_image_size < each.geometry.resolution
        if enough and each.geometry.resolution_type != "area":
            factor = each.geometry.resolution / each.geometry.minimum_image_size
            yield Finding(
                f'Dataset "{each.id}": minimum_image_size {each.geometry.minimum_image_size:g} lets pictures in that '
                f"are enlarged up to {factor:.1f} times to {each.geometry.resolution:g}; raise it if they look soft."
            )


def _of_validation(plan: Plan) -> Iterator[Finding]:
    from ..report.login import login_problems

    validation = plan.config.config.validation
    if validation.eval_steps_interval and not any(each.mix.dataset_type == "eval" for each in plan.datasets):
        yield Finding(
            "eval_steps_interval asks for a held-out loss, and no dataset is of dataset_type eval; add one, or take it "
            "out."
        )
    clip = validation.pretrained_evaluation_model_name_or_path
    if validation.evaluation_type == "clip" and not (Path(clip).is_dir() or _in_hub_cache(clip)):
        yield Finding(
            f"evaluation_type is clip, and {clip} is not on this machine; download it, or there are no scores.",
            fatal=validation.evaluation_required,
        )
    for problem in login_problems(plan.config.config.report):
        yield Finding(problem, fatal=True)


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _of_device(settings: TrainSettings, device: torch.device, measures: TransformerConfig) -> Iterator[Finding]:
    try:
        for note in choose_computing(settings.precision, device).notes:
            yield Finding(f"mixed_precision {settings.precision.mixed_precision}: {note}.")
    except Lumina2Error as error:
        yield Finding(str(error), fatal=True)
    if device.type == "cpu" and measures.dim >= TransformerConfig().dim:
        yield Finding("There is no GPU here: a model of this size takes minutes a step on a CPU.")
    elif device.type != "cpu" and not fast_bf16(device):
        yield Finding(f"{device} has no bf16 instructions: it trains in fp32, at twice the memory.")


def _of_packages(settings: TrainSettings) -> Iterator[Finding]:
    name = settings.optimizer.optimizer
    package, instead = next((needs for start, needs in _PACKAGES.items() if name.startswith(start)), ("", ""))
    if package and importlib.util.find_spec(package) is None:
        yield Finding(
            f"optimizer is {name}, which needs the package {package}: pip install {package}, or choose {instead}.",
            fatal=True,
        )


def _forecast(
    plan: Plan, settings: TrainSettings, device: torch.device, measures: TransformerConfig
) -> tuple[Measured, Forecast]:
    side = max(_side(each.geometry.resolution, each.geometry.resolution_type) for each in plan.datasets) // 16 * 2
    adapter = started_anyhow(settings.adapter)
    kept = stored_in(device)
    selective = ("selective",) if settings.precision.gradient_checkpointing_selective else ()
    measured = measure(
        measures,
        Shape(settings.batch_size, side, side, _TOKENS),
        lambda transformer: add_adapter(transformer, adapter, 0),
        stored=kept,
        computed=kept if device.type != "cpu" else computed_in(kept, device),
        ways=("none", "full", *selective),
    )
    return measured, forecast(measured, settings.precision, *_choice(settings, device))


def _choice(settings: TrainSettings, device: torch.device) -> tuple[str, bool, str]:
    return settings.optimizer.optimizer, settings.optimizer.fused_backward, device.type


def _side(resolution: float, resolution_type: str) -> int:
    return int((resolution * 1e6) ** 0.5) if resolution_type == "area" else int(resolution)


def _of_memory(settings: TrainSettings, measured: Measured, peak: Forecast, device: torch.device) -> Iterator[Finding]:
    free = free_memory(device)
    if free is not None and peak.total > free:
        saved = savings(measured, settings.precision, *_choice(settings, device))
        remedy = "; ".join(f"{name} saves {size / GB:.1f} GB" for name, size in list(saved.items())[:3])
        yield Finding(
            f"The training needs about {peak.total / GB:.1f} GB on {device}, and {free / GB:.1f} GB are free. "
            f"{remedy or 'Choose smaller pictures, or a device with more'}."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return None


def _of_disk(plan: Plan, settings: TrainSettings, peak: Forecast) -> Iterator[Finding]:
    one = peak.adapter + peak.optimizer + (peak.weights if settings.full_fine_tune else peak.adapter)
    needed = one * (settings.checkpoints_total_limit + 1)
    place = next(path for path in (plan.output, *plan.output.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        yield Finding(
            f"checkpoints_total_limit {settings.checkpoints_total_limit}: so many checkpoints take about "
            f"{needed / GB:.1f} GB, and {place} has {free / GB:.1f} GB free; keep fewer, or choose another output_dir."
        )
