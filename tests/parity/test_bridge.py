"""Our bridge and transformer against diffusers, transformers and ComfyUI, in fp32 on all sides."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
TEXTS = ["red apple", "hatsune_miku_(vocaloid), a \\(b\\)", "embedding:thing (very:1.3)", ""]
SIZES = {
    "small": {"hidden_size": 256, "num_layers": 3, "num_attention_heads": 8, "num_kv_heads": 4, "multiple_of": 32},
    "real width": {
        "hidden_size": 2304,
        "num_layers": 1,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "num_refiner_layers": 1,
    },
}
AXES = {"small": (8, 12, 12), "real width": (32, 32, 32)}


def random_transformer(size):
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=8, in_channels=16, cap_feat_dim=96, axes_dim_rope=AXES[size], **SIZES[size]
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if weight.ndim == 1 and "bias" not in name else 0, 0.05)
    return model


@pytest.fixture(scope="module", params=list(SIZES))
def pipeline(request, tmp_path_factory, plugin):
    """A random Lumina2 in diffusers' layout, with fewer KV heads than heads, and ComfyUI's three objects of it."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(1)
    random_transformer(request.param).save_pretrained(folder / "transformer", max_shard_size="40MB")
    gemma = Gemma2Config(
        vocab_size=4000,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    Gemma2Model(gemma).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        latent_channels=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    shutil.copy(NANO / "tokenizer" / "tokenizer.model", folder / "tokenizer")
    bridge = importlib.import_module("lumina2_trainer.nodes.bridge")
    with torch.inference_mode():
        objects = bridge.load_pipeline(folder, "auto")
    return folder, bridge, objects


def inputs():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    captions = torch.randn(2, 9, 96, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), captions, (9, 5)


def test_transformer_equals_diffusers_and_comfyui(pipeline):
    folder, bridge, (model, _, _) = pipeline
    latents, t, captions, lengths = inputs()
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    theirs = Lumina2Transformer2DModel.from_pretrained(folder / "transformer")
    with torch.inference_mode():
        ours = bridge.engine_transformer(model)
    with torch.no_grad():
        expected = theirs(latents, t, captions, mask, return_dict=False)[0]
        result = ours(latents, t, captions, lengths)
        # ComfyUI does not mask padding in its main layers: one caption at a time
        native = torch.cat(
            [
                model.model.diffusion_model(latents[i : i + 1], 1 - t[i : i + 1], captions[i : i + 1, :n], n)
                for i, n in enumerate(lengths)
            ]
        )
    scale = expected.abs().max()
    assert (result - expected).abs().max() < 2e-5 * scale
    assert (result + native).abs().max() < 2e-5 * scale  # ComfyUI flips the sign
    assert (result - ours(latents, t, captions, (9, 9))).abs().max() > 1e-3 * scale  # the lengths matter


def test_engine_stands_on_comfyui_memory_and_passes_gradients(pipeline):
    folder, bridge, (model, _, _) = pipeline
    latents, t, captions, lengths = inputs()
    with torch.inference_mode():
        ours = bridge.engine_transformer(model)
        native = model.model.diffusion_model.layers[0].attention.qkv.weight
        assert native.is_inference()
        with torch.inference_mode(False), torch.enable_grad():
            latents, captions, t = latents.clone(), captions.clone(), t.clone()
            assert ours.layers[0].attention.qkv.weight.data_ptr() == native.data_ptr()
            assert not ours.layers[0].attention.qkv.weight.is_inference()
            captions.requires_grad_()
            ours(latents, t, captions, lengths).square().mean().backward()
    theirs = Lumina2Transformer2DModel.from_pretrained(folder / "transformer")
    reference = captions.detach().clone().requires_grad_()
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    theirs(latents, t, reference, mask, return_dict=False)[0].square().mean().backward()
    assert (captions.grad - reference.grad).abs().max() < 1e-4 * reference.grad.abs().max()
    assert captions.grad[1, 5:].abs().max() == 0  # padding takes no part


def test_text_embeddings_equal_transformers(pipeline):
    folder, bridge, (_, clip, _) = pipeline
    encoder = Gemma2Model.from_pretrained(folder / "text_encoder").eval()
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer", add_bos_token=True)
    for text in TEXTS:
        with torch.inference_mode():
            embedding, cut = bridge.embed_text(clip, text)
            ids = torch.tensor([tokenizer(text).input_ids])
            expected = encoder(ids, output_hidden_states=True).hidden_states[-2][0]
        assert not cut
        assert embedding.shape == expected.shape, text
        assert (embedding - expected).abs().max() < 5e-5 * expected.abs().max()
    with torch.inference_mode():
        assert bridge.embed_text(clip, "red apple " * 400, 999)[0].shape[0] == 299


def test_vae_and_sampling_settings_come_from_the_folder(pipeline):
    folder, _, (model, _, vae) = pipeline
    theirs = AutoencoderKL.from_pretrained(folder / "vae").eval()
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        latents = vae.encode(pictures)
        expected = theirs.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mean
        restored = vae.decode(expected)
        decoded = (theirs.decode(expected).sample.clamp(-1, 1) + 1) / 2
    assert (latents - expected).abs().max() < 2e-5
    assert (restored.movedim(-1, 1) - decoded).abs().max() < 2e-5
    assert model.model.process_latent_in(torch.ones(1)).item() == pytest.approx((1 - 0.25) * 0.5)
    assert model.model.model_sampling.shift == 2.5

    import comfy.latent_formats
    import comfy.supported_models

    assert comfy.supported_models.Lumina2.sampling_settings["shift"] == 6.0  # set on the instance alone
    assert comfy.latent_formats.Flux().scale_factor == 0.3611


def test_a_model_of_another_family_is_refused_by_name(pipeline):
    folder, bridge, (model, _, _) = pipeline

    import comfy.supported_models

    tiny = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1,
        "num_head_channels": 32,
        "context_dim": 64,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
    }
    described = comfy.supported_models.SDXL(tiny)
    described.set_inference_dtype(torch.float32, None)
    wired = model.clone()
    wired.model = described.get_model({}, "model.diffusion_model.")
    with pytest.raises(bridge.ModelError, match="MODEL is a SDXL; a Lumina2 is needed"):
        bridge.trainable_transformer(wired)
    weights = load_file(next((folder / "vae").glob("*.safetensors")))
    with pytest.raises(bridge.ModelError, match="lacks the weight"):
        bridge.from_diffusers(weights, ["x_embedder.weight"])


def draw(bridge, model, texts, guidance, noise):
    """Our sampler's latents, in the transformer's units, along the MODEL's own schedule."""
    sampler = importlib.import_module("lumina2_trainer.training.sample.euler")
    sigmas = importlib.import_module("lumina2_trainer.training.objective.sigmas")
    velocity = sampler.guided_velocity(bridge.engine_transformer(model), *texts, guidance)
    return sampler.sample_euler(velocity, noise, sigmas.sampling_sigmas(8, model.model.model_sampling.shift))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampler_equals_ksampler(pipeline, guidance):
    _, bridge, (model, clip, _) = pipeline
    import comfy.sample

    with torch.inference_mode():
        texts = [bridge.embed_text(clip, text)[0] for text in ("red apple and a pear", "")]
        positive, negative = ([[text[None].clone(), {}]] for text in texts)
        empty = torch.zeros(1, 16, 8, 12)
        noise = comfy.sample.prepare_noise(empty, 7)
        settings = (8, guidance, "euler", "simple", positive, negative, empty)
        native = comfy.sample.sample(model, noise, *settings, disable_pbar=True)
        ours = model.model.process_latent_out(draw(bridge, model, texts, guidance, noise))
    assert (ours - native).abs().max() < 1e-3 * native.abs().max()
    assert (ours - native).abs().mean() < 1e-4 * native.abs().mean()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampler_equals_diffusers_pipeline(pipeline, guidance):
    from diffusers import Lumina2Pipeline

    folder, bridge, (model, clip, _) = pipeline
    with torch.inference_mode():
        positive, negative = (bridge.embed_text(clip, text)[0] for text in ("red apple and a pear", ""))
    theirs = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=Gemma2Model.from_pretrained(folder / "text_encoder"),
        tokenizer=GemmaTokenizer.from_pretrained(folder / "tokenizer", add_bos_token=True),
    )
    theirs.set_progress_bar_config(disable=True)
    padded = torch.zeros_like(positive)
    padded[: len(negative)] = negative
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(7))
    expected = theirs(
        prompt_embeds=positive[None],
        prompt_attention_mask=torch.ones(1, len(positive), dtype=torch.bool),
        negative_prompt_embeds=padded[None],
        negative_prompt_attention_mask=torch.arange(len(positive))[None] < len(negative),
        latents=noise,
        height=64,
        width=96,
        num_inference_steps=8,
        guidance_scale=guidance,
        cfg_normalization=False,
        output_type="latent",
    ).images
    with torch.inference_mode():
        ours = draw(bridge, model, (positive, negative), guidance, noise)
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (ours - expected).abs().mean() < 1e-4 * expected.abs().mean()


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2"]


def random_lora(bridge, model, scale):
    """The engine's transformer with an adapter of random weights, and those weights by our names."""
    lora = importlib.import_module("lumina2_trainer.training.adapter.lora")
    settings = importlib.import_module("lumina2_trainer.training.config.settings")
    with torch.inference_mode():
        transformer = bridge.engine_transformer(model)
    with torch.inference_mode(False):
        weights = lora.add_lora(transformer, settings.LoRASettings(4, alpha=4 * scale, targets="attention+ff"), 0)
        for weight in weights.values():
            weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(weight.numel()))
    return transformer, weights


def test_lora_gradients_equal_peft_on_diffusers(pipeline):
    from peft import LoraConfig

    folder, bridge, (model, _, _) = pipeline
    latents, t, captions, lengths = inputs()
    ours, weights = random_lora(bridge, model, scale=2)
    keys = importlib.import_module("lumina2_trainer.training.model.keys")
    theirs = Lumina2Transformer2DModel.from_pretrained(folder / "transformer")
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[*LORA_TARGETS, "feed_forward.linear_3"]))
    parameters = dict(theirs.named_parameters())
    pairs = []
    for name, weight in weights.items():
        module, _, part = name.rpartition(".lora_")
        places = [parameters[f"{n}.lora_{part[0]}.default.weight"] for n in keys.diffusers_modules(module)]
        rows = [place.shape[0] for place in places] if part[0] == "B" else None
        values = weight.split(rows) if rows else [weight] * len(places)
        for place, value in zip(places, values, strict=True):
            place.data.copy_(value)
        pairs.append((weight, places, part[0]))
    assert len(pairs) == 2 * 5 * (ours.config.layers + ours.config.refiner_layers)

    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    expected = theirs(latents, t, captions, mask, return_dict=False)[0]
    result = ours(latents, t, captions, lengths)
    assert (result - expected).abs().max() < 2e-5 * expected.abs().max()
    (expected - target).square().mean().backward()
    (result - target).square().mean().backward()
    for weight, places, part in pairs:
        gradient = torch.cat([p.grad for p in places]) if part == "B" else sum(p.grad for p in places)
        assert (weight.grad - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_the_lora_file_acts_in_comfyui_as_in_the_engine(pipeline, tmp_path, caplog):
    import comfy.sd
    import comfy.utils

    _, bridge, (model, _, _) = pipeline
    files = importlib.import_module("lumina2_trainer.training.adapter.files")
    with torch.inference_mode():
        modules = {n: m.weight for n, m in bridge.engine_transformer(model).named_modules() if hasattr(m, "weight")}
    ours, weights = random_lora(bridge, model, scale=2)
    files.write_lora(tmp_path / "lora.safetensors", files.comfyui_lora(weights, 2), modules, {})
    latents, t, captions, _ = inputs()
    with torch.inference_mode():
        base = bridge.engine_transformer(model)(latents, t, captions, (9, 9))
        lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"), safe_load=True)
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
        assert "NOT LOADED" not in caplog.text
        assert "lora key not loaded" not in caplog.text
        through_comfyui = bridge.engine_transformer(patched)(latents, t, captions, (9, 9))
        assert (through_comfyui - base).abs().max() > 1e-2 * base.abs().max()
        again = bridge.engine_transformer(model)(latents, t, captions, (9, 9))
    assert torch.equal(again, base)  # the patched MODEL left the base as it was
    # the adapter's own transformer stands on the same memory, so it is asked after the patches are gone
    with torch.no_grad():
        expected = ours(latents, t, captions, (9, 9))
    assert (through_comfyui - expected).abs().max() < 2e-5 * expected.abs().max()


def test_fingerprints_are_those_of_the_files(pipeline):
    folder, bridge, (model, clip, vae) = pipeline
    fingerprints = importlib.import_module("lumina2_trainer.training.model.fingerprint")
    theirs = {
        "transformer": Lumina2Transformer2DModel.from_pretrained(folder / "transformer"),
        "text_encoder": Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
    }
    expected = {name: fingerprints.fingerprint(part.state_dict().items()) for name, part in theirs.items()}
    with torch.inference_mode():
        engine = bridge.engine_transformer(model)
        assert (
            fingerprints.transformer_fingerprint(engine.state_dict().items(), engine.config) == expected["transformer"]
        )
        assert bridge.vae_fingerprint(vae) == expected["vae"]
        assert bridge.clip_fingerprint(clip) == expected["text_encoder"]
    assert len(set(expected.values())) == 3
