"""What is written for people: links lead somewhere, both languages say the same, and what is quoted is really said."""

import argparse
import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from training.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ENGLISH = sorted(path for path in (ROOT / "docs").glob("*.md") if not path.name.endswith(".zh.md"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FAMILY = {"SettingError", "DataError", "ModelError", "CacheError", "RunError"}
ANY = "…"  # stands for a name or a number
CHINESE_HALF = "\n---\n"
LANGUAGE = re.compile(r"(?:[.-](?:en|zh))?(\.md|\.jpg)(?:#.*)?$")  # and the anchor, of a link


def chinese(path):
    return path.with_name(f"{path.stem}.zh.md")


def prose(text):
    """Without code blocks, whose # and | mean other things."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def headings(text):
    return [(len(hashes), title.strip()) for hashes, title in re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)]


def anchors(text):
    """As GitHub makes them of headings."""
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(text)]
    return {f"{name}-{plain[:n].count(name)}" if name in plain[:n] else name for n, name in enumerate(plain)}


def shape(text):
    """What two languages of one page have in common: headings, tables, blocks of code, and where it leads."""
    body = prose(text).partition("\n## ")[2]  # before it stand the links to the other language
    return {
        "headings": [level for level, _ in headings(text)],
        "rows": len(re.findall(r"^ *\|", prose(text), re.MULTILINE)),
        "commands": len(re.findall(r"^ *```", text, re.MULTILINE)),
        "links": sorted(LANGUAGE.sub(r"\1", link) for link in links(body) if link[0] != "#"),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_both_languages_say_the_same(page):
    assert shape(page.read_text(encoding="utf-8")) == shape(chinese(page).read_text(encoding="utf-8"))


def test_the_readme_says_the_same_twice_and_leads_to_every_page():
    first, second = README.read_text(encoding="utf-8").split(CHINESE_HALF)
    assert shape(first) == shape(second)
    assert {f"docs/{page.name}" for page in ENGLISH} <= set(links(first))
    assert {f"docs/{chinese(page).name}" for page in ENGLISH} <= set(links(second))


# Errors


def with_gaps(node):
    """A text of the code, with a gap where something is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ANY
    if isinstance(node, ast.JoinedStr):
        return "".join(map(with_gaps, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return with_gaps(node.left) + with_gaps(node.right)
    return ANY


def plain(text):
    return re.sub(rf"{ANY}[{ANY}\s]*{ANY}", ANY, re.sub(r"\s+", " ", text)).strip()


@functools.cache
def said():
    """All texts of the code, one a line, and those that are raised as errors."""
    texts, raised = [(ROOT / "web" / "js" / "words.mjs").read_text(encoding="utf-8")], set()
    for path in [*(ROOT / "training").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                texts.append(with_gaps(node))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = plain(with_gaps(node.exc.args[0]))
                if ast.unparse(node.exc.func) in FAMILY and len(re.findall(r"[A-Za-z]{2,}", text)) > 4:
                    raised.add(text)
    return "\n".join(map(plain, {*texts, *raised})), raised


def quoted(page):
    """The sentences in the first column of the tables below the first."""
    rows = re.findall(r"^\| (`+)(.+?)\1 \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [sentence for _, sentence in rows]


TROUBLES = ROOT / "docs" / "troubleshooting.md"


def test_troubleshooting_quotes_what_is_really_said():
    assert quoted(TROUBLES) == quoted(chinese(TROUBLES))
    assert [sentence for sentence in quoted(TROUBLES) if plain(sentence) not in said()[0]] == []


def test_troubleshooting_knows_every_error():
    """Where it does not: a row in docs/troubleshooting.md, and in docs/troubleshooting.zh.md."""
    known = [plain(sentence) for sentence in quoted(TROUBLES)]
    assert sorted(text for text in said()[1] if not any(sentence in text for sentence in known)) == []


# Commands


def commands(page):
    """The plugin's own commands in blocks of code, as words."""
    for block in re.findall(r"^ *```\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r" *(?:python|accelerate launch) (?:<[^>]+>|\.|\S*lumina2-trainer) (.+)", line)
            if found:
                yield shlex.split(found[1].replace("…", ""), comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    for command, *words in commands(page):
        assert command in COMMANDS
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"training.command.{command}").add_arguments(parser)
        parser.parse_args([word.strip("[]") for word in words])
