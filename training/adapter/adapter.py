"""From settings to what is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..config.adapter import AdapterSettings, FullSettings, LyCORISSettings
from ..model.transformer import Lumina2Transformer
from .base import Adapter
from .full import Full, own_weights
from .lora import LoRA, add_lora_layers
from .lycoris import LyCORIS, add_lycoris_layers
from .start import read_start, start_lycoris


def add_adapter(
    transformer: Lumina2Transformer, settings: AdapterSettings, seed: int, dtype: torch.dtype | None = None
) -> Adapter:
    """Make a transformer trainable, in place: a fresh adapter in it, or its own weights.

    The frozen weights stay where they are. PiSSA, OLoRA and ``init_lokr_norm`` start from the base's weights, so
    quantise the base afterwards, or they start from what quantisation left.

    Args:
        seed: of the initial values, which are drawn on the CPU, so that every device starts from the same.
        dtype: of what is trained; None: fp32, and for a full fine-tune what the weights are stored in.

    Raises:
        SettingError: the settings do not fit this model.
        ModelError: the file of ``init_lora`` cannot be read, or fits another model.
    """
    transformer.requires_grad_(False)
    if isinstance(settings, FullSettings):
        return Full(transformer, own_weights(transformer, settings, dtype), settings)
    if isinstance(settings, LyCORISSettings):
        made = add_lycoris_layers(transformer, settings, seed, dtype or torch.float32)
        note = f", {start_lycoris(Path(settings.init_lora), transformer, made)}" if settings.init_lora else ""
        return LyCORIS(made, settings, note)
    if not settings.init_lora:
        return LoRA(add_lora_layers(transformer, settings, seed, dtype or torch.float32), settings)
    start = read_start(Path(settings.init_lora), transformer, settings)
    settings = replace(settings, rank=start.rank)
    layers = add_lora_layers(transformer, settings, seed, dtype or torch.float32, start.layers, start.lengths)
    return LoRA(layers, settings, f", {start.note}")
