"""Two short recipes on the nano model whose first losses are kept, so that a change in what is learned is noticed.

python -m scripts.nano.golden        writes tests/recipes/golden.json anew
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "recipes" / "golden.json"
STEPS = 10


def recipes():  # type: ignore[no-untyped-def]
    """By name: settings, and the datasets that are trained on, each with what mixes it."""
    from training.config.adapter import LoRASettings, LyCORISSettings
    from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings
    from training.config.optim import OptimizerSettings
    from training.config.settings import TrainSettings

    plain = TrainSettings(
        steps=STEPS,
        batch_size=4,
        adapter=LoRASettings(8, targets="attention+ff"),
        optimizer=OptimizerSettings(learning_rate=1e-3),
    )
    rich = TrainSettings(
        steps=STEPS,
        batch_size=2,
        seed=7,
        adapter=LyCORISSettings("lokr", linear_dim=10000, factor=4),
        objective=ObjectiveSettings(
            flow_schedule_auto_shift=False,
            flow_schedule_shift=3.0,
            flow_use_beta_schedule=True,
            flow_stratified=True,
            loss_type="huber",
            input_perturbation=0.05,
            scheduled_sampling=ScheduledSamplingSettings(max_step_offset=2, probability=0.5, grid_steps=20),
        ),
        optimizer=OptimizerSettings(
            "adamw_bf16",
            1e-2,
            gradient_accumulation_steps=2,
            lr_scheduler="cosine",
            lr_warmup_steps=3,
            use_ema=True,
        ),
    )
    return {
        "LoRA": (plain, {"style": {}}),
        "LoKr": (rich, {"concept": {"repeats": 1}, "style_heldout": {"is_regularisation_data": True}}),
    }


def losses(name: str, folder: Path) -> list[float]:
    """The first losses of a recipe, in fp32 on the CPU."""
    from training.run.folder import RunStore
    from training.run.session import Request, train_lora

    from .trial import mixed, scale_latents, transformer

    settings, datasets = recipes()[name]
    latents, texts = mixed(datasets, folder)
    outcome = train_lora(
        transformer(),
        latents,
        texts,
        settings,
        Request("golden"),
        RunStore(folder / "runs", folder / "loras"),
        scale_latents,
    )
    return outcome.losses


def main() -> None:
    found = {}
    for name in recipes():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(name, Path(folder))
            print(name, found[name], file=sys.stderr)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
