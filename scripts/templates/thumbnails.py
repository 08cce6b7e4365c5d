"""Draw the templates' thumbnails: what each one is about, from the bundled pictures and the quick start's real result.

    python -m scripts.templates.thumbnails

The quick start's own thumbnail is what its run drew (``make.py --run``); it is cut up here and not drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "example_workflows"
NANO = ROOT / "assets" / "nano"
SIZE = (512, 288)
GROUND, CARD, LINE, TEXT = "#1f2329", "#2c323b", "#8b98a9", "#e6ebf2"
BLUE, ORANGE, GREEN, VIOLET = "#3b82f6", "#f59e0b", "#22c55e", "#a855f7"
RESULT_CELLS = 4  # a side, of the pictures without and of those with the LoRA


def main() -> None:
    for name, draw in DRAWN.items():
        sheet = Image.new("RGB", SIZE, GROUND)
        draw(sheet, ImageDraw.Draw(sheet))
        sheet.save(OUT / f"{name}.jpg", quality=88)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def photos(folder: str, count: int) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((NANO / folder).glob("*.png"))[:count]]


def result(trained: bool, row: int, column: int) -> Image.Image:
    """A picture that the quick start really drew, without the LoRA or with it."""
    with Image.open(OUT / "01_quickstart_nano.jpg") as opened:
        height = opened.height
        left, top = column * height // RESULT_CELLS, row * height // RESULT_CELLS
        start = (opened.width - height if trained else 0) + left
        return opened.convert("RGB").crop((start, top, start + height // RESULT_CELLS, top + height // RESULT_CELLS))


def put(sheet: Image.Image, picture: Image.Image, x: int, y: int, side: int, turn: float = 0) -> None:
    """A picture with rounded corners and a pale edge, its centre at (x, y)."""
    scaled = picture.resize((side, side), Image.Resampling.LANCZOS)
    mask = Image.new("L", (side, side), 0)
    box = (0, 0, side - 1, side - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, side // 10, fill=255)
    ImageDraw.Draw(scaled).rounded_rectangle(box, side // 10, outline=LINE, width=2)
    scaled, mask = (each.rotate(turn, Image.Resampling.BICUBIC, expand=True) for each in (scaled, mask))
    sheet.paste(scaled, (x - scaled.width // 2, y - scaled.height // 2), mask)


def arrow(on: ImageDraw.ImageDraw, x: int, y: int, length: int = 44) -> None:
    on.line((x, y, x + length, y), fill=LINE, width=5)
    on.polygon([(x + length + 12, y), (x + length - 6, y - 11), (x + length - 6, y + 11)], fill=LINE)


def label(on: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int = 17, colour: str = TEXT) -> None:
    on.text((x, y), text, font=font(size), fill=colour, anchor="mm")


def card(on: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str = LINE) -> None:
    on.rounded_rectangle(box, 12, fill=CARD, outline=colour, width=2)


def from_a_folder(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    for number, photo in enumerate(photos("concept", 5)):
        put(sheet, photo, 80 + 36 * number, 120 + 34 * (number % 2), 96, 16 - 9 * number)
    label(on, 152, 248, "input / my-pictures")
    arrow(on, 302, 144)
    card(on, (380, 92, 484, 196), BLUE)
    label(on, 432, 144, "LoRA", 28)


def from_a_configuration(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    card(on, (24, 40, 292, 248))
    lines = ['"lora_rank": 16,', '"learning_rate": 1e-4,', '"optimizer": "adamw_bf16",', '"max_train_steps": 500', "}"]
    on.text((46, 54), "{", font=font(18), fill=ORANGE)
    for number, text in enumerate(lines):
        place = (46 if text == "}" else 64, 82 + 28 * number)
        on.text(place, text, font=font(17), fill=ORANGE if text == "}" else TEXT)
    arrow(on, 304, 144, 34)
    for row in range(2):
        put(sheet, result(True, 1 + 2 * row, 2 - 2 * row), 430, 84 + 120 * row, 106)


def lycoris(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    small, large = [[3, 1], [1, 2]], [[2, 0, 1], [1, 3, 0], [0, 1, 2]]
    product = [[a * b for a in outer for b in inner] for outer in small for inner in large]
    for matrix, x, cell, colour, most in (
        (small, 36, 34, BLUE, 3),
        (large, 152, 34, ORANGE, 3),
        (product, 318, 27, GREEN, 9),
    ):
        top = 144 - len(matrix) * cell // 2
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                box = (x + column * cell, top + row * cell, x + (column + 1) * cell - 3, top + (row + 1) * cell - 3)
                on.rectangle(box, fill=Image.blend(patch(CARD), patch(colour), value / most).getpixel((0, 0)))
    on.ellipse((112, 130, 140, 158), outline=TEXT, width=3)
    on.line((117, 135, 135, 153), fill=TEXT, width=3)
    on.line((135, 135, 117, 153), fill=TEXT, width=3)
    label(on, 288, 144, "=", 34)


def patch(colour: str) -> Image.Image:
    return Image.new("RGB", (1, 1), colour)


def full(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    for layer in range(13):
        for part in range(6):
            box = (30 + 19 * layer, 66 + 27 * part, 45 + 19 * layer, 88 + 27 * part)
            on.rounded_rectangle(box, 3, fill=(BLUE, BLUE, ORANGE, VIOLET, VIOLET, GREEN)[part])
    label(on, 150, 252, "every weight")
    arrow(on, 298, 144, 34)
    for number in range(4):
        put(sheet, result(True, number, 2 if number % 2 else 1), 398 + 72 * (number % 2), 108 + 72 * (number // 2), 66)


def regularisation(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    for number, photo in enumerate(photos("style", 4)):
        put(sheet, photo, 88 + 72 * (number % 2), 92 + 72 * (number // 2), 66)
    for number in range(4):
        put(sheet, result(False, number, 2), 352 + 72 * (number % 2), 92 + 72 * (number // 2), 66)
    label(on, 124, 226, "changes", 19, ORANGE)
    label(on, 388, 226, "stays", 19, GREEN)
    label(on, 256, 128, "+", 46)


def compare(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    for row, cell in enumerate(((0, 1), (3, 3))):
        put(sheet, result(False, *cell), 150, 98 + 112 * row, 104)
        put(sheet, result(True, *cell), 362, 98 + 112 * row, 104)
    label(on, 150, 24, "base")
    label(on, 362, 24, "step 500", colour=GREEN)
    on.line((256, 40, 256, 264), fill=LINE, width=3)
    on.ellipse((242, 140, 270, 168), fill=TEXT)


def convert(sheet: Image.Image, on: ImageDraw.ImageDraw) -> None:
    card(on, (30, 104, 196, 184), BLUE)
    label(on, 113, 144, "ComfyUI", 27)
    arrow(on, 214, 144, 52)
    for number, (text, colour) in enumerate((("diffusers", ORANGE), ("kohya", GREEN), ("LyCORIS", VIOLET))):
        top = 36 + 76 * number
        card(on, (298, top, 482, top + 62), colour)
        label(on, 390, top + 31, text, 23)


DRAWN: dict[str, Callable[[Image.Image, ImageDraw.ImageDraw], None]] = {
    "02_lora_from_a_folder": from_a_folder,
    "03_lora_from_a_simpletuner_config": from_a_configuration,
    "04_lycoris": lycoris,
    "05_full_fine_tune": full,
    "06_regularisation": regularisation,
    "07_compare_checkpoints": compare,
    "08_convert_a_lora": convert,
}


if __name__ == "__main__":
    main()
