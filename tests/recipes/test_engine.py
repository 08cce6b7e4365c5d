"""Real short trainings on the nano model: what is learned stays what it was, everything learns, priors hold."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from nano.golden import losses as golden_losses
from nano.golden import recipes
from nano.matrix import ADAPTERS, FALL, PRECISIONS, Combination, losses
from nano.trial import embed, examples, mixed, scale_latents, transformer

from training.adapter.adapter import add_adapter
from training.adapter.base import AdaptedLinear
from training.config.adapter import LoRASettings
from training.config.objective import ObjectiveSettings
from training.config.optim import OPTIMIZERS, OptimizerSettings
from training.config.settings import TrainSettings
from training.errors import SettingError
from training.objective.loss import add_noise
from training.run.batches import Batch
from training.run.folder import RunStore
from training.run.loop import loss_of
from training.run.session import Request, train_lora

GOLDEN = json.loads((Path(__file__).with_name("golden.json")).read_text())


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_first_losses_are_the_stored_ones(name, tmp_path):
    """Another torch may round otherwise; then: python -m scripts.nano.golden, and look at what changed."""
    assert set(recipes()) == set(GOLDEN)
    assert golden_losses(name, tmp_path) == pytest.approx(GOLDEN[name], rel=1e-4, abs=1e-6)


FAMILIES = {  # optimisers that work alike; within each the adapters go through the members
    "few bits": ("ao-adamw8bit", "adamw_bf16", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8", "adamw_bf16"),
    "adam": ("optimi-stableadamw", "torch-adamw", "optimi-adamw", "adafactor", "optimi-radam", "optimi-ranger"),
    "momentum": ("optimi-lion", "optimi-adan", "optimi-sgd", "optimi-lion", "optimi-adan", "optimi-sgd"),
    "own rate": ("prodigy", "adamw_schedulefree", "prodigy", "adamw_schedulefree", "prodigy", "adamw_schedulefree"),
}
NONSENSE = ("full", "int8")


def cover():
    """Each adapter with each family, each precision with both: 24 of all combinations."""
    for (row, members), (column, adapter) in product(enumerate(FAMILIES.values()), enumerate(ADAPTERS)):
        precisions = [p for p in PRECISIONS if (adapter, p) != NONSENSE]
        yield Combination(members[column], adapter, precisions[(row + column) % len(precisions)])


def test_the_cover_is_one():
    chosen = list(cover())
    assert len(chosen) <= 24
    assert {c.optimizer for c in chosen} == {name for name in OPTIMIZERS if not name.startswith("bnb-")}
    family = {name: key for key, members in FAMILIES.items() for name in members}
    pairs = {(c.adapter, c.precision) for c in chosen}
    assert pairs == set(product(ADAPTERS, PRECISIONS)) - {NONSENSE}
    assert {(family[c.optimizer], c.adapter) for c in chosen} == set(product(FAMILIES, ADAPTERS))
    assert {(family[c.optimizer], c.precision) for c in chosen} == set(product(FAMILIES, PRECISIONS))


@pytest.mark.parametrize("combination", list(cover()), ids=lambda c: f"{c.optimizer} {c.adapter} {c.precision}")
def test_everything_learns(combination):
    before, after = losses(combination)
    assert after <= (1 - FALL) * before


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SettingError, match="base_model_precision is int8-torchao in a full fine-tune"):
        losses(Combination("torch-adamw", *NONSENSE))


def style_batch(rows):
    chosen = examples("style")
    captions = [chosen.embeddings[row] for row in rows]
    latents = torch.stack([scale_latents(chosen.latents[row]) for row in rows])
    noise = torch.randn((16, *latents.shape[1:]), generator=torch.Generator().manual_seed(3))[list(rows)]
    return Batch(
        latents=latents,
        noise=noise,
        sigmas=torch.linspace(0.2, 0.8, 16)[list(rows)],
        captions=torch.nn.utils.rnn.pad_sequence(captions, batch_first=True),
        lengths=tuple(map(len, captions)),
    )


def gradients(*batches):
    """Of a LoRA that is no longer zero, accumulated over the batches as the loop does."""
    model, settings = transformer(), TrainSettings(adapter=LoRASettings(4))
    adapter = add_adapter(model, settings.adapter, 0)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight.normal_(0, 0.05)
    for batch in batches:
        (loss_of(model, adapter, batch, settings) / len(batches)).backward()
    return torch.cat([weight.grad.flatten() for weight in adapter.weights.values()])


def test_two_batches_of_one_are_a_batch_of_two_in_any_order():
    both = gradients(style_batch((0, 3)))
    for others in ((style_batch((0,)), style_batch((3,))), (style_batch((3, 0)),)):
        assert (gradients(*others) - both).norm() < 1e-4 * both.norm()
    assert (gradients(style_batch((0,))) - both).norm() > 0.1 * both.norm()


def trained(datasets, steps, folder, slider=("", ""), **objective):
    """The nano model with a LoRA of what is taught in it."""
    model = transformer()
    settings = TrainSettings(
        steps=steps,
        batch_size=4,
        adapter=LoRASettings(8, targets="attention+ff"),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        objective=ObjectiveSettings(
            caption_dropout_probability=0, slider_positive=slider[0], slider_negative=slider[1], **objective
        ),
    )
    store = RunStore(folder / "runs", folder / "loras")
    train_lora(model, *mixed(datasets, folder, slider), settings, Request("prior"), store, scale_latents)
    return model


@torch.no_grad()
def predictions(model, name, prompt=None):
    """Velocities at fixed noise levels of every picture of a set, and what they should be.

    ``prompt``: what is said of them instead of their captions.
    """
    chosen = examples(name)
    order = sorted(range(len(chosen.latents)), key=lambda row: len(chosen.embeddings[row]))
    latents = torch.stack([scale_latents(chosen.latents[row]) for row in order])
    said = None if prompt is None else embed(prompt)
    captions = [chosen.embeddings[row] if said is None else said for row in order]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    found = []
    for sigma in (0.35, 0.7):
        sigmas = torch.full((len(order),), sigma)
        found.append(model(add_noise(latents, noise, sigmas), 1 - sigmas, padded, tuple(map(len, captions))))
    return torch.cat(found), (latents - noise).repeat(2, 1, 1, 1)


def test_regularisation_keeps_the_model_where_the_trigger_is_not(tmp_path):
    """Pictures of another set hold the model's word on a third one, and the concept is learned as well as without."""
    steps = 120
    alone = trained({"concept": {}}, steps, tmp_path / "alone")
    held = trained({"concept": {}, "style_heldout": {"is_regularisation_data": True}}, 2 * steps, tmp_path / "held")
    base, _ = predictions(transformer(), "style")
    assert len(base) == 32
    moved, kept = ((predictions(model, "style")[0] - base).square().mean() for model in (alone, held))
    assert kept <= 0.6 * moved
    losses_ = []
    for model in (alone, held):
        prediction, target = predictions(model, "concept")
        losses_.append((prediction - target).square().mean().item())
    assert losses_[1] == pytest.approx(losses_[0], rel=0.1)


def test_the_strength_of_a_slider_leads_from_one_prompt_to_the_other(tmp_path):
    """On pictures and captions that it was not trained on; at -1 it leads back, and at 0 nothing is changed."""
    prompts = ("smiling face", "crying face")
    model = trained({"style": {}}, 60, tmp_path, prompts, slider_scale=2.0)
    base, positive, negative = (predictions(transformer(), "style_heldout", prompt)[0] for prompt in (None, *prompts))
    way = 2 * (positive - negative)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for strength in (1.0, -1.0):
        for layer in layers:
            layer.strength = strength
        moved = strength * (predictions(model, "style_heldout")[0] - base)
        assert torch.cosine_similarity(moved.flatten(), way.flatten(), dim=0) > 0.5
        assert 0.3 * way.norm() < moved.norm() < way.norm()
    for layer in layers:
        layer.strength = 0.0
    assert (predictions(model, "style_heldout")[0] - base).abs().max() < 1e-4
