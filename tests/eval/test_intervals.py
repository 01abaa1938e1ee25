"""A mean's interval, and when one model may be called the best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample, pairs
from distill.eval.cost import Cost, _reset_peak
from distill.eval.intervals import distinguishable, interval, rank_marks
from distill.eval.reports.summary import summary, verdict
from distill.eval.score import score
from distill.eval.scorefile import ImageScore
from tests.eval.test_papers import a_score


def a_model(name: str, values, **more):
    images = tuple(ImageScore(f"i{i}", "", {"abs_rel": float(v)}) for i, v in enumerate(values))
    return a_score(abs_rel=float(np.mean(values)), model=name, images=images, **more)


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(1).normal(0.2, 0.05, 200)
    low, high = interval(values)
    half = 1.96 * values.std() / 200**0.5
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)
    assert interval(values) == (low, high), "the same at every call"
    many = np.random.default_rng(2).gamma(2.0, 0.1, 2001)
    drawn, normal = interval(many[:2000]), interval(many)
    assert drawn == pytest.approx(normal, rel=5e-3), "the two ways agree where they meet"
    half = 1.959964 * many.std(ddof=1) / 2001**0.5
    assert normal == pytest.approx((many.mean() - half, many.mean() + half), rel=1e-9)
    assert interval(values, seed=1) not in ((low, high), None) and interval(values[:5]) is not None
    assert interval(values[:4]) is None and interval([*values, float("nan")]) is None


def test_best_only_where_the_images_tell():
    rng = np.random.default_rng(2)
    hard = rng.uniform(0.1, 0.5, 40)  # what images have in common does not blur the difference
    good, same, bad = hard, hard + rng.normal(0.001, 0.01, 40), hard + rng.normal(0.02, 0.01, 40)
    scores = [a_model("good", good), a_model("bad", bad)]
    assert distinguishable(*scores, "abs_rel") and rank_marks(scores, "abs_rel", lower_is_better=True) == [1, 0]
    assert rank_marks(scores, "abs_rel", lower_is_better=False) == [0, 1]
    shared = [a_model("same", same), *scores, None]
    assert not distinguishable(shared[0], shared[1], "abs_rel")
    assert rank_marks(shared, "abs_rel", lower_is_better=True) == [2, 2, 0, 0]
    assert rank_marks([None, scores[0]], "abs_rel", lower_is_better=True) == [0, 0], "the best of one"
    assert rank_marks([a_model("a", [0.1] * 3), a_model("b", [0.2] * 3)], "abs_rel", lower_is_better=True) == [0, 0]


def test_the_verdict_is_one_sentence_with_cost():
    rng = np.random.default_rng(3)
    hard = rng.uniform(0.1, 0.3, 30)
    cost = {"images": 9, "latency_s": 0.05, "device": "a CPU", "image": "48 x 64", "parameters": 2_000_000}
    scores = [
        a_model("student", hard + 0.02, cost=cost),
        a_model("teacher", hard, cost=cost | {"latency_s": 0.2}),
        a_model("plane baseline", hard + 0.2 + rng.normal(0, 0.01, 30)),
    ]
    said = verdict(scores)
    assert "worse than teacher" in said and "better than the plane baseline" in said and said.count(". ") == 0
    assert "50 ms an image of 48 x 64 on a CPU, 0.25 times as long as teacher" in said
    page = summary(scores)
    assert page.index(said[:20]) < page.index("<table>") and "2 M" in page and page.count("<circle") == 2
    assert "was not measured" in summary([a_model("student", hard)])


def test_the_verdict_is_about_the_benchmark_with_most_images_and_no_column_is_empty():
    rng = np.random.default_rng(4)
    many = rng.uniform(0.1, 0.3, 30)
    one = [a_model("student", [0.09], benchmark="motorcycle")]
    lots = [
        a_model("student", many),
        a_model("plane baseline", many + rng.normal(0, 0.1, 30)),
    ]
    said = verdict([*one, *lots])
    assert said.startswith(f"On {lots[0].benchmark} (30 images)") and "not clearly better or worse than the pl" in said
    assert verdict(one).startswith("On motorcycle (1 image), ")
    page = summary([*one, *lots])
    assert "GFLOPs" not in page.partition("<p")[2].partition("<table>")[2].partition("</table>")[0]


def test_cost_counts_flops_time_and_memory():
    class Tiny:
        def __init__(self) -> None:
            self.net = torch.nn.Conv2d(3, 1, 3, padding=1)
            self.card = None

        def predict(self, images):
            values = self.net(images)[:, 0].detach()
            return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)

    cost = Cost()
    teacher = cost.timed(cost.attach(Tiny()))
    for _ in range(3):
        teacher.predict(torch.zeros(1, 3, 10, 12))
    found = cost.summary(None)
    assert found["flops"] == 2 * 27 * 120 and found["parameters"] == 28 and found["weight_bytes"] == 112
    assert found["images"] == 2 and 0 < found["latency_s"] < 1 and found["image"] == "10 x 12"
    assert "threads" in found["device"] and Cost().summary(found) == found, "the fuller measurement stays"


def test_metres_and_unknown_units_have_no_common_mean(tmp_path):
    rng = np.random.default_rng(5)
    samples = []
    for name, kind in (("m", Kind.METRIC_DEPTH), ("u", Kind.SCALE_DEPTH)):
        values = torch.from_numpy(rng.uniform(1, 5, (1, 12, 16)).astype(np.float32))
        truth = DepthMap(values, torch.ones_like(values, dtype=torch.bool), kind)
        samples.append(BenchmarkSample(name, f"{name}.npy", lambda: torch.zeros(3, 12, 16), lambda t=truth: t, name))
        np.save(tmp_path / f"{name}.npy", (values[0].numpy() * rng.uniform(0.9, 1.1, (12, 16))).astype(np.float32))
    got = score(tmp_path, "scale_depth", samples, pairs.PROTOCOL, workers=1)
    in_metres = {"sq_rel", "rmse", "i_rmse"}
    assert {name for name, value in got.metrics.items() if value is None} == in_metres
    assert {name for name, value in got.pooled.items() if value is None} == in_metres
    assert got.groups["m"]["metrics"]["rmse"] > 0 and got.groups["u"]["metrics"]["rmse"] is None
    assert all(image.metrics["rmse"] > 0 for image in got.images), "each image keeps its own"
    assert score(tmp_path, "scale_depth", samples[:1], pairs.PROTOCOL, workers=1).metrics["rmse"] > 0


def test_the_peak_of_every_card_is_forgotten(monkeypatch):
    """The model may be on another one than the current."""
    forgotten = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    _reset_peak()
    assert forgotten == [0, 1]


def test_what_was_on_the_card_before_is_not_the_models(monkeypatch):
    def inspected(self, teacher) -> None:
        self.device, self.weight_bytes = "cuda:1", 112

    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "reset_peak_memory_stats": lambda card: None,
        "memory_allocated": lambda card: {0: 7, 1: 5000}[card],
        "max_memory_allocated": lambda card: {"cuda:1": 5000 + 112 + 30}[card],
        "get_device_name": str,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Cost, "_inspect", inspected)
    cost = Cost()
    cost.load_and_measure(object)
    assert cost.summary(None)["memory_bytes"] == 112 + 30
