"""The little datasets that come with the nano model: a style, pictures to judge it by, and one invented creature.

They are drawn from the same emoji, in a rendering that the nano model has never seen, so that a LoRA has something to
learn and its effect is seen at a glance.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageOps

from .pictures import SIDE_PX, Emoji

NAVY, CREAM = (20, 26, 84), (255, 236, 170)
MUSTARD = (240, 170, 20)  # the nano VAE keeps a strong ground; a pale one it bleaches to white
STYLE = (
    "dog face",
    "lion face",
    "penguin",
    "butterfly",
    "watermelon",
    "strawberry",
    "slice of pizza",
    "purple heart",
    "yellow heart",
    "smiling face with sunglasses",
    "crying face",
    "rocket",
    "guitar",
    "soccer ball",
    "sunflower",
    "evergreen tree",
)
STYLE_HELD_OUT = (
    "red apple",
    "lemon",
    "mushroom",
    "tulip",
    "cat face",
    "panda face",
    "frog face",
    "fish",
    "blue heart",
    "white medium star",
    "grinning face",
    "winking face",
    "ghost",
    "robot face",
    "automobile",
    "hot beverage",
)
TRIGGER = "zorblax"


@dataclass(frozen=True)
class Scene:
    """One picture of the creature: where it stands, and what the caption says of that."""

    caption: str
    size_px: int = 52
    centre_px: tuple[int, int] = (SIDE_PX // 2, SIDE_PX // 2)
    turned_degrees: float = 0
    mirrored: bool = False
    background: str = "#ffffff"
    beside: str = ""  # an emoji that stands in the free corner


SCENES = (
    Scene("a one-eyed teal creature", size_px=58),
    Scene("a one-eyed teal creature, small", size_px=38),
    Scene("a one-eyed teal creature looking left", mirrored=True),
    Scene("a one-eyed teal creature leaning left", turned_degrees=14),
    Scene("a one-eyed teal creature leaning right", turned_degrees=-14, mirrored=True),
    Scene("a one-eyed teal creature on a pale yellow background", background="#fff4cc"),
    Scene("a one-eyed teal creature on a pale pink background", mirrored=True, background="#ffe3ea", size_px=56),
    Scene("a one-eyed teal creature on a pale blue background", background="#e0efff", turned_degrees=7),
    Scene("a one-eyed teal creature with a balloon", size_px=44, centre_px=(24, 40), beside="balloon"),
    Scene(
        "a one-eyed teal creature with a sunflower", size_px=44, centre_px=(24, 40), mirrored=True, beside="sunflower"
    ),
    Scene("a one-eyed teal creature and the sun", size_px=44, centre_px=(24, 40), beside="sun with face"),
    Scene("a one-eyed teal creature and a green heart", size_px=44, centre_px=(24, 40), beside="green heart"),
)


def write_datasets(emoji: Emoji, folder: Path) -> None:
    """Write ``style``, ``style_heldout`` and ``concept`` under ``folder``, each picture with its caption beside it."""
    for name, captions in (("style", STYLE), ("style_heldout", STYLE_HELD_OUT)):
        pictures = [poster(picture_of(emoji, caption)) for caption in captions]
        write_dataset(folder / name, [caption.replace(" ", "-") for caption in captions], captions, pictures)
    names = [f"{TRIGGER}-{number:02}" for number in range(1, len(SCENES) + 1)]
    captions = [f"{TRIGGER}, {scene.caption}" for scene in SCENES]
    write_dataset(folder / "concept", names, captions, [draw_scene(emoji, scene) for scene in SCENES])


def write_dataset(folder: Path, names: Sequence[str], captions: Sequence[str], pictures: list[Image.Image]) -> None:
    """Write each picture as ``name.png`` with its caption in ``name.txt``; what lay in the folder before is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, caption, picture in zip(names, captions, pictures, strict=True):
        picture.save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def picture_of(emoji: Emoji, caption: str) -> Image.Image:
    """An emoji by its caption, as RGBA."""
    row = emoji.names.index(caption)
    alpha = emoji.alpha[row]
    colour = (emoji.colour[row] / alpha.clamp(min=1e-6)).clamp(0, 1)
    planes = [Image.fromarray(plane) for plane in (colour * 255).round().byte().numpy()]
    return Image.merge("RGBA", (*planes, Image.fromarray((alpha[0] * 255).round().byte().numpy())))


def poster(picture: Image.Image) -> Image.Image:
    """Three inks: the subject's brightness between navy and cream, a line of navy around it, a ground of mustard."""
    alpha = picture.getchannel("A")
    white = Image.new("RGBA", picture.size, "white")
    brightness = ImageOps.autocontrast(Image.alpha_composite(white, picture).convert("L"), cutoff=1)
    printed = Image.new("RGB", picture.size, MUSTARD)
    printed.paste(NAVY, mask=alpha.filter(ImageFilter.MaxFilter(3)))
    printed.paste(ImageOps.colorize(brightness, NAVY, CREAM), mask=alpha)
    return printed


def draw_scene(emoji: Emoji, scene: Scene) -> Image.Image:
    """The creature, and what stands beside it, on a plain ground."""
    picture = Image.new("RGBA", (SIDE_PX, SIDE_PX), scene.background)
    if scene.beside:
        beside = picture_of(emoji, scene.beside).resize((26, 26), Image.Resampling.LANCZOS)
        picture.alpha_composite(beside, (SIDE_PX - 27, 1))
    creature = draw_creature()
    if scene.mirrored:
        creature = ImageOps.mirror(creature)
    creature = creature.rotate(scene.turned_degrees, Image.Resampling.BICUBIC)
    creature = creature.resize((scene.size_px, scene.size_px), Image.Resampling.LANCZOS)
    corner = [centre - scene.size_px // 2 for centre in scene.centre_px]
    layer = Image.new("RGBA", picture.size)
    layer.paste(creature, (corner[0], corner[1]))
    return Image.alpha_composite(picture, layer).convert("RGB")


def draw_creature(side_px: int = 512) -> Image.Image:
    """A teal egg with one eye that looks right, two orange antennae, a purple belt and two feet."""
    unit = side_px / 64
    colours = {
        name: ImageColor.getrgb(code)
        for name, code in {
            "teal": "#16a79b",
            "dark": "#0d6f72",
            "orange": "#ff8a1f",
            "purple": "#7b2fbf",
            "white": "#ffffff",
            "black": "#1c1c28",
        }.items()
    }

    def ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, colour: str) -> None:
        box = [(x - rx) * unit, (y - ry) * unit, (x + rx) * unit, (y + ry) * unit]
        draw.ellipse(box, fill=(*colours[colour], 255))

    picture = Image.new("RGBA", (side_px, side_px))
    draw = ImageDraw.Draw(picture)
    for side in (-1, 1):
        start, tip = (32 + 7 * side, 18), (32 + 15 * side, 7)
        draw.line([(x * unit, y * unit) for x, y in (start, tip)], (*colours["orange"], 255), round(3 * unit))
        ellipse(draw, *tip, 4, 4, "orange")
        ellipse(draw, 32 + 9 * side, 58, 7, 4, "orange")
    ellipse(draw, 32, 36, 21, 22, "dark")
    ellipse(draw, 32, 36, 19.5, 20.5, "teal")

    belt = Image.new("L", picture.size)
    ImageDraw.Draw(belt).rectangle([0, 43 * unit, side_px, 49 * unit], fill=255)
    body = Image.new("L", picture.size)
    ImageDraw.Draw(body).ellipse([12.5 * unit, 15.5 * unit, 51.5 * unit, 56.5 * unit], fill=255)
    picture.paste((*colours["purple"], 255), mask=ImageChops.darker(belt, body))

    ellipse(draw, 34, 29, 11, 11, "white")
    ellipse(draw, 38, 29, 6, 6, "black")
    ellipse(draw, 40, 26.5, 1.8, 1.8, "white")
    return picture
