"""A report is one whole file, says what is missing, marks the right numbers, and shows what was stored."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.pairs import read_pairs
from distill.data.sources import folders
from distill.eval.benchmarks import pairs as pairs_benchmark
from distill.eval.metrics import METRICS
from distill.eval.reports import figures
from distill.eval.reports.gallery import aligned, error_position
from distill.eval.reports.page import digits
from distill.eval.reports.report import write_report
from distill.eval.reports.summary import cost_cells
from distill.eval.score import score, write_scores
from distill.labelling.run import LabelSettings, label
from distill.teachers.analytic import Teacher

VOID = {"meta", "img", "br", "wbr", "path"}


class Page(HTMLParser):
    """Checks that tags close, and collects text, images and links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def read(path) -> tuple[Page, str]:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    return page, " ".join("".join(page.text).split())


def log_lines(steps: int = 40) -> list[dict]:
    lines: list[dict] = [{"step": 1, "without_gradient": ["decoder.x"]}]
    for step in range(1, steps + 1):
        parts = {"shared": 2.0 / step, "gradient": 1.0 / step}
        scale = {"output_median": 0.1, "output_deviation": 0.5 + step / 50, "label_median": 2.0, "label_deviation": 1.0}
        line = {"step": step, "loss": 3.0 / step, "lr": 1e-4, "encoder_lr": 1e-5, "parts": parts, **scale}
        lines.append({**line, "grad_norm": 1.0, "images_per_s": 12.0, "data_wait": 0.25, "memory": 3.5})
        if step % 10 == 0:
            lines.append({"step": step, "heldout": 1.0 + abs(step - 20) / 100, "samples": 7})
    return [*lines, {"step": 30, "alarm": "the output's scale runs away: watch <it>"}, {"step": 41, "loss": None}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run with everything: three models on five pairs of one benchmark, labels by one teacher, a log."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    data = folder / "data"
    (data / "photos").mkdir(parents=True)
    rows = ["name\trgb\tdepth\tkind\tscale_to_metres\tinvalid\tdataset"]
    height, width = 40, 56
    for i in range(5):
        rgb = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC).save(data / "photos" / f"p{i}.png")
        depth = 1.5 + np.linspace(8, 0, height)[:, None] + np.cumsum(rng.random((height, width)), axis=1) / 20
        depth[:3] = 0.0
        np.save(data / f"d{i}.npy", depth.astype(np.float32))
        rows.append(f"p{i}\tphotos/p{i}.png\td{i}.npy\tdepth\t1\t0\t{'in' if i % 2 else 'out'}")
    (data / "pairs.tsv").write_text("\n".join(rows) + "\n")
    samples = pairs_benchmark.samples(data / "pairs.tsv")
    truths = {p.name: p.truth().values[0].numpy() for p in read_pairs(data / "pairs.tsv")}
    for name, kind, noise in [
        ("student", "affine_disparity", 0.9),
        ("big <teacher>", "affine_disparity", 0.02),
        ("plane baseline", "affine_depth", 2.0),
    ]:
        slug = name.replace(" ", "_")
        store = folder / "run" / "predictions" / slug / "ours"
        for sample in samples:
            depth = np.where(truths[sample.key] > 0, truths[sample.key], 5.0)
            values = depth if kind == "affine_depth" else 1 / depth
            values = values * (1 + noise * rng.random(values.shape)) * 3 - 1
            path = store / sample.prediction_path
            path.parent.mkdir(parents=True, exist_ok=True)
            if name != "plane baseline" or sample.key != "p3":
                np.save(path, values.astype(np.float32))
        result = score(store, kind, samples, pairs_benchmark.PROTOCOL, model=name, workers=1)
        write_scores(result, folder / "run" / "scores" / f"ours--{slug.replace('<', '').replace('>', '')}.json")
    label(
        folders(data / "photos"),
        [("analytic", Teacher.load())],
        out=folder / "run" / "labels" / "abc123",
        crops=crops(),
        labels=LabelSettings(licence="CC0 <mine>"),
    )
    (folder / "run" / "train").mkdir()
    lines = [json.dumps(line) for line in log_lines()]
    (folder / "run" / "train" / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 42, "lo')
    (folder / "run" / "recipe.toml").write_text(
        f'[run]\nname = "two <teachers>"\nseed = 3\n[[teachers]]\nname = "analytic"\nalias = "primary"\n'
        '[student]\nencoder = "vit_tiny"\ndecoder = "sdt"\n[train]\nsteps = 40\nbatch_size = 8\n'
        f'[[benchmarks]]\nname = "pairs"\nalias = "ours"\nroot = "{data / "pairs.tsv"}"\n'
    )
    return folder / "run"


def crops():
    from distill.core.crop_settings import CropSettings

    return CropSettings(size=28, min_side=28, patches="none")


@pytest.fixture(scope="module")
def report(run):
    return read(write_report(run))


def test_the_file_is_whole_and_asks_for_nothing(run, report):
    page, text = report
    assert {"html", "svg", "table", "details", "style", "img"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    html = (run / "report.html").read_text(encoding="utf-8")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "prefers-color-scheme:dark" in style and "url(" not in style and "@import" not in style
    assert 'name="viewport"' in html and "<teachers>" not in html and "two <teachers>" in text
    assert "<summary>With either floor of disparity</summary><" in html
    assert not list(run.glob(".report*")), "left something aside"


def test_it_says_what_was_run(report):
    _, text = report
    for fact in ("vit_tiny + sdt", "primary", "40 of 40 steps of 8", "1 at step 20", "3 models on pairs"):
        assert fact in text, fact
    for fact in ("samples5", "images’ licenceCC0 <mine>", "in quarantine0"):
        assert fact in text, fact
    assert "is damaged" not in text
    for told in ("25.0% of the time", "3.5 GiB", "watch <it>", "distill train", "seed", "analytic", "CC0 <mine>"):
        assert told in text, told


def test_scores_stand_beside_their_protocol_and_the_best_are_marked(run, report):
    html = (run / "report.html").read_text(encoding="utf-8")
    content = json.loads((run / "scores" / "ours--student.json").read_text())
    html = html[html.index('<section id="scores">') :]
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", table)
    assert [re.sub("<.*?>", "", name) for name, _ in rows[:3]] == [
        "studentscale and shift in disparity",
        "big &lt;teacher&gt;scale and shift in disparity",
        "plane baselinescale and shift in depth",
    ]
    student, best, prior = (body for _, body in rows)
    value = METRICS["abs_rel"].format.format(content["metrics"]["abs_rel"])
    assert f"<td>{value}<br><small>" in student, "the mean with its interval, and no mark"
    assert best.count('class="best"') == len(METRICS) - 2, "delta2 and delta3 are 1 of both, and nobody's"
    assert content["protocol"]["id"] in student and "<td>5</td>" in student
    assert prior.count('class="none"') == len(METRICS) and "1 failed" in prior and "title=" in prior
    assert "p3" in report[1] and "missing" in report[1] and "student · in" in report[1]


def test_pictures_show_the_worst_and_the_best_aligned_as_scored(run, report):
    page, text = report
    content = json.loads((run / "scores" / "ours--student.json").read_text())
    order = sorted(content["images"], key=lambda image: -image["metrics"]["abs_rel"])
    assert text.index(f"{order[0]['key']} the worst of 5") < text.index(f"{order[-1]['key']} the best of 5")
    pictures = [address for address in page.addresses if address.startswith("data:image/")]
    assert len(pictures) >= 4 * (2 + 2 * 2) + 2
    for address in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).size[0] <= figures.SIDE
    # An aligned prediction has the error that its score says.
    from distill.eval.score import read_scores

    result = read_scores(run / "scores" / "ours--student.json")
    sample = pairs_benchmark.samples(run.parent / "data" / "pairs.tsv")[0]
    truth = sample.truth()
    pred = aligned(run / "predictions/student/ours" / sample.prediction_path, result.images[0], result, truth)
    inside = truth.valid[0].numpy()
    error = np.abs(pred - truth.values[0].numpy())[inside] / truth.values[0].numpy()[inside]
    assert error.mean() == pytest.approx(result.images[0].metrics["abs_rel"], rel=2e-3)


def test_an_empty_run_says_what_is_missing(tmp_path):
    page, text = read(write_report(tmp_path, tmp_path / "elsewhere" / "r.html"))
    for line in ("No scores", "No pictures", "No training log", "No finished labels", "No recipe.toml"):
        assert text.count(line) == 1, line
    assert "img" not in page.tags and not (tmp_path / "report.html").exists()
    with pytest.raises(FileNotFoundError, match="nowhere: no such run"):
        write_report(tmp_path / "nowhere")


def test_a_run_of_teachers_alone_does_not_pretend_to_have_a_student(run, tmp_path):
    (tmp_path / "recipe.toml").write_text((run / "recipe.toml").read_text())
    _, text = read(write_report(tmp_path))
    assert "vit_tiny + sdt, not trained yet" in text and "teachers" in text and "taught by" not in text


def test_damaged_inputs_are_named_and_the_rest_is_written(run, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "a.json").write_text('{"version": 1')
    (tmp_path / "scores" / "b.json").write_bytes((run / "scores" / "ours--student.json").read_bytes())
    (tmp_path / "recipe.toml").write_text("[run\nname = 3")
    (tmp_path / "labels" / "x").mkdir(parents=True)
    (tmp_path / "labels" / "x" / "manifest.json").write_text("[]")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").write_text("nonsense\n")
    _, text = read(write_report(tmp_path))
    assert "a.json: not a score file" in text and "recipe.toml cannot be read" in text
    assert "manifest.json holds no JSON object" in text and "No training log" in text
    assert "student" in text and "scale and shift in disparity" in text


def test_colours_keep_order_and_grey_means_invalid():
    position = np.linspace(-0.5, 1.5, 64, dtype=np.float32)[None]
    valid = np.ones_like(position, bool)
    valid[0, 30] = False
    position[0, 40] = np.nan
    picture = figures.colourise(position, valid, figures.NEARNESS)
    bright = picture[0].astype(int).sum(-1)
    kept = [i for i in range(64) if i not in (30, 40)]
    assert (np.diff(bright[kept]) >= 0).all() and bright[0] < 60 < 600 < bright[-1]
    assert (picture[0, [30, 40]] == figures.INVALID).all()
    same = Image.open(io.BytesIO(base64.b64decode(figures.data_uri(picture).split(",")[1]))).convert("RGB")
    assert np.array_equal(np.asarray(same), picture)


def test_nearness_is_one_near_and_zero_far():
    depth = torch.tensor([[1.0, 2.0, 4.0, 16.0, 0.0, -1.0]]).numpy()
    at = figures.nearness(depth, (1.0, 16.0))
    assert np.allclose(at[0, :4], [1.0, 0.75, 0.5, 0.0])
    assert figures.depth_span(depth, np.zeros_like(depth, bool)) == (1.0, 2.0)
    flat = figures.depth_span(np.full((3, 3), 2.0), np.ones((3, 3), bool))
    assert flat[0] < flat[1]


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [1e-7, 5e3], [1.0, float("nan"), 2.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_charts_stand_whatever_the_numbers(values, log):
    x = list(range(1, len(values) + 1))
    html = figures.chart("T", [figures.Series(name="a <b>", x=x, y=values)], log=log, zero=True, marks=[(1, "here")])
    Page(html)
    numbers = [float(v) for v in re.findall(r"[ML](-?[\d.]+ -?[\d.]+)", html) for v in v.split()]
    assert numbers and all(0 <= number <= 400 for number in numbers) and "nan" not in html and "inf" not in html


@pytest.mark.parametrize(("log", "zero"), [(True, False), (False, True), (False, False)])
def test_an_axis_spans_its_numbers(log, zero):
    axis = figures._axis([5.0, 0.5, 3.0], log, zero)
    assert (axis.low == 0.0 if zero else 0.0 < axis.low < 0.5) and 5.0 < axis.high < 6.0


def test_long_curves_are_thinned_and_keep_their_level():
    y = np.sin(np.arange(20_000) / 900).tolist()
    series = figures.Series(name="a", x=list(range(20_000)), y=y)
    points = figures._thin(series)
    assert len(points) <= figures.POINTS
    assert max(abs(v - np.sin(x / 900)) for x, v in points) < 1e-2
    assert figures.chart("T", [figures.Series(name="a", x=[], y=[])]) == ""
    html = figures.chart("T", [figures.Series(name="a", x=[1, 2, 3], y=[4, 5, 6])])
    assert 'x="50.0" y="220" text-anchor="start">1<' in html and 'text-anchor="end">3<' in html  # clear of "step"


def test_smoothing_has_no_bias_at_the_start():
    assert figures.smooth([4.0] * 5) == pytest.approx([4.0] * 5)
    assert figures.smooth([4.0, 0.0], 0.5) == pytest.approx([4.0, 4 / 3])


def test_errors_are_shown_by_their_logarithm():
    at = error_position(np.array([0.0, 0.01, 0.1, 0.3, 1.0, 5.0]))
    assert at[0] < 0 and np.allclose(at[1:5], [0, 0.5, 0.7386, 1.0], atol=1e-3) and at[5] > 1
    assert error_position(np.array([0.3]))[0] < 0.8, "30 % is not yet black"


def test_the_points_of_a_laser_are_seen():
    valid = np.zeros((600, 900), bool)
    valid[7::40, 11::45] = True  # one pixel in 1800: every n-th pixel would meet few of them
    depth = np.where(valid, np.arange(900.0) / 900, 0.0)
    drawn = figures.dots(valid)
    picture = drawn.picture(depth, valid, figures.NEARNESS)
    seen = (picture != figures.INVALID).any(-1)
    assert max(picture.shape[:2]) <= figures.SIDE and 0.2 < seen.mean() < 0.8
    colours = {tuple(c) for c in picture[seen]}
    assert colours <= {tuple(c) for c in figures.colourise(depth, valid, figures.NEARNESS)[valid]}, "none is mixed"
    assert len(colours) == len({tuple(c) for c in figures.colourise(depth, valid, figures.NEARNESS)[valid]})
    empty = figures.dots(np.zeros_like(valid)).picture(depth, valid & False, figures.NEARNESS)
    assert (empty == figures.INVALID).all()


def test_a_run_where_nothing_of_the_papers_was_run_has_no_papers(report):
    page, text = report
    assert "#papers" not in page.addresses and "numbers of the papers" not in text
    assert page.addresses.index("#short") < page.addresses.index("#scores")
    assert "On pairs (5 images), student has AbsRel" in text and "torch 2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (4.5, "4.5"), (22.0, "22"), (999.7, "1,000"), (1276.4, "1,276"), (0.0, "0")],
)
def test_costs_have_three_digits_and_no_exponent(value, text):
    assert digits(value) == text


def test_a_large_teachers_costs_can_be_read():
    cost = {
        "weight_bytes": 1.34e9,
        "parameters": 1.13e9,
        "flops": 1.276e12,
        "latency_s": 12.3456,
        "memory_bytes": 2.5e9,
    }
    assert cost_cells(cost) == ["1,340 MB", "1,130 M", "1,276", "12,346", "2,500 MB"]
