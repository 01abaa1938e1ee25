"""The page of a comparison, one offline HTML file: which models agree, what each adds, and where they disagree.

It is written from measured numbers (distill.eval.compare.ModelComparison) and stored maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distill.core import files
from distill.eval import agreement
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import PROTOCOL, TRUTH, ModelComparison
from distill.eval.reports import figures
from distill.eval.reports.disagreement import gallery
from distill.eval.reports.page import details, digits, name, page, pairs, table

WORTH = 0.05
"""An addition below this counts as none."""
REPLACES = 0.85
"""An assistant that is better in this share of the regions or more would replace the primary."""
_MIN_TRUTHS = 3  # fewest images with truth whose mean is stated in a sentence

MEASURES = {
    "error": ("Error", "↓", "what is left after the best scale and shift, as a fraction of the map’s spread: 0 is an "
              "affine copy, 1 is nothing in common"),
    "order": ("Order", "↑", "how often both agree on which of two random points is nearer: 1 is always, 0.5 is by "
              "chance"),
    "edges": ("Edges", "↑", "F1 of the two maps’ edges: where they jump within a hundredth of the image’s longer side, "
              "by five thresholds"),
    "sky": ("Sky", "↓", "the share of the image that one of them puts at its far end, or declares invalid, and the "
            "other does not"),
}  # fmt: skip


# --- sentences --------------------------------------------------------------------------------------------------------


def sentences(comparison: ModelComparison) -> list[str]:
    """Sentences on which models agree, and on which assistant adds information to which primary."""
    names = [model["name"] for model in comparison.models]
    if len(names) < 2:
        return [
            f"Only {names[0]} is there: a comparison needs two models." if names else "There is nothing to compare."
        ]
    statements = [_agreement_sentence(comparison)] if comparison.pairs else []
    return [line for line in [*statements, *(_addition_sentence(comparison, primary) for primary in names)] if line]


def _agreement_sentence(comparison: ModelComparison) -> str:
    selected = [row for row in comparison.pairs if row["b"] != TRUTH and row["error"] is not None]
    if not selected:
        return ""
    far = max(selected, key=lambda row: row["error"])
    near = min(selected, key=lambda row: row["error"])
    text = f"{far['a']} and {far['b']} are the furthest apart (error {far['error']:.2f}, order {_show(far['order'])})"
    if len(selected) == 1:
        return f"{far['a']} and {far['b']}: error {far['error']:.2f}, order {_show(far['order'])}."
    return f"{near['a']} and {near['b']} agree best (error {near['error']:.2f}); {text}."


def ranking(comparison: ModelComparison, primary: str) -> tuple[str, list[dict[str, Any]]]:
    """The measure that ranks a primary's assistants, and their rows, the best first; for both sentences and table.

    "mixing" if enough images have a truth, else "complement".
    """
    rows = [row for row in comparison.additions if row["a"] == primary]
    known = [row for row in rows if row.get("mixing") is not None and row["images"].get("mixing", 0) >= _MIN_TRUTHS]
    measure = "mixing" if known else "complement"
    rows.sort(key=lambda row: -1.0 if row.get(measure) is None else float(row[measure]), reverse=True)
    return measure, rows


def _addition_sentence(comparison: ModelComparison, primary: str) -> str:
    measure, rows = ranking(comparison, primary)
    ranked = [row for row in rows if row.get(measure) is not None]
    if not ranked:
        return ""
    if measure == "mixing":
        return _known_sentence(primary, ranked)
    best = ranked[0]
    between = {(row["a"], row["b"]): row for row in comparison.pairs}
    pair = between.get((primary, best["b"])) or between.get((best["b"], primary)) or {}
    numbers = f"new edges {best['news']:.0%}, error {_show(pair.get('error'))}, complement {best['complement']:.2f}"
    if best["complement"] < WORTH:
        return (
            f"Judged by edges (there is no truth), no model adds much to {primary}: {best['b']} adds the most, "
            f"{numbers}."
        )
    return f"Judged by edges (there is no truth), {best['b']} adds the most to {primary}: {numbers}."


def _known_sentence(primary: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The sentence on a primary's assistants, by their errors against the truth."""
    best = rows[0]
    ahead = max(rows, key=lambda row: row["share"])
    better = (
        f" {ahead['b']} is better than {primary} in {ahead['share']:.0%} of the regions: it would replace it, not "
        "assist it."
        if ahead["share"] >= REPLACES
        else ""
    )
    if best["mixing"] < WORTH:
        return (
            f"No model adds much to {primary}: taking the better of two maps in each region lowers the error by at "
            f"most {best['mixing']:.0%} ({best['b']}; {best['images']['mixing']} images with truth).{better}"
        )
    return (
        f"{best['b']} adds the most to {primary}: the better of the two in each region has {best['mixing']:.0%} less "
        f"error than the better one alone, and {best['gain']:.0%} less than {primary} ({best['b']} is better in "
        f"{best['share']:.0%} of the regions; {best['images']['mixing']} images with truth).{better}"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _show(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _millions(value: float | None) -> str:
    return "–" if not value else f"{value / 1e6:.1f} M" if value < 1e9 else f"{value / 1e9:.2f} B"


def models_table(comparison: ModelComparison) -> str:
    """The compared models with their scores and costs."""
    with_truth = any(image["truth"] for image in comparison.images)
    head = ["model", *(["AbsRel ↓", "δ1 ↑"] if with_truth else []), "sharpness ↑", "edges on image ↑"]
    head += ["ms an image", "GFLOPs", "parameters", "memory"]
    rows = []
    for model in comparison.models:
        cost, numbers = model["cost"], model["numbers"]
        truth = [_show(numbers.get("abs_rel"), "{:.3f}"), _show(numbers.get("delta1"), "{:.3f}")]
        rows.append(
            [
                f"{name(model['name'])}<br><small>{escape(model['card']['kind'])}</small>",
                *(truth if with_truth else []),
                _show(numbers.get("sharpness"), "{:.3f}"),
                _show(numbers.get("on_image"), "{:.0%}"),
                digits(1000 * cost["latency_s"]) if cost.get("latency_s") else "–",
                digits(cost["flops"] / 1e9) if cost.get("flops") else "–",
                _millions(cost["parameters"]),
                _bytes(cost["memory_bytes"]),
            ]
        )
    return table([escape(cell) for cell in head], rows, kind="scores")


def score_against_time(comparison: ModelComparison) -> str:
    """A chart of AbsRel against milliseconds an image; nothing below two models with both."""
    points = [
        (1000 * model["cost"]["latency_s"], model["numbers"]["abs_rel"], model["name"])
        for model in comparison.models
        if model["cost"].get("latency_s") and model["numbers"].get("abs_rel") is not None
    ]
    if len(points) < 2:
        return ""
    note = "lower and further left is better"
    chart = figures.scatter("AbsRel against ms an image", points, across="ms", note=note)
    return f'<div class="charts">{chart}</div>'


def cards_table(comparison: ModelComparison) -> str:
    """What the models' cards say, the licence of the weights first."""
    rows = []
    for model in comparison.models:
        card = model["card"]
        options = [f"{k}={v}" for k, v in sorted(model["settings"].items()) if k in ("dtype", "options") and v]
        rows.append(
            [
                name(model["name"]),
                "yes" if card["commercial"] else '<span class="bad">no</span>',
                escape(card["licence"]),
                escape(card["code_licence"]),
                f"{name(card['weights'])}<br><small>revision {escape(card['revision'])}</small>",
                f"{'nearer' if card['kind'].endswith('disparity') else 'farther'}",
                f"{card['native_size'] or 'as given'}, × {card['multiple']}",
                name(", ".join(options)),
            ]
        )
    head = ["model", "commercial", "licence of weights", "of code", "weights", "larger is", "native size"]
    return table([escape(cell) for cell in [*head, "settings"]], rows, kind="reasons")


def matrices(comparison: ModelComparison) -> str:
    """One table for each measure, models by models and against the truth, coloured by how bad the value is."""
    names = [model["name"] for model in comparison.models]
    columns = [*names[1:], TRUTH] if any(row["b"] == TRUTH for row in comparison.pairs) else names[1:]
    by_pair = {(row["a"], row["b"]): row for row in comparison.pairs}
    parts = []
    for key, (title, arrow, explanation) in MEASURES.items():
        worst = {"error": 1.0, "sky": 0.5, "order": 0.5, "edges": 0.0}[key]
        best = 0.0 if arrow == "↓" else 1.0
        rows = []
        shown = [b for b in columns if any(by_pair.get((a, b), {}).get(key) is not None for a in names)]
        for a in names:
            cells = [_heat(by_pair.get((a, b), {}).get(key), best, worst) for b in shown]
            if any(cells):
                rows.append([name(a), *cells])
        grid = table(["", *(name(b) for b in shown)], rows, kind="scores")
        parts.append(f'<div class="chart"><b>{title}&nbsp;{arrow}</b><p>{escape(explanation)}</p>{grid}</div>')
    columns_style = "grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))"
    return f'<div class="charts" style="{columns_style}">{"".join(parts)}</div>'


def _heat(value: float | None, best: float, worst: float) -> str:
    if value is None:
        return ""
    share = min(1.0, max(0.0, (value - best) / (worst - best)))
    colour = f"background:color-mix(in srgb,var(--s2) {round(55 * share)}%,transparent)"
    return f'<span style="{colour};padding:2px 6px;border-radius:4px">{value:.2f}</span>'


def additions_table(comparison: ModelComparison) -> str:
    """Every (primary, assistant), the best assistant of a primary marked."""
    rows = []
    with_truth = any(row.get("gain") is not None for row in comparison.additions)
    for model in comparison.models:
        measure, selected = ranking(comparison, model["name"])
        for i, row in enumerate(selected):
            cells = [_show(row.get(key), "{:.0%}") for key in (("mixing", "gain", "share") if with_truth else ())]
            cells += [_show(row.get("news"), "{:.0%}"), _show(row.get("complement"))]
            if i == 0 and row.get(measure) is not None and row[measure] >= WORTH:
                index = 0 if measure == "mixing" else len(cells) - 1
                cells[index] = f'<span class="best">{cells[index]}</span>'
            rows.append([name(row["a"]), f'<span class="text">{name(row["b"])}</span>', *cells])
    head = [
        "primary",
        "assistant",
        *(["mixing ↑", "gain ↑", "better in"] if with_truth else []),
        "new edges",
        "complement ↑",
    ]
    note = (
        "<b>Gain</b>: how much taking the better of the two maps in each of "
        f"{agreement.CELLS} × {agreement.CELLS} regions lowers the primary’s error, both aligned once to the whole "
        "truth. <b>Mixing</b>: the same relative to the better of the two alone; 0 if one is better everywhere. It "
        "says whether they complement each other. Both are upper bounds on what a selection rule can gain; two equally "
        "good models with independent errors mix well too. <b>Better in</b>: the share of regions where the assistant "
        "is better. "
        if with_truth
        else ""
    )
    note += (
        "<b>New edges</b>: the assistant’s edges on edges of the picture that the primary lacks or has less than half "
        "as steep, minus as many as chance explains (noise has edges elsewhere too), as a share of its own or the "
        "primary’s edges, whichever are more. <b>Complement</b>: (1 − error) × new edges; high where both see the same "
        "scene and the assistant sees more detail. It needs no truth."
    )
    return table([escape(cell) for cell in head], rows, kind="scores") + f'<p class="key">{note}</p>'


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(
    comparison: ModelComparison,
    samples: Sequence[BenchmarkSample],
    folder: Path,
    out: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    remarks: Sequence[str] = (),
    again: str = "",
) -> Path:
    """Write the page to `out` and return its path. folder: the stored maps. remarks: lines about what was left out."""
    count = sum(image["truth"] for image in comparison.images)
    statements = "".join(f"<li>{escape(line)}</li>" for line in sentences(comparison))
    devices = list(dict.fromkeys(model["cost"]["device"] for model in comparison.models))
    about = [
        ("models", ", ".join(model["name"] for model in comparison.models)),
        ("images", f"{len(comparison.images)}, {count} with truth"),
        ("predicted on", "; ".join(devices)),
        *facts,
    ]
    sections = [
        ("short", "In short", f"<ul>{statements}</ul>"),
        ("models", "Models", _models_section(comparison)),
        ("agreement", "Agreement", matrices(comparison)),
        ("additions", "Who adds what to whom", additions_table(comparison)),
        ("pictures", "Where they disagree", gallery(comparison, samples, folder)),
        ("made", "Weights, licences, settings", _settings_section(comparison, remarks, again)),
    ]
    files.write_text(out, page(title, pairs(about), sections, what="Comparison of depth models"))
    return out


def _models_section(comparison: ModelComparison) -> str:
    tables = f"<div>{models_table(comparison)}{_models_key(comparison)}</div>"
    return f'<div class="beside">{tables}{score_against_time(comparison)}</div>'


def _models_key(comparison: ModelComparison) -> str:
    note = "AbsRel and δ1 by the clean protocol, to 80 metres, each model aligned in its own quantity. "
    return (
        f'<p class="key">{note if any(i["truth"] for i in comparison.images) else ""}Sharpness: how steep a map’s '
        "steps are; a smeared step is less steep. Noise is steep too: then few of its edges lie on the "
        "image’s. Time: the median of single images, without the first, at the size compared here. FLOPs: 2 "
        "per multiply-add. Memory: what loading and predicting added to the process, or the accelerator’s peak.</p>"
    )


def _settings_section(comparison: ModelComparison, remarks: Sequence[str], again: str) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in remarks)
    protocol = [(key, str(value)) for key, value in PROTOCOL.as_dict().items()]
    return (
        cards_table(comparison)
        + details(f"Remarks ({len(remarks)})", f'<ul class="lines">{lines}</ul>' if lines else "")
        + details("The protocol of AbsRel and δ1", f'<dl class="plain">{pairs(protocol)}</dl>')
        + (f"<pre>{escape(again)}</pre>" if again else "")
    )
