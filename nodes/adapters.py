"""What the LoRA nodes share: opening any LoRA, a MODEL as its base, and keeping what comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import torch
from torch import Tensor

from ..training.adapter.formats.layers import Adapters, Weights, no_base
from ..training.adapter.formats.read import adapters_of, read_adapters
from ..training.adapter.formats.strengths import block_strengths
from ..training.adapter.formats.write import Written, holds, save, written
from ..training.config.settings import check_run_name
from ..training.errors import ModelError, SettingError
from . import places


def lora_path(name: str) -> Path:
    """A LoRA by its name under models/loras, or by its whole path.

    Raises:
        SettingError: nothing is written there.
        RunError: there is none of this name.
    """
    name = name.strip().strip('"')
    if not name:
        raise SettingError("lora is empty. Write a file's name under models/loras, or wire a LORA_MODEL.")
    path = Path(name).expanduser()
    return path if path.is_absolute() and path.is_file() else places.lora_file(name)


def like(lora: str, what: str) -> str:
    """A name for what was made of a LoRA: that of its file and what it is now."""
    stem = re.sub(r"[^\w\-. ]", "-", Path(lora.strip().strip('"')).stem)[: 78 - len(what)].strip(" .")
    return f"{stem}-{what}"


def opened(name: str, lora: Mapping[str, Tensor] | None, model: Any) -> Adapters:
    """The LoRA by wire, or that of the name; it fits MODEL where there is one."""
    from .bridge import transformer_config

    config = None if model is None else transformer_config(model)
    if lora is not None:
        return adapters_of(lora, {}, config, "LORA_MODEL")
    return read_adapters(lora_path(name), config)


def weights_of(model: Any) -> Weights:
    """MODEL's weights by module, loaded when the first is asked for."""
    if model is None:
        return no_base

    @lru_cache(1)
    def transformer() -> Any:
        from .bridge import engine_transformer

        return engine_transformer(model)

    return lambda module: transformer().get_parameter(f"{module}.weight")


def lora_model(adapters: Adapters, base: Weights) -> dict[str, Tensor]:
    """ComfyUI's own LORA_MODEL."""
    return written(adapters, "comfyui", base).tensors


def with_strengths(model: Any, adapters: Adapters, strength: float, by_block: str = "") -> Any:
    """MODEL with a LoRA on it by ComfyUI's own patches, each block at its strength; MODEL itself stays as it is.

    Raises:
        ModelError: ComfyUI did not take each of the layers.
        SettingError: the strengths are not understood.
    """
    strengths = block_strengths(by_block, adapters.modules, adapters.config)
    places_of = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora_model(adapters, weights_of(model)), places_of)
    groups: dict[float, dict[str, Any]] = {}
    for key, patch in patches.items():
        module = key.removeprefix("diffusion_model.").rpartition(".")[0]
        groups.setdefault(strength * strengths[module], {})[key] = patch
    adapted, taken = model.clone(), set[str]()
    for own, group in groups.items():
        taken |= set(group) if own == 0 else set(adapted.add_patches(group, own))
    missing = sorted(patches.keys() - taken)
    if missing or {k.removeprefix("diffusion_model.").rpartition(".")[0] for k in patches} != set(adapters.modules):
        raise ModelError(f"ComfyUI did not take {len(missing) or 'some'} of the LoRA's layers; first {missing[:1]}.")
    return adapted


def keep(adapters: Adapters, name: str, result: Written) -> str:
    """Write a LoRA under models/loras/lumina2, or find it there with these very weights; its name for a loader.

    Raises:
        SettingError: the name cannot be a file's.
    """
    store, name = places.runs(), check_run_name(name)
    free = store.free_folder(name)
    for taken in (name, *(f"{name}-{number}" for number in range(2, 100))):
        if taken == free:
            break
        path = store.loras / f"{taken}.safetensors"
        if path.is_file() and holds(path, result):
            return f"{places.SUBFOLDER}/{path.name}"
    path = store.loras / f"{free}.safetensors"
    save(path, result, adapters)
    return f"{places.SUBFOLDER}/{path.name}"


def snapshot(model: Any) -> dict[str, Tensor]:
    """MODEL's weights under our names as they are in effect, copied, since another MODEL may share their memory."""
    from .bridge import engine_transformer

    with torch.inference_mode(False):
        return {name: w.detach().to("cpu", copy=True) for name, w in engine_transformer(model).state_dict().items()}
