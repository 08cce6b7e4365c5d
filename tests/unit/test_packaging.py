"""What the registry and ComfyUI-Manager hand out: its metadata, its pictures, its files, what it brings along."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageChops, ImageStat

from scripts import registry_pictures
from training.command.pipeline import NANO, VAE, find_model
from training.config.simpletuner.imported import Places
from training.errors import ModelError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
RAW = "https://raw.githubusercontent.com/lumina2-trainer/lumina2-trainer/main/"
MOST_BYTES = 40_000_000
FOR_DEVELOPERS = {".ci", "benchmarks", "constraints", "scripts", "tests"}
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")

# Packages that come with ComfyUI 0.3.75: the oldest that its requirements allow (for those that it gives no bound, from
# 2024), and what pip chose when it came out. All need nothing but each other.
COMFYUI = {
    "certifi": ("2024.2.2", "2025.11.12"),
    "einops": ("0.7.0", "0.8.1"),
    "filelock": ("3.13.1", "3.20.0"),
    "fsspec": ("2024.2.0", "2025.10.0"),
    "huggingface-hub": ("0.26.0", "0.36.0"),
    "numpy": ("1.25.0", "2.3.5"),
    "packaging": ("23.2", "25.0"),
    "pillow": ("10.2.0", "12.0.0"),
    "psutil": ("5.9.8", "7.1.3"),
    "pydantic": ("2.7.0", "2.12.5"),
    "pyyaml": ("6.0.1", "6.0.3"),
    "regex": ("2023.12.25", "2025.11.3"),
    "requests": ("2.31.0", "2.32.5"),
    "safetensors": ("0.4.5", "0.7.0"),
    "scipy": ("1.12.0", "1.16.3"),
    "sentencepiece": ("0.2.0", "0.2.1"),
    "tokenizers": ("0.21.0", "0.22.1"),
    "torch": ("2.4.0", "2.9.1"),
    "torchvision": ("0.19.0", "0.24.1"),
    "tqdm": ("4.66.1", "4.67.1"),
    "transformers": ("4.50.3", "4.57.3"),
    "typing-extensions": ("4.9.0", "4.15.0"),
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_registry_finds_what_it_needs():
    metadata, comfy = project()["project"], project()["tool"]["comfy"]
    assert metadata["name"] == "lumina2-trainer"
    assert metadata["requires-python"] == ">=3.10"
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])
    assert (ROOT / metadata["license"]["file"]).read_text().lstrip().startswith("Apache License")
    repository = metadata["urls"]["Repository"]
    assert repository == f"https://github.com/{comfy['PublisherId']}/{metadata['name']}"
    assert all(url.startswith(repository) for url in metadata["urls"].values())
    assert comfy["DisplayName"] == "Lumina2 Trainer"
    assert comfy["requires-comfyui"] == ">=0.3.75", "the oldest that the tests run"
    assert "web" not in comfy, "with WEB_DIRECTORY as well, the page would load every script twice"
    assert project()["tool"]["ruff"]["target-version"] == "py310", "or newer syntax would pass unseen"


@pytest.mark.parametrize(
    ("field", "draw", "width_px", "height_px"),
    [("Icon", registry_pictures.icon, 400, 400), ("Banner", registry_pictures.banner, 1260, 540)],
)
def test_the_registry_shows_our_own_drawings(field, draw, width_px, height_px):
    url = project()["tool"]["comfy"][field]
    assert url.startswith(RAW)
    with Image.open(ROOT / url.removeprefix(RAW)) as shown:
        assert shown.size == (width_px, height_px)
        apart = ImageChops.difference(shown.convert("RGB"), draw().convert("RGB"))
    assert max(ImageStat.Stat(apart).mean) < 2, "draw it again: python -m scripts.registry_pictures"
    assert (ROOT / url.removeprefix(RAW)).stat().st_size < 100_000


def test_the_plugin_asks_for_lower_bounds_only_and_never_for_torch():
    needs = [Requirement(need) for need in project()["project"]["dependencies"]]
    for need in needs:
        assert need.name not in ("torch", "torchvision", "torchaudio"), "ComfyUI owns torch"
        assert [specifier.operator for specifier in need.specifier] == [">="], need
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == list(map(str, needs))


def demands(names: list[str]) -> Iterator[tuple[str, Requirement]]:
    """What the newest versions of packages ask of ComfyUI's, each with who asks; what is not ComfyUI's is followed."""
    known = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in known or name in COMFYUI:
            continue
        known.add(name)
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                yield name, need
                names.append(need.name)


@pytest.mark.parametrize("column", [0, 1], ids=["the oldest that it takes", "of its own day"])
def test_installing_leaves_comfyuis_packages_as_they_are(column):
    """ComfyUI-Manager installs line by line, pip's newest of each: an older transformers would be left with too new a
    huggingface_hub, and ComfyUI would not start."""
    ours = [Requirement(need) for need in project()["project"]["dependencies"]]
    asked = [("the plugin", need) for need in ours]
    asked += demands([need.name for need in ours])
    met = {name for _, need in asked if (name := canonicalize_name(need.name)) in COMFYUI}
    assert met >= {"torch", "numpy", "transformers", "safetensors", "huggingface-hub"}, "else this looks at nothing"
    refused = {
        f"{who} needs {need}"
        for who, need in asked
        if (name := canonicalize_name(need.name)) in COMFYUI and COMFYUI[name][column] not in need.specifier
    }
    assert refused == set()


def test_pip_would_install_nothing_over_comfyuis_packages(tmp_path):
    """pip itself, asked in the environment that holds ComfyUI with its needs."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet"]
    report = tmp_path / "report.json"
    command = [*pip, "--report", str(report), "-r", str(ROOT / "requirements.txt")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(report.read_text(encoding="utf-8"))["install"] == []


def test_the_command_line_says_what_it_needs_beside_comfyuis_packages(monkeypatch):
    nano = find_model(Places(pretrained_model_name_or_path=NANO), [])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install diffusers transformers==\d"):
        VAE(nano, torch.device("cpu"))


def test_comfy_cli_has_nothing_to_say_against_it(packed):
    _, _, said = packed
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_users_get_all_that_runs_and_nothing_that_only_developers_need(packed):
    unpacked, zipped, _ = packed
    assert zipped.stat().st_size <= MOST_BYTES
    here = {path.name for path in unpacked.iterdir()}
    assert here & FOR_DEVELOPERS == set()
    for folder in ("assets", "docs", "example_workflows", "locales", "nodes", "training", "web"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert files
        for path in files:
            assert (unpacked / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for name in ("__init__.py", "__main__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
        assert (unpacked / name).is_file()


def test_pages_show_their_pictures_where_they_are_installed(packed):
    unpacked, _, _ = packed
    for page in (unpacked / "README.md", *(unpacked / "docs").glob("*.md")):
        for picture in PICTURE.findall(page.read_text(encoding="utf-8")):
            assert picture.startswith("https://") or (page.parent / picture).is_file(), f"{page.name}: {picture}"
