"""Hostile values for every key of a recipe, and hostile files: a sentence each, no traceback, no memory."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest

from distill.app import build, strict, teaching
from distill.app import recipe as recipes
from distill.app.cli import main
from distill.app.inputs import input_shards
from distill.data import storage
from distill.data.maps import BadMapError, read_map
from distill.data.storage import expand
from distill.eval.stored import _damage

DEEP: dict = {}
for _ in range(500):
    DEEP = {"a": DEEP}
HOSTILE = [
    *(10**18, -(10**18), 10**400, -1, 0, 2**31 - 1, 1e308, float("inf"), float("nan"), True),
    *("", "\0", "..", "../../x", "/etc", "x" * 100_000, "\x1b[2J", "\ud800", "{1..100000000}", "s3://x/y", "a://"),
    *([], [[]], [10**18], [""], {}, {"a": 10**18}, {"": []}, DEEP, [DEEP]),
]
BASE = {
    "run": {"name": "x", "device": "cpu"},
    "images": [{"scenes": 1, "size": 16}],
    "teachers": [{"name": "analytic"}],
    "benchmarks": [{"name": "scenes"}],
}
PARTS = {
    name: (typing.get_args(hint) or (hint,))[0]
    for name, hint in typing.get_type_hints(recipes.Recipe).items()
    if name != "ignored"
}


MISTYPED: set[tuple[typing.Any, int]] = set()
"""Types, and places in HOSTILE, that the strict reader refuses: the same for every key of a type, so tried once."""


def refused_by_type(hint, place: int, error: Exception) -> None:
    told = (f"must be {strict._expected(hint)}, not ", "must be a whole number below", "has tables nested")
    if isinstance(error, strict.RecipeError) and any(words in str(error) for words in told):
        MISTYPED.add((hint, place))


@pytest.mark.parametrize("part", PARTS)
def test_no_key_takes_a_hostile_value_to_a_traceback(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "MOST_NAMES", 1000)
    hints = typing.get_type_hints(PARTS[part])
    for key in (field.name for field in dataclasses.fields(PARTS[part])):
        for place, value in enumerate(HOSTILE):
            if (hints[key], place) in MISTYPED:
                continue
            given = BASE.get(part, {})
            table = [{**given[0], key: value}] if isinstance(given, list) else {**given, key: value}
            if part == "images" and key in ("tars", "photos", "pairs"):
                table = [{key: value}]
            try:
                recipe = recipes.parse({**BASE, part: table})
                recipes.dumps(recipe)
                if part != "train":
                    build.labels_folder(recipe)
                build.train_settings(recipe)
                if part in ("images", "run"):
                    input_shards(recipe)
                if part == "teachers":
                    teaching.load_teachers(recipe, on=build.device(recipe))
            except (ValueError, LookupError, OSError, ImportError) as error:
                assert str(error), (key, value)  # what the command line tells in a line
                refused_by_type(hints[key], place, error)
    assert not list(tmp_path.iterdir())


def test_what_is_no_recipe_is_told_in_a_line(tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text('[run]\nname = "a"\n')
    for key in ("run.name.x.y=1", "run.seed=" + "9" * 5000, "train.steps=1000000000000000000", "x=" + "[" * 5000, "=1"):
        assert main(["show", str(path), "--set", key]) == 2, key
    for text in ("a = " + "[" * 5000, "a = " + "9" * 5000, "a=" + "{a=" * 3000, "\0", '[run]\nname = "a"\nseed = -3\n'):
        path.write_text(text)
        assert main(["show", str(path)]) == 2, text[:20]
        said = capsys.readouterr().err
        assert "Traceback" not in said and str(path) in said.replace("\n", "")


def test_a_pattern_of_too_many_names_is_refused_before_they_are_there(monkeypatch):
    monkeypatch.setattr(storage, "MOST_NAMES", 1000)
    for pattern in ("{0..100000000}", "{0..9999}{0..9999}", "{1..999999999999999999}"):
        with pytest.raises(ValueError, match="more than 1,000 names"):
            expand(pattern)
    assert expand("a_{08..10}{x,y}") == [f"a_{n}{c}" for n in ("08", "09", "10") for c in "xy"]
    for pattern in ("a_{5..3}.tar", "{x,y}_{5..3}.tar"):  # beside another pattern it would be left out without a word
        with pytest.raises(ValueError, match=r"_\{5..3\}.tar: \{5..3\} counts down"):
            expand(pattern)
    assert expand("a_{5..5}.tar") == ["a_5.tar"]


@pytest.mark.parametrize(
    "header", [b"{'descr': (", b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", b"{'a': " * 9]
)
def test_a_bad_header_of_a_map_is_told(tmp_path, header):
    path = tmp_path / "m.npy"
    path.write_bytes(np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(BadMapError, match=r"not a readable .npy"):
        read_map(path)
    assert _damage(path)
    path.write_bytes(b"PK\3\4" + bytes(40))
    with pytest.raises(BadMapError):
        read_map(path)
    assert _damage(path)
