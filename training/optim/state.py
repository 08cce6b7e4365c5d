"""An optimiser's state as what a checkpoint can hold: tensors, and values that JSON can.

torch's own ``load_state_dict`` casts states to the weights' dtype, and so cannot give every optimiser its own back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from .backward import AnyOptimizer, plain_optimizers

# What an optimiser counts, measures or finds out for a whole group; all else in a group is settings.
_MOVING = (
    "calls",  # adamw_bf16
    *("setup", "step", "kahan_sum"),  # optimi
    *("d", "d_max", "d_hat", "d_numerator", "d_denom", "k"),  # prodigy; k schedule-free, too
    *("weight_sum", "lr_max", "scheduled_lr"),  # schedule-free
)


def optimizer_tensors(optimizer: AnyOptimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that an optimiser remembers from step to step, without copying it: to be written before the next step.

    Returns:
        Tensors as ``<kind>.<weight's name>``, such as ``exp_avg.layers.0.w1.weight``; of a state that is made of
        several, as torchao's, ``<kind>/<part>.<name>``; of groups ``group.<number>.<kind>``. And the other values
        as JSON has them.
    """
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    made_of: dict[str, Any] = {}
    on_host: set[str] = set()
    for plain, number, group in _groups(optimizer):
        groups.append({})
        for kind in group.keys() & set(_MOVING):
            if isinstance(group[kind], Tensor):
                tensors[f"group.{number}.{kind}"] = group[kind]
            else:
                groups[number][kind] = group[kind]
        for name, weight in _named(group):
            for kind, value in plain.state.get(weight, {}).items():
                if not isinstance(value, Tensor):
                    states.setdefault(name, {})[kind] = value
                    continue
                if value.device != weight.device:
                    on_host.add(kind)
                if type(value) is Tensor:
                    tensors[f"{kind}.{name}"] = value.detach()
                    continue
                parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
                made_of[f"{kind}.{name}"] = [type(value).__module__, type(value).__name__, _to_json(context)]
                tensors.update({f"{kind}/{part}.{name}": getattr(value, part) for part in parts})
    places: set[int] = set()
    for key, value in tensors.items():
        if value.data_ptr() in places:
            tensors[key] = value.clone()  # bitsandbytes has one table for all, and safetensors refuses such
        places.add(value.data_ptr())
    scalars = {
        "optimizer": _name(optimizer),
        "groups": groups,
        "states": states,
        "made_of": made_of,
        "on_host": sorted(on_host),
    }
    return tensors, scalars


def load_optimizer_tensors(optimizer: AnyOptimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Give a new optimiser what ``optimizer_tensors`` told of another, which the tensors become part of.

    Where it has other groups than that had (as with another ratio of LoRA+), each takes over what the last of those
    with no higher number counted; all that the states of weights say is kept. Learning rates are not touched.

    Raises:
        RunError: it is another optimiser, or has other weights.
    """
    saved, own = scalars.get("optimizer"), _name(optimizer)
    if saved not in (None, own):
        raise RunError(
            f"The checkpoint's optimiser is {saved} and this run's is {own}. Choose the same optimizer to go on, or "
            "start a new run from the weights alone."
        )
    groups: dict[int, dict[str, Any]] = dict(enumerate(dict(group) for group in scalars.get("groups", [])))
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars.get("states", {}).items()}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "group":
            place, _, kind = name.partition(".")
            groups[int(place)][kind] = value
        else:
            states.setdefault(name, {})[kind] = value
    on_host, made_of = scalars.get("on_host", []), scalars.get("made_of", {})
    for plain, number, group in _groups(optimizer):
        if groups:
            counted = groups[min(number, len(groups) - 1)]
            group.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in counted.items()})
        for name, weight in _named(group):
            values = states.pop(name, {})
            for kind, value in values.items():
                if isinstance(value, Tensor):
                    values[kind] = value.to("cpu" if kind in on_host else weight.device)
            plain.state[weight] = _joined(values, name, made_of)
    if states:
        raise RunError(
            f"The checkpoint's optimiser has states of weights that are not trained here, such as {min(states)}. "
            "Use the same model, adapter and targets."
        )


def _joined(values: Mapping[str, Any], name: str, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """The states of one weight, with those that were taken apart put together."""
    state = {kind: value for kind, value in values.items() if "/" not in kind}
    parts: dict[str, dict[str, Tensor]] = {}
    for key in values.keys() - state.keys():
        kind, _, part = key.partition("/")
        parts.setdefault(kind, {})[part] = values[key]
    for kind, tensors in parts.items():
        module, cls, context = made_of[f"{kind}.{name}"]
        if module.partition(".")[0] != "torchao":  # a checkpoint must not be able to name just any code
            raise RunError(f"The checkpoint is damaged: {kind} of {name} is said to be a {module}.{cls}.")
        state[kind] = getattr(import_module(module), cls).__tensor_unflatten__(tensors, _from_json(context))
    return state


def _groups(optimizer: AnyOptimizer) -> Iterator[tuple[torch.optim.Optimizer, int, dict[str, Any]]]:
    number = 0
    for plain in plain_optimizers(optimizer):
        for group in plain.param_groups:
            yield plain, number, group
            number += 1


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    return zip(group["names"], group["params"], strict=True)


def _name(optimizer: AnyOptimizer) -> str:
    return optimizer.param_groups[0]["optimizer"]


def _to_json(context: list[Any]) -> list[Any]:
    """What a tensor of torchao is told when it is made: truth values, shapes and dtypes."""
    return [str(v) if isinstance(v, torch.dtype) else list(v) if isinstance(v, tuple) else v for v in context]


def _from_json(context: list[Any]) -> list[Any]:
    def value(written: Any) -> Any:
        if isinstance(written, str):
            return getattr(torch, written.removeprefix("torch."))
        return torch.Size(written) if isinstance(written, list) else written

    return [value(written) for written in context]
