"""How samples are drawn and judged while training. SimpleTuner's names; nothing here decides the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import SettingError
from ..files import read_json
from .checks import one_of, require

EVALUATIONS = ("none", "clip")
EMA_VALIDATION = ("comparison", "ema_only", "none")
CLIP = "openai/clip-vit-large-patch14"  # its weights are there as safetensors; of the larger -336 they may not be
LIBRARY = Path(__file__).resolve().parents[2] / "assets" / "prompts" / "library.json"
PATCH_PX = 16  # two by two places of a latent that is an eighth of the picture
MAX_SIDE_PX = 512 * PATCH_PX  # the rotary table's end


class Prompt(NamedTuple):
    name: str  # in file names and beside curves; no other of the same settings has it
    text: str  # without a system prompt


class Size(NamedTuple):
    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"


@dataclass(frozen=True)
class ValidationSettings:
    """The prompts, how they are drawn, how often, and what is measured.

    Raises:
        SettingError: a value is out of range.
    """

    validation_prompt: str = ""  # one a line
    validation_prompt_library: bool = False  # the prompts that come with this project
    user_prompt_library: str = ""  # a JSON file of short names and prompts
    validation_disable_unconditional: bool = True  # False: also what the model draws without a prompt
    validation_negative_prompt: str = ""  # as it is, without a system prompt
    validation_guidance: float = 4.0  # 1: none
    validation_guidance_rescale: float = 0.0  # 0 to 1: how far guidance's gain in contrast is taken back
    cfg_trunc_ratio: float = 1.0  # the share of the steps, from the first, in which guidance acts
    cfg_normalization: bool = False  # guidance keeps the length of the prediction; KSampler does not do this
    validation_num_inference_steps: int = 30
    validation_shift: float = 0.0  # of the noise levels; 0: the model's own, which is 6 for Lumina-Image-2.0
    validation_resolution: str = "1024x1024"  # several by commas
    validation_seed: int = 42
    num_validation_images: int = 1  # of each prompt, each with the next seed
    validation_step_interval: int = 100  # 0: only when asked
    disable_benchmark: bool = False  # True: the base model's pictures are not drawn at the start
    ema_validation: str = "comparison"  # pictures of the EMA beside the weights', instead of them, or none
    evaluation_type: str = "none"  # "clip": how well pictures fit their prompts
    pretrained_evaluation_model_name_or_path: str = CLIP  # a folder or a hub id
    evaluation_required: bool = False  # True: without that CLIP the training does not start
    eval_steps_interval: int = 0  # of the held-out loss; 0: never
    eval_timesteps: int = 8  # noise levels of each held-out picture
    num_eval_images: int = 32  # held-out pictures of each dataset, at most; 0: all
    keep_best: bool = False  # the checkpoint of the lowest held-out loss is kept whatever the limit
    early_stopping_patience: int = 0  # evaluations without a new lowest held-out loss that end the run; 0: off

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, remedy: str) -> None:
            require(holds, name, getattr(self, name), remedy)

        check("validation_guidance", 1 <= self.validation_guidance <= 100, "choose 1 (none) to 100, best from 4 to 6")
        for name in ("validation_guidance_rescale", "cfg_trunc_ratio"):
            check(name, 0 <= getattr(self, name) <= 1, "choose 0 to 1")
        for name in ("validation_num_inference_steps", "num_validation_images", "eval_timesteps"):
            check(name, 1 <= getattr(self, name) <= 1000, "choose 1 to 1000")
        check("validation_shift", 0 <= self.validation_shift <= 100, "choose 0 (the model's own) to 100")
        check("validation_seed", 0 <= self.validation_seed < 2**64, "choose a number from 0 to 18446744073709551615")
        counts = ("validation_step_interval", "eval_steps_interval", "num_eval_images", "early_stopping_patience")
        for name in counts:
            check(name, getattr(self, name) >= 0, "choose 0 (off) or more")
        one_of("evaluation_type", self.evaluation_type, EVALUATIONS)
        one_of("ema_validation", self.ema_validation, EMA_VALIDATION)
        clip = self.evaluation_type == "clip"
        name = "pretrained_evaluation_model_name_or_path"
        check(name, bool(getattr(self, name)) or not clip, f"name a folder with a CLIP, or {CLIP}")
        watched = self.eval_steps_interval > 0
        for name in ("keep_best", "early_stopping_patience"):
            check(name, watched or not getattr(self, name), "it watches the held-out loss: set eval_steps_interval")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[Size, ...]:
        """``validation_resolution``, each side rounded to 16 px.

        Raises:
            SettingError: it is no size, or a side is not possible.
        """
        found: dict[Size, None] = {}
        for part in filter(None, (part.strip() for part in self.validation_resolution.lower().split(","))):
            sides = re.fullmatch(r"(\d{1,5})(?:\s*[x×]\s*(\d{1,5}))?", part)
            written = (sides[1], sides[2] or sides[1]) if sides else ("0", "0")
            width, height = (round(int(side) / PATCH_PX) * PATCH_PX for side in written)
            require(
                all(PATCH_PX <= side <= MAX_SIDE_PX for side in (width, height)),
                "validation_resolution",
                self.validation_resolution,
                f"write sizes with sides from {PATCH_PX} to {MAX_SIDE_PX}, for example 1024x1024,832x1216",
            )
            found[Size(width, height)] = None
        require(bool(found), "validation_resolution", self.validation_resolution, "write a size, for example 1024x1024")
        return tuple(found)

    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, in SimpleTuner's order: unconditional, library, the user's library, the single ones.

        Raises:
            SettingError: the user's library cannot be read.
        """
        named: list[tuple[str, str]] = []
        if not self.validation_disable_unconditional:
            named.append(("unconditional", ""))
        if self.validation_prompt_library:
            named += read_library(LIBRARY)
        if self.user_prompt_library:
            named += read_library(Path(self.user_prompt_library))
        named += [("validation", line.strip()) for line in self.validation_prompt.splitlines() if line.strip()]
        return tuple(unique_names(named))


def read_library(path: Path) -> list[tuple[str, str]]:
    """A JSON object of short names and prompts, in its order.

    Raises:
        SettingError: the file cannot be read, or holds something else.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise SettingError(f"The prompt library {path} cannot be read ({error}). Choose a JSON file.") from None
    prompts = {}
    for name, value in content.items() if isinstance(content, dict) else [("the file", content)]:
        text = value.get("prompt") if isinstance(value, dict) and value.keys() <= {"prompt"} else value
        if not isinstance(text, str) or not text.strip():
            raise SettingError(
                f"In the prompt library {path}, {name} is {value!r}. Write one JSON object of short names and "
                'prompts, such as {"cat": "a photo of a cat"}.'
            )
        prompts[name] = text.strip()
    if not prompts:
        raise SettingError(f"The prompt library {path} is empty. Add a prompt, or leave user_prompt_library empty.")
    return list(prompts.items())


def unique_names(named: list[tuple[str, str]]) -> list[Prompt]:
    """Names that can be files on every system, each once whatever the case: a second ``cat`` is ``cat-2``."""
    taken: set[str] = set()
    prompts = []
    for name, text in named:
        plain = file_name(name)
        number, own = 1, plain
        while own.casefold() in taken:
            number += 1
            own = f"{plain}-{number}"
        taken.add(own.casefold())
        prompts.append(Prompt(own, text))
    return prompts


def file_name(text: str, length: int = 48) -> str:
    """Letters of any script, digits and ``-_``; "picture" where nothing of the text is left."""
    return re.sub(r"[^\w\-]+", "-", text)[:length].strip("-") or "picture"
