#!/usr/bin/env python3
"""Draw a sheet of 64 prompts with the nano model, to see at one glance what it can do. About a minute on two cores.

.venv/bin/python scripts/nano/sheet.py [--model assets/nano] [--out docs/nano-sheet.jpg] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from nano.dit import pad, read_transformer  # noqa: E402
from nano.text import embed  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import Tensor  # noqa: E402

from training.data.prompts import SYSTEM_PROMPTS, with_system_prompt  # noqa: E402
from training.files import read_json  # noqa: E402
from training.objective.sigmas import sampling_sigmas  # noqa: E402
from training.sample.euler import sample_euler  # noqa: E402

PROMPTS = """
grinning face, winking face, crying face, angry face, smiling face with sunglasses, clown face, ghost, robot face
cat face, dog face, panda face, frog face, lion face, rabbit face, monkey face, unicorn face
penguin, butterfly, fish, octopus, turtle, owl, snail, lady beetle
red apple, lemon, strawberry, watermelon, pineapple, grapes, tomato, carrot
slice of pizza, doughnut, ice cream, birthday cake, bread, egg, hot beverage, cookie
tulip, sunflower, rose, cactus, evergreen tree, mushroom, maple leaf, cherry blossom
blue heart, purple heart, yellow heart, white medium star, fire, snowflake, sun with face, crescent moon
rocket, automobile, house building, guitar, soccer ball, balloon, key, electric light bulb
"""
COLUMNS, PICTURE_PX, LABEL_PX, GAP_PX = 8, 128, 18, 4
STEPS, GUIDANCE, BATCH, SIDE_PX = 20, 4.0, 8, 64


@torch.inference_mode()
def draw(prompts: list[str], folder: Path, seed: int) -> Tensor:
    """One picture for each prompt, (N, 3, height, width) in [-1, 1]; the noise belongs to the prompt's place."""
    transformer = read_transformer(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    shift = read_json(folder / "scheduler" / "scheduler_config.json")["shift"]
    sigmas = sampling_sigmas(STEPS, shift)
    *captions, negative = embed([*(with_system_prompt(p, SYSTEM_PROMPTS["superior"]) for p in prompts), ""], folder)
    side = SIDE_PX // 8
    noise = torch.randn(len(prompts), 16, side, side, generator=torch.Generator().manual_seed(seed))

    pictures = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        text, lengths = pad(captions[part])
        nothing, no_lengths = pad([negative] * len(lengths))

        def velocity(
            latents: Tensor,
            t: Tensor,
            wanted: tuple[Tensor, tuple[int, ...]] = (text, lengths),
            unwanted: tuple[Tensor, tuple[int, ...]] = (nothing, no_lengths),
        ) -> Tensor:
            with_text, without = transformer(latents, t, *wanted), transformer(latents, t, *unwanted)
            return without + GUIDANCE * (with_text - without)

        latents = sample_euler(velocity, noise[part], sigmas)
        pictures.append(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)
        print(f"{first + len(lengths)} of {len(prompts)}", file=sys.stderr, flush=True)
    return torch.cat(pictures).clamp(-1, 1)


def lay_out(pictures: Tensor, prompts: list[str]) -> Image.Image:
    """The pictures in rows of eight, each over its prompt."""
    rows = -(-len(prompts) // COLUMNS)
    wide, high = PICTURE_PX + GAP_PX, PICTURE_PX + LABEL_PX + GAP_PX
    sheet = Image.new("RGB", (COLUMNS * wide + GAP_PX, rows * high + GAP_PX), "#f2f2f2")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    planes = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for place, (plane, prompt) in enumerate(zip(planes, prompts, strict=True)):
        x, y = GAP_PX + place % COLUMNS * wide, GAP_PX + place // COLUMNS * high
        sheet.paste(Image.fromarray(plane).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC), (x, y))
        label = prompt
        while pen.textlength(label, font) > PICTURE_PX:
            label = label.removesuffix("…")[:-1] + "…"
        pen.text((x + PICTURE_PX // 2, y + PICTURE_PX + LABEL_PX // 2), label, "#333333", font, "mm")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "nano")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "nano-sheet.jpg")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    prompts = [prompt.strip() for prompt in PROMPTS.replace("\n", ",").split(",") if prompt.strip()]
    sheet = lay_out(draw(prompts, options.model, options.seed), prompts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, quality=85, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
