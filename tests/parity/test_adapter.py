"""What an adapter does in the engine against ComfyUI's own loaders on its file, and against PEFT's layers; in fp32."""

import importlib

import pytest
import torch
from torch import nn

from training.adapter.adapter import add_adapter
from training.adapter.base import AdaptedLinear
from training.adapter.files import check_lora, write_lora
from training.adapter.lora import LoRALinear, _initial_pairs
from training.config.adapter import ALGOS, FullSettings, LoRASettings, LyCORISSettings, lycoris_from_json
from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.linear import Linear
from training.model.quantise import quantise
from training.model.transformer import Lumina2Transformer

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)
EVERYTHING = {"target_module": ["Lumina2Transformer"]}


def lycoris(algo, dim=6, **options):
    return LyCORISSettings(algo=algo, linear_dim=dim, linear_alpha=2.5, apply_preset=EVERYTHING, **options)


LORAS = {
    "lora": LoRASettings(4, alpha=6, targets="all"),
    "split": LoRASettings(4, alpha=6, targets="all", qkv="split"),
    "rslora": LoRASettings(4, targets="all", use_rslora=True),
    "pissa": LoRASettings(4, alpha=6, targets="all", init="pissa"),
    "olora, split": LoRASettings(4, targets="all", init="olora", qkv="split"),
    "dora": LoRASettings(4, alpha=6, targets="all", use_dora=True),
    "dora, pissa, split": LoRASettings(4, alpha=6, init="pissa", qkv="split", use_dora=True, use_rslora=True),
}
LYCORIS = {
    "lora": lycoris("lora", multiplier=0.5),
    "lora with a scalar, rs": lycoris("locon", use_scalar=True, rs_lora=True),
    "dora by columns": lycoris("lora", dora_wd=True, wd_on_output=False),
    "loha": lycoris("loha", multiplier=0.5),
    "loha, dora": lycoris("loha", dora_wd=True, multiplier=0.5),
    "lokr": lycoris("lokr", 1, factor=4, multiplier=0.5),
    "lokr, all factored": lycoris("lokr", 1, factor=4, decompose_both=True),
    "lokr, full": lycoris("lokr", 10000, factor=4, full_matrix=True, use_scalar=True),
    "lokr, dora": lycoris("lokr", 1, factor=4, dora_wd=True),
    "full": lycoris("full", multiplier=0.5),
    "ia3": lycoris("ia3", multiplier=0.5),
    "ia3 on inputs": lycoris("ia3", train_on_input=True),
    "dylora": lycoris("dylora", multiplier=0.5, block_size=2, module_dropout=0.1),
    "glora": lycoris("glora", multiplier=0.5, rs_lora=True),
    "glora of full rank": lycoris("glora", 48),
    "diag-oft": lycoris("diag-oft", 4),
    "diag-oft, held": lycoris("diag-oft", 4, constraint=0.001),
    "diag-oft, rescaled": lycoris("diag-oft", 4, rescaled=True, multiplier=0.5),
    "boft": lycoris("boft"),
    "boft, held and rescaled": lycoris("boft", constraint=0.001, rescaled=True),
    "boft, half": lycoris("boft", multiplier=0.5),
    "lokr, split": lycoris("lokr", 10000, factor=4, multiplier=0.5, qkv="split"),
    "lokr, dora, split": lycoris("lokr", 1, factor=2, dora_wd=True, qkv="split"),
    "loha, split": lycoris("loha", 2, multiplier=0.5, qkv="split"),
    "dora by columns, split": lycoris("lora", dora_wd=True, wd_on_output=False, qkv="split"),
    "full, split": lycoris("full", qkv="split"),
    "ia3 on inputs, split": lycoris("ia3", train_on_input=True, qkv="split"),
    "dylora, split": lycoris("dylora", block_size=3, qkv="split"),
    "glora, split": lycoris("glora", qkv="split"),
    "boft, split": lycoris("boft", qkv="split"),
}


def transformer(seed=0):
    torch.manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made.eval()


def changed(adapter, by=0.2):
    """The adapter after updates of some size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight += torch.randn(weight.shape, generator=generator) * by
    return adapter


def inputs():
    generator = torch.Generator().manual_seed(2)
    latents, captions = torch.randn(2, 4, 4, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), captions, (5, 3)


@torch.no_grad()
def in_engine(layer):
    """The weight that a layer multiplies with, and what it adds."""
    zero = layer(torch.zeros(1, layer.in_features))
    return (layer(torch.eye(layer.in_features)) - zero).T, zero[0]


@torch.no_grad()
def in_comfyui(tensors, model):
    """Every weight and bias of a model as ComfyUI patches it."""
    import comfy.lora

    weights = {f"diffusion_model.{name}": weight for name, weight in model.named_parameters()}
    places = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    patches = comfy.lora.load_lora(dict(tensors), places)
    return {
        name.removeprefix("diffusion_model."): comfy.lora.calculate_weight(
            [(1.0, patches[name], 1.0, None, None)] if name in patches else [], weight.clone(), name
        )
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    "settings", [*LORAS.values(), *LYCORIS.values()], ids=[*LORAS, *(f"lycoris {n}" for n in LYCORIS)]
)
def test_comfyui_makes_of_the_file_what_the_engine_computes(settings, plugin, tmp_path, caplog):
    base, model = transformer(), transformer()
    adapter = changed(add_adapter(model, settings, seed=0))
    tensors, metadata = adapter.export()
    modules = {name: module.weight for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    write_lora(tmp_path / "adapter.safetensors", tensors, modules, metadata)
    patched = in_comfyui(tensors, base)
    assert "not loaded" not in caplog.text
    assert "ERROR" not in caplog.text
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, AdaptedLinear) and ".own." not in n}
    assert layers.keys() == adapter.layers.keys()
    for name, layer in layers.items():
        weight, bias = in_engine(layer)
        moved = (weight - layer.base_layer.weight).abs().max()
        assert moved > 1e-3 * weight.abs().max(), name
        assert (patched[f"{name}.weight"] - weight).abs().max() < 1e-6 * weight.abs().max(), name
        if layer.bias is not None:
            assert (patched[f"{name}.bias"] - bias).abs().max() < 1e-6 * bias.abs().max(), name


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_lycoris_starts_as_the_base_turns_off_and_learns_everywhere(settings):
    model, seen = transformer(), inputs()
    with torch.no_grad():
        base = model(*seen)
    adapter = add_adapter(model, settings, seed=0)
    with torch.no_grad():
        assert (model(*seen) - base).abs().max() <= (1e-5 * base.abs().max() if settings.dora_wd else 0)
        changed(adapter)
        trained = model(*seen)
        assert (trained - base).abs().max() > 1e-2
        with adapter.off():
            assert torch.equal(model(*seen), base)
        assert torch.equal(model(*seen), trained)
    model.train()
    for _ in range(12 if settings.algo == "dylora" else 1):  # which draws what learns
        model(*seen).square().mean().backward()
    assert [name for name, weight in adapter.weights.items() if not weight.grad.abs().max() > 0] == []
    model.eval()
    again, saved = transformer(), {name: weight.clone() for name, weight in adapter.weights.items()}
    other = add_adapter(again, settings, seed=5)
    other.load({**saved, **adapter.frozen}, "x")
    with torch.no_grad():
        assert torch.equal(again(*seen), trained)


@pytest.mark.parametrize("stored", ["bf16", "int8"])
@pytest.mark.parametrize(
    "settings", [*LORAS.values(), *LYCORIS.values()], ids=[*LORAS, *(f"lycoris {n}" for n in LYCORIS)]
)
def test_the_base_may_be_stored_smaller_than_it_computes(settings, stored):
    model, whole = transformer(), transformer()
    if stored == "bf16":
        model, whole = model.bfloat16(), whole.bfloat16().float()  # fp32 is what this CPU computes in
        model.compute_dtype = torch.float32
    adapter, expected = (changed(add_adapter(m, settings, 0), 0.05) for m in (model, whole))
    expected.load({**adapter.weights, **adapter.frozen}, "x")
    if stored == "int8":
        assert quantise(model, "int8-torchao")
    out, wanted = model(*inputs()), whole(*inputs())
    assert (out - wanted).abs().max() < (1e-5 if stored == "bf16" else 0.2) * wanted.abs().max()
    model.train()
    for _ in range(12 if adapter.draws else 1):
        model(*inputs()).square().mean().backward()
    assert [name for name, weight in adapter.weights.items() if not weight.grad.abs().max() > 0] == []
    assert all(torch.isfinite(tensor).all() for tensor in adapter.export()[0].values())


def test_dylora_of_full_rank_is_a_lora_of_alpha_over_rank():
    adapter = changed(add_adapter(transformer(), lycoris("dylora", block_size=2, multiplier=0.5), 0))
    name = "layers.0.attention.qkv"
    down, up = (
        torch.cat([adapter.weights[f"{name}.dylora.{half}_list.{n}"] for n in range(3)], dim)
        for half, dim in (("down", 0), ("up", 1))
    )
    weight, _ = in_engine(adapter.layers[name])
    added = 0.5 * 2.5 / 6 * up @ down
    assert torch.allclose(weight - adapter.layers[name].base_layer.weight, added, atol=1e-5)


def test_split_lycoris_layers_are_those_of_lycoris_itself_on_apart_layers():
    """On three linear layers that hold the rows of q, k and v, as lycoris-lora puts them on diffusers' model."""
    from lycoris.wrapper import network_module_dict

    settings = lycoris("lokr", 10000, factor=4, qkv="split")
    adapter = changed(add_adapter(transformer(), settings, 0))
    layer = adapter.layers["layers.0.attention.qkv"]
    x, weights = torch.randn(3, 48), layer.base_layer.weight.split(CONFIG.qkv_rows)
    for part, weight, out in zip("qkv", weights, layer(x).split(CONFIG.qkv_rows, -1), strict=True):
        linear = nn.Linear(48, len(weight), bias=False)
        linear.weight.data.copy_(weight)
        theirs = network_module_dict["lokr"](part, linear, 1.0, 10000, 2.5, factor=4)
        theirs.apply_to()
        own = {n.removeprefix("lokr."): w for n, w in layer.own[part].trained().items()}
        assert theirs.load_state_dict(own, strict=False).unexpected_keys == []
        assert (linear(x) - out).abs().max() < 1e-5 * out.abs().max(), part


def test_lycoris_draws_from_the_seed_and_from_torch_alone():
    settings = lycoris("dylora", block_size=2, module_dropout=0.3)
    first, again, other = (add_adapter(transformer(), settings, seed) for seed in (1, 1, 2))
    assert first.draws
    assert all(torch.equal(weight, again.weights[name]) for name, weight in first.weights.items())
    assert any(not torch.equal(weight, other.weights[name]) for name, weight in first.weights.items())
    model = transformer().train()
    changed(add_adapter(model, settings, 0))

    def drawn(seed):
        torch.manual_seed(seed)
        return model(*inputs())

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize(
    "settings",
    [LORAS["dora, pissa, split"], LYCORIS["lokr, split"], LYCORIS["loha"], LYCORIS["boft"], LYCORIS["dylora"]],
    ids=["dora", "lokr split", "loha", "boft", "dylora"],
)
def test_compiled_blocks_compute_the_same_without_breaks(settings):
    torch._dynamo.reset()
    model = transformer()
    adapter = changed(add_adapter(model, settings, 0))
    with torch.no_grad():
        expected = model(*inputs())
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        assert (model(*inputs()) - expected).abs().max() < 1e-5 * expected.abs().max()
    if adapter.draws:
        model.train()(*inputs())  # what is drawn breaks no graph either


def test_every_algorithm_is_tried():
    assert {settings.algo for settings in LYCORIS.values()} == {*ALGOS}


def test_simpletuners_configuration_trains_the_classes_it_names():
    config = {
        "algo": "lokr", "multiplier": 0.5, "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "full_matrix": True,
        "init_lokr_norm": 1e-3, "conv_dim": 4,
        "apply_preset": {
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"Attention": {"factor": 8}, "LuminaFeedForward": {"factor": 4}},
        },
    }  # fmt: skip
    settings = lycoris_from_json(config)
    assert lycoris_from_json(settings.as_json()) == settings
    adapter = add_adapter(transformer(), settings, 0)
    assert len(adapter.layers) == 5 * 4
    out = adapter.weights["context_refiner.0.attention.out.lokr.lokr_w1"]
    assert out.shape == (6, 6)  # 48 = 6 · 8
    assert out.eq(1).all()
    w1, w2 = (adapter.weights[f"layers.1.feed_forward.w2.lokr.lokr_w{n}"] for n in (1, 2))
    assert (w1.shape, w2.shape) == ((4, 4), (12, 16))
    weight = adapter.layers["layers.1.feed_forward.w2"].base_layer.weight
    assert w2.std().item() == pytest.approx(1e-3 * weight.std().item(), rel=1e-4)
    assert "LyCORIS lokr on 20 layers" in adapter.describe()
    with pytest.raises(SettingError, match=r"'Transformer2DModel' matches nothing .* Attention, Block"):
        add_adapter(transformer(), LyCORISSettings(apply_preset={"target_module": ["Transformer2DModel"]}), 0)
    with pytest.raises(SettingError, match="impossible to decompose 48"):
        add_adapter(transformer(), lycoris("boft", 4), 0)


def test_names_choose_layers_and_their_options():
    preset = {
        "target_name": [r"layers\.\d+\.attn\.to_q", r"context_refiner\.0\.attention\.out"],
        "name_algo_map": {r".*adaLN_modulation": {"algo": "full"}},
        "exclude_name": [r"layers\.1"],
    }
    adapter = add_adapter(transformer(), LyCORISSettings(algo="loha", apply_preset=preset), 0)
    assert {name: layer.settings.algo for name, layer in adapter.layers.items()} == {
        "context_refiner.0.attention.out": "loha",
        "final_layer.adaLN_modulation.1": "full",
        "layers.0.adaLN_modulation.1": "full",
        "layers.0.attention.qkv": "loha",
        "noise_refiner.0.adaLN_modulation.1": "full",
    }
    with pytest.raises(SettingError, match=r"'moe' matches none .* layers\.N\.attention\.qkv"):
        add_adapter(transformer(), LyCORISSettings(apply_preset={"target_name": ["moe"]}), 0)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    model = transformer()
    modules = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors, _ = add_adapter(model, lycoris("lokr", 1, factor=4), 0).export()
    check_lora(tensors, modules, "x")
    key = "diffusion_model.layers.0.attention.out.lokr_w1"
    for wrong in ({key: torch.zeros(5, 4)}, {key.replace("lokr", "tucker"): tensors[key]}):
        with pytest.raises(ModelError):
            check_lora({**tensors, **wrong}, modules, "x")


def test_a_full_fine_tune_is_a_model_of_comfyui(plugin):
    import comfy.supported_models

    bridge = importlib.import_module("lumina2_trainer.nodes.bridge")
    adapter = changed(add_adapter(transformer(), FullSettings(), 0))
    theirs = comfy.supported_models.Lumina2(bridge._comfy_config(CONFIG)).get_model({}).diffusion_model
    theirs.load_state_dict(adapter.export()[0])
    found = theirs.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in adapter.weights.items())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "bias": True}])
def test_layers_and_their_gradients_are_pefts(options):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    bias, options = options.get("bias", False), {key: value for key, value in options.items() if key != "bias"}
    base, x = Linear(24, 40, bias=bias).requires_grad_(False), torch.randn(7, 24)
    settings = LoRASettings(4, alpha=6, **options)
    pairs = [(nn.Parameter(torch.randn(4, 24)), nn.Parameter(torch.randn(40, 4)))]
    ours = LoRALinear(base, pairs, settings.scale, use_dora=settings.use_dora)
    plain = nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(base.state_dict())
    holder = nn.Sequential(plain)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **options)
    theirs = dict(inject_adapter_in_model(config, holder).named_parameters())
    names = {"lora_A.weight": "0.lora_A.default.weight", "lora_B.weight": "0.lora_B.default.weight"}
    names["lora_magnitude_vector"] = "0.lora_magnitude_vector.default.weight"
    with torch.no_grad():
        if ours.lora_magnitude is not None:
            ours.lora_magnitude *= 1 + torch.rand(40)
        for name, weight in ours.trained().items():
            theirs[names[name]].copy_(weight)
    result, expected, target = ours(x), holder(x), torch.randn(7, 40)
    assert (result - expected).abs().max() < 1e-6 * expected.abs().max()
    (result - target).square().mean().backward()
    (expected - target).square().mean().backward()
    for name, weight in ours.trained().items():
        gradient = theirs[names[name]].grad
        assert (weight.grad - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_base_are_pefts(init):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    base = Linear(24, 40, bias=False)
    settings = LoRASettings(4, alpha=6, init=init)
    [(a, b)] = _initial_pairs("x", base, (40,), settings, torch.Generator())
    holder = nn.Sequential(nn.Linear(24, 40, bias=False))
    holder[0].load_state_dict(base.state_dict())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    theirs = dict(inject_adapter_in_model(config, holder).named_parameters())
    expected = theirs["0.lora_B.default.weight"] @ theirs["0.lora_A.default.weight"]
    assert (b @ a - expected).abs().max() < 1e-5 * expected.abs().max()
