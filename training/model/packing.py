"""Samples of unequal length one behind the other, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Neighbouring samples of one length: rows ``start … start + samples · tokens`` of a packed tensor."""

    start: int
    samples: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.samples * self.tokens

    def of(self, rows: Tensor) -> Tensor:
        """Their rows of (N, …) as (samples, tokens, …), a view."""
        return rows[self.start : self.end].view(self.samples, self.tokens, *rows.shape[1:])


class Spans(tuple[Span, ...]):
    """All samples of a batch, in order."""

    __slots__ = ()

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...]) -> Spans:
        """``lengths``: tokens of each sample, known on the host, so that nothing waits for a device."""
        spans, start = [], 0
        for tokens, group in groupby(lengths):
            span = Span(start, len(list(group)), tokens)
            spans.append(span)
            start = span.end
        return cls(spans)

    @property
    def rows(self) -> int:
        return self[-1].end

    def with_samples(self, by_sample: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Each span with its part of (B, …)."""
        first = 0
        for span in self:
            yield span, by_sample[first : first + span.samples]
            first += span.samples


def pack(padded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, tokens, …), padded on the right, to (N, …)."""
    if len(set(lengths)) == 1:
        return padded[:, : lengths[0]].flatten(0, 1)
    return torch.cat([sample[:length] for sample, length in zip(padded, lengths, strict=True)])


def interleave(first: Tensor, second: Tensor, firsts: Spans, seconds: Spans) -> Tensor:
    """Of each sample its rows of ``first`` and then those of ``second``: (N, …) and (M, …) to (N + M, …)."""
    if len(firsts) == len(seconds) == 1:
        return torch.cat((firsts[0].of(first), seconds[0].of(second)), 1).flatten(0, 1)
    parts, at = [], 0
    whole = seconds[0].of(second)
    for span in firsts:
        parts.append(torch.cat((span.of(first), whole[at : at + span.samples]), 1).flatten(0, 1))
        at += span.samples
    return torch.cat(parts)


def last_rows(rows: Tensor, spans: Spans, tokens: int) -> Tensor:
    """The last ``tokens`` rows of each sample: (N, …) to (B, tokens, …)."""
    parts = [span.of(rows)[:, -tokens:] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
