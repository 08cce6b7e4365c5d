"""A training that the node hands to two processes, against the same one in this process: ComfyUI's own objects."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

NANO = Path(__file__).resolve().parents[2] / "assets" / "nano"
STEPS = 4


@pytest.fixture
def engine(plugin, tmp_path, monkeypatch):
    """Modules of the plugin as ComfyUI has them, with ComfyUI's output folder elsewhere."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))

    def module(name):
        return importlib.import_module(f"lumina2_trainer.{name}")

    return module


def caches(engine, folder):
    """Four latents with captions, and a validation of one small picture behind the last step."""
    store, validation = engine("training.cache.store").Store, engine("training.config.validation")
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 8, 8, generator=generator) for _ in range(4)]
    texts = [torch.randn(4 + n, 192, generator=generator) for n in range(4)]
    given = engine("training.cache.given").keep_given(
        latents, texts, torch.randn(1, 192, generator=generator), store(str(folder / "l")), store(str(folder / "t"))
    )

    cache = engine("training.cache.texts")
    key = given[1].rows().variants(0)[0]
    settings = validation.ValidationSettings(
        validation_step_interval=STEPS,
        validation_resolution="64x64",
        validation_num_inference_steps=2,
        disable_benchmark=True,
    )
    prompt = cache.EmbeddedPrompt(validation.Prompt("first", "a picture"), key)
    said = cache.Validation((prompt,), given[1].empty, "", 256, settings)
    return given[0], replace(given[1], validation=said)


def test_two_processes_train_what_is_wired_as_this_one_does(engine, tmp_path):
    bridge, launching = engine("nodes.bridge"), engine("nodes.launch")
    settings, adapter = engine("training.config.settings"), engine("training.config.adapter")
    optim, objective = engine("training.config.optim"), engine("training.config.objective")
    session, folder, events = (
        engine("training.run.session"),
        engine("training.run.folder"),
        engine("training.run.events"),
    )
    with torch.inference_mode():
        model, _, vae = bridge.load_pipeline(NANO, "fp32")
    given = caches(engine, tmp_path / "caches")

    def trained(accumulation):
        return settings.TrainSettings(
            steps=STEPS,
            batch_size=1,
            adapter=adapter.LoRASettings(4),
            optimizer=optim.OptimizerSettings("torch-adamw", 1e-3, gradient_accumulation_steps=accumulation),
            objective=objective.ObjectiveSettings(caption_dropout_probability=0),
        )

    heard = []
    store = folder.RunStore(tmp_path / "runs", tmp_path / "loras")
    with torch.inference_mode():  # as ComfyUI calls a node
        outcome = launching.launch(
            model, *given, trained(1), session.Request("handed"), store, heard.append, vae=vae, processes=2
        )
    assert outcome.run.processes == 2
    drawn = [event for event in heard if isinstance(event, events.Validated)]
    assert [event.step for event in drawn] == [STEPS]
    assert (store.path(outcome.run) / drawn[0].samples[0].path).exists()
    written = sorted(path.name for path in (tmp_path / "output" / "lumina2" / ".cache" / "models").iterdir())
    assert len(written) == 2
    assert any("GB" in event.text for event in heard if isinstance(event, events.Said))

    other = folder.RunStore(tmp_path / "own runs", tmp_path / "own loras")
    with bridge.training():
        expected = session.train_lora(
            bridge.trainable_transformer(model),
            *given,
            trained(2),
            session.Request("own"),
            other,
            model.model.process_latent_in,
        )
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, weight in load_file(tmp_path / "own loras" / "own.safetensors").items():
        torch.testing.assert_close(outcome.lora[name], weight, rtol=1e-3, atol=1e-5)
    assert outcome.run.identity == expected.run.identity
