"""A strength for each block, written as text: ``0-9: 0.5, 10-25: 1, noise_refiner: 0, other: 1``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...config.adapter import parse_blocks
from ...errors import SettingError
from ...model.config import TransformerConfig

OTHER = "other"  # what is in no block: embedders and the final layer
_IN_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.(\d+)\.")


def block_strengths(text: str, modules: Iterable[str], config: TransformerConfig) -> dict[str, float]:
    """The factor of each module: that of its block, else 1.

    Blocks are written as in the LoRA settings, several before one number share it.

    Raises:
        SettingError: a part is not understood, names a block that the model does not have, or one twice.
    """
    there = {
        "layers": config.layers,
        "noise_refiner": config.refiner_layers,
        "context_refiner": config.refiner_layers,
    }
    factors: dict[tuple[str, int] | str, float] = {}
    for names, number in _groups(text):
        for name in names:
            if name == OTHER:
                places: list[tuple[str, int] | str] = [OTHER]
            else:
                [(stack, numbers)] = parse_blocks(name).values()
                found = range(there[stack]) if numbers is None else numbers
                if found.stop > there[stack]:
                    raise SettingError(f"block_strengths has {name!r}, and the model has {stack} 0-{there[stack] - 1}.")
                places = [(stack, n) for n in found]
            for place in places:
                if place in factors:
                    raise SettingError(f"block_strengths is {text!r}; it names {name!r} twice. Name each block once.")
                factors[place] = number
    strengths = {}
    for module in modules:
        match = _IN_BLOCK.match(module)
        strengths[module] = factors.get((match[1], int(match[2])) if match else OTHER, 1.0)
    return strengths


def _groups(text: str) -> list[tuple[list[str], float]]:
    """Names of blocks and the number that follows them."""
    groups, names = [], list[str]()
    for part in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        name, colon, number = part.partition(":")
        names.append(name.strip())
        if colon:
            try:
                groups.append((names, float(number)))
            except ValueError:
                raise SettingError(_misread(text, part)) from None
            names = []
    if names:
        raise SettingError(_misread(text, names[0]))
    return groups


def _misread(text: str, part: str) -> str:
    return f'block_strengths is {text!r}; {part!r} has no number. Write for example "0-9: 0.5, 10-25: 1, other: 0".'
