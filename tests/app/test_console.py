"""What a person sees of a run: everything that matters, on a terminal; one line, in a pipe."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from distill.app import build, cli, console
from distill.app.cli import main
from distill.app.verbs import show

NUMBERS = {
    "loss": 0.5,
    "heldout": 0.4,
    "lr": 1e-3,
    "grad_norm": 1.5,
    "output_median": 2.0,
    "output_deviation": 0.25,
    "images_per_s": 12.5,
    "data_wait": 0.031,
    "memory_bytes": 3.2e9,
    "parts/shared": 0.3,
    "parts/gradient": 0.2,
}


@pytest.fixture
def shown(monkeypatch):
    def on(terminal: bool) -> io.StringIO:
        out = io.StringIO()
        monkeypatch.setattr(console, "_err", Console(file=out, force_terminal=terminal, width=110))
        return out

    return on


def test_a_training_run_on_a_terminal_shows_its_parts_scale_rate_and_speed(shown):
    out = shown(True)
    with console.dashboard("train") as report:
        for step in range(1, 6):
            report(step, 10, **(NUMBERS | {"loss": 1.0 / step}))
    said = out.getvalue()
    for words in (
        *("train", "5/10", "0.2", "heldout 0.4", "shared 0.3", "gradient 0.2", "output median 2"),
        *("output deviation 0.25", "lr 0.001", "images/s 12.5", "data wait 3.1 %", "memory 3.2 GB", "█▄▂▁▁"),
    ):
        assert words in said, words


def test_in_a_pipe_it_is_one_line_without_the_parts(shown):
    out = shown(False)
    with console.dashboard("train") as report:
        report(1, 10, **NUMBERS)
        report(10, 10, **NUMBERS)
    assert out.getvalue().count("train") == 1 and "10/10" in out.getvalue() and "shared" not in out.getvalue()


def test_what_comes_from_data_does_not_steer_the_terminal(capsys):
    console.say("a\x1b[31m\x9b2J\u202egpj.\u2066[bold]\r\x07")
    console.fail("name \x1b]0;t\x07 \ud800\nsecond")
    console.table("t\x1b", ["c\x1b"], [["\x1b[2J"]])
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == r"a\x1b[31m\x9b2J\u202egpj.\u2066[bold]\r\x07"
    assert err.splitlines() == [r"error: name \x1b]0;t\x07 \ud800", "error: second"]
    assert not any(c in out + err for c in "\x1b\x9b\x07\u202e")


def test_off_a_terminal_long_work_says_where_it_is(shown, monkeypatch):
    out, clock = shown(False), iter(range(0, 10_000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("label") as report:
        for done in range(100, 106):
            report(done, 200, quarantined=1.0, eta_s=7200.0)  # what the work counts from its start, loading and all
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 6 and lines[-1] == "label: 105/200  quarantined 1"
    assert "items/s 0.0" in lines[1] and "eta 0:" in lines[1] and "quarantined 1" in lines[1]
    assert not any("eta 2:" in line for line in lines)


def test_work_that_others_share_has_no_eta(shown, monkeypatch):
    out, clock = shown(False), iter(range(0, 10_000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("label, this worker", eta=False) as report:
        for done in range(100, 106):
            report(done, 200)
    assert "items/s" in out.getvalue() and "eta" not in out.getvalue()


def test_quiet_leaves_results_and_errors(shown, monkeypatch):
    out = shown(False)
    monkeypatch.setattr(console, "_notes", True)
    console.quiet()
    with console.progress("label") as report:
        report(1, 2)
    console.note("a note")
    assert out.getvalue() == ""
    console.fail("broken")
    assert "broken" in out.getvalue()


def test_with_json_every_line_is_an_object(shown, monkeypatch, capsys):
    err = shown(False)
    monkeypatch.setattr(console, "_json", False)
    monkeypatch.setattr(console, "_notes", True)
    assert main(["--json", "list", "recipes"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "demo" in [row["name"] for row in json.loads(line)["rows"]]
    assert main(["doctor", "/nowhere.toml", "--json"]) == 2
    with console.progress("label") as report:
        report(3, 3, loss=float("nan"))
    console.say("3 of 3 [red]", done=3)
    told = [json.loads(line) for line in err.getvalue().splitlines()]
    assert "no such recipe" in told[0]["error"] and told[-1] == {
        "progress": "label",
        "done": 3,
        "total": 3,
        "loss": None,
    }
    assert json.loads(capsys.readouterr().out) == {"done": 3}
    assert main(["list", "recipes"]) == 0 and "demo" in capsys.readouterr().out
    assert not console._json, "one command's choice is not the next one's"


def test_a_path_in_a_table_is_never_cut(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "_out", Console(file=out, width=40, soft_wrap=True))
    path = "teachers/" + "a" * 60 + ".py"
    console.table("teachers", ["name", "from"], [["a", path], ["b", "x"]], text=True)
    assert path in out.getvalue()


def test_quiet_is_each_commands_own(shown):
    """In one process, as a notebook calls them."""
    for argv, heard in ((["list", "recipes", "--quiet"], False), (["list", "recipes"], True)):
        out = shown(False)
        assert main(argv) == 0
        console.note("by the way")
        assert ("by the way" in out.getvalue()) is heard, argv


def test_what_the_system_refuses_names_the_file_first(monkeypatch, capsys):
    def run(args):
        Path("no", "such.toml").read_text()

    monkeypatch.setattr(show, "run", run)
    assert main(["show", "demo"]) == 2
    assert capsys.readouterr().err == "error: no/such.toml: no such file or directory\n"


def test_a_name_that_is_no_run_gets_the_runs_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/own").mkdir(parents=True)
    Path("runs/own/recipe.toml").touch()
    assert main(["report", "won"]) == 2
    assert capsys.readouterr().err == "error: won: no run or recipe of that name; runs here: runs/own\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("score demo --protocol clean --list x.txt", "--list, --protocol: only for --predictions"),
        ("score demo --out x.json", "--out: a recipe's scores go to its run's folder; give --predictions"),
        ("export pocket shipped --calibrate labels/HASH", "--calibrate says how the weights are rounded to four bits"),
        ("score demo --alignment median", "--alignment: only for --predictions"),
        (
            "score --predictions maps --kind affine_disparity --benchmark nyu --set train.steps=1",
            "--set: no effect without a recipe",
        ),
        ("doctor", "doctor takes a recipe, a run's folder or its log; or --benchmark"),
        ("doctor demo --benchmark nyu", "doctor takes a recipe, a run's folder or its log; or --benchmark"),
        ("doctor demo --root data/nyu", "--root: no effect without a benchmark"),
        ("doctor demo --list FILE", "--list: no effect without a benchmark"),
        ("doctor runs/demo --set train.steps=1", "--set: no effect without a recipe"),
        ("doctor --benchmark nyu --set train.steps=1", "--set: no effect without a recipe"),
        ("verify labels/HASH --recipe own.toml", "--recipe: no effect without a repair"),
        ("verify labels/HASH --trust-recipe", "--trust-recipe: no effect without a repair"),
        ("report runs/demo --metrics rmse", "--metrics: no effect on HTML"),
        ("show --explain crops --set train.steps=1", "--set: no effect without a recipe"),
        ("compare demo --local --size 512", "--size: times models on whole images"),
        ("label demo --worker --ray", "--worker: no effect with --ray"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(capsys, words, said):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lable", "r.toml"], "did you mean label?"),
        (["list", "benchmark"], "did you mean benchmarks?"),
        (
            ["predict", "a.jpg", "--fromats", "npy"],
            "predict: error: unrecognized arguments: --fromats npy; did you mean",
        ),
        (["export", "pocket", "out", "--bits", "5"], "(choose from"),
        ([], "`distill --help` lists them"),
    ],
)
def test_a_word_that_is_no_choice_gets_the_nearest(capsys, words, said):
    with pytest.raises(SystemExit):
        main(words)
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_process_without_streams_has_a_console(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    made = runpy.run_path(console.__file__)
    made["say"]("nobody hears it")
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_the_fault_of_a_process_that_is_not_the_first_one_is_told(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(console, "ALONE_S", 0.05)
    monkeypatch.chdir(tmp_path)  # lines of 110 characters would break a long path
    for rank, quiet, said in (("", False, "error: "), ("3", True, "error: process 3: ")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(console, "_quiet", quiet)
        out = shown(False)
        console._err.quiet = quiet
        started = time.perf_counter()
        assert main(["verify", "nothing"]) == 2
        assert out.getvalue().startswith(f"{said}nothing")
        assert (time.perf_counter() - started > 0.05) or not quiet


def test_what_a_launcher_should_have_set_is_named(monkeypatch):
    for text, number in (("", 0), (" ", 0), ("-1", 0), ("2", 2)):
        monkeypatch.setenv("RANK", text)
        assert build.process()[0] == number
    monkeypatch.setenv("RANK", "$SLURM_PROCID")
    with pytest.raises(ValueError, match=r"the environment variable RANK must be a number, .* not '.SLURM_PROCID'"):
        build.process()


def test_a_number_that_is_none_does_not_end_the_work():
    words = console._words({"eta_s": float("nan"), "free_bytes": float("inf"), "loss": float("nan"), "age_s": 3700.0})
    assert words.startswith("eta s nan") and words.endswith("age 1:01:40")


@pytest.fixture
def interrupted(monkeypatch):
    """Runs `entry` with this in place of `main`; returns the exit code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def left(code):
        raise SystemExit(code)

    def run(instead):
        monkeypatch.setattr(cli, "main", instead)
        monkeypatch.setattr(cli.os, "_exit", left)
        with pytest.raises(SystemExit) as exit_:
            cli.entry()
        return exit_.value.code

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_ctrl_c_while_the_first_is_answered_is_no_traceback(interrupted):
    def pressed_twice():
        raise KeyboardInterrupt

    assert interrupted(pressed_twice) == cli.STOPPED
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # and a third one does nothing


def test_a_schedulers_notice_is_answered_like_ctrl_c_and_the_second_one_kills(interrupted):
    def told_to_end():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            return cli.STOPPED

    assert interrupted(told_to_end) == cli.STOPPED
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
