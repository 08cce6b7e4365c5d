"""What is said of a picture: read, edited, measured and written."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from ..config.dataset import CaptionSettings, CaptionShuffle
from ..errors import DataError, SettingError
from ..files import write_text
from .sources import Found, Source

OVERWRITE = ("keep existing", "replace", "add a line")
TOKENS_PER_BAR = 32
_SHOWN = 20


# Reading


def read_caption(source: Source, found: Found, settings: CaptionSettings) -> tuple[str, ...]:
    """The captions of one picture as they were written, at least one; several are variants.

    ``textfile`` reads ``name.txt`` beside ``name.png``, each non-empty line a variant; ``filename`` takes the name
    itself; ``instanceprompt`` gives every picture the same texts; the others take what the source tells.

    Raises:
        DataError: the caption is missing, empty or not UTF-8.
    """
    strategy = settings.caption_strategy
    if strategy == "instanceprompt":
        return _instance_prompts(settings)
    if strategy == "filename":
        return _from_name(source, found)
    if strategy == "textfile":
        return _from_text_file(source, found, settings.disable_multiline_split)
    captions = tuple(text.strip() for text in found.captions or () if not _is_blank(text))
    if captions:
        return captions
    remedy = {
        "csv": "fill its row in the column csv_caption_column",
        "parquet": "fill its row in the column caption_column, or name a fallback_caption_column",
        "huggingface": "fill its row in caption_column, or name a fallback_caption_column",
    }[strategy]
    raise DataError(
        f'{found.id} in {source.name} has no caption: {remedy}, or choose another caption_strategy than "{strategy}".'
    )


def _from_name(source: Source, found: Found) -> tuple[str, ...]:
    stem = os.path.splitext(found.id.rsplit("/", 1)[-1])[0]
    caption = " ".join(stem.replace("_", " ").split())
    if _is_blank(caption):
        raise DataError(
            f"{found.id} in {source.name} has no caption: its name says nothing. Rename it, or choose another "
            'caption_strategy than "filename".'
        )
    return (caption,)


def _from_text_file(source: Source, found: Found, one_caption: bool) -> tuple[str, ...]:
    data = source.text(found.id)
    path = os.path.splitext(found.id)[0] + ".txt"
    remedy = 'or choose caption_strategy "filename" or "instanceprompt"'
    if data is None:
        raise DataError(f"{found.id} in {source.name} has no caption: add {path}, {remedy}.")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if not _is_blank(line)]
    except UnicodeDecodeError:
        raise DataError(_not_utf8(f"{path} in {source.name}")) from None
    if not lines:
        raise DataError(f"{found.id} in {source.name} has an empty caption: write it in {path}, {remedy}.")
    if b"\0" in data:  # UTF-16 without its mark is valid UTF-8 of every second character NUL
        raise DataError(_not_utf8(f"{path} in {source.name}"))
    return (" ".join(lines),) if one_caption else tuple(lines)


def _not_utf8(place: str) -> str:
    return f"The caption {place} is not UTF-8 text. Save it again as UTF-8."


def _is_blank(text: str) -> bool:
    """Nothing in it could be seen: white space, control and format characters only."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)


def _instance_prompts(settings: CaptionSettings) -> tuple[str, ...]:
    return tuple(text.strip() for text in settings.instance_prompt if not _is_blank(text))


# Editing


def edit_captions(raw: tuple[str, ...], settings: CaptionSettings, id: str) -> tuple[str, ...]:
    """The texts that are trained on: ``CaptionEditor(settings)(raw, id)``, its filters compiled once per settings."""
    return _editor(settings)(raw, id)


class CaptionEditor:
    """Makes of the captions of a picture the texts that are trained on; a pure function of settings, id and captions.

    In this order: ``only_instance_prompt`` replaces the caption; ``caption_filter_list`` is applied to it; the
    instance prompts are put before it, each of them a variant; the trigger word before that; the tags of the caption
    proper (not those of trigger word and instance prompt) are shuffled and left out. What was taken out leaves no
    separators behind. A caption of which nothing is left is dropped, so the answer may be empty.

    Raises:
        SettingError: an entry of ``caption_filter_list`` is not a regular expression.
    """

    def __init__(self, settings: CaptionSettings) -> None:
        self._settings = settings
        self._filters = [_Filter(entry) for entry in settings.caption_filter_list if entry.strip()]
        self._prompts = _instance_prompts(settings)
        self._trigger = settings.trigger_word.strip()
        self._holds_trigger = re.compile(rf"(?<!\w){re.escape(self._trigger)}(?!\w)", re.IGNORECASE)
        shuffle = settings.caption_shuffle
        self._varies = shuffle.enable or shuffle.tag_dropout > 0
        replaces = settings.only_instance_prompt
        self._is_prompt = replaces or settings.caption_strategy == "instanceprompt"
        self._idle = not (
            self._filters or self._trigger or self._varies or replaces or settings.prepend_instance_prompt
        )

    def __call__(self, raw: tuple[str, ...], id: str) -> tuple[str, ...]:
        if self._idle:
            return raw if len(raw) == 1 else tuple(dict.fromkeys(raw))
        settings = self._settings
        texts: dict[str, None] = {}
        for caption in self._prompts if settings.only_instance_prompt else raw:
            for each in self._filters:
                caption = each(caption)
            if _is_blank(caption):
                continue
            heads = [prompt + " " for prompt in self._prompts] if self._prepends else [""]
            for head in heads:
                start = self._trigger_for(head + caption) + head
                texts.update(dict.fromkeys(start + body for body in self._bodies(caption, id)))
        return tuple(texts)

    def for_teacher(self, text: str) -> str:
        """What the base model reads where a text is regularisation's: the class in place of the trigger word."""
        kind = self._settings.trigger_class.strip()
        return self._holds_trigger.sub(lambda _: kind, text) if kind else text

    @property
    def _prepends(self) -> bool:
        return self._settings.prepend_instance_prompt and not self._is_prompt

    def _trigger_for(self, text: str) -> str:
        return "" if not self._trigger or self._holds_trigger.search(text) else f"{self._trigger}, "

    def _bodies(self, caption: str, id: str) -> list[str]:
        shuffle = self._settings.caption_shuffle
        if not self._varies or self._is_prompt:
            return [caption]
        bodies = [caption] if shuffle.include_original else []
        tags = _split(caption, shuffle.split_on)
        movable = [
            place
            for place, tag in enumerate(tags)
            if place >= shuffle.position_start and not (self._trigger and self._holds_trigger.search(tag))
        ]
        if not movable:
            return [caption]
        for variant in range(shuffle.count):
            # Only random() is promised to give the same numbers in every version of Python.
            draw = Random(repr((shuffle.seed, id, caption, variant))).random
            bodies.append(_join(_vary(tags, movable, shuffle, draw), caption, shuffle.split_on))
        return bodies


@lru_cache(maxsize=64)
def _editor(settings: CaptionSettings) -> CaptionEditor:
    return CaptionEditor(settings)


def _vary(tags: list[str], movable: list[int], shuffle: CaptionShuffle, draw: Callable[[], float]) -> list[str]:
    """``tags`` with some of the movable ones left out and, if enabled, the rest of them in another order."""
    kept = [place for place in movable if draw() >= shuffle.tag_dropout]
    if not kept and len(movable) == len(tags):
        kept = [movable[int(draw() * len(movable))]]  # something has to be said
    order = sorted(kept, key=lambda place: draw()) if shuffle.enable else kept
    taken = dict(zip(kept, order, strict=True)) | {place: place for place in set(range(len(tags))) - set(movable)}
    return [tags[taken[place]] for place in sorted(taken)]


_SENTENCE_END = re.compile(r"\.(?:\s+|$)")  # not the point of 3.5


def _split(caption: str, split_on: str) -> list[str]:
    if split_on == "space":
        return caption.split()
    parts = caption.split(",") if split_on == "comma" else _SENTENCE_END.split(caption)
    return [part.strip() for part in parts if part.strip()]


def _join(tags: list[str], caption: str, split_on: str) -> str:
    if split_on == "period":
        return ". ".join(tags) + ("." if caption.rstrip().endswith(".") else "")
    return (", " if split_on == "comma" else " ").join(tags)


_SUBSTITUTE = re.compile(r"s/((?:[^/\\]|\\.)+)/((?:[^/\\]|\\.)*)/([gi]*)")
_METACHARACTERS = frozenset(".^$*+?{}[]\\|()")
_GAP = "\ufdd0"  # stands where something was taken out; no text may hold it, says Unicode
_AROUND_GAP = re.compile(rf"[\s,;.]*(?:{_GAP}[\s,;.]*)+")


class _Filter:
    """One entry of ``caption_filter_list``: plain text or a regular expression to take out, or ``s/regex/text/``.

    As in sed, ``s`` replaces the first place, ``s/…/…/g`` every one and ``s/…/…/i`` in either case.
    """

    def __init__(self, entry: str) -> None:
        substitute = _SUBSTITUTE.fullmatch(entry)
        searched, self._text, flags = substitute.groups() if substitute else (entry, "", "g")
        if substitute:
            searched, self._text = searched.replace("\\/", "/"), self._text.replace("\\/", "/")
        elif not _METACHARACTERS.intersection(entry):
            searched = re.escape(entry)
        try:
            self._pattern = re.compile(searched, re.IGNORECASE if "i" in flags else 0)
            re.compile(searched + "|").sub(self._text, "")  # finds a group that the text names and the regex lacks
        except (re.error, IndexError) as error:
            raise SettingError(
                f"caption_filter_list holds {entry!r}, which is not a regular expression ({error}); "
                "correct it, or put a backslash before each character that is meant as it stands."
            ) from None
        self._count = 0 if "g" in flags else 1

    def __call__(self, caption: str) -> str:
        edited = self._pattern.sub(self._replace, caption, count=self._count)
        if edited == caption:
            return caption
        return " ".join(_AROUND_GAP.sub(_close_gap, edited).split())

    def _replace(self, match: re.Match[str]) -> str:
        taken = match[0]
        spaced = taken[:1].isspace() or taken[-1:].isspace()
        return match.expand(self._text) or (_GAP + " " * spaced if taken else "")


def _close_gap(match: re.Match[str]) -> str:
    """What stands between the words left and right of a gap: the strongest separator that stood there."""
    around = match[0].replace(_GAP, "")
    separator = next((mark for mark in ".;," if mark in around), "")
    if match.start() == 0:
        return ""
    if match.end() == len(match.string):
        return separator if separator == "." else ""
    return separator + (" " if any(character.isspace() for character in around) else "")


# Measuring


@dataclass(frozen=True)
class LengthReport:
    """How long texts are in tokens."""

    texts: int
    mean: float
    longest: int
    over: int  # texts longer than allowed
    cut: tuple[tuple[str, int], ...]  # the first of them, with their lengths
    histogram: tuple[int, ...]  # how many have 0–31 tokens, 32–63, …


def length_report(texts: Iterable[str], count_tokens: Callable[[str], int], max_tokens: int) -> LengthReport:
    """Counts the tokens of every text."""
    number = total = longest = over = 0
    cut: list[tuple[str, int]] = []
    histogram: list[int] = []
    for text in texts:
        length = count_tokens(text)
        number, total, longest = number + 1, total + length, max(longest, length)
        histogram += [0] * (length // TOKENS_PER_BAR + 1 - len(histogram))
        histogram[length // TOKENS_PER_BAR] += 1
        if length > max_tokens:
            over += 1
            if len(cut) < _SHOWN:
                cut.append((text, length))
    return LengthReport(number, total / number if number else 0.0, longest, over, tuple(cut), tuple(histogram))


# Writing


@dataclass(frozen=True)
class Written:
    """What became of the captions that were to be written."""

    written: int  # new or replaced files
    added: int  # files that got one more line
    kept: int  # files that stay as they were
    empty: tuple[str, ...]  # pictures whose new caption was empty: nothing was written


def write_captions(pictures: list[Path], captions: list[str], policy: str) -> Written:
    """Writes a ``.txt`` beside each picture; the lines of one caption are joined, since each line would be a variant.

    Raises:
        SettingError: no such policy.
        DataError: the counts differ, two pictures share a text file, or a file cannot be written or added to.
    """
    if policy not in OVERWRITE:
        raise SettingError(f"The overwrite policy is {policy!r}; choose one of {', '.join(OVERWRITE)}.")
    if len(pictures) != len(captions):
        raise DataError(
            f"{len(captions)} captions for {len(pictures)} pictures: give one caption for each picture, in their order."
        )
    lines = [" ".join(caption.split()) for caption in captions]
    if policy == "replace":
        _check_shared(pictures, lines)
    written = added = kept = 0
    empty = []
    for picture, line in zip(pictures, lines, strict=True):
        path = picture.with_suffix(".txt")
        if _is_blank(line):
            empty.append(str(picture))
            continue
        try:
            before = path.read_bytes() if path.exists() else b""
            if not before.strip() or policy == "replace":
                write_text(path, line + "\n")
                written += 1
            elif policy == "keep existing" or not _add_line(path, before, line):
                kept += 1
            else:
                added += 1
        except OSError as error:
            raise DataError(
                f"The caption {path} cannot be written ({error.strerror}); {written + added} of {len(pictures)} were. "
                "Allow writing there, or copy the pictures to a folder of your own."
            ) from None
    return Written(written, added, kept, tuple(empty))


def _check_shared(pictures: list[Path], lines: list[str]) -> None:
    first: dict[Path, tuple[Path, str]] = {}
    for picture, line in zip(pictures, lines, strict=True):
        other, text = first.setdefault(picture.with_suffix(".txt"), (picture, line))
        if text != line:
            raise DataError(
                f"{other} and {picture.name} share one caption file. Rename one of them, or choose "
                f'"{OVERWRITE[2]}" to make both captions variants.'
            )


def _add_line(path: Path, before: bytes, line: str) -> bool:
    """Adds a variant to a text file; False if it holds the line already."""
    try:
        text = before.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(_not_utf8(str(path))) from None
    lines = [each.strip() for each in text.splitlines() if each.strip()]
    if line in lines:
        return False
    write_text(path, "\n".join([*lines, line]) + "\n")
    return True
