"""The memory forecast against what a step really makes, counted tensor by tensor."""

import argparse
import functools
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training.adapter.lora import add_lora
from training.config.adapter import LoRASettings
from training.config.optim import OPTIMIZERS, OptimizerSettings
from training.config.precision import PrecisionSettings
from training.errors import SettingError
from training.model.config import TransformerConfig
from training.model.linear import release_scratch
from training.model.quantise import quantise
from training.model.transformer import Lumina2Transformer
from training.optim.build import build_optimizer
from training.run.estimate import add_arguments, estimate, lines
from training.run.forecast import (
    GB,
    PRESETS,
    LiveMemory,
    Shape,
    forecast,
    measure,
    savings,
    state_bytes,
    ways_of,
    weight_bytes,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = TransformerConfig(
    dim=192, layers=3, refiner_layers=1, heads=2, kv_heads=1, caption_dim=64, ffn_dim=512, channels=4
)
WIDE = replace(TransformerConfig(), layers=2, refiner_layers=1)  # the real width
SMALL_BATCH, WIDE_BATCH = Shape(2, 24, 16, 9), Shape(1, 64, 64, 64)
FP32, BF16 = torch.float32, torch.bfloat16


def lora(transformer):
    add_lora(transformer, LoRASettings(8), 0)


def some_lora(transformer):
    add_lora(transformer, LoRASettings(8, blocks="2"), 0)


def everything(transformer):
    transformer.requires_grad_(True)


def real_peak(config, shape, adapt, precision, stored, computed, fused=False, memory_less=True):
    """Weights and all that a step makes, at their peak, with every layer there and no forecast's arithmetic."""
    with torch.device("meta"):
        model = Lumina2Transformer(config).requires_grad_(False)
    adapt(model)
    if precision.quantised:
        quantise(model, precision.base_model_precision)
    release_scratch()
    with FakeTensorMode() if memory_less else nullcontext():
        return step_peak(model, config, shape, precision, stored, computed, fused, adapt is everything)


def step_peak(model, config, shape, precision, stored, computed, fused, full):
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                floating = p.dtype.is_floating_point and p.element_size() == 4
                dtype = stored if floating and (full or not p.requires_grad) else p.dtype
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    if fused:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    parameters = sum(p.numel() for p in model.parameters())
    model.checkpoint_every = precision.checkpoint_every(parameters)
    model.checkpoint_selective = precision.gradient_checkpointing_selective
    model.compute_dtype = computed
    latents = torch.empty(shape.batch, config.channels, shape.height, shape.width)
    captions = torch.empty(shape.batch, shape.tokens, config.caption_dim)
    memory = LiveMemory(model.parameters())
    with memory:
        out = model(latents, torch.empty(shape.batch), captions, (shape.tokens,) * shape.batch)
        loss = (out.float() - latents).square().mean()
        del out
        loss.backward()
    release_scratch()
    return sum(
        t.nbytes for t in (*model.parameters(), *model.buffers())
    ), memory.peak + latents.nbytes + captions.nbytes


CASES = {
    "checkpointed": (lora, {"gradient_checkpointing": True}, BF16, FP32),
    "not checkpointed": (lora, {"gradient_checkpointing": False}, BF16, FP32),
    "every other": (lora, {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2}, FP32, FP32),
    "selective": (lora, {"gradient_checkpointing": True, "gradient_checkpointing_selective": True}, FP32, FP32),
    "some layers": (some_lora, {"gradient_checkpointing": False}, BF16, FP32),
    "int8": (lora, {"gradient_checkpointing": True, "base_model_precision": "int8-torchao"}, BF16, FP32),
    "int8, in bf16": (lora, {"gradient_checkpointing": True, "base_model_precision": "int8-torchao"}, BF16, BF16),
    "full": (everything, {"gradient_checkpointing": True}, BF16, FP32),
    "full, not checkpointed": (everything, {"gradient_checkpointing": False}, BF16, FP32),
}


SIZES = {"small": (SMALL, SMALL_BATCH), "wide": (WIDE, WIDE_BATCH)}


@pytest.mark.parametrize(
    ("size", "case", "fused"),
    [*(("small", case, False) for case in CASES), ("wide", "int8", False), ("wide", "full", True)],
)
def test_the_forecast_is_what_a_step_makes(size, case, fused):
    (config, shape), (adapt, settings, stored, computed) = SIZES[size], CASES[case]
    precision = PrecisionSettings(**settings)
    weights, made = real_peak(config, shape, adapt, precision, stored, computed, fused)
    measured = measure(config, shape, adapt, stored, computed, ways_of(precision, precision.checkpoint_every(0)))
    measured = replace(measured, largest_trained=0)  # no optimiser takes a step here
    found = forecast(measured, precision, fused_backward=fused, process=0)
    assert found.weights + found.adapter == pytest.approx(weights, rel=1e-3)
    assert found.activations + found.gradients == pytest.approx(made, rel=0.1)


def test_tensors_without_memory_are_counted_like_real_ones():
    precision = PrecisionSettings(gradient_checkpointing=True)
    of = (SMALL, SMALL_BATCH, lora, precision, FP32, FP32)
    assert real_peak(*of, memory_less=False) == pytest.approx(real_peak(*of), rel=0.02)


@pytest.mark.parametrize("adapt", [lora, everything])
def test_a_large_batch_is_told_without_being_measured(adapt, monkeypatch):
    told = measure(SMALL, replace(SMALL_BATCH, batch=20), adapt, BF16, FP32)
    monkeypatch.setattr("training.run.forecast.MEASURED_BATCH", 20)
    measured = measure(SMALL, replace(SMALL_BATCH, batch=20), adapt, BF16, FP32)
    for checkpointing in (True, False):
        precision = PrecisionSettings(gradient_checkpointing=checkpointing)
        expected = forecast(measured, precision, process=0).activations
        assert forecast(told, precision, process=0).activations == pytest.approx(expected, rel=1e-3)


def test_measuring_leaves_no_trace_in_the_thread_that_asks():
    release_scratch()
    first, second = (
        measure(SMALL, SMALL_BATCH, lora, BF16, FP32, ways) for ways in (["none", "full"], ["full", "none"])
    )
    for way, found in first.passes.items():  # nor in what is measured next, but for rotary tables
        assert found.costs == second.passes[way].costs
        assert found.fixed == pytest.approx(second.passes[way].fixed, rel=0.1)
    model = Lumina2Transformer(SMALL).requires_grad_(False).bfloat16()
    model.compute_dtype = FP32
    out = model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 3, 64), (3,))
    assert type(out) is torch.Tensor
    assert out.isfinite().all()


@pytest.mark.parametrize("mode", ["no_change", "int8wo", "fp8-torchao"])
def test_weights_take_what_is_said(mode):
    model = Lumina2Transformer(SMALL).requires_grad_(False).bfloat16()
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if mode != "no_change":
        quantise(model, mode)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert weight_bytes(shapes, mode, BF16) == held


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if not n.startswith("bnb-")])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_states_take_what_is_said(name, dtype):
    weight = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype))
    group = {"params": [weight], "names": ["w"], "lr": 1.0}
    optimizer = build_optimizer([group], OptimizerSettings(name, 1.0 if name == "prodigy" else 1e-3), 0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
                held += sum(getattr(value, p).nbytes for p in parts) if parts else value.nbytes
    expected = weight.numel() * state_bytes(name, weight.element_size())
    assert expected == pytest.approx(held, rel=0.05, abs=8192)


def test_an_unknown_optimiser_is_told():
    with pytest.raises(SettingError, match="memory is not known; known are adamw_bf16"):
        state_bytes("adamv", 4)


@pytest.fixture(scope="module")
def real():
    """Rank 16 at 1024 px on a GPU."""
    return measure(TransformerConfig(), Shape(), lambda t: add_lora(t, LoRASettings(16), 0))


@pytest.mark.parametrize(("mode", "most"), [("no_change", 8), ("int8-torchao", 5.5)])
def test_a_lora_of_the_real_model_fits_a_small_gpu(real, mode, most):
    found = forecast(real, PrecisionSettings(base_model_precision=mode), device_type="cuda")
    assert 0.55 * most * GB < found.total <= most * GB
    assert "not measured" in found.notes[0]


@functools.cache
def real_full():
    return measure(TransformerConfig(), Shape(), everything, ways=["full"])


@pytest.mark.parametrize("size", PRESETS)
def test_presets_fit_their_gpus(size):
    """Where the figures are not the documents': `python . estimate …`, docs/hardware.md and docs/hardware.zh.md."""
    preset = PRESETS[size]
    measured = measure(
        TransformerConfig(),
        Shape(preset.batch_size),
        lambda t: add_lora(t, LoRASettings(preset.rank), 0),
        ways=["full"],
    )
    found = forecast(measured, preset.precision, device_type="cuda")
    assert 0.4 * size * GB < found.total < 0.9 * size * GB
    said = [forecast(measured, preset.precision, "adamw_bf16", device_type="cuda").total]
    if preset.full_fine_tune:
        said.append(forecast(real_full(), preset.precision, preset.full_fine_tune, True, "cuda").total)
        assert said[1] < 0.92 * size * GB
    for page in ("hardware.md", "hardware.zh.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        told = re.findall(rf"^\| {size} GB \|.*\| ([\d.]+) GB \|", text, re.MULTILINE)
        assert [float(each) for each in told] == pytest.approx([total / GB for total in said], abs=0.06)


def test_savings_are_differences_of_forecasts(real):
    off = PrecisionSettings(gradient_checkpointing=False)
    found = savings(real, off, device_type="cuda")
    for switch, changed in (
        ("gradient_checkpointing = true", PrecisionSettings(gradient_checkpointing=True)),
        ("base_model_precision = int8-torchao", replace(off, base_model_precision="int8-torchao")),
    ):
        assert found[switch] == (
            forecast(real, off, device_type="cuda").total - forecast(real, changed, device_type="cuda").total
        )
    assert list(found.values()) == sorted(found.values(), reverse=True)
    on = savings(real, PrecisionSettings(gradient_checkpointing=True), device_type="cuda")
    assert "gradient_checkpointing = true" not in on
    assert "gradient_checkpointing_backend = unsloth" in on


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_line_tells_parts_and_savings():
    found = estimate(parse("--resolution", "512", "--batch-size", "1"))
    assert sum(found["parts"].values()) == found["total"]
    assert found["preset"] == 8
    text = lines(found)
    assert "model weights           5.22 GB" in text
    assert "base_model_precision = int8-torchao" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tokens", "300"), "tokens is 300; choose a number from 1 to 299"),
        (("--full", "--base-model-precision", "int8wo"), "in a full fine-tune"),
        (("--fused-backward",), "with --full only"),
    ],
)
def test_what_cannot_be_estimated_is_told(arguments, sentence):
    with pytest.raises(SettingError, match=sentence):
        estimate(parse(*arguments))
