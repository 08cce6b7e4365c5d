"""Every key of SimpleTuner's sample acts: each is changed once, and what it names is seen to change in a real training.

The trainings are started by the command line. Of a model they have stand-ins: a transformer of a few thousand weights,
and what a VAE and a text encoder would give. The hub and wandb are met where a request would leave this machine.
"""

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

    def look(config=None, pictures=None, texts=None, more=()):
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
        return watch(folder)

    def watch(folder):
        seen = Seen(folder, 0, None, "")
        transformer = tiny.transformer()

        def ran(module, given, result):
            seen.blocks_run += torch.is_grad_enabled()

        transformer.layers[0].register_forward_hook(ran)

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
            patch.setattr(train, "open_transformer", lambda model, device: transformer)
            patch.setattr(session, "quantise", quantised)
            patch.setattr(hub, "_commit", committed)
            patch.setattr("accelerate.tracking.WandBTracker", _WandB)
            seen.code = main(["train", "--config", str(folder / "config.json"), "--device", "cpu", "--json"])
        seen.said = err.getvalue()
        seen.found = json.loads(out.getvalue()) if out.getvalue().strip() else None
        seen.stored = sum(isinstance(module, StoredLinear) for module in transformer.modules())
        return seen

    return look


@pytest.fixture(scope="module")
def first(look):
    """The sample as it is."""
    seen = look()
    assert (seen.code, seen.found["status"], seen.found["step"]) == (0, "finished", 2), seen.said
    return seen


Look = Callable[[Seen], Any]


def difference(name: str) -> Look:
    return lambda seen: getattr(seen, name)


def pictures_of(step: int) -> Look:
    return lambda seen: {
        name: pixels for name, pixels in seen.samples.items() if name.startswith(f"samples/step-{step}/")
    }


def ids(seen: Seen) -> list[str]:
    return [each["id"] for each in json.loads((seen.run / "multidatabackend.json").read_text())]


def epoch(seen: Seen) -> float:
    return next(event["epoch_steps"] for event in seen.events if event.get("event") == "Started")


# A key of config.json -> another value, what is looked at, and other keys without which it would mean nothing.
CONFIG: dict[str, tuple[Any, Look] | tuple[Any, Look, dict[str, Any]]] = {
    "base_model_precision": ("no_change", difference("stored")),
    "checkpoint_step_interval": (1, lambda seen: seen.names("checkpoint-*")),
    "data_backend_config": ("other data.json", ids),
    "disable_bucket_pruning": (False, epoch, {"pictures": {"crop_aspect": "preserve"}}),
    "eval_steps_interval": (0, lambda seen: [e["step"] for e in seen.events if e.get("event") == "Evaluated"],
                            {"more": [{**PICTURES, **PICTURES_HERE, "id": "kept", "dataset_type": "eval"}]}),
    "evaluation_type": ("none", lambda seen: "evaluation_type is clip, and" in seen.said),
    "flow_schedule_auto_shift": (False, difference("losses")),
    "gradient_checkpointing": (False, difference("blocks_run")),
    "hub_model_id": ("me/other", lambda seen: {repo for repo, _ in seen.pushed}),
    "learning_rate": (1e-3, difference("rates")),
    "lora_alpha": (4, lambda seen: {w.item() for n, w in seen.weights.items() if n.endswith("alpha")}),
    "lora_rank": (4, difference("shapes")),
    "lora_type": ("lycoris", lambda seen: {name.rsplit(".", 1)[-1] for name in seen.weights},
                  {"config": {"lycoris_config": "lycoris.json"}}),
    "lr_scheduler": ("cosine", difference("rates")),
    "max_train_steps": (1, lambda seen: seen.found["step"]),
    "model_family": ("flux", lambda seen: (seen.code, "model_family is 'flux'" in seen.said)),
    "model_type": ("full", lambda seen: Path(seen.found["file"]).parent.name,
                   {"config": {"base_model_precision": "no_change", "use_ema": False}}),
    "num_train_epochs": (2, lambda seen: seen.found["step"], {"config": {"max_train_steps": 0, "num_train_epochs": 1}}),
    "optimizer": ("optimi-lion", difference("total")),
    "output_dir": ("elsewhere", lambda seen: seen.run.parent.name),
    "push_checkpoints_to_hub": (False, lambda seen: any("checkpoints/" in f for _, push in seen.pushed for f in push)),
    "push_to_hub": (False, lambda seen: any("README.md" in f for _, files in seen.pushed for f in files),
                    {"config": {"push_checkpoints_to_hub": False}}),
    "quantize_via": ("accelerator", difference("via")),
    "report_to": ("simpletuner", lambda seen: (bool(seen.wandb), seen.names("*.html"))),
    "seed": (7, difference("losses")),
    "tracker_project_name": ("cats", difference("wandb")),
    "tracker_run_name": ("cats", lambda seen: seen.run.name),
    "train_batch_size": (1, epoch),
    "use_ema": (False, lambda seen: Path(seen.found["file"]).with_stem("lumina2-lora-ema").exists()),
    "vae_batch_size": (2, lambda seen: max(seen.encoded)),
    "validation_disable_unconditional": (False, lambda seen: seen.names("unconditional*.png")),
    "validation_guidance": (1.0, pictures_of(0)),
    "validation_guidance_rescale": (0.7, pictures_of(0)),
    "validation_negative_prompt": ("blue", pictures_of(0)),
    "validation_num_inference_steps": (1, pictures_of(0)),
    "validation_prompt": ("an owl", pictures_of(0)),
    "validation_prompt_library": (True, lambda seen: len(seen.names("*.png")), {"config": {"use_ema": False}}),
    "validation_resolution": ("64x32", pictures_of(0)),
    "validation_seed": (7, pictures_of(0)),
    "validation_step_interval": (1, lambda seen: seen.names("step-*")),
    "user_prompt_library": ("more.json", lambda seen: seen.names("*.png")),
    }  # fmt: skip

# A key of the pictures' entry -> the same.
OF_PICTURES: dict[str, tuple[Any, Look] | tuple[Any, Look, dict[str, Any]]] = {
    "id": ("gradients", lambda seen: {name for event in seen.events for name in event.get("parts", {})}),
    "type": ("aws", lambda seen: (seen.code, seen.said.splitlines()[-1] if seen.code else "")),
    "crop": (False, difference("latents")),
    "crop_aspect": ("preserve", difference("latents")),
    "crop_style": ("corner", difference("latent_sum")),
    "resolution": (128, difference("latents")),
    "minimum_image_size": (60, lambda seen: len(seen.encoded)),
    "maximum_image_size": (256, difference("latent_sum")),
    "target_downsample_size": (128, difference("latent_sum")),
    "resolution_type": ("pixel", difference("latents"), {"pictures": {"crop_aspect": "preserve"}}),
    "cache_dir_vae": ("cache/vae elsewhere", lambda seen: seen.files("cache/vae")),
    "instance_data_dir": ("others", lambda seen: sum(seen.encoded)),
    "caption_strategy": ("filename", difference("losses")),
    "metadata_backend": (None, lambda seen: "No effect here: metadata_backend." in seen.said),
}
OF_TEXTS: dict[str, tuple[Any, Look] | tuple[Any, Look, dict[str, Any]]] = {
    "id": ("texts", lambda seen: 'left out: all captions are kept in "texts"' in seen.said,
           {"more": [{"id": "second", "dataset_type": "text_embeds"}]}),
    "type": ("aws", lambda seen: "captions are kept on this machine" in seen.said),
    "dataset_type": ("image_embeds", lambda seen: seen.files("cache/text")),
    "default": (False, lambda seen: seen.files("cache/text"),
                {"more": [{"id": "second", "dataset_type": "text_embeds", "default": None, "cache_dir": "second"}]}),
    "cache_dir": ("cache/elsewhere", lambda seen: seen.files("cache/text")),
    "disabled": (True, lambda seen: seen.files("cache/text")),
    "write_batch_size": (1, lambda seen: seen.files("cache/text")),
}  # fmt: skip


def test_no_key_is_left_out():
    assert set(CONFIG) == set(SAMPLE) | {"user_prompt_library"}
    assert set(OF_PICTURES) == set(PICTURES)
    assert set(OF_TEXTS) == set(TEXTS)


def together(*changes: dict[str, Any]) -> dict[str, Any]:
    return {kind: {**changes[0].get(kind, {}), **changes[1].get(kind, {})} for kind in ("config", "pictures", "texts")}


@pytest.mark.parametrize(
    ("file", "key"),
    [("config", key) for key in CONFIG]
    + [("pictures", key) for key in OF_PICTURES]
    + [("texts", key) for key in OF_TEXTS],
)
def test_the_key_acts(look, first, file, key):
    table = {"config": CONFIG, "pictures": OF_PICTURES, "texts": OF_TEXTS}[file]
    other, what, *also = table[key]
    changes = also[0] if also else {}
    more = changes.get("more", ())
    before = what(look(**together(changes, {}), more=more)) if changes else what(first)
    after = what(look(**together(changes, {file: {key: other}}), more=more))
    assert before != after, f"{key} changes nothing: {before}"
