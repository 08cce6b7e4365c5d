"""A page of a run in one file, ``report.html``: its loss, samples and settings. It asks nothing of any server."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from ..run.curves import curves
from ..run.events import CheckpointSaved, Ended, Event, Validated
from ..run.history import changed_settings
from .story import About, Story

SHARE = 0.01  # of the training's time that may go into writing the page
COLUMNS, ROWS, THUMBNAIL = 12, 24, 224  # validations and prompts shown, pixels
WIDTH, HEIGHT, MARGIN = 900, 300, 56


class PageListener:
    """Listens, and writes the page anew now and then, and when the run is over."""

    def __init__(self, story: Story, about: About) -> None:
        self.story, self.about = story, about
        self._thumbnails: dict[Path, str] = {}
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        due = isinstance(event, (CheckpointSaved, Validated)) and time.monotonic() >= self._next
        if due or isinstance(event, Ended):
            began = time.monotonic()
            write_text(self.story.folder / "report.html", page(self.story, self.about, self._thumbnails))
            ended = time.monotonic()
            self._next = ended + (ended - began) / SHARE


def page(story: Story, about: About, thumbnails: dict[Path, str] | None = None) -> str:
    """The page as HTML, with everything that it shows inside.

    Args:
        thumbnails: pictures that were made small before, by their path; new ones are added.
    """
    run, thumbnails = story.run, {} if thumbnails is None else thumbnails
    status = f"{story.status} · {story.step} of {run.target} steps"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.folder)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(run.folder)}</h1><p>{escape(status)}{_sentence(story.message)}</p>
<h2>Loss</h2>{loss_chart(curves(story.folder / "events.jsonl"))}
<h2>Samples</h2>{_samples(story, thumbnails)}
<h2>Settings</h2>{_settings(story)}
{_datasets(about)}
</body></html>
"""


def loss_chart(found: Mapping[str, Any]) -> str:
    """An SVG of a run's curves: the spread of the loss, its mean, and the held-out loss as dots.

    Args:
        found: as ``training.run.curves.curves`` gives it.
    """
    steps, loss, held = found["step"], found["loss"], found["eval"]
    spreads = zip(steps, loss["min"], loss["mean"], loss["max"], strict=True)
    known = [(x, low, mid, high) for x, low, mid, high in spreads if mid is not None]
    dots = [(x, y) for x, y in zip(held["step"], held["loss"], strict=True) if y is not None]
    if not known:
        return "<p>No step was logged yet.</p>"
    smooth = _smoothed([mid for _, _, mid, _ in known])
    left, right = min(known[0][0], *(x for x, _ in dots), known[0][0]), max(known[-1][0], *(x for x, _ in dots), 1)
    values = [value for _, low, _, high in known for value in (low, high)] + [y for _, y in dots]
    bottom, top = _within_outliers(values)

    def at(x: float, y: float) -> str:
        across = (x - left) / max(right - left, 1)
        up = min(max((y - bottom) / (top - bottom), 0.0), 1.0)
        return f"{MARGIN + across * (WIDTH - MARGIN - 8):.1f},{HEIGHT - 24 - up * (HEIGHT - 36):.1f}"

    spread = " ".join([at(x, low) for x, low, _, _ in known] + [at(x, high) for x, _, _, high in reversed(known)])
    line = " ".join(at(x, y) for (x, _, _, _), y in zip(known, smooth, strict=True))
    marks = "".join(
        f'<circle r="3.5" cx="{place[0]}" cy="{place[1]}"><title>step {x}: held-out loss {y:.4g}</title></circle>'
        for x, y in dots
        for place in [at(x, y).split(",")]
    )
    labels = "".join(
        f'<text x="{MARGIN - 6}" y="{at(left, y).split(",")[1]}" text-anchor="end" dy="4">{y:.3g}</text>'
        for y in (bottom, (bottom + top) / 2, top)
    )
    labels += f'<text x="{MARGIN}" y="{HEIGHT - 6}">{left}</text>'
    labels += f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {right}</text>'
    held_out = " Dots: held-out loss." if dots else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss by step">{labels}'
        f'<polygon points="{spread}"/><polyline points="{line}"/>{marks}</svg>'
        f"<p>Line: smoothed loss, {smooth[-1]:.4g} at the end. Band: lowest and highest.{held_out}</p>"
    )


def _smoothed(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Running means that start without a bias."""
    found, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        found.append(mean / weight)
    return found


def _within_outliers(values: Sequence[float]) -> tuple[float, float]:
    """What the axis shows: all values, but for a few that lie far above the others, which are drawn at its end."""
    ordered = sorted(values)
    bottom, usual = ordered[0], ordered[max(int(len(ordered) * 0.98) - 1, 0)]
    top = min(ordered[-1], usual + (usual - bottom) / 2)
    return (bottom, top) if top > bottom else (bottom - 0.5, bottom + 0.5)


def _samples(story: Story, thumbnails: dict[Path, str]) -> str:
    """A table of prompts by steps: the first validation, the last, and others spread between them."""
    shown = [each for each in story.validations if each.get("samples")]
    if not shown:
        return "<p>No sample was drawn.</p>"
    count = min(len(shown), COLUMNS)
    columns = [shown[round(n * (len(shown) - 1) / max(count - 1, 1))] for n in range(count)]
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for number, validation in enumerate(columns):
        for sample in validation["samples"]:
            key = (sample["prompt"], sample.get("seed", ""), bool(sample.get("ema")))
            rows.setdefault(key, {})[number] = _thumbnail(story.folder, sample, thumbnails)
    head = "".join(f"<th>step {each['step']}</th>" for each in columns)
    body = "".join(
        f"<tr><th>{escape(prompt)}<small>seed {seed}{', EMA' if ema else ''}</small></th>"
        + "".join(f"<td>{cells.get(number, '')}</td>" for number in range(len(columns)))
        + "</tr>"
        for (prompt, seed, ema), cells in list(rows.items())[:ROWS]
    )
    return f'<div class="wide"><table class="samples"><tr><th></th>{head}</tr>{body}</table></div>'


def _thumbnail(folder: Path, sample: Mapping[str, Any], thumbnails: dict[Path, str]) -> str:
    path = folder / sample["path"]
    if path not in thumbnails:
        from PIL import Image

        try:
            with Image.open(path) as picture:
                small = picture.convert("RGB")
        except OSError:
            return ""  # deleted since
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        content = io.BytesIO()
        small.save(content, "JPEG", quality=85)
        thumbnails[path] = base64.b64encode(content.getvalue()).decode()
    score = sample.get("score")
    title = "" if score is None else f' title="CLIP {score:.1f}"'
    picture_of = f'<img src="data:image/jpeg;base64,{thumbnails[path]}" alt=""{title}>'
    return f'<a href="{escape(sample["path"], quote=True)}">{picture_of}</a>'


def _settings(story: Story) -> str:
    changed = changed_settings(story.run)
    rows = sorted(story.run.settings.items(), key=lambda item: (item[0] not in changed, item[0]))
    lines = "".join(
        f"<tr{' class=changed' if name in changed else ''}><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{lines}</table><p>Bold: other than the default.</p>" if lines else "<p>None were recorded.</p>"


def _datasets(about: About) -> str:
    lines = "".join(
        f"<tr><th>{escape(each.id)}</th><td>{each.pictures} pictures, {escape(', '.join(each.sizes))}"
        f"{', regularisation' if each.regularisation else ''}</td></tr>"
        for each in about.datasets
    )
    return f"<h2>Data</h2><table>{lines}</table>" if lines else ""


def _sentence(text: str) -> str:
    return f" · {escape(text)}" if text else ""


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
    "body{color:#222;background:#fff}h1,h2{font-weight:600}"
    "svg{width:100%;height:auto}svg text{font-size:12px;fill:#666}"
    "polygon{fill:#3b82f6;opacity:.18}polyline{fill:none;stroke:#2563eb;stroke-width:2}circle{fill:#d97706}"
    "table{border-collapse:collapse}th,td{padding:.2rem .6rem;text-align:left;vertical-align:top;font-weight:400}"
    ".changed th,.changed td{font-weight:600}.samples th{min-width:8rem;max-width:14rem}small{display:block;color:#777}"
    ".wide{overflow-x:auto}img{display:block;border-radius:4px}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}svg text,small{fill:#999;color:#999}}"
)
