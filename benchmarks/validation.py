"""What a validation costs beside the drawing itself, on the bundled nano model.

    python -m benchmarks.validation [--prompts 4] [--steps 10] [--repeats 5] [--json]

Compares a whole validation (weights put in place, pictures drawn, decoded, compared with the training pictures and
written) with the bare drawing and decoding of the same pictures, in turns, and tells the best of each. ``overhead`` is
their ratio less 1; the bar is 0.05. With ``--json`` the last line of stdout is ``{sampling_s, validation_s, overhead,
pictures}``, all else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from nano.trial import mixed, picture_of, scale_latents, transformer  # noqa: E402

from training.adapter.adapter import add_adapter  # noqa: E402
from training.config.adapter import LoRASettings  # noqa: E402
from training.config.settings import TrainSettings  # noqa: E402
from training.config.validation import ValidationSettings  # noqa: E402
from training.run.loop import new_state  # noqa: E402
from training.run.validation import Moment  # noqa: E402
from training.sample.draw import draw_latents, picture_noise  # noqa: E402
from training.sample.validator import SampleValidator  # noqa: E402

SHIFT, BAR = 2.0, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of sampling")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        found = measure(options.prompts, options.steps, options.repeats)
        print(
            f"{found['pictures']} pictures of 64 px in {options.steps} steps: drawing {found['sampling_s']:.3f} s, "
            f"validation {found['validation_s']:.3f} s, overhead {found['overhead']:+.1%} (bar {BAR:.0%})"
        )
    if options.json:
        print(json.dumps(found))


def measure(prompts: int, steps: int, repeats: int) -> dict[str, Any]:
    settings = TrainSettings(adapter=LoRASettings(16, targets="attention+ff"))
    chosen = ValidationSettings(
        validation_resolution="64x64",
        validation_num_inference_steps=steps,
        validation_step_interval=1,
        disable_benchmark=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        latents, texts = mixed({"style": {}}, Path(folder))
        assert texts.validation
        variants = [texts.rows().variants(row)[0] for row in range(prompts)]
        first = texts.validation.prompts[0]
        embedded = tuple(
            first._replace(prompt=first.prompt._replace(name=f"prompt-{number}"), key=key)
            for number, key in enumerate(variants)
        )
        texts = replace(texts, validation=replace(texts.validation, prompts=embedded, settings=chosen))
        model = transformer()
        adapter = add_adapter(model, settings.adapter, settings.seed)
        state = new_state(adapter, settings)
        model.train()
        validator = SampleValidator(texts, latents, scale_latents, decode, shift=SHIFT)
        entries = texts.store.open()
        captions, negative = [entries.read(key) for key in variants], entries.read(texts.empty)

        @torch.no_grad()
        def sampling(_: int) -> None:
            for caption in captions:
                noise = picture_noise(chosen.validation_seed, model.config.channels, chosen.sizes[0])
                decode(draw_latents(model, caption, negative, noise, chosen, SHIFT))

        def validation(repeat: int) -> None:
            moment = Moment(model, state, Path(folder) / "run", repeat + 1, lambda: None)
            assert len(list(validator.run(moment))) == 1

        times: dict[str, list[float]] = {"sampling": [], "validation": []}
        for repeat in range(repeats + 1):
            for name, work in (("sampling", sampling), ("validation", validation)):
                begun = time.perf_counter()
                work(repeat)
                if repeat:  # the first time warms both up
                    times[name].append(time.perf_counter() - begun)
    bare, whole = min(times["sampling"]), min(times["validation"])
    return {"sampling_s": bare, "validation_s": whole, "overhead": whole / bare - 1, "pictures": prompts}


def decode(latents: Tensor) -> Tensor:
    """Pictures (1, height, width, 3) in [0, 1]."""
    return torch.from_numpy(picture_of(latents))[None]


if __name__ == "__main__":
    main()
