"""SIGKILL at any moment of scanning and caching: what was committed stays, and the next start goes on from there."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from nano.forks import Forks
from PIL import Image

from training.cache.latents import cache_latents
from training.cache.store import Store
from training.config.dataset import CacheSettings, CaptionSettings, DatasetSettings, GeometrySettings, SourceSettings
from training.data.dataset import load_dataset

PICTURES, WRITE_BATCH, BATCH, KILLS = 400, 8, 2, 20


def settings(folder):
    return DatasetSettings(
        "kill",
        SourceSettings(instance_data_dir=str(folder)),
        GeometrySettings(64),
        CaptionSettings("textfile"),
        cache=CacheSettings(write_batch_size=WRITE_BATCH),
    )


def encode(pictures):
    """A latent that tells its picture's number."""
    return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()


def number_of(latent):
    red, green, _ = (latent[:, 0, 0] * 255).round().int().tolist()
    return red * 256 + green


def work(base, pause=0.0, log=None):
    """Scan and cache; with a log each picture's number is written down before it is encoded."""

    def slow(pictures):
        time.sleep(pause)
        latents = encode(pictures)
        if log:
            with log.open("a") as file:
                file.write("".join(f"{number_of(latent)}\n" for latent in latents))
        return latents

    place = base / "place"
    dataset = load_dataset(settings(base.parent / "pictures"), place)
    return cache_latents(dataset, slow, "vae", Store(str(base / "latents")), BATCH)


def work_and_log(base, log, started):
    """In a process of its own."""
    Path(started).touch()
    work(Path(base), 0.02, Path(log))


def work_slowly(base):
    work(Path(base), 0.01)


@pytest.fixture(scope="module")
def forks():
    here = Path(__file__)
    with Forks(here.stem, here.parent) as one, Forks(here.stem, here.parent) as other:
        yield one, other


def committed(base):
    catalog = Store(str(base / "latents")).open()
    return {number_of(catalog.read(key.decode())) for key in catalog.keys()}  # noqa: SIM118


def test_twenty_kills_lose_at_most_one_write_batch_each_and_change_nothing(tmp_path, forks):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        pixels = np.full((64, 64, 3), (number // 256, number % 256, 7), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(f"number {number}")
    whole = work(tmp_path / "whole")

    base, log, started = tmp_path / "killed", tmp_path / "log", tmp_path / "started"
    log.touch()
    chance = random.Random(0)
    there: set[int] = set()
    interrupted = 0
    for kill in range(KILLS):
        started.unlink(missing_ok=True)
        before = len(log.read_text().split())
        forks[0].call("work_and_log", str(base), str(log), str(started))
        more = chance.randrange(30) if kill % 4 else 0  # else while it scans
        deadline = time.monotonic() + 120
        while not started.exists() or len(log.read_text().split()) < before + more:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05 if more else 0.3))
        with suppress(ProcessLookupError):  # it was done before
            os.kill(forks[0].pid, signal.SIGKILL)
        interrupted += forks[0].code() == -signal.SIGKILL
        encoded = [int(number) for number in log.read_text().split()[before:]]
        assert not there & set(encoded), "a committed entry was encoded again"
        now = committed(base)
        assert there <= now, "a committed entry was lost"
        assert len(set(encoded) - now) <= WRITE_BATCH
        there = now
    assert interrupted >= KILLS // 2  # or the pictures were done before the kills were
    assert len(there) > 0

    again = work(base)
    assert (again.rows().key == whole.rows().key).all()
    assert again.rows().id.tolist() == whole.rows().id.tolist()
    one, other = Store(str(tmp_path / "whole" / "latents")).open(), Store(str(base / "latents")).open()
    assert other.keys().tolist() == one.keys().tolist()
    assert not other.damaged
    assert not list((base / "latents").glob("*.tmp"))[KILLS:]
    for key in one.keys():  # noqa: SIM118
        assert torch.allclose(one.read(key.decode()), other.read(key.decode()), atol=1e-5)


def test_two_processes_fill_one_cache_at_the_same_time(tmp_path, forks):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(120):
        Image.fromarray(np.full((64, 64, 3), (0, number, 7), np.uint8)).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text("one")
    base = tmp_path / "both"
    for one in forks:
        one.call("work_slowly", str(base))
    assert [one.code() for one in forks] == [0, 0]
    assert committed(base) == set(range(120))
    assert work(base).count == 120
