"""Precision settings, quantised layers, and loading tensor by tensor. Tiny models with fewer KV heads than heads."""

import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training.adapter.lora import add_lora
from training.config.adapter import LoRASettings
from training.config.precision import PrecisionSettings
from training.errors import ModelError, SettingError
from training.model.config import TransformerConfig
from training.model.keys import diffusers_weights
from training.model.linear import Linear, release_scratch
from training.model.loading import TensorFiles, fill, load_transformer
from training.model.precision import LossScale, choose_computing, fast_bf16, lacking
from training.model.quantise import Fp8Linear, Int4Linear, Int8Linear, NF4Linear, quantise
from training.model.transformer import Lumina2Transformer
from training.run.forecast import LiveMemory

CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    dim=192, layers=2, refiner_layers=1, heads=2, kv_heads=1, caption_dim=32, ffn_dim=256, channels=4
)
ERRORS = {Int8Linear: 0.01, Fp8Linear: 0.04, Int4Linear: 0.12}  # of a product with normal weights, relative


def transformer(config=CONFIG):
    torch.manual_seed(0)
    made = Lumina2Transformer(config).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.1)
    return made


def step(model, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    captions = torch.randn(1, 5, 32, generator=generator)
    out = model(latents, torch.tensor([0.3]), captions, (5,))
    loss = (out - latents).square().mean() * scale
    return out, loss


def stored_bytes(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


# Settings


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; choose one of auto"),
        ({"base_model_precision": "int8"}, "choose one of no_change, int8-torchao"),
        ({"quantize_via": "pipeline"}, "quantize_via"),
        ({"gradient_checkpointing_interval": 0}, "choose 1 for every block"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_interval": 2}, "needs gradient_checkpointing"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_selective": True}, "needs gradient_checkpointing"),
        ({"musubi_blocks_to_swap": 3, "torch_compile": True}, "switch torch_compile off"),
    ],
)
def test_contradictions_are_told(wrong, sentence):
    with pytest.raises(SettingError, match=sentence):
        PrecisionSettings(**wrong)


def test_checkpointing_is_for_large_models_unless_it_is_set():
    assert PrecisionSettings().checkpoint_every(2_600_000_000) == 1
    assert PrecisionSettings().checkpoint_every(10_000_000) == 0
    assert PrecisionSettings(gradient_checkpointing=False).checkpoint_every(2_600_000_000) == 0
    assert PrecisionSettings(gradient_checkpointing=True, gradient_checkpointing_interval=2).checkpoint_every(10) == 2


@pytest.mark.parametrize(
    "wrong", [{"base_model_precision": "nf4-bnb"}, {"mixed_precision": "fp16"}, {"musubi_blocks_to_swap": 1}]
)
def test_a_full_fine_tune_wants_whole_weights(wrong):
    PrecisionSettings().check_full_fine_tune()
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} is .* in a full fine-tune"):
        PrecisionSettings(**wrong).check_full_fine_tune()


# What a device computes in


def test_a_cpu_without_bf16_instructions_computes_in_fp32(monkeypatch):
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda s=supported: s)
        expected = torch.bfloat16 if supported else torch.float32
        assert choose_computing(PrecisionSettings(), CPU).dtype == expected
        asked = choose_computing(PrecisionSettings("bf16"), CPU)
        assert asked.dtype == expected
        assert bool(asked.notes) is not supported
    assert choose_computing(PrecisionSettings("no"), CPU).dtype == torch.float32


def test_a_gpu_computes_in_bf16_where_it_has_instructions_for_it(monkeypatch):
    for capability in ((7, 5), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        cuda = torch.device("cuda")
        assert fast_bf16(cuda) is (capability == (8, 6))
        assert choose_computing(PrecisionSettings(), cuda).dtype == (
            torch.bfloat16 if capability == (8, 6) else torch.float32
        )
    fp16 = choose_computing(PrecisionSettings("fp16"), cuda)
    assert (fp16.dtype, fp16.loss_scaling) == (torch.float16, True)
    assert "overflows" in fp16.notes[0]


def test_what_a_device_lacks_is_told_with_a_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not lacking("int8-torchao", CPU)
    assert not lacking("int4-torchao", torch.device("cuda"))
    for mode, why in (("int4-torchao", "CUDA or XPU"), ("nf4", "pip install bitsandbytes")):
        assert "choose int8-torchao" in lacking(mode, CPU)
        with pytest.raises(SettingError, match=why):
            choose_computing(PrecisionSettings(base_model_precision=mode), CPU)
    with pytest.raises(SettingError, match="choose auto"):
        choose_computing(PrecisionSettings("fp16"), CPU)


def test_the_loss_scale_halves_after_overflow_and_recovers():
    scale = LossScale(CPU)
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float16))
    scale.scale((weight.float() * 3).sum()).backward()
    gradient = weight.grad.float()
    assert gradient.isinf()  # 3 · 2¹⁶ is beyond fp16
    scale.unscale([gradient])
    scale.update(torch.isfinite(gradient).all())
    assert scale.factor == 2.0**15
    for _ in range(LossScale.PATIENCE):
        scale.update(torch.tensor(True))
    assert scale.factor == 2.0**16
    again = LossScale(CPU)
    again.load(scale.state())
    assert (again.factor, again.good) == (scale.factor, scale.good)
    gradients = [torch.full((3,), 2.0**17)]
    scale.unscale(gradients)
    assert gradients[0].tolist() == [2.0] * 3


# Quantised layers


@pytest.mark.parametrize("kind", list(ERRORS))
def test_a_stored_layer_is_near_the_original_and_its_gradient_is_that_of_what_it_stores(kind):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 256), torch.randn(96), torch.randn(7, 256, requires_grad=True)
    layer = kind(weight, bias)
    out = layer(x)
    exact = x @ weight.T + bias
    assert ((out - exact).norm() / exact.norm()).item() < ERRORS[kind]
    stored = layer.read(torch.float32).clone()
    assert torch.allclose(out, x @ stored.T + bias, atol=1e-4)
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, direction)
    assert torch.allclose(got, direction @ stored, rtol=1e-6, atol=1e-6 * direction.norm().item())


def test_sizes_in_bytes_are_what_the_names_promise():
    weight = torch.randn(512, 1024).bfloat16()
    count = weight.numel()
    assert stored_bytes(Int8Linear(weight, None)) == count + 4 * 512
    assert stored_bytes(Fp8Linear(weight, None)) == count + 4 * 512
    assert stored_bytes(Int4Linear(weight, None)) == count // 2 + count // 128 * 4


def test_int8_is_torchaos_own():
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    theirs = nn.Sequential(nn.Linear(128, 64, bias=False))
    theirs[0].weight.data.copy_(weight)
    quantize_(theirs, int8_weight_only_quantized_training())
    ours = Int8Linear(weight, None)
    assert (theirs[0].weight.int_data.int() - ours.weight.int()).abs().max() <= 1  # a tie may round either way
    assert torch.allclose(theirs[0].weight.scale.view(-1, 1), ours.scale)


def test_nf4_is_bitsandbytes_own():
    pytest.importorskip("bitsandbytes")
    weight, x = torch.randn(64, 128), torch.randn(3, 128, requires_grad=True)
    layer = NF4Linear(weight, None)
    assert layer.weight.nbytes == weight.numel() // 2
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], layer.read(torch.float32).sum(0), atol=1e-4)


def test_rows_of_zeros_stay_zeros():
    weight = torch.zeros(16, 32)
    for kind in ERRORS:
        assert torch.equal(kind(weight, None).read(torch.float32), weight)


def test_quantising_spares_embedders_and_odd_sides():
    odd = replace(CONFIG, ffn_dim=250)
    model = transformer(odd)
    done = quantise(model, "int8-torchao")
    assert "layers.0.attention.qkv" in done
    assert "noise_refiner.0.adaLN_modulation.1" in done
    assert "layers.1.feed_forward.w2" not in done  # 250 is no multiple of 16
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, Int8Linear) == (name in done), name
            assert not (isinstance(module, Int8Linear) and name.startswith(("x_", "t_", "cap_", "final_"))), name


def test_a_step_on_int8_keeps_no_copy_of_what_it_reads():
    wide = replace(CONFIG, dim=768, heads=8, kv_heads=4, ffn_dim=3072, layers=4)
    model = transformer(wide)
    whole = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    quantise(model, "int8wo")
    gc.collect()
    add_lora(model, LoRASettings(4), 0)
    release_scratch()
    with LiveMemory() as seen:
        step(model)[1].backward()
    assert seen.peak < whole / 2  # scratch of one weight, activations, gradients
    assert seen.peak > largest


def test_quantising_lets_each_original_go_at_once():
    model = transformer(replace(CONFIG, layers=12))
    count = {"alive": 0, "most": 0}

    def gone():
        count["alive"] -= 1

    for module in model.modules():
        if type(module) is Linear:
            weakref.finalize(module.weight.untyped_storage(), gone)
            count["alive"] += 1
    before, seen = count["alive"], []
    kept = Int8Linear.store

    class Watching(Int8Linear):
        def store(self, weight):
            seen.append(before - count["alive"])
            kept(self, weight)

    from training.model import quantise as module

    original = module.STORED["int8wo"]
    module.STORED["int8wo"] = Watching
    try:
        done = quantise(model, "int8wo")
    finally:
        module.STORED["int8wo"] = original
    assert len(seen) == len(done) > 70
    assert all(freed >= at - 1 for at, freed in enumerate(seen))


@pytest.mark.parametrize(("mode", "error"), [("int8-torchao", 0.04), ("fp8-torchao", 0.2)])
def test_a_lora_trains_on_a_quantised_base(mode, error):
    exact = step(transformer())[0]
    model = transformer()
    quantise(model, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    near = step(model)[0]
    assert ((near - exact).norm() / exact.norm()).item() < error
    weights = add_lora(model, LoRASettings(4), 0)
    optimiser = torch.optim.AdamW(list(weights.values()), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = step(model)[1]
        loss.backward()
        assert all(weight.grad.isfinite().all() for weight in weights.values())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_trained_weights_are_not_quantised():
    model = transformer().requires_grad_(True)
    with pytest.raises(SettingError, match="is trained and cannot be stored as int8wo"):
        quantise(model, "int8wo")


# Loading


def write_diffusers(folder, model, shards=2):
    folder.mkdir(parents=True)
    config = model.config
    described = {
        "_class_name": "Lumina2Transformer2DModel",
        "hidden_size": config.dim,
        "num_layers": config.layers,
        "num_refiner_layers": config.refiner_layers,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "cap_feat_dim": config.caption_dim,
        "in_channels": config.channels,
        "multiple_of": 256,
        "ffn_dim_multiplier": config.ffn_dim / config.dim / 4,
        "axes_dim_rope": config.axes_dim,
    }
    (folder / "config.json").write_text(json.dumps(described))
    weights = {}
    for name, weight in model.state_dict().items():
        weights |= {n: w.contiguous() for n, w in diffusers_weights(name, weight, config).items()}
    names = sorted(weights)
    for shard in range(shards):
        save_file({n: weights[n] for n in names[shard::shards]}, folder / f"model-{shard}.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_diffusers(tmp_path / "model" / "transformer", transformer())


def test_a_diffusers_folder_is_loaded_exactly(folder):
    expected = transformer()
    for path in (folder, folder.parent):
        loaded = load_transformer(path, dtype=None)
        assert loaded.config == CONFIG
        assert all(torch.equal(loaded.state_dict()[n], w) for n, w in expected.state_dict().items())
        assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(step(loaded)[0], step(expected)[0])
    half = load_transformer(folder)
    assert all(torch.equal(half.state_dict()[n], w.bfloat16()) for n, w in expected.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_is_loaded_exactly(tmp_path, prefix):
    expected = transformer()
    file = tmp_path / "lumina.safetensors"
    weights = {prefix + name: weight for name, weight in expected.state_dict().items()}
    save_file({**weights, prefix + "norm_final.weight": torch.ones(4), "vae.encoder.x": torch.ones(3)}, file)
    loaded = load_transformer(file, dtype=None)
    assert loaded.config == CONFIG
    assert torch.equal(step(loaded)[0], step(expected)[0])


def test_quantised_as_it_comes_equals_quantised_afterwards(folder):
    afterwards = transformer().bfloat16()
    quantise(afterwards, "int8-torchao")
    seen = {}
    for via in ("cpu", "accelerator"):
        settings = PrecisionSettings(base_model_precision="int8-torchao", quantize_via=via)
        loaded = load_transformer(folder, settings, seen=lambda name, weight: seen.update({name: weight.shape}))
        state = loaded.state_dict()
        assert state.keys() == afterwards.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in afterwards.state_dict().items())
    assert seen == {name: weight.shape for name, weight in transformer().state_dict().items()}


@pytest.mark.parametrize("mode", ["no_change", "int8wo"])
def test_loading_holds_what_is_kept_and_one_tensor(tmp_path, mode):
    model = transformer(replace(CONFIG, layers=10)).bfloat16()
    folder = write_diffusers(tmp_path / "transformer", model)
    largest = max(weight.nbytes for weight in model.parameters())
    del model
    with LiveMemory() as seen:
        loaded = load_transformer(folder, PrecisionSettings(base_model_precision=mode))
    kept = stored_bytes(loaded)
    assert kept < (0.6 if mode == "int8wo" else 1.01) * 10 * 1_200_000
    assert kept <= seen.peak <= kept + (5 * largest if mode == "int8wo" else largest)  # bf16, fp32 twice, codes


def test_files_that_are_no_model_are_told(folder, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_transformer(tmp_path)
    broken = tmp_path / "broken.safetensors"
    for content in (b"", b"\xff" * 40, b"<html>not found</html>", (40).to_bytes(8, "little") + b"[1]" + b" " * 37):
        broken.write_bytes(content)
        with pytest.raises(ModelError, match=r"broken\.safetensors cannot be read as safetensors"):
            load_transformer(broken)
    with pytest.raises(ModelError, match="neither a folder nor"):
        load_transformer(tmp_path / "model.ckpt")
    save_file({"a": torch.ones(2)}, broken)
    with pytest.raises(ModelError, match="is no Lumina2 transformer"):
        load_transformer(broken)
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ModelError, match="ends too early"):
        load_transformer(folder)
    shard.unlink()
    with pytest.raises(ModelError, match="not a complete Lumina2 model"):
        load_transformer(folder)


def test_other_shapes_are_told_before_a_weight_is_used(folder):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"num_kv_heads": 2}))
    with pytest.raises(ModelError, match=r"qkv.weight' is \(384, 192\); this Lumina2 needs \(576, 192\)"):
        load_transformer(folder)


def test_tensors_are_read_without_mapping_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    save_file({"a": a, "b": b.half(), "empty": torch.zeros(0, 5)}, file)
    with TensorFiles(file) as files:
        assert torch.equal(files.read("a"), a)
        assert torch.equal(files.read("a", "b", dtype=torch.float32), torch.cat((a, b.half().float())))
        assert files.read("empty").shape == (0, 5)
        assert str(file) not in Path("/proc/self/maps").read_text()


def test_a_module_is_filled_and_computes_in_what_it_is_given(tmp_path):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    file = tmp_path / "encoder.safetensors"
    save_file({f"model.{name}": weight for name, weight in made.bfloat16().state_dict().items()}, file)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    with TensorFiles(file) as files:
        fill(empty, files, prefix="model.")
        with pytest.raises(ModelError, match=r"lacks the weight '0\.weight'"):
            fill(empty, files)
    assert empty[0].weight.dtype == torch.bfloat16
    x = torch.randn(3, 32)
    assert torch.allclose(empty[0](x), x @ made[0].weight.float().T + made[0].bias.float(), atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_goes_back_to_the_system():
    """In a process of its own: one block of 16 MB stays above a hundred that are freed."""
    program = (
        "import sys, torch; from training.model.loading import return_freed_memory\n"
        "if sys.argv[1] == 'on': assert return_freed_memory()\n"
        "warm = torch.ones(5 * 2**20); del warm\n"  # glibc learns from the first large block that is freed
        "held = [torch.ones(2**22) for _ in range(20)]; kept = held[-1]; del held\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])"
    )
    root = Path(__file__).resolve().parents[2]
    kept = {
        way: int(subprocess.run([sys.executable, "-c", program, way], cwd=root, capture_output=True, check=True).stdout)
        for way in ("on", "off")
    }
    assert kept["on"] < kept["off"] - 200_000  # kB
