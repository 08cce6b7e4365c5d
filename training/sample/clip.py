"""CLIP's opinion on how well a picture fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch

from ..errors import SettingError


class CLIP:
    """A CLIP of transformers, which waits in the CPU's memory.

    Args:
        source: a folder, or a hub id; the hub is asked where the model is not in its cache.
        device: where it computes; it is there for the time of a call only.

    Raises:
        SettingError: it is not there, or is no CLIP.
    """

    def __init__(self, source: str, device: torch.device | None = None) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.device = device or torch.device("cpu")
        try:
            self._model: Any = CLIPModel.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
            self._processor: Any = CLIPProcessor.from_pretrained(source)
        except Exception as error:  # transformers and the hub raise some ten kinds of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SettingError(
                f"There is no CLIP at {source!r} ({reason}). Name a folder with a CLIP of transformers (safetensors), "
                "download it first, or set evaluation_type to none."
            ) from None

    @torch.no_grad()
    def cosines(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        """The cosine between each picture (height, width, 3), uint8, and its prompt, without a system prompt.

        A prompt that is longer than CLIP reads (77 tokens) is cut.
        """
        limit = self._model.config.text_config.max_position_embeddings
        self._model.to(self.device)
        try:
            found = []
            for picture, prompt in zip(pictures, prompts, strict=True):
                image = torch.from_numpy(np.ascontiguousarray(picture)).movedim(-1, 0)
                inputs = self._processor(
                    text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=limit
                )
                out = self._model(**inputs.to(self.device))
                found.append(torch.cosine_similarity(out.image_embeds.float(), out.text_embeds.float()).item())
        finally:
            self._model.to("cpu")
        return found


def summary(cosines: Sequence[float]) -> dict[str, float]:
    """``clip_cosine``: the mean; ``clip_score``: the same × 100, with its least, greatest and standard deviation."""
    scores = [100 * each for each in cosines]
    return {
        "clip_cosine": fmean(cosines),
        "clip_score": fmean(scores),
        "clip_score_min": min(scores),
        "clip_score_max": max(scores),
        "clip_score_std": pstdev(scores),
    }
