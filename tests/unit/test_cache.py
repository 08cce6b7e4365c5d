"""Caches: everything is encoded once, and nothing stale is ever read."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.cache.latents import cache_latents
from training.cache.store import Store
from training.cache.texts import cache_texts
from training.data.dataset import load_dataset
from training.errors import CacheError


class Encoder:
    """Stands where the VAE or the text encoder stands, and remembers what it was asked."""

    def __init__(self):
        self.pictures, self.texts = [], []

    def encode(self, pictures):
        self.pictures += list(pictures)
        return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()

    def embed(self, text):
        self.texts.append(text)
        return torch.full((len(text) + 1, 4), 0.5), len(text) > 20


def ignore(done, total):
    pass


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (128, 64), (64, 64)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}\nthe same")
    return pictures


def test_pictures_are_encoded_once_until_something_changes(folder, tmp_path):
    store, encoder = Store(str(tmp_path / "cache")), Encoder()

    def cache(vae="vae", resolution=64):
        encoder.pictures.clear()
        return cache_latents(load_dataset(folder, resolution), encoder.encode, vae, store, 2, ignore)

    first = cache()
    assert len(encoder.pictures) == 4
    assert [entry.sample for entry in first.entries] == ["0.png", "1.png", "2.png", "3.png"]
    assert first.entries[0].shape == (3, 8, 8)
    expected = torch.from_numpy(np.array(Image.open(folder / "3.png"))).float() / 255
    assert torch.equal(store.read(first.entries[3].key), expected.movedim(-1, 0)[:, ::8, ::8])

    assert cache() == first
    assert encoder.pictures == []
    cache(vae="another")
    assert len(encoder.pictures) == 4
    cache(resolution=128)
    assert len(encoder.pictures) == 4

    Image.new("RGB", (64, 64)).save(folder / "1.png")
    changed = cache()
    assert len(encoder.pictures) == 1
    assert changed.entries[1].key != first.entries[1].key
    assert changed.entries[0] == first.entries[0]


def test_a_damaged_entry_is_encoded_again(folder, tmp_path):
    store, encoder = Store(str(tmp_path / "cache")), Encoder()
    entry = cache_latents(load_dataset(folder, 64), encoder.encode, "vae", store, 4, ignore).entries[0]
    whole = store.path(entry.key).read_bytes()
    store.path(entry.key).write_bytes(whole[:-10])
    with pytest.raises(CacheError, match="missing or damaged"):
        store.read(entry.key)
    encoder.pictures.clear()
    cache_latents(load_dataset(folder, 64), encoder.encode, "vae", store, 4, ignore)
    assert len(encoder.pictures) == 1
    assert store.path(entry.key).read_bytes() == whole


def test_a_picture_cut_short_is_skipped_and_the_rest_goes_on(folder, tmp_path):
    path = folder / "1.png"
    path.write_bytes(path.read_bytes()[:3000])
    latents = cache_latents(load_dataset(folder, 64), Encoder().encode, "vae", Store(str(tmp_path / "c")), 4, ignore)
    assert [entry.sample for entry in latents.entries] == ["0.png", "2.png", "3.png"]
    assert "1.png cannot be read" in latents.skipped[0]


def test_an_interrupted_encoding_keeps_what_it_has(folder, tmp_path):
    store, encoder = Store(str(tmp_path / "cache")), Encoder()

    def stop(done, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_latents(load_dataset(folder, 64), encoder.encode, "vae", store, 1, stop)
    assert len(encoder.pictures) == 2
    encoder.pictures.clear()
    assert len(cache_latents(load_dataset(folder, 64), encoder.encode, "vae", store, 1, ignore).entries) == 4
    assert len(encoder.pictures) == 2


def test_texts_are_embedded_once_behind_the_system_prompt(folder, tmp_path):
    store, encoder = Store(str(tmp_path / "cache")), Encoder()

    def cache(system="You draw.", tokens=256, model="gemma"):
        encoder.texts.clear()
        return cache_texts(load_dataset(folder, 64), encoder.embed, model, system, tokens, store, ignore)

    first = cache()
    assert sorted(encoder.texts) == [
        "",
        *(f"You draw. <Prompt Start> picture {n}" for n in range(4)),
        "You draw. <Prompt Start> the same",
    ]
    assert [len(entry.keys) for entry in first.entries] == [2] * 4
    assert len({entry.keys[1] for entry in first.entries}) == 1
    assert store.read(first.empty).shape == (1, 4)
    assert store.read(first.entries[0].keys[0]).dtype == torch.bfloat16
    assert len(first.cut) == 5  # all but the empty one
    assert set(cache().cut) == set(first.cut)  # said again, though nothing is encoded
    assert encoder.texts == []
    assert cache(system="").entries[0].keys != first.entries[0].keys
    assert len(encoder.texts) == 5  # the empty text is the same
    for other in ({"tokens": 9}, {"model": "another"}):
        cache(**other)
        assert len(encoder.texts) == 6
