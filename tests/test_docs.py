"""The README and docs/ are correct: commands parse, keys exist, recipes load, links resolve, Python runs."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from distill.app.cli import parser
from distill.app.recipe import Recipe, load, parse
from distill.app.shipped import shipped
from distill.core.plugins import find, names

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for top in ("docs", "eval", "students", "recipes") for page in (ROOT / top).rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `distill` command in the shell blocks."""
    lines = [
        line
        for language, block in BLOCK.findall(text)
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    joined = text.replace("\\\n", " ")
    indented = re.findall(r"^    ((?:distill|accelerate launch) .*)$", joined, re.MULTILINE)
    lines += [line.partition("    ")[0] for line in indented]  # the text after it is prose
    arguments = []
    for line in lines:
        for part in [line] if line.startswith("srun") else re.split(r" && |;", line):
            arguments += _arguments(shlex.split(part, comments=True))
    return arguments


def _arguments(words: list[str]) -> list[list[str]]:
    """The arguments of the command if it is distill's, in a list; else an empty list."""
    inner = shlex.split(words[3]) if words[:1] == ["srun"] else words
    if inner[:1] == ["distill"]:
        return [inner[1:]]
    return [inner[inner.index("-m") + 2 :]] if inner[:2] == ["accelerate", "launch"] else []


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page.read_text())]


every_shipped = functools.cache(shipped)


def test_there_is_something_to_check():
    assert len(COMMANDS) > 25 and len(PAGES) > 10


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_every_command_is_one(page, words):
    args = parser().parse_args(words)
    overrides = getattr(args, "set", [])
    name = getattr(args, "recipe", None) or ""
    file = ROOT / name
    if overrides or name in every_shipped():
        recipe = name if name in every_shipped() else file if file.is_file() else "demo"
        if not hasattr(args, "study"):
            load(recipe, [text for text in overrides if not text.startswith("teachers.")])


def test_every_command_has_a_row():
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "commands.md").read_text().replace("\\|", "/"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`distill ([a-z]+)", row)}
    assert documented == set(names("distill.app.verbs"))


def test_every_extra_is_in_the_pages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = (ROOT / "docs" / "install.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    documented = re.findall(r"`([a-z]+)`(?=[^|]*\|[^|]*\|$)", table, re.MULTILINE)
    assert sorted(documented) == sorted(project["optional-dependencies"])


def test_the_teachers_of_the_readme_are_those_of_the_cards():
    table = (ROOT / "README.md").read_text().partition("| teacher |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    documented = {
        re.sub(r"\W+", "_", name.lower()): (output, allowed)
        for names_, output, allowed in rows
        for name in names_.split(", ")
    }
    for teacher in names("distill.teachers"):
        cards = find("distill.teachers", teacher).CARDS
        if teacher in ("analytic", "checkpoint", "stored"):  # ours, and other people's maps
            continue
        (output, allowed), *_ = [cells for name, cells in documented.items() if name.startswith(teacher)]
        for card in cards:
            words = {"metric": "metric", "scale": "up to scale", "affine": f"{card.kind.quantity}"}
            assert words[str(card.kind).partition("_")[0]] in output, (teacher, card.kind)
        sold = {card.commercial for card in cards}
        expected = {"no": {False}, "yes": {True}}.get(allowed.partition(" ")[0].strip(":,"))
        assert expected is None or sold == expected, (teacher, allowed)


def keys() -> set[str]:
    """Every key of a recipe: "crops.size"."""
    hints = get_type_hints(Recipe)
    tables = {f.name: hints[f.name] for f in fields(Recipe)}
    classes = {
        name: next((c for c in (hint, *get_args(hint)) if is_dataclass(c)), None) for name, hint in tables.items()
    }
    return {f"{name}.{f.name}" for name, cls in classes.items() if cls for f in fields(cls)}


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "reference"], ids=lambda p: p.name)
def test_every_key_is_one(page):
    known = keys()
    tables = {key.partition(".")[0] for key in known}
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        key = re.match(r"([a-z]+)\.([a-z_]+)(?= =|$)", code)
        if key and key[1] in tables and page.name != "formats.md" and not code.endswith(".py"):
            assert key[0] in known, f"{page.name}: {code}"


def test_every_recipe_in_the_docs_is_read():
    blocks = [block for page in PAGES for language, block in BLOCK.findall(page.read_text()) if language == "toml"]
    tables = [tomllib.loads(block) for block in blocks]
    assert [parse(table).run.name for table in tables if "run" in table] == ["supervised", "own"]
    for part in (table for table in tables if "run" not in table and "bench" not in table):  # nor a study: test_ablate
        teachers = [
            {"name": "analytic", "alias": name}
            for source in part.get("images", [])
            for name in source.get("teachers", [])
        ]
        parse({"run": {"name": "x"}, "teachers": teachers, **part})


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save("photo.jpg")
    scope: dict = {}
    for language, block in BLOCK.findall((ROOT / "README.md").read_text()):
        if language == "python":
            exec(block, scope)
    assert scope["points"].shape == (60 * 80, 3) and Path("depth.png").is_file()


def test_the_counts_of_the_readme_are_those_of_the_results():
    words = ("same sign", "undecided", "opposite", "equivalent")
    rows = re.findall(rf"^\| .* \| ({'|'.join(words)})[^|]* \|", results(), re.MULTILINE)
    counts = {verdict: rows.count(verdict) for verdict in words}
    pattern = r"(\d+) same sign, (\d+) undecided,\s\**(\d+) opposite\**, (\d+) equivalent"
    stated = re.search(pattern, (ROOT / "README.md").read_text())
    assert stated and [int(n) for n in stated.groups()] == list(counts.values()), counts
    for row in re.findall(r"^\| [^|]+ \| [0-9.]+ \| [0-9.]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert row.rstrip(" |") in results(), row


def results() -> str:
    return (ROOT / "docs" / "results.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 820


def test_the_lock_has_the_versions_that_were_tested():
    locked: dict[str, set[str]] = {}
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    for package in lock["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    named = {re.sub(r"_", "-", name.lower()): version for name, version in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in (*project["dependencies"], *extras):
        name = re.match(r"[\w-]+", line)[0].lower().replace("_", "-")
        assert name in locked, f"{name}: uv lock was not run after pyproject.toml changed"
        assert name not in named or locked[name] == {named[name]}, name
    assert {p["source"]["registry"] for p in lock["package"] if "registry" in p["source"]} == {
        "https://pypi.org/simple"
    }


def test_every_page_names_the_same_pythons():
    first, beyond = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    stated = f"Python 3.{first} to 3.{int(beyond) - 1}"
    for name in ("README.md", "docs/install.md", "Makefile"):
        assert re.findall(r"Python 3\.\d+ to 3\.\d+", (ROOT / name).read_text()) == [stated], name
    assert f"(3, {first}) <= sys.version_info < (3, {beyond})" in (ROOT / "Makefile").read_text()
    assert f'requires-python = ">=3.{first}, <3.{beyond}"' in (ROOT / "uv.lock").read_text()
