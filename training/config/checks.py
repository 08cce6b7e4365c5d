"""Settings are checked once, when they are made; each check says what is wrong and what to choose."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SettingError


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raises SettingError("<name> is <value>; <remedy>.") unless ``holds``."""
    if not holds:
        raise SettingError(f"{name} is {value!r}; {remedy}.")


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    require(value in choices, name, value, f"choose one of {', '.join(map(str, choices))}")
