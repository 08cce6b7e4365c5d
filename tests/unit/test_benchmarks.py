"""Benchmarks measure what they say."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import step_time


def in_place_flops(_, left, right, **__):
    """``addmm_``, which torch does not count."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("lengths", [(5,), (3, 9, 9)])
def test_the_floor_computes_what_arithmetic_says(lengths):
    config = replace(step_time.NANO, dim=96, heads=6, kv_heads=2, layers=2, ffn_dim=160, axes_dim=(4, 6, 6))
    model = step_time.random_transformer(config, torch.float32)
    batch = step_time.make_batch(config, lengths, torch.float32)
    step = step_time.floor(model, batch)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "mm" in str(op))
    attention = sum(flops for op, flops in counted.items() if "scaled_dot_product" in str(op))
    assert products == step_time.floor_flops(model, batch)
    tokens = sum((n + 256) ** 2 for n in lengths) * config.layers + len(lengths) * 256**2 * config.refiner_layers
    forward = 4 * tokens * config.dim  # q·k and its product with v
    assert attention == 0 or attention == pytest.approx(3.5 * forward, rel=0.01)


def test_a_step_of_ours_computes_no_product_more():
    config = replace(step_time.NANO, dim=96, heads=6, kv_heads=2, layers=2, ffn_dim=160, axes_dim=(4, 6, 6))
    model = step_time.random_transformer(config, torch.float32)
    batch = step_time.make_batch(config, (3, 9, 9), torch.float32)
    step = step_time.ours(model, batch)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "mm" in str(op))
    assert products == step_time.floor_flops(model, batch)
