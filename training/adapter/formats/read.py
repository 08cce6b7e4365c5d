"""Reading adapter files of any trainer.

Known: ComfyUI's names (``diffusion_model.…``), diffusers' and PEFT's (``transformer.…``, ``base_model.model.…``),
kohya's (``lora_unet_…``) and LyCORIS's (``lycoris_…``); q, k and v in one or apart; alpha beside the factors, in
metadata or folded; any rank a layer, any choice of blocks; DoRA of both conventions.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...files import read_json
from ...model.config import TransformerConfig
from .layers import PARTS, Adapters, Layer, Place, shapes
from .names import bare, diffusers_name, large_enough, sizes_of, table

MAGNITUDES = "lumina2_trainer.magnitudes"  # DoRA's m, which ComfyUI's files hold divided
PEFT_SETTINGS = "lora_adapter_metadata"
_PARTS = {
    "lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_linear_layer.down": "A",
    "lora_B": "B", "lora_up": "B", "lora.up": "B", "lora_linear_layer.up": "B",
    "lora_magnitude_vector": "magnitude", "dora_scale": "dora_scale", "alpha": "alpha",
    "w_norm": "diff", "diff": "diff", "b_norm": "diff_b", "diff_b": "diff_b",
    "oft_blocks": "oft_blocks", "rescale": "rescale",
}  # fmt: skip
_PARTS |= {name: name for n in "12" for name in (f"a{n}", f"b{n}", f"hada_w{n}_a", f"hada_w{n}_b")}
_PARTS |= {f"lokr_w{n}{half}": f"lokr_w{n}{half}" for n in "12" for half in ("", "_a", "_b")}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _PARTS))})(?:\.default)?(?:\.weight)?|(.+)\.(weight|on_input)")
_UNUSED = "norm_final"  # ComfyUI's trainer has a difference of it, and no forward uses it
_TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te|te\d?[._]|conditioner|cond_stage_model)")
_KINDS = {
    "lora": ({"A", "B"}, set[str]()),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set[str]()),
    "glora": ({"a1", "a2", "b1", "b2"}, set[str]()),
    "oft": ({"oft_blocks"}, {"rescale"}),
    "ia3": ({"weight", "on_input"}, set[str]()),
    "diff": ({"diff"}, set[str]()),
}


def read_adapters(path: Path, config: TransformerConfig | None = None) -> Adapters:
    """An adapter file; see ``adapters_of``.

    Raises:
        ModelError: the file is missing or damaged, or as of ``adapters_of``.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is no .safetensors file; other kinds are not read, for safety.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}). Choose another file.") from error
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.exists() and PEFT_SETTINGS not in metadata:
        metadata[PEFT_SETTINGS] = json.dumps(read_json(beside))
    return adapters_of(tensors, metadata, config, str(path))


def adapters_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: TransformerConfig | None = None,
    source: str = "The LoRA",
) -> Adapters:
    """What the tensors of an adapter file mean.

    Args:
        config: the model that it has to fit; None: of the sizes that the file tells.
        source: names the file in errors.

    Raises:
        ModelError: a tensor belongs to no weight of a Lumina2, does not fit it, or is not understood.
    """
    own = {key: tensor for key, tensor in tensors.items() if not _TEXT.match(key)}
    notes = (
        (f"{len(tensors) - len(own)} tensors of the text encoder are left out: none of the formats agree on them.",)
        if len(own) < len(tensors)
        else ()
    )
    named = large_enough(config or TransformerConfig(), own)
    names = table(named)
    raw: dict[Place, dict[str, Tensor]] = {}
    by_lycoris = set()
    for key, tensor in own.items():
        match = _KEY.fullmatch(key)
        name, part = (match[1] or match[3], _PARTS.get(match[2], match[4])) if match else ("", "")
        if bare(name) == _UNUSED:
            continue
        place = names.get(bare(name))
        if place is None:
            raise ModelError(f"{source}: the key {key!r} belongs to no weight of a Lumina2, or is of an unknown kind.")
        if part in raw.setdefault(place, {}):
            raise ModelError(f"{source} has {key!r} a second time under another name; it is damaged.")
        raw[place][part] = tensor.detach().float().cpu()
        if name.startswith("lycoris_"):
            by_lycoris.add(place)
    if not raw:
        raise ModelError(f"{source} holds no adapter of a Lumina2: {len(tensors)} tensors, none of a layer.")
    scale, lengths = _peft_scale(metadata), _lengths(metadata)
    layers = {}
    for place, parts in raw.items():
        layer = _layer(place, parts, scale, place in by_lycoris, source)
        layers[place] = _with_magnitude(layer, place, lengths)
    for module, part in layers:
        if part and (module, "") in layers:
            raise ModelError(f"{source} adapts {module} both in one and by its parts; it is damaged.")
    found = Adapters(config or sizes_of(layers, named), layers, dict(metadata), notes)
    _check_fits(found, source)
    return found


def layer_of(parts: Mapping[str, Tensor]) -> Layer:
    """A layer of tensors by the names that they have behind a module's in ComfyUI's files, without an alpha of rank."""
    named = {_PARTS[name.removesuffix(".weight")]: tensor.detach().float().cpu() for name, tensor in parts.items()}
    return _layer(("", ""), named, lambda place: 1.0, False, "The adapter")


def _layer(
    place: Place, parts: dict[str, Tensor], scale: Callable[[Place], float], by_lycoris: bool, source: str
) -> Layer:
    """One layer of its parts, every factor inside."""
    parts, where = dict(parts), f"{source}: {place[0]}"
    alpha, bias = parts.pop("alpha", None), parts.pop("diff_b", None)
    dora, magnitude = parts.pop("dora_scale", None), parts.pop("magnitude", None)
    kinds = [kind for kind, (needed, also) in _KINDS.items() if needed <= {*parts} <= needed | also]
    if any(name.startswith("lokr_w") for name in parts) and all(_has_factor(parts, n) for n in ("lokr_w1", "lokr_w2")):
        kinds = ["lokr"]
    if not parts and bias is not None:
        kinds = ["diff"]
    if len(kinds) != 1:
        raise ModelError(f"{where} has {', '.join(sorted(parts)) or 'nothing but alpha'}: no adapter of a known kind.")
    kind, value = kinds[0], None if alpha is None else float(alpha)
    if kind == "lora":
        parts = {name: factor.flatten(1) for name, factor in parts.items()}
        factor = scale(place) if value is None else value / parts["A"].shape[0]
        parts["B"] = parts["B"] * factor
    elif kind == "ia3":
        gain, on_input = parts["weight"].flatten(), bool(parts["on_input"])
        parts = {"weight": gain[None] if on_input else gain[:, None]}
    elif kind == "oft":
        parts["oft_blocks"] = _held(parts["oft_blocks"], value or 0.0, by_lycoris)
        if parts["oft_blocks"].ndim == 3 and not by_lycoris:
            parts.pop("rescale", None)  # ComfyUI does not read it there
    else:
        _scale_product(kind, parts, value, scale(place))
    layer = Layer(kind, parts, bias=bias)
    if magnitude is not None:
        return replace(layer, magnitude=magnitude.reshape(-1, 1))
    if dora is None:
        return layer
    dora = dora.reshape(dora.shape[0], -1)
    if by_lycoris or (dora.shape[0] == 1 and layer.extent[0] != 1):  # of columns, both mean the same
        return replace(layer, magnitude=dora)
    return replace(layer, comfyui_scale=dora)


def _has_factor(parts: Mapping[str, Tensor], name: str) -> bool:
    return (name in parts) != (f"{name}_a" in parts and f"{name}_b" in parts)


def _scale_product(kind: str, parts: dict[str, Tensor], alpha: float | None, peft: float) -> None:
    """alpha over the rank, or else PEFT's scale, into the first factor; a LoKr not factored further has no rank."""
    inner = {"loha": "hada_w1_b", "glora": "b2"}.get(kind, "")
    inner = inner or next((n for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), "")
    factor = peft if alpha is None else alpha / parts[inner].shape[0] if inner else 1.0
    for name in ("hada_w1_a", "lokr_w1", "lokr_w1_a", "a1", "b1"):
        if name in parts:
            parts[name] = parts[name] * factor


def _held(blocks: Tensor, constraint: float, by_lycoris: bool) -> Tensor:
    """Blocks that are no longer than their constraint; LyCORIS takes it by the row, ComfyUI in all."""
    limit = constraint * (blocks.shape[-3] * blocks.shape[-2] if by_lycoris else 1)
    size = float((blocks - blocks.transpose(-1, -2)).norm()) + 1e-8
    return blocks * (limit / size) if 0 < limit < size else blocks


def _peft_scale(metadata: Mapping[str, str]) -> Callable[[Place], float]:
    """What PEFT multiplies each layer with, where its configuration is beside the weights; else 1."""
    try:
        told: dict[str, Any] = json.loads(metadata.get(PEFT_SETTINGS, "{}"))
        settings = {key.removeprefix("transformer."): value for key, value in told.items()}
        rank, alpha = float(settings["r"]), float(settings["lora_alpha" if "lora_alpha" in settings else "alpha"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return lambda place: 1.0
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}

    def of(place: Place) -> float:
        name = diffusers_name(place)
        r, a = float(_matching(ranks, name, rank)), float(_matching(alphas, name, alpha))
        return a / (math.sqrt(r) if settings.get("use_rslora") else r)

    return of


def _matching(patterns: Mapping[str, Any], name: str, otherwise: float) -> Any:
    """The value of the first pattern that means a module, as PEFT matches them."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, otherwise)


def _lengths(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """DoRA's m by module, from the metadata of a file of ours."""
    try:
        told = json.loads(metadata.get(MAGNITUDES, "{}"))
        return {
            name.rpartition(".")[0]: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
            for name, text in told.items()
        }
    except (ValueError, AttributeError, TypeError):
        return {}


def packed_lengths(layers: Mapping[Place, Layer]) -> str:
    """DoRA's m of whole modules, as metadata holds it: base64 of fp32 by name."""
    return json.dumps(
        {
            f"{module}.lora_magnitude_vector": base64.b64encode(layer.magnitude.flatten().numpy().tobytes()).decode()
            for (module, part), layer in layers.items()
            if not part and layer.magnitude is not None and layer.comfyui_scale is not None
        }
    )


def _with_magnitude(layer: Layer, place: Place, lengths: Mapping[str, Tensor]) -> Layer:
    module, part = place
    known = lengths.get(module)
    if part or layer.comfyui_scale is None or known is None or len(known) != len(layer.comfyui_scale):
        return layer
    return replace(layer, magnitude=known[:, None])


def _check_fits(adapters: Adapters, source: str) -> None:
    """Each layer has the sizes of the weight it belongs to.

    Raises:
        ModelError: one has not, or the model has no such block.
    """
    there = shapes(adapters.config)
    for (module, part), layer in adapters.layers.items():
        shape = there.get(module)
        if shape is None:
            raise ModelError(
                f"{source} adapts {module}, and the model has {adapters.config.layers} layers and "
                f"{adapters.config.refiner_layers} refiners. Choose a LoRA of this model."
            )
        rows = adapters.config.qkv_rows[PARTS.index(part)] if part else shape[0]
        expected = (rows, *shape[1:])
        found = layer.extent
        if any(is_ is not None and is_ != need for is_, need in zip(found, expected, strict=False)):
            raise ModelError(
                f"{source} fits a {module}{f' ({part})' if part else ''} of {found[0]} × {found[1]}; this model's is "
                f"{' × '.join(map(str, expected))}. Choose a LoRA of this model, or the model of this LoRA."
            )
        if layer.magnitude is not None and layer.magnitude.shape not in ((rows, 1), (1, shape[-1])):
            raise ModelError(f"{source}: the DoRA of {module} has {tuple(layer.magnitude.shape)} lengths, not {rows}.")
        if layer.comfyui_scale is not None and layer.comfyui_scale.shape != (rows, 1):
            raise ModelError(
                f"{source}: the DoRA of {module} has {tuple(layer.comfyui_scale.shape)} scales, not {rows}."
            )
