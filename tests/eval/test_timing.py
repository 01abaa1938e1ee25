"""How long a model takes: 20 calls after warm-up, beside what the papers print."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from distill.app import comparison
from distill.app.cli import main
from distill.eval import timing


def test_the_median_of_calls_after_warm_up(monkeypatch):
    seen = []
    ticks = iter([x for i in range(23) for x in (float(i), float(i) + (9.0 if i < 3 else 0.1 * (i % 5 + 1)))])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    took = timing.run_time(lambda image: seen.append(image.shape), 16, torch.device("cpu"))
    assert len(seen) == 23 and seen[0] == (1, 3, 16, 16)
    assert took.seconds == pytest.approx(0.3) and took.slowest == pytest.approx(0.5), (
        "the slow first three are left out"
    )
    assert took.calls == 20 and took.device.startswith("CPU")


def test_table_3_of_fiffdepth():
    printed = {one.model: one for one in timing.paper_run_times()}
    assert printed["FiffDepth"].seconds == 0.092 and printed["Depth Anything V2-L"].seconds == 0.026
    assert {one.size for one in printed.values()} == {512}


def test_compare_times_every_model_where_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "run_time", partial(timing.run_time, calls=2))  # 20 take a while
    recipe = tmp_path / "r.toml"
    teachers = "".join(f'[[teachers]]\nname = "analytic"\nalias = "{name}"\n' for name in ("a", "b"))
    recipe.write_text(
        f'[run]\nname = "t"\nout = "{tmp_path}/run"\ndevice = "cpu"\n[[images]]\nscenes = 1\nsize = 32\n{teachers}'
    )
    assert main(["compare", str(recipe), "--size", "512"]) == 0
    found = json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())["run_time"]
    assert found.keys() == {"a", "b"} and found["a"]["calls"] == 2 and found["a"]["size"] == 512
    told = capsys.readouterr()
    assert "FiffDepth, Table 3" in told.out + told.err and "0.092" in told.out + told.err
    assert "run time of a at 512" in (tmp_path / "run" / "compare.html").read_text()
