"""Which noise levels are drawn, against scipy's distributions and values worked out here."""

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import expit, logit

from training.config.objective import ObjectiveSettings
from training.objective.draws import draw_sigmas, schedule_shift, stratify, stratum_order

EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
UNIFORM = ObjectiveSettings(flow_use_uniform_schedule=True)
DISTRIBUTIONS = {
    "logit-normal": (ObjectiveSettings(), lambda u: expit(scipy.stats.norm.ppf(u))),
    "wide and towards noise": (
        ObjectiveSettings(flow_sigmoid_scale=1.7, timestep_sampling_offset=0.4),
        lambda u: expit(1.7 * (scipy.stats.norm.ppf(u) + 0.4)),
    ),
    "uniform": (UNIFORM, lambda u: u),
    "beta": (
        ObjectiveSettings(flow_use_beta_schedule=True, flow_beta_schedule_alpha=3, flow_beta_schedule_beta=1.5),
        scipy.stats.beta(3, 1.5).ppf,
    ),
    # The density is (1 + 2σ)/2, so its cumulative distribution (σ + σ²)/2.
    "linear": (ObjectiveSettings(flow_cubic_schedule_weights=[1, 3]), lambda u: (np.sqrt(1 + 8 * u) - 1) / 2),
    "one weight": (ObjectiveSettings(flow_cubic_schedule_weights=[7]), lambda u: u),
}


def draws(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("settings", "quantile"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_levels_are_the_quantiles_of_their_distribution(settings, quantile):
    levels = draw_sigmas(EVEN, settings, 1.0)
    assert levels.dtype == torch.float32
    assert np.abs(levels.numpy() - quantile(EVEN.numpy())).max() < 3e-4
    drawn = draw_sigmas(draws(4000), settings, 1.0).numpy()
    expected = quantile(EVEN.numpy())
    assert scipy.stats.kstest(drawn, lambda x: np.searchsorted(expected, x) / len(expected)).pvalue > 0.01
    assert abs(drawn.mean() - expected.mean()) < 4 * expected.std() / 4000**0.5
    assert drawn.std() == pytest.approx(expected.std(), rel=0.05)


def test_a_density_through_three_weights():
    """Up to the middle the monotone cubic through (0, 1, 0) is 2t − t² with t = 2σ."""
    settings = ObjectiveSettings(flow_cubic_schedule_weights=[0, 1, 0])
    share = (0.5**2 - 0.5**3 / 3) / (4 / 3)  # below σ = 0.25
    assert draw_sigmas(torch.tensor([share, 0.5, 1 - share]), settings, 1.0).tolist() == pytest.approx(
        [0.25, 0.5, 0.75], abs=1e-3
    )


def test_a_density_stays_between_its_weights():
    """Through (0, 0, 1, 1) it is 0 in the first third and 3t² − 2t³ in the second, of 1.5 thirds in all."""
    settings = ObjectiveSettings(flow_cubic_schedule_weights=[0, 0, 1, 1])
    half = (0.5**3 - 0.5**4 / 2) / 1.5  # below the middle
    levels = draw_sigmas(torch.tensor([1e-9, half, 1 / 3, 2 / 3]), settings, 1.0)
    assert levels[0] > 1 / 3
    assert levels[1:].tolist() == pytest.approx([1 / 2, 2 / 3, 5 / 6], abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_at_a_shift_of_six_six_in_seven_levels_are_nearer_to_noise(shift):
    expected = shift / (1 + shift)
    levels = draw_sigmas(EVEN, UNIFORM, shift)
    assert (levels > 0.5).double().mean().item() == pytest.approx(expected, abs=1e-4)
    drawn = draw_sigmas(draws(20_000), UNIFORM, shift)
    assert (drawn > 0.5).double().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("side_px", "shift"),
    [(256, 1.649), (512, 1.878), (768, 2.332), (1024, 3.158), (1280, 4.665), (1536, 7.513), (2048, 25.28)],
)
def test_the_shift_is_by_size_wherever_that_is_on(side_px, shift):
    side = side_px // 8
    assert schedule_shift(ObjectiveSettings(), side, side) == pytest.approx(shift, rel=1e-3)
    assert schedule_shift(ObjectiveSettings(flow_schedule_shift=6), side, side) == pytest.approx(shift, rel=1e-3)
    static = ObjectiveSettings(flow_schedule_auto_shift=False)
    assert schedule_shift(static, side, side) == 3
    assert schedule_shift(ObjectiveSettings(flow_schedule_auto_shift=False, flow_schedule_shift=6), side, side) == 6
    assert schedule_shift(ObjectiveSettings(flow_schedule_auto_shift=False, flow_schedule_shift=None), side, side) == 1


@pytest.mark.parametrize(("settings", "quantile"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_range_leaves_the_distribution_inside_it_as_it_is(settings, quantile):
    shift, low, high = 3.0, 0.55, 0.9
    ranged = ObjectiveSettings(**{**vars(settings), "sigma_min": low, "sigma_max": high})
    levels = draw_sigmas(EVEN, ranged, shift)
    before = quantile(EVEN.numpy())
    every = shift * before / (1 + (shift - 1) * before)
    inside = every[(every >= low) & (every <= high)]
    assert levels.min() >= np.float32(low)
    assert levels.max() <= np.float32(high)
    assert (
        np.abs(np.quantile(levels.numpy(), np.linspace(0, 1, 51)) - np.quantile(inside, np.linspace(0, 1, 51))).max()
        < 2e-3
    )


def test_custom_timesteps_by_chance_and_in_turn_without_a_shift():
    by_chance = ObjectiveSettings(flow_custom_timesteps=[0.9, 0.25, 0.5])
    assert draw_sigmas(torch.tensor([0.1, 0.4, 0.9]), by_chance, 6.0).tolist() == pytest.approx([0.9, 0.25, 0.5])
    shares = draw_sigmas(EVEN, by_chance, 6.0).unique(return_counts=True)[1] / len(EVEN)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    in_turn = ObjectiveSettings(flow_custom_timesteps=[900, 250, 500], flow_timesteps_mode="round-robin")
    assert draw_sigmas(draws(4), in_turn, 6.0, first=4).tolist() == pytest.approx([0.25, 0.5, 0.9, 0.25])
    assert draw_sigmas(draws(4), in_turn, 6.0, first=8).tolist() == pytest.approx([0.5, 0.9, 0.25, 0.5])


@pytest.mark.parametrize(("settings", "_"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_levels_grow_with_their_draw_and_its_ends_are_good(settings, _):
    levels = draw_sigmas(torch.linspace(0, 1, 1001), settings, 25.0)
    assert (levels.diff() > 0).sum() > 900
    assert (levels.diff() >= 0).all()
    assert 0 <= levels[0] < 0.1
    assert 0.99 < levels[-1] <= 1


def test_stratified_draws_fill_every_part_once_and_stay_uniform():
    order = stratum_order(7, 3, 8)
    assert sorted(order.tolist()) == list(range(8))
    assert torch.equal(order, stratum_order(7, 3, 8))
    assert len({tuple(stratum_order(7, step, 8).tolist()) for step in range(20)}) == 20
    assert not torch.equal(order, stratum_order(8, 3, 8))
    stratified = stratify(draws(8), order)
    assert (stratified * 8).long().tolist() == order.tolist()
    assert stratify(draws(8)[2:4], order[2:4], 8).tolist() == stratified[2:4].tolist()
    assert stratify(torch.tensor([0.25, 0.5]), torch.tensor([1, 0])).tolist() == [0.625, 0.25]
    every = torch.stack([stratify(draws(8, step), stratum_order(7, step, 8)) for step in range(500)])
    for place in (0, 5):
        assert scipy.stats.kstest(every[:, place].numpy(), "uniform").pvalue > 0.01
    plain = draws(4000).view(500, 8).mean(1).std()
    assert every.mean(1).std() < 0.2 * plain


def test_the_logit_of_the_default_is_a_standard_normal():
    sample = logit(draw_sigmas(draws(5000), ObjectiveSettings(), 1.0).double().numpy())
    assert scipy.stats.kstest(sample, "norm").pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 1.1, 3.0, 3.158, 6.0, 7.3, 49.0])
@pytest.mark.parametrize("distribution", [{}, {"flow_use_uniform_schedule": True}, {"flow_use_beta_schedule": True}])
def test_every_shift_gives_levels_between_picture_and_noise(distribution, shift):
    """1/s · 1 / (1 + (1/s − 1) · 1) may round to a little above 1, where no distribution is defined."""
    levels = draw_sigmas(torch.linspace(0, 1, 9), ObjectiveSettings(**distribution), shift)
    assert torch.isfinite(levels).all()
    assert (levels.diff() >= 0).all()
    assert levels[4] > 0.49
