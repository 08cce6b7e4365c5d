"""Where the nodes of a template stand: groups side by side, in each a note on top and columns of nodes below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TITLE_PX, GAP_PX, MARGIN_PX, NOTE_PX = 30, 30, 20, 92
WIDTH_PX = 360  # what the widest node needs in the newest frontend
TOP_PX = 80  # of the notes, below a group's own title
COLORS = {"note": ("#432", "#653"), "positive": ("#232", "#353"), "negative": ("#322", "#533")}
GROUP_COLORS = ("#3f789e", "#8A8", "#b58b2a", "#a1309b", "#b06634")


@dataclass(frozen=True)
class Node:
    """A node as it is described. ``wires`` names by input the node and the output it comes from: ``load.MODEL``."""

    key: str
    type: str
    widgets: Mapping[str, Any] = field(default_factory=dict)
    wires: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    color: str = ""
    height_px: int = 0  # at least
    models: tuple[Mapping[str, str], ...] = ()  # that ComfyUI offers for download where they are missing


@dataclass(frozen=True)
class Group:
    title: str
    note: str  # at most three lines
    note_title: str
    columns: tuple[tuple[Node, ...], ...]
    width_px: int = WIDTH_PX  # of each column


@dataclass(frozen=True)
class Placed:
    node: Node
    x: int
    y: int
    width: int
    height: int


def notes(groups: tuple[Group, ...]) -> list[Node]:
    return [
        Node(f"note {number}", "MarkdownNote", {"": group.note}, title=group.note_title, color="note")
        for number, group in enumerate(groups)
    ]


def place(groups: tuple[Group, ...], heights: Mapping[str, int]) -> tuple[list[Placed], list[dict[str, Any]]]:
    """Where everything stands, and the groups as a workflow has them.

    Args:
        heights: px that a node needs, by key.
    """
    placed: list[Placed] = []
    x, frames = 0, []
    bottom = 0
    for number, (group, note) in enumerate(zip(groups, notes(groups), strict=True)):
        inner = len(group.columns) * group.width_px + (len(group.columns) - 1) * GAP_PX
        placed.append(Placed(note, x + MARGIN_PX, TOP_PX, inner, NOTE_PX))
        for column, nodes in enumerate(group.columns):
            y = TOP_PX + NOTE_PX + GAP_PX + TITLE_PX
            for node in nodes:
                height = max(node.height_px, heights[node.key])
                left = x + MARGIN_PX + column * (group.width_px + GAP_PX)
                placed.append(Placed(node, left, y, group.width_px, height))
                y += height + GAP_PX + TITLE_PX
            bottom = max(bottom, y - TITLE_PX)
        frames.append({"title": group.title, "x": x, "width": inner + 2 * MARGIN_PX, "color": GROUP_COLORS[number]})
        x += inner + 2 * MARGIN_PX + MARGIN_PX
    return placed, [
        {
            "id": number,
            "title": frame["title"],
            "bounding": [frame["x"], 0, frame["width"], bottom],
            "color": frame["color"],
            "font_size": 24,
            "flags": {},
        }
        for number, frame in enumerate(frames, start=1)
    ]
