"""What ships with the project is found by its name, and what `distill list` prints can be typed."""

from __future__ import annotations

import pytest

from distill.app import recipe as recipes
from distill.app import shipped, strict
from distill.app.cli import main
from distill.data.pairs import read_names
from tests.app.test_recipes import ROOT, STUDIES


def test_shipped_recipes_open_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.toml", "recipes/demo.toml"):
        assert recipes.load(name) == recipes.load(ROOT / "recipes" / "demo.toml")
    for name in shipped.shipped():
        assert recipes.load(name).run.name
    assert set(shipped.shipped("study")) == {f"{path.parent.name}/{path.stem}" for path in STUDIES}
    (tmp_path / "demo.toml").write_text('[run]\nname = "local"\n')
    assert recipes.load("demo").run.name == "local", "a local file of that name wins"
    assert read_names("recipes/pocket/train_pairs.txt")


@pytest.mark.parametrize(
    ("name", "sort", "words"),
    [
        ("students/table3_dal_da", "recipe", "did you mean students/table3_dal_das[?]"),
        ("dmeo", "recipe", "dmeo: no such recipe; did you mean demo[?]; `distill list recipes` lists those that ship"),
        ("ablations/table1", "recipe", "table1.toml is a study: use it with distill ablate"),
        ("demo", "study", "demo.toml is a recipe: use it with distill show"),
        ("../../assets/x", "recipe", "no such recipe"),
        ("pocket/pocket_card", "recipe", "no such recipe"),
    ],
)
def test_a_name_that_is_none_says_what_there_is(name, sort, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(strict.RecipeError, match=words):
        shipped.locate(name, sort)


def test_a_folder_is_no_recipe_and_what_it_holds_is_named(tmp_path):
    (tmp_path / "recipe.toml").write_text('[run]\nname = "x"\n')
    with pytest.raises(strict.RecipeError, match=f"did you mean {tmp_path}/recipe.toml[?]"):
        shipped.locate(tmp_path)


def test_list_says_what_each_thing_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["list", "decoders"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert rows["sdt"].startswith("AnyDepth's Simple Depth Transformer decoder") and all(map(len, rows.values()))


def test_what_list_prints_can_be_typed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["list", "recipes"]) == 0
    for line in capsys.readouterr().out.splitlines()[2:]:
        if line and not line.startswith(" "):
            assert main(["show", line.split()[0]]) == 0
