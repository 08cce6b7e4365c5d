"""Writing adapter files in each format, and reading back what was written.

What a format's own loader cannot express is written as the exact difference of the weight where it reads those, or as
a LoRA of a chosen rank, whose error is told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config.checks import one_of
from ...errors import ModelError
from ...files import write_tensors
from .fuse import join_layers, split_layer
from .kronecker import peft_lokr, with_whole_first
from .layers import FUSED, Adapters, Layer, Place, Weights, as_dora, change, no_base, with_lengths
from .low_rank import lost, of_matrix
from .names import diffusers_name
from .read import MAGNITUDES, PEFT_SETTINGS, packed_lengths, read_adapters

_SMALL = ("dora_scale", "lora_magnitude_vector", "alpha")  # stay fp32: a rounded length rounds the whole row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Format:
    """What the loaders of a format read.

    Attributes:
        kinds: of layers; all else becomes a difference, where it reads those, or a LoRA.
        split: q, k and v apart, as diffusers' model has them.
        dora: whose lengths it means: ComfyUI's scale, or DoRA's own m.
        alpha: whether alpha stands beside the factors; it is the rank, since every scale is inside.
    """

    kinds: frozenset[str]
    split: bool
    dora: str
    alpha: bool
    key: Callable[[Place], str]


_ALL = frozenset({"lora", "loha", "lokr", "glora", "oft", "diff"})
FORMATS = {
    "comfyui": Format(_ALL, False, "comfyui_scale", False, lambda place: f"diffusion_model.{place[0]}"),
    "diffusers": Format(
        frozenset({"lora", "lokr"}), True, "magnitude", False, lambda place: f"transformer.{diffusers_name(place)}"
    ),
    "kohya": Format(_ALL, False, "comfyui_scale", True, lambda place: f"lora_unet_{place[0].replace('.', '_')}"),
    "lycoris": Format(
        frozenset({"lora", "loha", "lokr", "diff"}),
        True,
        "magnitude",
        True,
        lambda place: f"lycoris_{diffusers_name(place).replace('.', '_')}",
    ),
}


@dataclass(frozen=True)
class Written:
    """Tensors under a format's names, what the file says of itself, and what there is to tell the user."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    relative_error: float = 0.0  # of all that became a LoRA of a smaller rank; 0: everything is exact


def write_adapters(
    path: Path,
    adapters: Adapters,
    format: str = "comfyui",
    base: Weights = no_base,
    rank: int = 0,
    dtype: str = "fp32",
) -> Written:
    """Write an adapter file, read it back and match it against the model.

    Raises:
        ModelError, SettingError: as of ``written``; or the file does not hold what was written.
    """
    result = written(adapters, format, base, rank, dtype)
    save(path, result, adapters)
    return result


def save(path: Path, result: Written, adapters: Adapters) -> None:
    """Write a file, read it back and match it against the model.

    Raises:
        ModelError: the file does not hold what was written.
    """
    write_tensors(path, result.tensors, result.metadata)
    found = read_adapters(path, adapters.config)
    if not holds(path, result) or found.modules.keys() != adapters.modules.keys():
        raise ModelError(f"{path} was written but reads differently. Check the disk, and save again.")


def holds(path: Path, result: Written) -> bool:
    """Whether a file has these very tensors."""
    from safetensors.torch import load_file

    there = load_file(path)
    return there.keys() == result.tensors.keys() and all(torch.equal(there[k], t) for k, t in result.tensors.items())


def written(
    adapters: Adapters, format: str = "comfyui", base: Weights = no_base, rank: int = 0, dtype: str = "fp32"
) -> Written:
    """An adapter as the tensors of a file; no tensor shares memory with another.

    Args:
        base: the base model's weights, for what depends on them (DoRA from another convention, GLoRA, OFT, IA3).
        rank: what a format cannot express becomes a LoRA of this rank; 0: its exact difference.

    Raises:
        SettingError: the format or dtype is unknown.
        ModelError: the base's weights are needed and not there, or the format can only hold it with a rank.
    """
    one_of("format", format, list(FORMATS))
    one_of("dtype", dtype, list(DTYPES))
    told = FORMATS[format]
    layers, reduced = _arranged(adapters, format, base, rank)
    tensors = {
        f"{told.key(place)}.{part}": tensor.to(torch.float32 if part in _SMALL else DTYPES[dtype], copy=True)
        for place, layer in layers.items()
        for part, tensor in _parts(layer, told).items()
    }
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    notes = list(adapters.notes)
    error = 0.0
    if reduced:
        gone, all_ = (sum(sums) for sums in zip(*reduced.values(), strict=True))
        error = (gone / all_) ** 0.5 if all_ else 0.0
        worst = max(reduced, key=lambda place: reduced[place][0] / (reduced[place][1] or 1))
        own = (reduced[worst][0] / (reduced[worst][1] or 1)) ** 0.5
        notes.append(
            f"{len(reduced)} of {len(layers)} layers became a LoRA of rank {rank}, since {format} cannot express them: "
            f"relative error {error:.2g} in all, at most {own:.2g} ({worst[0]})."
        )
    return Written(tensors, _metadata(adapters, layers, format), tuple(notes), error)


def comfyui_parts(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by the names that they have behind a module's in ComfyUI's files."""
    return _parts(layer, FORMATS["comfyui"])


def _parts(layer: Layer, format: Format) -> dict[str, Tensor]:
    """A layer's tensors by the names they have behind the module's."""
    halves = {"A": "lora_down.weight", "B": "lora_up.weight"} if format.alpha else {
        "A": "lora_A.weight", "B": "lora_B.weight"
    }  # fmt: skip
    weights = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
    parts = {(halves | weights).get(name, name): factor for name, factor in layer.factors.items()}
    if layer.bias is not None:
        parts["diff_b"] = layer.bias
    lengths = _lengths(layer, format) if layer.dora else None
    if lengths is not None:
        peft = format is FORMATS["diffusers"]
        parts["lora_magnitude_vector" if peft else "dora_scale"] = lengths.flatten() if peft else lengths
    if layer.kind == "oft":
        parts["alpha"] = torch.zeros(())  # the constraint is inside
    elif format.alpha and layer.kind != "diff":
        parts["alpha"] = torch.tensor(float(layer.rank))
    return parts


def _arranged(
    adapters: Adapters, format: str, base: Weights, rank: int
) -> tuple[dict[Place, Layer], dict[Place, tuple[float, float]]]:
    """The layers as a format has them, and what those that were reduced leave out."""
    told, layers, made = FORMATS[format], dict[Place, Layer](), set[Place]()
    for module, parts in adapters.modules.items():
        own, as_difference = _by_rows(adapters, module, parts, told.split, base)
        layers |= own
        made |= own.keys() if as_difference else set()
    kinds = told.kinds
    if format == "diffusers":
        as_lokr = peft_lokr({place: with_whole_first(layer) for place, layer in layers.items()})
        if as_lokr:
            return as_lokr, {}
        kinds = kinds - {"lokr"}
    ready, reduced = dict[Place, Layer](), dict[Place, tuple[float, float]]()
    for place, layer in layers.items():
        _check_readable(layer, place, format)
        weight = _rows_of(adapters, place, base)
        dora = format != "diffusers" or (layer.kind == "lora" and not layer.by_columns)
        made_again = format != "lycoris" or layer.kind != "lokr" or _lycoris_makes_lokr(layer)
        if layer.kind in kinds and made_again and (dora or not layer.dora) and not (rank and place in made):
            ready[place] = layer if _lengths(layer, told) is not None else with_lengths(layer, weight)
        else:
            ready[place], error = _expressed(layer, place, weight, format, rank)
            if error:
                reduced[place] = error
    if format == "diffusers" and any(layer.dora for layer in ready.values()):
        # PEFT gives every layer lengths as soon as one has them, and takes the base's for those that are not there.
        ready = {place: as_dora(layer, _rows_of(adapters, place, base)) for place, layer in ready.items()}
    return ready, reduced


def _lengths(layer: Layer, format: Format) -> Tensor | None:
    """DoRA's lengths as a format means them; by columns, both mean the same."""
    return layer.magnitude if format.dora == "magnitude" or layer.by_columns else layer.comfyui_scale


def _check_readable(layer: Layer, place: Place, format: str) -> None:
    """Raises ModelError for what a format has no name for, at any rank."""
    norm = layer.kind == "diff" and layer.factors and layer.factors["diff"].ndim < 2
    if (norm and FORMATS[format].split) or (layer.bias is not None and format == "diffusers"):
        raise ModelError(
            f"{format} reads no difference of a {'norm' if norm else 'bias'}, and the file has one of {place[0]}. "
            "Choose comfyui."
        )


def _rows_of(adapters: Adapters, place: Place, base: Weights) -> Callable[[], Tensor]:
    return lambda: base(place[0])[adapters.rows(place)]


def _by_rows(
    adapters: Adapters, module: str, parts: dict[str, Layer], split: bool, base: Weights
) -> tuple[dict[Place, Layer], bool]:
    """The layers of one module over all its rows, or apart; and whether no kind could, so that it is a difference."""
    if not module.endswith(FUSED) or split == ("" not in parts):
        return {(module, part): layer for part, layer in parts.items()}, False
    rows = adapters.config.qkv_rows
    if not split:
        joined = join_layers(parts, rows)
        return {(module, ""): joined or Layer("diff", {"diff": adapters.delta(module, base)})}, joined is None
    pieces = split_layer(parts[""], rows)
    whole = pieces is None
    if pieces is None:
        pieces = split_layer(Layer("diff", {"diff": adapters.delta(module, base)}, bias=parts[""].bias), rows)
        assert pieces is not None
    return {(module, part): layer for part, layer in pieces.items()}, whole


def _expressed(
    layer: Layer, place: Place, weight: Callable[[], Tensor], format: str, rank: int
) -> tuple[Layer, tuple[float, float] | None]:
    """A layer as a difference, or as a LoRA of a rank with what that leaves out."""
    exact = change(layer, weight)
    if not rank or exact.ndim < 2:
        if "diff" in FORMATS[format].kinds:
            return Layer("diff", {"diff": exact}, bias=layer.bias), None
        raise ModelError(
            f"{format} cannot express the {layer.kind} on {place[0]}. Choose a rank, and it becomes a LoRA whose error "
            "is told; or choose comfyui, which reads it exactly."
        )
    a, b = of_matrix(exact, rank)
    return Layer("lora", {"A": a, "B": b}, bias=layer.bias), lost(exact, a, b)


def _lycoris_makes_lokr(layer: Layer) -> bool:
    """Whether lycoris-lora, which works the shapes out anew from a factor, comes to those of this layer."""
    from lycoris.modules import get_module, make_module  # type: ignore[import-untyped]

    rows, columns = layer.extent
    parts = {f"x.{name}": factor for name, factor in layer.factors.items()} | {"x.alpha": torch.ones(())}
    try:
        with torch.device("meta"):
            like = nn.Linear(columns or 1, rows or 1, bias=False)
            make_module(*get_module(parts, "x"), "x", like)
    except (AttributeError, RuntimeError, ValueError):  # the first: it makes a whole matrix of these factors
        return False
    return True


def _metadata(adapters: Adapters, layers: Mapping[Place, Layer], format: str) -> dict[str, str]:
    """What the file said of itself, and what its new form needs."""
    dropped = {MAGNITUDES, PEFT_SETTINGS, "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "format"}
    metadata = {key: text for key, text in adapters.metadata.items() if key not in dropped}
    metadata |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "lumina-2/lora",
        "lumina2_trainer.format": format,
    }
    loras = {place: layer for place, layer in layers.items() if layer.kind == "lora"}
    if loras:
        usual = Counter(layer.rank for layer in loras.values()).most_common(1)[0][0]
        metadata |= {"ss_network_dim": str(usual), "ss_network_alpha": str(usual)}
    if FORMATS[format].dora == "comfyui_scale" and any(layer.dora for layer in layers.values()):
        metadata[MAGNITUDES] = packed_lengths(layers)
    if format == "diffusers" and loras:
        ranks = {f"^{diffusers_name(place)}": layer.rank for place, layer in loras.items() if layer.rank != usual}
        settings = {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": [diffusers_name(place) for place in loras],
            "use_dora": any(layer.dora for layer in loras.values()),
        }
        metadata[PEFT_SETTINGS] = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    return metadata
