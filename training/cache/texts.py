"""Captions to text embeddings, once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.validation import Prompt, ValidationSettings, unique_names
from ..data.captions import CaptionEditor
from ..data.dataset import NAMED, Dataset, open_rows
from ..data.index import Progress
from ..data.prompts import with_system_prompt
from ..errors import DataError
from .manifest import read_manifest, write_manifest
from .store import Store, Writer, key_of

Embed = Callable[[str], tuple[Tensor, bool]]  # a text -> its embedding (tokens, width), and whether it was cut
SEGMENT_ROWS = 20_000
FIRST_CAPTIONS = 2  # drawn where no prompts were chosen


class EmbeddedPrompt(NamedTuple):
    prompt: Prompt
    key: str


@dataclass(frozen=True)
class Validation:
    """What is drawn while training, with the keys of its embeddings."""

    prompts: tuple[EmbeddedPrompt, ...]
    negative: str  # its key
    system_prompt: str  # before each prompt
    max_tokens: int
    settings: ValidationSettings | None = None  # None: nothing was chosen, and the prompts are the first captions


@dataclass(frozen=True)
class TextCache:
    """What the embeds socket carries: a list of keys on disk, and the empty text's key for caption dropout."""

    store: Store
    manifest: str
    count: int  # pictures
    empty: str
    cut: tuple[str, ...] = field(default=(), compare=False)  # the first captions that were longer than allowed
    skipped: tuple[str, ...] = field(default=(), compare=False)
    validation: Validation | None = field(default=None, compare=False)  # None: another node's embeddings
    others: Mapping[str, str] = field(default_factory=dict, compare=False)  # keys of further prompts
    triggers: tuple[str, ...] = field(default=(), compare=False)  # what calls up the pictures in a prompt

    def rows(self) -> TextRows:
        table = read_manifest(Path(self.manifest))
        return TextRows(
            part=table["part"].to_numpy(),
            id=table["id"].to_numpy(zero_copy_only=False),
            keys=_flat(table["keys"]),
            ends=np.asarray(table["keys"].combine_chunks().value_lengths()).cumsum(),
            taught=_flat(table["taught"]) if "taught" in table.column_names else None,
        )


class TextRows(NamedTuple):
    """One row a picture, in columns."""

    part: np.ndarray
    id: np.ndarray
    keys: np.ndarray  # S40, of all rows one after the other
    ends: np.ndarray  # (N,) where the keys of a row end
    taught: np.ndarray | None = None  # as ``keys``: what regularisation's teacher reads; None: always the same

    def variants(self, row: int) -> list[str]:
        return self._of(self.keys, row)

    def taught_variants(self, row: int) -> list[str]:
        """What the teacher reads for each of ``variants``."""
        return self._of(self.keys if self.taught is None else self.taught, row)

    def _of(self, keys: np.ndarray, row: int) -> list[str]:
        return [key.decode() for key in keys[self.ends[row - 1] if row else 0 : self.ends[row]]]


def _flat(column: Any) -> np.ndarray:
    return np.array(column.combine_chunks().flatten().to_pylist(), dtype="S40")


def cache_texts(
    dataset: Dataset,
    embed: Embed,
    encoder: str,
    system_prompt: str,
    max_tokens: int,
    store: Store,
    on_text: Progress = lambda done, total: None,
    write_batch_size: int = 128,
    validation: ValidationSettings | None = None,
    others: Sequence[str] = (),
) -> TextCache:
    """Embed every caption behind the system prompt, and the raw empty text, in bf16 and without padding.

    So are the prompts of a validation, and its negative prompt as it is. Where none is chosen, the first captions
    are the prompts.

    Args:
        encoder: the text encoder's fingerprint.
        others: further prompts, as those of a slider.

    Raises:
        DataError: no picture has a caption left after editing.
        SettingError: a prompt library cannot be read.
    """
    chosen = validation.prompts() if validation else ()
    catalog = store.open()

    def key(text: str) -> str:
        return key_of(text=text, tokens=max_tokens, encoder=encoder, layer=-2)

    parts: list[np.ndarray] = []
    ids: list[str] = []
    keys: list[list[str]] = []
    taught: list[list[str]] = []
    waiting: dict[str, str] = {}  # key -> text
    cut: list[str] = []
    first: list[tuple[str, str]] = []
    skipped = list(catalog.damaged)
    unsaid = 0
    for number, part in enumerate(dataset.parts):
        if part.settings.mix.dataset_type == "conditioning":
            continue
        rows = open_rows(part)
        edit = CaptionEditor(part.settings.captions)
        kept = 0
        for start in range(0, len(rows), SEGMENT_ROWS):
            texts: dict[str, str] = {}
            for id, raw in zip(
                rows.ids[start : start + SEGMENT_ROWS].to_pylist(),
                rows.captions[start : start + SEGMENT_ROWS].to_pylist(),
                strict=True,
            ):
                captions = edit(tuple(raw), id)
                variants = [with_system_prompt(caption, system_prompt) for caption in captions]
                if not variants:
                    unsaid += 1
                    if unsaid <= NAMED:
                        skipped.append(f"Nothing is left of the caption of {id} after editing. Check the filters.")
                    continue
                if len(first) < FIRST_CAPTIONS and part.settings.mix.dataset_type == "image":
                    first.append((Path(id).stem, captions[0]))
                named = [key(text) for text in variants]
                texts |= zip(named, variants, strict=True)
                ids.append(id)
                keys.append(named)
                taught.append(named)
                if part.settings.captions.trigger_class:
                    read = [with_system_prompt(edit.for_teacher(caption), system_prompt) for caption in captions]
                    taught[-1] = [key(text) for text in read]
                    texts |= zip(taught[-1], read, strict=True)
                kept += 1
            found = catalog.find(list(texts))
            for (name, text), place in zip(texts.items(), found, strict=True):
                if place < 0:
                    waiting[name] = text
            noted = found[found >= 0]
            if len(noted) and catalog.noted(noted).any() and len(cut) < NAMED:
                cut += [text for name, text in texts.items() if catalog.notes(name).get("cut")]
        parts.append(np.full(kept, number, np.int16))
    if not ids:
        raise DataError(f"No picture has a caption. {skipped[0] if skipped else ''}")
    prompts = chosen or tuple(unique_names(first))
    said = {prompt: with_system_prompt(prompt.text, system_prompt) if prompt.text else "" for prompt in prompts}
    negative = validation.validation_negative_prompt if validation else ""
    further = {text: with_system_prompt(text, system_prompt) if text else "" for text in others}
    also = list(dict.fromkeys(["", negative, *(said.values() if chosen else ()), *further.values()]))
    waiting |= {key(text): text for text in also if key(text) not in catalog}
    with Writer(catalog, write_batch_size) as writer:
        for done, (name, text) in enumerate(waiting.items()):
            on_text(done, len(waiting))
            embedding, was_cut = embed(text)
            writer.add(name, embedding.to(torch.bfloat16), **({"cut": "true"} if was_cut else {}))
            if was_cut and len(cut) < NAMED:
                cut.append(text)
    on_text(len(waiting), len(waiting))
    subject = {
        "texts": [[p.index, asdict(p.settings.captions), p.settings.id] for p in dataset.parts],
        "encoder": [encoder, system_prompt, max_tokens],
        "also": [key(text) for text in also],
    }
    columns = {"part": np.concatenate(parts), "id": ids, "keys": keys}
    if taught != keys:
        columns["taught"] = taught
    manifest = write_manifest(Path(store.folder), subject, columns)
    shown = [part for part in dataset.parts if part.settings.mix.dataset_type == "image"]
    embedded = tuple(EmbeddedPrompt(prompt, key(text)) for prompt, text in said.items())
    return TextCache(
        store,
        str(manifest),
        len(ids),
        key(""),
        tuple(cut[:NAMED]),
        (*dataset.skipped, *skipped),
        Validation(embedded, key(negative), system_prompt, max_tokens, validation),
        {text: key(read) for text, read in further.items()},
        tuple(dict.fromkeys(trigger for part in shown for trigger in part.settings.captions.triggers)),
    )
