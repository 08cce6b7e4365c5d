"""Blocks that wait in the CPU's memory compute what they compute on the device, and two at most are there."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from training.adapter.adapter import add_adapter
from training.config.adapter import LoRASettings
from training.config.precision import PrecisionSettings
from training.config.settings import TrainSettings
from training.model.config import TransformerConfig
from training.model.linear import Linear
from training.model.quantise import quantise
from training.model.swap import SLOTS, Copies, CudaCopies
from training.model.transformer import Lumina2Transformer
from training.run.forecast import Shape, forecast, measure, weight_bytes
from training.run.session import _prepare

SMALL = TransformerConfig(
    dim=96, layers=5, refiner_layers=1, heads=6, kv_heads=2, caption_dim=40, ffn_dim=160, axes_dim=(4, 6, 6)
)


def turned(tensor):
    return tensor.contiguous().view(torch.uint8).bitwise_not().view(tensor.dtype)


class Elsewhere(Copies):
    """Another device: all bits of what is kept are turned, so that nothing can be computed with it unnoticed."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.under_way, self.fills = {}, 0

    def keep(self, tensor):
        return turned(tensor)

    def fill(self, slot, pairs):
        assert slot not in self.under_way, "the slot is still in use"
        self.under_way[slot] = pairs
        self.fills += 1

    def use(self, slot):
        for room, kept in self.under_way[slot]:
            room.copy_(turned(kept))

    def leave(self, slot):
        del self.under_way[slot]


def adapted(stored="no_change", **changes):
    torch.manual_seed(0)
    model = Lumina2Transformer(SMALL).requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.1)
    adapter = add_adapter(model, LoRASettings(4, targets="blocks", **changes), 0)
    with torch.no_grad():
        for name, weight in adapter.weights.items():
            if "magnitude" not in name:
                weight.normal_(0, 0.1)
    if stored == "bf16":
        for module in model.modules():
            if type(module) is Linear:
                module.bfloat16()
        model.compute_dtype = torch.float32
    elif stored != "no_change":
        quantise(model, stored)
    return model, adapter


def step(model, adapter):
    torch.manual_seed(1)
    seen = torch.randn(2, 16, 8, 4), torch.rand(2), torch.randn(2, 6, SMALL.caption_dim), (6, 3)
    with torch.no_grad():
        model(*seen)  # as a teacher or a validation looks
    for weight in adapter.weights.values():
        weight.grad = None
    loss = model(*seen).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: weight.grad for name, weight in adapter.weights.items()}}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("checkpointing", [(0, False), (1, False), (2, False), (1, True)])
def test_swapped_blocks_learn_the_same(count, checkpointing):
    expected = step(*adapted())
    model, adapter = adapted()
    model.checkpoint_every, model.checkpoint_selective = checkpointing
    copies = Elsewhere()
    assert model.swap_blocks(count, copies) == min(count, SMALL.layers)
    for _ in range(2):
        assert same(step(model, adapter), expected)
    assert copies.fills > 0


@pytest.mark.parametrize("stored", ["bf16", "int8-torchao", "fp8-torchao"])
def test_so_do_those_that_are_stored_smaller(stored):
    expected = step(*adapted(stored))
    model, adapter = adapted(stored)
    model.swap_blocks(4, Elsewhere())
    assert same(step(model, adapter), expected)


def test_each_block_comes_once_a_pass_and_all_else_stays():
    model, adapter = adapted()
    copies = Elsewhere()
    first, last = model.layers[0], model.layers[4]
    for layer in model.layers:
        layer.attention.out.base_layer.weight.requires_grad_()
    model.swap_blocks(4, copies)
    step(model, adapter)
    before = copies.fills
    step(model, adapter)
    # Two are there when each pass begins: 2 come in each forward pass from the first on, and 2 in the backward pass.
    assert copies.fills - before <= 4 + 4 + 2
    staying = (*first.parameters(), last.attention_norm1.weight, last.attention.out.base_layer.weight)
    assert not {weight.data_ptr() for weight in staying} & kept(model)
    assert model.layers[2].attention.qkv.base_layer.weight.data_ptr() in kept(model)


def kept(model):
    return {place.kept.data_ptr() for places in model.swap._places for place in places}


def test_what_reads_a_weight_finds_it():
    (plain, expected), (model, adapter) = adapted(use_dora=True), adapted(use_dora=True)
    model.swap_blocks(4, Elsewhere())
    found, right = adapter.export()[0], expected.export()[0]
    assert same(found, right)
    assert same(step(model, adapter), step(plain, expected))


class Recorded:
    """What stands for ``torch.cuda``: streams that note what they are told."""

    def __init__(self):
        self.told, self.now = [], "compute"

    def Stream(self, device):  # noqa: N802
        return self._stream("copy")

    def Event(self):  # noqa: N802
        number = len(self.told)
        self.told.append("event")
        recorder = self

        class Event:
            name = f"event {number}"

            def record(self, stream):
                recorder.told.append((stream.name, "records", self.name))

        return Event()

    def _stream(self, called):
        recorder = self

        class Stream:
            name = called

            def wait_event(self, event):
                recorder.told.append((self.name, "waits", event.name))

        return Stream()

    def current_stream(self, device):
        return self._stream("compute")

    @contextmanager
    def stream(self, stream):
        self.now = stream.name
        yield
        self.now = "compute"


def test_on_cuda_copies_wait_for_what_computes_and_that_for_them():
    cuda = Recorded()
    copies = CudaCopies(torch.device("cpu"), cuda)

    class Room:
        def copy_(self, kept, non_blocking):
            cuda.told.append((cuda.now, "copies", non_blocking))

    cuda.told.clear()
    copies.leave(0)
    copies.fill(0, [(Room(), None)])
    copies.use(0)
    (_, _, left), waits, copied, (_, _, filled), used = cuda.told
    assert waits == ("copy", "waits", left)
    assert copied == ("copy", "copies", True)
    assert used == ("compute", "waits", filled)
    assert left != filled


def test_on_a_cpu_it_changes_nothing_and_says_so():
    model = Lumina2Transformer(SMALL).requires_grad_(False)
    state, said = _prepare(model, TrainSettings(precision=PrecisionSettings(musubi_blocks_to_swap=3)))
    assert model.swap is None
    assert state.adapter.weights
    assert "changes nothing on a CPU" in said[-1]


@pytest.mark.parametrize("mode", ["no_change", "int8-torchao"])
def test_the_forecast_counts_all_but_those_that_are_away(mode):
    config = replace(SMALL, dim=192, heads=12, kv_heads=4, layers=6)
    measured = measure(config, Shape(1, 8, 8, 4), lambda m: add_adapter(m, LoRASettings(4), 0))

    def weights(count, device="cuda"):
        precision = PrecisionSettings(base_model_precision=mode, musubi_blocks_to_swap=count)
        return forecast(measured, precision, device_type=device).weights

    block = {n: s for n, s in measured.frozen.items() if n.startswith("layers.5.") and "norm" not in n}
    assert weights(0) == weights(SLOTS)
    assert weights(0) - weights(SLOTS + 3) == 3 * weight_bytes(block, mode, torch.bfloat16) > 0
    assert weights(99) == weights(6)
    assert weights(5, "cpu") == weights(0, "cpu")
