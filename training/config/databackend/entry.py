"""One entry of a ``multidatabackend.json``, its keys taken one by one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ...errors import SettingError
from ..values import boolean, filled, number, whole
from .keys import GLOBAL, NO_EFFECT, SECRETS

Group = TypeVar("Group")


class Entry:
    """The keys of one entry, or of a block inside it; each is taken once and what is left at the end is unknown."""

    def __init__(
        self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any], unused: dict[str, None]
    ) -> None:
        self.where = where
        self._values = {key: value for key, value in values.items() if value is not None}
        self._defaults = defaults
        self._unused = unused
        self._known: set[str] = set()

    def fill_in(self, notes: list[str]) -> None:
        """Forgets secrets and replaces ``{env:NAME}`` in every text."""
        for name in SECRETS:
            value = self._values.pop(name, "")
            if value and value != f"{{env:{name.upper()}}}":
                notes.append(f"{self.where}: {name} is taken from the environment only: set {name.upper()}.")
        self._values = filled(self._values, self.where)

    def peek(self, name: str) -> Any:
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def is_bare(self) -> bool:
        """It names nothing to read pictures from."""
        return not {"instance_data_dir", "dataset_name", "csv_file", "aws_bucket_name"}.intersection(self._values)

    def holds(self, name: str) -> bool:
        return name in self._values

    def ignore(self, name: str) -> None:
        self._known.add(name)
        self._values.pop(name, None)

    def take(self, name: str) -> Any:
        """The value as it stands in the file or in the defaults; None where it is in neither."""
        self._known.add(name)
        value = self._values.pop(name, None)
        return self._defaults.get(name) if value is None and name in GLOBAL else value

    def typed(self, name: str, kind: str, default: Any) -> Any:
        """The value as ``kind``, which is the annotation of a field; ``default`` where there is none."""
        value = self.take(name)
        if value is None:
            return default
        wanted, convert = KINDS[kind]
        try:
            return convert(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            raise SettingError(f"{self.where}: {name} is {value!r}; {wanted} is wanted.") from None

    def training_seed(self) -> int:
        return int(Entry(self._defaults, "config.json", {}, {}).typed("seed", "int", 0))

    def block(self, name: str) -> Entry:
        values = self.take(name) or {}
        if not isinstance(values, dict):
            raise SettingError(f"{self.where}: {name} is {values!r}; a block {{…}} of settings is wanted.")
        return Entry(values, f"{self.where}, {name}", {}, self._unused)

    def group(self, cls: type[Group], others: Mapping[str, Any], **values: Any) -> Group:
        """A group of settings: ``values`` as they are, its other fields from the keys of their names."""
        for f in fields(cls):  # type: ignore[arg-type]
            if f.name not in values:
                default = None if f.default is MISSING else f.default
                values[f.name] = self.typed(f.name, str(f.type), others.get(f.name, default))
        return self.make(cls, values)

    def make(self, cls: type[Group], values: Mapping[str, Any]) -> Group:
        try:
            return cls(**values)
        except SettingError as error:
            raise SettingError(f"{self.where}: {error}") from None

    def finish(self) -> None:
        """Notes what has no effect.

        Raises:
            SettingError: a key is left that nobody knows.
        """
        for name in self._values:
            if name not in NO_EFFECT:
                near = difflib.get_close_matches(name, sorted(self._known | NO_EFFECT), 1)
                remedy = f'did you mean "{near[0]}"?' if near else "take it out."
                raise SettingError(f'{self.where}: there is no setting "{name}"; {remedy}')
            self._unused[name] = None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise TypeError
    return tuple(text for text in map(_text, texts) if text)


def _aspects(value: Any) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list):
        raise TypeError
    weighted = [each if isinstance(each, dict) else {"aspect": each} for each in value]
    if any(set(each) - {"aspect", "aspect_ratio", "weight"} for each in weighted):
        raise ValueError
    # SimpleTuner names the aspect one way in one place and another way in another.
    return tuple(
        (number(each.get("aspect", each.get("aspect_ratio"))), number(each.get("weight", 1))) for each in weighted
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


TEXTS = "tuple[str, ...]"
# By the annotations of the fields.
KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("true or false", boolean),
    "int": ("a whole number", whole),
    "float": ("a number", number),
    "float | None": ("a number", number),
    "str": ("a text", _text),
    TEXTS: ("a text or a list of texts", _texts),
    "tuple[tuple[float, float], ...]": ('a list of aspects such as 0.75 or {"aspect": 0.75, "weight": 0.5}', _aspects),
    "Mapping[str, object]": ("a block {…} of conditions", _mapping),
}
