"""Values of SimpleTuner's files as they are meant: numbers and truth values may be written as texts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

from ..errors import SettingError


def typed(name: str, kind: str, value: Any, place: str) -> Any:
    """A value as ``kind``, a name of ``KINDS``.

    Raises:
        SettingError: it is something else.
    """
    wanted, convert = KINDS[kind]
    try:
        return convert(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise SettingError(f"{place}: {name} is {value!r}; {wanted} is wanted.") from None


def filled(value: Any, place: str) -> Any:
    """The value with the environment's for each ``{env:NAME}`` inside it.

    Raises:
        SettingError: a variable is not set.
    """
    if isinstance(value, dict):
        return {key: filled(each, place) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, place) for each in value]

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SettingError(
                f"{place}: the environment variable {match[1]} is not set; set it, or write the value itself instead "
                f"of {match[0]}."
            )
        return os.environ[match[1]]

    return re.sub(r"\{env:([^}]*)\}", variable, value) if isinstance(value, str) else value


def is_absent(value: Any) -> bool:
    """SimpleTuner takes its default for these."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "None", "null"))


def boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    return words[str(value).strip().lower()]


def number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    found = float(value)
    if not math.isfinite(found):
        raise ValueError
    return found


def whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)  # beyond what a float can hold
    found = number(value)
    if not found.is_integer():
        raise ValueError
    return int(found)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return str(value)


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        value = json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return [each for each in value if each != ""]


def _block(value: Any) -> Any:
    """A block, a list of blocks, or the path of a file."""
    if isinstance(value, str):
        return json.loads(value) if value.strip()[:1] in ("{", "[") else value
    if not isinstance(value, (dict, list)):
        raise TypeError
    return value


KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("true or false", boolean),
    "int": ("a whole number", whole),
    "float": ("a number", number),
    "text": ("a text", _text),
    "names": ("a list of names", lambda value: tuple(map(_text, _list(value)))),
    "commas": ("a text, or a list of texts", lambda value: ",".join(map(_text, _list(value)))),
    "numbers": ("a list of numbers", lambda value: tuple(map(number, _list(value)))),
    "block": ("a block {…}, or the path of a JSON file", _block),
    "any": ("a value", lambda value: tuple(value) if isinstance(value, list) else value),
}
