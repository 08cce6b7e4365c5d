"""JSON as people write it: with comments and trailing commas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import SettingError

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*[\]}}])", re.DOTALL)


def plain_json(text: str) -> str:
    """JSON without the comments (``//``, ``#``, ``/* */``) and trailing commas; its lines keep their numbers."""
    text = _COMMENT.sub(lambda match: match[1] or " " + "\n" * match[0].count("\n"), text)
    return _TRAILING_COMMA.sub(lambda match: match[1] or "", text)


def read_json_text(path: Path, missing: str) -> Any:
    """What a file holds.

    Args:
        missing: what is said of a file that does not exist, behind its path.

    Raises:
        SettingError: it does not exist, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SettingError(f"{path} {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read ({error}); it has to be a JSON file in UTF-8.") from None
    try:
        return json.loads(plain_json(text))
    except json.JSONDecodeError as error:
        raise SettingError(f"{path}, line {error.lineno}, is not JSON ({error.msg}); correct it there.") from None
