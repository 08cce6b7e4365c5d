"""The LoRA nodes in a real server: what they write draws what it should with ComfyUI's own loaders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import ServerError
from graphs import pictures, sampled
from safetensors.torch import load_file

from training.adapter.formats.layers import Adapters, Layer, shapes
from training.adapter.formats.write import write_adapters
from training.files import read_json
from training.model.config import TransformerConfig

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
CONFIG = TransformerConfig.from_diffusers(read_json(NANO / "transformer" / "config.json"))


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def comfyuis(name):
    """ComfyUI's own loader."""
    return node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0)


@pytest.fixture(scope="module")
def model(server):
    """The nano model, and a LoRA of rank 4 on its main blocks that shows: for LoraLoader and as diffusers has it."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for module, shape in shapes(CONFIG).items():
        if module.startswith("layers.") and len(shape) == 2:
            f = {"A": torch.randn(4, shape[1], generator=generator), "B": torch.randn(shape[0], 4, generator=generator)}
            layers[module, ""] = Layer("lora", {"A": f["A"] * 0.05, "B": f["B"] * 0.05})
    loras = server.base / "models" / "loras"
    for name, format in (("strong", "comfyui"), ("theirs", "diffusers")):
        write_adapters(loras / "lumina2" / f"{name}.safetensors", Adapters(CONFIG, layers), format)
    other = {("layers.0.attention.out", ""): Layer("lora", {"A": torch.zeros(1, 2304), "B": torch.zeros(2304, 1)})}
    write_adapters(loras / "real.safetensors", Adapters(TransformerConfig(), other))
    return {"model": node("Lumina2LoadDiffusers", folder="lumina2-nano (bundled)", dtype="fp32")}


def drawn(server, name, graph, source):
    server.run(graph | sampled(name, source))
    return pictures(server, name)[-1]


@pytest.fixture(scope="module")
def expected(server, model):
    """Pictures of the base and of ComfyUI's own loader."""
    own = comfyuis("lumina2/strong.safetensors")
    base, strong = drawn(server, "base", model, ["model", 0]), drawn(server, "own", model | {"own": own}, ["own", 0])
    assert np.abs(base - strong).max() > 10
    return base, strong


def loaded(lora, strength=1.0, by_block="", **more):
    return node("Lumina2LoadLoRA", model=["model", 0], lora=lora, strength=strength, block_strengths=by_block, **more)


def test_a_file_that_comfyui_refuses_is_loaded_block_by_block(server, model, expected):
    base, strong = expected
    graph = model | {"lora": loaded("lumina2/theirs.safetensors")}
    assert np.abs(drawn(server, "theirs", graph, ["lora", 0]) - strong).max() <= 1
    graph = model | {"lora": loaded("lumina2/theirs.safetensors", 1.0, "layers: 0")}
    assert np.array_equal(drawn(server, "no blocks", graph, ["lora", 0]), base)
    graph = model | {"lora": loaded("lumina2/theirs.safetensors", 2.0, "0-2: 0.5, 3-5: 0")}
    half = drawn(server, "half the blocks", graph, ["lora", 0])
    assert np.abs(half - base).max() > 2
    assert np.abs(half - strong).max() > 2
    assert "lora key not loaded" not in server.log.read_text(encoding="utf-8")


def test_it_is_converted_and_saved_once(server, model, expected):
    convert = node(
        "Lumina2ConvertLoRA", lora="lumina2/theirs.safetensors", format="comfyui", name="", rank=0, dtype="fp32"
    )
    save = node("Lumina2SaveLoRA", lora_model=["convert", 0], name="saved", format="kohya", dtype="fp32", rank=0)
    server.run({"convert": convert, "save": save})
    loras = server.base / "models" / "loras" / "lumina2"
    assert load_file(loras / "theirs-comfyui.safetensors").keys() == load_file(loras / "strong.safetensors").keys()
    for name in ("theirs-comfyui", "saved"):
        own = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=f"lumina2/{name}.safetensors", strength_model=1.0
        )
        assert np.abs(drawn(server, name, model | {"own": own}, ["own", 0]) - expected[1]).max() <= 1
    save["inputs"]["rank"] = 1  # runs again, and writes the same
    server.run({"convert": convert, "save": save})
    assert not (loras / "saved-2.safetensors").exists()
    save["inputs"]["dtype"] = "bf16"
    server.run({"convert": convert, "save": save})
    assert (
        load_file(loras / "saved-2.safetensors")["lora_unet_layers_0_attention_out.lora_up.weight"].dtype
        == torch.bfloat16
    )


def test_merged_baked_in_resized_and_extracted(server, model, expected):
    strong = expected[1]
    lines = "lumina2/strong.safetensors: 0.5\nlumina2/theirs.safetensors: 0.5"
    merge = node(
        "Lumina2MergeLoRA", loras=lines, rank=4, save_as="LoRA", name="merged", dtype="fp32", model=["model", 0]
    )
    assert np.abs(drawn(server, "merged", model | {"merge": merge}, ["merge", 1]) - strong).max() <= 1
    own = comfyuis("lumina2/merged.safetensors")
    assert np.abs(drawn(server, "merged file", model | {"own": own}, ["own", 0]) - strong).max() <= 1
    merged = load_file(server.base / "models" / "loras" / "lumina2" / "merged.safetensors")
    assert merged["diffusion_model.layers.0.attention.qkv.lora_A.weight"].shape[0] == 4
    merge["inputs"] |= {"save_as": "model", "name": "baked"}
    server.run(model | {"merge": merge})
    baked = node(
        "Lumina2LoadDiffusers", folder="lumina2-nano (bundled)", dtype="fp32", fine_tune="lumina2/baked.safetensors"
    )
    assert np.abs(drawn(server, "baked", {"model": baked}, ["model", 0]) - strong).max() <= 1
    extract = node(
        "Lumina2ExtractLoRA", model_tuned=["baked", 0], model_base=["model", 0], rank=4, name="out", dtype="fp32"
    )
    graph = model | {"baked": baked, "extract": extract}
    graph["lora"] = loaded("", lora_model=["extract", 0])
    assert np.abs(drawn(server, "extracted", graph, ["lora", 0]) - strong).max() <= 1
    resize = node("Lumina2ResizeLoRA", lora="lumina2/strong.safetensors", rank=2, name="", dtype="fp32")
    graph = model | {"resize": resize, "lora": loaded("", lora_model=["resize", 0])}
    assert np.abs(drawn(server, "resized", graph, ["lora", 0]) - strong).max() > 1
    resized = load_file(server.base / "models" / "loras" / "lumina2" / "strong-rank-2.safetensors")
    assert resized["diffusion_model.layers.0.attention.qkv.lora_A.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("lora", "by_block", "sentence"),
    [
        ("lumina2/gone.safetensors", "", "There is no LoRA 'lumina2/gone"),
        ("", "", "lora is empty"),
        ("real.safetensors", "", "Choose a LoRA of this model"),
        ("lumina2/strong.safetensors", "40: 1", "the model has layers 0-5"),
    ],
)
def test_what_cannot_be_loaded_is_told(server, model, lora, by_block, sentence):
    with pytest.raises(ServerError, match=sentence):
        server.run(model | {"lora": loaded(lora, 1.0, by_block)} | sampled("never", ["lora", 0]))
