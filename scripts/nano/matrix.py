"""Optimisers × what is trained × precision: whether each learns, on one fixed batch of the nano model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.adapter.adapter import add_adapter
from training.config.adapter import AdapterSettings, FullSettings, LoRASettings, LyCORISSettings
from training.config.optim import OptimizerSettings
from training.config.precision import PrecisionSettings
from training.config.settings import TrainSettings
from training.model.linear import release_scratch
from training.model.quantise import quantise
from training.optim.averages import averaged
from training.run.batches import Batch
from training.run.loop import TrainState, loss_of, new_state, take_step

from .trial import examples, scale_latents, transformer

ADAPTERS: dict[str, AdapterSettings] = {
    "lora fused": LoRASettings(8, targets="attention+ff"),
    "lora split": LoRASettings(8, targets="attention+ff", qkv="split"),
    "dora": LoRASettings(8, targets="attention+ff", use_dora=True),
    "lokr": LyCORISSettings("lokr", linear_dim=10000, factor=4, apply_preset={"target_module": ["Block"]}),
    "loha": LyCORISSettings("loha", linear_dim=8, linear_alpha=8, apply_preset={"target_module": ["Block"]}),
    "full": FullSettings(),
}
# What the frozen weights, or those that are trained, are stored in.
STORED = {"fp32": "no_change", "bf16": "no_change", "int8": "int8-torchao"}
PRECISIONS = tuple(STORED)
RATES = {  # learning rates that suit each optimiser on nano: of an adapter, and of the model's own weights
    "optimi-sgd": (1.0, 0.5),
    "optimi-lion": (2e-3, 5e-5),
    "optimi-adan": (2e-2, 5e-4),
    "prodigy": (1.0, 1.0),
    "adamw_schedulefree": (1e-2, 2e-4),
    "adafactor": (2e-2, 1e-3),
}
USUAL_RATES = (1e-2, 2e-4)
STEPS, LONG_STEPS = 30, 150
LOOK_STEPS = 10  # after so many the loss is looked at
FALL = 0.03  # of the loss, by which a combination is known to learn
LONG = ("prodigy", "adamw_schedulefree")  # they begin slowly
PICTURES = 4


@dataclass(frozen=True)
class Combination:
    optimizer: str
    adapter: str
    precision: str

    @property
    def steps(self) -> int:
        return LONG_STEPS if self.optimizer in LONG else STEPS

    @property
    def settings(self) -> TrainSettings:
        full = self.adapter == "full"
        return TrainSettings(
            adapter=ADAPTERS[self.adapter],
            optimizer=OptimizerSettings(self.optimizer, RATES.get(self.optimizer, USUAL_RATES)[full]),
            precision=PrecisionSettings(
                base_model_precision="int8-torchao" if self.precision == "int8" else "no_change"
            ),
        )


def fixed_batch() -> Batch:
    """Four pictures of the style at four noise levels, always the same."""
    chosen = examples("style")
    latents = torch.stack([scale_latents(latent) for latent in chosen.latents[:PICTURES]])
    captions = chosen.embeddings[:PICTURES]
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)),
        sigmas=torch.tensor([0.2, 0.4, 0.6, 0.8]),
        captions=torch.nn.utils.rnn.pad_sequence(captions, batch_first=True),
        lengths=tuple(map(len, captions)),
    )


def losses(combination: Combination) -> tuple[float, float]:
    """The loss on the fixed batch before and after training on nothing else, until it fell by ``FALL``.

    Raises:
        SettingError: the combination makes no sense.
    """
    settings, batch = combination.settings, fixed_batch()
    model = transformer(torch.float32 if combination.precision == "fp32" else torch.bfloat16)
    adapter = add_adapter(model, settings.adapter, seed=0)
    if settings.precision.quantised:
        quantise(model, settings.precision.base_model_precision)
    model.compute_dtype = torch.float32
    state = new_state(adapter, settings)
    before = after = _loss(model, state, batch, settings)
    for step in range(combination.steps):
        torch.manual_seed(step)
        loss_of(model, adapter, batch, settings).backward()
        take_step(state, settings)
        if (step + 1) % LOOK_STEPS == 0:
            after = _loss(model, state, batch, settings)
            if after <= (1 - FALL) * before:
                break
    release_scratch()
    return before, after


@torch.no_grad()
def _loss(model: torch.nn.Module, state: TrainState, batch: Batch, settings: TrainSettings) -> float:
    with averaged(state.optimizer):
        return loss_of(model, state.adapter, batch, settings).item()  # type: ignore[arg-type]
