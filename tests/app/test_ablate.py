"""Studies that expand as written, a whole tiny study that resumes, and the tables of what is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.app import ablate
from distill.app.cli import main
from distill.app.strict import RecipeError
from distill.app.study import Column, cells, read_study
from distill.eval.score import score_predictions
from distill.eval.verdict import UNKNOWN, paper_effect
from distill.labelling.lock import run_lock
from distill.training import trainlog
from tests.app.test_recipes import STUDIES
from tests.eval import test_boundary


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("version", ["bench", "full"])
def test_every_cell_of_every_study_is_a_recipe(path, version, tmp_path):
    study = read_study(path)
    made = cells(study, path, version, tmp_path, [])
    assert {cell.row for cell in made} == {row.name for row in study.all_rows()}
    assert len({cell.folder for cell in made}) == len(made)  # no two cells are one by mistake


def test_a_boundary_sets_own_score_is_a_column(tmp_path):
    """It has no score of depth beside it, as a benchmark with edges = true has."""
    path = next(p for p in STUDIES if p.stem == "fiffdepth")
    cell = cells(read_study(path), path, "full", tmp_path / "out", [])[0]
    root, depth = test_boundary.sintel(tmp_path, test_boundary.step()), test_boundary.step()
    predictions = test_boundary.store(tmp_path / "pred", {test_boundary.FRAME: depth})
    out = cell.folder / "scores" / "sintel--student.json"
    out.parent.mkdir(parents=True)
    score_predictions(predictions, kind="metric_depth", benchmark="sintel", root=root, out=out)
    shown, each = ablate._shown(cell, Column(benchmark="sintel", metric="boundary_f1"))
    assert (shown, each.tolist()) == (1.0, [1.0])
    assert Column(benchmark="am2k", metric="boundary_recall").lower_is_better is False


def test_a_seed_stands_in_what_is_set(tiny):
    made = cells(read_study(tiny), tiny, "bench", Path("out"), [])
    assert {(cell.seed, cell.recipe.labels.licence) for cell in made} == {(s, f"of seed {s}") for s in (0, 1)}


def test_a_row_has_the_last_word_and_the_command_line_behind_it(tiny):
    study = read_study(tiny)
    bench = replace(study.bench, set={**study.bench.set, "loss.normalization": "local"})
    for overrides, expected in (((), {"global", "none"}), (["loss.normalization=hybrid"], {"hybrid"})):
        made = cells(replace(study, bench=bench), tiny, "bench", Path("out"), overrides)
        assert {cell.recipe.loss.normalization for cell in made} == expected


def test_a_key_that_a_recipe_cannot_take_is_a_line(tiny):
    study = read_study(tiny)
    for key, line in (("images.7.size", "images has 1 entries"), ("run.name.x", "run.name is not a table")):
        bench = replace(study.bench, set={**study.bench.set, key: 1})
        with pytest.raises(RecipeError, match=rf"tiny.toml, row global: {key}: {line}"):
            cells(replace(study, bench=bench), tiny, "bench", Path("out"), [])


def test_a_column_without_a_score_is_told_before_anything_runs(tiny):
    """After every cell has run would be too late."""
    for column, override, message in (
        ('benchmark = "scenes"', "benchmarks.0.edges=false", "by boundary_f1; set edges = true in its [[benchmarks]]"),
        (
            'benchmark = "scenes", metric = "accuracy"',
            "train.seed=1",
            "not scored by accuracy; it has abs_rel",
        ),
        ('benchmark = "nyu"', "train.seed=1", "a column shows nyu, no benchmark of the recipe; there are scenes"),
    ):
        tiny.write_text(STUDY.replace("seeds = [0, 1]\ncolumns = [", f"seeds = [0]\ncolumns = [\n    {{ {column} }},"))
        with pytest.raises(RecipeError) as caught:
            cells(read_study(tiny), tiny, "bench", Path("out"), [override])
        assert message in str(caught.value)


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
        paper = {p.row: sum(p.values) / len(p.values) for p in study.paper}
        for o in study.orderings:
            effect = paper_effect(o.kind, o.first, o.second, paper, ("", ""))
            if o.source == "ours" or effect is None:
                continue
            holds = abs(effect) < study.equivalence if o.kind == "close" else effect > 0
            assert holds == ((name, o.claim) not in CONTRADICTED), (name, o.claim)


STUDY = """
name = "tiny"
title = "Tiny"
[full]
base = "base.toml"
columns = [{ benchmark = "scenes" }]
[bench]
base = "base.toml"
seeds = [0, 1]
columns = [
    { benchmark = "scenes" },
    { benchmark = "scenes", metric = "boundary_f1" },
    { log = "loss", relative_to = "start", name = "loss / start's" },
]
set = { "labels.licence" = "of seed {seed}" }
[[axes]]
name = "normalization"
key = "loss.normalization"
values = ["global", "none"]
[[orderings]]
claim = "global beats none"
kind = "better"
first = ["global"]
second = ["none"]
metrics = ["abs_rel", "boundary_f1"]
[[orderings]]
claim = "the loss stays below ten times its start"
kind = "below"
first = ["global", "none"]
bound = 10.0
metrics = ["loss / start's"]
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
alias = "blurred"
options = { blur = 1.0, own_range = true }
[[teachers]]
name = "truth"
[student]
encoder = "vit_tiny_patch16_224"
encoder_options = { timm_options = { depth = 2, embed_dim = 48, num_heads = 2 } }
decoder = "dpt"
[student.decoder_options]
channels = 8
post_process_channels = [8, 8, 8, 8]
[loss]
feature = 0.0
local_global = 0.0
[train]
teacher_shares = { blurred = 1.0 }
steps = 3
batch_size = 2
warmup_steps = 1
val_fraction = 0.0
workers = 0
eval_every = 0
save_every = 0
[[benchmarks]]
name = "scenes"
limit = 2
edges = true
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


def test_the_guides_study_has_one_version_and_two_rows(tmp_path):
    """recipes/ablations/README.md's example, beside a recipe, at either version."""
    guide = (Path(__file__).parents[2] / "recipes/ablations/README.md").read_text()
    (tmp_path / "mine.toml").write_text(BASE)
    (tmp_path / "study.toml").write_text(guide.partition("```toml\n")[2].partition("```")[0])
    study = read_study(tmp_path / "study.toml")
    for version in ("bench", "full"):
        made = cells(study, tmp_path / "study.toml", version, tmp_path, [])
        assert [(cell.row, cell.seed) for cell in made[::8]] == [("without", 0), ("with", 0)] and len(made) == 16
        assert {cell.recipe.loss.anchor for cell in made} == {0.0, 0.05} and made[0].recipe.train.steps == 300
    assert study.equivalence == 0.05


def test_a_study_from_labels_to_its_page(tiny, capsys, monkeypatch, uncounted):
    ran = []
    real = ablate.commands.run_train
    monkeypatch.setattr(ablate.commands, "run_train", lambda recipe: (ran.append(recipe.run.name), real(recipe))[1])
    study = ["ablate", str(tiny), "--out", "out", "--set", "score.teachers=true"]
    assert main(study) == 0
    assert len(ran) == 4
    said, noted = capsys.readouterr()
    assert "was made with other values" not in noted, "a cell's scores leave out the teachers, its recipe does not"
    assert not list(Path("out/cells").glob("*/scores/*blurred*"))
    assert "global beats none" in said and "tiny-bench/index.html" in said.replace("\n", "")
    result = json.loads(Path("out/tiny-bench/study.json").read_text())
    values = {row["name"]: row["values"] for row in result["rows"]}
    assert set(values) == {"global", "none"} and all(len(v) == 2 for v in values.values())
    assert [(c["metric"], c["here"]["seeds"], c["here"]["images"]) for c in result["claims"]] == [
        ("abs_rel", 2, 2),
        ("boundary_f1", 2, 2),
        ("loss / start's", 2, 1),
    ]
    logs = {row["name"]: [trainlog.read(Path(c) / "train/log.jsonl") for c in row["cells"]] for row in result["rows"]}
    for row, steps in logs.items():
        shown = [v[2] for _, v in sorted(values[row].items())]
        assert shown == [pytest.approx(log[-1]["loss"] / log[0]["loss"]) for log in steps], row
    assert " beside 10)" in Path("out/tiny-bench/table.md").read_text()
    [quality] = result["labels"]  # of regions; there are no patches
    assert quality["teacher"] == "blurred" and 0 < quality["abs_rel"] < 0.5 and quality["maps"] == 4
    page, table = Path("out/tiny-bench/index.html").read_text(), Path("out/tiny-bench/table.md").read_text()
    assert page.count("<svg") >= 3 and "data:image" in page and "| global |" in table
    assert not list(Path("out/cells").glob("*/train/checkpoints"))
    monkeypatch.setattr(ablate, "write_page", lambda result, path: path)  # it was read above, and takes its time
    # A cell whose result is lost is run again, alone; the others are not touched.
    lost = next(Path("out/cells").glob("*/cell.json"))
    lost.unlink()
    ran.clear()
    assert main(study) == 0
    assert len(ran) == 1
    again = json.loads(Path("out/tiny-bench/study.json").read_text())
    assert {r["name"]: r["values"] for r in again["rows"]} == values
    ran.clear()
    next(Path("out/cells").glob("*/cell.json")).unlink()
    assert main([*study, "--collect"]) == 0  # says what is there, and runs nothing
    assert not ran and "one seed decides nothing" in Path("out/tiny-bench/table.md").read_text()


def test_a_training_that_diverges_is_a_result(tiny, uncounted):
    assert main(["ablate", str(tiny), "--out", "out", "--set", "train.lr=1e30", "--set", "train.clip_norm=0.0"]) == 0
    result = json.loads(Path("out/tiny-bench/study.json").read_text())
    assert any(row["failures"] for row in result["rows"])
    assert result["claims"][0]["here"]["word"] == UNKNOWN


def test_faults_of_a_study_are_lines(tiny, tmp_path):
    for old, new, message in (
        ('first = ["global"]', 'first = ["globa"]', "no row globa; the rows are global, none"),
        ('kind = "better"', 'kind = "nicer"', "kind must be one of"),
        ('values = ["global", "none"]', 'values = ["none", "none"]', "no row global; the rows are none, none"),
        ('values = ["global", "none"]', 'values = ["global", "none", "none"]', "rows named twice: none; give each its"),
        ('values = ["global", "none"]', "", "an axis needs a key with values, or choices"),
        ("seeds = [0, 1]", "seed = [0, 1]", "unknown key bench.seed; did you mean bench.seeds?"),
        (
            '{ benchmark = "scenes" }',
            '{ benchmark = "scenes", metric = "delta9" }',
            "no metric 'delta9'; there are",
        ),
        ('{ log = "loss", relative', '{ log = "loss", benchmark = "scenes", relative', "give benchmark or log"),
        ("bound = 10.0", "", "below takes a bound above 0 and no second"),
        ('metrics = ["loss / start\'s"]', 'metrics = ["los"]', "no column shows los; columns show abs_rel"),
    ):
        tiny.write_text(STUDY.replace(old, new))
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            read_study(tiny)


def test_a_fault_of_the_only_version_is_told_once(tiny):
    bench = STUDY.replace("seeds = [0, 1]", "seed = [0, 1]")
    tiny.write_text(bench[: bench.index("[full]")] + bench[bench.index("[bench]") :])
    with pytest.raises(RecipeError) as refusal:
        read_study(tiny)
    assert str(refusal.value) == f"{tiny}: unknown key bench.seed; did you mean bench.seeds?"


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [
        (None, 2, ["0", "1", "0"]),
        ("4,5", 2, ["4", "5", "4"]),
        ("GPU-8a, GPU-9b,-1,3", 2, ["GPU-8a", "GPU-9b", "GPU-8a"]),
        ("7", 1, ["7", "7", "7"]),
    ],
)
def test_workers_use_the_gpus_of_their_parent(tmp_path, monkeypatch, given, count, names):
    started, threads = [], []
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 7)

    class Ended:
        returncode = 0

        def __init__(self, command, *, env, **_):
            started.append(env["CUDA_VISIBLE_DEVICES"])
            threads.append(env["OMP_NUM_THREADS"])
            assert command[-3:] == ["--worker", "--set", "train.lr=1.0"]

        def poll(self):
            return 0

        terminate = wait = poll

    monkeypatch.setattr(ablate.subprocess, "Popen", Ended)
    monkeypatch.setattr(ablate.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    ablate._run_workers([], [], "bench", tmp_path, 3, ["train.lr=1.0"])
    assert started == names and threads == ["2"] * 3


def test_a_study_that_is_stopped_stops_its_workers_and_waits_for_them(tmp_path, monkeypatch):
    done = []

    class Working:
        def __init__(self, *_, **__):
            self.poll, self.terminate = lambda: None, lambda: done.append("told")
            self.wait = lambda: done.append("ended")

    def stopped(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.subprocess, "Popen", Working)
    monkeypatch.setattr(ablate.time, "sleep", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate._run_workers([], [], "bench", tmp_path, 2, [])
    assert done == ["told", "told", "ended", "ended"]


def test_a_cell_that_another_process_holds_or_has_finished_is_not_run(tmp_path, monkeypatch):
    cell, ran = SimpleNamespace(folder=tmp_path / "cell"), []
    monkeypatch.setattr(ablate, "_run", ran.append)
    with run_lock(tmp_path, rank=0, world=1), monkeypatch.context() as patch:
        patch.setattr(cell, "folder", tmp_path)
        assert ablate._run_if_free(cell) is False and not ran, "it is waited for"
    assert ablate._run_if_free(cell) and ran == [cell]
    (cell.folder / "cell.json").write_text("{}")  # by another process, since it was looked for
    assert ablate._run_if_free(cell) and len(ran) == 1


def test_a_killed_worker_is_told_and_ends_the_study_only_if_cells_are_left(tmp_path, monkeypatch, capsys):
    class Killed:
        returncode = -9

        def __init__(self, command, *, stdout, **_):
            stdout.write(b"working\n")

        def poll(self):
            return -9

        terminate = wait = poll

    monkeypatch.setattr(ablate.subprocess, "Popen", Killed)
    monkeypatch.setattr(ablate, "is_done", lambda cell: cell != "left")
    with pytest.raises(ValueError, match=r"^worker 0 stopped: killed by SIGKILL \(full output: .*worker-0.log\)$"):
        ablate._run_workers(["done", "left"], [], "bench", tmp_path, 2, [])
    ablate._run_workers(["done", "done"], [], "bench", tmp_path, 2, [])
    assert "worker 0 stopped: killed by SIGKILL" in capsys.readouterr().err
    Killed.returncode = 2
    with pytest.raises(ValueError, match=r"^worker 0 stopped: working \(full"):
        ablate._run_workers(["left"], [], "bench", tmp_path, 2, [])


def test_a_cell_that_is_killed_while_its_weights_are_removed_is_not_trained_again(tiny, tmp_path, monkeypatch):
    [cell, *_] = cells(read_study(tiny), tiny, "bench", tmp_path / "out", ["score.teachers=true"])
    weights, ran, scored = cell.folder / "train" / "checkpoints" / "a", [], []
    plain = ablate.shutil.rmtree

    def train(recipe):
        ran.append(recipe)
        weights.mkdir(parents=True)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.commands, "run_train", train)
    monkeypatch.setattr(ablate.commands, "run_score", lambda recipe, **given: scored.append((recipe, given)))
    monkeypatch.setattr(ablate, "_label_all", lambda every: None)
    monkeypatch.setattr(ablate.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        ablate._run_cells([cell])
    monkeypatch.setattr(ablate.shutil, "rmtree", plain)
    ablate._run_cells([cell])
    assert len(ran) == 1 and ablate.is_done(cell) and not weights.parent.exists()
    assert scored == [(cell.recipe, {"teachers": False})], "no column shows a teacher"
