"""What every kind of adapter is to the rest of the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..model.linear import Linear

PREFIX = "diffusion_model."  # ComfyUI's, before the name of a module


class Adapter(ABC):
    """What is trained.

    Attributes:
        weights: the trained parameters, by names that stay the same from run to run.
        draws: its forward pass draws random numbers while training, so each step has to be seeded.
    """

    weights: dict[str, nn.Parameter]
    draws = False

    @property
    def frozen(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights: tensors that were made from the base and never change."""
        return {}

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser, each with its ``lr``."""
        return [{"params": list(self.weights.values()), "lr": learning_rate}]

    def at(self, strength: float) -> AbstractContextManager[None]:
        """Within the block, which holds the backward pass too, the adapter acts with a strength other than 1."""
        return nullcontext()

    @abstractmethod
    def off(self) -> AbstractContextManager[None]:
        """Within the block the model predicts as the base does, bit for bit."""

    @abstractmethod
    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors under ComfyUI's names, fp32 on the CPU, none sharing memory with another; and their metadata."""

    @abstractmethod
    def describe(self) -> str:
        """One sentence: kind, size and place."""

    def load(self, saved: Mapping[str, Tensor], source: str) -> None:
        """Put ``weights`` and ``frozen`` back as they were saved.

        Raises:
            ModelError: the saved adapter has other layers, another kind or another rank.
        """
        load_weights({**self.weights, **self.frozen}, saved, source)


def load_weights(here: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy saved tensors into those of the same names.

    Raises:
        ModelError: names or shapes differ.
    """
    for name in sorted({*here, *saved}):
        ours, theirs = here.get(name), saved.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise ModelError(
                f"{source} holds another adapter: {name} is {None if theirs is None else tuple(theirs.shape)} there "
                f"and {None if ours is None else tuple(ours.shape)} here. Use the same model, rank and targets."
            )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(saved[name])


class Rows:
    """Some rows of a frozen layer, as what is trained beside them sees it."""

    def __init__(self, whole: AdaptedLinear, rows: slice) -> None:
        self.whole, self.rows = whole, rows
        self.in_features: int = whole.in_features
        self.out_features: int = rows.stop - rows.start

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole.base_layer(x)[..., self.rows]

    @property
    def weight(self) -> Tensor:
        return self.whole.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.rows]

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.whole.base_layer.read(dtype)[self.rows]


class AdaptedLinear(nn.Module):
    """A frozen linear layer and what is trained beside it.

    Attributes:
        base_layer: the layer as it was, or the rows of it that this is about.
        on: False: it computes what the base layer does.
        strength: what is added to the base is multiplied with it.
    """

    base_layer: Linear | Rows

    def __init__(self, base: Linear | Rows) -> None:
        super().__init__()
        self.base_layer = base
        self.on, self.strength = True, 1.0
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def act_at(self, strength: float) -> None:
        self.strength = strength

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the names they have behind the module's."""
        raise NotImplementedError

    def fixed(self) -> dict[str, Tensor]:
        """As ``trained``, of what a checkpoint holds beside them."""
        return {}

    def parts(self) -> dict[str, Tensor]:
        """What ComfyUI's loaders make this layer of at strength 1, by the names it has behind the module's."""
        raise NotImplementedError


class LayerAdapter(Adapter):
    """An adapter that stands in the place of linear layers."""

    def __init__(self, layers: Mapping[str, AdaptedLinear]) -> None:
        self.layers = dict(layers)
        self.weights = {f"{name}.{part}": w for name, layer in layers.items() for part, w in layer.trained().items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        return {f"{name}.{part}": t for name, layer in self.layers.items() for part, t in layer.fixed().items()}

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        for layer in self.layers.values():
            layer.act_at(strength)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.act_at(1.0)

    def off(self) -> AbstractContextManager[None]:
        return switched_off(self.layers.values())

    @abstractmethod
    def metadata(self) -> dict[str, str]: ...

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            f"{PREFIX}{name}.{part}": tensor.detach().float().cpu().clone().contiguous()
            for name, layer in self.layers.items()
            for part, tensor in layer.parts().items()
        }
        return tensors, self.metadata()

    def size(self) -> str:
        count = sum(weight.numel() for weight in self.weights.values())
        return f"on {len(self.layers)} layers, {count:,} weights"


@contextmanager
def switched_off(layers: Iterable[AdaptedLinear]) -> Iterator[None]:
    """Within the block these layers compute what their base layers do; then what they did before."""
    before = [(layer, layer.on) for layer in layers]
    for layer, _ in before:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in before:
            layer.on = on


def put_layer(model: nn.Module, name: str, layer: nn.Module | nn.Parameter) -> None:
    """Set the module or parameter that a dotted name stands for; a module trains if the model does."""
    if isinstance(layer, nn.Module):
        layer.train(model.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def dense_weight(base: Linear | Rows) -> Tensor:
    """What a layer multiplies with, (out, in) in fp32, however it is stored; good until the next one is read."""
    return base.read(torch.float32).detach()


def with_gain(out: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output where the rows of its weight, and not its bias, are multiplied with ``gain`` (out,)."""
    gain = gain.to(out.dtype)
    return out * gain if bias is None else out * gain + bias.to(out.dtype) * (1 - gain)
