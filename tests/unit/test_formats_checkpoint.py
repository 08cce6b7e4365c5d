"""Whole models from one layout to another, on the nano model; and the two subcommands."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.adapter.formats import command
from training.adapter.formats.checkpoint import export_model
from training.adapter.formats.layers import Adapters, Layer, shapes
from training.adapter.formats.layouts import gemma_config, original_vae, transformer_json, vae_config
from training.adapter.formats.read import read_adapters
from training.adapter.formats.write import write_adapters
from training.errors import ModelError
from training.files import read_json
from training.model.config import TransformerConfig
from training.model.loading import load_transformer
from training.model.vae import diffusers_vae

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_becomes_a_file_and_a_folder_again(tmp_path):
    told = export_model(NANO, tmp_path / "x.safetensors", "comfyui")
    assert told["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0, "readers that map the file want it so"
    file = load_file(tmp_path / "x.safetensors")
    ours = load_transformer(NANO, dtype=None).state_dict()
    assert file.pop("norm_final.weight").eq(1).all()
    assert same(file, dict(ours))
    told = export_model(tmp_path / "x.safetensors", tmp_path / "again", "diffusers", base=NANO)
    assert told["parts"] == ["transformer", "text_encoder", "tokenizer", "vae", "scheduler"]
    for part in ("transformer", "vae"):
        name = "diffusion_pytorch_model.safetensors"
        assert same(load_file(tmp_path / "again" / part / name), load_file(NANO / part / name))
    assert TransformerConfig.from_diffusers(read_json(tmp_path / "again" / "transformer" / "config.json")) == (
        TransformerConfig.from_diffusers(read_json(NANO / "transformer" / "config.json"))
    )
    assert read_json(tmp_path / "again" / "model_index.json") == read_json(NANO / "model_index.json")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"modelspec.architecture": "lumina-2"}
    export_model(NANO, tmp_path / "small.safetensors", "comfyui", stored="fp16")
    small = load_file(tmp_path / "small.safetensors")
    assert {weight.dtype for weight in small.values()} == {torch.float16}
    assert torch.equal(small["x_embedder.weight"], file["x_embedder.weight"].half())


def test_what_cannot_be_exported_is_told(tmp_path):
    export_model(NANO, tmp_path / "x.safetensors", "comfyui")
    with pytest.raises(ModelError, match="is there already"):
        export_model(NANO, tmp_path / "x.safetensors", "comfyui")
    with pytest.raises(ModelError, match=r"widths alone \(2304"):
        export_model(NANO, tmp_path / "y.safetensors", "all-in-one")
    with pytest.raises(ModelError, match=r"should end in \.safetensors"):
        export_model(NANO, tmp_path / "y", "comfyui")
    with pytest.raises(ModelError, match="heads of 32"):  # which no single file tells
        export_model(tmp_path / "x.safetensors", tmp_path / "y", "diffusers")
    with pytest.raises(ModelError, match="has no model_index"):
        export_model(tmp_path / "x.safetensors", tmp_path / "y", "diffusers", base=tmp_path)
    cut = load_file(tmp_path / "x.safetensors")
    cut["x_embedder.weight"] = cut["x_embedder.weight"][:-1].clone()
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=r"does not fit .*'x_embedder\.weight'"):
        export_model(tmp_path / "cut.safetensors", tmp_path / "y", "diffusers", base=NANO)
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "cut.safetensors"}, "nothing half done"


def test_settings_are_worked_out_from_shapes():
    for part, stem, made in (("vae", "diffusion_pytorch_model", vae_config), ("text_encoder", "model", gemma_config)):
        there = read_json(NANO / part / "config.json")
        weights = load_file(NANO / part / f"{stem}.safetensors")
        told = made({name.removeprefix("model."): tuple(w.shape) for name, w in weights.items()})
        differing = {key for key, value in told.items() if key in there and there[key] != value}
        assert differing <= {"sample_size"}
        assert len(told.keys() & there.keys()) > 12
    # 4 · 56 times 230 / (4 · 56) is rounded to just below 230, and diffusers rounds down
    odd = TransformerConfig(dim=56, heads=4, kv_heads=2, axes_dim=(6, 4, 4), ffn_dim=230, caption_dim=8, layers=2)
    for config in (TransformerConfig(), odd):
        assert TransformerConfig.from_diffusers(transformer_json(config)) == config


def test_the_vae_goes_to_its_original_names_and_back():
    weights = load_file(NANO / "vae" / "diffusion_pytorch_model.safetensors")
    original = original_vae(weights)
    assert original["decoder.mid.attn_1.proj_out.weight"].ndim == 4
    assert {"encoder.down.0.block.0.norm1.weight", "decoder.up.3.upsample.conv.weight"} <= original.keys()
    assert "encoder.down.1.block.0.nin_shortcut.weight" in original
    assert same(diffusers_vae(original.items()), weights)


def parsed(add, *arguments):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args([*map(str, arguments)])


def test_loras_are_converted_merged_and_reduced_from_the_command_line(tmp_path):
    config = TransformerConfig.from_diffusers(read_json(NANO / "transformer" / "config.json"))
    generator = torch.Generator().manual_seed(0)
    rows, columns = shapes(config)["layers.0.attention.qkv"]
    for name in "ab":
        f = {"A": torch.randn(4, columns, generator=generator), "B": torch.randn(rows, 4, generator=generator)}
        start = Adapters(config, {("layers.0.attention.qkv", ""): Layer("lora", f)})
        write_adapters(tmp_path / f"{name}.safetensors", start)
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    found = command.convert(parsed(command.add_convert_arguments, *files[:1], "--to", "diffusers"))
    assert found["written"] == str(tmp_path / "a-diffusers.safetensors")
    assert (found["tensors"], found["relative_error"]) == (6, 0)
    a, b = (read_adapters(file).delta("layers.0.attention.qkv", None) for file in files)
    command.convert(parsed(command.add_convert_arguments, *files, "--output", tmp_path / "both.safetensors"))
    both = read_adapters(tmp_path / "both.safetensors").delta("layers.0.attention.qkv", None)
    assert torch.allclose(both, a + b, atol=1e-4)
    small = command.convert(
        parsed(command.add_convert_arguments, *files, "--rank", 3, "--output", tmp_path / "c.safetensors")
    )
    assert "rank 3, relative error 0." in small["notes"][0]
    with pytest.raises(ModelError, match="is there already"):
        command.convert(parsed(command.add_convert_arguments, *files[:1], "--to", "diffusers"))
    f = {"A": torch.zeros(1, 2304), "B": torch.zeros(2304, 1)}
    write_adapters(
        tmp_path / "real.safetensors", Adapters(TransformerConfig(), {("layers.0.attention.out", ""): Layer("lora", f)})
    )
    with pytest.raises(ModelError, match="Choose a LoRA of this model"):
        command.convert(parsed(command.add_convert_arguments, tmp_path / "real.safetensors", "--base", NANO))
    json.dumps(found)


def test_models_are_exported_from_the_command_line(tmp_path):
    target = tmp_path / "x.safetensors"
    found = command.export(parsed(command.add_export_arguments, NANO, target, "--to", "comfyui", "--dtype", "bf16"))
    assert found["parts"] == ["transformer"]
    assert load_file(target)["x_embedder.weight"].dtype == torch.bfloat16
