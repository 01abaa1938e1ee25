"""Verdicts on values with a known answer, studies that expand as written, a whole tiny study that resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distill.app import ablate
from distill.app.cli import main
from distill.app.strict import RecipeError
from distill.app.study import cells, read_study
from distill.eval.verdict import NOISE, REFUTED, REPRODUCED, UNKNOWN, interval, judge
from tests.app.test_recipes import STUDIES


def rows(**values):
    return {name: dict(enumerate(row)) for name, row in values.items()}


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(2.920 / math.sqrt(3), rel=1e-4)
    assert interval([1.0]) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("claim", "first", "second", "word"),
    [
        ("better", [0.10, 0.11, 0.12], [0.20, 0.22, 0.23], REPRODUCED),
        ("better", [0.20, 0.22, 0.23], [0.10, 0.11, 0.12], REFUTED),
        ("better", [0.10, 0.20, 0.12], [0.11, 0.15, 0.14], NOISE),
        ("better", [0.10], [0.20], NOISE),
        ("not_worse", [0.10, 0.20, 0.12], [0.101, 0.199, 0.121], REPRODUCED),
        ("not_worse", [0.20, 0.22, 0.23], [0.10, 0.11, 0.12], REFUTED),
        ("far_better", [0.10, 0.10, 0.10], [0.16, 0.17, 0.16], REPRODUCED),
        ("far_better", [0.10, 0.10, 0.10], [0.13, 0.14, 0.13], REFUTED),
        ("close", [0.100, 0.101, 0.102], [0.101, 0.102, 0.101], REPRODUCED),
        ("close", [0.10, 0.10, 0.10], [0.20, 0.20, 0.21], REFUTED),
    ],
)
def test_words_of_known_values(claim, first, second, word):
    verdict = judge(claim, ["a"], ["b"], rows(a=first, b=second), tolerance=0.5 if claim == "far_better" else 0.1)
    assert verdict.word == word


def test_the_weakest_pair_decides_and_pairs_are_within_a_seed():
    values = rows(a=[0.1, 0.2, 0.3], b=[0.11, 0.22, 0.33], c=[0.1, 0.2, 0.3])
    assert judge("better", ["a"], ["b"], values).word == REPRODUCED  # 10 % in each seed, though seeds differ by 200 %
    assert judge("better", ["a"], ["b", "c"], values).word == NOISE
    assert judge("better", ["a"], ["b"], {"a": {0: 0.1}, "b": {1: 0.2}}).word == UNKNOWN
    assert judge("better", ["a"], ["gone"], values).word == UNKNOWN


def test_a_gap_that_grows():
    values = rows(o1=[0.10, 0.11, 0.10], b1=[0.10, 0.11, 0.10], o2=[0.05, 0.05, 0.05], b2=[0.10, 0.11, 0.10])
    assert judge("gap_grows", ["o1", "o2"], ["b1", "b2"], values).word == REPRODUCED
    assert judge("gap_grows", ["o2", "o1"], ["b2", "b1"], values).word == REFUTED


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("version", ["bench", "full"])
def test_every_cell_of_every_study_is_a_recipe(path, version, tmp_path):
    study = read_study(path)
    made = cells(study, path, version, tmp_path, [])
    assert {cell.row for cell in made} == {row.name for row in study.all_rows()}
    assert len({cell.folder for cell in made}) == len(made)  # no two cells are one by mistake


def test_tables_share_their_equal_cells(tmp_path):
    folder = STUDIES[0].parent
    one, two = (
        cells(read_study(p), p, "bench", tmp_path, []) for p in (folder / "table1.toml", folder / "table2.toml")
    )
    shared = {c.folder for c in one} & {c.folder for c in two}
    assert {c.row for c in two if c.folder in shared} == {"shared", "local-global"}


# What the papers say and their own numbers do not, in the measure by which a study judges
# (recipes/ablations/table4.toml).
CONTRADICTED = {("table4", "the assistant helps: selection beats the primary alone")}


def test_the_papers_own_table_has_the_papers_orderings():
    for name in ("table1", "table2", "table4"):
        study = read_study(STUDIES[0].parent / f"{name}.toml")
        paper = {p.row: {0: sum(p.values) / len(p.values)} for p in study.paper}
        for o in study.orderings:
            verdict = judge(o.kind, o.first, o.second, paper, tolerance=o.tolerance)
            assert (verdict.effect >= 0) == ((name, o.claim) not in CONTRADICTED), (name, o.claim)


STUDY = """
name = "tiny"
title = "Tiny"
[full]
base = "base.toml"
columns = [{ benchmark = "scenes" }]
[bench]
base = "base.toml"
seeds = [0, 1]
columns = [{ benchmark = "scenes" }]
[[axes]]
name = "normalization"
key = "loss.normalization"
values = ["global", "none"]
[[orderings]]
claim = "global beats none"
kind = "better"
first = ["global"]
second = ["none"]
"""
BASE = """
[run]
name = "base"
[[images]]
scenes = 4
size = 56
[crops]
size = 28
min_side = 40
patches = "none"
[[teachers]]
name = "truth"
options = { blur = 1.0, own_range = true }
[student]
encoder = "vit_tiny_patch16_224"
encoder_options = { blocks = [0, 1] }
decoder = "dpt"
[student.decoder_options]
channels = 8
post_process_channels = [8, 8, 8, 8]
[loss]
feature = 0.0
local_global = 0.0
[train]
steps = 3
batch_size = 2
warmup_steps = 1
val_fraction = 0.0
workers = 0
eval_every = 0
save_every = 1
[[benchmarks]]
name = "scenes"
limit = 2
[score]
teachers = false
plane_prior = false
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "tiny.toml").write_text(STUDY)
    return tmp_path / "tiny.toml"


def test_a_study_from_labels_to_its_page(tiny, capsys, monkeypatch):
    ran = []
    real = ablate.commands.run_train
    monkeypatch.setattr(ablate.commands, "run_train", lambda recipe: (ran.append(recipe.run.name), real(recipe))[1])
    assert main(["ablate", str(tiny), "--out", "out"]) == 0
    assert len(ran) == 4
    said = capsys.readouterr().out
    assert "global beats none" in said and "tiny-bench/index.html" in said.replace("\n", "")
    result = json.loads(Path("out/tiny-bench/study.json").read_text())
    values = {row["name"]: row["values"] for row in result["rows"]}
    assert set(values) == {"global", "none"} and all(len(v) == 2 for v in values.values())
    page, table = Path("out/tiny-bench/index.html").read_text(), Path("out/tiny-bench/table.md").read_text()
    assert page.count("<svg") >= 3 and "data:image" in page and "| global |" in table
    assert not list(Path("out/cells").glob("*/train/checkpoints"))
    # A cell whose result is lost is run again, alone; the others are not touched.
    lost = next(Path("out/cells").glob("*/cell.json"))
    lost.unlink()
    ran.clear()
    assert main(["ablate", str(tiny), "--out", "out"]) == 0
    assert len(ran) == 1
    again = json.loads(Path("out/tiny-bench/study.json").read_text())
    assert {r["name"]: r["values"] for r in again["rows"]} == values


def test_a_training_that_diverges_is_a_result(tiny):
    assert main(["ablate", str(tiny), "--out", "out", "--set", "train.lr=1e30", "--set", "train.clip_norm=0.0"]) == 0
    result = json.loads(Path("out/tiny-bench/study.json").read_text())
    assert any(row["failures"] for row in result["rows"])
    assert result["orderings"][0]["here"]["word"] == UNKNOWN


def test_faults_of_a_study_are_lines(tiny, tmp_path):
    for old, new, message in (
        ('first = ["global"]', 'first = ["globa"]', "no row globa; the rows are global, none"),
        ('kind = "better"', 'kind = "nicer"', "kind must be one of"),
        ('values = ["global", "none"]', "", "an axis needs a key with values, or choices"),
        ("seeds = [0, 1]", "seed = [0, 1]", "unknown key bench.seed; did you mean bench.seeds?"),
        (
            '{ benchmark = "scenes" }',
            '{ benchmark = "scenes", metric = "delta1" }',
            "delta1 grows as a model gets better",
        ),
    ):
        tiny.write_text(STUDY.replace(old, new))
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            read_study(tiny)
