"""What a run does between two steps to be judged: pictures, their scores, and the held-out loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter.full import Full
from ..cache.latents import LatentCache
from ..cache.texts import EmbeddedPrompt, TextCache
from ..config.validation import Prompt, Size, ValidationSettings, file_name
from ..data.prompts import with_system_prompt
from ..errors import SettingError
from ..run.events import Evaluated, Event, Said, Sample, Validated
from ..run.validation import Moment
from .clip import CLIP, summary
from .distances import coarse, nearest, spread, training_pictures
from .draw import LUMINA2_SHIFT, draw_latents, picture_noise, picture_seed
from .heldout import HeldOut, held_out_pictures, judge, picture_losses
from .past import Past, read_past
from .pictures import read_recipe, save_picture, to_bytes
from .weights import undisturbed, variants

UNNAMED_CAPTIONS = 2  # drawn where the embeddings are another node's and say no prompt


@dataclass(frozen=True)
class _Order:
    """One picture to draw."""

    prompt: EmbeddedPrompt
    name: str  # the prompt's, with the size where there are several
    number: int  # of the prompt's pictures, from 0
    seed: int
    size: Size

    def path(self, step: int, ema: bool) -> str:
        return f"samples/step-{step}/{self.name}{'-ema' if ema else ''}-{self.number}.png"


@dataclass(frozen=True)
class _Drawn:
    order: _Order
    sample: Sample
    pixels: np.ndarray
    coarse: Tensor  # (1, D)


class SampleValidator:
    """Draws the validation's prompts and works out the held-out loss, with the very weights that are trained.

    Args:
        texts: whose ``validation`` says what is drawn, and when.
        latents: for held-out pictures, and the training pictures that samples are compared with.
        scale_latents: from the VAE's units to the transformer's.
        decode: latents (1, C, h, w) in the transformer's units to pictures (1, height, width, 3) in [0, 1]; None:
            nothing is drawn, and only the held-out loss is worked out.
        embed: a text to its embedding (tokens, width), for prompts that are typed in.
        shift: the model's own in inference.
        last_step: of the run, behind which samples are drawn whatever the interval; 0: unknown.

    Raises:
        SettingError: CLIP is required and not there, or held-out pictures are not cached.
        DataError: held-out pictures have no captions.
    """

    def __init__(
        self,
        texts: TextCache,
        latents: LatentCache,
        scale_latents: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor] | None = None,
        embed: Callable[[str], Tensor] | None = None,
        shift: float = LUMINA2_SHIFT,
        last_step: int = 0,
        downscale: int = 8,
    ) -> None:
        self.settings = chosen = _settings(texts, latents, downscale)
        self._texts, self._latents, self._scale = texts, latents, scale_latents
        self._decode, self._embed = decode, embed
        self._shift, self._last, self._downscale = shift, last_step, downscale
        self._prompts = texts.validation.prompts if texts.validation else _captions(texts)
        self._negative = texts.validation.negative if texts.validation else texts.empty
        watched = chosen.eval_steps_interval > 0
        self._held_out = held_out_pictures(latents, texts, chosen.num_eval_images) if watched else []
        self._notes = []
        if watched and not self._held_out:
            self._notes = [
                f"eval_steps_interval is {chosen.eval_steps_interval}, but no dataset is of dataset_type eval: there "
                "is no held-out loss."
            ]
        self._clip: CLIP | None = None
        self._scores = chosen.evaluation_type == "clip"
        if self._scores and chosen.evaluation_required:
            self._clip = CLIP(chosen.pretrained_evaluation_model_name_or_path)
        self._asked_before = False
        self._past: Past | None = None
        self._training_pictures: Tensor | None = None
        self._entries = texts.store.open()

    def due(self, step: int) -> bool:
        first, self._asked_before = not self._asked_before, True
        base = first and self._draws and not self.settings.disable_benchmark
        return bool(base or self._notes or self._draws_at(step) or self._evaluates_at(step))

    @property
    def _draws(self) -> bool:
        return self._decode is not None and self.settings.validation_step_interval > 0

    def _draws_at(self, step: int) -> bool:
        return self._draws and step > 0 and (step % self.settings.validation_step_interval == 0 or step == self._last)

    def _evaluates_at(self, step: int) -> bool:
        every = self.settings.eval_steps_interval
        return bool(self._held_out) and (step % every == 0 or step == self._last)

    def run(self, moment: Moment) -> Iterator[Event]:
        # Nothing is handed out while weights, modes or random states are other than the run's own.
        notes, self._notes = self._notes, []
        yield from map(Said, notes)
        past = self._history(moment.folder)
        if self._draws and not self.settings.disable_benchmark:
            yield from self._base(moment, past)
        if self._draws_at(moment.step) and moment.step not in past.validated:
            past.validated.add(moment.step)
            yield from self._validated(moment, self._orders(self._prompts))
        if self._evaluates_at(moment.step) and moment.step not in past.losses:
            yield self._evaluated(moment, past)

    def sample(self, moment: Moment, prompt: str) -> Iterable[Event]:
        if self._decode is None:
            raise SettingError("Nothing can be drawn: wire a VAE into the train node.")
        if not prompt:
            return self._validated(moment, self._orders(self._prompts), asked=True)
        if self._embed is None:
            raise SettingError(
                f"The prompt {prompt!r} cannot be read: wire a CLIP into the train node, or leave the prompt empty to "
                "draw the validation's own."
            )
        said = self._texts.validation
        text = with_system_prompt(prompt, said.system_prompt) if said else prompt
        with undisturbed(moment.transformer):
            embedding = self._embed(text)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
        typed = EmbeddedPrompt(Prompt(f"{file_name(prompt, 40)}-{digest}", prompt), "")
        return self._validated(moment, self._orders((typed,)), asked=True, typed=embedding)

    # --- pictures

    def _orders(self, prompts: Iterable[EmbeddedPrompt]) -> list[_Order]:
        settings = self.settings
        several = len(settings.sizes) > 1
        return [
            _Order(
                prompt=each,
                name=f"{each.prompt.name}-{size}" if several else each.prompt.name,
                number=number,
                seed=picture_seed(settings.validation_seed, number),
                size=size,
            )
            for each in prompts
            for size in settings.sizes
            for number in range(settings.num_validation_images)
        ]

    def _base(self, moment: Moment, past: Past) -> list[Event]:
        """The base model's pictures, those that the run's folder lacks."""
        full = isinstance(moment.state.adapter, Full)
        if full and moment.step > 0:
            return []  # there is no base any more
        at_start = replace(moment, step=0)
        missing = [
            order
            for order in self._orders(self._prompts)
            if order.path(0, False) not in past.base
            or read_recipe(moment.folder / order.path(0, False)) != self._recipe(at_start, order, "base")
        ]
        if not missing:
            return []
        past.base |= {order.path(0, False) for order in missing}
        with undisturbed(moment.transformer), nullcontext() if full else moment.state.adapter.off():
            drawn = [self._draw(at_start, order, "base") for order in missing]
        return self._told(moment, 0, drawn, asked=False)

    def _validated(
        self, moment: Moment, orders: list[_Order], asked: bool = False, typed: Tensor | None = None
    ) -> list[Event]:
        drawn = []
        for ema, weights in variants(moment.state, self.settings):
            with undisturbed(moment.transformer), weights():
                drawn += [self._draw(moment, order, "ema" if ema else "trained", typed) for order in orders]
        return self._told(moment, moment.step, drawn, asked)

    def _draw(self, moment: Moment, order: _Order, weights: str, typed: Tensor | None = None) -> _Drawn:
        assert self._decode is not None
        noise = picture_noise(order.seed, moment.transformer.config.channels, order.size, self._downscale)
        latents = draw_latents(
            moment.transformer,
            self._entries.read(order.prompt.key) if typed is None else typed,
            self._entries.read(self._negative),
            noise,
            self.settings,
            self._shift,
            lambda step: moment.tick(),
        )
        pixels = to_bytes(self._decode(latents)[0])
        path = order.path(moment.step, weights == "ema")
        save_picture(moment.folder / path, pixels, self._recipe(moment, order, weights))
        prompt = order.prompt.prompt.text
        sample = Sample(path=path, name=order.name, prompt=prompt, seed=order.seed, ema=weights == "ema")
        return _Drawn(order, sample, pixels, coarse(latents))

    def _recipe(self, moment: Moment, order: _Order, weights: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "prompt": order.prompt.prompt.text,
            "negative_prompt": settings.validation_negative_prompt,
            "seed": order.seed,
            "width": order.size.width_px,
            "height": order.size.height_px,
            "steps": settings.validation_num_inference_steps,
            "guidance": settings.validation_guidance,
            "guidance_rescale": settings.validation_guidance_rescale,
            "cfg_trunc_ratio": settings.cfg_trunc_ratio,
            "cfg_normalization": settings.cfg_normalization,
            "shift": settings.validation_shift or self._shift,
            "run": moment.folder.name,
            "step": moment.step,
            "weights": weights,
        }

    # --- scores

    def _told(self, moment: Moment, step: int, drawn: list[_Drawn], asked: bool) -> list[Event]:
        """The event of drawn pictures, with all that is measured of them."""
        said, cosines = self._cosines(moment, drawn)
        scores: dict[str, float] = {}
        for ema in sorted({each.sample.ema for each in drawn}):
            of_these = [number for number, each in enumerate(drawn) if each.sample.ema == ema]
            found = self._measured([drawn[number] for number in of_these])
            known = [cosine for number in of_these if (cosine := cosines[number]) is not None]
            found |= summary(known) if known else {}
            scores |= {f"ema_{name}" if ema else name: value for name, value in found.items()}
        samples = tuple(
            replace(each.sample, score=None if cosine is None else 100 * cosine)
            for each, cosine in zip(drawn, cosines, strict=True)
        )
        return [*said, Validated(step, samples, scores, asked)]

    def _cosines(self, moment: Moment, drawn: list[_Drawn]) -> tuple[list[Event], list[float | None]]:
        """CLIP's cosine of each picture that has a prompt; and a sentence, once, where there is no CLIP."""
        nothing: list[float | None] = [None] * len(drawn)
        if not self._scores:
            return [], nothing
        with undisturbed(moment.transformer):
            try:
                self._clip = self._clip or CLIP(self.settings.pretrained_evaluation_model_name_or_path)
            except SettingError as error:
                self._scores = False
                return [Said(f"Pictures are not scored. {error}")], nothing
            self._clip.device = moment.transformer.final_layer.linear.weight.device
            told = [number for number, each in enumerate(drawn) if each.sample.prompt]
            found = self._clip.cosines(
                [drawn[number].pixels for number in told], [drawn[number].sample.prompt for number in told]
            )
        for number, cosine in zip(told, found, strict=True):
            nothing[number] = cosine
        return [], nothing

    def _measured(self, drawn: list[_Drawn]) -> dict[str, float]:
        """Distances that need no network: to the training pictures, and between prompts of one seed and size."""
        if self._training_pictures is None:
            self._training_pictures = training_pictures(self._latents, self._scale)
        scores = {}
        if len(self._training_pictures):
            scores["nearest_training"] = nearest(torch.cat([each.coarse for each in drawn]), self._training_pictures)
        groups: dict[tuple[int, Size], list[Tensor]] = {}
        for each in drawn:
            groups.setdefault((each.order.seed, each.order.size), []).append(each.coarse)
        spreads = [spread(torch.cat(group)) for group in groups.values() if len(group) > 1]
        if spreads:
            scores["diversity"] = fmean(spreads)
        return scores

    # --- the held-out loss

    def _evaluated(self, moment: Moment, past: Past) -> Evaluated:
        settings = self.settings
        losses: dict[bool, float] = {}
        scores: dict[str, float] = {}
        looked_at = variants(moment.state, settings)
        for ema, weights in looked_at if moment.step else looked_at[:1]:  # at the start they are the same
            with undisturbed(moment.transformer), weights():
                by_dataset = self._losses(moment)
            losses[ema] = fmean(loss for each in by_dataset.values() for loss in each)
            scores |= {f"{'ema_' if ema else ''}{name}": fmean(each) for name, each in by_dataset.items()}
        loss = losses[min(losses)]  # the weights' own, where they are looked at
        if losses.keys() == {False, True}:
            scores["ema"] = losses[True]
        before = [past.losses[step] for step in sorted(past.losses) if step > 0]
        past.losses[moment.step] = loss
        if moment.step == 0:  # the base model's: nothing that could be kept
            return Evaluated(0, loss, scores)
        counted = [each if math.isfinite(each) else math.inf for each in (*before, loss)]
        best, stop = judge(counted[:-1], counted[-1], settings.early_stopping_patience)
        return Evaluated(moment.step, loss, scores, best=best and settings.keep_best, stop=stop)

    def _losses(self, moment: Moment) -> dict[str, list[float]]:
        """The mean loss of each held-out picture, by dataset."""
        parts = self._latents.parts
        entries = {number: parts[number].store.open() for number in {each.part for each in self._held_out}}
        pending: list[tuple[HeldOut, Tensor]] = []
        for each in self._held_out:
            latent = self._scale(entries[each.part].read(each.key)[None].float())[0]
            caption = self._entries.read(each.caption)
            levels = self.settings.eval_timesteps
            found = picture_losses(moment.transformer, latent, caption, each.key, levels, moment.tick)
            pending.append((each, found.mean()))
        values = torch.stack([loss for _, loss in pending]).tolist()  # the device is waited for once
        by_dataset: dict[str, list[float]] = {}
        for (each, _), value in zip(pending, values, strict=True):
            by_dataset.setdefault(parts[each.part].id, []).append(value)
        return by_dataset

    def _history(self, folder: Path) -> Past:
        if self._past is None or self._past.folder != folder:
            self._past = read_past(folder)
        return self._past


def _settings(texts: TextCache, latents: LatentCache, downscale: int) -> ValidationSettings:
    """What was chosen; else nothing is drawn unless asked, and then in the size of the first training picture."""
    if texts.validation and texts.validation.settings:
        return texts.validation.settings
    _, height, width = latents.rows().shape[0].tolist()
    size = Size(width * downscale, height * downscale)
    return ValidationSettings(validation_step_interval=0, validation_resolution=str(size))


def _captions(texts: TextCache) -> tuple[EmbeddedPrompt, ...]:
    """The first captions of embeddings that do not say their texts."""
    rows = texts.rows()
    return tuple(
        EmbeddedPrompt(Prompt(file_name(f"caption {row + 1}"), ""), rows.variants(row)[0])
        for row in range(min(UNNAMED_CAPTIONS, texts.count))
    )
