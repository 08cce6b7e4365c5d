"""Noise levels and loss against values worked out here."""

import pytest
import torch

from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.keys import diffusers_modules
from training.objective.loss import add_noise, velocity
from training.objective.sigmas import auto_shift, sampling_sigmas, shift_sigmas


def test_shift_moves_towards_noise():
    even = torch.linspace(0, 1, 70_001, dtype=torch.float64)
    shifted = shift_sigmas(even, 6)
    assert (shifted > 0.5).double().mean().item() == pytest.approx(6 / 7, abs=1e-4)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    with pytest.raises(SettingError, match="positive"):
        shift_sigmas(even, 0)


@pytest.mark.parametrize(("side_px", "shift"), [(256, 1.649), (512, 1.878), (1024, 3.158), (2048, 25.28)])
def test_auto_shift_grows_with_the_picture(side_px, shift):
    assert auto_shift(side_px // 8, side_px // 8) == pytest.approx(shift, rel=1e-3)


def test_sampling_levels_are_those_of_diffusers():
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    assert torch.allclose(sampling_sigmas(20, 6.0), scheduler.sigmas, atol=1e-6)


def test_noise_is_at_sigma_one_and_the_loss_wants_picture_minus_noise():
    picture, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    mixed = add_noise(picture, noise, torch.tensor([1.0, 0.0]))
    assert torch.equal(mixed[0], noise[0])
    assert torch.equal(mixed[1], picture[1])
    assert torch.equal(velocity(picture, noise), picture - noise)


def test_names_of_every_module_in_diffusers():
    assert diffusers_modules("layers.3.attention.qkv") == tuple(f"layers.3.attn.to_{p}" for p in "qkv")
    assert diffusers_modules("context_refiner.0.attention_norm1") == ("context_refiner.0.norm1",)
    assert diffusers_modules("layers.0.attention_norm1") == ("layers.0.norm1.norm",)
    with pytest.raises(ModelError, match=r"no module 'layers\.0\.moe'"):
        diffusers_modules("layers.0.moe")


def test_impossible_sizes_are_refused():
    with pytest.raises(ModelError, match="do not fill a width"):
        TransformerConfig(dim=2304, heads=32)
    with pytest.raises(ModelError, match="a Lumina2Transformer2DModel is needed"):
        TransformerConfig.from_diffusers({"_class_name": "SD3Transformer2DModel"})
