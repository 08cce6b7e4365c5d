"""Adapter files: every chain of formats keeps what a file adds, and the names of other trainers are read."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from training.adapter.formats import DTYPE_NAMES, FORMAT_NAMES
from training.adapter.formats.fuse import join_layers, split_layer
from training.adapter.formats.layers import Adapters, Layer, add_to, change, no_base, shapes
from training.adapter.formats.read import PEFT_SETTINGS, adapters_of, read_adapters
from training.adapter.formats.strengths import block_strengths
from training.adapter.formats.write import DTYPES, FORMATS, write_adapters, written
from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer

NANO = TransformerConfig(
    dim=24, layers=3, refiner_layers=1, heads=6, kv_heads=2, caption_dim=8, ffn_dim=32, channels=4, axes_dim=(2, 2, 0)
)  # 24 rows of q, 8 of k, 8 of v
SHARED = (NANO, replace(NANO, kv_heads=1), replace(NANO, kv_heads=6))  # 3, 6 or 1 query heads to a key's
REAL = TransformerConfig(layers=1, refiner_layers=0)
KINDS = ("lora", "dora", "dora by columns", "loha", "lokr", "lokr of factors", "glora", "oft", "ia3", "diff")


def draw(generator, *shape):
    return torch.randn(shape, generator=generator)


def layer(kind, rows, columns, rank, generator):
    """A layer of a kind, of any values."""
    if kind == "lora":
        return Layer("lora", {"A": draw(generator, rank, columns), "B": draw(generator, rows, rank)})
    if kind.startswith("dora"):
        lengths = draw(generator, 1, columns) if kind == "dora by columns" else draw(generator, rows, 1)
        plain = layer("lora", rows, columns, rank, generator)
        return Layer("lora", plain.factors, magnitude=lengths.abs() + 0.5)
    if kind == "loha":
        shaped = {
            f"hada_w{n}_{half}": size for n in "12" for half, size in (("a", (rows, rank)), ("b", (rank, columns)))
        }
        return Layer("loha", {name: draw(generator, *size) for name, size in shaped.items()})
    if kind == "lokr":
        return Layer("lokr", {"lokr_w1": draw(generator, 4, 2), "lokr_w2": draw(generator, rows // 4, columns // 2)})
    if kind == "lokr of factors":
        second = {"lokr_w2_a": draw(generator, rows // 4, rank), "lokr_w2_b": draw(generator, rank, columns // 4)}
        return Layer("lokr", {"lokr_w1_a": draw(generator, 4, 1), "lokr_w1_b": draw(generator, 1, 4), **second})
    if kind == "glora":
        shaped = {"a1": (columns, rank), "a2": (rank, columns), "b1": (rows, rank), "b2": (rank, columns)}
        return Layer("glora", {name: draw(generator, *size) for name, size in shaped.items()})
    if kind == "oft":
        return Layer("oft", {"oft_blocks": draw(generator, rows // 4, 4, 4)})
    if kind == "ia3":
        return Layer("ia3", {"weight": draw(generator, rows, 1)})
    return Layer("diff", {"diff": draw(generator, rows, columns)})


def base_of(config, seed=7):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: draw(generator, *shape) for name, shape in shapes(config).items()}
    return weights.__getitem__


def deltas(adapters, base):
    return {module: adapters.delta(module, base) for module in adapters.modules}


def assert_equal(found, expected, within=1e-5):
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert (found[module] - delta).abs().max() <= within * delta.abs().max(), module


def read(result, config=None):
    return adapters_of(result.tensors, result.metadata, config)


@st.composite
def adapters(draw_, kinds):
    config, seed = draw_(st.sampled_from(SHARED)), draw_(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    linear = {name: shape for name, shape in shapes(config).items() if len(shape) == 2}
    layers = {}
    places = st.sampled_from([name for name in linear if re.search(r"attention|feed_forward|adaLN", name)])
    for module in draw_(st.lists(places, min_size=1, max_size=4, unique=True)):
        (rows, columns), parts = linear[module], [""]
        if module.endswith("qkv"):
            parts = draw_(st.sampled_from([[""], ["q", "k", "v"], ["q", "v"], ["k"]]))
        for part in parts:
            own = config.qkv_rows["qkv".index(part)] if part else rows
            kind, rank = draw_(st.sampled_from(kinds)), draw_(st.integers(1, 3))
            layers[module, part] = layer(kind, own, columns, rank, generator)
    return Adapters(config, layers)


@given(
    adapters(("lora",)),
    st.lists(st.tuples(st.sampled_from([*FORMATS]), st.sampled_from(["fp32", "fp32", "bf16"])), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_chain_of_formats_keeps_what_a_lora_adds(start, chain):
    """Without the base model, which a plain LoRA never needs."""
    now = start
    for format, dtype in chain:
        now = read(written(now, format, dtype=dtype), start.config)
    exact = all(dtype == "fp32" for _, dtype in chain)
    assert_equal(deltas(now, no_base), deltas(start, no_base), 1e-6 if exact else 1e-2)


@given(adapters(KINDS), st.lists(st.sampled_from([*FORMATS]), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_chain_of_formats_keeps_what_any_kind_adds(start, chain):
    """What a format cannot express is its difference, or where that is not read a LoRA of full rank."""
    base = base_of(start.config)
    expected, now = deltas(start, base), start
    for format in chain:
        result = written(now, format, base, rank=1000 if format == "diffusers" else 0)
        assert result.relative_error < 1e-5
        now = read(result, start.config)
    assert_equal(deltas(now, base), expected, 1e-4)


@given(adapters(KINDS))
@settings(max_examples=10, deadline=None)
def test_a_file_is_put_into_a_models_own_weights(start):
    model = Lumina2Transformer(start.config)
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    bias = torch.arange(24.0)
    layers = {**start.layers, ("x_embedder", ""): Layer("diff", {}, bias=bias)}
    add_to(model, Adapters(start.config, layers))
    expected = deltas(start, lambda module: before[f"{module}.weight"])
    for name, weight in model.state_dict().items():
        added = bias if name == "x_embedder.bias" else expected.get(name.removesuffix(".weight"), 0)
        assert torch.equal(weight, before[name] + added), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("parts", [("",), ("q", "k", "v"), ("v",)])
def test_the_real_width_is_kept_and_read_off_the_file(format, parts, tmp_path):
    generator, module = torch.Generator().manual_seed(0), "layers.0.attention.qkv"
    rows = dict(zip(("", "q", "k", "v"), (3840, 2304, 768, 768), strict=True))
    layers = {(module, part): layer("lora", rows[part], 2304, 5, generator) for part in parts}
    layers["layers.0.feed_forward.w2", ""] = layer("lora", 2304, 9216, 3, generator)
    start = Adapters(REAL, layers)
    write_adapters(tmp_path / "x.safetensors", start, format)
    found = read_adapters(tmp_path / "x.safetensors")  # no model is named
    assert found.config.qkv_rows == (2304, 768, 768)
    a, b = start.delta(module, None), found.delta(module, None)
    assert (a - b).abs().max() <= 1e-6 * a.abs().max()
    own, again = (adapters.layers["layers.0.feed_forward.w2", ""].factors for adapters in (start, found))
    assert all(torch.equal(again[half], own[half]) for half in "AB")


def test_a_fused_lora_is_split_and_joined_again_at_its_rank():
    whole = layer("lora", 40, 24, 3, torch.Generator().manual_seed(0))
    parts = split_layer(whole, NANO.qkv_rows)
    assert [tuple(parts[p].factors["B"].shape) for p in "qkv"] == [(24, 3), (8, 3), (8, 3)]
    assert all(torch.equal(part.factors["A"], whole.factors["A"]) for part in parts.values())
    assert parts["q"].factors["A"].data_ptr() != parts["k"].factors["A"].data_ptr()
    again = join_layers(parts, NANO.qkv_rows)
    assert again.rank == 3
    assert torch.equal(again.factors["B"], whole.factors["B"])


def test_apart_they_are_joined_along_a_diagonal_and_split_again_at_their_ranks():
    generator = torch.Generator().manual_seed(0)
    parts = {p: layer("lora", n, 24, 2, generator) for p, n in zip("qkv", NANO.qkv_rows, strict=True)}
    whole = join_layers(parts, NANO.qkv_rows)
    assert whole.rank == 6
    again = split_layer(whole, NANO.qkv_rows)
    for name, part in parts.items():
        assert torch.equal(again[name].factors["A"], part.factors["A"])
        assert torch.equal(again[name].factors["B"], part.factors["B"])
    untrained = Layer("lora", {**whole.factors, "B": torch.zeros(40, 6)})
    assert split_layer(untrained, NANO.qkv_rows)["k"].rank == 6  # B starts at zero: nothing says whose it is


def names(prefix, block="layers.0", **halves):
    return {f"{prefix}{block}.{name}": tensor for name, tensor in halves.items()}


A, B = (
    torch.randn(4, 24, generator=torch.Generator().manual_seed(1)),
    torch.randn(24, 4, generator=torch.Generator().manual_seed(2)),
)
FOREIGN = {
    "ai-toolkit": ("transformer.layers.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "SimpleTuner": ("transformer.layers.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "SimpleTuner's LyCORIS": ("lycoris_layers_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
    "diffusers without a prefix": ("layers.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "diffusers' names, ComfyUI's prefix": ("diffusion_model.layers.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "PEFT": ("base_model.model.layers.0.attn.to_q", ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT of PEFT": ("base_model.model.transformer.layers.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "split, ComfyUI's names": ("diffusion_model.layers.0.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "compiled": ("transformer._orig_mod.layers.0._orig_mod.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "compiled, kohya": ("lora_unet__orig_mod_layers_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
    "old diffusers": ("transformer.layers.0.attn.to_q", ".lora.down.weight", ".lora.up.weight"),
    "no .weight": ("diffusion_model.layers.0.attn.to_q", ".lora_A", ".lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("trainer", FOREIGN)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_names_of_other_trainers_are_read(trainer, alpha):
    name, down, up = FOREIGN[trainer]
    tensors = {name + down: A, name + up: B} | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})
    found = adapters_of(tensors, {}, NANO)
    assert [*found.layers] == [("layers.0.attention.qkv", "q")]
    delta = found.delta("layers.0.attention.qkv", None)
    assert torch.allclose(delta[:24], (1 if alpha is None else alpha / 4) * B @ A, atol=1e-6)
    assert not delta[24:].any()


def test_every_linear_layer_has_one_meaning_under_each_name():
    linear = [name for name, shape in shapes(NANO).items() if len(shape) == 2]
    generator = torch.Generator().manual_seed(0)
    start = Adapters(NANO, {(n, ""): layer("lora", *shapes(NANO)[n], 2, generator) for n in linear})
    for format in FORMATS:
        result = written(start, format)
        assert len(result.tensors) == (len(linear) + 2 * 5 * FORMATS[format].split) * (
            3 if FORMATS[format].alpha else 2
        )
        assert_equal(deltas(read(result), None), deltas(start, None), 1e-6)
    diffusers = written(start, "diffusers").tensors
    assert "transformer.time_caption_embed.timestep_embedder.linear_2.lora_A.weight" in diffusers
    assert "transformer.context_refiner.0.attn.to_out.0.lora_B.weight" in diffusers
    assert "transformer.norm_out.linear_1.lora_A.weight" in diffusers


def test_pefts_settings_give_the_scale(tmp_path):
    tensors = {
        f"transformer.layers.{n}.attn.to_out.0.lora_{h}.weight": t for n in (0, 1) for h, t in (("A", A), ("B", B))
    }
    told = {"r": 8, "lora_alpha": 4, "rank_pattern": {"layers.1.attn.to_out.0": 4}, "use_rslora": True}
    told["alpha_pattern"] = {"^layers.1.attn.to_out.0": 6}
    metadata = {PEFT_SETTINGS: json.dumps({f"transformer.{key}": value for key, value in told.items()})}
    found = adapters_of(tensors, metadata, NANO)
    assert torch.allclose(found.delta("layers.0.attention.out", None), 4 / math.sqrt(8) * B @ A, atol=1e-5)
    assert torch.allclose(found.delta("layers.1.attention.out", None), 6 / 2 * B @ A, atol=1e-5)
    save_file(
        {key.replace("transformer.", "base_model.model."): t.clone() for key, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    found = read_adapters(tmp_path / "adapter_model.safetensors", NANO)
    assert torch.allclose(found.delta("layers.0.attention.out", None), 0.5 * B @ A, atol=1e-6)


def test_what_no_forward_uses_is_left_out():
    """ComfyUI's trainer has a difference of every norm, ``norm_final``'s too."""
    tensors = {"diffusion_model.norm_final.diff": torch.ones(24), "lora_unet_norm_final.diff": torch.ones(24)}
    with pytest.raises(ModelError, match="none of a layer"):
        adapters_of(tensors, {}, NANO)
    out = "diffusion_model.layers.0.attention.out"
    found = adapters_of({**tensors, f"{out}.lora_down.weight": A, f"{out}.lora_up.weight": B}, {}, NANO)
    assert [*found.layers] == [("layers.0.attention.out", "")]


def test_diffusers_settings_name_every_rank():
    generator = torch.Generator().manual_seed(0)
    ranks = {"layers.0.attention.out": 2, "layers.1.attention.out": 2, "layers.2.attention.out": 3}
    start = Adapters(NANO, {(n, ""): layer("lora", 24, 24, r, generator) for n, r in ranks.items()})
    told = json.loads(written(start, "diffusers").metadata[PEFT_SETTINGS])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (2, 2)
    assert told["transformer.rank_pattern"] == {"^layers.2.attn.to_out.0": 3} == told["transformer.alpha_pattern"]


def test_dora_of_each_convention_becomes_the_other():
    base, generator = base_of(NANO), torch.Generator().manual_seed(0)
    start = Adapters(NANO, {("layers.0.attention.out", ""): layer("dora", 24, 24, 2, generator)})
    weight = base("layers.0.attention.out")
    comfyui = written(start, "comfyui", base)
    scale = comfyui.tensors["diffusion_model.layers.0.attention.out.dora_scale"]
    own = start.layers["layers.0.attention.out", ""]
    adapted = weight + own.factors["B"] @ own.factors["A"]
    by_comfyui = scale / weight.norm(dim=1, keepdim=True) * adapted  # what its loader makes of it
    by_dora = own.magnitude / adapted.norm(dim=1, keepdim=True) * adapted
    assert torch.allclose(by_comfyui, by_dora, atol=1e-5)
    peft = written(read(comfyui), "diffusers")  # m is in the metadata: no base is needed
    kept = peft.tensors["transformer.layers.0.attn.to_out.0.lora_magnitude_vector"]
    assert torch.equal(kept, own.magnitude.flatten())
    no_metadata = adapters_of(comfyui.tensors, {}, NANO)
    with pytest.raises(ModelError, match=r"depends on the base .* Wire the MODEL"):
        written(no_metadata, "diffusers")
    again = written(no_metadata, "diffusers", base).tensors["transformer.layers.0.attn.to_out.0.lora_magnitude_vector"]
    assert torch.allclose(again, kept, atol=1e-5)
    with_plain = Adapters(NANO, {**start.layers, ("layers.1.attention.out", ""): layer("lora", 24, 24, 2, generator)})
    both = written(with_plain, "diffusers", base)
    assert "transformer.layers.1.attn.to_out.0.lora_magnitude_vector" in both.tensors, "PEFT would take the base's"
    assert_equal(deltas(read(both, NANO), base), deltas(with_plain, base))


def test_what_a_format_cannot_express_is_told():
    generator = torch.Generator().manual_seed(0)
    start = Adapters(NANO, {("layers.0.attention.out", ""): layer("loha", 24, 24, 2, generator)})
    with pytest.raises(ModelError, match=r"diffusers cannot express the loha .* Choose a rank"):
        written(start, "diffusers")
    small, exact = written(start, "diffusers", rank=2), written(start, "diffusers", rank=4)
    assert exact.relative_error < 1e-5  # a LoHa of rank 2 is a product of rank 4
    delta, found = start.delta("layers.0.attention.out", None), read(small, NANO).delta("layers.0.attention.out", None)
    assert small.relative_error == pytest.approx(float((delta - found).norm() / delta.norm()), rel=1e-4)
    sizes = torch.linalg.svdvals(delta)
    assert small.relative_error == pytest.approx(float(sizes[2:].norm() / sizes.norm()), rel=1e-4)
    assert f"relative error {small.relative_error:.2g}" in small.notes[0]
    norms = Adapters(NANO, {("layers.0.attention_norm1", ""): Layer("diff", {"diff": torch.ones(24)})})
    assert "diffusion_model.layers.0.attention_norm1.diff" in written(norms).tensors
    with pytest.raises(ModelError, match="difference of a norm"):
        written(norms, "diffusers")
    bias = Adapters(NANO, {("x_embedder", ""): Layer("diff", {}, bias=torch.ones(24))})
    assert [*written(bias).tensors] == ["diffusion_model.x_embedder.diff_b"]
    with pytest.raises(ModelError, match="difference of a bias"):
        written(bias, "diffusers", rank=4)
    with pytest.raises(SettingError, match=r"format is 'onnx'; choose one of comfyui"):
        written(start, "onnx")


def test_a_lokr_whose_blocks_reach_over_two_parts_is_not_split():
    f = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(20, 12)}  # blocks of 20 rows, and q has 24
    assert split_layer(Layer("lokr", f), NANO.qkv_rows) is None
    f = {"lokr_w1": torch.randn(5, 2), "lokr_w2": torch.randn(8, 12)}
    parts = split_layer(Layer("lokr", f), NANO.qkv_rows)
    assert [parts[p].factors["lokr_w1"].shape[0] for p in "qkv"] == [3, 1, 1]
    together = torch.cat([change(parts[p], None) for p in "qkv"])
    assert torch.allclose(together, torch.kron(f["lokr_w1"], f["lokr_w2"]))


def test_what_does_not_fit_is_refused():
    good = {
        "transformer.layers.0.attn.to_out.0.lora_A.weight": A,
        "transformer.layers.0.attn.to_out.0.lora_B.weight": B,
    }
    adapters_of(good, {}, NANO)
    with pytest.raises(ModelError, match=r"belongs to no weight of a Lumina2"):
        adapters_of({"transformer.blocks.0.attn.to_q.lora_A.weight": A}, {})
    with pytest.raises(ModelError, match=r"has A: no adapter of a known kind"):
        adapters_of({"transformer.layers.0.attn.to_q.lora_A.weight": A}, {})
    with pytest.raises(ModelError, match=r"of 24 × 24; this model's is 2304 × 2304"):
        adapters_of(good, {}, TransformerConfig())
    with pytest.raises(ModelError, match=r"adapts layers\.7\.attention\.out, and the model has 3 layers"):
        adapters_of({key.replace(".0.attn", ".7.attn"): t for key, t in good.items()}, {}, NANO)
    with pytest.raises(ModelError, match="a second time"):
        adapters_of(good | {"transformer.layers.0.attn.to_out.0.lora_down.weight": A}, {}, NANO)
    both = {"layers.0.attn.to_q.lora_A": A, "layers.0.attn.to_q.lora_B": B}
    both |= {"layers.0.attention.qkv.lora_A": A, "layers.0.attention.qkv.lora_B": torch.zeros(40, 4)}
    with pytest.raises(ModelError, match="both in one and by its parts"):
        adapters_of(both, {}, NANO)
    with pytest.raises(ModelError, match=r"tells how many rows k and v have. Wire the MODEL"):
        adapters_of({"layers.0.attn.to_q.lora_A": A, "layers.0.attn.to_q.lora_B": B}, {})
    with pytest.raises(ModelError, match="holds no adapter"):
        adapters_of({"lora_te_layers_0.lora_down.weight": A}, {})
    found = adapters_of(good | {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": A}, {}, NANO)
    assert "1 tensors of the text encoder are left out" in found.notes[0]
    assert "1 tensors" in written(found).notes[0]


def test_what_the_nodes_offer_is_what_is_written():
    assert (tuple(FORMATS), tuple(DTYPES)) == (FORMAT_NAMES, DTYPE_NAMES)


def test_a_file_is_read_back(tmp_path, monkeypatch):
    start = Adapters(NANO, {("layers.0.attention.out", ""): Layer("lora", {"A": A, "B": B})})
    path = tmp_path / "x.safetensors"
    write_adapters(path, start, "kohya", dtype="bf16")
    assert load_file(path)["lora_unet_layers_0_attention_out.lora_up.weight"].dtype == torch.bfloat16
    monkeypatch.setattr(
        "training.adapter.formats.write.write_tensors",
        lambda path, tensors, metadata: save_file({k: t + 1 for k, t in tensors.items()}, path),
    )
    with pytest.raises(ModelError, match="reads differently"):
        write_adapters(path, start)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        read_adapters(tmp_path / "broken.safetensors")
    with pytest.raises(ModelError, match="not read, for safety"):
        read_adapters(tmp_path / "x.pt")


def test_strengths_by_block():
    modules = ["layers.0.attention.qkv", "layers.2.feed_forward.w1", "noise_refiner.0.attention.out", "x_embedder"]
    found = block_strengths("0-1: 0.5, 2; noise_refiner: 0\nother: -1", modules, NANO)
    assert [*found.values()] == [0.5, 0, 0, -1]
    assert [*block_strengths("", modules, NANO).values()] == [1, 1, 1, 1]
    for text, said in (
        ("0-1", "'0-1' has no number"),
        ("0: x", "'0: x' has no number"),
        ("7: 1", "the model has layers 0-2"),
        ("0-1: 1, 1: 2", "names '1' twice"),
        ("foo: 1", "not understood"),
    ):
        with pytest.raises(SettingError, match=said):
            block_strengths(text, modules, NANO)
