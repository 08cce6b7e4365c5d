"""A dataset: which pictures, cut how, said what. A handle of settings and paths, never of pixels or of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config.dataset import CaptionSettings, DatasetSettings, GeometrySettings, TextCacheSettings
from ..errors import DataError
from .geometry import REASONS, Plan, draw_for, needs_draws, plan_crops
from .index import Index, Progress, index_file, read_index, record_content, scan
from .pictures import decode
from .sources import Source
from .sources.opening import open_source

if TYPE_CHECKING:
    import pyarrow

NAMED = 20  # pictures that a report names; the others are counted


@dataclass(frozen=True)
class Part:
    """One dataset, and what its index held when it was read."""

    settings: DatasetSettings
    index: str  # its file
    spool: str  # a folder for pictures that have no file of their own
    digest: str


@dataclass(frozen=True)
class Report:
    """What a dataset gives, and what was left out and why."""

    id: str
    pictures: int
    kept: int
    buckets: tuple[tuple[int, int, int], ...]  # width, height in px, pictures; the most frequent first
    dropped: tuple[tuple[str, int, tuple[str, ...]], ...]  # reason, pictures, the first names
    problems: tuple[str, ...]  # a sentence for each of the first pictures that cannot be used
    enlarged: int  # pictures smaller than what is trained on
    masks: bool = False  # it holds the masks of another dataset

    def lines(self) -> list[str]:
        """The report for people."""
        if self.masks:
            return [f"{self.id}: {self.kept} masks", *(f"skipped: {sentence}" for sentence in self.problems)]
        sizes = ", ".join(f"{w}×{h}: {count}" for w, h, count in self.buckets[:12])
        more = f" and {len(self.buckets) - 12} more" if len(self.buckets) > 12 else ""
        lines = [f"{self.id}: {self.kept} of {self.pictures} pictures, {len(self.buckets)} sizes ({sizes}{more})"]
        lines += [f"left out: {n} {reason} ({', '.join(names)}{' …' if n > len(names) else ''})"
                  for reason, n, names in self.dropped]  # fmt: skip
        lines += [f"skipped: {sentence}" for sentence in self.problems]
        if self.enlarged:
            lines.append(f"{self.enlarged} pictures are smaller than what is trained on and are enlarged")
        return lines


@dataclass(frozen=True)
class Dataset:
    """One or more datasets that are trained on together, and a report on each."""

    parts: tuple[Part, ...]
    reports: tuple[Report, ...] = field(default=(), compare=False)
    texts: TextCacheSettings = field(default_factory=TextCacheSettings)  # how its captions are kept

    @property
    def pictures(self) -> int:
        return sum(report.kept for report in self.reports if not report.masks)

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(sentence for report in self.reports for sentence in report.problems)


@dataclass(frozen=True)
class Rows:
    """The pictures of a part that are trained on, sorted by id; columns of one length."""

    ids: pyarrow.Array
    stamps: np.ndarray
    captions: pyarrow.Array  # raw variants
    contents: pyarrow.Array  # sha256 of the file, null where it is not known yet
    repeats: np.ndarray
    sizes: np.ndarray  # (N, 2) width and height of the pictures in px
    plan: Plan

    def __len__(self) -> int:
        return len(self.ids)


def load_dataset(
    settings: DatasetSettings,
    place: Path,
    on_progress: Progress = lambda done, total: None,
    source: Source | None = None,
) -> Dataset:
    """Bring the index of a dataset up to date and tell what it gives.

    Args:
        place: the folder where indices are kept.
        on_progress: called with (done, total) now and then; what it raises ends the reading.

    Raises:
        DataError: the source cannot be read, or no picture is left.
    """
    if settings.mix.dataset_type == "conditioning":  # masks are cut as their pictures are, and nothing is said of them
        settings = replace(settings, geometry=GeometrySettings(), captions=CaptionSettings("instanceprompt", ("mask",)))
    spool = place / "images"
    source = source or open_source(settings, spool)
    file = index_file(place / "index", source, settings.captions)
    index = scan(source, settings.captions, file, on_progress, settings.cache.on_bad_image == "stop")
    part = Part(settings, str(file), str(spool), index.digest())
    kept, plan = _keep(index, settings, 0)
    report = _describe(index, settings, kept, plan)
    if not report.kept:
        raise DataError(_nothing_left(source.name, report))
    return Dataset((part,), (report,))


def append(first: Dataset, second: Dataset) -> Dataset:
    """Both together; a second dataset of the same id gets a number. Captions are kept as the first tells."""
    parts = list(first.parts)
    reports = list(first.reports)
    for part, report in zip(second.parts, second.reports, strict=True):
        taken = {other.settings.id for other in parts}
        name = part.settings.id
        number = 2
        while name in taken:
            name, number = f"{part.settings.id}-{number}", number + 1
        parts.append(replace(part, settings=replace(part.settings, id=name)))
        reports.append(replace(report, id=name))
    texts = first.texts if first.texts != TextCacheSettings() else second.texts
    return Dataset(tuple(parts), tuple(reports), texts)


def open_rows(part: Part, epoch: int = 0) -> Rows:
    """The rows of a part as its index holds them.

    Args:
        epoch: random crops are drawn anew for each.

    Raises:
        DataError: the index is gone, or the pictures changed since the dataset was read.
    """
    known = read_index(Path(part.index))
    if known is None or known[0].digest() != part.digest:
        raise DataError(
            f"The pictures of dataset {part.settings.id!r} changed while they were used. Run the workflow again."
        )
    index = known[0]
    kept, plan = _keep(index, part.settings, epoch)
    rows = np.flatnonzero(kept)
    import pyarrow

    chosen = index.table.take(pyarrow.array(rows)).combine_chunks()

    def column(name: str) -> pyarrow.Array:
        chunked = chosen[name]
        return chunked.chunk(0) if chunked.num_chunks else pyarrow.array([], chunked.type)

    asked = column("repeats").to_numpy()
    return Rows(
        ids=column("id"),
        stamps=column("stamp").to_numpy(),
        captions=column("captions"),
        contents=column("content"),
        repeats=np.where(asked >= 0, asked, part.settings.mix.repeats),
        sizes=np.stack([column("width_px").to_numpy(), column("height_px").to_numpy()], axis=1),
        plan=plan.take(rows),
    )


def record_contents(part: Part, rows: Rows, contents: Mapping[int, str]) -> None:
    """Write hashes that became known, by row, into the index, so that the next start reads no picture again."""
    chosen = sorted(contents)
    record_content(
        Path(part.index),
        rows.ids.take(np.array(chosen, np.int64)).to_pylist(),
        rows.stamps[chosen].tolist(),
        [contents[row] for row in chosen],
    )


def decode_row(part: Part, rows: Rows, row: int, data: bytes) -> np.ndarray:
    """A picture of a part from its file's bytes, cut as planned: (height, width, 3) uint8.

    Raises:
        DataError: the file is damaged, or is not the picture that was planned for.
    """
    width, height = rows.sizes[row].tolist()
    background = part.settings.geometry.alpha_background
    return decode(data, rows.ids[row].as_py(), rows.plan.geometry(row), background, (width, height))


def _keep(index: Index, settings: DatasetSettings, epoch: int) -> tuple[np.ndarray, Plan]:
    """Which rows are trained on, and how each is cut."""
    geometry = settings.geometry
    ids = index.column("id")
    draws = None
    if needs_draws(geometry):
        draws = draw_for(ids.to_pylist(), 0, epoch)
        draws[:, 0] = draw_for(ids.to_pylist(), 0, 0)[:, 0]  # the aspect stays, so that no picture changes its bucket
    plan = plan_crops(index.numbers("width_px"), index.numbers("height_px"), geometry, draws)
    kept = plan.kept & index.column("problem").is_null().to_numpy()
    limit = settings.mix.max_num_samples
    if limit and kept.sum() > limit:
        rows = np.flatnonzero(kept)
        drawn = draw_for(ids.take(rows).to_pylist(), 1, 0)[:, 0]
        kept = np.zeros_like(kept)
        kept[rows[np.argsort(drawn, kind="stable")[:limit]]] = True
    return kept, plan


def _describe(index: Index, settings: DatasetSettings, kept: np.ndarray, plan: Plan) -> Report:
    usable = index.column("problem").is_null().to_numpy()
    dropped = []
    for number, reason in enumerate(REASONS):
        rows = np.flatnonzero(usable & (plan.dropped == number) & (number > 0))
        if len(rows):
            dropped.append((reason, len(rows), _names(index, rows[:3])))
    beyond = np.flatnonzero(usable & plan.kept & ~kept)
    if len(beyond):
        dropped.append(("beyond max_num_samples", len(beyond), _names(index, beyond[:3])))
    sizes = Counter(zip(plan.width_px[kept].tolist(), plan.height_px[kept].tolist(), strict=True))
    enlarged = kept & (plan.scaled_width_px > index.numbers("width_px"))
    problems = index.column("problem").drop_null()
    return Report(
        id=settings.id,
        pictures=len(index),
        kept=int(kept.sum()),
        buckets=tuple((w, h, count) for (w, h), count in sizes.most_common()),
        dropped=tuple(dropped),
        problems=_sentences(problems[:NAMED].to_pylist(), len(problems)),
        enlarged=int(enlarged.sum()),
        masks=settings.mix.dataset_type == "conditioning",
    )


def _names(index: Index, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(index.column("id").take(rows).to_pylist())


def _sentences(named: list[str], count: int) -> tuple[str, ...]:
    rest = [f"{count - len(named)} more pictures cannot be used"] if count > len(named) else []
    return (*named, *rest)


def _nothing_left(name: str, report: Report) -> str:
    if report.problems and len(report.problems) >= min(report.pictures, NAMED):
        return f"None of the {report.pictures} pictures in {name} can be used. The first: {report.problems[0]}"
    reasons = "; ".join(f"{count} {reason}" for reason, count, _ in report.dropped)
    return f"The settings leave out all {report.pictures} pictures in {name}: {reasons}. Change the filters."
