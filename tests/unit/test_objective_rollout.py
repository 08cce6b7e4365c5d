"""Scheduled sampling: plans, ways and ReflexFlow's losses, with velocity fields whose solutions are known."""

import math

import numpy as np
import pytest
import torch

from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings
from training.objective.loss import add_noise
from training.objective.rollout import (
    direction_loss,
    exposure_weight,
    plan_rollout,
    roll_out,
    rolled_out,
    rollout_probability,
    step_offsets,
)
from training.objective.sigmas import sampling_sigmas
from training.objective.step import training_losses

ALWAYS = {"max_step_offset": 3, "probability": 1.0, "strategy": "biased_late"}  # a place of 0 is the largest offset
SHAPE = (3, 2, 4, 4)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PICTURE, NOISE, OTHER = (normal(*SHAPE, seed=seed) for seed in range(3))


class Field:
    """A velocity field ``v(x, σ, rows)`` that keeps what it was asked."""

    def __init__(self, field):
        self.field, self.asked = field, []

    def __call__(self, x, sigma, rows):
        assert len(x) == len(sigma) == len(rows)
        self.asked.append((x, sigma, rows, torch.is_grad_enabled()))
        return self.field(x, sigma.view(-1, 1, 1, 1), rows)


def towards(goal):
    """Every way leads straight to ``goal``: ``x(σ) = z + σ·(x(σ₀) − z)/σ₀``."""
    return Field(lambda x, sigma, rows: (goal[rows] - x) / sigma)


def plan(sigmas, chance=None, place=None, step=0, **settings):
    zeros = torch.zeros(len(sigmas))
    given = [zeros if draw is None else torch.tensor(draw) for draw in (chance, place)]
    return plan_rollout(torch.tensor(sigmas), *given, ScheduledSamplingSettings(**settings), step)


# The plan


def test_the_probability_ramps_from_zero_and_is_zero_before_its_start():
    constant = ScheduledSamplingSettings(probability=0.3, start_step=10)
    assert [rollout_probability(constant, step) for step in (0, 9, 10, 99)] == [0, 0, 0.3, 0.3]
    ramp = ScheduledSamplingSettings(probability=0.3, ramp_steps=100, start_step=10, prob_end=0.8)
    assert [rollout_probability(ramp, step) for step in (9, 10, 35, 110, 999)] == pytest.approx([0, 0, 0.2, 0.8, 0.8])
    down = ScheduledSamplingSettings(probability=0.3, ramp_steps=100, prob_start=0.5, prob_end=0.0)
    assert [rollout_probability(down, step) for step in (0, 50, 100)] == pytest.approx([0.5, 0.25, 0])
    cosine = ScheduledSamplingSettings(ramp_steps=100, prob_end=0.8, ramp_shape="cosine")
    expected = [0, 0.8 * (0.5 - 0.5 * math.cos(math.pi / 4)), 0.4, 0.8]
    assert [rollout_probability(cosine, step) for step in (0, 25, 50, 100)] == pytest.approx(expected)


def test_offsets_by_strategy():
    uniform = torch.tensor([0.0, 0.1, 0.5, 0.7, 0.999])

    def offsets(strategy, draws=uniform):
        return step_offsets(draws, ScheduledSamplingSettings(max_step_offset=10, strategy=strategy))

    assert offsets("uniform").tolist() == [0, 1, 5, 7, 10]
    assert offsets("biased_early").tolist() == [0, 0, 2, 5, 10]  # 2.5 is rounded to even
    assert offsets("biased_late").tolist() == [10, 10, 8, 5, 0]
    every = (torch.arange(11_000) + 0.5) / 11_000
    assert offsets("uniform", every).bincount().tolist() == [1000] * 11
    assert offsets("biased_early", every).double().mean().item() == pytest.approx(10 / 3, abs=0.05)
    assert offsets("biased_late", every).double().mean().item() == pytest.approx(20 / 3, abs=0.05)


def test_a_way_in_thousandths_ends_at_the_level_and_starts_at_noise_at_most():
    levels = plan([0.5, 0.999, 1.0, 0.2], place=[0.0, 0.0, 0.0, 0.9], **ALWAYS)
    expected = [[0.503, 0.502, 0.501, 0.5], [1, 1, 1, 0.999], [1, 1, 1, 1], [0.201, 0.201, 0.201, 0.2]]
    assert levels.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert torch.equal(levels[:, -1], torch.tensor([0.5, 0.999, 1.0, 0.2]))
    assert levels.dtype == torch.float32
    assert rolled_out(levels) == [0, 1, 3]


def test_a_way_in_inference_steps_passes_the_levels_of_inference():
    grid = sampling_sigmas(20, 6.0)
    levels = plan([grid[12].item(), grid[1].item()], grid_steps=20, **ALWAYS)
    assert levels[0].tolist() == pytest.approx(grid[9:13].tolist(), abs=1e-6)
    assert levels[1].tolist() == pytest.approx([1, 1, 1, grid[1].item()], abs=1e-6)
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan(drawn.tolist(), grid_steps=20, grid_shift=25.0, **ALWAYS)[:, -1], drawn)
    other = plan([0.5], grid_steps=10, grid_shift=1.0, **ALWAYS)
    assert other[0].tolist() == pytest.approx([0.8, 0.7, 0.6, 0.5])


def test_samples_are_chosen_one_by_one():
    settings = {**ALWAYS, "probability": 0.5}
    levels = plan([0.5, 0.5, 0.5], chance=[0.49, 0.51, 0.0], **settings)
    assert rolled_out(levels) == [0, 2]
    assert levels[1].tolist() == [0.5] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"max_step_offset": 0, "probability": 1.0},
        {"max_step_offset": 3, "probability": 0.0},
        {"max_step_offset": 3, "probability": 1.0, "start_step": 1},
        {"max_step_offset": 3, "probability": 1.0, "ramp_steps": 10},
        {"max_step_offset": 3, "probability": 1.0, "strategy": "uniform"},  # a place of 0 is no step
    ],
)
def test_zero_is_off_and_costs_no_forward_pass(settings):
    assert plan([0.5, 0.6], **settings) is None
    assert rolled_out(None) == []
    network = towards(PICTURE)
    sampling = ScheduledSamplingSettings(**settings)
    training_losses(network, PICTURE, NOISE, torch.rand(3), ObjectiveSettings(scheduled_sampling=sampling))
    assert len(network.asked) == 1


def test_a_level_of_pure_noise_costs_no_forward_pass_either():
    settings = ObjectiveSettings(scheduled_sampling=ScheduledSamplingSettings(**ALWAYS))
    network, sigmas = Field(lambda x, sigma, rows: x), torch.ones(3)
    losses = training_losses(network, PICTURE, NOISE, sigmas, settings, levels=plan([1.0] * 3, **ALWAYS))
    assert len(network.asked) == 1
    assert torch.allclose(losses, (2 * NOISE - PICTURE).square().mean((1, 2, 3)))


# The way


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grid", [{}, {"grid_steps": 20}])
def test_a_perfect_network_arrives_where_noising_does(order, grid):
    sigmas = torch.tensor([0.1, 0.6, 0.97])
    levels = plan(sigmas.tolist(), **ALWAYS, **grid)
    x = roll_out(towards(PICTURE), PICTURE, NOISE, levels, order)
    assert (x - add_noise(PICTURE, NOISE, sigmas)).abs().max() < 2e-6
    assert x.dtype == torch.float32


@pytest.mark.parametrize("order", [1, 2])
def test_another_goal_pulls_away_from_the_source_by_the_ratio_of_levels(order):
    levels = torch.tensor([[0.8, 0.8, 0.5, 0.4], [0.3, 0.2, 0.15, 0.1], [0.6] * 4])
    x = roll_out(towards(OTHER), PICTURE, NOISE, levels, order)
    start = add_noise(PICTURE, NOISE, levels[:, 0])
    ratio = torch.tensor([0.5, 1 / 3, 1.0]).view(3, 1, 1, 1)
    assert torch.allclose(x, OTHER + (start - OTHER) * ratio, atol=1e-5)
    assert torch.equal(x[2], start[2])


def test_euler_and_heun_by_hand():
    """v = −x, so that x grows as σ: a step of h multiplies by 1 − h, or by 1 − h + h²/2."""
    levels = torch.tensor([[0.9, 0.7, 0.4], [0.5, 0.5, 0.4], [0.5, 0.5, 0.5]])
    start = add_noise(PICTURE, NOISE, levels[:, 0])
    for order, factors in ((1, [0.8 * 0.7, 0.9, 1]), (2, [0.82 * 0.745, 0.905, 1])):
        x = roll_out(Field(lambda x, sigma, rows: -x), PICTURE, NOISE, levels, order)
        assert torch.allclose(x, start * torch.tensor(factors).view(3, 1, 1, 1), atol=1e-5)


def test_every_step_runs_once_for_the_samples_that_move_in_it_at_their_levels():
    levels = plan([0.5, 0.25, 0.75], chance=[0.0, 0.9, 0.0], place=[0.0, 0.0, 0.7], **{**ALWAYS, "probability": 0.5})
    network = towards(PICTURE)
    roll_out(network, PICTURE, NOISE, levels)
    assert [rows for _, _, rows, _ in network.asked] == [[0], [0, 2], [0, 2]]
    asked = [sigma.tolist() for _, sigma, _, _ in network.asked]
    assert [level for pair in asked for level in pair] == pytest.approx([0.503, 0.502, 0.752, 0.501, 0.751])
    assert not any(gradient for *_, gradient in network.asked)
    heun = towards(PICTURE)
    roll_out(heun, PICTURE, NOISE, levels, order=2)
    assert [rows for _, _, rows, _ in heun.asked] == [[0], [0], [0, 2], [0, 2], [0, 2], [0, 2]]
    assert heun.asked[1][1].tolist() == pytest.approx([0.502])


# ReflexFlow


def test_the_exposure_weight_is_by_the_mean_and_never_negative():
    clean, rolled = torch.tensor([[3.0, 1.0], [5.0, 5.0]]), torch.tensor([[1.0, 2.0], [5.0, 5.0]])
    weight = exposure_weight(clean[:, None, None], rolled[:, None, None], 0.5)
    # |c − b| is 2 and 1, their mean 1.5; without a difference the weight is 1.
    assert weight.flatten().tolist() == pytest.approx([1 + 0.5 * 2 / 1.5, 1 + 0.5 * 1 / 1.5, 1, 1])
    many = exposure_weight(normal(2, 16, 64, 64), normal(2, 16, 64, 64, seed=1), 1.0)
    assert many.mean((1, 2, 3)).tolist() == pytest.approx([2, 2], rel=1e-5)
    assert many.min() >= 1


def test_the_direction_is_to_the_picture_whatever_the_length():
    loss = direction_loss(torch.stack([PICTURE[0], -PICTURE[0]]) * 7, PICTURE[[0, 0]], torch.zeros(2, *SHAPE[1:]))
    assert loss.tolist() == pytest.approx([0, 4], abs=1e-5)
    sideways = torch.zeros(1, 1, 1, 2)
    sideways[..., 0] = 3
    ahead = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    assert direction_loss(sideways, ahead, torch.zeros_like(ahead)).item() == pytest.approx(2)
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert direction_loss(sideways + ahead, ahead, torch.zeros_like(ahead), mask).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mask", [None, torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(9))])
def test_reflexflow_adds_its_terms_to_the_samples_that_are_rolled_out(mask):
    sampling = ScheduledSamplingSettings(
        **{**ALWAYS, "probability": 0.5},
        reflexflow_alpha=0.7,
        reflexflow_beta1=3.0,
        reflexflow_beta2=0.5,
        grid_steps=20,
    )
    sigmas = torch.tensor([0.3, 0.5, 0.7])
    levels = plan_rollout(sigmas, torch.tensor([0.9, 0.1, 0.2]), torch.zeros(3), sampling, 0)
    scale = torch.tensor(0.8, requires_grad=True)
    network = Field(lambda x, sigma, rows: scale * (OTHER[rows] - x) + sigma)
    settings = ObjectiveSettings(scheduled_sampling=sampling)
    losses = training_losses(network, PICTURE, NOISE, sigmas, settings, levels=levels, mask=mask)
    assert [rows for _, _, rows, _ in network.asked] == [[1, 2]] * 4 + [[0, 1, 2]]
    assert [gradient for *_, gradient in network.asked] == [False] * 4 + [True]

    def says(x, sigma, row):
        return (0.8 * (OTHER[row] - x) + sigma).double().numpy()

    plain = add_noise(PICTURE, NOISE, sigmas)
    shown = np.ones(SHAPE) if mask is None else mask.expand(SHAPE).double().numpy()
    for row, (x, level) in enumerate(zip(network.asked[-1][0], sigmas, strict=True)):
        b, squared = says(x, level, row), (says(x, level, row) - (PICTURE - NOISE)[row].double().numpy()) ** 2
        if row == 0:
            assert torch.equal(x, plain[0])
            assert losses[0].item() == pytest.approx((shown[row] * squared).mean(), rel=1e-5)
            continue
        assert not torch.allclose(x, plain[row], atol=1e-2)
        bias = np.abs(says(plain[row], level, row) - b)
        p, d = shown[row] * b, shown[row] * (PICTURE[row] - x).double().numpy()
        unit = p / np.sqrt((p**2).sum()) - d / np.sqrt((d**2).sum())
        weighted = 0.5 * (shown[row] * squared * (1 + 0.7 * bias / bias.mean())).mean()
        assert losses[row].item() == pytest.approx(weighted + 3 * (unit**2).sum(), rel=1e-5)
    losses.mean().backward()
    assert scale.grad.abs() > 1e-3


def test_without_reflexflow_only_what_the_network_sees_is_another():
    sampling = ScheduledSamplingSettings(**ALWAYS, grid_steps=20, reflexflow=False, order=2)
    sigmas = torch.tensor([0.3, 0.5, 0.7])
    levels = plan(sigmas.tolist(), **ALWAYS, grid_steps=20)
    network = towards(OTHER)
    settings = ObjectiveSettings(scheduled_sampling=sampling)
    losses = training_losses(network, PICTURE, NOISE, sigmas, settings, levels=levels)
    assert len(network.asked) == 2 * 3 + 1
    x = roll_out(towards(OTHER), PICTURE, NOISE, levels, order=2)
    expected = ((OTHER - x) / sigmas.view(3, 1, 1, 1) - (PICTURE - NOISE)).square().mean((1, 2, 3))
    assert torch.allclose(losses, expected, rtol=1e-5)


def test_a_perfect_network_has_no_loss_on_its_own_latents():
    sampling = ScheduledSamplingSettings(**ALWAYS, grid_steps=20)
    sigmas = torch.tensor([0.3, 0.5, 0.7])
    losses = training_losses(
        towards(PICTURE),
        PICTURE,
        NOISE,
        sigmas,
        ObjectiveSettings(scheduled_sampling=sampling),
        levels=plan(sigmas.tolist(), **ALWAYS, grid_steps=20),
    )
    assert losses.max() < 1e-4


def test_a_rollout_starts_from_the_noise_that_is_seen():
    levels = plan([0.3, 0.5, 0.7], **ALWAYS, grid_steps=20)
    network, settings = towards(OTHER), ObjectiveSettings(scheduled_sampling=ScheduledSamplingSettings(**ALWAYS))
    training_losses(network, PICTURE, NOISE, levels[:, -1], settings, levels=levels, seen_noise=2 * NOISE)
    assert torch.equal(network.asked[0][0], add_noise(PICTURE, 2 * NOISE, levels[:, 0]))
    assert torch.equal(network.asked[-2][0], add_noise(PICTURE, 2 * NOISE, levels[:, -1]))
    assert torch.equal(network.asked[-1][0], roll_out(towards(OTHER), PICTURE, 2 * NOISE, levels))


def test_teacher_and_student_see_one_rolled_out_input():
    sampling = ScheduledSamplingSettings(**ALWAYS, grid_steps=20)
    sigmas = torch.tensor([0.3, 0.5, 0.7])
    levels = plan(sigmas.tolist(), **ALWAYS, grid_steps=20)
    student, teacher = towards(OTHER), towards(PICTURE)
    settings = ObjectiveSettings(scheduled_sampling=sampling)
    losses = training_losses(student, PICTURE, NOISE, sigmas, settings, levels=levels, teacher=teacher)
    assert len(teacher.asked) == 1
    assert len(student.asked) == 3 + 1  # no third look for ReflexFlow, whose aim is not the teacher's
    x = teacher.asked[0][0]
    assert torch.equal(x, student.asked[-1][0])
    assert not torch.allclose(x, add_noise(PICTURE, NOISE, sigmas), atol=1e-2)
    expected = ((OTHER - PICTURE) / sigmas.view(3, 1, 1, 1)).square().mean((1, 2, 3))
    assert torch.allclose(losses, expected, rtol=1e-4)
