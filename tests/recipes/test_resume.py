"""Killed at any moment and gone on with: nothing differs from the training that nothing happened to."""

import sys

import pytest
from nano.forks import Forks
from nano.resume import ADAPTERS, case, check

from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings

# A few of the forty that `scripts/soak kills` goes through.
CASES = [9, 12, 16, 26, 36, 38]
FAMILIES = (
    ("ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8", "adamw_bf16"),  # states of few bits
    ("torch-adamw", "optimi-adamw", "optimi-stableadamw", "optimi-radam", "optimi-ranger", "adafactor"),
    ("optimi-lion", "optimi-adan", "optimi-sgd"),
    ("prodigy",),
    ("adamw_schedulefree",),
)


def test_the_cases_have_a_bit_of_everything():
    chosen = [case(number) for number in CASES]
    optimizers = {each.settings.optimizer.optimizer for each in chosen}
    assert all(optimizers & set(family) for family in FAMILIES)
    assert {type(each.settings.adapter) for each in chosen} == {LoRASettings, LyCORISSettings, FullSettings}
    for true in (
        lambda each: each.settings.optimizer.use_ema,
        lambda each: each.settings.optimizer.fused_backward,
        lambda each: each.settings.optimizer.gradient_accumulation_steps > 1,
        lambda each: each.settings.precision.quantised,
        lambda each: each.settings.objective.scheduled_sampling.max_step_offset > 0,
        lambda each: len(each.datasets) == 2,
    ):
        assert {bool(true(each)) for each in chosen} == {False, True}
    forty = [case(number) for number in range(40)]
    assert len({each.settings.optimizer.optimizer for each in forty}) > 12
    assert {repr(each.settings.adapter) for each in forty} == {repr(adapter) for adapter in ADAPTERS}
    assert case(7) == case(7)


@pytest.fixture(scope="module")
def forks():
    with Forks("nano.resume") as forks:
        yield forks


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")
@pytest.mark.parametrize("number", CASES)
def test_killed_and_gone_on_with_is_as_undisturbed(number, tmp_path, forks):
    check(number, tmp_path, forks)
