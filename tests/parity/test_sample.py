"""Drawing against diffusers' own Lumina2 pipeline on the nano model, from the prompt to the latents, in fp32."""

from pathlib import Path

import pytest
import torch

from training.config.validation import Size, ValidationSettings
from training.data.prompts import SYSTEM_PROMPTS
from training.model.loading import load_transformer
from training.sample.draw import draw_latents, picture_noise

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
PROMPT, NEGATIVE, SEED, STEPS = "red apple", "blue heart, blurry", 11, 8


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import Lumina2Pipeline

    made = Lumina2Pipeline.from_pretrained(NANO, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def texts(pipeline):
    """Embeddings (tokens, width) as the pipeline makes them of its own prompt and negative prompt."""
    with torch.no_grad():
        found = pipeline.encode_prompt(
            PROMPT, True, NEGATIVE, system_prompt=SYSTEM_PROMPTS["superior"], max_sequence_length=256
        )
    wanted, wanted_mask, unwanted, unwanted_mask = found
    return wanted[0, wanted_mask[0].bool()], unwanted[0, unwanted_mask[0].bool()]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"cfg_normalization": True},
        {"cfg_trunc_ratio": 0.5},
        {"cfg_normalization": True, "cfg_trunc_ratio": 0.3},
        {"validation_guidance": 1.0},
        {"validation_shift": 6.0},
    ],
    ids=lambda changed: ", ".join(changed) or "plain",
)
def test_a_drawing_equals_diffusers_pipeline(pipeline, texts, changed):
    settings = ValidationSettings(
        **{"validation_num_inference_steps": STEPS, "validation_resolution": "96x64", **changed}
    )
    own_shift = pipeline.scheduler.config.shift
    pipeline.scheduler.register_to_config(shift=settings.validation_shift or own_shift)
    pipeline.scheduler.set_shift(settings.validation_shift or own_shift)
    expected = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        system_prompt=SYSTEM_PROMPTS["superior"],
        width=96,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=settings.validation_guidance,
        cfg_normalization=settings.cfg_normalization,
        cfg_trunc_ratio=settings.cfg_trunc_ratio,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    pipeline.scheduler.set_shift(own_shift)
    pipeline.scheduler.register_to_config(shift=own_shift)
    noise = picture_noise(SEED, 16, Size(96, 64))
    with torch.no_grad():
        ours = draw_latents(load_transformer(NANO / "transformer", dtype=None), *texts, noise, settings, own_shift)
    assert ours.shape == expected.shape == (1, 16, 8, 12)
    assert (ours - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (ours - expected).abs().mean() < 1e-4 * expected.abs().mean()
