"""Captions to text embeddings, once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..data.prompts import with_system_prompt
from .latents import Progress
from .store import Store, key_of

Embed = Callable[[str], tuple[Tensor, bool]]  # a text -> its embedding (tokens, width), and whether it was cut


@dataclass(frozen=True)
class TextEntry:
    sample: str  # the sample's id
    keys: tuple[str, ...]  # one a variant


@dataclass(frozen=True)
class TextCache:
    """What the embeds socket carries: keys into a store, and the empty text's for caption dropout."""

    store: Store
    entries: tuple[TextEntry, ...]
    empty: str
    cut: tuple[str, ...] = ()  # captions that were longer than allowed


def cache_texts(
    dataset: Dataset, embed: Embed, encoder: str, system_prompt: str, max_tokens: int, store: Store, on_text: Progress
) -> TextCache:
    """Embed every caption behind the system prompt, and the raw empty text, in bf16 and without padding.

    Args:
        encoder: the text encoder's fingerprint.
    """
    texts = {caption: with_system_prompt(caption, system_prompt) for s in dataset.samples for caption in s.captions}
    keys = {text: key_of(text=text, tokens=max_tokens, encoder=encoder, layer=-2) for text in {*texts.values(), ""}}
    headers = {text: store.header(key) for text, key in sorted(keys.items())}
    waiting = [text for text, header in headers.items() if header is None]
    cut = [text for text, header in headers.items() if header and header[1].get("cut")]
    for number, text in enumerate(waiting):
        on_text(number, len(waiting))
        embedding, was_cut = embed(text)
        store.write(keys[text], embedding.to(torch.bfloat16), **({"cut": "true"} if was_cut else {}))
        cut += [text] * was_cut
    on_text(len(waiting), len(waiting))
    entries = tuple(TextEntry(s.id, tuple(keys[texts[caption]] for caption in s.captions)) for s in dataset.samples)
    return TextCache(store, entries, keys[""], tuple(cut))
