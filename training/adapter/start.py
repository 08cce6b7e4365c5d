"""An adapter file of any format as the start of a training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.adapter import LoRASettings
from ..errors import ModelError
from ..model.transformer import Lumina2Transformer
from .base import AdaptedLinear, dense_weight
from .formats.fuse import join_layers, split_layer
from .formats.kronecker import as_lokr
from .formats.layers import PARTS, Adapters, Layer, Weights, change, no_base, whole_shape, with_lengths
from .formats.low_rank import lost, of_matrix
from .formats.read import read_adapters
from .lora import Pair
from .lycoris import LyCORISLinear, SplitLinear
from .targets import linear_layers, target_modules

_KINDS = {name: name for name in ("lora", "loha", "lokr", "glora")}  # of a file's layer, by algo
_KINDS |= {"locon": "lora", "full": "diff", "diag-oft": "oft", "boft": "oft"}
_NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "diff": "weight"} | {
    name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")
}
_FIRST = ("B", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff")  # the factor that all scales are in


@dataclass(frozen=True)
class Start:
    """A and B of each layer, ``B·A`` being what the file adds to the weight, in the order of the layer's parts."""

    layers: Mapping[str, Sequence[Pair]]
    lengths: Mapping[str, Tensor]  # of the rows of the weight with what is added: DoRA's m
    rank: int  # of most layers; that of a layer's parts where they are split
    note: str


def read_start(path: Path, transformer: Lumina2Transformer, settings: LoRASettings) -> Start:
    """Read an adapter file as a LoRA. Its own rank wins; what is no LoRA becomes the nearest one of the rank set.

    Where the settings fuse q, k and v, adapters that are apart become one whose rank is the sum of theirs, or stays
    where they share A.

    Raises:
        ModelError: the file is missing, no adapter, of another model, or has layers that are not trained.
    """
    adapters = _read(path, transformer)
    targets = target_modules(transformer, settings.targets, settings.blocks)
    _check_trained(path, adapters, targets)
    base = _weights(transformer)
    layers: dict[str, Sequence[Pair]] = {}
    lengths: dict[str, Tensor] = {}
    left_out = whole = 0.0
    for module, parts in adapters.modules.items():
        fused = module.endswith("attention.qkv")
        rows = transformer.config.qkv_rows if fused else (base(module).shape[0],)
        exact = _pairs(parts, rows, fused and settings.qkv == "split", settings.use_dora)
        added = None if exact and not settings.use_dora else adapters.delta(module, base)
        if added is not None and settings.use_dora:
            lengths[module] = (base(module).float().cpu() + added).norm(dim=1)
        if exact is None:
            assert added is not None
            pieces = added.split(list(rows)) if fused and settings.qkv == "split" else (added,)
            exact = [of_matrix(piece, settings.rank) for piece in pieces]
            for piece, (a, b) in zip(pieces, exact, strict=True):
                out, of = lost(piece, a, b)
                left_out, whole = left_out + out, whole + of
        layers[module] = exact
    rank = Counter(a.shape[0] for pairs in layers.values() for a, _ in pairs).most_common(1)[0][0]
    note = f"rank {rank}, {f'instead of the {settings.rank} set' if rank != settings.rank else 'as set'}"
    if whole:
        error = math.sqrt(left_out / whole)
        note += f"; what is no plain LoRA there became the nearest one, relative error {error:.2g}"
    return Start(layers, lengths, rank, f"started from {path.name}: {_with_notes(note, adapters)}")


def start_lycoris(
    path: Path, transformer: Lumina2Transformer, layers: Mapping[str, LyCORISLinear | SplitLinear]
) -> str:
    """Fill LyCORIS layers, which are in the transformer, with what a file adds, exactly.

    The algorithm ``full`` takes every file; another takes what is of its own kind and size.

    Returns:
        What the user is told.

    Raises:
        ModelError: as of ``read_start``, or a layer cannot hold what is in the file.
    """
    adapters, base = _read(path, transformer), _weights(transformer)
    _check_trained(path, adapters, list(layers))
    for module, parts in adapters.modules.items():
        layer, rows = layers[module], adapters.config.qkv_rows
        if layer.settings.algo == "full":
            bias = parts[""].bias if "" in parts else None
            parts = {"": Layer("diff", {"diff": adapters.delta(module, base)}, bias=bias)}
        if isinstance(layer, SplitLinear):
            apart = (split_layer(parts[""], rows) or {}) if "" in parts else parts
            if not apart:
                raise _another_kind(path, layer, module, "one over query, key and value")
            for part, own in layer.own.items():
                if part in apart:
                    _fill(own, apart[part], f"{module}, {part},", path)
            continue
        whole = parts[""] if "" in parts else join_layers(parts, rows)
        if whole is None:
            raise _another_kind(path, layer, module, "apart for query, key and value")
        _fill(layer, whole, module, path)
    return "; ".join((f"started from {path.name}", *adapters.notes))


def _where(path: Path, layer: LyCORISLinear | SplitLinear, module: str) -> str:
    return f"init_lora: {path} cannot be the start of {layer.settings.algo} on {module}: "


def _another_kind(path: Path, layer: LyCORISLinear | SplitLinear, module: str, kind: str) -> ModelError:
    where = _where(path, layer, module)
    return ModelError(f'{where}it is {kind} there. Choose that algo, or "full", which takes every file.')


@torch.no_grad()
def _fill(layer: LyCORISLinear, found: Layer, module: str, path: Path) -> None:
    settings, where = layer.settings, _where(path, layer, module)
    own = dict(layer.lycoris.named_parameters())
    found = with_lengths(found, lambda: dense_weight(layer.base_layer))
    if settings.algo == "lokr":
        found = _as_lokr(found, own)
    if settings.algo not in _KINDS or found.kind != _KINDS[settings.algo]:
        raise _another_kind(path, layer, module, found.kind)
    if found.dora != settings.dora_wd or (found.dora and found.by_columns == settings.wd_on_output):
        told = "without" if not found.dora else "by columns with" if found.by_columns else "by rows with"
        raise ModelError(f"{where}it is {told} DoRA there. Set dora_wd and wd_on_output so.")
    if found.dora and settings.multiplier != 1:
        raise ModelError(f"{where}DoRA's lengths hold at full strength. Set multiplier to 1.")
    if "scalar" in own:
        own["scalar"].fill_(1)
    factor = settings.multiplier * float(getattr(layer.lycoris, "scale", 1.0))
    given = {_NAMES.get(name, name): tensor / factor if name in (*_FIRST, "a1", "b1") else tensor
             for name, tensor in found.factors.items()}  # fmt: skip
    if found.dora:
        assert found.magnitude is not None
        given["dora_scale"] = found.magnitude
    if "bias" in own:
        given["bias"] = torch.zeros_like(own["bias"]) if found.bias is None else found.bias / settings.multiplier
    wanted = {name: weight.shape for name, weight in own.items() if name != "scalar"}
    if wanted != {name: tensor.shape for name, tensor in given.items()}:
        sizes = ", ".join(f"{name} {' × '.join(map(str, tensor.shape))}" for name, tensor in given.items())
        raise ModelError(f"{where}it has {sizes} there. Set linear_dim, factor and the like to those of the file.")
    for name, tensor in given.items():
        own[name].copy_(tensor)


def _as_lokr(found: Layer, own: Mapping[str, Tensor]) -> Layer:
    """What was trained for q, k and v apart and written over all of them is a LoKr again, in the factors of ``own``."""
    if found.kind not in ("diff", "lora") or found.dora or found.bias is not None:
        return found
    made = as_lokr(change(found, lambda: no_base("")), whole_shape(own, "lokr_w1"))
    if made is None:
        return found
    factors = {}
    for name, whole in made.factors.items():
        if name in own:
            factors[name] = whole
        else:
            a, b = of_matrix(whole, own[f"{name}_b"].shape[0])
            out, of = lost(whole, a, b)
            if out > 1e-10 * of:
                return found
            factors |= {f"{name}_a": b, f"{name}_b": a}
    return Layer("lokr", factors)


def _read(path: Path, transformer: Lumina2Transformer) -> Adapters:
    if not path.exists():
        raise ModelError(f"init_lora: there is no file {path}. Correct the path.")
    try:
        return read_adapters(path, transformer.config)
    except ModelError as error:
        raise ModelError(f"init_lora: {error}") from None


def _check_trained(path: Path, adapters: Adapters, targets: Sequence[str]) -> None:
    outside = [module for module in adapters.modules if module not in targets]
    if outside:
        raise ModelError(
            f"init_lora: {path} has an adapter on {outside[0]}, which is not trained. Choose targets that hold it, "
            f'as in "all", or "regex:…".'
        )


def _weights(transformer: Lumina2Transformer) -> Weights:
    """The base's weights by module, also of layers that are adapted already; each is good until the next is read."""
    linear = linear_layers(transformer)

    def weight(module: str) -> Tensor:
        layer: nn.Module = transformer.get_submodule(module)
        return dense_weight(layer.base_layer if isinstance(layer, AdaptedLinear) else linear[module])

    return weight


def _with_notes(note: str, adapters: Adapters) -> str:
    biases = any(layer.bias is not None for layer in adapters.layers.values())
    return "; ".join(filter(None, (note, *adapters.notes, "its biases are left out" if biases and note else "")))


def _pairs(parts: Mapping[str, Layer], rows: Sequence[int], split: bool, use_dora: bool) -> list[Pair] | None:
    """A and B of a module's rows, in one or of each part; None: it is no LoRA that these can be."""
    if any(layer.kind != "lora" or (layer.dora and not use_dora) or layer.by_columns for layer in parts.values()):
        return None
    plain = {part: replace(layer, magnitude=None, comfyui_scale=None, bias=None) for part, layer in parts.items()}
    if not split:
        whole = plain[""] if "" in plain else join_layers(plain, rows)
        return [_pair(whole)] if whole else None
    found = split_layer(plain[""], rows) if "" in plain else plain
    if found is None:
        return None
    some = next(iter(found.values())).factors["A"]
    nothing = {part: Layer("lora", {"A": some.clone(), "B": torch.zeros(height, len(some))})
               for part, height in zip(PARTS, rows, strict=True)}  # fmt: skip
    return [_pair(found.get(part, nothing[part])) for part in PARTS]


def _pair(layer: Layer) -> Pair:
    return layer.factors["A"], layer.factors["B"]
