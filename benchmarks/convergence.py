"""How fast optimisers and adapters learn the nano style: loss and distance to the style against wall time.

    python -m benchmarks.convergence [--steps 200] [--every 50] [--optimizers torch-adamw,prodigy] [--json]

Each optimiser with a LoRA of rank 8, and each adapter with torch-adamw, trains on the bundled style. At every
``--every`` steps it tells the seconds of training so far, the loss at fixed noise levels over all pictures of the
style, and the distance of eight drawn pictures (prompts that it never saw, always the same noise) to the style, in the
statistic of ``scripts/demo``. With ``--json`` the last line of stdout is a list of ``{optimizer, adapter, points:
[{step, seconds, loss, style_distance}]}``, all else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from nano.matrix import ADAPTERS, RATES, USUAL_RATES  # noqa: E402
from nano.score import read, style_distance  # noqa: E402
from nano.trial import ASSETS, embed, examples, mixed, picture_of, scale_latents, transformer  # noqa: E402

from training.adapter.adapter import add_adapter  # noqa: E402
from training.config.objective import ObjectiveSettings  # noqa: E402
from training.config.optim import OPTIMIZERS, OptimizerSettings  # noqa: E402
from training.config.settings import TrainSettings  # noqa: E402
from training.objective.loss import add_noise, sample_losses  # noqa: E402
from training.objective.sigmas import sampling_sigmas  # noqa: E402
from training.optim.averages import averaged  # noqa: E402
from training.optim.schedule import learning_rate_factor, set_learning_rate  # noqa: E402
from training.run.batches import Batches  # noqa: E402
from training.run.loop import loss_of, new_state, take_step  # noqa: E402
from training.sample.euler import guided_velocity, sample_euler  # noqa: E402

PROMPTS, GUIDANCE, SAMPLE_STEPS, LEVELS = 8, 4.0, 12, (0.3, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--optimizers", default=",".join(n for n in OPTIMIZERS if not n.startswith(("bnb-", "ao-"))))
    parser.add_argument("--adapters", default=",".join(ADAPTERS))
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    options = parser.parse_args()
    pairs = [(name, "lora fused") for name in options.optimizers.split(",")]
    pairs += [("torch-adamw", name) for name in options.adapters.split(",")]
    found: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        for optimizer, adapter in dict.fromkeys(pairs):
            points = converge(optimizer, adapter, options.steps, options.every)
            found.append({"optimizer": optimizer, "adapter": adapter, "points": points})
            for point in points:
                print(
                    f"{optimizer:20} {adapter:11}",
                    *(f"{key} {value:<8.4g}" for key, value in point.items()),
                    flush=True,
                )
    if options.json:
        print(json.dumps(found))


def converge(optimizer: str, adapter: str, steps: int, every: int) -> list[dict[str, float]]:
    rate = RATES.get(optimizer, USUAL_RATES)[adapter == "full"]
    slower = 1 if optimizer == "prodigy" else 0.1  # than what learns a single batch by heart
    settings = TrainSettings(
        steps=steps,
        batch_size=4,
        adapter=ADAPTERS[adapter],
        optimizer=OptimizerSettings(optimizer, rate * slower),
        objective=ObjectiveSettings(caption_dropout_probability=0.1),
    )
    model = transformer()
    adapted = add_adapter(model, settings.adapter, settings.seed)
    state = new_state(adapted, settings)
    points, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        latents, texts = mixed({"style": {}}, Path(folder))
        with Batches(latents, texts, settings, scale_latents) as batches:
            for step in range(steps + 1):
                if step % every == 0:
                    with averaged(state.optimizer):
                        points.append({"step": step, "seconds": round(seconds, 2), **measure(model)})
                if step == steps:
                    break
                begun = time.perf_counter()
                set_learning_rate(state.optimizer, learning_rate_factor(step, steps, settings.optimizer))
                torch.manual_seed(step)
                loss_of(model, adapted, batches.take(step), settings).backward()
                take_step(state, settings)
                seconds += time.perf_counter() - begun
    return points


@torch.no_grad()
def measure(model: torch.nn.Module) -> dict[str, float]:
    chosen, losses = examples("style"), []
    for latent, caption in zip(chosen.latents, chosen.embeddings, strict=True):
        clean = scale_latents(latent)[None].repeat(len(LEVELS), 1, 1, 1)
        sigmas = torch.tensor(LEVELS)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        text = caption[None].expand(len(LEVELS), -1, -1)
        prediction = model(add_noise(clean, noise, sigmas), 1 - sigmas, text, (len(caption),) * len(LEVELS))
        losses.append(sample_losses(prediction, clean - noise, sigmas, ObjectiveSettings()).mean().item())
    held_out = examples("style_heldout")
    drawn = []
    for number, caption in enumerate(held_out.embeddings[:PROMPTS]):
        noise = torch.randn(1, *held_out.latents[0].shape, generator=torch.Generator().manual_seed(number))
        velocity = guided_velocity(model, caption, embed("", "none"), GUIDANCE)  # type: ignore[arg-type]
        drawn.append(picture_of(sample_euler(velocity, noise, sampling_sigmas(SAMPLE_STEPS, 6.0))))
    style = read(sorted((ASSETS / "style").glob("*.png")))
    return {"loss": float(np.mean(losses)), "style_distance": style_distance(np.stack(drawn), style)}


if __name__ == "__main__":
    main()
