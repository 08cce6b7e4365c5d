"""Whole models that we write, opened by those they are for: ComfyUI's checkpoint loader and diffusers' pipeline."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from safetensors import safe_open

from training.adapter.formats.checkpoint import export_model
from training.files import write_json

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
GEMMA = {
    "vocab_size": 4000,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lumina-Image-2.0's widths with one block in each stack but the refiners, and the nano's small text encoder."""
    folder = tmp_path_factory.mktemp("real") / "model"
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = Lumina2Transformer2DModel(num_layers=1, cap_feat_dim=192)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            small = torch.empty(weight.shape).normal_(1 if weight.ndim == 1 and "bias" not in name else 0, 0.02)
            weight.copy_(small)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(NANO / part, folder / part)
    write_json(folder / "model_index.json", {"_class_name": "Lumina2Pipeline"})
    return folder


@pytest.fixture(scope="module")
def file(folder):
    path = folder.with_name("all.safetensors")
    told = export_model(folder, path, "all-in-one")
    assert told["parts"] == ["transformer", "clip", "vae"]
    return path


def unmatched(caplog):
    """What a loader said of weights; sound, which is not installed, is called missing too."""
    said = [record.message for record in caplog.records if "torchaudio" not in record.message]
    return [text for text in said if "missing" in text or "unexpected" in text]


def drawn(model, clip, vae):
    """Two steps on a small latent, decoded."""
    bridge, draw = (importlib.import_module(f"lumina2_trainer.nodes.{name}") for name in ("bridge", "draw"))
    with torch.inference_mode():
        caption, _ = bridge.embed_text(clip, "a red apple")
        negative, _ = bridge.embed_text(clip, "")
        return draw.draw(model, vae, caption.float(), negative.float(), (64, 64), 2, 4.0, 3)


def test_comfyui_opens_the_single_file_and_draws_the_same(folder, file, plugin, caplog):
    import comfy.sd

    bridge = importlib.import_module("lumina2_trainer.nodes.bridge")
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    assert {name.split(".")[0] for name in names} == {"model", "text_encoders", "vae"}
    assert "vae.decoder.mid.attn_1.q.weight" in names
    with torch.inference_mode():
        expected = drawn(*bridge.load_pipeline(folder, "auto"))
        # CheckpointLoaderSimple calls this; the shrunk text encoder is what it has no widget for
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(file), te_model_options={"gemma2_2b_model_config": GEMMA, "dtype": torch.float32}
        )
        found = drawn(model, clip, vae)
    assert type(model.model).__name__ == "Lumina2"
    assert unmatched(caplog) == []
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-4


def test_the_single_file_becomes_a_folder_that_diffusers_opens(folder, file, tmp_path):
    told = export_model(file, tmp_path / "again", "diffusers")
    assert told["parts"] == ["transformer", "text_encoder", "tokenizer", "vae", "scheduler"]
    pipeline = Lumina2Pipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16)
    for part, kind in (("transformer", Lumina2Transformer2DModel), ("vae", AutoencoderKL)):
        first, second = (kind.from_pretrained(of / part).state_dict() for of in (folder, tmp_path / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], weight) for name, weight in second.items())
    text = pipeline.text_encoder
    assert (text.config.hidden_size, text.config.num_hidden_layers, text.config.head_dim) == (192, 3, 256)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    for prompt in ("a red apple", "hatsune_miku, (b)", "一只猫"):
        assert pipeline.tokenizer(prompt)["input_ids"] == theirs(prompt)["input_ids"]


def test_a_transformer_alone_is_opened_by_comfyui(folder, plugin, tmp_path, caplog):
    import comfy.sd

    export_model(folder, tmp_path / "dit.safetensors", "comfyui")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "dit.safetensors"))
    assert type(model.model).__name__ == "Lumina2"
    assert unmatched(caplog) == []
    with safe_open(tmp_path / "dit.safetensors", framework="pt") as opened:
        qkv = opened.get_tensor("layers.0.attention.qkv.weight")
    found = model.model.diffusion_model.layers[0].attention.qkv.weight
    assert torch.equal(found.to(qkv.dtype), qkv)
