"""LoRAs and full fine-tunes on a tiny transformer with grouped-query attention, whose qkv is fused."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.adapter.adapter import add_adapter
from training.adapter.base import AdaptedLinear
from training.adapter.files import check_lora
from training.adapter.targets import linear_layers, lycoris_targets, target_modules
from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings, lycoris_from_json
from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer

CONFIG = TransformerConfig(
    dim=36, layers=3, refiner_layers=1, heads=3, kv_heads=1, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)
LORAS = {
    "fused": LoRASettings(4, alpha=6),
    "split": LoRASettings(4, alpha=6, qkv="split"),
    "everywhere": LoRASettings(3, targets="all", use_rslora=True, init="gaussian"),
    "pissa": LoRASettings(4, alpha=6, targets="all", init="pissa"),
    "olora, split": LoRASettings(4, init="olora", qkv="split"),
    "dora": LoRASettings(4, targets="blocks", use_dora=True),
    "dora, pissa, split": LoRASettings(4, alpha=6, init="pissa", qkv="split", use_dora=True),
}


def transformer(seed=0):
    torch.manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made.eval()


def changed(adapter):
    """The adapter after updates of some size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    return adapter


def predict(model):
    generator = torch.Generator().manual_seed(2)
    latents, captions = torch.randn(2, 4, 4, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return model(latents, torch.tensor([0.3, 0.8]), captions, (5, 3))


def step(model, adapter):
    predict(model).square().mean().backward()
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight -= 0.1 * weight.grad.sign()


@torch.no_grad()
def added(layer):
    """What a layer adds to its base's weight."""
    return (layer(torch.eye(layer.in_features)) - layer.base_layer(torch.eye(layer.in_features))).T


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_a_lora_starts_as_the_base_and_turns_off(settings):
    model = transformer()
    with torch.no_grad():
        base = predict(model)
    adapter = add_adapter(model, settings, seed=0)
    with torch.no_grad():
        if settings.use_dora:  # its gain of 1 is applied after the sum with the bias
            assert torch.allclose(predict(model), base, rtol=0, atol=1e-5)
        else:
            assert torch.equal(predict(model), base)
        changed(adapter)
        trained = predict(model)
        assert (trained - base).abs().max() > 0.1
        with adapter.off():
            assert torch.equal(predict(model), base)
            with adapter.off():
                assert torch.equal(predict(model), base)
            assert torch.equal(predict(model), base)
        assert torch.equal(predict(model), trained)
        with pytest.raises(KeyboardInterrupt), adapter.off():
            raise KeyboardInterrupt
        assert torch.equal(predict(model), trained)


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_every_weight_learns_and_no_other(settings):
    model = transformer()
    adapter = changed(add_adapter(model, settings, seed=0))
    predict(model).square().mean().backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapter.weights.values())
    learning = {id(weight) for weight in model.parameters() if weight.requires_grad}
    assert learning == {id(weight) for weight in adapter.weights.values()}


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_what_was_saved_goes_on(settings):
    model = transformer()
    adapter = changed(add_adapter(model, settings, seed=0))
    saved = {name: tensor.detach().clone() for name, tensor in {**adapter.weights, **adapter.frozen}.items()}
    assert bool(adapter.frozen) == (settings.init in ("pissa", "olora"))
    again = transformer()
    add_adapter(again, settings, seed=9).load(saved, "x")
    with torch.no_grad():
        assert torch.equal(predict(again), predict(model))
    missing = next(iter(saved))
    with pytest.raises(ModelError, match=f"x holds another adapter: {missing} is None there"):
        add_adapter(transformer(), settings, 0).load({k: v for k, v in saved.items() if k != missing}, "x")


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_a_training_step_leaves_the_base_as_it_was(settings):
    model = transformer()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = add_adapter(model, settings, seed=0)
    for _ in range(2):
        step(model, adapter)
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("name", "rank"), [("fused", 4), ("split", 12), ("pissa", 8), ("olora, split", 24), ("everywhere", 3)]
)
def test_the_file_holds_one_product_with_the_scale_in_it(name, rank):
    settings, model = LORAS[name], transformer()
    adapter = changed(add_adapter(model, settings, seed=0))
    tensors, metadata = adapter.export()
    check_lora(tensors, {n: layer.weight for n, layer in linear_layers(transformer()).items()}, "x")
    assert metadata["ss_network_dim"] == str(settings.rank)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert len(tensors) == 2 * len(adapter.layers)
    for module, layer in adapter.layers.items():
        a, b = (tensors[f"diffusion_model.{module}.lora_{half}.weight"] for half in "AB")
        expected = added(layer)
        assert (b @ a - expected).abs().max() < 1e-5 * expected.abs().max(), module
        if module == "layers.0.attention.qkv":
            assert (a.shape, b.shape) == ((rank, 36), (60, rank))
    if name == "split":
        a, b = (tensors[f"diffusion_model.layers.0.attention.qkv.lora_{half}.weight"] for half in "AB")
        own = adapter.weights
        assert torch.equal(a[4:8], own["layers.0.attention.qkv.k.lora_A.weight"])
        assert torch.equal(b[36:48, 4:8], own["layers.0.attention.qkv.k.lora_B.weight"] * 1.5)
        assert b[:36, 4:].abs().max() == b[36:48, 8:].abs().max() == b[48:, :8].abs().max() == 0


@pytest.mark.parametrize("name", ["fused", "pissa", "olora, split"])
def test_what_is_added_is_the_product_less_the_one_it_started_from(name):
    settings = LORAS[name]
    adapter = changed(add_adapter(transformer(), settings, seed=0))
    own, start = adapter.weights, adapter.frozen
    for module in ("layers.0.attention.out", "layers.1.attention.qkv"):
        parts = ("q.", "k.", "v.") if settings.qkv == "split" and module.endswith("qkv") else ("",)
        expected = []
        for part in parts:
            place = f"{module}.{part}lora_"
            product = own[f"{place}B.weight"] @ own[f"{place}A.weight"]
            if start:
                product = product - start[f"{place}B0.weight"] @ start[f"{place}A0.weight"]
            expected.append(settings.scale * product)
        assert torch.allclose(added(adapter.layers[module]), torch.cat(expected), atol=1e-5)


def test_the_file_of_a_dora_keeps_its_lengths():
    adapter = changed(add_adapter(transformer(), LORAS["dora"], seed=0))
    tensors, metadata = adapter.export()
    name = "layers.0.attention.qkv"
    kept = base64.b64decode(json.loads(metadata["lumina2_trainer.magnitudes"])[f"{name}.lora_magnitude_vector"])
    lengths = adapter.weights[f"{name}.lora_magnitude_vector"]
    assert torch.equal(torch.from_numpy(np.frombuffer(kept, np.float32).copy()), lengths)
    layer = adapter.layers[name]
    weight = layer.base_layer.weight + added(layer)
    assert torch.allclose(weight.norm(dim=1), lengths, rtol=1e-5)  # m is the length of the rows
    assert tensors[f"diffusion_model.{name}.dora_scale"].shape == (60, 1)


def test_pissa_and_olora_hold_directions_of_the_base():
    model = transformer()
    weight = model.layers[0].attention.out.weight.clone()
    adapter = add_adapter(model, LORAS["pissa"], seed=0)
    a, b = (adapter.frozen[f"layers.0.attention.out.lora_{half}0.weight"] for half in "AB")
    left, sizes, right = torch.linalg.svd(weight)
    largest = left[:, :4] * sizes[:4] @ right[:4]
    assert torch.allclose(1.5 * b @ a, largest, atol=1e-5)
    adapter = add_adapter(transformer(), LORAS["olora, split"], seed=0)
    a, b = (adapter.frozen[f"layers.0.attention.out.lora_{half}0.weight"] for half in "AB")
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)
    assert torch.allclose(b.T @ weight, a, atol=1e-5)
    assert torch.allclose((b @ a)[:, :4], weight[:, :4], atol=1e-5)  # Q begins with the first columns
    with pytest.raises(SettingError, match="whose parts have 12"):
        add_adapter(transformer(), LoRASettings(16, init="pissa", qkv="split"), 0)


def test_the_largest_directions_of_a_large_weight_are_found_without_all_of_them(monkeypatch):
    monkeypatch.setattr("training.adapter.lora._EXACT_BELOW", 0)
    near = add_adapter(transformer(), LORAS["pissa"], seed=0)
    again = add_adapter(transformer(), LORAS["pissa"], seed=0)
    monkeypatch.undo()
    exact = add_adapter(transformer(), LORAS["pissa"], seed=0)
    for name in ("layers.0.attention.out", "layers.1.feed_forward.w1"):
        products = []
        for adapter in (near, exact):
            a, b = (adapter.frozen[f"{name}.lora_{half}0.weight"] for half in "AB")
            products.append(b @ a)
        assert products[0].norm() > 0.999 * products[1].norm()  # no product of this rank is larger than the exact one
    assert all(torch.equal(tensor, again.frozen[name]) for name, tensor in near.frozen.items())


def test_gaussian_and_default_starts():
    for init, deviation in (("gaussian", 1 / 16), ("default", 36**-0.5 / 3**0.5)):
        adapter = add_adapter(transformer(), LoRASettings(16, init=init), seed=0)
        a = torch.cat([w.flatten() for name, w in adapter.weights.items() if "lora_A" in name])
        assert a.std().item() == pytest.approx(deviation, rel=0.05)
        assert all(not w.any() for name, w in adapter.weights.items() if "lora_B" in name)
    assert not torch.equal(
        next(iter(add_adapter(transformer(), LoRASettings(4), seed=1).weights.values())),
        next(iter(add_adapter(transformer(), LoRASettings(4), seed=2).weights.values())),
    )


def test_the_scale_of_rslora_grows_with_the_rank():
    assert LoRASettings(16, alpha=8).scale == 0.5
    assert LoRASettings(16, alpha=8, use_rslora=True).scale == 2
    assert LoRASettings(16).scale == 1


def test_lora_plus_learns_b_faster():
    adapter = add_adapter(transformer(), LoRASettings(4, loraplus_lr_ratio=16, use_dora=True), 0)
    slow, fast = adapter.groups(1e-4)
    assert (slow["lr"], fast["lr"]) == (1e-4, 16e-4)
    names = {id(weight): name for name, weight in adapter.weights.items()}
    assert all(".lora_B." in names[id(weight)] for weight in fast["params"])
    assert not any(".lora_B." in names[id(weight)] for weight in slow["params"])
    assert len(slow["params"]) + len(fast["params"]) == len(adapter.weights)
    assert len(add_adapter(transformer(), LoRASettings(4), 0).groups(1e-4)) == 1


def test_dropout_acts_while_training_alone():
    model = transformer()
    adapter = changed(add_adapter(model, LoRASettings(4, dropout=0.5), 0))
    assert adapter.draws
    with torch.no_grad():
        still = predict(model)
        assert torch.equal(predict(model), still)
        model.train()
        torch.manual_seed(1)
        first, second = predict(model), predict(model)
        torch.manual_seed(1)
        assert torch.equal(predict(model), first)
        assert not torch.equal(first, second)
        with adapter.off():
            base = predict(model)
            assert torch.equal(base, predict(transformer()))
    assert not add_adapter(transformer(), LoRASettings(4), 0).draws


def test_weights_are_of_the_dtype_asked_for_and_the_base_of_its_own():
    model = transformer().bfloat16()
    adapter = add_adapter(model, LoRASettings(4, targets="all", use_dora=True, qkv="split"), 0)
    assert {weight.dtype for weight in adapter.weights.values()} == {torch.float32}
    changed(adapter)
    predict(model).float().square().mean().backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapter.weights.values())
    half = add_adapter(transformer(), LoRASettings(4, init="pissa"), 0, torch.bfloat16)
    assert {weight.dtype for weight in half.weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.export()[0].values()} == {torch.float32}


# Targets


@pytest.mark.parametrize(
    ("targets", "blocks", "count"),
    [
        ("attention", "", 8),
        ("attention", "0-1", 4),
        ("attention", "2,context_refiner", 4),
        ("attention+ff", "noise_refiner.0", 5),
        ("blocks", "layers", 18),
        ("all", "context_refiner", 5),
        ("all", "", 35),
        (r"regex:.*\.attention\.(qkv|out)", "", 10),
        (r"regex:.*\.w1", "1-2", 2),
    ],
)
def test_targets_and_blocks(targets, blocks, count):
    names = target_modules(transformer(), targets, blocks)
    assert len(names) == count
    adapter = add_adapter(transformer(), LoRASettings(2, targets=targets, blocks=blocks), 0)
    assert list(adapter.layers) == names
    assert f"LoRA of rank 2 (scale 1) on {count} layers" in adapter.describe()


@pytest.mark.parametrize(
    ("targets", "blocks", "said"),
    [
        ("attention", "3", r"blocks has '3', but this Lumina2 has noise_refiner 0-0, context_refiner 0-0, layers 0-2"),
        ("attention", "1-7", "blocks has '1-7'"),
        ("regex:moe", "", r"chooses none .* named x_embedder, noise_refiner\.N\.attention\.qkv"),
    ],
)
def test_targets_that_are_not_there(targets, blocks, said):
    with pytest.raises(SettingError, match=said):
        add_adapter(transformer(), LoRASettings(targets=targets, blocks=blocks), 0)


# Settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "everything"}, "targets is 'everything'; choose one of attention, "),
        ({"targets": "regex:("}, "not a regular expression"),
        ({"blocks": "0-"}, r"'0-' is not understood"),
        ({"blocks": "5-2"}, r"'5-2' is not understood"),
        ({"blocks": "layers12"}, r"'layers12' is not understood"),
        ({"qkv": "apart"}, "lora_qkv is 'apart'"),
        ({"init": "loftq"}, "init is loftq, which replaces"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"init": "pissa", "init_lora": "x.safetensors"}, "init is 'pissa'; choose .default. where init_lora"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio is 0"),
        ({"dropout": 1}, "dropout is 1"),
    ],
)
def test_lora_settings_that_cannot_be(options, said):
    with pytest.raises(SettingError, match=said):
        LoRASettings(**options)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"algo": "tucker"}, "algo is 'tucker'; choose one of lora, locon"),
        ({"algo": "lokr", "facter": 4}, "no key 'facter'; did you mean 'factor'"),
        ({"algo": "lokr", "factor": 1.5}, "factor is 1.5; it has to be a whole number"),
        ({"algo": "lora", "full_matrix": True}, "full_matrix has no effect with the LyCORIS algo lora"),
        ({"algo": "full", "dropout": 0.1}, "dropout has no effect"),
        ({"algo": "dylora", "linear_dim": 6}, "choose a multiple of dylora's block_size, 4"),
        ({"algo": "lokr", "init_lokr_norm": 0.001}, "full_matrix to true"),
        ({"algo": "lora", "apply_preset": {"targets": []}}, "no key 'targets'; it may have target_module"),
        ({"algo": "lora", "apply_preset": {"module_algo_map": {"Attention": {"algo": "x"}}}}, "algo is 'x'"),
        ({"algo": "lora", "train_norm": "true"}, "norms are not adapted"),
        ({"algo": "lora", "preset": "attn-mlp"}, "choose layers by apply_preset"),
        ({"algo": "lora", "multiplier": 0}, "multiplier is 0"),
    ],
)
def test_lycoris_settings_that_cannot_be(config, said):
    with pytest.raises(SettingError, match=said):
        lycoris_from_json(config)


def test_lycoris_configurations_are_read_as_they_are_written():
    config = {"algo": "LoKr", "linear_dim": "16", "linear_alpha": 0.5, "multiplier": "0.25", "factor": 8.0,
              "full_matrix": "true", "rs_lora": None, "use_tucker": True, "bypass_mode": False}  # fmt: skip
    settings = lycoris_from_json(config)
    expected = LyCORISSettings(
        algo="lokr", linear_dim=16, linear_alpha=0.5, multiplier=0.25, factor=8, full_matrix=True
    )
    assert settings == expected
    assert lycoris_from_json(json.loads(json.dumps(settings.as_json()))) == settings
    assert lycoris_from_json({}).algo == "lora"
    override = settings.with_options({"algo": "loha", "dim": 4})
    assert (override.linear_dim, override.linear_alpha, override.full_matrix) == (4, 0.5, False)


def test_the_innermost_class_with_options_decides():
    preset = {
        "target_module": ["Block"],
        "module_algo_map": {"Block": {"factor": 8}, "Attention": {"factor": 4}},
        "name_algo_map": {r"layers\.2\.attention\.out": {"algo": "loha", "dim": 2}},
    }
    chosen = lycoris_targets(transformer(), LyCORISSettings(algo="lokr", factor=2, apply_preset=preset))
    assert len(chosen) == 5 * 5 + 4
    assert chosen["layers.2.attention.qkv"].factor == 4
    assert chosen["layers.2.feed_forward.w1"].factor == 8
    assert (chosen["layers.2.attention.out"].algo, chosen["layers.2.attention.out"].linear_dim) == ("loha", 2)


# A file to start from


def renamed(tensors, how):
    """A ComfyUI-format LoRA with the names and halves that others write."""
    out = {}
    for key, tensor in tensors.items():
        name, half = key.removeprefix("diffusion_model.").split(".lora_")
        half = half[0]
        if how == "kohya":
            out[f"lora_unet_{name.replace('.', '_')}.lora_{'down' if half == 'A' else 'up'}.weight"] = tensor
            out[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(2.0)
            continue
        inside = "attn" if how == "diffusers" else "attention"
        prefix = "transformer." if how == "diffusers" else "diffusion_model."
        block = name.rpartition(".attention")[0]
        places = [f"to_{part}" for part in "qkv"] if name.endswith("qkv") else ["to_out.0"]
        parts = tensor.split([36, 12, 12]) if half == "B" and len(places) == 3 else [tensor] * len(places)
        for place, part in zip(places, parts, strict=True):
            out[f"{prefix}{block}.{inside}.{place}.lora_{half}.weight"] = part.contiguous().clone()
    return out


@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize(("how", "factor"), [("kohya", 2 / 5), ("diffusers", 1), ("split", 1)])
def test_a_training_starts_from_a_file_of_any_names(tmp_path, how, factor, qkv):
    source = changed(add_adapter(transformer(), LoRASettings(5, alpha=3), seed=0))
    save_file(renamed(source.export()[0], how), tmp_path / "start.safetensors")
    settings = LoRASettings(4, alpha=6, qkv=qkv, init_lora=str(tmp_path / "start.safetensors"))
    adapter = add_adapter(transformer(), settings, seed=0)
    assert "started from start.safetensors: rank 5, instead of the 4 set" in adapter.describe()
    for name, layer in adapter.layers.items():
        expected = added(source.layers[name]) * factor
        assert (added(layer) - expected).abs().max() < 1e-5 * expected.abs().max(), name
    rank = adapter.layers["layers.0.attention.qkv"].factors()[0].shape[0]
    assert rank == (5 if qkv == "fused" else 15)  # the parts share A
    assert all(weight.requires_grad for weight in adapter.weights.values())


def test_a_file_of_a_part_of_the_layers_leaves_the_others_fresh(tmp_path):
    source = changed(add_adapter(transformer(), LoRASettings(5, blocks="0"), seed=0))
    tensors, _ = source.export()
    save_file(tensors, tmp_path / "start.safetensors")
    settings = LoRASettings(4, init_lora=str(tmp_path / "start.safetensors"))
    adapter = add_adapter(transformer(), settings, seed=0)
    assert adapter.settings.rank == 5
    assert {a.shape[0] for layer in adapter.layers.values() for a in layer.lora_A} == {5}
    assert not added(adapter.layers["layers.1.attention.out"]).any()
    assert torch.allclose(
        added(adapter.layers["layers.0.attention.out"]), added(source.layers["layers.0.attention.out"])
    )
    with pytest.raises(ModelError, match=r"adapter on layers\.0\.attention\.out, which is not trained"):
        add_adapter(transformer(), replace(settings, blocks="1"), 0)


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("layers.0.attention.out.lokr_w1", (6, 6), "no adapter of a known kind"),
        ("layers.9.attention.out.lora_A.weight", (4, 36), "no adapter of a known kind|has 3 layers"),
        ("layers.0.attention.out.lora_A.weight", (4, 36), "has A: no adapter of a known kind"),
        ("layers.0.attention.nothing.lora_A.weight", (4, 36), "init_lora: .* belongs to no weight"),
    ],
)
def test_files_that_are_no_start(tmp_path, key, shape, said):
    save_file({f"diffusion_model.{key}": torch.zeros(shape)}, tmp_path / "start.safetensors")
    with pytest.raises(ModelError, match=said):
        add_adapter(transformer(), LoRASettings(init_lora=str(tmp_path / "start.safetensors")), 0)


def test_a_start_of_another_size_or_none_at_all(tmp_path):
    path = tmp_path / "start.safetensors"
    halves = {"A": torch.zeros(4, 48), "B": torch.zeros(48, 4)}
    save_file({f"diffusion_model.layers.0.attention.out.lora_{h}.weight": w for h, w in halves.items()}, path)
    with pytest.raises(ModelError, match="48 × 48; this model's is 36 × 36"):
        add_adapter(transformer(), LoRASettings(init_lora=str(path)), 0)
    with pytest.raises(ModelError, match="there is no file"):
        add_adapter(transformer(), LoRASettings(init_lora=str(tmp_path / "none.safetensors")), 0)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        add_adapter(transformer(), LoRASettings(init_lora=str(path)), 0)


LYCORIS = {
    "lora": {"linear_dim": 3, "linear_alpha": 6.0},
    "loha": {"linear_dim": 3, "use_scalar": True},
    "lokr": {"linear_dim": 10000, "factor": 4, "multiplier": 0.5},
    "glora": {"linear_dim": 3},
    "full": {},
    "diag-oft": {"linear_dim": 6},
    "loha dora": {"linear_dim": 3, "dora_wd": True},
    "lokr split": {"linear_dim": 10000, "factor": 4, "multiplier": 0.5, "qkv": "split"},
    "lokr split small": {"linear_dim": 1, "factor": 2, "qkv": "split"},
    "loha split": {"linear_dim": 2, "qkv": "split"},
    "lora split dora": {"linear_dim": 3, "dora_wd": True, "qkv": "split"},
    "full split": {"qkv": "split"},
}


@torch.no_grad()
def saved(adapter, path):
    save_file(adapter.export()[0], path)
    return adapter


@pytest.mark.parametrize("kind", list(LYCORIS))
def test_a_lycoris_training_starts_from_its_own_file_exactly(tmp_path, kind):
    settings = LyCORISSettings(algo=kind.split()[0], **LYCORIS[kind])
    source = saved(changed(add_adapter(transformer(), settings, seed=0)), tmp_path / "start.safetensors")
    start = replace(settings, init_lora=str(tmp_path / "start.safetensors"))
    adapter = add_adapter(transformer(), start, seed=5)
    assert adapter.describe().endswith("started from start.safetensors")
    for name, layer in adapter.layers.items():
        expected = added(source.layers[name])
        assert (added(layer) - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("source", [LORAS["dora"], LORAS["split"], LyCORISSettings(algo="loha", linear_dim=2)])
def test_full_differences_start_from_any_file(tmp_path, source):
    start = tmp_path / "start.safetensors"
    made = saved(changed(add_adapter(transformer(), source, seed=0)), start)
    settings = LyCORISSettings(algo="full", apply_preset={"target_module": ["Block"]}, init_lora=str(start))
    adapter = add_adapter(transformer(), settings, 0)
    for name, layer in made.layers.items():
        expected = added(layer)
        assert (added(adapter.layers[name]) - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_a_lora_starts_from_what_is_none_as_near_as_its_rank_can(tmp_path):
    start = tmp_path / "start.safetensors"
    source = saved(changed(add_adapter(transformer(), LyCORISSettings(algo="loha", linear_dim=2), 0)), start)
    everywhere = LoRASettings(targets=r"regex:.*attention\..*", init_lora=str(start))
    whole = add_adapter(transformer(), replace(everywhere, rank=4), 0)  # 2 · 2: LoHa's product has rank 4
    for name, layer in whole.layers.items():
        expected = added(source.layers[name])
        assert (added(layer) - expected).abs().max() < 1e-4 * expected.abs().max(), name
    assert "relative error" in whole.describe()
    less = add_adapter(transformer(), replace(everywhere, rank=2), 0)
    told = float(less.describe().rpartition("relative error ")[2])
    out = [(added(layer) - added(source.layers[name])).square().sum() for name, layer in less.layers.items()]
    of = [added(layer).square().sum() for layer in source.layers.values()]
    assert told == pytest.approx(float((sum(out) / sum(of)).sqrt()), rel=0.1)
    assert 0.05 < told < 0.9


def test_a_dora_starts_with_the_lengths_of_its_file(tmp_path):
    start = tmp_path / "start.safetensors"
    source = saved(changed(add_adapter(transformer(), LORAS["dora"], seed=0)), start)
    adapter = add_adapter(transformer(), replace(LORAS["dora"], init_lora=str(start)), 0)
    plain = add_adapter(transformer(), LoRASettings(36, targets="blocks", init_lora=str(start)), 0)
    for name, layer in adapter.layers.items():
        expected = added(source.layers[name])
        assert (added(layer) - expected).abs().max() < 1e-4 * expected.abs().max(), name
        assert torch.allclose(layer.lora_magnitude, source.layers[name].lora_magnitude, rtol=1e-4)
        assert (added(plain.layers[name]) - expected).abs().max() < 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algo": "loha", "linear_dim": 3}, "it is lokr there. Choose that algo, or .full."),
        ({"algo": "dylora"}, "cannot be the start of dylora"),
        ({"algo": "lokr", "linear_dim": 10000, "factor": 6}, r"lokr_w1 4 × 4.*Set linear_dim, factor"),
        ({"algo": "lokr", "linear_dim": 10000, "factor": 4, "dora_wd": True}, "without DoRA there"),
    ],
)
def test_lycoris_files_that_fit_no_layer_are_told(tmp_path, options, said):
    start = tmp_path / "start.safetensors"
    saved(changed(add_adapter(transformer(), LyCORISSettings(linear_dim=10000, factor=4), seed=0)), start)
    with pytest.raises(ModelError, match=said):
        add_adapter(transformer(), LyCORISSettings(**options, init_lora=str(start)), 0)


@pytest.mark.parametrize(
    "settings",
    [LORAS["fused"], LyCORISSettings(), LyCORISSettings(algo="ia3"), LyCORISSettings(qkv="split")],
    ids=["lora", "lokr", "ia3", "lokr split"],
)
def test_a_strength_multiplies_what_is_added_and_is_1_again_afterwards(settings):
    adapter = changed(add_adapter(transformer(), settings, seed=0))
    layer = adapter.layers["layers.0.attention.qkv"]
    whole = added(layer)
    with adapter.at(-0.5):
        turned = added(layer)
        with adapter.off():
            assert not added(layer).any()
    assert torch.allclose(turned, -0.5 * whole, atol=1e-5)
    assert torch.equal(added(layer), whole)


# Full fine-tunes


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (FullSettings(), None),
        (FullSettings("attention"), 8),
        (FullSettings(blocks="1"), 13),
        (FullSettings("regex:.*norm.*", "layers"), 18),
    ],
)
def test_a_full_fine_tune_changes_weights_of_its_own(settings, count):
    shared = transformer()
    before = {name: weight.clone() for name, weight in shared.state_dict().items()}
    model = Lumina2Transformer.from_weights(CONFIG, shared.state_dict())
    adapter = add_adapter(model, settings, 0)
    assert len(adapter.weights) == (count or len(before))
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    step(model, adapter)
    assert all(weight.grad.abs().max() > 0 for weight in adapter.weights.values())
    after = model.state_dict()
    assert {name for name in before if not torch.equal(after[name], before[name])} == adapter.weights.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in shared.state_dict().items())
    tensors, _ = adapter.export()
    assert tensors.keys() == {*before, "norm_final.weight"}
    assert all(torch.equal(tensors[name], after[name]) for name in before)
    again = add_adapter(transformer(seed=1), settings, 0)
    again.load(adapter.weights, "x")
    assert all(torch.equal(weight, adapter.weights[name]) for name, weight in again.weights.items())
    with pytest.raises(SettingError, match="no base to ask"):
        adapter.off()


def test_a_full_fine_tune_of_a_bf16_model_is_bf16_or_what_was_asked_for():
    assert {w.dtype for w in add_adapter(transformer().bfloat16(), FullSettings(), 0).weights.values()} == {
        torch.bfloat16
    }
    adapter = add_adapter(transformer().bfloat16(), FullSettings(), 0, torch.float32)
    assert {weight.dtype for weight in adapter.weights.values()} == {torch.float32}
