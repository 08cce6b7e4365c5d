"""The help pages that ComfyUI shows beside a node: complete, with a picture and an example that is set as it says."""

import json
import re
import urllib.request
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from test_server import NODES

from scripts.help_pictures import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
EXAMPLE = {"en": "## Example", "zh": "## 示例"}
HIDDEN = {"continue_token", "attempt"}
MOST_BYTES = 1_500_000  # of all pictures


def inputs(node: dict) -> dict:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


@pytest.mark.parametrize("language", EXAMPLE)
def test_every_page_has_a_picture_an_example_and_every_input(server, language):
    known = server.ask("/object_info")
    assert set(EXAMPLES) == set(NODES)
    for name in NODES:
        page = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)  # the page takes them from docs/
        assert pictures, name
        assert f"{name}/{language}.webp" in pictures, name
        for picture in pictures:
            with urllib.request.urlopen(f"{server.url}/extensions/lumina2-trainer/docs/{picture}") as answer:
                Image.open(BytesIO(answer.read())).verify()
        named = set(re.findall(r"\*\*(\w+)", page, re.ASCII))
        assert set(inputs(known[name])) - HIDDEN - named == set(), f"{name}: {language}"
        _, head, example = page.partition(f"\n{EXAMPLE[language]}\n")
        assert head, f"{name} has no example"
        assert len(example.strip()) > 40, name


def test_pages_call_nodes_and_inputs_as_the_page_does():
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, title in NODES.items():
        pages = {language: (DOCS / name / f"{language}.md").read_text(encoding="utf-8") for language in EXAMPLE}
        assert pages["en"].startswith(f"# {title}\n"), name
        assert pages["zh"].startswith(f"# {chinese[name]['display_name']}\n"), name
        for key, said in re.findall(r"\*\*(\w+)（([^）]+)）\*\*", pages["zh"], re.ASCII):
            if key in chinese[name]["inputs"] and said != "可选":
                assert said.split("，")[0] == chinese[name]["inputs"][key]["name"], name


def test_the_pictures_are_small():
    sizes = [path.stat().st_size for path in DOCS.rglob("*") if path.suffix != ".md"]
    assert sum(sizes) <= MOST_BYTES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_its_picture_shows(server, name):
    """Every value that the picture's node is set to is one that the node takes, and stands in both pages' examples."""
    known = inputs(server.ask(f"/object_info/{name}")[name])
    for widget, value in EXAMPLES[name].items():
        kind, *options = known[widget]
        choices = kind if isinstance(kind, list) else options[0].get("options")
        assert not choices or value in choices, widget
        if kind in ("INT", "FLOAT"):
            assert options[0]["min"] <= value <= options[0]["max"], widget
        for language, head in EXAMPLE.items():
            example = " ".join((DOCS / name / f"{language}.md").read_text(encoding="utf-8").split(head)[1].split())
            if isinstance(value, bool):
                assert f"**{widget}**" in example, (widget, language)
                continue
            lines = value.split("\n") if isinstance(value, str) else [format(Decimal(str(value)), "f")]
            assert [line for line in lines if f"`{line}`" not in example] == [], (widget, language)
