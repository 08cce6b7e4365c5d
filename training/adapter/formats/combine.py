"""Several adapters as one, another rank, and the adapter that leads from one model to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config.checks import require
from ...errors import ModelError
from ...model.config import TransformerConfig
from .fuse import join_layers
from .layers import Adapters, Layer, Place, Weights, no_base, shapes
from .low_rank import lost, of_matrix, of_product


@dataclass(frozen=True)
class Combined:
    """One adapter, and how much of what it was made from its rank leaves out."""

    adapters: Adapters
    relative_error: float  # ‖what is left out‖ / ‖all‖ over every layer

    @property
    def note(self) -> str:
        ranks = sorted({layer.rank for layer in self.adapters.layers.values() if layer.kind == "lora"})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "differences"
        exact = "exact" if self.relative_error == 0 else f"relative error {self.relative_error:.2g}"
        return f"{len(self.adapters.layers)} layers, {rank}, {exact}"


def combine(given: Sequence[tuple[Adapters, float]], rank: int = 0, base: Weights = no_base) -> Combined:
    """One adapter that adds what several add at their strengths: LoRAs, and what else there is as differences.

    With one adapter at strength 1 this changes its rank.

    Args:
        rank: of the result at most; 0: exact, the ranks of LoRAs adding up.
        base: the base model's weights, for what depends on them.

    Raises:
        SettingError: nothing is given, or the rank is negative.
        ModelError: two do not belong to the same model, or the base's weights are needed and not there.
    """
    require(bool(given), "loras", [], "name at least one")
    require(rank >= 0, "rank", rank, "choose a positive number, or 0 for an exact result")
    config = _same_model([adapters for adapters, _ in given])
    layers, gone, all_ = dict[Place, Layer](), 0.0, 0.0
    for module in dict.fromkeys(module for adapters, _ in given for module in adapters.modules):
        parts = [(adapters, strength) for adapters, strength in given if module in adapters.modules]
        layers[module, ""], (left_out, whole) = _combined(module, parts, rank, base, config)
        gone, all_ = gone + left_out, all_ + whole
    notes = tuple(dict.fromkeys(note for adapters, _ in given for note in adapters.notes))
    metadata = dict(given[0][0].metadata) if len(given) == 1 else _merged([adapters.metadata for adapters, _ in given])
    return Combined(Adapters(config, layers, metadata, notes), (gone / all_) ** 0.5 if all_ else 0.0)


def _merged(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of what several files say, that which holds for all together."""
    merged: dict[str, str] = {}
    for key in ("modelspec.title", "modelspec.trigger_phrase"):
        said = dict.fromkeys(about[key] for about in each if about.get(key))
        merged |= {key: (" + " if key.endswith("title") else ", ").join(said)} if said else {}
    return merged


def _combined(
    module: str, parts: Sequence[tuple[Adapters, float]], rank: int, base: Weights, config: TransformerConfig
) -> tuple[Layer, tuple[float, float]]:
    """One layer, and the squares of what it leaves out and of all."""
    biases = [(layer.bias, s) for adapters, s in parts for layer in adapters.modules[module].values()]
    bias = _sum((b, s) for b, s in biases if b is not None)
    if not any(layer.factors for adapters, _ in parts for layer in adapters.modules[module].values()):
        return Layer("diff", {}, bias=bias), (0.0, 0.0)
    joined = [(_as_lora(adapters, module), strength) for adapters, strength in parts]
    if all(layer is not None for layer, _ in joined):
        a = torch.cat([layer.factors["A"] for layer, _ in joined if layer])
        b = torch.cat([layer.factors["B"] * strength for layer, strength in joined if layer], 1)
        if not rank or rank >= a.shape[0]:
            return Layer("lora", {"A": a, "B": b}, bias=bias), (0.0, _square(a, b))
        new_a, new_b = of_product(a, b, rank)
        return Layer("lora", {"A": new_a, "B": new_b}, bias=bias), _lost_of_products(a, b, new_a, new_b)
    exact = _sum((adapters.delta(module, base), strength) for adapters, strength in parts)
    assert exact is not None
    if not rank or exact.ndim < 2:
        return Layer("diff", {"diff": exact}, bias=bias), (0.0, float(exact.square().sum()))
    a, b = of_matrix(exact, rank)
    return Layer("lora", {"A": a, "B": b}, bias=bias), lost(exact, a, b)


def _as_lora(adapters: Adapters, module: str) -> Layer | None:
    """A module's layer where it is one plain LoRA, q, k and v in one."""
    parts = adapters.modules[module]
    layer = parts[""] if "" in parts else join_layers(parts, adapters.config.qkv_rows)
    return layer if layer and layer.kind == "lora" and not layer.dora else None


def _lost_of_products(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> tuple[float, float]:
    """As ``lost``, of two products."""
    left_out = _square(torch.cat((a, new_a)), torch.cat((b, -new_b), 1))
    return max(left_out, 0.0), _square(a, b)


def _square(a: Tensor, b: Tensor) -> float:
    """Squared Frobenius norm of ``b @ a``, by the Gram matrices: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def _sum(terms: Iterable[tuple[Tensor, float]]) -> Tensor | None:
    total: Tensor | None = None
    for tensor, strength in terms:
        total = tensor * strength if total is None else total + tensor * strength
    return total


def _same_model(given: Sequence[Adapters]) -> TransformerConfig:
    """The largest of the models: a file tells only of the blocks that it adapts.

    Raises:
        ModelError: two fit weights of different sizes.
    """
    configs = [adapters.config for adapters in given]
    largest = max(configs, key=lambda config: len(shapes(config)))
    there = shapes(largest)
    for adapters in given:
        for module in adapters.modules:
            own, other = shapes(adapters.config)[module], there.get(module)
            fused = module.endswith("qkv") and adapters.config.qkv_rows != largest.qkv_rows
            if own != other or fused:
                raise ModelError(
                    f"The LoRAs belong to different models: {module} is {tuple(own)} in one and "
                    f"{tuple(other) if other else 'missing'} in another. Merge those of one model."
                )
    return largest


def extract(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    config: TransformerConfig,
    rank: int,
    device: torch.device | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Combined:
    """The adapter that leads from one model to another of the same sizes.

    Linear weights become LoRAs of a rank, or exact differences with rank 0; norms and biases are always exact.

    Args:
        base, tuned: every weight under our names.
        device: where the work is done; the CPU by default.
        watch: told (done, total) before each module; what it raises ends the work.

    Raises:
        SettingError: the rank is negative.
        ModelError: the two are of different sizes, or equal.
    """
    require(rank >= 0, "rank", rank, "choose a positive number, or 0 for exact differences")
    layers, gone, all_ = dict[Place, Layer](), 0.0, 0.0
    for number, module in enumerate(there := shapes(config)):
        watch(number, len(there))
        exact = _difference(base, tuned, f"{module}.weight")
        bias = _difference(base, tuned, f"{module}.bias") if f"{module}.bias" in base else None
        bias = bias if bias is not None and bias.any() else None
        if not exact.any():
            if bias is not None:
                layers[module, ""] = Layer("diff", {}, bias=bias)
            continue
        layer, (left_out, whole) = Layer("diff", {"diff": exact}, bias=bias), (0.0, float(exact.square().sum()))
        if rank and exact.ndim == 2:
            a, b = (half.cpu() for half in of_matrix(exact.to(device or exact.device), rank))
            layer, (left_out, whole) = Layer("lora", {"A": a, "B": b}, bias=bias), lost(exact, a, b)
        layers[module, ""], gone, all_ = layer, gone + left_out, all_ + whole
    if not layers:
        raise ModelError("The two models have the same weights: there is nothing to extract. Wire two that differ.")
    return Combined(Adapters(config, layers), (gone / all_) ** 0.5 if all_ else 0.0)


def _difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> Tensor:
    first, second = base.get(name), tuned.get(name)
    if first is None or second is None or first.shape != second.shape:
        sizes = ["missing" if weight is None else str(tuple(weight.shape)) for weight in (first, second)]
        raise ModelError(f"The two models differ in more than their values: {name} is {sizes[0]} and {sizes[1]}.")
    return second.detach().float().cpu() - first.detach().float().cpu()
