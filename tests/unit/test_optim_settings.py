"""Settings of optimisers, and learning rates worked out by hand."""

import math

import pytest
import torch

from training.config.optim import OPTIMIZERS, SCHEDULERS, OptimizerSettings, parse_optimizer_config
from training.errors import SettingError
from training.optim.build import _SOURCES, build_optimizer
from training.optim.schedule import learning_rate_factor, set_learning_rate


def groups(lr=1e-4):
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "names": ["weight"], "lr": lr}]


def test_optimizer_config_is_read_as_numbers_truth_values_and_tuples():
    text = "eps=1e-6, amsgrad=True,betas=(0.8, 0.95),growth_rate=inf,beta3=none,mode=fast"
    read = {"eps": 1e-6, "amsgrad": True, "betas": (0.8, 0.95), "growth_rate": math.inf, "beta3": None, "mode": "fast"}
    assert parse_optimizer_config(text) == read
    settings = OptimizerSettings(optimizer_config=text)
    assert settings.arguments == read
    assert settings == OptimizerSettings(optimizer_config=dict(reversed(read.items())))
    assert hash(settings) == hash(OptimizerSettings(optimizer_config=settings.optimizer_config))
    with pytest.raises(SettingError, match="'eps'; write name=value"):
        parse_optimizer_config("eps")
    with pytest.raises(SettingError, match="eps twice"):
        parse_optimizer_config("eps=1,eps=2")


def test_every_name_has_a_source_and_a_wrong_one_is_told_the_nearest():
    assert set(_SOURCES) == set(OPTIMIZERS)
    assert OptimizerSettings(optimizer="lion").optimizer == "optimi-lion"
    with pytest.raises(SettingError, match="do you mean adamw_bf16"):
        OptimizerSettings(optimizer="adamw-bf16")
    with pytest.raises(SettingError, match="do you mean ao-adamw8bit"):
        OptimizerSettings(optimizer="adamw8bit")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer_beta1": 0.9}, "give both or neither"),
        ({"optimizer_beta1": 0.9, "optimizer_beta2": 1.0}, "optimizer_beta2 is 1.0"),
        ({"optimizer_config": "weight_decay=0", "weight_decay": 0}, "leave one of them out"),
        ({"optimizer_config": "lr=1"}, "which learning_rate does"),
        ({"learning_rate": 0}, "learning_rate is 0.0"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1.0"),
        ({"grad_clip_method": "both"}, "choose one of norm, value"),
        ({"grad_clip_method": "update"}, "only fused_backward clips updates"),
        ({"lr_scheduler": "cosines"}, "choose one of constant"),
        ({"lr_scheduler": "cosine", "lr_end": 1e-3}, "at most learning_rate"),
        ({"gradient_accumulation_steps": 0}, "choose at least 1"),
        ({"fused_backward": True}, "choose update or value"),
        ({"fused_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2}, "keeps no gradient to add to"),
        ({"fused_backward": True, "grad_clip_method": "update", "optimizer": "optimi-sgd"}, "cannot clip updates"),
        (
            {"fused_backward": True, "max_grad_norm": 0, "optimizer": "prodigy", "learning_rate": 1},
            "all weights together",
        ),
        ({"optimizer": "prodigy"}, "choose 1"),
        ({"optimizer": "adamw_schedulefree", "use_ema": True}, "averages the weights itself"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "needs no schedule"),
        ({"optimizer": "adamw_schedulefree", "optimizer_beta1": 0, "optimizer_beta2": 0.9}, "above 0"),
        ({"ema_decay": 1}, "less than 1"),
        ({"ema_device": "disk"}, "accelerator, cpu"),
    ],
)
def test_what_contradicts_is_refused(settings, sentence):
    with pytest.raises(SettingError, match=sentence):
        OptimizerSettings(**settings)


def test_what_only_a_run_tells_is_checked_with_it():
    OptimizerSettings(lr_warmup_steps=9).check_run(10, full_fine_tune=False)
    with pytest.raises(SettingError, match="the run has 9 optimiser steps"):
        OptimizerSettings(lr_warmup_steps=9).check_run(9, full_fine_tune=False)
    fused = OptimizerSettings(fused_backward=True, grad_clip_method="update")
    fused.check_run(10, full_fine_tune=True)
    with pytest.raises(SettingError, match="train all weights"):
        fused.check_run(10, full_fine_tune=False)


@pytest.mark.parametrize(
    ("optimizer", "settings", "sentence"),
    [
        (
            "torch-adamw",
            {"optimizer_config": "epsilon=1"},
            "has epsilon, which torch-adamw does not know. It knows .*eps",
        ),
        ("torch-adamw", {"optimizer_config": "fused=false"}, "has fused"),
        ("torch-adamw", {"optimizer_config": "eps=-1"}, "torch-adamw refuses: Invalid epsilon"),
        (
            "optimi-adan",
            {"optimizer_beta1": 0.9, "optimizer_beta2": 0.9},
            r"3 betas. Set optimizer_config to \"betas=\(",
        ),
        ("adafactor", {"optimizer_beta1": 0.9, "optimizer_beta2": 0.9}, "0 betas. Leave them out"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_are_refused(optimizer, settings, sentence):
    with pytest.raises(SettingError, match=sentence):
        build_optimizer(groups(), OptimizerSettings(optimizer=optimizer, **settings), seed=0)


def test_arguments_arrive():
    settings = OptimizerSettings(
        optimizer_config="eps=1e-5", optimizer_beta1=0.8, optimizer_beta2=0.95, weight_decay=0.2, learning_rate=1e-3
    )
    (group,) = build_optimizer(groups(lr=5e-3), settings, seed=0).param_groups
    assert (group["eps"], group["betas"], group["weight_decay"], group["lr"]) == (1e-5, (0.8, 0.95), 0.2, 5e-3)
    (group,) = build_optimizer(groups(), OptimizerSettings(), seed=0).param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 0.01, 1e-4)


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(SettingError, match="Run `pip install --upgrade bitsandbytes`, or choose one of adamw_bf16"):
        build_optimizer(groups(), OptimizerSettings(optimizer="bnb-adamw8bit"), seed=0)


def test_prodigy_has_one_learning_rate():
    two = [*groups(lr=1), {**groups(lr=16)[0], "names": ["other"]}]
    with pytest.raises(SettingError, match="ratio of LoRA"):
        build_optimizer(two, OptimizerSettings(optimizer="prodigy", learning_rate=1), seed=0)


def factors(total, **settings):
    settings = OptimizerSettings(learning_rate=1e-4, **{"lr_end": 1e-5, **settings})
    return [learning_rate_factor(step, total, settings) for step in range(total)]


# Four steps of warm-up, then p = 0, 1/4, 1/2 and 3/4; lr_end is a tenth of the learning rate.
WARMUP = [1 / 5, 2 / 5, 3 / 5, 4 / 5]
ROOT = math.sqrt(1 / 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler": "constant"}, [1, 1, 1, 1]),
        ({"lr_scheduler": "constant_with_warmup"}, [1, 1, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "cosine"}, [1, 0.1 + 0.45 * (1 + ROOT), 0.55, 0.1 + 0.45 * (1 - ROOT)]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1, 0.55, 1, 0.55]),
        ({"lr_scheduler": "polynomial", "lr_power": 2}, [1, 0.1 + 0.9 * 9 / 16, 0.1 + 0.9 / 4, 0.1 + 0.9 / 16]),
        ({"lr_scheduler": "sine"}, [0.55, 0.1 + 0.45 * (1 + ROOT), 1, 0.1 + 0.45 * (1 + ROOT)]),
    ],
)
def test_learning_rates_by_hand(settings, expected):
    assert factors(8, lr_warmup_steps=4, **settings) == pytest.approx(WARMUP + expected)
    assert factors(4, **settings) == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_step_is_without_effect_and_a_longer_run_is_a_longer_period(scheduler):
    few = factors(10, lr_scheduler=scheduler, lr_warmup_steps=3, lr_end=0)
    assert all(0 < factor <= 1 for factor in few)
    short, long = factors(10, lr_scheduler=scheduler), factors(100, lr_scheduler=scheduler)
    assert long[::10] == pytest.approx(short)


def test_the_learning_rate_of_every_group_follows():
    optimizer = build_optimizer([*groups(1e-4), *groups(16e-4)], OptimizerSettings(), seed=0)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25e-4, 4e-4])
