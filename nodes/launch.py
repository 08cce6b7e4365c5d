"""Training that is handed to accelerate: what is wired is written down once, and the run is followed from here."""

from __future__ import annotations

from typing import Any

import comfy.model_management

from ..training.cache.latents import LatentCache
from ..training.cache.texts import TextCache
from ..training.config.settings import TrainSettings
from ..training.model.vae import diffusers_vae
from ..training.run.control import Control
from ..training.run.events import Listener, Said
from ..training.run.folder import RunStore
from ..training.run.launching import launch as launch_run
from ..training.run.launching import processes_here
from ..training.run.remote import Spec, write_model, write_vae
from ..training.run.session import Outcome, Request
from .bridge import engine_transformer
from .places import cache_root


def launch(
    model: Any,
    latents: LatentCache,
    texts: TextCache,
    settings: TrainSettings,
    request: Request,
    store: RunStore,
    tell: Listener,
    *,
    control: Control | None = None,
    vae: Any = None,
    processes: int = 0,
) -> Outcome:
    """``train_lora`` in processes of its own, one for each GPU.

    MODEL as wired, its patches included, is written to ``.cache/models`` once; so is the VAE. ComfyUI gives the device
    back before the others start.

    Args:
        model, vae: ComfyUI's.
        tell: what it raises (Cancel) ends the run with everything saved, and is raised here then.
        processes: how many; 0: as many as there are GPUs.

    Raises:
        Lumina2Error: as ``train_lora``; an end without a word shows the last lines that were printed.
    """
    folder, scaled = cache_root() / "models", model.model.latent_format
    written = write_model(engine_transformer(model), folder, lambda text: tell(Said(text)))
    shift, scale = float(getattr(scaled, "shift_factor", 0.0)), float(scaled.scale_factor)
    pictures = None
    if vae is not None:
        weights = diffusers_vae(vae.first_stage_model.state_dict().items())
        pictures = write_vae({name: weight.detach().cpu() for name, weight in weights.items()}, shift, scale, folder)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    spec = Spec(
        model=written,
        latents=latents,
        texts=texts,
        settings=settings,
        request=request,
        store=store,
        processes=processes or processes_here(),
        latent_shift=shift,
        latent_scale=scale,
        shift=float(model.get_model_object("model_sampling").shift),
        vae=pictures,
    )
    return launch_run(spec, cache_root() / "launches", tell, control)
