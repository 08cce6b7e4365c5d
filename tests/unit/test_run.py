"""Runs: what is trained, kept, continued and handed out. A tiny random transformer with grouped-query attention."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from training.adapter.adapter import add_adapter
from training.adapter.files import check_lora, comfyui_lora
from training.adapter.lora import add_lora, target_modules
from training.cache.given import keep_given
from training.cache.store import Store
from training.config.adapter import FullSettings, LoRASettings, LyCORISSettings
from training.config.dataset import MixSettings
from training.config.objective import ObjectiveSettings, ScheduledSamplingSettings
from training.config.optim import OptimizerSettings
from training.config.precision import PrecisionSettings
from training.config.settings import TrainSettings, check_run_name, deciding
from training.errors import DataError, ModelError, RunError, SettingError
from training.model.config import TransformerConfig
from training.model.fingerprint import transformer_fingerprint
from training.model.transformer import Lumina2Transformer
from training.run.batches import Batch, Batches, Captions
from training.run.checkpoint import newest_checkpoint
from training.run.events import Between, Said, read_events
from training.run.folder import RunStore
from training.run.loop import losses_of
from training.run.session import Request, train_lora

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)
SETTINGS = TrainSettings(
    steps=8,
    batch_size=2,
    adapter=LoRASettings(4),
    optimizer=OptimizerSettings(learning_rate=1e-2),
    checkpoint_step_interval=3,
)


FASTER = replace(SETTINGS, optimizer=OptimizerSettings(learning_rate=2e-2))


def with_dropout(share, **changes):
    return replace(SETTINGS, objective=ObjectiveSettings(caption_dropout_probability=share), **changes)


def transformer(seed=0):
    torch.manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made


def tensors():
    """Five latents in two sizes, and captions of 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn((4, 4, 4) if n < 3 else (4, 4, 8), generator=generator) for n in range(5)]
    texts = [torch.randn(2 + n, 8, generator=generator).bfloat16() for n in range(5)]
    return latents, texts, torch.randn(1, 8, generator=generator)


def given(tmp_path, numbers=range(5), **mix):
    latents, texts, empty = tensors()
    stores = Store(str(tmp_path / "latents")), Store(str(tmp_path / "text"))
    return keep_given([latents[n] for n in numbers], [texts[n] for n in numbers], empty, *stores, MixSettings(**mix))


@pytest.fixture
def caches(tmp_path):
    return given(tmp_path)


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "output" / "lumina2", tmp_path / "loras" / "lumina2")


class Train:
    """``train_lora`` with defaults; ``steps`` counts the steps that were really taken."""

    def __init__(self, caches, store):
        self.caches, self.store, self.steps, self.said = caches, store, 0, []

    def __call__(self, settings=SETTINGS, stop_at=None, model=None, caches=None, **request):
        self.steps = 0

        def tell(event):
            if isinstance(event, Said):
                self.said.append(event.text)
            if isinstance(event, Between):
                if event.step == stop_at:
                    raise KeyboardInterrupt
                self.steps += event.step < settings.steps

        return train_lora(
            model or transformer(),
            *(caches or self.caches),
            settings,
            Request(**{"name": "cats", **request}),
            self.store,
            lambda latents: latents * 0.5,
            tell,
        )


@pytest.fixture
def run(caches, store):
    return Train(caches, store)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_trains_and_writes_what_it_says(run, store):
    outcome = run()
    assert run.steps == 8
    assert len(outcome.losses) == 8
    assert all(map(math.isfinite, outcome.losses))
    file = store.loras / "cats.safetensors"
    assert same(load_file(file), outcome.lora)
    assert all(key.startswith("diffusion_model.") for key in outcome.lora)
    assert "diffusion_model.layers.0.attention.qkv.lora_B.weight" in outcome.lora
    assert any(weight.abs().max() > 0 for key, weight in outcome.lora.items() if "lora_B" in key)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "4"
        assert opened.metadata()["ss_steps"] == "8"
        assert int(opened.metadata()["ss_num_train_images"]) > 0
    record = store.read("cats")
    assert (record.status, record.step, record.target, record.name) == ("finished", 8, 8, "cats")
    assert sorted(path.name for path in (store.root / "cats").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert [event["step"] for event in read_events(store.root / "cats" / "events.jsonl") if "event" not in event] == [
        *range(1, 9)
    ]


def test_the_same_settings_train_once(run, store):
    first = run()
    again = run()
    assert run.steps == 0
    assert same(again.lora, first.lora)
    assert again.losses == pytest.approx(first.losses)
    assert "already trained: 8 steps, 8 asked" in run.said[-1]
    run(replace(SETTINGS, steps=5))
    assert run.steps == 0
    (store.loras / "cats.safetensors").unlink()
    assert same(run().lora, first.lora)
    assert run.steps == 0
    assert (store.loras / "cats.safetensors").exists()


def test_other_settings_train_into_another_folder_and_going_back_finds_the_first(run, store):
    first = run()
    before = {path: path.read_bytes() for path in (store.root / "cats").rglob("*") if path.is_file()}
    other = run(FASTER)
    assert (run.steps, other.run.folder) == (8, "cats-2")
    assert not same(other.lora, first.lora)
    assert {path: path.read_bytes() for path in before} == before
    assert run().run.folder == "cats"
    assert run.steps == 0
    for change in ({"seed": 7}, {"batch_size": 1}, {"adapter": LoRASettings(2)}):
        run(replace(SETTINGS, **change))
        assert run.steps == 8, change
    run(attempt=1)
    assert run.steps == 8
    run(model=transformer(seed=1))
    assert run.steps == 8
    assert run(name="dogs").run.folder == "dogs"
    assert run.steps == 8  # another name is another family


def test_other_pictures_are_another_run_but_another_order_is_not(run, tmp_path):
    first = run()
    turned = given(tmp_path, range(4, -1, -1))
    run(caches=turned)
    assert run.steps == 0
    run(caches=given(tmp_path, range(4)))
    assert run.steps == 8
    run(caches=given(tmp_path, repeats=1))
    assert run.steps == 8
    run(caches=given(tmp_path, is_regularisation_data=True))
    assert run.steps == 8
    run.store = RunStore(tmp_path / "other", tmp_path / "other loras")
    assert same(run(caches=turned).lora, first.lora)
    assert run.steps == 8


def test_going_on_equals_never_having_stopped(run, store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=5)
    record = store.read("cats")
    assert (record.status, record.step) == ("interrupted", 5)
    partial = load_file(store.loras / "cats.safetensors")
    assert newest_checkpoint(store.root / "cats").step == 5
    continued = run()
    assert run.steps == 3
    assert "continuing from step 5" in run.said[-1]
    assert not same(partial, continued.lora)

    run.store = RunStore(tmp_path / "second", tmp_path / "second loras")
    whole = run()
    assert same(whole.lora, continued.lora)
    assert continued.losses == whole.losses
    longer = run(replace(SETTINGS, steps=10))
    assert run.steps == 2
    run.store = RunStore(tmp_path / "third", tmp_path / "third loras")
    assert same(run(replace(SETTINGS, steps=10)).lora, longer.lora)


def test_dropout_resumes_alike_too(run, tmp_path):
    settings = replace(SETTINGS, adapter=LoRASettings(4, dropout=0.5))
    with pytest.raises(KeyboardInterrupt):
        run(settings, stop_at=4)
    continued = run(settings)
    run.store = RunStore(tmp_path / "second", tmp_path / "second loras")
    torch.rand(17)  # the state of the global generator does not matter, and is not changed
    state = torch.get_rng_state()
    assert same(run(settings, model=transformer()).lora, continued.lora)
    torch.manual_seed(0)
    assert not torch.equal(state, torch.get_rng_state())


def test_a_crash_falls_back_to_the_last_whole_checkpoint(run, store):
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=7)
    folder = store.root / "cats"
    # as if killed while checkpoint-7 was written
    (folder / "checkpoint-7" / "checkpoint.json").unlink()
    run()
    assert "continuing from step 6" in run.said[-1]
    assert run.steps == 2


def test_interrupted_before_the_first_step_leaves_no_lora_and_the_same_name(run, store):
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=0)
    assert not list(store.loras.glob("*"))
    assert run().run.folder == "cats"
    assert run.steps == 8


def test_stopped_and_kept_stays_until_it_is_asked_to_go_on(run, store):
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=5)
    store.save(replace(store.read("cats"), status="stopped"))
    run()
    assert run.steps == 0
    assert "stopped and kept at step 5" in run.said[-1]
    run(continue_token=1)
    assert run.steps == 3


def test_starting_from_a_checkpoint_of_another_run(run, store):
    run()
    branch = run(
        FASTER,
        resume="from checkpoint",
        checkpoint="cats/checkpoint-3",
    )
    assert run.steps == 5
    assert branch.run.folder == "cats-2"
    assert branch.run.start == "cats/checkpoint-3"
    assert "learning_rate: 0.01 → 0.02" in run.said[-1]
    run(
        FASTER,
        resume="from checkpoint",
        checkpoint="cats/checkpoint-3",
    )
    assert run.steps == 0
    run(resume="from checkpoint", checkpoint="cats/checkpoint-6", name="dogs")
    assert run.steps == 2
    with pytest.raises(RunError, match=r"no checkpoint 'cats/checkpoint-4'.*There are: cats-2/checkpoint-6"):
        run(resume="from checkpoint", checkpoint="cats/checkpoint-4")
    with pytest.raises(RunError, match="no checkpoint"):
        run(resume="from checkpoint", checkpoint="../../loras")
    with pytest.raises(SettingError, match="set steps above"):
        run(resume="from checkpoint", checkpoint="cats/checkpoint-8")
    with pytest.raises(ModelError, match="another adapter"):
        run(replace(SETTINGS, adapter=LoRASettings(2)), resume="from checkpoint", checkpoint="cats/checkpoint-3")


def test_names_taken_by_others_are_never_overwritten(run, store):
    store.loras.mkdir(parents=True)
    (store.loras / "Cats.safetensors").write_bytes(b"somebody's own")
    (store.root / "cats-2").mkdir(parents=True)
    assert run().run.folder == "cats-3"
    assert (store.loras / "Cats.safetensors").read_bytes() == b"somebody's own"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "nul", "COM1.x", "x" * 81, "end.", "a\nb"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(SettingError, match="cannot be a folder"):
        check_run_name(name)


def test_names_of_any_script_are_good():
    assert check_run_name(" 山水 v1.2 ") == "山水 v1.2"


def test_settings_at_their_defaults_are_no_part_of_the_identity():
    assert deciding(TrainSettings(adapter=LoRASettings(alpha=8))) == deciding(
        TrainSettings(adapter=LoRASettings(alpha=8.0))
    )
    assert str(LoRASettings(alpha=8).alpha) == "8.0"
    assert deciding(TrainSettings(steps=7)) == {}
    assert deciding(
        TrainSettings(adapter=LoRASettings(targets="all"), optimizer=OptimizerSettings(learning_rate=1e-3))
    ) == {
        "learning_rate": 1e-3,
        "lora_targets": "all",
    }


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        TrainSettings(**wrong)


def test_pictures_without_captions_are_counted(caches, tmp_path):
    latents, _ = caches
    _, texts = given(tmp_path, range(4))
    with pytest.raises(DataError, match=r"1 of 5 pictures have no cached caption \(first: 00000004\)"):
        Batches(latents, texts, SETTINGS, lambda z: z)


def test_batches_are_what_the_objective_says(caches):
    latents, texts, _ = tensors()
    with Batches(*caches, with_dropout(0), lambda z: z * 0.5) as batches:
        taken = [batches.take(step) for step in range(30)]
        assert torch.equal(batches.make(7).noise, taken[7].noise)
    for batch in taken:
        for row, length in enumerate(batch.lengths):
            number = length - 2  # captions have 2, 3, … tokens
            assert torch.equal(batch.latents[row], latents[number] * 0.5)
            assert torch.equal(batch.captions[row, :length], texts[number])
            assert batch.captions[row, length:].abs().sum() == 0
    noise = torch.cat([batch.noise.flatten() for batch in taken])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert len({batch.sigmas[0].item() for batch in taken}) == 30
    with Batches(*caches, with_dropout(1), lambda z: z) as batches:
        assert batches.take(0).lengths == (1, 1)


def test_regularisation_pictures_keep_the_model_where_it_is(run, tmp_path):
    """Their target is the base model's own prediction, which an adapter that is still zero meets exactly."""
    outcome = run(caches=given(tmp_path, is_regularisation_data=True))
    assert max(outcome.losses) < 1e-9
    assert all(weight.abs().max() < 1e-3 for key, weight in outcome.lora.items() if "lora_B" in key)


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run(run, store):
    broken = transformer()
    broken.final_layer.linear.weight[0, 0] = math.nan
    with pytest.raises(RunError, match="not a number for 6 steps in a row"):
        run(replace(SETTINGS, steps=30), model=broken)
    assert store.read("cats").status == "failed"
    assert not list(store.loras.glob("*"))  # nothing was learned
    lora = load_file(newest_checkpoint(store.root / "cats").lora)
    assert all(torch.isfinite(weight).all() for weight in lora.values())
    assert all(weight.abs().max() == 0 for key, weight in lora.items() if "lora_B" in key)


def test_the_base_is_not_changed_and_the_seed_decides_the_adapter():
    base, trained = transformer(), transformer()
    pointers = {name: weight.data_ptr() for name, weight in base.named_parameters()}
    add_lora(base, LoRASettings(4), seed=1)
    after = {n.replace(".base_layer", ""): w.data_ptr() for n, w in base.named_parameters() if "lora_" not in n}
    assert after == pointers
    first, second = add_lora(trained, LoRASettings(4), seed=1), add_lora(transformer(), LoRASettings(4), seed=2)
    again = add_lora(transformer(), LoRASettings(4), seed=1)
    assert same(dict(first), dict(again))
    assert not same(dict(first), dict(second))
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in first.values())


@pytest.mark.parametrize(
    ("targets", "count", "inside", "outside"),
    [
        ("attention", 6, "noise_refiner.0.attention.qkv", "layers.0.feed_forward.w1"),
        ("attention+ff", 15, "layers.1.feed_forward.w3", "layers.0.adaLN_modulation.1"),
        ("blocks", 18, "layers.0.adaLN_modulation.1", "context_refiner.0.attention.qkv"),
        ("all", 29, "final_layer.linear", None),
    ],
)
def test_target_sets(targets, count, inside, outside):
    names = target_modules(transformer(), targets)
    assert inside in names
    assert outside not in names
    assert len(names) == count


def test_the_file_acts_as_the_adapter_did():
    """ΔW = B·A of the file, on the base weight, gives what PEFT's adapter gives; alpha is folded in."""
    settings = LoRASettings(4, alpha=6, targets="all")
    with_adapter, merged = transformer(), transformer()
    weights = add_lora(with_adapter, settings, seed=0)
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(0, 0.1)
    lora = comfyui_lora(weights, settings.scale)
    modules = dict(merged.named_modules())
    for key in [key for key in lora if "lora_A" in key]:
        name = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        modules[name].weight += lora[key.replace("lora_A", "lora_B")] @ lora[key]
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 4, 8, generator=generator), torch.rand(2), torch.randn(2, 5, 8, generator=generator))
    with torch.no_grad():
        expected, result = with_adapter(*inputs, (5, 3)), merged(*inputs, (5, 3))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (result - transformer()(*inputs, (5, 3))).abs().max() > 1e-2


def test_keys_that_fit_no_weight_are_refused():
    modules = {name: module.weight for name, module in transformer().named_modules() if hasattr(module, "weight")}
    good = {"diffusion_model.layers.0.attention.out.lora_A.weight": torch.zeros(2, 48)}
    check_lora(good, modules, "x")
    for key, shape in (
        ("diffusion_model.layers.9.attention.out.lora_A.weight", (2, 48)),
        ("layers.0.attention.out.lora_A.weight", (2, 48)),
        ("diffusion_model.layers.0.attention.out.lora_A.weight", (2, 47)),
        ("diffusion_model.layers.0.attention.qkv.lora_B.weight", (48, 2)),
    ):
        with pytest.raises(ModelError):
            check_lora({key: torch.zeros(shape)}, modules, "x")


def test_a_fingerprint_knows_weights_not_precision():
    model = transformer()
    first = transformer_fingerprint(model.state_dict().items(), CONFIG)
    assert transformer_fingerprint(reversed(list(model.state_dict().items())), CONFIG) == first
    half = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    assert transformer_fingerprint(half.items(), CONFIG) == first
    with_unused = {**model.state_dict(), "norm_final.weight": torch.ones(48)}
    assert transformer_fingerprint(with_unused.items(), CONFIG) == first
    model.layers[1].feed_forward.w2.weight *= -1
    assert transformer_fingerprint(model.state_dict().items(), CONFIG) != first


def test_the_loss_falls_on_a_single_picture(tmp_path, store):
    train = Train(given(tmp_path, [0]), store)
    outcome = train(
        replace(
            SETTINGS,
            steps=150,
            adapter=LoRASettings(8, targets="all"),
            objective=ObjectiveSettings(caption_dropout_probability=0),
        )
    )
    assert sum(outcome.losses[-30:]) < 0.8 * sum(outcome.losses[:30])


FULL = replace(SETTINGS, adapter=FullSettings(), optimizer=OptimizerSettings(learning_rate=1e-3))


def test_a_full_fine_tune_writes_the_model_and_goes_on_exactly(run, store, tmp_path):
    run.store = store = replace(store, models=tmp_path / "models")
    with pytest.raises(KeyboardInterrupt):
        run(FULL, stop_at=5)
    continued = run(FULL)
    assert run.steps == 3
    file = tmp_path / "models" / "cats.safetensors"
    assert same(load_file(file), continued.lora)
    assert continued.lora.keys() - {"norm_final.weight"} == transformer().state_dict().keys()
    assert not same(continued.lora, dict(transformer().state_dict()))
    assert not list(store.loras.glob("*"))
    assert not (store.root / "cats" / "checkpoint-8" / "lora.safetensors").exists()
    file.unlink()
    again = run(FULL).lora
    assert run.steps == 0
    assert all(torch.equal(again[key], weight) for key, weight in continued.lora.items() if key in again)
    run.store = RunStore(tmp_path / "second", tmp_path / "loras", tmp_path / "second models")
    assert same(run(FULL).lora, continued.lora)
    assert run.steps == 8


def test_a_full_fine_tune_by_an_optimiser_in_the_backward_pass(run, store, tmp_path):
    run.store = replace(store, models=tmp_path / "models")
    fused = OptimizerSettings(learning_rate=1e-3, fused_backward=True, grad_clip_method="update")
    with pytest.raises(KeyboardInterrupt):
        run(replace(FULL, optimizer=fused), stop_at=4)
    continued = run(replace(FULL, optimizer=fused))
    run.store = RunStore(tmp_path / "second", tmp_path / "loras", tmp_path / "second models")
    whole = run(replace(FULL, optimizer=fused))
    assert same(whole.lora, continued.lora)
    assert whole.losses == continued.losses


def test_a_full_fine_tune_refuses_what_it_cannot_do(run, store, tmp_path):
    with pytest.raises(RunError, match="No folder for trained models"):
        run(FULL)
    assert not store.root.exists() or not list(store.root.iterdir())
    run.store = replace(store, models=tmp_path / "models")
    with pytest.raises(SettingError, match="no base to ask"):
        run(FULL, caches=given(tmp_path, is_regularisation_data=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerSettings("prodigy", 1.0, use_ema=True)},
        {"optimizer": OptimizerSettings("adamw_schedulefree", 1e-2, gradient_accumulation_steps=2)},
        {"optimizer": OptimizerSettings("adamw_bf16", 1e-2, lr_scheduler="cosine", lr_warmup_steps=2, use_ema=True)},
        {"adapter": LyCORISSettings("lokr", linear_dim=10000, factor=2, qkv="split")},
        {"adapter": LoRASettings(2, init="pissa", qkv="split", use_dora=True, loraplus_lr_ratio=4)},
        {"precision": PrecisionSettings(base_model_precision="int8-torchao", gradient_checkpointing=True)},
        {
            "objective": ObjectiveSettings(
                input_perturbation=0.1,
                scheduled_sampling=ScheduledSamplingSettings(max_step_offset=2, probability=0.5, grid_steps=20),
            )
        },
    ],
    ids=["prodigy ema", "schedule-free", "adamw_bf16 cosine ema", "lokr", "pissa dora", "int8", "rollout"],
)
def test_going_on_is_exact_whatever_is_trained_with(run, store, tmp_path, changes):
    settings = replace(SETTINGS, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(settings, stop_at=5)
    continued = run(settings)
    assert run.steps == 3
    run.store = RunStore(tmp_path / "second", tmp_path / "second loras")
    whole = run(settings)
    assert whole.losses == continued.losses
    assert same(whole.lora, continued.lora)
    if settings.optimizer.use_ema:
        averages = [load_file(folder / "cats-ema.safetensors") for folder in (store.loras, run.store.loras)]
        assert same(*averages)
        assert not same(averages[0], whole.lora)


def test_a_slider_learns_from_the_base_alone_and_regularisation_from_what_its_teacher_reads():
    """A fresh LoRA says what the base does, so that each loss is the way which it has to go, squared."""
    model = transformer()
    adapter = add_adapter(model, LoRASettings(4), 0)
    latents, texts, _ = tensors()
    said = [Captions(text.float()[None], (len(text),)) for text in texts]
    x, noise, sigmas = latents[0][None], torch.ones(1, 4, 4, 4), torch.tensor([0.5])
    batch = Batch(x, noise, sigmas, *said[0], slider=(said[1], said[2]), strength=-1.0)
    settings = replace(SETTINGS, objective=ObjectiveSettings(slider_positive="a", slider_negative="b", slider_scale=2))
    with torch.no_grad():
        own, positive, negative = (model((x + noise) / 2, 1 - sigmas, *each) for each in said[:3])
    loss = losses_of(model, adapter, batch, settings)
    assert loss.item() == pytest.approx((2 * (positive - negative)).square().mean().item(), rel=1e-4)
    held = replace(batch, slider=None, regularisation=True, taught=said[1])
    loss = losses_of(model, adapter, held, settings)
    assert loss.item() == pytest.approx((positive - own).square().mean().item(), rel=1e-4)
    assert losses_of(model, adapter, replace(held, taught=None), settings).item() == 0


def test_a_dataset_may_have_noise_levels_of_its_own(tmp_path):
    objective = ObjectiveSettings(sigma_max=0.9)
    for own, low, high in (
        ({}, 0, 0.9),
        ({"sigma_min": 0.5}, 0.5, 0.9),
        ({"sigma_min": 0.2, "sigma_max": 0.3}, 0.2, 0.3),
    ):
        caches = given(tmp_path / str(own), **own)
        with Batches(*caches, replace(SETTINGS, objective=objective), lambda z: z) as batches:
            sigmas = torch.cat([batches.take(step).sigmas for step in range(60)])
        assert low <= sigmas.min() < low + 0.1 * (high - low) + 0.1
        assert high - 0.1 < sigmas.max() <= high
    caches = given(tmp_path, sigma_min=0.95)
    with pytest.raises(SettingError, match=r"Dataset .*sigma_m"):
        Batches(*caches, replace(SETTINGS, objective=objective), lambda z: z)


def test_a_datasets_steps_are_optimiser_steps(tmp_path):
    """With accumulation a step takes several batches."""
    for accumulated in (1, 3):
        optimizer = OptimizerSettings(gradient_accumulation_steps=accumulated)
        caches = given(tmp_path / str(accumulated), end_step=2)
        with Batches(*caches, replace(SETTINGS, optimizer=optimizer), lambda z: z) as batches:
            batches.make(2 * accumulated - 1)
            with pytest.raises(DataError, match="No dataset is drawn from"):
                batches.make(2 * accumulated)
