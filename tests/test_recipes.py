"""Every recipe in the tree loads and names real plug-ins; bad ones give exactly the messages a person needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill import recipe as recipes
from distill import strict

ROOT = Path(__file__).parent.parent
STUDIES = sorted(p for p in (ROOT / "recipes" / "ablations").glob("*.toml") if p.stem != "bench")
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if not p.stem.endswith("_card") and p not in STUDIES)
GOOD = """
[run]
name = "try"
[[images]]
photos = "pictures"
[[teachers]]
name = "depth_anything_v2"
weights = "w.pth"
[student]
decoder = "sdt"
[train]
steps = 10
lr = 3e-4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(strict.RecipeError) as caught:
        recipes.load(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_in_the_tree_loads_and_survives_a_round_trip(path, tmp_path):
    loaded = recipes.load(path)
    assert recipes.load(write(tmp_path, recipes.dumps(loaded))) == loaded
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), f"{path} should open with what it is and its command"


def test_numbers_defaults_and_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    loaded = recipes.load(path, ["train.steps=100", "run.name=other", "teachers.0.dtype=bfloat16", "loss.anchor=1"])
    assert (loaded.train.steps, loaded.run.name, loaded.teachers[0].dtype) == (100, "other", "bfloat16")
    assert loaded.loss.anchor == 1.0 and isinstance(loaded.loss.anchor, float)
    assert loaded.train.lr == 3e-4 and loaded.train.batch_size == 8
    assert loaded.run.folder == Path("runs/other")
    assert (loaded.loss.shared, loaded.loss.local_global, loaded.loss.feature, loaded.loss.gradient) == (1, 0.5, 1, 2)


BAD = {
    "unknown key": ("[train]\nstep = 3", "unknown key train.step; did you mean train.steps?"),
    "unknown key far from all": ("[train]\nzzz = 3", "unknown key train.zzz"),
    "unknown table": ("[trian]\nsteps = 3", "unknown key trian; did you mean train?"),
    "text for a number": ('[train]\nlr = "3e-4"', "train.lr must be a number, not '3e-4'"),
    "number for text": ("[student]\nencoder = 3", "student.encoder must be a string, not 3"),
    "float for integer": ("[train]\nsteps = 1.5", "train.steps must be an integer, not 1.5"),
    "true is not a number": ("[train]\nsteps = true", "train.steps must be an integer, not True"),
    "not a choice": (
        '[train]\nprecision = "fp16"',
        "train.precision must be 'fp32' or 'bf16', not 'fp16'",
    ),
    "table for array": ('[teachers]\nname = "midas"', "teachers must be an array, not a table"),
    "unknown decoder": ('[student]\ndecoder = "std"', "student: no students/decoders/std.py; did you mean sdt?"),
    "unknown normalization": (
        '[loss]\nnormalization = "globl"',
        "loss: no distill/normalize/globl.py; did you mean global?; "
        "distill/normalize/ has: global, hybrid, local, none",
    ),
    "two sources in one": (
        '[[images]]\nphotos = "a"\nscenes = 3',
        "images[0]: needs exactly one of tars, photos, pairs, scenes, wheels",
    ),
    "out of range": ("[loss]\ntrim_top = 1.0", "loss: trim_top must be in [0, 1), not 1.0"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_recipe_gives_exactly_the_expected_message(case, tmp_path):
    text, message = BAD[case]
    found = faults(tmp_path, f'[run]\nname = "x"\n{text}\n'.replace('[run]\nname = "x"\n[run]', "[run]"))
    assert len(found) == 1
    assert found[0] == message or (message.endswith("?") and found[0].startswith(message))


def test_every_fault_is_reported_at_once(tmp_path):
    found = faults(tmp_path, '[run]\nnam = "x"\n[train]\nlr = "fast"\nsteps = "many"\n[loss]\nnormalization = 3\n')
    assert found == [
        "unknown key run.nam; did you mean run.name?",
        "run.name is missing",
        "train.lr must be a number, not 'fast'",
        "train.steps must be an integer, not 'many'",
        "loss.normalization must be a string, not 3",
    ]


def test_a_teacher_named_twice_needs_an_alias(tmp_path):
    twice = '[[teachers]]\nname = "midas"\n[[teachers]]\nname = "midas"\n'
    assert faults(tmp_path, f'[run]\nname = "x"\n{twice}') == [
        "teachers named twice: midas; give each an alias of its own"
    ]


def test_broken_toml_missing_file_and_bad_set(tmp_path):
    assert faults(tmp_path, "[run\n")[0].startswith("not valid TOML: ")
    with pytest.raises(strict.RecipeError, match="no such recipe.*r.toml"):
        recipes.load(tmp_path / "q.toml")
    path = write(tmp_path, GOOD)
    for bad, message in {
        "train.steps": "write it as KEY=VALUE",
        "teachers.7.weights=a": "teachers has 1 entries, numbered from 0",
        "train.steps.more=1": "is not a table|train.steps",
        "train.stps=3": "unknown key train.stps; did you mean train.steps",
    }.items():
        with pytest.raises(strict.RecipeError, match=message):
            recipes.load(path, [bad])
