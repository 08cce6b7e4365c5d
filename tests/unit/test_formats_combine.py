"""Merging, resizing and extracting adapters, against plain matrices."""

import pytest
import torch

from training.adapter.formats.combine import combine, extract
from training.adapter.formats.layers import Adapters, Layer, shapes
from training.adapter.formats.low_rank import of_matrix, of_product
from training.adapter.formats.read import adapters_of
from training.adapter.formats.write import written
from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer

NANO = TransformerConfig(
    dim=24, layers=2, refiner_layers=1, heads=6, kv_heads=2, caption_dim=8, ffn_dim=32, channels=4, axes_dim=(2, 2, 0)
)
OUT, QKV = "layers.0.attention.out", "layers.0.attention.qkv"


def lora(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = {"A": torch.randn(rank, columns, generator=generator), "B": torch.randn(rows, rank, generator=generator)}
    return Layer("lora", draw)


def best(matrix, rank):
    """What no product of a rank can express of a matrix, relatively: Eckart and Young."""
    sizes = torch.linalg.svdvals(matrix.double())
    return float(sizes[rank:].norm() / sizes.norm())


def test_several_become_one_that_adds_what_they_add():
    first = Adapters(
        NANO, {(OUT, ""): lora(24, 24, 3, 0), (QKV, "q"): lora(24, 24, 2, 1), (QKV, "v"): lora(8, 24, 2, 2)}
    )
    second = Adapters(NANO, {(OUT, ""): lora(24, 24, 2, 3), (QKV, ""): lora(40, 24, 3, 4)})
    third = Adapters(NANO, {(OUT, ""): Layer("diff", {"diff": torch.randn(24, 24)})})
    exact = combine([(first, 0.5), (second, -1.0)])
    assert exact.relative_error == 0
    assert {layer.rank for layer in exact.adapters.layers.values()} == {5, 7}
    for module in (OUT, QKV):
        expected = 0.5 * first.delta(module, None) - second.delta(module, None)
        assert torch.allclose(exact.adapters.delta(module, None), expected, atol=1e-5)
    with_difference = combine([(second, 1.0), (third, 2.0)])
    kinds = {name: layer.kind for (name, _), layer in with_difference.adapters.layers.items()}
    assert kinds == {OUT: "diff", QKV: "lora"}
    expected = second.delta(OUT, None) + 2 * third.delta(OUT, None)
    assert torch.allclose(with_difference.adapters.delta(OUT, None), expected, atol=1e-5)
    reduced = combine([(second, 1.0), (third, 2.0)], rank=4)
    exact, found = (torch.cat([c.adapters.delta(m, None) for m in (OUT, QKV)]) for c in (with_difference, reduced))
    gone, whole = (exact - found).square().sum(), exact.square().sum()
    assert reduced.relative_error == pytest.approx(float((gone / whole).sqrt()), rel=1e-3)
    assert reduced.adapters.layers[QKV, ""].rank == 3, "a smaller one stays as it is"
    assert "ranks 3 to 4, relative error" in reduced.note


def test_what_is_merged_keeps_what_calls_it_up():
    said = [{"modelspec.title": title, "modelspec.trigger_phrase": "zorblax", "ss_steps": "7"} for title in "ab"]
    given = [Adapters(NANO, {(OUT, ""): lora(24, 24, 2, 0)}, about) for about in (*said, {})]
    merged = combine([(adapters, 1.0) for adapters in given]).adapters
    assert merged.metadata == {"modelspec.title": "a + b", "modelspec.trigger_phrase": "zorblax"}
    assert combine([(given[0], 1.0)]).adapters.metadata == said[0]


def test_another_rank_is_the_nearest_there_is():
    start = Adapters(NANO, {(OUT, ""): lora(24, 24, 8, 0)}, {"ss_seed": "7"})
    smaller = combine([(start, 1.0)], rank=3)
    assert smaller.adapters.layers[OUT, ""].rank == 3
    assert smaller.relative_error == pytest.approx(best(start.delta(OUT, None), 3), rel=1e-4)
    assert written(smaller.adapters).metadata["ss_seed"] == "7"
    assert written(smaller.adapters).metadata["ss_network_dim"] == "3"
    assert combine([(start, 1.0)], rank=8).relative_error == 0
    dora = Adapters(NANO, {(OUT, ""): Layer("lora", start.layers[OUT, ""].factors, magnitude=torch.ones(24, 1))})
    with pytest.raises(ModelError, match="Wire the MODEL"):
        combine([(dora, 1.0)], rank=3)
    weight = torch.randn(24, 24)
    found = combine([(dora, 1.0)], rank=24, base=lambda module: weight)
    expected = weight + start.delta(OUT, None)
    expected = expected / expected.norm(dim=1, keepdim=True) - weight
    assert torch.allclose(found.adapters.delta(OUT, None), expected, atol=1e-4)


def test_low_ranks_of_large_weights_are_as_good_as_exact_ones():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 520, generator=generator))[0] for n in (640, 600))
    matrix = left @ torch.diag(1 / torch.arange(1.0, 521)) @ right.T
    a, b = of_matrix(matrix, 16)
    assert float((matrix - b @ a).norm() / matrix.norm()) < 1.001 * best(matrix, 16)
    again, _ = of_matrix(matrix, 16)
    assert torch.equal(a, again)
    whole = torch.randn(16, 600, generator=generator), torch.randn(640, 16, generator=generator)
    a, b = of_product(*whole, 5)
    product = whole[1] @ whole[0]
    assert float((product - b @ a).norm() / product.norm()) == pytest.approx(best(product, 5), rel=1e-3)


def test_what_leads_from_one_model_to_another_is_extracted():
    torch.manual_seed(0)
    base = {name: torch.randn(w.shape) for name, w in Lumina2Transformer(NANO).state_dict().items()}
    tuned = {name: weight.clone() for name, weight in base.items()}
    change = lora(40, 24, 3, 5)
    tuned[f"{QKV}.weight"] += change.factors["B"] @ change.factors["A"]
    tuned["layers.1.attention_norm1.weight"] += 0.5
    tuned["x_embedder.bias"] += 0.25
    seen = []
    found = extract(base, tuned, NANO, 4, watch=lambda done, total: seen.append((done, total)))
    assert {place[0] for place in found.adapters.layers} == {QKV, "layers.1.attention_norm1", "x_embedder"}
    assert found.adapters.layers[QKV, ""].rank == 4
    assert found.relative_error < 1e-4
    assert seen[-1] == (len(shapes(NANO)) - 1, len(shapes(NANO)))
    again = adapters_of(written(found.adapters).tensors, {}, NANO)
    for module in again.modules:
        delta = again.delta(module, None)
        weight = f"{module}.weight"
        assert torch.allclose(base[weight] + delta, tuned[weight], atol=1e-4), module
    assert torch.allclose(again.layers["x_embedder", ""].bias, torch.full((24,), 0.25), atol=1e-6)
    assert not again.layers["x_embedder", ""].factors
    twice = combine([(found.adapters, 2.0)])
    assert not twice.adapters.layers["x_embedder", ""].factors, "what has a bias alone stays so"
    linear = {name: weight if name == f"{QKV}.weight" else base[name] for name, weight in tuned.items()}
    of_rank_1 = best(change.factors["B"] @ change.factors["A"], 1)
    assert extract(base, linear, NANO, 1).relative_error == pytest.approx(of_rank_1, rel=1e-3)
    assert extract(base, tuned, NANO, 0).adapters.layers[QKV, ""].kind == "diff"
    with pytest.raises(ModelError, match="nothing to extract"):
        extract(base, base, NANO, 4)
    with pytest.raises(ModelError, match=r"x_embedder\.weight is \(24, 16\) and missing"):
        extract(base, {k: w for k, w in tuned.items() if k != "x_embedder.weight"}, NANO, 4)


def test_what_cannot_be_combined_is_told():
    start = Adapters(NANO, {(OUT, ""): lora(24, 24, 3, 0)})
    other = Adapters(TransformerConfig(layers=1), {(OUT, ""): lora(2304, 2304, 1, 0)})
    with pytest.raises(ModelError, match="belong to different models"):
        combine([(start, 1.0), (other, 1.0)])
    with pytest.raises(SettingError, match="loras is"):
        combine([])
    with pytest.raises(SettingError, match="rank is -1"):
        combine([(start, 1.0)], rank=-1)
