"""Every key of a recipe says what it means, in the code, on the terminal and on the reference page: the same words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.app import explain, handbook, recipe
from distill.app.cli import main
from distill.app.shipped import headline, shipped
from distill.app.strict import RecipeError

ROOT = Path(__file__).parents[2]
KEYS = [(part.name, key) for part in explain.parts() for key in part.keys]


def test_every_key_has_a_meaning():
    said = {f"{part}.{key.name}": key.meaning for part, key in KEYS}
    assert not [key for key, meaning in said.items() if len(meaning) <= 10 or not meaning.endswith(".")]


@pytest.mark.parametrize("name", handbook.PAGES)
def test_a_reference_page_is_the_code_s(name):
    page = (ROOT / "docs" / "reference" / name).read_text()
    assert page == handbook.PAGES[name](), "run: python -m distill.app.handbook"


def test_the_pages_that_changed_are_written_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(handbook, "PAGES", {"a.md": lambda: "\u00e9\n", "b.md": lambda: "b\n"})
    folder = tmp_path / "docs" / "reference"
    handbook.main(folder)
    (folder / "b.md").write_text("stale")
    handbook.main(folder)
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in ("a.md", "b.md", "b.md")]
    assert [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())] == ["\u00e9\n", "b\n"]


def test_a_recipe_s_headline_is_a_whole_sentence(tmp_path):
    lines = [headline(path) for path in (shipped() | shipped("study")).values()]
    assert not [line for line in lines if not line.endswith((".", ")", "?"))]
    (tmp_path / "r.toml").write_text("# What it is,\n# in ViT-S/14 and Fig. 7. More of it.\n#   distill label r.toml\n")
    assert headline(tmp_path / "r.toml") == "What it is, in ViT-S/14 and Fig. 7."


@pytest.mark.parametrize("name", ["demo", "pocket/pocket", "sa1b_dav2_genpercept", "compare"])
def test_an_explained_recipe_reads_back(name, tmp_path):
    given = recipe.load(ROOT / "recipes" / f"{name}.toml")
    text = explain.explained(given)
    (tmp_path / "r.toml").write_text(text)
    assert recipe.load(tmp_path / "r.toml") == given
    for part, key in KEYS:
        there = getattr(given, part)
        assert there == () or key.meaning[:60] in text.replace("\n# ", " ")


def test_one_key_one_table_and_a_slip(capsys):
    assert main(["show", str(ROOT / "recipes" / "demo.toml"), "--explain", "crops.size"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("crops.size: integer, default 560\n    Side in pixels") and "here: crops.size = 140" in said
    assert main(["show", "--explain", "loss"]) == 0
    assert "loss.gradient: number, default 2.0" in capsys.readouterr().out
    assert "images.1.scenes = 72" in explain.explain_key("images.scenes", recipe.load(ROOT / "recipes" / "demo.toml"))
    assert "teachers.options: table" in explain.explain_key("teachers.0.options.resize")
    assert explain.explain_key("images.0") == explain.explain_key("images"), "a table by its number"
    with pytest.raises(RecipeError, match=r"no key train.stps; did you mean train.steps\?"):
        explain.explain_key("train.stps")
    with pytest.raises(RecipeError, match=r"no table 'crop' in a recipe; did you mean crops\?"):
        explain.explain_key("crop.size")


def test_reading_a_recipe_loads_no_torch():
    code = (
        "import sys; from distill.app import explain, recipe; recipe.load('recipes/demo.toml'); explain.reference();"
        "heavy = {'torch', 'timm', 'cv2', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
