"""Validation within a run: what is drawn and judged at which step, and that training never notices."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training.cache.garbage import collect_garbage
from training.cache.latents import cache_latents
from training.cache.manifest import read_manifest
from training.cache.store import Store
from training.cache.texts import cache_texts
from training.config.adapter import FullSettings, LoRASettings
from training.config.dataset import DatasetSettings, GeometrySettings, MixSettings, SourceSettings
from training.config.objective import ObjectiveSettings
from training.config.optim import OptimizerSettings
from training.config.settings import TrainSettings
from training.config.validation import Prompt, ValidationSettings
from training.data.dataset import append, load_dataset
from training.errors import DataError, SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.run.control import Control
from training.run.events import Between, Evaluated, Said, Validated, read_events
from training.run.folder import RunStore
from training.run.session import Request, train_lora
from training.sample.draw import draw_latents, picture_noise
from training.sample.heldout import held_out_pictures
from training.sample.pictures import read_recipe
from training.sample.validator import SampleValidator
from training.sample.weights import undisturbed

CONFIG = TransformerConfig(
    dim=48, layers=1, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=3, axes_dim=(4, 4, 4)
)
SETTINGS = TrainSettings(
    steps=6,
    batch_size=2,
    adapter=LoRASettings(4, dropout=0.3),
    objective=ObjectiveSettings(caption_dropout_probability=0.0),
    optimizer=OptimizerSettings(learning_rate=1e-2, use_ema=True),
    checkpoint_step_interval=3,
)
PLAIN = replace(SETTINGS, optimizer=OptimizerSettings(learning_rate=1e-2))
CHOSEN = ValidationSettings(
    validation_prompt="a red cat",
    validation_negative_prompt="ugly",
    validation_disable_unconditional=False,
    validation_num_inference_steps=3,
    validation_resolution="64x64",
    validation_step_interval=2,
    eval_steps_interval=3,
    eval_timesteps=2,
)


def transformer(seed=0):
    torch.manual_seed(seed)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made


def embed(text):
    """Stands where the text encoder stands: four numbers that depend on the text, a token a word and one more."""
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    return torch.randn(len(text.split()) + 1, 8, generator=generator)


def encode(pictures):
    return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()


def decode(latents):
    torch.rand(3)  # a decoder may draw what it likes
    return torch.nn.functional.interpolate(latents, scale_factor=8).movedim(1, -1)


class Cache:
    """Four pictures to train on, two held out, and the caches of both."""

    def __init__(self, folder):
        self.folder = folder
        dataset = None
        for name, count, kind in (("trained", 4, "image"), ("kept", 2, "eval")):
            place = folder / name
            place.mkdir()
            for number in range(count):
                pixels = np.random.default_rng([count, number]).integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
                (place / f"{number}.txt").write_text(f"{name} {number}")
            settings = DatasetSettings(
                name,
                SourceSettings(instance_data_dir=str(place)),
                GeometrySettings(64),
                mix=MixSettings(dataset_type=kind),
            )
            one = load_dataset(settings, folder / "index")
            dataset = append(dataset, one) if dataset else one
        self.dataset = dataset
        self.text_store = Store(str(folder / "text"))
        self.latents = cache_latents(dataset, encode, "vae", Store(str(folder / "latents")), 2)
        self.embedded = []

    def texts(self, chosen=None, store=None):
        def remember(text):
            self.embedded.append(text)
            return embed(text), False

        return cache_texts(
            self.dataset, remember, "encoder", "Be good.", 256, store or self.text_store, validation=chosen
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"))


class Training:
    """``train_lora`` in a folder of its own, with what it told."""

    def __init__(self, cache, folder):
        self.cache, self.store, self.events = cache, RunStore(folder / "runs", folder / "loras"), []

    @property
    def folder(self):
        return self.store.root / "cats"

    def validator(self, chosen=CHOSEN, **changed):
        given = {"decode": decode, "embed": embed, "last_step": 6, **changed}
        return SampleValidator(self.cache.texts(chosen), self.cache.latents, lambda latents: latents * 0.5, **given)

    def __call__(self, settings=SETTINGS, chosen=CHOSEN, validator="usual", stop_at=None, **request):
        self.events.clear()

        def tell(event):
            self.events.append(event)
            if isinstance(event, Between) and (event.step, event.doing) == stop_at:
                raise KeyboardInterrupt

        return train_lora(
            transformer(),
            self.cache.latents,
            self.cache.texts(),
            settings,
            Request(**{"name": "cats", **request}),
            self.store,
            lambda latents: latents * 0.5,
            tell,
            validator=self.validator(chosen) if validator == "usual" else validator,
        )

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def training(cache, tmp_path):
    return Training(cache, tmp_path)


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def test_losses_are_the_same_bit_for_bit_with_validation_and_without(training, tmp_path):
    """With dropout, whose random state a drawing could disturb; with an EMA that is put in place and taken away."""
    with_samples = training()
    without = Training(training.cache, tmp_path / "without")
    plain = without(validator=None)
    assert len(training.of(Validated)) == 4
    assert with_samples.losses == plain.losses
    assert all(torch.equal(weight, plain.lora[key]) for key, weight in with_samples.lora.items())
    before = torch.get_rng_state()
    training(name="again", attempt=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_disturbs_nothing():
    model = transformer().train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    def look():
        with undisturbed(model):
            torch.rand(3)
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()  # or what the model keeps could never be trained through
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_pictures_come_at_their_steps_each_once_and_say_what_they_show(training):
    training()
    assert [event.step for event in training.of(Validated)] == [0, 2, 4, 6]
    names = ["unconditional-0.png", "validation-0.png"]
    averages = ["unconditional-ema-0.png", "validation-ema-0.png"]
    for step in (0, 2, 4, 6):
        there = sorted(path.name for path in (training.folder / "samples" / f"step-{step}").iterdir())
        assert there == sorted(names if step == 0 else names + averages)
    for event in training.of(Validated):
        assert len(event.samples) == (2 if event.step == 0 else 4)
        for sample in event.samples:
            recipe = read_recipe(training.folder / sample.path)
            assert (recipe["prompt"], recipe["seed"]) == (sample.prompt, sample.seed)
            assert recipe["weights"] == ("base" if event.step == 0 else "ema" if sample.ema else "trained")
            assert (recipe["step"], recipe["steps"], recipe["negative_prompt"]) == (event.step, 3, "ugly")
    doing = [event.doing for event in training.of(Between)]
    pictures, held_out = 2 + 3 * 4, 2 * (1 + 2 + 2)  # at step 0 the EMA is what the weights are
    assert doing.count("validating") == pictures * 3 + held_out * 2  # steps, and levels


def expected(cache, lora=None, text="a red cat"):
    """The picture (height, width, 3) of a prompt, by the base model or with a LoRA file's weights added to its own."""
    texts, model = cache.texts(replace(CHOSEN, validation_prompt=text)), transformer()
    entries = texts.store.open()
    drawn = next(each for each in texts.validation.prompts if each.prompt.text == text)
    with torch.no_grad():
        for key, b in (lora or {}).items():
            if key.endswith("lora_B.weight"):
                name = key.removeprefix("diffusion_model.").removesuffix(".lora_B.weight")
                a = lora[key.replace("lora_B", "lora_A")]
                alpha = lora.get(f"diffusion_model.{name}.alpha", torch.tensor(float(a.shape[0])))
                model.get_submodule(name).weight += b @ a * (alpha / a.shape[0])
        noise = picture_noise(42, 3, CHOSEN.sizes[0])
        latents = draw_latents(model, entries.read(drawn.key), entries.read(texts.validation.negative), noise, CHOSEN)
    return (decode(latents)[0].clamp(0, 1) * 255).round().numpy()


def test_the_last_step_is_looked_at_whatever_the_interval(training):
    training(PLAIN, chosen=replace(CHOSEN, validation_step_interval=4, eval_steps_interval=4, disable_benchmark=True))
    assert [event.step for event in training.of(Validated)] == [4, 6]
    assert [event.step for event in training.of(Evaluated)] == [0, 4, 6]


def test_the_base_is_drawn_with_the_adapter_off_and_the_rest_with_the_weights_in_training(training):
    outcome = training(replace(PLAIN, adapter=LoRASettings(4, init="pissa")))
    drawn = {step: pixels(training.folder / f"samples/step-{step}/validation-0.png") for step in (0, 2, 6)}
    assert np.abs(drawn[0] - expected(training.cache)).max() <= 1
    assert np.abs(drawn[6] - expected(training.cache, outcome.lora)).max() <= 1
    assert np.abs(drawn[6] - drawn[0]).max() > 5
    assert np.abs(drawn[6] - drawn[2]).max() > 5


def test_the_ema_is_drawn_beside_the_weights_instead_of_them_or_not_at_all(training):
    training()
    step = training.folder / "samples" / "step-6"
    assert np.abs(pixels(step / "validation-0.png") - pixels(step / "validation-ema-0.png")).max() > 0
    for kind, wanted in (("ema_only", {True}), ("none", {False})):
        training(name=kind, attempt=1, chosen=replace(CHOSEN, ema_validation=kind))
        last = training.of(Validated)[-1]
        assert {sample.ema for sample in last.samples} == wanted
        assert ("diversity" in last.scores, "ema_diversity" in last.scores) == (kind == "none", kind == "ema_only")
        (scores,) = [event.scores for event in training.of(Evaluated) if event.step == 6]
        assert set(scores) == ({"kept"} if kind == "none" else {"ema_kept"})


def test_a_schedule_free_run_draws_its_averaged_weights(training):
    settings = replace(SETTINGS, optimizer=OptimizerSettings("adamw_schedulefree", 3e-2, lr_scheduler="constant"))
    outcome = training(settings)  # whose file holds the averages
    drawn = pixels(training.folder / "samples/step-6/validation-0.png")
    assert np.abs(drawn - expected(training.cache, outcome.lora)).max() <= 1
    trained = load_file(training.folder / "checkpoint-6" / "state.safetensors")
    at = "layers.0.attention.qkv.lora_B"
    name = next(key for key in trained if key.startswith(f"adapter.{at}"))
    averages = next(weight for key, weight in outcome.lora.items() if at in key)
    assert (trained[name] - averages).abs().max() > 1e-3 * averages.abs().max()  # which are other weights


def test_a_run_that_goes_on_draws_what_is_missing_and_nothing_twice(training):
    with pytest.raises(KeyboardInterrupt):
        training(stop_at=(4, "training"))
    assert [event.step for event in training.of(Validated)] == [0, 2, 4]
    before = {path: path.stat().st_mtime_ns for path in (training.folder / "samples").rglob("*.png")}
    training()
    assert [event.step for event in training.of(Validated)] == [6]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    logged = [event for event in read_events(training.folder / "events.jsonl") if event.get("event") == "Validated"]
    assert [event["step"] for event in logged] == [0, 2, 4, 6]


def test_a_validation_that_was_cut_is_drawn_again_and_other_prompts_get_their_base(training):
    with pytest.raises(KeyboardInterrupt):
        training(stop_at=(4, "validating"))
    assert [event.step for event in training.of(Validated)] == [0, 2]
    training(chosen=replace(CHOSEN, validation_prompt="a red cat\na dog"))
    told = training.of(Validated)
    assert [(event.step, len(event.samples)) for event in told] == [(0, 1), (4, 6), (6, 6)]
    (dog,) = told[0].samples
    assert dog.prompt == "a dog"
    assert np.abs(pixels(training.folder / dog.path) - expected(training.cache, text="a dog")).max() <= 1


def test_a_full_fine_tune_draws_its_base_at_the_start_only(training):
    full = replace(PLAIN, adapter=FullSettings())
    training.store = RunStore(training.store.root, training.store.loras, training.store.root / "models")
    with pytest.raises(KeyboardInterrupt):
        training(full, stop_at=(4, "training"))
    assert [event.step for event in training.of(Validated)] == [0, 2, 4]
    training(full, chosen=replace(CHOSEN, validation_prompt="a red cat\na dog"))
    assert [event.step for event in training.of(Validated)] == [6]


def test_held_out_losses_are_comparable_between_runs_whatever_is_trained_with(training, tmp_path):
    training()
    told = training.of(Evaluated)
    assert [event.step for event in told] == [0, 3, 6]
    other = Training(training.cache, tmp_path / "other")
    other(replace(PLAIN, seed=7, objective=ObjectiveSettings(loss_type="huber")))
    assert other.of(Evaluated)[0].loss == told[0].loss  # the base model's, whatever is trained with
    assert other.of(Evaluated)[-1].loss != told[-1].loss
    assert set(told[-1].scores) == {"kept", "ema_kept", "ema"}
    assert told[-1].scores["kept"] == told[-1].loss != told[-1].scores["ema"]
    assert not any(event.best for event in told)  # keep_best is off


def test_held_out_pictures_are_never_trained_on_and_chosen_by_their_keys(cache):
    texts = cache.texts()
    found = held_out_pictures(cache.latents, texts)
    rows = cache.latents.rows()
    assert {each.key.encode() for each in found} == set(rows.key[rows.part == 1])
    assert [each.key for each in found] == sorted(each.key for each in found)
    assert held_out_pictures(cache.latents, texts, 1) == found[:1]
    without = replace(cache.latents, parts=tuple(replace(p, mix=MixSettings()) for p in cache.latents.parts))
    assert held_out_pictures(without, texts) == []
    one = load_dataset(cache.dataset.parts[0].settings, cache.folder / "index")
    only = cache_texts(one, lambda text: (embed(text), False), "e", "", 256, Store(str(cache.folder / "other text")))
    with pytest.raises(DataError, match="no cached caption"):
        held_out_pictures(cache.latents, only)


def test_early_stopping_ends_the_run_and_the_best_weights_are_kept(training):
    chosen = replace(CHOSEN, validation_step_interval=0, eval_steps_interval=1, keep_best=True)
    settings = replace(PLAIN, steps=40, optimizer=OptimizerSettings(learning_rate=0.3), checkpoint_step_interval=100)
    patient = replace(chosen, early_stopping_patience=3)
    training(settings, validator=training.validator(patient, decode=None, last_step=40))
    told = [event for event in training.of(Evaluated) if event.step > 0]
    losses = [event.loss for event in told]
    assert len(told) < 40
    assert told[-1].stop
    assert not any(event.stop for event in told[:-1])
    lowest = losses.index(min(losses))
    assert len(losses) - 1 - lowest == 3
    assert [event.step for event in told if event.best][-1] == told[lowest].step
    assert (
        "early stopping" in training.store.read("cats").message
        if hasattr(training.store.read("cats"), "message")
        else True
    )
    assert training.store.read("cats").status == "stopped"


def test_patience_is_counted_over_a_resume(training, tmp_path):
    chosen = replace(CHOSEN, validation_step_interval=0, eval_steps_interval=1, early_stopping_patience=3)
    settings = replace(PLAIN, steps=40, optimizer=OptimizerSettings(learning_rate=0.3), checkpoint_step_interval=1)
    training(settings, validator=training.validator(chosen, decode=None, last_step=40))
    end = training.of(Evaluated)[-1].step
    other = Training(training.cache, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        other(settings, validator=other.validator(chosen, decode=None, last_step=40), stop_at=(end - 1, "training"))
    other(settings, validator=other.validator(chosen, decode=None, last_step=40))
    assert [(event.step, event.stop) for event in other.of(Evaluated)] == [(end, True)]


def test_without_held_out_pictures_an_evaluation_is_a_sentence(cache, training):
    latents = replace(cache.latents, parts=(cache.latents.parts[0],) * 2)
    validator = SampleValidator(cache.texts(CHOSEN), latents, lambda latents: latents, decode)
    training(validator=validator)
    assert [event.text for event in training.of(Said) if "dataset_type eval" in event.text] != []
    assert training.of(Evaluated) == []


def test_pictures_are_compared_with_those_trained_on_and_with_each_other(training):
    training(chosen=replace(CHOSEN, num_validation_images=2))
    last = training.of(Validated)[-1]
    assert set(last.scores) == {"nearest_training", "diversity", "ema_nearest_training", "ema_diversity"}
    assert all(value > 0 for value in last.scores.values())
    assert [(s.seed, s.path[-6:]) for s in last.samples if s.name == "validation" and not s.ema] == [
        (42, "-0.png"),
        (43, "-1.png"),
    ]


class Asking:
    """Asks for a sample behind a step."""

    def __init__(self, training, prompt, **given):
        self.training, self.prompt, self.given = training, prompt, given

    def __call__(self, chosen=CHOSEN):
        control = Control()
        training = self.training
        training.events.clear()

        def tell(event):
            training.events.append(event)
            if isinstance(event, Between) and event.step == 1 and event.doing == "training":
                control.sample(self.prompt)

        return train_lora(
            transformer(),
            training.cache.latents,
            training.cache.texts(),
            PLAIN,
            Request("cats"),
            training.store,
            lambda latents: latents * 0.5,
            tell,
            control=control,
            validator=training.validator(chosen, **self.given),
        )


def test_sample_now_draws_the_prompts_or_one_that_is_typed(training, tmp_path):
    Asking(training, "")()
    (asked,) = [event for event in training.of(Validated) if event.asked]
    assert (asked.step, [sample.name for sample in asked.samples]) == (1, ["unconditional", "validation"])
    assert [event.step for event in training.of(Validated) if not event.asked] == [0, 2, 4, 6]

    typed = Training(training.cache, tmp_path / "typed")
    heard = []
    Asking(typed, "a blue dog/cat", embed=lambda text: heard.append(text) or embed(text))()
    (asked,) = [event for event in typed.of(Validated) if event.asked]
    assert heard == ["Be good. <Prompt Start> a blue dog/cat"]
    (sample,) = asked.samples
    assert sample.prompt == "a blue dog/cat"
    assert sample.path.startswith("samples/step-1/a-blue-dog-cat-")
    assert (typed.folder / sample.path).exists()


def test_what_cannot_be_drawn_is_a_sentence_and_the_run_goes_on(training, tmp_path):
    Asking(training, "a dog", embed=None)()
    assert any("wire a CLIP" in event.text for event in training.of(Said))
    assert training.store.read("cats").status == "finished"
    other = Training(training.cache, tmp_path / "other")
    Asking(other, "", decode=None)()
    assert any("wire a VAE" in event.text for event in other.of(Said))
    assert other.of(Validated) == []
    assert len(other.of(Evaluated)) == 3


def test_without_settings_the_first_captions_are_drawn_when_asked_in_the_pictures_own_size(training):
    Asking(training, "")(chosen=None)
    (event,) = training.of(Validated)
    assert event.asked
    assert [(sample.name, sample.prompt) for sample in event.samples] == [("0", "trained 0"), ("1", "trained 1")]
    assert pixels(training.folder / event.samples[0].path).shape == (64, 64, 3)


def test_several_sizes_are_told_apart(training):
    training(PLAIN, chosen=replace(CHOSEN, validation_resolution="64x64,32x96", validation_disable_unconditional=True))
    last = training.of(Validated)[-1]
    assert [sample.name for sample in last.samples] == ["validation-64x64", "validation-32x96"]
    assert [pixels(training.folder / sample.path).shape for sample in last.samples] == [(64, 64, 3), (96, 32, 3)]


def test_a_missing_clip_is_said_once_or_ends_it_before_it_began(training, tmp_path):
    missing = replace(
        CHOSEN, evaluation_type="clip", pretrained_evaluation_model_name_or_path=str(tmp_path / "no clip")
    )
    training(PLAIN, chosen=missing)
    said = [event.text for event in training.of(Said) if "not scored" in event.text]
    assert len(said) == 1
    assert "There is no CLIP at" in said[0]
    assert all(sample.score is None for event in training.of(Validated) for sample in event.samples)
    with pytest.raises(SettingError, match="There is no CLIP at"):
        training.validator(replace(missing, evaluation_required=True))


def test_every_picture_with_a_prompt_is_scored_the_emas_too(training, monkeypatch):
    asked = []

    class Stand:
        """Stands where CLIP stands; what CLIP itself says is tested elsewhere."""

        def __init__(self, source):
            self.source = source

        def cosines(self, pictures, prompts):
            asked.extend(zip(pictures, prompts, strict=True))
            return [0.01 * (len(asked) + number) for number in range(len(prompts))]

    monkeypatch.setattr("training.sample.validator.CLIP", Stand)
    training(chosen=replace(CHOSEN, evaluation_type="clip", num_validation_images=3))
    assert {prompt for _, prompt in asked} == {"a red cat"}
    assert len(asked) == 3 + 3 * 2 * 3
    last = training.of(Validated)[-1]
    for ema in (False, True):
        scores = [s.score for s in last.samples if s.ema == ema and s.prompt]
        prefix = "ema_" if ema else ""
        assert len(scores) == 3
        assert last.scores[f"{prefix}clip_score"] == pytest.approx(np.mean(scores))
        assert last.scores[f"{prefix}clip_cosine"] == pytest.approx(np.mean(scores) / 100)
    assert [s.score for s in last.samples if not s.prompt] == [None] * 6
    file = pixels(training.folder / next(s.path for s in last.samples if s.prompt))
    assert np.array_equal(asked[-6][0], file)


# --- the text cache


def test_prompts_are_embedded_once_beside_the_captions(cache, tmp_path):
    store, before = Store(str(tmp_path / "text")), len(cache.embedded)
    texts = cache.texts(CHOSEN, store)
    new = cache.embedded[before:]
    assert {"", "ugly", "Be good. <Prompt Start> a red cat"} <= set(new)
    assert len(new) == len(set(new)) == 6 + 3
    said = texts.validation
    assert [each.prompt for each in said.prompts] == [Prompt("unconditional", ""), Prompt("validation", "a red cat")]
    assert said.prompts[0].key == texts.empty  # what the model draws without a prompt
    assert (said.settings, said.system_prompt, said.max_tokens) == (CHOSEN, "Be good.", 256)
    entries = store.open()
    assert torch.equal(entries.read(said.negative), embed("ugly").bfloat16())
    cache.texts(CHOSEN, store)
    assert len(cache.embedded) == before + len(new)
    plain = cache.texts(None, store)
    assert plain == replace(texts, manifest=plain.manifest)  # the pictures' texts are the same
    assert read_manifest(store.open().folder / "manifests" / plain.manifest.split("/")[-1]).equals(
        read_manifest(store.open().folder / "manifests" / texts.manifest.split("/")[-1])
    )


def test_prompts_outlive_the_collection_of_garbage(cache, tmp_path):
    store = Store(str(tmp_path / "text"))
    texts = cache.texts(CHOSEN, store)
    store.open().write({"f" * 40: torch.zeros(1)})
    collected = collect_garbage(Path(store.folder), grace_hours=0)
    entries = store.open()
    assert "f" * 40 not in entries, collected
    for key in (texts.validation.negative, *(each.key for each in texts.validation.prompts)):
        assert entries.read(key).shape[1] == 8


def test_validation_is_no_part_of_a_run(training):
    first = training()
    training(chosen=replace(CHOSEN, validation_prompt="another", validation_step_interval=1))
    assert training.of(Validated) == []  # already trained: handed out
    assert training.store.read("cats").identity == first.run.identity
    written = json.loads((training.folder / "run.json").read_text())
    assert not any(name.startswith("validation") for name in written["settings"])
