"""Caches: everything is encoded once, and nothing stale is ever read."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from training.cache import latents as latents_module
from training.cache.garbage import collect_garbage
from training.cache.latents import cache_latents
from training.cache.store import Store
from training.cache.texts import cache_texts
from training.config.dataset import (
    CacheSettings,
    CaptionSettings,
    CaptionShuffle,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
)
from training.config.objective import ObjectiveSettings
from training.config.settings import TrainSettings
from training.data.dataset import append, decode_row, load_dataset
from training.errors import CacheError, DataError, SettingError
from training.run.batches import Batches
from training.run.identity import data_identity


class Encoder:
    """Stands where the VAE or the text encoder stands, and remembers what it was asked."""

    def __init__(self):
        self.pictures, self.texts, self.batches = [], [], []

    def encode(self, pictures):
        self.pictures += list(pictures)
        self.batches.append(len(pictures))
        return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()

    def embed(self, text):
        self.texts.append(text)
        return torch.full((len(text) + 1, 4), 0.5), len(text) > 20


SIZES = [(64, 64), (64, 64), (256, 64), (64, 64)]


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, size in enumerate(SIZES):
        paint(pictures / f"{number}.png", size, number)
        (pictures / f"{number}.txt").write_text(f"picture {number}\nthe same")
    return pictures


def paint(path, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Cache:
    """The cache nodes' work on one folder, and what was encoded in it."""

    def __init__(self, folder, tmp_path):
        self.folder, self.place, self.encoder = folder, tmp_path / "place", Encoder()
        self.latent_store, self.text_store = Store(str(tmp_path / "latents")), Store(str(tmp_path / "text"))
        self.settings = DatasetSettings(
            "pictures", SourceSettings(instance_data_dir=str(folder)), GeometrySettings(64), CaptionSettings()
        )

    def dataset(self, **groups):
        return load_dataset(replace(self.settings, **groups), self.place)

    def latents(self, dataset=None, vae="vae", batch_size=2, **groups):
        self.encoder.pictures.clear()
        self.encoder.batches.clear()
        dataset = dataset or self.dataset(**groups)
        return cache_latents(dataset, self.encoder.encode, vae, self.latent_store, batch_size)

    def texts(self, dataset=None, encoder="gemma", system="", tokens=256, others=(), **groups):
        self.encoder.texts.clear()
        dataset = dataset or self.dataset(**groups)
        return cache_texts(dataset, self.encoder.embed, encoder, system, tokens, self.text_store, others=others)


@pytest.fixture
def cache(folder, tmp_path):
    return Cache(folder, tmp_path)


def test_pictures_are_encoded_once_until_something_changes(cache, folder):
    first = cache.latents()
    assert len(cache.encoder.pictures) == 4
    assert sorted(cache.encoder.batches) == [1, 1, 2]
    rows = first.rows()
    assert rows.id.tolist() == ["0.png", "1.png", "2.png", "3.png"]
    assert rows.shape.tolist() == [[3, 8, 8], [3, 8, 8], [3, 8, 16], [3, 8, 8]]
    expected = torch.from_numpy(np.array(Image.open(folder / "3.png"))).float() / 255
    entry = cache.latent_store.open().read(rows.key[3].decode())
    assert torch.equal(entry, expected.movedim(-1, 0)[:, ::8, ::8])

    assert cache.latents() == first
    assert cache.encoder.pictures == []
    cache.latents(vae="another")
    assert len(cache.encoder.pictures) == 4
    cache.latents(geometry=GeometrySettings(64, crop_aspect="square"))
    assert len(cache.encoder.pictures) == 1  # only the wide one is cut otherwise
    paint(folder / "1.png", (64, 64), 9)
    changed = cache.latents()
    assert len(cache.encoder.pictures) == 1
    assert (changed.rows().key != rows.key).tolist() == [False, True, False, False]
    Image.open(folder / "1.png").save(folder / "4.png")
    (folder / "4.txt").write_text("a copy")
    cache.latents()
    assert cache.encoder.pictures == []  # the same bytes under another name


def test_an_unchanged_dataset_is_not_opened_again(cache, monkeypatch):
    first = cache.latents()

    def refuse(*_):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(latents_module, "open_source", refuse)
    assert cache.latents() == first


def test_a_cache_that_is_gone_is_filled_again_without_a_scan(cache):
    first = cache.latents()
    for shard in cache.latent_store.open().folder.glob("*.safetensors"):
        shard.unlink()
    assert cache.latents() == first
    assert len(cache.encoder.pictures) == 4


def test_damaged_entries_are_made_again(cache):
    rows = cache.latents().rows()
    key = rows.key[1].decode()
    catalog = cache.latent_store.open()
    entry = catalog._entries[catalog.find([key])[0]]
    shard = catalog.folder / catalog._files[entry["file"]]
    data = bytearray(shard.read_bytes())
    data[int(entry["end"]) - 1] ^= 255
    shard.write_bytes(data)
    with pytest.raises(CacheError, match=key):
        catalog.read(key)
    again = cache.latents()
    assert len(cache.encoder.pictures) == 1
    assert (again.rows().key == rows.key).all()


def test_a_picture_that_cannot_be_decoded_is_skipped_or_stops(cache, folder):
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    latents = cache.latents()
    assert latents.rows().id.tolist() == ["0.png", "1.png", "3.png"]
    assert len(latents.skipped) == 1
    assert "2.png" in latents.skipped[0]
    with pytest.raises(DataError, match=r"2\.png"):
        cache.latents(cache=CacheSettings(on_bad_image="stop"))
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CacheError, match="Not one picture could be encoded"):
        cache.latents()


def test_what_ends_the_work_loses_no_batch_that_was_encoded(cache):
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_latents(cache.dataset(), cache.encoder.encode, "vae", cache.latent_store, 1, interrupt)
    assert len(cache.latent_store.open()) == len(cache.encoder.pictures) > 0
    encoded = len(cache.encoder.pictures)
    assert cache.latents().count == 4
    assert len(cache.encoder.pictures) == 4 - encoded


def test_flips_are_encoded_beside(cache):
    latents = cache.latents(geometry=GeometrySettings(64, horizontal_flip=True))
    assert len(cache.encoder.pictures) == 8
    rows, catalog = latents.rows(), cache.latent_store.open()
    assert (rows.key != rows.flipped).all()
    straight, turned = catalog.read(rows.key[0].decode()), catalog.read(rows.flipped[0].decode())
    assert not torch.equal(straight, turned)
    with Batches(latents, cache.texts(), TrainSettings(), lambda z: z) as batches:
        drawn = [batches.make(step).latents[0] for step in range(60)]
    seen = torch.stack([latents for latents in drawn if latents.shape == straight.shape])
    share = torch.stack([(seen == turned).all((1, 2, 3)), (seen == straight).all((1, 2, 3))]).sum(1)
    assert share.min() >= 3  # both are drawn


def test_a_dataset_with_a_folder_of_its_own_keeps_its_latents_there(cache, tmp_path):
    latents = cache.latents(cache=CacheSettings(cache_dir_vae=str(tmp_path / "own")))
    assert len(Store(str(tmp_path / "own")).open()) == 4
    assert len(cache.latent_store.open()) == 0
    with Batches(latents, cache.texts(), TrainSettings(), lambda z: z) as batches:
        assert batches.take(0).latents.shape[1] == 3


@pytest.mark.parametrize("switch", ["vae_cache_disable", "vae_cache_clear_each_epoch"])
def test_pictures_can_be_encoded_while_training(cache, switch):
    geometry = GeometrySettings(32, crop_aspect="square", crop_style="random", aspect_bucket_alignment=32)
    online = {"geometry": geometry, "cache": CacheSettings(**{switch: True})}
    dataset = cache.dataset(**online)
    latents = cache_latents(dataset, cache.encoder.encode, "vae", cache.latent_store, 2, channels=3)
    assert cache.encoder.pictures == []
    assert len(cache.latent_store.open()) == 0
    texts = cache.texts(dataset)
    with pytest.raises(SettingError, match="Wire a VAE"):
        Batches(latents, texts, TrainSettings(), lambda z: z)
    with Batches(latents, texts, TrainSettings(batch_size=4), lambda z: z, cache.encoder.encode) as batches:
        epochs = [batches.make(epoch).latents for epoch in range(3)]
        assert torch.equal(batches.make(1).latents, epochs[1])  # whatever came between
    assert len(cache.latent_store.open()) == 0
    flat = [set(map(tuple, latents.flatten(1).tolist())) for latents in epochs]
    anew = switch == "vae_cache_clear_each_epoch"
    assert (flat[0] != flat[1]) == anew
    cached = cache.latents(geometry=geometry)
    if not anew:
        with Batches(cached, texts, TrainSettings(batch_size=4), lambda z: z) as batches:
            assert set(map(tuple, batches.make(0).latents.flatten(1).tolist())) == flat[0]


def test_captions_are_embedded_once_and_a_change_reembeds_what_it_concerns(cache, folder):
    first = cache.texts()
    assert sorted(cache.encoder.texts) == ["", "picture 0", "picture 1", "picture 2", "picture 3", "the same"]
    assert cache.texts() == first
    assert cache.encoder.texts == []
    (folder / "2.txt").write_text("picture two\nthe same")
    changed = cache.texts()
    assert cache.encoder.texts == ["picture two"]
    before, after = first.rows(), changed.rows()
    assert [before.variants(n) == after.variants(n) for n in range(4)] == [True, True, False, True]
    cache.texts(system="You draw.")
    assert "You draw. <Prompt Start> the same" in cache.encoder.texts
    assert len(cache.encoder.texts) == 5
    cache.texts(tokens=100)
    assert len(cache.encoder.texts) == 6
    cache.texts(encoder="another")
    assert len(cache.encoder.texts) == 6


def test_edited_captions_are_what_is_embedded(cache):
    shuffle = CaptionShuffle(enable=True, count=2, seed=1, split_on="space", include_original=True)
    texts = cache.texts(captions=CaptionSettings(trigger_word="zorblax", caption_shuffle=shuffle))
    assert all("zorblax" in text for text in cache.encoder.texts if text)
    assert len(texts.rows().variants(0)) > 2


def test_regularisations_teacher_reads_the_class_in_place_of_the_trigger(cache):
    def made(**captions):
        captions = CaptionSettings(trigger_word="sks", **captions)
        dataset = cache.dataset(captions=captions, mix=MixSettings(is_regularisation_data=True))
        return cache.latents(dataset), cache.texts(dataset)

    caches = made(trigger_class="a dog")
    assert {text.partition(",")[0] for text in cache.encoder.texts if text} == {"sks", "a dog"}
    settings = TrainSettings(batch_size=2, objective=ObjectiveSettings(caption_dropout_probability=0))
    for number in range(2):
        with Batches(*caches, settings, lambda z: z) as batches:
            batch = batches.make(number)
        assert [own + 2 for own in batch.lengths] == list(batch.taught.lengths)  # a token a letter
    assert data_identity(*caches) != data_identity(*made())
    with Batches(*made(), settings, lambda z: z) as batches:
        assert batches.make(0).taught is None
    dropped = replace(settings, objective=ObjectiveSettings(caption_dropout_probability=1))
    with Batches(*caches, dropped, lambda z: z) as batches:
        batch = batches.make(0)
        assert batch.taught.lengths == batch.lengths


def test_a_sliders_prompts_are_encoded_once_and_go_with_each_batch(cache):
    latents, texts = cache.latents(), cache.texts(others=("happy!", "sad"), system="You draw.")
    assert "You draw. <Prompt Start> sad" in cache.encoder.texts
    cache.texts(others=("sad", ""), system="You draw.")
    assert cache.encoder.texts == []
    settings = TrainSettings(batch_size=2, objective=ObjectiveSettings(slider_positive="happy!", slider_negative="sad"))
    with Batches(latents, texts, settings, lambda z: z) as batches:
        first, second = batches.make(0), batches.make(1)
    (positive, negative), read = first.slider, texts.store.open().read
    assert torch.equal(positive.captions, torch.stack([read(texts.others["happy!"])] * 2))
    assert positive.lengths == (positive.captions.shape[1],) * 2
    assert negative.lengths[0] == positive.lengths[0] - 3
    assert (first.strength, second.strength) == (1, -1)
    with pytest.raises(SettingError, match=r"The slider's prompt 'sad' was not encoded\. Wire the Slider Settings"):
        Batches(latents, cache.texts(others=("happy!",)), settings, lambda z: z)


def test_captions_that_were_cut_are_named_again_each_time(cache, folder):
    (folder / "0.txt").write_text("a caption of more than twenty letters")
    assert cache.texts().cut == ("a caption of more than twenty letters",)
    assert cache.texts().cut == ("a caption of more than twenty letters",)


def test_embeddings_are_kept_in_bf16_without_padding(cache):
    texts = cache.texts()
    entry = cache.text_store.open().read(texts.rows().variants(0)[0])
    assert entry.dtype == torch.bfloat16
    assert entry.shape == (10, 4)


def test_several_datasets_are_joined_by_their_part(cache, folder):
    both = append(cache.dataset(), cache.dataset(captions=CaptionSettings("filename"), mix=MixSettings("eval")))
    latents, texts = cache.latents(both), cache.texts(both)
    assert latents.count == texts.count == 8
    with Batches(
        latents, texts, TrainSettings(objective=ObjectiveSettings(caption_dropout_probability=0)), lambda z: z
    ) as batches:
        lengths = {batches.make(step).lengths[0] for step in range(40)}
    assert lengths == {9, 10}  # "the same" and "picture 0"; never "0", which is held out


def test_garbage_is_what_no_dataset_refers_to(cache, folder, tmp_path):
    def collect(grace_hours=-1.0, **options):
        return collect_garbage(tmp_path / "latents", grace_hours, **options)

    stale = cache.latents().rows().key[1].decode()
    assert (collect().entries, collect().removed) == (4, 0)
    square = GeometrySettings(64, crop_aspect="square")
    cache.latents(geometry=square)
    assert (collect().entries, collect().removed) == (5, 0)  # another crop of the same folder refers to its own
    paint(folder / "1.png", (64, 64), 9)
    second = cache.latents()
    cache.latents(geometry=square)
    assert collect(grace_hours=24).removed == 0
    assert (collect(dry_run=True).removed, collect(dry_run=True).bytes_freed) == (1, 0)
    freed = collect()
    assert freed.removed == 1
    assert freed.bytes_freed > 0
    catalog = cache.latent_store.open()
    assert stale not in catalog
    assert all(key.decode() in catalog for key in second.rows().key)
    cache.latents()
    assert cache.encoder.pictures == []
    texts = cache.texts()
    assert collect_garbage(tmp_path / "text", -1.0).removed == 0
    assert texts.empty in cache.text_store.open()
    for index in (cache.place / "index").glob("*.parquet"):
        index.unlink()
    assert collect().removed == 5
    with pytest.raises(CacheError, match="is no cache"):
        collect_garbage(folder)


@pytest.mark.parametrize("shares_cores", [False, True])
def test_an_encoder_on_the_same_cores_works_while_no_picture_is_decoded(cache, monkeypatch, shares_cores):
    decoding, beside, lock = set(), [], threading.Lock()

    def decode_slowly(*arguments):
        with lock:
            decoding.add(arguments[2])
        time.sleep(0.01)
        pixels = decode_row(*arguments)
        with lock:
            decoding.remove(arguments[2])
        return pixels

    def encode(pictures):
        time.sleep(0.005)
        beside.append(len(decoding))
        return cache.encoder.encode(pictures)

    monkeypatch.setattr(latents_module, "decode_row", decode_slowly)
    monkeypatch.setattr(latents_module, "BURST", 2)
    for number in range(4, 30):
        paint(cache.folder / f"{number}.png", (64, 64), number)
        (cache.folder / f"{number}.txt").write_text(f"picture {number}")
    plain = cache_latents(cache.dataset(), encode, "vae", cache.latent_store, 2, shares_cores=shares_cores)
    assert plain.count == 30
    assert (max(beside) == 0) is shares_cores
