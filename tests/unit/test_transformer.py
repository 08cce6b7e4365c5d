"""The transformer: nothing but the samples decides its output, and its quick functions are the plain formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training.adapter.adapter import add_adapter
from training.config.adapter import LoRASettings
from training.model import fused
from training.model.config import TransformerConfig
from training.model.linear import Linear, lora_linear
from training.model.packing import Spans, interleave, last_rows, pack
from training.model.transformer import Lumina2Transformer

SMALL = TransformerConfig(
    dim=96, layers=2, refiner_layers=2, heads=6, kv_heads=2, caption_dim=40, ffn_dim=160, axes_dim=(4, 6, 6)
)


@pytest.fixture(autouse=True)
def _drawn():
    torch.manual_seed(0)


def transformer(config=SMALL):
    model = Lumina2Transformer(config).requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.1)
    return model


def inputs(lengths, height=8, width=12):
    batch = len(lengths)
    latents = torch.randn(batch, 16, height, width)
    return latents, torch.rand(batch), torch.randn(batch, max(lengths), SMALL.caption_dim), lengths


def gradients(model, names, seen):
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in names))
        weight.grad = None
    model(*seen).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 9, 9, 3), (3, 5, 9)])
def test_a_batch_is_its_samples_one_by_one(lengths):
    model = transformer()
    latents, t, captions, _ = inputs(lengths)
    together = model(latents, t, captions, lengths)
    for n, length in enumerate(lengths):
        alone = model(latents[n : n + 1], t[n : n + 1], captions[n : n + 1, :length], (length,))
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-4, atol=1e-5)


def test_padding_and_order_change_nothing():
    model = transformer()
    latents, t, captions, lengths = inputs((4, 9, 4))
    expected = model(latents, t, captions, lengths)
    padded = F.pad(captions, (0, 0, 0, 30), value=1e3)
    assert torch.equal(model(latents, t, padded, lengths), expected)
    order = [2, 0, 1]
    sorted_ = model(latents[order], t[order], captions[order], tuple(lengths[n] for n in order))
    torch.testing.assert_close(sorted_, expected[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 5), (7, 4)])
@pytest.mark.parametrize(("every", "selective"), [(1, False), (2, False), (1, True)])
def test_checkpointed_gradients_are_the_plain_ones(lengths, every, selective):
    model, seen = transformer(), inputs(lengths)
    plain = gradients(model, ["attention"], seen)
    model.checkpoint_every, model.checkpoint_selective = every, selective
    again = gradients(model, ["attention"], seen)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_what_is_kept_may_wait_in_the_cpu_memory():
    model, seen = transformer(), inputs((5, 3))
    model.checkpoint_every = 1
    plain = gradients(model, ["attention"], seen)
    model.checkpoint_offload = True
    again = gradients(model, ["attention"], seen)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("selective", [False, True])
def test_a_lora_learns_the_same_with_checkpointing(selective):
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        model, seen = transformer(), inputs((5, 3))
        adapter = add_adapter(model, LoRASettings(4, targets="blocks"), 0)
        with torch.no_grad():
            for weight in adapter.weights.values():
                weight.normal_(0, 0.1)
        model.checkpoint_every, model.checkpoint_selective = every, selective
        model(*seen).square().mean().backward()
        found.append({name: weight.grad for name, weight in adapter.weights.items()})
    plain, again = found
    assert all(torch.equal(plain[name], again[name]) for name in plain)


class Saved:
    """Bytes that are kept for the backward pass."""

    def __init__(self):
        self.storages = {}

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)

    def _note(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


def test_checkpointing_keeps_less_and_selective_lies_between():
    model, seen = transformer(replace(SMALL, layers=8)), inputs((6, 6))
    model.requires_grad_(False)
    model.layers[0].attention.qkv.weight.requires_grad_()
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept = {}
    for name, every, selective in [("off", 0, False), ("full", 1, False), ("second", 2, False)]:
        model.checkpoint_every, model.checkpoint_selective = every, selective
        with Saved() as saved:
            out = model(*seen)
        kept[name] = sum(size for pointer, size in saved.storages.items() if pointer not in weights)
        out.sum().backward()
    assert kept["full"] < kept["second"] < kept["off"]
    assert kept["full"] < 0.25 * kept["off"]


def count_products(model, seen):
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
                self.total += 1
            return function(*args, **(kwargs or {}))

    with Count() as forward:
        out = model(*seen)
    with Count() as backward:
        out.square().mean().backward()
    return forward.total, backward.total


def test_nothing_is_propagated_below_the_first_trained_layer():
    model, seen = transformer(), inputs((5, 5))
    model.layers[1].attention.out.weight.requires_grad_()
    _, few = count_products(model, seen)
    model.noise_refiner[0].attention.qkv.weight.requires_grad_()
    _, many = count_products(model, seen)
    assert few == 1 + 3 + 1  # the final layer, the last feed-forward, and the gradient of the weight itself
    assert many > 3 * few


def test_selective_checkpointing_computes_no_product_again():
    model, seen = transformer(), inputs((5, 5))
    model.layers[0].attention.qkv.weight.requires_grad_()
    plain = count_products(model, seen)
    model.checkpoint_every, model.checkpoint_selective = 1, True
    assert count_products(model, seen) == plain
    model.checkpoint_selective = False
    assert count_products(model, seen)[1] > plain[1]


def test_captions_may_be_refined_before():
    model = transformer()
    latents, t, captions, lengths = inputs((4, 9, 4))
    assert torch.equal(
        model.predict(latents, t, model.refine(captions, lengths), lengths), model(latents, t, captions, lengths)
    )


# The quick functions


def spans_and_rows():
    spans = Spans.of_lengths((3, 3, 5))
    return spans, torch.randn(spans.rows, 12, dtype=torch.float64)


def per_row(by_sample):
    return by_sample[[0] * 3 + [1] * 3 + [2] * 5]


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def formulas():
    spans, x = spans_and_rows()
    branch, weight, by_sample = torch.randn_like(x), torch.randn(12).double(), torch.randn(3, 12).double()
    yield (
        "norm_gain of each sample",
        lambda x, g: fused.norm_gain(x, g.float(), spans, 1e-5),
        lambda x, g: norm(x, per_row(g)),
        (x, by_sample),
    )
    yield "norm_gain", lambda x, g: fused.norm_gain(x, g.float(), spans, 1e-5), norm, (x, weight)
    yield (
        "add_normed of each sample",
        lambda x, b, g: fused.add_normed(x, b, g.float(), spans, 1e-5),
        lambda x, b, g: x + norm(b, per_row(g)),
        (x, branch, by_sample),
    )
    yield (
        "add_normed",
        lambda x, b, g: fused.add_normed(x, b, g.float(), spans, 1e-5),
        lambda x, b, g: x + norm(b, g),
        (x, branch, weight),
    )
    yield "swiglu", fused.swiglu, lambda a, b: a * torch.sigmoid(a) * b, (x, branch)
    angle = torch.rand(11, 2) * 6
    turns = torch.stack((angle.cos(), angle.sin()), -1)

    def heads(qkv, gain):  # three that ask, two that answer
        parts = fused.split_heads(qkv, gain.float(), 3, turns, spans, 1e-5)
        kinds = zip(*parts, strict=True)
        packed = [torch.cat([part.transpose(1, 2).flatten(0, 1) for part in kind]) for kind in kinds]
        return torch.cat(packed, 1)

    def turned(qkv, gain):
        qk, values = qkv.view(11, 7, 4).split((5, 2), 1)
        pairs = torch.view_as_complex(norm(qk, gain).unflatten(-1, (2, 2)))
        return torch.cat((torch.view_as_real(pairs * torch.view_as_complex(turns)[:, None]).flatten(-2), values), 1)

    yield "split_heads", heads, turned, (torch.randn(11, 28), torch.randn(5, 4))


@pytest.mark.parametrize("which", range(6))
def test_quick_functions_are_the_plain_formulas(which):
    name, quick, plain, arguments = list(formulas())[which]
    results = []
    for function in (quick, plain):
        leaves = [a.detach().float().requires_grad_() for a in arguments]
        out = function(*leaves)
        direction = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (out * direction).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("which", range(6))
def test_quick_functions_in_bf16_stay_near_the_formulas(which):
    _, quick, plain, arguments = list(formulas())[which]
    rounded = [a.bfloat16() for a in arguments]
    expected = plain(*(a.float() for a in rounded))
    out = quick(*rounded)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_a_weight_stored_in_bf16_computes_in_fp32_and_keeps_no_copy():
    layer = Linear(24, 16).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(5, 24, requires_grad=True)
    with Saved() as saved:
        out = layer(x)
    assert saved.bytes <= 16 * 4
    expected = F.linear(x, layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, reference)
    layer.weight.requires_grad_()
    layer(x).square().sum().backward()
    weight = layer.weight.detach().float().requires_grad_()
    F.linear(x, weight, layer.bias.float()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.float(), weight.grad, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_lora_in_one_function_is_two_products_beside_the_layer(stored):
    base = Linear(24, 16, bias=False).to(stored).requires_grad_(False)
    results = []
    for quick in (True, False):
        torch.manual_seed(1)
        x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 24), (4, 24), (16, 4)))
        out = lora_linear(x, base, a, b, 0.5) if quick else F.linear(x, base.weight.float()) + 0.5 * x @ a.T @ b.T
        out.square().sum().backward()
        results.append((out, x.grad, a.grad, b.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_packing_puts_samples_one_behind_the_other():
    lengths = (2, 2, 1)
    padded = torch.arange(9).view(3, 3)[..., None]
    assert pack(padded, lengths).flatten().tolist() == [0, 1, 3, 4, 6]
    texts, images = Spans.of_lengths(lengths), Spans.of_lengths((2, 2, 2))
    joint = interleave(torch.tensor([0, 1, 3, 4, 6]), torch.tensor([10, 11, 12, 13, 14, 15]), texts, images)
    assert joint.tolist() == [0, 1, 10, 11, 3, 4, 12, 13, 6, 14, 15]
    both = Spans.of_lengths((4, 4, 3))
    assert last_rows(joint, both, 2).tolist() == [[10, 11], [12, 13], [14, 15]]
