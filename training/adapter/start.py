"""A LoRA file as the start of a training: any of the names and halves that such files are written with."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config.adapter import LoRASettings
from ..errors import ModelError
from ..model.keys import diffusers_modules
from ..model.transformer import Lumina2Transformer
from .lora import Pair
from .targets import linear_layers, target_modules

_KEY = re.compile(r"(.+?)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?(?:\.weight)?|(.+)\.alpha")
_PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|diffusion_model\.|lora_unet_|lycoris_|lora_transformer_)?")


@dataclass(frozen=True)
class Start:
    """A and B of each layer, ``B·A`` being what the file adds to the weight, in the order of the layer's parts."""

    layers: Mapping[str, Sequence[Pair]]
    rank: int  # of most layers; that of a layer's parts where they are split
    note: str


def read_start(path: Path, transformer: Lumina2Transformer, settings: LoRASettings) -> Start:
    """Read a LoRA of Lumina2: ComfyUI's, PEFT's and diffusers', or kohya's names; q, k and v in one or apart.

    Where the settings fuse q, k and v, adapters that are apart become one whose rank is the sum of theirs.

    Raises:
        ModelError: the file is missing, no LoRA, of another model, or has layers that are not trained.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"init_lora: there is no file {path}. Correct the path.") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"init_lora: {path} is no safetensors file ({error}). Choose a LoRA.") from None
    found = _pairs(tensors, _scale_in(metadata), _names(transformer), str(path))
    targets = target_modules(transformer, settings.targets, settings.blocks)
    outside = [module for module, _ in found if module not in targets]
    if outside:
        raise ModelError(
            f"init_lora: {path} has an adapter on {outside[0]}, which is not trained. Choose targets that hold it, "
            f'as in "all", or "regex:…".'
        )
    linear, layers = linear_layers(transformer), {}
    for module in dict.fromkeys(module for module, _ in found):
        rows = transformer.config.qkv_rows if module.endswith("attention.qkv") else (linear[module].out_features,)
        parts = {part: pair for (m, part), pair in found.items() if m == module}
        pairs = _as_split(parts, rows) if settings.qkv == "split" else _as_one(parts, rows)
        height, width = (sum(b.shape[0] for _, b in pairs), pairs[0][0].shape[1])
        if (height, width) != (linear[module].out_features, linear[module].in_features):
            raise ModelError(
                f"init_lora: {path} fits a {module} of {height} × {width}; this model's is "
                f"{linear[module].out_features} × {linear[module].in_features}. Choose a LoRA of this model."
            )
        layers[module] = pairs
    rank = Counter(a.shape[0] for pairs in layers.values() for a, _ in pairs).most_common(1)[0][0]
    given = f"instead of the {settings.rank} set" if rank != settings.rank else "as set"
    return Start(layers, rank, f"started from {path.name}: rank {rank}, {given}")


def _names(transformer: Lumina2Transformer) -> dict[str, tuple[str, int | None]]:
    """Every name that a layer goes by, without prefixes: our name, and which of q, k and v it is."""
    names: dict[str, tuple[str, int | None]] = {}
    for module in linear_layers(transformer):
        others: list[tuple[str, int | None]] = [(module, None)]
        theirs = diffusers_modules(module)
        others += [(name, part if len(theirs) == 3 else None) for part, name in enumerate(theirs)]
        if module.endswith("attention.qkv"):
            others += [(f"{module.removesuffix('qkv')}to_{letter}", part) for part, letter in enumerate("qkv")]
        elif module.endswith("attention.out"):
            others.append((f"{module.removesuffix('out')}to_out.0", None))
        for name, part in others:
            names[name] = names[name.replace(".", "_")] = (module, part)
    return names


def _scale_in(metadata: Mapping[str, str]) -> float:
    """What PEFT multiplies with, where diffusers wrote its configuration beside the weights."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        rank, alpha = (float(told[f"transformer.{key}"]) for key in ("r", "lora_alpha"))
    except (KeyError, TypeError, ValueError):
        return 1.0
    return alpha / (math.sqrt(rank) if told.get("transformer.use_rslora") else rank)


def _pairs(
    tensors: Mapping[str, Tensor], scale: float, names: Mapping[str, tuple[str, int | None]], source: str
) -> dict[tuple[str, int | None], Pair]:
    """A and B by layer and part, the scale in B.

    Raises:
        ModelError: a key is no half of a LoRA or belongs to no layer.
    """
    halves: dict[tuple[str, int | None], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ModelError(
                f"init_lora: {source} holds {key!r}, which is no part of a plain LoRA. Start from a LoRA without "
                "DoRA, LyCORIS or text encoder weights."
            )
        name = _PREFIX.sub("", match[1] or match[4], count=1)
        if name not in names:
            raise ModelError(f"init_lora: {source}: the key {key!r} belongs to no layer of this Lumina2.")
        halves.setdefault(names[name], {})["A" if match[2] else "B" if match[3] else "alpha"] = tensor
    pairs = {}
    for place, half in halves.items():
        if "A" not in half or "B" not in half:
            raise ModelError(f"init_lora: {source} has only one half of the adapter on {place[0]}; it is damaged.")
        alpha = half.get("alpha")
        factor = scale if alpha is None else float(alpha) / half["A"].shape[0]
        pairs[place] = (half["A"], half["B"] * factor)
    return pairs


def _as_one(parts: Mapping[int | None, Pair], rows: Sequence[int]) -> list[Pair]:
    """One pair; of q, k and v A is stacked and B along a diagonal, zero where a part has none."""
    if None in parts:
        return [parts[None]]
    a = torch.cat([pair[0] for _, pair in sorted(parts.items(), key=lambda part: part[0] or 0)])
    blocks = [parts[n][1] if n in parts else torch.zeros(height, 0) for n, height in enumerate(rows)]
    return [(a, torch.block_diag(*blocks))]


def _as_split(parts: Mapping[int | None, Pair], rows: Sequence[int]) -> list[Pair]:
    """A pair for each part of the rows; a fused one is shared out, and what is missing adds nothing yet."""
    if None in parts:
        a, b = parts[None]
        return (
            [(a.clone(), rows_of_b.clone()) for rows_of_b in b.split(list(rows))] if sum(rows) == len(b) else [(a, b)]
        )
    some = next(iter(parts.values()))[0]
    return [parts.get(n, (some.clone(), torch.zeros(height, some.shape[0]))) for n, height in enumerate(rows)]
