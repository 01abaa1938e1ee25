"""A made-up log of each failure gets its name; a healthy one gets none; real runs' logs are read as they are."""

from __future__ import annotations

import json
import math

import pytest

from distill.app.cli import main
from distill.training import trainlog
from distill.training.diagnose import _ends, check_run


def write(folder, *, steps=100, settings=None, extra=(), normalization="hybrid", **columns):
    """A log whose columns are functions of progress from 0 to 1."""
    train = folder / "train"
    train.mkdir(parents=True)
    healthy = {
        "loss": lambda t: 1.0 - 0.6 * t,
        "grad_norm": lambda t: 0.8,
        "output_deviation": lambda t: 0.5 + t,
        "label_deviation": lambda t: 1.2,
        "data_wait": lambda t: 0.01,
        "seconds": lambda t: 0.5,
    } | {k: v for k, v in columns.items() if k != "dead"}
    lines = []
    for i in range(steps):
        t = i / max(1, steps - 1)
        line = {"step": i + 1} | {name: f(t) for name, f in healthy.items()}
        line["parts"] = {"dead_contexts": columns.get("dead", lambda t: 0.4)(t)}
        lines.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()})
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *extra])
    (train / "log.jsonl").write_text(text)
    settings = {"lr": 1e-3, "warmup_steps": 10, "clip_norm": 1.0, "workers": 2} | (settings or {})
    card = {"recipe": {"loss": {"normalization": normalization}}}
    (train / "run.json").write_text(json.dumps({"settings": settings, "card": card}))
    return folder


FAILURES = {
    "drift": ("drift: ", "anchor", {"output_deviation": lambda t: 1.2 * math.exp(3 * t)}),
    "collapse": ("collapse to a constant", "lower lr", {"output_deviation": lambda t: 1.2 * math.exp(-8 * t)}),
    "dead": ("dead contexts", "inspect", {"dead": lambda t: 5.0}),
    "lr high": ("learning rate too high", "divide lr", {"loss": lambda t: 0.5 + t}),
    "lr low": ("learning rate too low", "raise lr", {"loss": lambda t: 0.7 + 1e-4 * math.sin(50 * t)}),
    "wait": ("data wait: 40.0%", "workers", {"data_wait": lambda t: 0.4}),
    "nan": (
        "the loss or the gradient of step 100 is not finite",
        "batch",
        {"loss": lambda t: math.nan if t == 1 else 1 - t / 2},
    ),
    "clipped": ("every step is clipped", "clip_norm", {"grad_norm": lambda t: 40.0}),
}


def test_a_log_is_parsed_once_with_its_damaged_lines_counted(tmp_path, monkeypatch):
    """A log of 300,000 steps takes a minute."""
    run, parsed, real = write(tmp_path / "run"), [], trainlog._line
    with (run / "train/log.jsonl").open("a") as log:
        log.write("damaged\n")
    monkeypatch.setattr(trainlog, "_line", lambda text: parsed.append(text) or real(text))
    assert any("damaged lines of log.jsonl skipped: 1" in finding.what for finding in check_run(run))
    assert len(parsed) == 101


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_named_with_its_remedy(name, tmp_path):
    what, remedy, columns = FAILURES[name]
    found = check_run(write(tmp_path / "run", **columns))
    named = [finding for finding in found if finding.level != "ok"]
    assert [finding.what.startswith(what) for finding in named] == [True], named
    assert remedy in named[0].remedy
    assert found[0] == named[0]  # the worst first


def test_a_healthy_run_has_no_finding_and_a_growing_fresh_decoder_is_no_drift(tmp_path):
    found = check_run(write(tmp_path / "run", output_deviation=lambda t: 0.01 + t))
    assert {finding.level for finding in found} == {"ok"}


@pytest.mark.parametrize("column", ["output_deviation", "label_deviation"])
def test_deviations_without_a_number_are_told(column, tmp_path):
    found = check_run(write(tmp_path / "run", **{column: lambda t: math.nan}))
    assert found[0].what.startswith(f"scale: the {column[:-10]}'s deviation has no number") and found[1].level == "ok"


def test_held_out_loss_that_rises_is_overfitting(tmp_path):
    extra = [{"step": s, "heldout": v} for s, v in ((20, 0.6), (40, 0.5), (60, 0.6), (80, 0.7))]
    found = check_run(write(tmp_path / "run", extra=extra))
    assert found[0].what == "overfitting: held-out loss: best 0.5 at step 40, last 0.7"


def test_what_is_no_log_ends_in_one_line(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no training log; looked for" in capsys.readouterr().err.replace("\n", "")
    assert main(["doctor", "demmo"]) == 2
    assert "demmo: no such recipe, run or log; did you mean demo?" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "log.jsonl").write_text("hello\nthere\n")
    with pytest.raises(ValueError, match="not a training log"):
        check_run(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step was logged"):
        check_run(tmp_path)


def test_the_verb_says_it_and_fails_on_what_is_bad(tmp_path, capsys):
    assert main(["doctor", str(write(tmp_path / "good"))]) == 0
    assert main(["doctor", str(write(tmp_path / "bad", loss=lambda t: 0.5 + t))]) == 1
    assert "learning rate too high" in capsys.readouterr().out


def test_contexts_are_those_of_the_normalization_and_a_file_of_one_is_not_run(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit")
    for number, (name, says) in enumerate(
        (("hybrid", "2.00 of 7"), ("local", "2.00 of 4"), (str(mine), "2.00 contexts"))
    ):
        run = write(tmp_path / str(number), normalization=name, dead=lambda t: 2.0)
        assert any(f"contexts: {says}" in finding.what for finding in check_run(run)), name


@pytest.mark.parametrize(
    ("steps", "warmup", "first", "last"),
    [(100, 10, range(10, 28), range(82, 100)), (12, 2, range(2, 5), range(9, 12)), (10, 0, range(3), range(7, 10))],
)
def test_the_ends_are_a_fifth_after_the_warmup_and_at_least_three_steps(steps, warmup, first, last):
    assert _ends(range(steps), warmup) == (first, last)
