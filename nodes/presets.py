"""Values that suit a size of GPU memory, or what is to be learnt: the page puts them into widgets, for all to see."""

from __future__ import annotations

from typing import Any

from ..training.run.forecast import PRESETS

# What is to be learnt: steps, rank, learning rate. A style lies in every picture and needs more room and time than one
# person's face; a concept, a thing or a pose, is the smallest of them.
SUBJECTS: dict[str, dict[str, Any]] = {
    "style": {"steps": 2000, "rank": 32, "learning_rate": 1e-4},
    "character": {"steps": 1500, "rank": 16, "learning_rate": 1e-4},
    "concept": {"steps": 1000, "rank": 8, "learning_rate": 1e-4},
}
FULL_SUBJECTS: dict[str, dict[str, Any]] = {
    "style": {"steps": 4000, "learning_rate": 1e-5},
    "character": {"steps": 2000, "learning_rate": 5e-6},
    "concept": {"steps": 2000, "learning_rate": 5e-6},
}


def presets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By kind of train node: ``memory`` and ``subject``, each a list of presets in the order they are shown.

    Each has a ``name`` (GB, or what is learnt), ``widgets`` of the train node, and ``settings`` of Training Settings
    by their widgets' names.
    """
    lora, full = [], []
    for gigabytes, preset in PRESETS.items():
        settings = {
            "base_model_precision": preset.precision.base_model_precision,
            "gradient_checkpointing": "on" if preset.precision.gradient_checkpointing else "auto",
        }
        widgets = {"batch_size": preset.batch_size}
        lora.append({"name": str(gigabytes), "widgets": {**widgets, "rank": preset.rank}, "settings": settings})
        if preset.full_fine_tune:
            more = '{"fused_backward": true, "grad_clip_method": "update"}'
            backward = {"optimizer": preset.full_fine_tune, "more": more}
            full.append({"name": str(gigabytes), "widgets": {"batch_size": 1}, "settings": {**settings, **backward}})
    return {
        "TrainLumina2LoRA": {"memory": lora, "subject": _subjects(SUBJECTS)},
        "TrainLumina2Full": {"memory": full, "subject": _subjects(FULL_SUBJECTS)},
    }


def _subjects(known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "widgets": widgets, "settings": {}} for name, widgets in known.items()]
