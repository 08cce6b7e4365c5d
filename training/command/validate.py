"""``validate``: draw a configuration's prompts with the base model and with a LoRA, without training."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapter.formats.layers import Adapters, add_to
from ..adapter.formats.read import read_adapters
from ..config.paths import find_path
from ..config.validation import Prompt, ValidationSettings
from ..data.prompts import SYSTEM_PROMPTS, with_system_prompt
from ..errors import SettingError
from ..files import write_json
from ..model.precision import choose_computing
from ..sample.clip import CLIP, summary
from ..sample.draw import draw_latents, picture_noise, picture_seed
from ..sample.pictures import save_picture, to_bytes
from .answer import Answer
from .pipeline import VAE, TextEncoder, choose_device, find_model, open_transformer
from .plan import Plan, open_plan
from .plan import add_arguments as add_plan_arguments
from .terminal import Terminal

REPORT = "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--lora", default="", help="a LoRA file of any format, or a run's or checkpoint's folder")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="where the pictures go")
    parser.add_argument("--without-base", action="store_true", help="the base model's pictures are not drawn")


@dataclass(frozen=True)
class Picture:
    """One that was drawn."""

    file: str
    weights: str  # base, or the LoRA's name
    prompt: str
    seed: int
    score: float | None = None  # CLIP's cosine × 100


def run(options: argparse.Namespace) -> Answer:
    """Draw, and write the pictures and ``report.json``.

    Raises:
        Lumina2Error: there is no prompt, or the model or the LoRA cannot be read.
    """
    plan, terminal = open_plan(options), Terminal()
    settings = plan.config.config.validation
    prompts = settings.prompts()
    if not prompts:
        raise SettingError("There is no prompt: give --validation_prompt, or set it in the configuration.")
    device = choose_device(options.device)
    model = find_model(plan.config.places, plan.config.folders, download=True)
    lora = _lora_file(options.lora, plan) if options.lora else None
    embeddings, negative = _embed(plan, prompts, settings, TextEncoder(model, device))
    vae = VAE(model, device)
    transformer = open_transformer(model, device)
    transformer.compute_dtype = choose_computing(plan.config.settings().precision, device).dtype
    transformer.eval()
    kinds: list[tuple[str, Adapters | None]] = [] if lora and options.without_base else [("base", None)]
    if lora:
        kinds.append((lora.stem, read_adapters(lora, transformer.config)))

    def drawn() -> Iterator[tuple[Picture, np.ndarray]]:
        for label, adapters in kinds:
            if adapters:
                add_to(transformer, adapters)
            with torch.no_grad():
                for prompt in prompts:
                    for number in range(settings.num_validation_images):
                        for size in settings.sizes:
                            seed = picture_seed(settings.validation_seed, number)
                            terminal.say(f"drawing {prompt.name} {size}, seed {seed}, {label}")
                            noise = picture_noise(seed, transformer.config.channels, size)
                            latents = draw_latents(
                                transformer, embeddings[prompt.name], negative, noise, settings, model.shift
                            )
                            pixels = to_bytes(vae.decode(latents)[0])
                            file = f"{prompt.name}-{size}-{number}-{label}.png"
                            recipe = {
                                "prompt": prompt.text,
                                "negative_prompt": settings.validation_negative_prompt,
                                "seed": seed,
                                "width": size.width_px,
                                "height": size.height_px,
                                "steps": settings.validation_num_inference_steps,
                                "guidance": settings.validation_guidance,
                                "shift": settings.validation_shift or model.shift,
                                "weights": label,
                            }
                            save_picture(options.out / file, pixels, recipe)
                            yield Picture(file, label, prompt.text, seed), pixels

    pictures, scores = _scored(list(drawn()), settings, device)
    found = {
        "folder": str(options.out.absolute()),
        "pictures": [asdict(picture) for picture in pictures],
        "scores": scores,
    }
    write_json(options.out / REPORT, found)
    told = "".join(f"\n{label}: {', '.join(f'{n} {v:.2f}' for n, v in of.items())}" for label, of in scores.items())
    return Answer(found, f"{len(pictures)} pictures in {options.out}{told}")


def _embed(
    plan: Plan, prompts: tuple[Prompt, ...], settings: ValidationSettings, encoder: TextEncoder
) -> tuple[dict[str, Tensor], Tensor]:
    """Each prompt's embedding by its name, and the negative prompt's; in bf16, as the cache keeps them."""
    places = plan.config.places
    system = SYSTEM_PROMPTS[places.system_prompt]

    def embed(text: str) -> Tensor:
        return encoder.embed(text, places.tokenizer_max_length)[0].to(torch.bfloat16)

    said = {each.name: embed(with_system_prompt(each.text, system) if each.text else "") for each in prompts}
    return said, embed(settings.validation_negative_prompt)


def _lora_file(named: str, plan: Plan) -> Path:
    """A LoRA file, or that of a run's or checkpoint's folder."""
    path = Path(find_path(named, (*plan.config.folders, plan.output)))
    if not path.is_dir():
        return path
    if (path / "lora.safetensors").is_file():
        return path / "lora.safetensors"
    checkpoints = sorted(path.glob("checkpoint-*/lora.safetensors"), key=lambda file: int(file.parent.name[11:]))
    if not checkpoints:
        raise SettingError(f"lora is {named!r}, and {path} holds no checkpoint of a LoRA; name a file.")
    return checkpoints[-1]


def _scored(
    drawn: list[tuple[Picture, np.ndarray]], settings: ValidationSettings, device: torch.device
) -> tuple[list[Picture], dict[str, dict[str, float]]]:
    """With what CLIP says of each, where it is asked."""
    pictures = [picture for picture, _ in drawn]
    if settings.evaluation_type != "clip":
        return pictures, {}
    clip = CLIP(settings.pretrained_evaluation_model_name_or_path, device)
    cosines = clip.cosines([pixels for _, pixels in drawn], [picture.prompt for picture in pictures])
    scored = [Picture(**{**asdict(p), "score": 100 * each}) for p, each in zip(pictures, cosines, strict=True)]
    labels = dict.fromkeys(picture.weights for picture in pictures)
    of = {label: [c for p, c in zip(pictures, cosines, strict=True) if p.weights == label] for label in labels}
    return scored, {label: summary(each) for label, each in of.items()}
