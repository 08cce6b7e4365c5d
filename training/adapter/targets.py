"""Which linear layers are adapted."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config.adapter import REGEX, STACKS, LyCORISSettings, parse_blocks
from ..errors import SettingError
from ..model.keys import diffusers_modules
from ..model.linear import Linear

_ATTENTION, _FEED_FORWARD, _MODULATION = r"attention\.(qkv|out)", r"feed_forward\.w[123]", r"adaLN_modulation\.1"
_INSIDE = {
    "attention": _ATTENTION,
    "attention+ff": f"{_ATTENTION}|{_FEED_FORWARD}",
    "blocks": f"{_ATTENTION}|{_FEED_FORWARD}|{_MODULATION}",
}
_STANDARD = "layers,noise_refiner"  # the context refiner sees no picture
_IN_BLOCK = re.compile(rf"({'|'.join(STACKS)})\.(\d+)\.(.+)")


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every linear layer by its name, in the network's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def target_modules(transformer: nn.Module, targets: str, blocks: str = "") -> list[str]:
    """Names of the linear layers of a target set, in the network's order.

    Args:
        targets: a name of ``TARGETS``, or ``regex:`` and an expression that the whole name has to match.
        blocks: as of ``parse_blocks``; empty: the main layers and the noise refiner for the named sets, and
            everything for ``all`` and expressions.

    Raises:
        SettingError: nothing is chosen, or a part of ``blocks`` names no block of this model.
    """
    return select(list(linear_layers(transformer)), targets, blocks)


def select(names: list[str], targets: str, blocks: str) -> list[str]:
    """Those of ``names`` that ``targets`` and ``blocks`` choose; see ``target_modules``."""
    inside = _INSIDE.get(targets)
    if inside:
        chosen = [name for name in names if (match := _IN_BLOCK.fullmatch(name)) and re.fullmatch(inside, match[3])]
        chosen = _within(chosen, names, blocks or _STANDARD)
    else:
        pattern = targets.removeprefix(REGEX) if targets.startswith(REGEX) else ".+"
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        chosen = _within(chosen, names, blocks) if blocks else chosen
    if not chosen:
        raise SettingError(
            f"targets {targets!r}{f' in blocks {blocks!r}' if blocks else ''} chooses none of this Lumina2's layers; "
            f"they are named {', '.join(_one_of_each(names))}."
        )
    return chosen


def _within(chosen: list[str], names: list[str], blocks: str) -> list[str]:
    """Those of ``chosen`` within ``blocks``."""
    there: dict[str, set[int]] = {}
    for match in filter(None, map(_IN_BLOCK.fullmatch, names)):
        there.setdefault(match[1], set()).add(int(match[2]))
    wanted: dict[str, set[int]] = {}
    for part, (stack, numbers) in parse_blocks(blocks).items():
        found = there.get(stack, set()) if numbers is None else {*numbers}
        if not found or not found <= there.get(stack, set()):
            valid = ", ".join(f"{name} 0-{max(numbers)}" for name, numbers in there.items())
            raise SettingError(f"blocks has {part!r}, but this Lumina2 has {valid}.")
        wanted.setdefault(stack, set()).update(found)
    return [n for n in chosen if (place := _IN_BLOCK.fullmatch(n)) and int(place[2]) in wanted.get(place[1], set())]


def _one_of_each(names: list[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names))


def lycoris_targets(transformer: nn.Module, settings: LyCORISSettings) -> dict[str, LyCORISSettings]:
    """The layers that ``apply_preset`` chooses, in the network's order, each with its options.

    A layer takes the options of the innermost module around it whose class has some; options by name win.

    Raises:
        SettingError: a class or a pattern matches nothing.
    """
    classes, names = settings.classes, settings.names
    layers = linear_layers(transformer)
    around = {name: _classes_around(transformer, name) for name in layers}
    _check_matched(classes, {c for each in around.values() for c in each}, "target_module", "classes")
    unmatched = [p for p in names if not any(_matches(p, name, settings) for name in layers)]
    if unmatched:
        raise SettingError(
            f"apply_preset's target_name {unmatched[0]!r} matches none of this Lumina2's layers; they are named "
            f"{', '.join(_one_of_each(list(layers)))}."
        )
    chosen = {}
    for name, inside in around.items():
        if any(_matches(pattern, name, settings) for pattern in settings.apply_preset.get("exclude_name", ())):
            continue
        by_name = [options for pattern, options in names.items() if _matches(pattern, name, settings)]
        by_class = [classes[c] for c in inside if c in classes]
        if by_name or by_class:
            options: Mapping[str, Any] = next((o for o in [*by_name, *reversed(by_class)] if o), {})
            chosen[name] = settings.with_options(options)
    if not chosen:
        raise SettingError("apply_preset chooses no layer; name classes in target_module, as in Attention.")
    return chosen


def _classes_around(model: nn.Module, name: str) -> list[str]:
    """Class names of the modules from the model down to a layer, itself included."""
    path = name.split(".")
    return [type(model.get_submodule(".".join(path[:depth]))).__name__ for depth in range(len(path) + 1)]


def _matches(pattern: str, name: str, settings: LyCORISSettings) -> bool:
    """Whether a pattern means a layer, by its name here or in diffusers; q, k and v are one layer."""
    match = fnmatch.fnmatch if settings.apply_preset.get("use_fnmatch") else lambda n, p: bool(re.match(p, n))
    return any(match(known, pattern) for known in (name, *diffusers_modules(name)))


def _check_matched(wanted: Mapping[str, Any], there: set[str], key: str, kind: str) -> None:
    unmatched = [name for name in wanted if name not in there]
    if unmatched:
        valid = sorted(there - {"ModuleList", "Sequential"})
        raise SettingError(
            f"apply_preset's {key} {unmatched[0]!r} matches nothing in Lumina2; its {kind} are {', '.join(valid)}."
        )
