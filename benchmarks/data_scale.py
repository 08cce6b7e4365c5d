"""Datasets and caches against what they cannot be faster than.

    python -m benchmarks.data_scale [--images 100000] [--rows 1000000] [--json]

Scans small generated JPEGs with captions, first and again; draws batches; and fills a latent cache from 600×800 JPEGs
of quality 90 at 512 px and at 64 px, beside the bare forwards of the nano model's VAE on the same pictures (fp32,
batches of four). The pictures are made once and kept in ``--folder``; making them is not timed. ``--rows`` says how
many rows the index and the sampler alone are held with, to see their memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CACHED = {512: 48, 64: 1200}  # pictures that a cache is filled with, by resolution
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "lumina2-trainer" / "data_scale")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        small = _small_pictures(options.folder / f"small-{options.images}", options.images)
        large = _large_pictures(options.folder / f"large-{max(CACHED.values())}", max(CACHED.values()))
        result: dict[str, float] = {"images": options.images}
        result |= _in_a_process_of_its_own(_scanning, small)
        result |= _in_a_process_of_its_own(_many_rows, options.rows)
        result |= _in_a_process_of_its_own(_caching, large)
    print(json.dumps(result) if options.json else "\n".join(f"{name:28} {value}" for name, value in result.items()))


def _in_a_process_of_its_own(measure, argument) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """So that memory grows from the same beginning."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(measure, (argument,))
    print(result, file=sys.stderr, flush=True)
    return result


def _scanning(folder: Path) -> dict[str, float]:
    from training.config.dataset import DatasetSettings, GeometrySettings, SourceSettings
    from training.data.dataset import load_dataset, open_rows
    from training.data.sampler import Pool, Sampler

    import_all()
    settings = DatasetSettings("small", SourceSettings(instance_data_dir=str(folder)), GeometrySettings(64))
    before = _rss_mb()
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        dataset = load_dataset(settings, Path(place))
        first = time.perf_counter() - began
        began = time.perf_counter()
        dataset = load_dataset(settings, Path(place))
        rows = open_rows(dataset.parts[0])
        warm = time.perf_counter() - began
    sizes = np.stack([rows.plan.width_px, rows.plan.height_px], axis=1)
    buckets = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
    sampler = Sampler([Pool(buckets, rows.repeats)], 4, 42)
    began = time.perf_counter()
    for number in range(20_000):
        sampler.batch(number)
    batches = 20_000 / (time.perf_counter() - began)
    return {
        "scan_per_s": round(len(rows) / first),
        "warm_start_s": round(warm, 2),
        "sampler_batches_per_s": round(batches),
        "rss_growth_mb": round(_peak_mb() - before),
    }


def _many_rows(count: int) -> dict[str, float]:
    import pyarrow

    from training.data.index import Index, _schema, write_index

    random = np.random.default_rng(0)
    said = [" ".join(f"word{n}" for n in random.integers(0, 900, 20)) for _ in range(1000)]
    table = pyarrow.table(
        {
            "id": [f"folder{n // 1000:05d}/picture{n:08d}.jpg" for n in range(count)],
            "stamp": np.arange(count),
            "caption_stamp": np.arange(count),
            "width_px": random.integers(400, 3000, count).astype(np.int32),
            "height_px": random.integers(400, 3000, count).astype(np.int32),
            "captions": [[said[n % 1000]] for n in range(count)],
            "repeats": np.full(count, -1, np.int32),
            "content": [f"{n:064x}" for n in range(count)],
            "problem": pyarrow.nulls(count, pyarrow.string()),
        },
        schema=_schema(),
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "index.parquet"
        write_index(file, Index(table), {})
        del table
        return {"rows": count, **_held_by_another_process(file)}


def _held_by_another_process(file: Path) -> dict[str, float]:
    import subprocess

    program = f"from benchmarks.data_scale import hold; hold({str(file)!r})"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def hold(file: str) -> None:
    """Index and sampler of a file; prints how much memory they took, and how long to seek step 400,000 took."""
    from training.config.dataset import DatasetSettings, GeometrySettings, SourceSettings
    from training.data.dataset import Part, open_rows
    from training.data.index import read_index
    from training.data.sampler import Pool, Sampler

    import_all()
    before = _rss_mb()
    known = read_index(Path(file))
    assert known
    settings = DatasetSettings("rows", SourceSettings(instance_data_dir="."), GeometrySettings(1024))
    part = Part(settings, file, "", known[0].digest())
    del known
    began = time.perf_counter()
    rows = open_rows(part)
    opened = time.perf_counter() - began
    sizes = np.stack([rows.plan.width_px, rows.plan.height_px], axis=1)
    buckets = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
    sampler = Sampler([Pool(buckets, rows.repeats)], 4, 42)
    began = time.perf_counter()
    sampler.batch(400_000)
    seek = time.perf_counter() - began
    print(json.dumps({"rows_rss_mb": round(_peak_mb() - before), "rows_open_s": round(opened, 2),
                      "seek_400000_s": round(seek, 3)}))  # fmt: skip


def _caching(folder: Path) -> dict[str, float]:
    import torch
    from diffusers import AutoencoderKL

    from training.cache.latents import cache_latents
    from training.cache.store import Store
    from training.config.dataset import DatasetSettings, GeometrySettings, MixSettings, SourceSettings
    from training.data.dataset import load_dataset, open_rows
    from training.data.pictures import load_picture

    vae = AutoencoderKL.from_pretrained(ROOT / "assets" / "nano" / "vae", torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mean

    result: dict[str, float] = {}
    for resolution, count in CACHED.items():
        settings = DatasetSettings(
            "large",
            SourceSettings(instance_data_dir=str(folder)),
            GeometrySettings(resolution, crop_aspect="square"),
            mix=MixSettings(max_num_samples=count),
        )
        with tempfile.TemporaryDirectory() as place:
            dataset = load_dataset(settings, Path(place))
            rows = open_rows(dataset.parts[0])
            pictures = [load_picture(folder / rows.ids[n].as_py(), rows.plan.geometry(n)) for n in range(count)]
            batches = [torch.from_numpy(np.stack(pictures[n : n + 4])).float() / 255 for n in range(0, count, 4)]
            encode(batches[0])
            bare, cached = [], []
            for turn in range(REPEATS):
                began = time.perf_counter()
                for batch in batches:
                    encode(batch)
                bare.append(time.perf_counter() - began)
                shutil.rmtree(Path(place) / "index")
                dataset = load_dataset(settings, Path(place))
                store = Store(f"{place}/latents-{turn}")
                began = time.perf_counter()
                cache_latents(dataset, encode, "vae", store, 4, shares_cores=True)
                cached.append(time.perf_counter() - began)
        name = "cache_ratio" if resolution == 512 else f"cache_ratio_{resolution}"
        result |= {name: round(min(cached) / min(bare), 3), f"vae_s_{resolution}": round(min(bare), 2)}
    return result | _second_run(folder)


def _second_run(folder: Path) -> dict[str, float]:
    """A second filling of 10,000 entries: nothing is encoded."""
    import torch

    from training.cache.latents import cache_latents
    from training.cache.store import Store
    from training.config.dataset import DatasetSettings, GeometrySettings, SourceSettings
    from training.data.dataset import load_dataset

    with tempfile.TemporaryDirectory() as place:
        tiny = Path(place) / "tiny"
        _small_pictures(tiny, 10_000)
        settings = DatasetSettings("tiny", SourceSettings(instance_data_dir=str(tiny)), GeometrySettings(64))
        store = Store(f"{place}/latents")
        encoded = 0

        def encode(pictures: torch.Tensor) -> torch.Tensor:
            nonlocal encoded
            encoded += len(pictures)
            return pictures.movedim(-1, 1)[:, :, ::8, ::8].contiguous()

        cache_latents(load_dataset(settings, Path(place)), encode, "vae", store, 16)
        first, encoded = encoded, 0
        began = time.perf_counter()
        cache_latents(load_dataset(settings, Path(place)), encode, "vae", store, 16)
        seconds = time.perf_counter() - began
        if encoded or first != 10_000:
            raise RuntimeError(f"{first} entries were encoded at first and {encoded} again")
    return {"second_run_10000_s": round(seconds, 2)}


def import_all() -> None:
    """What is imported anyway, so that it is not taken for the growth."""
    import PIL.Image

    PIL.Image.init()


def _small_pictures(folder: Path, count: int) -> Path:
    """JPEGs of about 64 px with a caption each, a thousand a folder; links would be quicker but are no files."""
    for number in _missing(folder, count):
        from PIL import Image

        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        width, height = 48 + number % 7 * 16, 48 + number % 5 * 16
        shade = (number * 37 % 256, number * 101 % 256, number * 53 % 256)
        Image.new("RGB", (width, height), shade).save(place / f"{number:07d}.jpg", quality=75, comment=str(number))
        (place / f"{number:07d}.txt").write_text(f"a plain picture, number {number}", encoding="utf-8")
    return folder


def _large_pictures(folder: Path, count: int) -> Path:
    """JPEGs of 600×800, quality 90: soft shapes with some grain, as photographs have."""
    for number in _missing(folder, count):
        from PIL import Image

        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (20, 15, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((600, 800), Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 6, soft.shape)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)
        (folder / f"{number:05d}.txt").write_text("soft shapes", encoding="utf-8")
    return folder


def _missing(folder: Path, count: int) -> Iterator[int]:
    done = folder / ".complete"
    if not done.exists():
        yield from range(count)
        folder.mkdir(parents=True, exist_ok=True)
        done.touch()


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
