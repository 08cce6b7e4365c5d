"""Optimisers with states of few bits: continued exactly, in the backward pass, torchao's without a compiler."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training.config.optim import OPTIMIZERS, OptimizerSettings
from training.files import write_tensors
from training.optim.backward import OptimizerInBackward, update_rms
from training.optim.build import build_optimizer
from training.optim.schedule import set_learning_rate
from training.optim.state import load_optimizer_tensors, optimizer_tensors
from training.optim.step import step_optimizer

NAMES = ("ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8")
MISSING = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BNB = [pytest.param(name, marks=MISSING) for name in OPTIMIZERS if name.startswith("bnb-")]


def weights(dtype):
    """Two large enough for their states to be quantised, and one that is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (64, 64), "last.weight": (64, 64), "layer.bias": (5,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def optimizer_of(name, weights, **more):
    settings = OptimizerSettings(optimizer=name, learning_rate=1e-2, **more)
    groups = [{"params": list(weights.values()), "names": list(weights), "lr": 1e-2}]
    return (OptimizerInBackward if settings.fused_backward else build_optimizer)(groups, settings, seed=3)


def train(weights, steps, *optimizers):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for optimizer in optimizers:
            set_learning_rate(optimizer, 1 / (1 + step))
        noise = [torch.randn(weight.shape, generator=generator) for weight in weights.values()]
        sum(((w - 0.3) ** 2 / 2 + n * w).sum() for w, n in zip(weights.values(), noise, strict=True)).backward()
        for optimizer in optimizers:
            if not isinstance(optimizer, OptimizerInBackward):
                step_optimizer(optimizer, torch.tensor(True))
                optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a.keys() | b.keys())


@pytest.fixture
def nothing_is_compiled():
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    assert not counters["frames"]


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("name", [*NAMES, *BNB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_bit_for_bit(name, dtype, tmp_path):
    through, before = weights(dtype), weights(dtype)
    optimizer, optimizer_before = optimizer_of(name, through), optimizer_of(name, before)
    train(through, range(10), optimizer)
    torch.manual_seed(99)  # the noise of rounding is not of the random numbers that others draw
    train(before, range(5), optimizer_before)

    tensors, scalars = optimizer_tensors(optimizer_before)
    assert name not in NAMES or "exp_avg/codes.layer.weight" in tensors
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    after = {key: nn.Parameter(weight.detach().clone()) for key, weight in before.items()}
    resumed = optimizer_of(name, after)
    load_optimizer_tensors(resumed, load_file(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(scalars)))
    train(after, range(5, 10), resumed)
    assert same(after, through)
    assert same(optimizer_tensors(resumed)[0], optimizer_tensors(optimizer)[0])
    assert optimizer_tensors(resumed)[1] == optimizer_tensors(optimizer)[1]


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("name", NAMES)
def test_in_the_backward_pass_weights_become_the_same(name):
    plain, fused, clipped = (weights(torch.bfloat16) for _ in range(3))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(plain, range(3), *(optimizer_of(name, {key: weight}) for key, weight in plain.items()))
    train(fused, range(3), optimizer_of(name, fused, fused_backward=True, max_grad_norm=0))
    assert torch.equal(torch.rand(3), expected)
    assert same(fused, plain)

    optimizer = optimizer_of(name, clipped, fused_backward=True, grad_clip_method="update")
    train(clipped, range(3), optimizer)
    assert optimizer.narrows
    rms = update_rms(torch.full((64, 64), 1e3), optimizer.optimizers[0])
    assert rms.item() == pytest.approx(math.sqrt((1 - 0.999**4) / 0.001), rel=0.02)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-2 / 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    made = weights(torch.float32)
    optimizer = optimizer_of(name, made)
    train(made, range(2), optimizer)
    before = {key: weight.detach().clone() for key, weight in made.items()}
    state = {key: value.clone() for key, value in optimizer_tensors(optimizer)[0].items()}
    made["layer.weight"].grad = torch.full((64, 64), math.nan)
    step_optimizer(optimizer, torch.tensor(False))
    assert same(made, before)
    assert same(optimizer_tensors(optimizer)[0], state)
