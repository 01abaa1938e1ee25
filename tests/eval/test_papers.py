"""Papers' numbers beside ours, and scores as tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from distill.app.cli import main
from distill.core.depth import Kind
from distill.core.plugins import find, names
from distill.eval.papers import PaperNumber, Scored, paper_numbers, verdicts
from distill.eval.reports.scoreboard import paper_table
from distill.eval.reports.tables import as_latex, as_markdown, as_text, grid
from distill.eval.scorefile import ImageScore, Score, write_scores
from distill.eval.tasks import TASKS
from distill.eval.verdict import margin

ROOT = Path(__file__).parents[2]
LARGE = "depth-anything/Depth-Anything-V2-Large"
USED = {"benchmark": "nyu", "resize": "native", "native_size": 518, "dtype": "float32"}


def a_score(benchmark: str = "nyu", abs_rel: float = 0.045, delta1: float = 0.979, **changes) -> Score:
    kind, spread = changes.pop("kind", Kind.AFFINE_DISPARITY), changes.pop("spread", 0.0)
    mode, alignment = changes.pop("mode", None), changes.pop("alignment", "auto")
    protocol = changes.pop("protocol", find("distill.eval.benchmarks", benchmark).PROTOCOL)
    metrics = dict.fromkeys(TASKS[protocol.task].rows, 0.5)
    metrics |= {"abs_rel": abs_rel, "delta1": delta1} if protocol.task == "depth" else {}
    each = [metrics | {"abs_rel": abs_rel + spread * (-1) ** i} for i in range(6)]
    values = {
        "model": "dav2",
        "benchmark": benchmark,
        "protocol": (protocol.in_mode(mode) if mode else protocol).with_kind(kind, alignment),
        "kind": kind,
        "images": tuple(ImageScore(f"i{i}", "", one) for i, one in enumerate(each)),
        "metrics": metrics,
        "pooled": metrics,
        "floors": {},
        "groups": {},
    }
    return Score(**(values | changes))


def of(found, benchmark: str, metric: str = "abs_rel", paper: str = "Distill Any Depth", where: str = "Table 5"):
    wanted = (paper, where, "Depth Anything V2-L", benchmark, metric)
    return next(
        v
        for v in found
        if (v.number.paper, v.number.where, v.number.model, v.number.benchmark, v.number.metric) == wanted
    )


def test_the_numbers_are_the_papers():
    numbers = paper_numbers()
    said = re.search(r"holds (\d+) numbers of four papers", (ROOT / "eval/README.md").read_text())
    assert said and len(numbers) == int(said[1]) and len({n.paper for n in numbers}) == 4

    def value(paper: str, where: str, model: str, benchmark: str, metric: str = "abs_rel") -> float:
        (found,) = [
            n.value
            for n in numbers
            if (n.paper, n.where, n.model, n.benchmark, n.metric) == (paper, where, model, benchmark, metric)
        ]
        return found

    ours = "Distill-Any-Depth, Depth Anything V2-L"
    assert value("Distill Any Depth", "Table 5", ours, "eth3d") == 0.054
    assert value("Distill Any Depth", "Table 5", ours, "diode", "delta1") == 0.753
    assert value("Distill Any Depth", "Table 1", "local-global, none", "eth3d") == 0.273
    assert value("Distill Any Depth", "Table 4", "both, averaged", "diode") == 0.371
    assert value("FiffDepth", "Table 1", "GenPercept (depth)", "kitti") == pytest.approx(0.13)
    assert value("FiffDepth", "Table 1", "FiffDepth", "eth3d", "delta1") == pytest.approx(0.972)
    assert value("FiffDepth", "Table 1", "GeoWizard", "da2k", "accuracy") == pytest.approx(0.881)
    assert value("FiffDepth", "Table 2", "Depth Pro", "p3m10k", "boundary_recall") == 0.168
    assert all(0 < n.value < 1 and 0 < n.tolerance < 0.05 for n in numbers)


def test_the_effects_that_pages_quote_are_those_of_the_papers_numbers():
    """As a study measures them: how much lower the first row's AbsRel is, as a share of the second's."""
    tables = {"Table 1", "Table 2", "Table 4", "Table 5"}
    printed = {
        (n.where, n.model, n.benchmark): n.value
        for n in paper_numbers()
        if n.paper == "Distill Any Depth" and n.where in tables and n.metric == "abs_rel"
    }

    def mean(where: str, model: str) -> float:
        return (printed[where, model, "eth3d"] + printed[where, model, "diode"]) / 2

    def gain(where: str, first: str, second: str, other: str = "") -> float:
        return 100 * margin(mean(where, first), mean(other or where, second))

    def page(name: str) -> str:
        return " ".join((ROOT / name).read_text().split())

    readme, results = page("README.md"), page("docs/results.md")
    hybrid = gain("Table 1", "shared context, hybrid", "shared context, global")
    patches = gain("Table 1", "local-global, hybrid", "local-global, global")
    none = gain("Table 1", "local-global, global", "local-global, none")
    assert f"paper +{hybrid:.1f})" in readme and f"(paper: +{hybrid:.1f}, +{patches:.1f} %)" in results
    assert f"better; paper {none:.0f})" in readme and f"lower (paper: {none:.0f} %)" in results
    assert f"(paper: +{gain('Table 2', 'shared context alone', 'neither'):.1f} %)" in results
    assert f"(paper: lose {-gain('Table 1', 'local-global, hybrid', 'shared context, hybrid'):.1f} %)" in results
    average = f"(paper: +{gain('Table 4', 'both, selected', 'both, averaged'):.0f} %)"
    assert average in readme and average in results
    assert f"| {gain('Table 4', 'both, selected', 'both', 'Table 2'):.1f} % by its own tables |" in results

    def assistant(benchmark: str) -> float:
        dav2, genpercept = "Depth Anything V2-L", "GenPercept (disparity)"
        return 100 * margin(printed["Table 5", genpercept, benchmark], printed["Table 5", dav2, benchmark])

    better = sorted(map(assistant, ("diode", "eth3d")))
    worse = sorted(-assistant(benchmark) for benchmark in ("kitti", "nyu", "scannet"))
    assert f"{better[0]:.0f} to {better[-1]:.0f} % better" in results
    assert f"{worse[0]:.0f} to {worse[-1]:.0f} % worse" in results


def test_the_saved_flops_that_a_page_quotes_are_those_of_the_table():
    table = (ROOT / "students/efficiency.md").read_text()
    cells = r"\| dinov3_vitl16 \| {} \|.*?\| \d+ \| ([\d.]+) \(([\d.]+)\) \|"
    sdt, dpt = (re.search(cells.format(name), table).groups() for name in ("sdt", "dpt 512"))
    ours, theirs = (100 * (1 - float(a) / float(b)) for a, b in zip(sdt, dpt, strict=True))
    said = f"saves {ours:.0f} % of DPT's FLOPs as counted here; {theirs:.0f} % by AnyDepth's table"
    assert said in (ROOT / "recipes/anydepth/README.md").read_text()


def test_released_weights_of_rows_are_those_of_cards():
    """And Table 5's student is the file that begins with DAv2-L's encoder and is taught by it, not the demo."""
    cards = {card.weights for name in names("distill.teachers") for card in find("distill.teachers", name).CARDS}
    assert {w for n in paper_numbers() for w in n.weights} - cards == {"depth_anything_v2_vitl.pth"}
    ours = "Distill-Any-Depth, Depth Anything V2-L"
    assert all("Dav2-Teacher-Large-2w-iter" in n.weights[0] for n in paper_numbers() if n.model == ours)


@pytest.mark.parametrize(
    ("abs_rel", "status"), [(0.045, "within"), (0.0477, "within"), (0.0478, "outside"), (0.0422, "outside")]
)
def test_ours_is_within_or_outside(abs_rel, status):
    found = verdicts([Scored(a_score(abs_rel=abs_rel), LARGE, USED)])
    assert of(found, "nyu").status == status and of(found, "nyu").ours == abs_rel
    assert of(found, "nyu", paper="FiffDepth", where="Table 1").status == status
    assert of(found, "kitti").status == "not run" and "no score of these weights" in of(found, "kitti").reason
    assert sum(v.status != "not run" for v in found) == 4


@pytest.mark.parametrize(
    ("changes", "weights", "reason"),
    [
        ({"mode": "clean"}, LARGE, "scored by the clean protocol"),
        ({"alignment": "median"}, LARGE, "aligned differently: scale by medians in disparity"),
        ({"images": (ImageScore("a", "", None, "x", True),)}, LARGE, "1 image failed"),
        ({}, "depth-anything/Depth-Anything-V2-Small", "no score of these weights"),
        ({}, "", "no score of these weights"),
        ({}, "weights/my_depth_anything_v2_vitl.pth", "no score of these weights"),
    ],
)
def test_what_depends_on_something_else_is_not_run(changes, weights, reason):
    got = of(verdicts([Scored(a_score(**changes), weights, USED)]), "nyu")
    assert got.status == "not run" and got.ours is None and reason in got.reason


MARIGOLD = {"resize": "native", "native_size": 756, "steps": 50, "ensemble": 10, "dtype": "float32"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"steps": 1}, "predicted differently: steps 1, not 50"),
        ({"steps": 1, "ensemble": 1}, "steps 1, not 50; ensemble 1, not 10"),
        ({"resize": "none"}, "resize none, not native"),
        ({"native_size": 768}, "native_size 768, not 756"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, not float32"),
        (None, "is not recorded"),
    ],
)
def test_a_teacher_used_otherwise_does_not_answer(changes, reason):
    used = {} if changes is None else MARIGOLD | changes
    scored = Scored(a_score("eth3d", abs_rel=0.065, kind=Kind.AFFINE_DEPTH), "prs-eth/marigold-depth-v1-0", used)
    found = [v for v in verdicts([scored]) if v.number.model == "Marigold" and v.number.benchmark == "eth3d"]
    assert {v.status for v in found if v.number.metric == "abs_rel"} == {"not run" if reason else "within"}
    assert all(reason in v.reason for v in found)


def test_what_a_papers_row_was_run_with():
    rows = {
        (n.paper, n.model, n.benchmark): n.required_settings
        for n in paper_numbers()
        if n.weights and n.where != "Table 4"
    }
    assert rows["FiffDepth", "Marigold", "diode"] == MARIGOLD | {"native_size": 640}
    assert rows["Distill Any Depth", "GenPercept (disparity)", "nyu"]["native_size"] == 0
    assert all(asked["resize"] == "native" and "native_size" in asked for (*_, b), asked in rows.items() if b != "da2k")


def test_other_images_and_unreleased_weights_are_not_run():
    nyu = find("distill.eval.benchmarks", "nyu").PROTOCOL
    fewer = a_score(protocol=replace(nyu, num_images=2, list_sha256="0"))
    got = of(verdicts([Scored(fewer, "x/depth_anything_v2_vitl.pth", USED)]), "nyu")
    assert got.status == "not run" and "2 images that are not the published list" in got.reason
    both = [Scored(fewer, LARGE, USED), Scored(a_score(), "x/depth_anything_v2_vitl.pth", USED)]
    assert of(verdicts(both), "nyu").status == "within", "the score that may answer does"
    unreleased = [v for v in verdicts(both) if v.number.model == "FiffDepth"]
    assert {v.reason for v in unreleased} == {"the row names no released weights"}
    da2k = of(verdicts([Scored(a_score("da2k"), LARGE, USED)]), "da2k", "accuracy", "FiffDepth", "Table 1")
    assert da2k.status == "not run" and "unpublished" in da2k.reason


def test_the_report_shows_paper_beside_ours(tmp_path):
    html = paper_table(verdicts([Scored(a_score(), LARGE, USED)]))
    assert f"{len(paper_numbers())} numbers of the papers: 4 within, 0 outside" in html
    text = re.sub(r"<[^>]+>", " ", html)
    assert re.search(r"Table 5\s+Depth Anything V2-L\s+nyu\s+abs_rel\s+0\.0450 ± 0\.002[78]\s+0\.0450\s+within", text)
    assert "outside" in paper_table(verdicts([Scored(a_score(abs_rel=0.9), LARGE, USED)]))
    assert paper_table(verdicts([])) == ""
    number = PaperNumber(
        paper="<b>",
        where="",
        model="<i>",
        benchmark="nyu",
        metric="abs_rel",
        value=1.0,
        tolerance=0.1,
        weights=(),
        protocol="",
    )
    assert "<i>" not in paper_table(verdicts([], [number]))


# --- tables -----------------------------------------------------------------------------------------------------------


def scores() -> list[Score]:
    return [
        a_score(abs_rel=0.05, delta1=0.9),
        a_score(abs_rel=0.07, delta1=0.95, model="a_model & co", kind=Kind.SCALE_DEPTH),
        a_score(abs_rel=0.06, delta1=0.8, model="third", spread=0.05),
        a_score("da2k", model="third"),
        a_score(mode="clean", abs_rel=0.04, model="third"),
        a_score(abs_rel=0.9, delta1=0.1, model="third", alignment="median"),
    ]


def test_a_table_of_models_and_benchmarks():
    table = grid(scores())
    assert table.head == [
        "model", "aligned", "nyu (marigold) abs_rel ↓", "nyu (marigold) delta1 ↑", "da2k accuracy ↑",
        "nyu (clean) abs_rel ↓", "nyu (clean) delta1 ↑",
    ]  # fmt: skip
    assert [row[0].text for row in table.rows] == ["dav2", "a_model & co", "third", "third"]
    assert table.rows[2][1].text == "scale and shift in disparity" and "medians" in table.rows[3][1].text
    # dav2 leads by .01, which six images that differ by .1 do not tell from third's; its delta1 nobody shares.
    assert [row[2].rank for row in table.rows] == [2, 0, 2, 0] and [row[3].rank for row in table.rows] == [0, 1, 0, 0]
    assert table.rows[0][4].text == "-" and table.rows[2][4].text == "0.5000" and len(table.notes) == 3
    head, rows = as_text(table)
    assert head == table.head and rows[0][2] == "0.0500+" and rows[1][3] == "0.9500*"


def test_markdown_and_latex_are_marked_and_escaped():
    markdown = as_markdown(grid(scores())).splitlines()
    assert len({line.count("|") for line in markdown[:6]}) == 1 and "**0.9500**" in markdown[3]
    assert "<u>0.0600</u>" in markdown[4] and markdown[1].endswith("---: |")
    latex = as_latex(grid(scores()))
    assert r"\textbf{0.9500}" in latex and r"\underline{0.0600}" in latex and r"a\_model \& co" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 5 and {len(re.findall(r"(?<!\\)&", line)) for line in body} == {6}
    assert r"abs\_rel $\downarrow$" in latex and latex.count(r"\begin{tabular}{llrrrrr}") == 1
    lost = a_score(images=(ImageScore("a", "", None, "x", True), ImageScore("b", "", None)))
    assert grid([lost]).rows[0][2].text == "0.0450 (without 1)"


@pytest.mark.parametrize(("form", "said"), [("md", "| model |"), ("latex", r"\toprule"), ("text", "* best")])
def test_the_verb_prints_a_runs_scores(tmp_path, capsys, form, said):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--format", "pdf"])
    assert main(["report", str(tmp_path), "--format", form]) == 2 and "no scores" in capsys.readouterr().err
    for i, score in enumerate(scores()):
        write_scores(score, tmp_path / f"scores/{i}.json")
    assert main(["report", str(tmp_path), "--format", form]) == 0
    out = capsys.readouterr().out
    assert said in out and "0.0500" in out
    (tmp_path / "scores/bad.json").write_text("{}")
    assert main(["report", str(tmp_path), "--format", form, "--metrics", "rmse"]) == 1
    again = capsys.readouterr()
    assert "rmse" in again.out and "bad.json: not a score file" in again.err
