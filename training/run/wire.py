"""Our dataclasses as lines of JSON and back: events, commands and settings, between processes of one program.

A value that JSON does not know is an object with the key ``of``: the name of its class, and where that is, seen from
this package. Only dataclasses, named tuples and paths are ever made, and only those of this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import RunError

_PROJECT = __name__.rsplit(".", 2)[0]  # "training", or what it is called inside of ComfyUI


def to_line(value: Any) -> str:
    """One line of JSON, without its newline.

    Raises:
        TypeError: a part of it is of another kind.
    """
    return json.dumps(_plain(value), ensure_ascii=False)


def from_line(line: str) -> Any:
    """What ``to_line`` was given.

    Raises:
        RunError: the line is not one of those.
    """
    try:
        return _made(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise RunError(f"{line[:80]!r} was not written by this version ({error}). Use one on both ends.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {"of": "path", "path": str(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {"of": _name(value), **{f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"of": _name(value), **{name: _plain(each) for name, each in value._asdict().items()}}
    if isinstance(value, tuple):
        return {"of": "tuple", "items": [_plain(each) for each in value]}
    if isinstance(value, Mapping):
        return {"of": "mapping", "items": [[_plain(key), _plain(each)] for key, each in value.items()]}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return [_made(each) for each in value]
    if not isinstance(value, dict):
        return value
    match value.pop("of"):
        case "path":
            return Path(value["path"])
        case "tuple":
            return tuple(_made(each) for each in value["items"])
        case "mapping":
            return {_made(key): _made(each) for key, each in value["items"]}
        case str(name):
            return _class(name)(**{key: _made(each) for key, each in value.items()})
    raise KeyError("of")


def _name(value: Any) -> str:
    cls = type(value)
    if not cls.__module__.startswith(f"{_PROJECT}."):
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} is not of this project")
    return f"{cls.__module__.removeprefix(_PROJECT)}:{cls.__qualname__}"


def _class(name: str) -> Any:
    module, _, qualified = name.partition(":")
    found = getattr(import_module(module, _PROJECT), qualified) if module.startswith(".") else None
    if not is_dataclass(found) and not hasattr(found, "_fields"):
        raise KeyError(name)
    return found
