"""Masks: cut as their pictures are, kept beside the latents, and what they hide teaches nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from training.cache.latents import cache_latents
from training.cache.store import Store
from training.cache.texts import cache_texts
from training.config.dataset import CacheSettings, DatasetSettings, GeometrySettings, MixSettings, SourceSettings
from training.config.objective import ObjectiveSettings
from training.config.settings import TrainSettings
from training.data.dataset import append, load_dataset
from training.errors import DataError, SettingError
from training.run.batches import Batches
from training.run.identity import data_identity


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


class Folders:
    """Three pictures of 128 × 64 px, of which two have a mask that is white on the right."""

    def __init__(self, tmp_path):
        self.place, self.store = tmp_path, Store(str(tmp_path / "latents"))
        self.encoded = 0
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 128, 3))
            save(tmp_path / "pictures" / f"{number}.png", pixels)
            (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
        for number in (0, 1):
            mask = np.zeros((64, 128, 3))
            mask[:, 64:, 0] = 255  # the red channel counts
            mask[:, :, 1] = 200
            save(tmp_path / "masks" / f"{number}.webp" if number else tmp_path / "masks" / "0.png", mask)

    def dataset(self, geometry=None, cache=None, masks="masks"):
        geometry = geometry or GeometrySettings(64, crop_aspect="square", crop_style="corner")
        pictures = DatasetSettings(
            "pictures",
            SourceSettings(instance_data_dir=str(self.place / "pictures")),
            geometry,
            mix=MixSettings(conditioning_data=masks),
            cache=cache or CacheSettings(),
        )
        masks = DatasetSettings(
            "masks",
            SourceSettings(instance_data_dir=str(self.place / "masks")),
            mix=MixSettings(dataset_type="conditioning", conditioning_type="mask"),
        )
        return append(load_dataset(pictures, self.place), load_dataset(masks, self.place))

    def latents(self, dataset):
        def encode(pictures):
            self.encoded += len(pictures)
            return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()

        return cache_latents(dataset, encode, "vae", self.store, 2)

    def texts(self, dataset):
        return cache_texts(
            dataset, lambda text: (torch.ones(len(text) + 1, 4), False), "encoder", "", 99, Store(str(self.place / "t"))
        )

    def batches(self, dataset, **objective):
        settings = TrainSettings(objective=ObjectiveSettings(caption_dropout_probability=0, **objective))
        return Batches(self.latents(dataset), self.texts(dataset), settings, lambda z: z)


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def masks_of(batches, steps=12):
    """The mask of each picture, by what is said of it (the third has none)."""
    return [batches.make(step).masks for step in range(steps)]


def test_a_mask_is_cut_as_its_picture(folders):
    wide = folders.dataset(GeometrySettings(64, crop=False))  # 128 × 64 is kept whole
    with folders.batches(wide) as batches:
        seen = [mask for mask in masks_of(batches) if mask is not None]
    assert seen
    for mask in seen:
        half = mask.shape[-1] // 2
        assert mask.shape[:2] == (1, 1)
        assert mask[..., : half - 1].max() < 0.05
        assert mask[..., half + 1 :].min() > 0.95
    with folders.batches(folders.dataset()) as batches:  # the left half of each
        cropped = [mask for mask in masks_of(batches) if mask is not None]
    assert all(mask.shape == (1, 1, 8, 8) for mask in cropped)
    assert all(mask[..., :7].max() < 0.05 for mask in cropped)


def test_pictures_without_a_mask_count_everywhere_and_are_named(folders):
    dataset = folders.dataset()
    latents = folders.latents(dataset)
    assert latents.count == 3
    assert any("1 pictures have no mask" in sentence and "2.png" in sentence for sentence in latents.skipped)
    assert [report.lines() for report in dataset.reports][1] == ["masks: 2 masks"]
    with folders.batches(dataset) as batches:
        assert any(mask is None for mask in masks_of(batches))


def test_a_mask_is_mirrored_with_its_picture(folders):
    geometry = GeometrySettings(64, crop=False, horizontal_flip=True)
    with folders.batches(folders.dataset(geometry)) as batches:
        seen = [mask for mask in masks_of(batches, 40) if mask is not None]
    left = [bool(mask[..., :4].mean() > 0.9) for mask in seen]
    assert True in left
    assert False in left


def test_a_share_of_the_samples_is_not_masked(folders):
    with folders.batches(folders.dataset(), masked_loss_probability=0.5) as batches:
        seen = [mask for mask in masks_of(batches, 60) if mask is not None]
    whole = sum(bool((mask == 1).all()) for mask in seen)
    assert 0.2 < whole / len(seen) < 0.8


def test_an_edited_mask_is_another_training_and_is_made_again_alone(folders):
    dataset = folders.dataset()
    before = data_identity(folders.latents(dataset), folders.texts(dataset))
    assert folders.encoded == 3
    entries = len(folders.store.open())
    assert entries == 3 + 2
    assert data_identity(folders.latents(folders.dataset()), folders.texts(dataset)) == before
    save(folders.place / "masks" / "0.png", np.full((64, 128, 3), 90))
    edited = folders.dataset()
    assert data_identity(folders.latents(edited), folders.texts(edited)) != before
    assert folders.encoded == 3
    assert len(folders.store.open()) == entries + 1
    (folders.place / "masks" / "0.png").unlink()
    (folders.place / "masks" / "1.webp").unlink()
    with pytest.raises(DataError):
        folders.dataset()


def test_masks_that_cannot_be_used(folders):
    save(folders.place / "masks" / "0.png", np.zeros((64, 64, 3)))
    assert any("another shape" in sentence for sentence in folders.latents(folders.dataset()).skipped)
    with pytest.raises(SettingError, match="takes its masks from 'other'"):
        folders.latents(folders.dataset(masks="other"))
    with pytest.raises(SettingError, match="switch vae_cache_disable"):
        folders.latents(folders.dataset(cache=CacheSettings(vae_cache_disable=True)))
    alone = folders.dataset()
    with pytest.raises(SettingError, match="no dataset of masks"):
        folders.latents(replace(alone, parts=alone.parts[:1]))
