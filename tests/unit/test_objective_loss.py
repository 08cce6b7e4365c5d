"""Losses, weights and perturbed noise against values worked out here."""

import math

import numpy as np
import pytest
import torch

from training.config.objective import ObjectiveSettings
from training.objective.loss import (
    add_noise,
    batch_loss,
    chosen_masks,
    huber_constants,
    perturb,
    perturbation,
    sample_losses,
    velocity,
)
from training.objective.step import training_losses

SIGMAS = torch.tensor([0.0, 0.5, 1.0])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(*errors):
    """A prediction and a target (B, 1, 1, n) that differ by ``errors``, one row a sample."""
    target = torch.full((len(errors), 1, 1, len(errors[0])), 0.5)
    return target + torch.tensor(errors)[:, None, None], target


def huber(loss_type="huber", schedule="constant", **more):
    return ObjectiveSettings(loss_type=loss_type, huber_schedule=schedule, **more)


def test_the_mean_is_over_each_sample():
    prediction, target = error_of([1.0, -3.0], [0.0, 0.5])
    losses = sample_losses(prediction, target, torch.tensor([0.3, 0.9]), ObjectiveSettings())
    assert losses.tolist() == [5.0, 0.125]
    assert batch_loss(losses).item() == 2.5625
    assert batch_loss(losses, 0.5).item() == 1.28125
    assert batch_loss(losses, torch.tensor([1.0, 0.0])).item() == 2.5


def test_huber_and_smooth_l1_at_a_constant():
    prediction, target = error_of([0.3, -0.3], [0.0, 2.0])
    bend = math.sqrt(0.3**2 + 0.1**2) - 0.1, (math.sqrt(2.0**2 + 0.1**2) - 0.1) / 2
    sigmas = torch.tensor([0.3, 0.9])
    assert sample_losses(prediction, target, sigmas, huber()).tolist() == pytest.approx([0.2 * b for b in bend])
    smooth = sample_losses(prediction, target, sigmas, huber("smooth_l1"))
    assert smooth.tolist() == pytest.approx([2 * b for b in bend])
    assert sample_losses(prediction, target, sigmas, huber(huber_c=1.0))[1].item() == pytest.approx(math.sqrt(5) - 1)


def test_huber_is_the_square_near_zero_and_its_gradient_finite_there():
    prediction, target = error_of([1e-4, 0.0])
    prediction.requires_grad_()
    loss = sample_losses(prediction, target, torch.tensor([0.5]), huber(huber_c=1.0))
    error = prediction[0, 0, 0, 0].item() - 0.5
    assert loss.item() == pytest.approx(error**2 / 2, rel=1e-6)
    loss.sum().backward()
    assert prediction.grad.flatten().tolist() == pytest.approx([error, 0], rel=1e-4)


def test_the_schedules_of_the_huber_constant():
    assert huber_constants(SIGMAS, huber()).tolist() == pytest.approx([0.1] * 3)
    assert huber_constants(SIGMAS, huber(schedule="exponential")).tolist() == pytest.approx([1, math.sqrt(0.1), 0.1])
    snr = [0.9 / (1 + math.sqrt((1 - s) / (s + 1e-4))) ** 2 + 0.1 for s in (0, 0.5, 1)]
    assert snr[0] == pytest.approx(0.9 / 101**2 + 0.1)
    assert snr[2] == 1
    assert huber_constants(SIGMAS, huber(schedule="snr")).tolist() == pytest.approx(snr)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_each_sample_has_the_constant_of_its_level(loss_type, schedule):
    settings, prediction, target = huber(loss_type, schedule), normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    d = (prediction - target).double().numpy()
    c = huber_constants(SIGMAS, settings).double().numpy().reshape(3, 1, 1, 1)
    expected = 2 * (np.sqrt(d**2 + c**2) - c) * (c if loss_type == "huber" else 1)
    losses = sample_losses(prediction, target, SIGMAS, settings)
    assert losses.numpy() == pytest.approx(expected.mean((1, 2, 3)), rel=1e-5)


def test_sigma_squared_weights_are_the_error_of_the_picture():
    picture, noise, prediction = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    settings = ObjectiveSettings(sigma_squared_weighting=True)
    losses = sample_losses(prediction, velocity(picture, noise), SIGMAS, settings)
    foreseen = add_noise(picture, noise, SIGMAS) + SIGMAS.view(3, 1, 1, 1) * prediction
    assert torch.allclose(losses, (foreseen - picture).square().mean((1, 2, 3)), atol=1e-6)


def test_a_mask_weighs_every_element_and_not_the_mean():
    prediction, target = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1)
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    expected = ((prediction - target).square() * mask).sum((1, 2, 3)) / 12
    losses = sample_losses(prediction, target, torch.tensor([0.2, 0.3]), ObjectiveSettings(), mask)
    assert torch.allclose(losses, expected)
    picture, sigmas = torch.zeros_like(target), torch.tensor([0.2, 0.3])
    said = training_losses(lambda *_: prediction, picture, -target, sigmas, ObjectiveSettings(), mask=mask)
    assert torch.allclose(said, expected)


def test_masks_are_used_for_a_share_of_the_samples():
    masks, uniform = torch.zeros(3, 1, 2, 2), torch.tensor([0.0, 0.39, 0.41])
    kept = chosen_masks(masks, uniform, ObjectiveSettings(masked_loss_probability=0.4))
    assert kept.amax((1, 2, 3)).tolist() == kept.amin((1, 2, 3)).tolist() == [0, 0, 1]
    assert chosen_masks(masks, uniform, ObjectiveSettings()).sum() == 0
    assert chosen_masks(masks, uniform, ObjectiveSettings(masked_loss_probability=0)).mean() == 1


@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
def test_half_precision_predictions_are_compared_in_single(loss_type):
    prediction, target = normal(3, 2, 4, 4).bfloat16(), normal(3, 2, 4, 4, seed=1)
    losses = sample_losses(prediction, target, SIGMAS, huber(loss_type))
    assert losses.dtype == torch.float32
    assert torch.equal(losses, sample_losses(prediction.float(), target, SIGMAS, huber(loss_type)))


def test_perturbed_noise_is_seen_and_not_learned():
    assert [perturbation(ObjectiveSettings(input_perturbation=0.2), step) for step in (0, 10**6)] == [0.2, 0.2]
    falling = ObjectiveSettings(input_perturbation=0.2, input_perturbation_steps=100)
    assert [perturbation(falling, step) for step in (0, 25, 100, 200)] == pytest.approx([0.2, 0.15, 0, 0])
    picture, noise, more = (normal(2, 3, 2, 2, seed=seed) for seed in range(3))
    sigmas, seen = torch.tensor([0.25, 1.0]), []

    def predict(x, sigma, rows):
        seen.append(x)
        return picture - noise

    perturbed = perturb(noise, more, 0.1)
    losses = training_losses(predict, picture, noise, sigmas, ObjectiveSettings(), seen_noise=perturbed)
    assert losses.tolist() == [0, 0]
    assert torch.allclose(seen[0][0], 0.75 * picture[0] + 0.25 * noise[0] + 0.025 * more[0], atol=1e-6)
    assert torch.allclose(seen[0][1], noise[1] + 0.1 * more[1], atol=1e-6)


def test_pictures_of_regularisation_are_learned_as_any_and_a_teacher_replaces_them():
    picture, noise, sigmas = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1), torch.tensor([0.25, 0.5])
    seen = []

    def network(factor):
        def predict(x, sigma, rows):
            seen.append((x, sigma, rows, torch.is_grad_enabled()))
            return factor * x

        return predict

    student = torch.tensor(2.0, requires_grad=True)
    losses = training_losses(network(student), picture, noise, sigmas, ObjectiveSettings(), teacher=network(0.5))
    x = add_noise(picture, noise, sigmas)
    assert torch.allclose(losses, (1.5 * x).square().mean((1, 2, 3)))
    assert [gradient for *_, gradient in seen] == [False, True]
    assert all(torch.equal(at, x) and torch.equal(s, sigmas) and rows == [0, 1] for at, s, rows, _ in seen)
    plain = training_losses(network(2.0), picture, noise, sigmas, ObjectiveSettings())
    assert torch.allclose(plain, (2 * x - (picture - noise)).square().mean((1, 2, 3)))
