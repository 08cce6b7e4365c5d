"""SIGKILL at any moment of scanning and caching: what was committed stays, and the next start goes on from there."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.cache.latents import cache_latents
from training.cache.store import Store
from training.config.dataset import CacheSettings, CaptionSettings, DatasetSettings, GeometrySettings, SourceSettings
from training.data.dataset import load_dataset

ROOT = Path(__file__).resolve().parents[2]
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


def committed(base):
    catalog = Store(str(base / "latents")).open()
    return {number_of(catalog.read(key.decode())) for key in catalog.keys()}  # noqa: SIM118


def test_twenty_kills_lose_at_most_one_write_batch_each_and_change_nothing(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        pixels = np.full((64, 64, 3), (number // 256, number % 256, 7), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(f"number {number}")
    whole = work(tmp_path / "whole")

    base, log, started = tmp_path / "killed", tmp_path / "log", tmp_path / "started"
    log.touch()
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from test_kill import work\n"
        f"Path({str(started)!r}).touch(); work(Path({str(base)!r}), 0.04, Path({str(log)!r}))"
    )
    chance = random.Random(0)
    there: set[int] = set()
    interrupted = 0
    for _ in range(KILLS):
        started.unlink(missing_ok=True)
        before = len(log.read_text().split())
        child = subprocess.Popen([sys.executable, "-c", program])
        while not started.exists():
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2.5))
        child.send_signal(signal.SIGKILL)
        interrupted += child.wait() == -signal.SIGKILL
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


def test_two_processes_fill_one_cache_at_the_same_time(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(120):
        Image.fromarray(np.full((64, 64, 3), (0, number, 7), np.uint8)).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text("one")
    base = tmp_path / "both"
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        f"from pathlib import Path; from test_kill import work; work(Path({str(base)!r}), 0.01)"
    )
    children = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert committed(base) == set(range(120))
    assert work(base).count == 120
