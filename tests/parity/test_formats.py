"""Files in every format against the loaders they are for: ComfyUI's LoraLoader, diffusers, PEFT, LyCORIS.

Weights are compared as each loader makes them, and what they change in diffusers' prediction is compared in fp64.
"""

import importlib
import json
import logging
import sys
from functools import lru_cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from training.adapter.adapter import add_adapter
from training.adapter.base import AdaptedLinear
from training.adapter.formats.layers import PARTS, Adapters, Layer, shapes
from training.adapter.formats.names import diffusers_name
from training.adapter.formats.read import PEFT_SETTINGS, adapters_of, read_adapters
from training.adapter.formats.write import write_adapters
from training.config.adapter import LoRASettings, LyCORISSettings
from training.errors import ModelError
from training.model.config import TransformerConfig
from training.model.keys import diffusers_weights
from training.model.transformer import Lumina2Transformer

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=192, channels=4, axes_dim=(4, 4, 4)
)  # 48 rows of q, 24 of k, 24 of v
EVERYTHING = {"target_module": ["Lumina2Transformer"]}


def lycoris(algo, dim=6, **options):
    return LyCORISSettings(algo=algo, linear_dim=dim, linear_alpha=2.5, apply_preset=EVERYTHING, **options)


TRAINED = {
    "lora": LoRASettings(4, alpha=6, targets="all"),
    "split": LoRASettings(4, alpha=6, targets="all", qkv="split"),
    "rslora, some blocks": LoRASettings(4, targets="attention+ff", blocks="1", use_rslora=True),
    "pissa": LoRASettings(4, alpha=6, targets="all", init="pissa"),
    "dora": LoRASettings(4, alpha=6, targets="all", use_dora=True),
    "dora, split": LoRASettings(4, alpha=6, targets="all", use_dora=True, qkv="split"),
    "dylora": lycoris("dylora", block_size=2),
    "locon, dora": lycoris("locon", dora_wd=True),
    "dora by columns": lycoris("lora", dora_wd=True, wd_on_output=False),
    "loha": lycoris("loha"),
    "lokr": lycoris("lokr", 2, factor=4),
    "lokr, dora": lycoris("lokr", 1, factor=4, dora_wd=True),
    "full": lycoris("full"),
    "ia3": lycoris("ia3"),
    "glora": lycoris("glora"),
    "diag-oft": lycoris("diag-oft", 4),
    "boft": lycoris("boft"),
    "lokr, split": lycoris("lokr", 10000, factor=4, qkv="split"),
    "lokr of a small rank, split": lycoris("lokr", 1, factor=2, qkv="split"),
    "lokr, dora, split": lycoris("lokr", 1, factor=2, dora_wd=True, qkv="split"),
    "loha, split": lycoris("loha", 2, qkv="split"),
    "loha by columns, split": lycoris("loha", 2, dora_wd=True, wd_on_output=False, qkv="split"),
    "ia3 on input, split": lycoris("ia3", train_on_input=True, qkv="split"),
    "glora, split": lycoris("glora", qkv="split"),
    "diag-oft, split": lycoris("diag-oft", 4, qkv="split"),
}
EXACT_IN_DIFFUSERS = ("lora", "split", "rslora, some blocks", "pissa", "dora", "dora, split", "dylora", "locon, dora")


def base_model(seed=0):
    torch.manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made.eval()


@lru_cache(1)
def base_weights():
    return base_model().state_dict()


def trained(settings, path):
    """The file of an adapter after updates of some size, and what it makes of each weight and bias in the engine."""
    model = base_model()
    adapter = add_adapter(model, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight += torch.randn(weight.shape, generator=generator) * 0.2
    tensors, metadata = adapter.export()
    save_file(tensors, path, metadata)
    return read_adapters(path, CONFIG), in_engine(model)


@torch.no_grad()
def in_engine(model):
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear) and ".own." not in name:
            zero = layer(torch.zeros(1, layer.in_features))
            found[name] = (layer(torch.eye(layer.in_features)) - zero).T, zero[0]
    return found


def base(module):
    return base_weights()[f"{module}.weight"]


@pytest.fixture(scope="module")
def comfyui(plugin, tmp_path_factory):
    """What ComfyUI's LoraLoader makes of a file: every weight, and what it logged."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import folder_paths

    bridge = importlib.import_module("lumina2_trainer.nodes.bridge")
    assert "nodes" not in sys.modules or hasattr(sys.modules["nodes"], "LoraLoader"), "ComfyUI's nodes, not ours"
    comfy_nodes = importlib.import_module("nodes")
    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    described = comfy.supported_models.Lumina2(bridge._comfy_config(CONFIG))
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({})
    weights = {**base_weights(), "norm_final.weight": torch.ones(48)}
    model.diffusion_model.load_state_dict(weights)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    def load(path):
        (folder / path.name).write_bytes(path.read_bytes())
        folder_paths.filename_list_cache.clear()
        adapted, _ = comfy_nodes.LoraLoader().load_lora(patcher, None, path.name, 1.0, 0.0)
        comfy.model_management.load_models_gpu([adapted], force_full_load=True)
        found = {name: w.clone() for name, w in model.diffusion_model.state_dict().items()}
        adapted.detach()
        return found

    load.model = model
    return load


def merged(adapters):
    """The base with what the file adds, under our names."""
    weights = {name: w.clone() for name, w in base_weights().items()}
    for module, parts in adapters.modules.items():
        weights[f"{module}.weight"] += adapters.delta(module, base)
        for part, layer in parts.items():
            if layer.bias is not None:
                weights[f"{module}.bias"][adapters.rows((module, part))] += layer.bias
    return weights


def diffusers_model(weights):
    model = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=32,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 512, 512),
        cap_feat_dim=8,
    )
    named = {}
    for name, weight in weights.items():
        named |= diffusers_weights(name, weight, CONFIG)
    model.load_state_dict({name: w.clone() for name, w in named.items()})
    return model.double().eval()


def predicted(model):
    generator = torch.Generator().manual_seed(2)
    latents, captions = torch.randn(2, 4, 4, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        return model(latents.double(), torch.tensor([0.3, 0.8]), captions.double(), mask, return_dict=False)[0]


@lru_cache(1)
def predicted_before():
    return predicted(diffusers_model(base_weights()))


def assert_changes_as(model, adapters, within=1e-6):
    """A diffusers model predicts as one whose weights have what the file adds."""
    expected = predicted(diffusers_model(merged(adapters))) - predicted_before()
    assert expected.abs().max() > 1e-2
    off = (predicted(model) - predicted_before() - expected).norm() / expected.norm()
    assert off < within


@pytest.mark.parametrize("kind", TRAINED)
def test_comfyuis_lora_loader_makes_of_each_format_what_the_engine_computes(kind, comfyui, tmp_path, caplog):
    adapters, expected = trained(TRAINED[kind], tmp_path / "trained.safetensors")
    weights = base_weights()
    for module, (weight, _) in expected.items():  # our own file is understood
        assert (weights[f"{module}.weight"] + adapters.delta(module, base) - weight).abs().max() < 1e-6, module
    for format in ("comfyui", "kohya"):
        path = tmp_path / f"{kind} {format}.safetensors"
        write_adapters(path, adapters, format, base)
        with caplog.at_level(logging.WARNING):
            found = comfyui(path)
        assert not [r for r in caplog.records if "not loaded" in r.message or r.levelno >= logging.ERROR]
        for module, (weight, bias) in expected.items():
            assert (found[f"{module}.weight"] - weight).abs().max() < 1e-6 * max(1, weight.abs().max()), module
            if f"{module}.bias" in found:
                assert (found[f"{module}.bias"] - bias).abs().max() < 1e-6 * bias.abs().max(), module
        assert {n for n, w in weights.items() if not torch.equal(found[n], w)} >= {f"{m}.weight" for m in expected}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", EXACT_IN_DIFFUSERS)
def test_diffusers_predicts_what_the_file_says(kind, dtype, tmp_path, caplog):
    adapters, _ = trained(TRAINED[kind], tmp_path / "trained.safetensors")
    path = tmp_path / "diffusers.safetensors"
    result = write_adapters(path, adapters, "diffusers", base, dtype=dtype)
    assert result.relative_error == 0
    pipeline = Lumina2Pipeline(
        transformer=diffusers_model(base_weights()),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    logging.getLogger("diffusers").propagate = True
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]
    assert_changes_as(pipeline.transformer.double(), adapters, 1e-6 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("kind", ["split", "rslora, some blocks", "dora"])
def test_peft_itself_reads_the_file(kind, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    adapters, _ = trained(TRAINED[kind], tmp_path / "trained.safetensors")
    result = write_adapters(tmp_path / "x.safetensors", adapters, "diffusers", base)
    told = json.loads(result.metadata[PEFT_SETTINGS])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in told.items()})
    model = inject_adapter_in_model(config, diffusers_model(base_weights()).float())
    tensors = load_file(tmp_path / "x.safetensors")
    outcome = set_peft_model_state_dict(model, {k.removeprefix("transformer."): t for k, t in tensors.items()})
    assert outcome.unexpected_keys == []
    assert_changes_as(model.double(), adapters)


def test_lokr_that_was_trained_split_is_read_by_diffusers(tmp_path, caplog):
    generator, layers = torch.Generator().manual_seed(0), {}
    for block in ("layers.0", "layers.1"):
        for part, rows in zip(PARTS, CONFIG.qkv_rows, strict=True):
            f = {"lokr_w1": (4, 4), "lokr_w2_a": (rows // 4, 2), "lokr_w2_b": (2, 12)}
            factors = {name: torch.randn(size, generator=generator) * 0.3 for name, size in f.items()}
            layers[f"{block}.attention.qkv", part] = Layer("lokr", factors)
    adapters = Adapters(CONFIG, layers)
    result = write_adapters(tmp_path / "x.safetensors", adapters, "diffusers")
    assert PEFT_SETTINGS not in result.metadata
    assert "transformer.layers.0.attn.to_k.lokr_w2_a" in result.tensors
    model = diffusers_model(base_weights())
    logging.getLogger("diffusers").propagate = True
    model.load_lora_adapter(str(tmp_path), weight_name="x.safetensors")  # the pipeline's own check refuses LoKr
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]
    assert_changes_as(model.double(), adapters)


@pytest.mark.parametrize("dim", [10000, 2], ids=["full matrices", "a small rank"])
@pytest.mark.parametrize("preset", [{}, {"target_name": [r".*attention\.qkv"]}], ids=["attention", "qkv alone"])
def test_lokr_that_the_engine_trains_split_is_read_by_diffusers(preset, dim, tmp_path, caplog):
    settings = LyCORISSettings("lokr", linear_dim=dim, linear_alpha=3, factor=4, qkv="split", apply_preset=preset)
    adapters, expected = trained(settings, tmp_path / "trained.safetensors")
    for module, (weight, _) in expected.items():
        assert (base(module) + adapters.delta(module, base) - weight).abs().max() < 1e-6, module
    result = write_adapters(tmp_path / "x.safetensors", adapters, "diffusers", rank=1)
    assert result.relative_error == 0
    plain = dim == 2 and preset  # a LoRA by then, which diffusers has anyway
    assert ("transformer.layers.0.attn.to_k.lora_A.weight" if plain else "transformer.layers.0.attn.to_k.lokr_w1") in (
        result.tensors
    )
    model = diffusers_model(base_weights())
    logging.getLogger("diffusers").propagate = True
    model.load_lora_adapter(str(tmp_path), weight_name="x.safetensors")
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]
    assert_changes_as(model.double(), adapters)


@pytest.mark.parametrize("kind", ["loha", "lokr", "full", "glora", "ia3", "diag-oft"])
def test_what_diffusers_cannot_express_is_a_lora_of_the_error_told(kind, tmp_path):
    settings = LyCORISSettings(**{**TRAINED[kind].__dict__, "apply_preset": {"target_module": ["Attention"]}})
    adapters, _ = trained(settings, tmp_path / "trained.safetensors")
    with pytest.raises(ModelError, match="Choose a rank"):
        write_adapters(tmp_path / "x.safetensors", adapters, "diffusers", base)
    result = write_adapters(tmp_path / "x.safetensors", adapters, "diffusers", base, rank=5)
    found = read_adapters(tmp_path / "x.safetensors", CONFIG)
    gone = sum((found.delta(m, base) - adapters.delta(m, base)).square().sum() for m in adapters.modules)
    whole = sum(adapters.delta(m, base).square().sum() for m in adapters.modules)
    assert 0.01 < result.relative_error == pytest.approx(float((gone / whole).sqrt()), rel=1e-3)
    model = diffusers_model(base_weights())
    model.load_lora_adapter(str(tmp_path), weight_name="x.safetensors")
    assert_changes_as(model.double(), found)


@pytest.mark.parametrize("kind", ["lora", "split", "dora", "loha", "lokr", "full", "glora", "diag-oft"])
def test_lycoris_reads_its_format_on_diffusers_model(kind, tmp_path):
    from lycoris import create_lycoris_from_weights

    adapters, _ = trained(TRAINED[kind], tmp_path / "trained.safetensors")
    path = tmp_path / "lycoris.safetensors"
    write_adapters(path, adapters, "lycoris", base)
    model = diffusers_model(base_weights()).float()
    network, weights = create_lycoris_from_weights(1.0, str(path), model)
    assert {name.split(".")[0] for name in weights} == {lora.lora_name for lora in network.loras}
    network.merge_to(1.0)
    assert_changes_as(model.double(), adapters, 1e-5)  # it adds up in fp32


def peft_shaped(metadata):
    """A file as SimpleTuner and ai-toolkit leave it: diffusers' own names, from PEFT's layers on diffusers' model."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    targets = ["to_q", "to_k", "to_v", "to_out.0"] if metadata else ["to_q", "to_k", "to_v", "to_out.0", "linear_1"]
    config = LoraConfig(r=4, lora_alpha=6 if metadata else 4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    model = inject_adapter_in_model(config, diffusers_model(base_weights()).float())
    tensors = {f"transformer.{key}": t.contiguous() for key, t in get_peft_model_state_dict(model).items()}
    told = {f"transformer.{key}": value for key, value in config.to_dict().items() if key in ("r", "lora_alpha")}
    return tensors, {PEFT_SETTINGS: json.dumps(told)} if metadata else {}, model


@pytest.mark.parametrize("trainer", ["SimpleTuner", "ai-toolkit"])
def test_files_that_comfyui_refuses_are_converted_exactly(trainer, comfyui, tmp_path, caplog):
    tensors, metadata, model = peft_shaped(metadata=trainer == "SimpleTuner")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    comfyui(tmp_path / "theirs.safetensors")
    assert "lora key not loaded: transformer.layers.0.attn.to_q" in caplog.text
    caplog.clear()
    adapters = read_adapters(tmp_path / "theirs.safetensors", CONFIG)
    write_adapters(tmp_path / f"{trainer}.safetensors", adapters)
    found = comfyui(tmp_path / f"{trainer}.safetensors")
    assert "not loaded" not in caplog.text
    assert_changes_as(model.double(), adapters)
    assert_changes_as(diffusers_model({n: w for n, w in found.items() if n != "norm_final.weight"}), adapters, 1e-5)


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "OFT"])
def test_files_of_comfyuis_own_trainer_are_read(algorithm, comfyui, tmp_path, caplog):
    """An adapter on every weight and a difference of every norm and bias, under its module's names."""
    from comfy.weight_adapter import adapter_maps

    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in comfyui.model.diffusion_model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if weight.ndim < 2:
            made = {"diff" if kind == "weight" else "diff_b": torch.empty_like(weight)}
        else:
            made = dict(adapter_maps[algorithm].create_train(weight, rank=4, alpha=1.0).named_parameters())
        for part, tensor in made.items():
            drawn = tensor if part == "alpha" else torch.randn(tensor.shape, generator=generator) * 0.2
            tensors[f"diffusion_model.{module}.{part}"] = drawn.detach().clone()
    path = tmp_path / f"{algorithm} of ComfyUI.safetensors"
    save_file(tensors, path)
    found = comfyui(path)
    assert not [r for r in caplog.records if "not loaded" in r.message or r.levelno >= logging.ERROR]
    for name, weight in merged(read_adapters(path, CONFIG)).items():
        assert not torch.equal(weight, base_weights()[name]), name
        assert (found[name] - weight).abs().max() < 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_pefts_own_folders_are_read_at_their_scale(kind, tmp_path):
    import peft

    config = getattr(peft, f"{kind}Config")(r=2, alpha=3, target_modules=["to_q", "to_out.0"])
    model = peft.inject_adapter_in_model(config, diffusers_model(base_weights()).float())
    generator = torch.Generator().manual_seed(4)
    tensors = {
        k: torch.randn(t.shape, generator=generator) * 0.5 for k, t in peft.get_peft_model_state_dict(model).items()
    }
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    config.save_pretrained(tmp_path)
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    assert_changes_as(model.double(), read_adapters(tmp_path / "adapter_model.safetensors", CONFIG))


def test_all_blocks_of_the_real_widths_load_in_diffusers_under_comfyuis_names():
    """Its converter wants every layer of every block, no alpha, and Lumina-Image-2.0's widths."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers

    from training.adapter.formats.write import written

    config, generator = TransformerConfig(layers=1, refiner_layers=1), torch.Generator().manual_seed(0)
    layers = {}
    for module, shape in shapes(config).items():
        if len(shape) == 2 and module.split(".")[0] in ("layers", "noise_refiner", "context_refiner"):
            f = {"A": torch.randn(2, shape[1], generator=generator), "B": torch.randn(shape[0], 2, generator=generator)}
            layers[module, ""] = Layer("lora", f)
    start = Adapters(config, layers)
    theirs = _convert_non_diffusers_lumina2_lora_to_diffusers(dict(written(start).tensors))
    ours = written(start, "diffusers").tensors
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert adapters_of(theirs, {}).modules.keys() == start.modules.keys()


def test_every_linear_layer_of_diffusers_model_has_its_name():
    theirs = {n for n, m in diffusers_model(base_weights()).named_modules() if isinstance(m, nn.Linear)}
    ours = set()
    for module, shape in shapes(CONFIG).items():
        if len(shape) == 2:
            parts = PARTS if module.endswith("qkv") else ("",)
            ours |= {diffusers_name((module, part)) for part in parts}
    assert ours == theirs
