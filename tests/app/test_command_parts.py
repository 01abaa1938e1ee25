"""What the commands on a recipe check, choose and say, each by itself; the whole journey is in test_commands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill
from distill.app import build, commands
from distill.app.recipe import parse
from distill.app.strict import RecipeError
from distill.labelling.run import LabelOutcome
from distill.shards.tables import CACHED


def test_the_commit_is_said_where_the_code_is_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "__file__", str(tmp_path / "distill" / "__init__.py"))
    monkeypatch.setattr(commands.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="v1-3-gabc-dirty\n"))
    assert commands.commit() == distill.__version__
    (tmp_path / ".git").mkdir()
    assert commands.commit() == f"{distill.__version__}+v1-3-gabc-dirty"
    monkeypatch.setattr(commands.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert commands.commit() == f"{distill.__version__}+unknown"


def outcome_of(**given) -> LabelOutcome:
    numbers = dict.fromkeys(("parts", "skipped", "images", "samples", "quarantined", "bytes"), 3)
    return LabelOutcome(**({"complete": True, **numbers} | given))


@pytest.mark.parametrize("send", [False, True])
def test_what_labelling_made_is_said_and_sent(tmp_path, monkeypatch, capsys, send):
    manifest = {
        "shards": [{"samples": 4}, {"samples": 5}],
        "quarantine": [{"origin": f"sa_{i}.jpg", "reason": "cut"} for i in range(25)],
        "passed": {".txt": 3},
    }
    monkeypatch.setattr(commands.shards, "read_manifest", lambda folder: manifest)
    sent: list = []
    monkeypatch.setattr(commands.mirror, "publish", lambda *given, report: sent.append(given) or 7)
    made = SimpleNamespace(labels=SimpleNamespace(meeting="", mirror="memory://m/"))
    commands.print_label_outcome(made, tmp_path / "x", outcome_of(), send=send)
    said = capsys.readouterr()
    assert f"{tmp_path / 'x'}: 9 samples in 2 tars, 25 images in quarantine" in said.out
    assert said.err.count("quarantined sa_") == 20 and "quarantined sa_19.jpg: cut" in said.err
    assert "ignored: 3 .txt" in said.err
    assert sent == ([(tmp_path / "x", "memory://m/")] if send else [])
    assert ("memory://m/x: 7 files sent" in said.out) is send
    manifest["shards"] = [{"samples": 0}]
    with pytest.raises(ValueError, match="nothing was labelled because no image was usable"):
        commands.print_label_outcome(made, tmp_path / "x", outcome_of(), send=False)
    capsys.readouterr()
    commands.print_label_outcome(made, tmp_path / "x", outcome_of(complete=False))
    assert capsys.readouterr().out == "", "other processes of this run are not done"


@pytest.mark.parametrize(("meeting", "place"), [("", "{folder}"), ("memory://m/", "memory://m/x")])
def test_what_a_worker_made_is_said(tmp_path, capsys, meeting, place):
    made = SimpleNamespace(labels=SimpleNamespace(meeting=meeting, mirror=""))
    commands.print_label_outcome(made, tmp_path / "x", outcome_of(complete=False, last=False))
    said = f"{place.format(folder=tmp_path / 'x')}: other workers are making the last parts or the manifest; 3 parts"
    assert said in capsys.readouterr().out


def test_workers_of_a_url_meet_at_the_folder_of_the_labels_name(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "Objects", lambda *given: given)
    made = SimpleNamespace(labels=SimpleNamespace(meeting="s3://bucket/labels/"))
    assert commands.worker_meeting(made, tmp_path / "x") == ("s3://bucket/labels/x", tmp_path / "x")


def test_tars_that_are_kept_in_part_are_not_labelled_again(tmp_path):
    (tmp_path / CACHED).mkdir()
    with pytest.raises(ValueError, match=r"keeps only some tars of finished labels .* set labels.cache_gb = 0"):
        commands._prepare(SimpleNamespace(), tmp_path, worker=False)


def test_the_disk_holds_two_checkpoints_or_nothing_begins(monkeypatch, capsys):
    made = parse({"run": {"name": "x"}, "train": {"keep_last": 2}})
    monkeypatch.setattr(commands.checkpoints, "bytes_of", lambda student: 1_000_000_000)
    for free, said in ((3_900_000_000, "has 3.90 GB free: tight for 2 checkpoints of 1.00 GB"), (4_000_000_000, "")):
        monkeypatch.setattr(commands.machine, "free_disk", lambda folder, free=free: (free, folder))
        commands.check_disk(made, torch.nn.Identity())
        error = capsys.readouterr().err
        assert said in error and bool(said) is bool(error)
    monkeypatch.setattr(commands.machine, "free_disk", lambda folder: (1_900_000_000, folder))
    with pytest.raises(OSError, match="has 1.90 GB free, but a checkpoint takes 1.00 GB while the previous one"):
        commands.check_disk(made, torch.nn.Identity())


@pytest.mark.parametrize(("kind", "larger"), [("affine_disparity", "nearer"), ("metric_depth", "farther")])
def test_a_card_counts_images_and_forbids_what_one_origin_forbids(monkeypatch, kind, larger):
    made = parse(
        {
            "run": {"name": "x"},
            "train": {"kind": kind},
            "student": {"max_depth": 9.0 if kind == "metric_depth" else 0.0},
        }
    )
    monkeypatch.setattr(commands, "teachers_of", lambda dataset: {})
    monkeypatch.setattr(commands, "lineage", lambda recipe, teachers: ({"images": {}}, False))
    card = commands.student_card(made, SimpleNamespace(image_keys=["a", "a", "b"]))
    assert card["commercial"] is False and card["images"]["count"] == 2
    assert card["kind"] == f"{kind}, larger is {larger}"


def test_a_demo_is_the_whole_loop_and_a_score_needs_a_benchmark(monkeypatch):
    done: list = []
    for name in ("label", "train", "score", "report"):
        monkeypatch.setattr(commands, f"run_{name}", lambda recipe, name=name: done.append(name) or name)
    assert commands.run_demo(parse({"run": {"name": "x"}})) == "report" and done == [
        "label",
        "train",
        "score",
        "report",
    ]
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="the recipe names no benchmarks"):
        commands.run_score(parse({"run": {"name": "x"}}))


@pytest.mark.parametrize(
    ("worker", "processes", "meeting", "steps", "by"),
    [
        (False, 1, "", False, commands.label),
        (True, 1, "", False, commands.work),
        (False, 2, "", False, commands.work),
        (False, 1, "memory://m", False, commands.work),
        (True, 1, "", True, commands.work_by_parts),
    ],
)
def test_who_labels_and_with_what(tmp_path, monkeypatch, capsys, worker, processes, meeting, steps, by):
    labels = SimpleNamespace(meeting=meeting)
    made = SimpleNamespace(labels=labels, crops=SimpleNamespace(size=28), run=SimpleNamespace(seed=5))
    looked: list = []
    monkeypatch.setattr(commands, "as_table", lambda recipe: {"a": "table"})
    monkeypatch.setattr(commands, "input_shards", lambda recipe: [])
    monkeypatch.setattr(commands, "_note_other_labels", lambda *given: looked.append("moved"))
    monkeypatch.setattr(commands, "in_turn", lambda meeting, path, measure: measure())
    monkeypatch.setattr(commands, "worker_meeting", lambda recipe, folder: "the meeting")
    monkeypatch.setattr(commands, "tune", lambda *_, **__: (labels, {"from_float32": {"t": {"median": 0.0123}}}))
    monkeypatch.setattr(commands.trusted_recipes, "record", lambda table: looked.append(table))
    monkeypatch.setattr(commands.build, "process", lambda: (0, processes))
    monkeypatch.setattr(commands.build, "device", lambda recipe: "cpu")
    monkeypatch.setattr(commands.teaching, "load_teachers", lambda recipe, *, on: [on])
    monkeypatch.setattr(commands.teaching, "float32_twins", lambda recipe, *, on: {})
    job = commands._prepare(made, tmp_path, worker=worker, steps=steps)
    assert job.func is by and job.args == ([], ["cpu"])
    assert job.keywords["seed"] == 5 and job.keywords["out"] == tmp_path and job.keywords["recipe"] == {"a": "table"}
    assert job.keywords.get("meeting") == (None if by is commands.label else "the meeting")
    assert looked == [{"a": "table"}, *(["moved"] if not meeting else [])]
    assert "teacher t: differs from eager float32 by 1.23% of the spread (median)" in capsys.readouterr().err


def test_training_looks_at_its_labels_its_files_and_its_disk_first(monkeypatch, capsys):
    cache = object.__new__(commands.TarCache)
    cache.traffic = SimpleNamespace(sentence="labels: 1 GB of 9 GB")
    opened: list = []

    def full(recipe, student):
        raise OSError("the disk is full")

    monkeypatch.setattr(commands.build, "training_labels", lambda recipe: SimpleNamespace(cache=cache))
    monkeypatch.setattr(commands.build, "make_student", lambda recipe: None)
    monkeypatch.setattr(commands.build, "batch_norm_note", lambda recipe, student: "few images a batch")
    monkeypatch.setattr(commands.machine, "allow_open_files", lambda: opened.append(1))
    monkeypatch.setattr(commands, "check_disk", full)
    with pytest.raises(OSError, match="the disk is full"):
        commands._train(SimpleNamespace())
    said = capsys.readouterr().err
    assert "labels: 1 GB of 9 GB" in said and "few images a batch" in said and opened


def test_a_start_with_a_decoder_of_a_file_is_compared_by_the_files_name(tmp_path):
    def recipe(name):
        (tmp_path / name).write_text((Path(distill.__file__).parent / "students/decoders/sdt.py").read_text())
        table = {"encoder": "test_vit", "decoder": str(tmp_path / name), "init_from": "start"}
        return parse({"run": {"name": "r"}, "student": table}, uses=["student"])

    spec = {"encoder": "test_vit", "encoder_options": {}, "decoder": "/other/mine.py", "decoder_options": {}}
    build._check_start(recipe("mine.py"), SimpleNamespace(spec=dict(spec)))
    with pytest.raises(RecipeError, match=r"student.decoder: student.init_from = start already has mine; leave it out"):
        build._check_start(recipe("yours.py"), SimpleNamespace(spec=dict(spec)))
