"""Every key of SimpleTuner's sample acts: each is changed once, and what it names is seen to change in a real training.

The trainings are started by the command line. Of a model they have stand-ins: a transformer of a few thousand weights,
and what a VAE and a text encoder would give. The hub and wandb are met where a request would leave this machine.
"""

import functools
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts.nano import tiny
from training.__main__ import main
from training.command import cache, train
from training.model.quantise import StoredLinear
from training.report import hub, login
from training.run import session

SAMPLES = Path(__file__).resolve().parents[1] / "simpletuner"
SAMPLE = json.loads((SAMPLES / "config.json").read_text())
PICTURES, TEXTS = json.loads((SAMPLES / "multidatabackend.json").read_text())
# Paths, model, sizes and lengths are ours; the rest is as it is.
HERE = {
    "data_backend_config": "data.json",
    "output_dir": "output/lumina2",
    "pretrained_model_name_or_path": "lumina2-nano",
    "user_prompt_library": "prompts.json",
    "max_train_steps": 2,
    "checkpoint_step_interval": 2,
    "validation_step_interval": 2,
    "eval_steps_interval": 2,
    "validation_num_inference_steps": 2,
    "validation_resolution": "64x64",
    "learning_rate": 1e-2,
}
PICTURES_HERE = {
    "instance_data_dir": "pictures",
    "resolution": 64,
    "minimum_image_size": 32,
    "maximum_image_size": 128,
    "target_downsample_size": 96,
}
SIZES = [(64, 64), (160, 64), (40, 40), (200, 200), (96, 64)]  # px
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 1, "factor": 4,
        "apply_preset": {"target_module": ["Attention"]}}  # fmt: skip


@dataclass
class Seen:
    """What one training did."""

    folder: Path  # the working folder
    code: int
    found: dict[str, Any] | None
    said: str
    blocks_run: int = 0  # of the first block, with gradients
    encoded: list[int] = field(default_factory=list)  # pictures, by the VAE's calls
    via: list[Any] = field(default_factory=list)  # where layers were quantised
    pushed: list[tuple[str, list[str]]] = field(default_factory=list)  # repository and files
    wandb: list[tuple[str, str]] = field(default_factory=list)  # project and run
    stored: int = 0  # layers that are stored smaller
    texts: list[str] = field(default_factory=list)  # that the text encoder read

    @cached_property
    def run(self) -> Path:
        return Path(self.found["folder"]) if self.found else Path("none")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "events.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.events if "event" not in event]

    @property
    def rates(self) -> list[float]:
        return [event["lr"] for event in self.events if "event" not in event]

    def names(self, pattern: str) -> set[str]:
        return {path.relative_to(self.run).as_posix() for path in self.run.rglob(pattern)}

    @property
    def samples(self) -> dict[str, bytes]:
        return {name: Image.open(self.run / name).tobytes() for name in self.names("*.png")}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.found["file"]) if self.found else {}

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        return {tuple(weight.shape) for weight in self.weights.values()}

    @property
    def total(self) -> float:
        return sum(float(weight.float().abs().sum()) for weight in self.weights.values())

    def files(self, place: str) -> int:
        return len(list((self.folder / place).rglob("*.safetensors")))

    @property
    def latents(self) -> set[tuple[int, ...]]:
        shapes = set()
        for file in (self.folder / "cache/vae").rglob("*.safetensors"):
            shapes |= {tuple(each.shape) for each in load_file(file).values()}
        return shapes

    @property
    def latent_sum(self) -> float:
        files = (self.folder / "cache/vae").rglob("*.safetensors")
        return sum(float(each.float().abs().sum()) for file in files for each in load_file(file).values())


class _WandB:
    """Where accelerate's tracker would talk to wandb."""

    seen: Seen

    def __init__(self, project, name="", **others):
        self.seen.wandb.append((project, name))
        self.tracker = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda **k: None)

    def start(self):
        pass

    def log(self, *values, **others):
        pass


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """Trains in a folder of its own, with keys of the files changed."""

    def look(config=None, pictures=None, texts=None, more=(), command="train"):
        folder = tmp_path_factory.mktemp("look")
        (folder / "pictures").mkdir()
        for number, size in enumerate(SIZES):
            Image.radial_gradient("L").resize(size).convert("RGB").save(folder / f"pictures/picture_{number}.png")
            (folder / f"pictures/picture_{number}.txt").write_text(f"a gradient of {size[0]}")
        (folder / "others").mkdir()
        Image.new("RGB", (64, 64), "red").save(folder / "others/red.png")
        (folder / "others/red.txt").write_text("red")
        (folder / "lycoris.json").write_text(json.dumps(LOKR))
        (folder / "prompts.json").write_text('{"fruit": "red apple"}')
        (folder / "more.json").write_text('{"fruit": "red apple", "bird": "an owl"}')
        entries = [{**PICTURES, **PICTURES_HERE, **(pictures or {})}, {**TEXTS, **(texts or {})}, *more]
        (folder / "data.json").write_text(json.dumps(entries))
        entries[0]["id"] = "from another file"
        (folder / "other data.json").write_text(json.dumps(entries))
        (folder / "config.json").write_text(json.dumps({**SAMPLE, **HERE, **(config or {})}))
        return watch(folder, command)

    def watch(folder, command):
        seen = Seen(folder, 0, None, "")
        transformer = tiny.transformer()

        def ran(module, given):
            seen.blocks_run += torch.is_grad_enabled()

        transformer.layers[0].register_forward_pre_hook(ran)  # what is computed again ends early

        class VAE:
            fingerprint = "tiny"

            def __init__(self, model, device):
                pass

            def encode(self, pixels):
                seen.encoded.append(len(pixels))
                return tiny._encode(pixels)

            def decode(self, latents):
                return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8).movedim(1, -1).sigmoid()

            def rest(self):
                pass

        class TextEncoder:
            fingerprint = "tiny"

            def __init__(self, model, device):
                pass

            def embed(self, text, max_tokens):
                seen.texts.append(text)
                return tiny._embed(text)

        def quantised(model, mode, via=None):
            seen.via.append(via)
            return quantise(model, mode, via)

        def committed(files, repo, private, message, say):
            seen.pushed.append((repo, sorted(files)))
            return ""

        quantise = session.__dict__["quantise"]
        _WandB.seen = seen
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(folder)
            patch.setenv("WANDB_MODE", "offline")
            patch.setattr(login, "hub_problem", lambda settings: None)
            patch.setattr(cache, "VAE", VAE)
            patch.setattr(cache, "TextEncoder", TextEncoder)
            patch.setattr(train, "look_around", lambda *given, **options: [])  # has tests of its own
            patch.setattr(train, "open_transformer", lambda model, device: transformer)
            patch.setattr(session, "quantise", quantised)
            patch.setattr(hub, "_commit", committed)
            patch.setattr("accelerate.tracking.WandBTracker", _WandB)
            seen.code = main([command, "--config", str(folder / "config.json"), "--device", "cpu", "--json"])
        seen.said = err.getvalue()
        seen.found = json.loads(out.getvalue()) if out.getvalue().strip() else None
        seen.stored = sum(isinstance(module, StoredLinear) for module in transformer.modules())
        return seen

    return look


Look = Callable[[Seen], Any]
KEPT = {**PICTURES, **PICTURES_HERE, "id": "kept", "dataset_type": "eval", "instance_data_dir": "others"}
SECOND = {"id": "second", "dataset_type": "text_embeds", "default": None, "cache_dir": "second"}
# What is changed in each training; where several keys are, what is looked at tells them apart.
TRAININGS: dict[str, dict[str, Any]] = {
    "the sample": {},
    "names and sizes": {"config": {
        "checkpoint_step_interval": 1, "lora_rank": 4, "output_dir": "elsewhere",
        "tracker_run_name": "cats", "tracker_project_name": "animals", "hub_model_id": "me/cats",
        "lr_scheduler": "cosine", "gradient_checkpointing": False, "vae_batch_size": 2,
        "validation_resolution": "64x32", "base_model_precision": "no_change", "use_ema": False,
        "data_backend_config": "other data.json", "user_prompt_library": "more.json", "validation_step_interval": 1,
        "train_batch_size": 1,
    }},
    "told otherwise": {"config": {
        "report_to": "simpletuner", "learning_rate": 1e-3, "push_to_hub": False, "quantize_via": "accelerator",
        "validation_seed": 7, "validation_prompt": "an owl",
    }},
    "shorter": {"config": {
        "max_train_steps": 1, "push_checkpoints_to_hub": False, "validation_disable_unconditional": False,
        "evaluation_type": "none", "lora_type": "lycoris", "lycoris_config": "lycoris.json",
        "validation_num_inference_steps": 1,
    }},
    "no shift": {"config": {"flow_schedule_auto_shift": False, "validation_guidance_rescale": 0.7}},
    "another seed": {"config": {"seed": 7, "validation_negative_prompt": "blue"}},
    "alpha": {"config": {"lora_alpha": 4, "validation_disable": True}},
    "lion": {"config": {"optimizer": "optimi-lion", "validation_guidance": 1.0}},
    "full": {"config": {"model_type": "full", "base_model_precision": "no_change", "use_ema": False}},
    "flux": {"config": {"model_family": "flux"}},
    "epochs": {"config": {"max_train_steps": 0, "num_train_epochs": 2, "validation_prompt_library": True,
                          "validation_step_interval": 0, "disable_benchmark": True}},
    "sizes of their own": {"pictures": {"crop_aspect": "preserve"}},
    "pruned": {"config": {"disable_bucket_pruning": False}, "pictures": {"crop_aspect": "preserve"}},
    "held out": {"more": [KEPT]},
    "not held out": {"more": [KEPT], "config": {"eval_steps_interval": 0}},
}  # fmt: skip


def attribute(name: str) -> Look:
    return lambda seen: getattr(seen, name)


def base_pictures(seen: Seen) -> dict[str, bytes]:
    return {name: pixels for name, pixels in seen.samples.items() if name.startswith("samples/step-0/")}


def ids(seen: Seen) -> list[str]:
    return [each["id"] for each in json.loads((seen.run / "multidatabackend.json").read_text())]


def epoch(seen: Seen) -> float:
    return next(event["epoch_steps"] for event in seen.events if event.get("event") == "Started")


def told_prompts(seen: Seen) -> set[str]:
    validated = [event for event in seen.events if event.get("event") == "Validated"]
    return {sample["prompt"] for event in validated for sample in event["samples"]}


def pushed(seen: Seen, what: str) -> bool:
    return any(what in file for _, files in seen.pushed for file in files)


# A key of config.json -> the trainings without and with another value, and what is looked at.
CONFIG: dict[str, tuple[str, str, Look]] = {
    "base_model_precision": ("the sample", "names and sizes", attribute("stored")),
    "checkpoint_step_interval": ("the sample", "names and sizes", lambda seen: seen.names("checkpoint-*")),
    "data_backend_config": ("the sample", "names and sizes", ids),
    "disable_bucket_pruning": ("sizes of their own", "pruned", epoch),
    "eval_steps_interval": ("held out", "not held out",
                            lambda seen: [e["step"] for e in seen.events if e.get("event") == "Evaluated"]),
    "evaluation_type": ("the sample", "shorter", lambda seen: "Pictures are not scored" in seen.said),
    "flow_schedule_auto_shift": ("the sample", "no shift", lambda seen: seen.losses[0]),
    "gradient_checkpointing": ("the sample", "names and sizes", attribute("blocks_run")),
    "hub_model_id": ("the sample", "names and sizes", lambda seen: {repo for repo, _ in seen.pushed}),
    "learning_rate": ("the sample", "told otherwise", attribute("rates")),
    "lora_alpha": ("the sample", "alpha", attribute("total")),
    "lora_rank": ("the sample", "names and sizes", attribute("shapes")),
    "lora_type": ("the sample", "shorter", lambda seen: {name.rsplit(".", 1)[-1] for name in seen.weights}),
    "lr_scheduler": ("the sample", "names and sizes", attribute("rates")),
    "max_train_steps": ("the sample", "shorter", lambda seen: seen.found["step"]),
    "model_family": ("the sample", "flux", lambda seen: (seen.code, "model_family is 'flux'" in seen.said)),
    "model_type": ("the sample", "full", lambda seen: Path(seen.found["file"]).parent.name),
    "num_train_epochs": ("the sample", "epochs", lambda seen: seen.found["step"]),
    "optimizer": ("the sample", "lion", attribute("total")),
    "output_dir": ("the sample", "names and sizes", lambda seen: seen.run.parent.name),
    "push_checkpoints_to_hub": ("the sample", "shorter", lambda seen: pushed(seen, "checkpoints/")),
    "push_to_hub": ("the sample", "told otherwise", lambda seen: pushed(seen, "lumina2-lora-ema.safetensors")),
    "quantize_via": ("the sample", "told otherwise", attribute("via")),
    "report_to": ("the sample", "told otherwise", lambda seen: (bool(seen.wandb), bool(seen.names("*.html")))),
    "seed": ("the sample", "another seed", lambda seen: seen.losses[0]),
    "tracker_project_name": ("the sample", "names and sizes", lambda seen: [project for project, _ in seen.wandb]),
    "tracker_run_name": ("the sample", "names and sizes", lambda seen: seen.run.name),
    "train_batch_size": ("the sample", "names and sizes", epoch),
    "use_ema": ("the sample", "names and sizes", lambda seen: seen.names("*-ema-0.png")),
    "vae_batch_size": ("the sample", "names and sizes", lambda seen: max(seen.encoded)),
    "validation_disable_unconditional": ("the sample", "shorter", lambda seen: seen.names("unconditional*.png")),
    "validation_guidance": ("the sample", "lion", base_pictures),
    "validation_guidance_rescale": ("the sample", "no shift", base_pictures),
    "validation_negative_prompt": ("the sample", "another seed", base_pictures),
    "validation_num_inference_steps": ("the sample", "shorter",
                                       lambda seen: seen.samples["samples/step-0/fruit-0.png"]),
    "validation_prompt": ("the sample", "told otherwise", told_prompts),
    "validation_prompt_library": ("the sample", "epochs", lambda seen: len(seen.texts) > 20),
    "validation_resolution": ("the sample", "names and sizes", lambda seen: {len(p) for p in seen.samples.values()}),
    "validation_seed": ("the sample", "told otherwise", lambda seen: seen.samples["samples/step-0/fruit-0.png"]),
    "validation_step_interval": ("the sample", "names and sizes", lambda seen: seen.names("step-*")),
    "user_prompt_library": ("the sample", "names and sizes", lambda seen: bool(seen.names("bird*.png"))),
}  # fmt: skip
# A key of the dataset file -> another value, what is looked at after the command cache, and what else is there.
Row = tuple[Any, Look] | tuple[Any, Look, dict[str, Any]]
OF_PICTURES: dict[str, Row] = {
    "id": ("gradients", lambda seen: "gradients: 5 of 5 pictures" in seen.said),
    "type": ("aws", lambda seen: (seen.code, "aws_bucket_name" in seen.said)),
    "crop": (False, attribute("latents")),
    "crop_aspect": ("preserve", attribute("latents")),
    "crop_style": ("corner", attribute("latent_sum")),
    "resolution": (128, attribute("latents")),
    "minimum_image_size": (60, lambda seen: sum(seen.encoded)),
    "maximum_image_size": (256, attribute("latent_sum")),
    "target_downsample_size": (128, attribute("latent_sum")),
    "resolution_type": ("pixel", attribute("latent_sum"), {"pictures": {"crop_aspect": "preserve"}}),
    "cache_dir_vae": ("cache/elsewhere", lambda seen: seen.files("cache/elsewhere")),
    "instance_data_dir": ("others", lambda seen: sum(seen.encoded)),
    "caption_strategy": ("filename", lambda seen: any("picture 0" in text for text in seen.texts)),
    "metadata_backend": (None, lambda seen: "No effect here: metadata_backend." in seen.said),
}
OF_TEXTS: dict[str, Row] = {
    "id": ("texts", lambda seen: 'all captions are kept in "texts"' in seen.said, {"more": [SECOND]}),
    "type": ("aws", lambda seen: "captions are kept on this machine" in seen.said),
    "dataset_type": ("image_embeds", lambda seen: seen.files("cache/text")),
    "default": (False, lambda seen: seen.code, {"more": [SECOND]}),
    "cache_dir": ("cache/elsewhere", lambda seen: seen.files("cache/elsewhere")),
    "disabled": (True, lambda seen: seen.files("cache/text")),
    "write_batch_size": (1, lambda seen: seen.files("cache/text")),
}


def test_no_key_is_left_out():
    assert set(CONFIG) == set(SAMPLE) | {"user_prompt_library"}
    assert set(OF_PICTURES) == set(PICTURES)
    assert set(OF_TEXTS) == set(TEXTS)
    for key, (before, after, _) in CONFIG.items():
        values = [
            TRAININGS[name].get("config", {}).get(key, HERE.get(key, SAMPLE.get(key))) for name in (before, after)
        ]
        assert values[0] != values[1], key


@pytest.fixture(scope="module")
def training(look):
    """A training by its name, once."""
    return functools.cache(lambda name: look(**TRAININGS[name]))


def test_the_sample_trains_as_it_is(training):
    seen = training("the sample")
    assert (seen.code, seen.found["status"], seen.found["step"]) == (0, "finished", 2), seen.said


@pytest.mark.parametrize("key", CONFIG)
def test_a_key_of_the_config_acts(training, key):
    before, after, what = CONFIG[key]
    assert what(training(before)) != what(training(after))


def merged(*changes: dict[str, Any]) -> dict[str, Any]:
    kinds = {kind: {**changes[0].get(kind, {}), **changes[1].get(kind, {})} for kind in ("pictures", "texts")}
    return {**kinds, "more": changes[0].get("more", ()), "command": "cache"}


@pytest.fixture(scope="module")
def cached(look):
    """What the dataset file is read as, without a change; once for each thing that is there beside it."""
    found: dict[str, Seen] = {}

    def cached(also):
        if repr(also) not in found:
            found[repr(also)] = look(**merged(also, {}))
        return found[repr(also)]

    return cached


@pytest.mark.parametrize(
    ("file", "key"), [("pictures", key) for key in OF_PICTURES] + [("texts", key) for key in OF_TEXTS]
)
def test_a_key_of_the_dataset_file_acts(look, cached, file, key):
    other, what, *more = {"pictures": OF_PICTURES, "texts": OF_TEXTS}[file][key]
    also = more[0] if more else {}
    assert what(cached(also)) != what(look(**merged(also, {file: {key: other}})))
