"""The report of a run: one HTML file on its settings, its scores and how to repeat it; it opens offline.

Everything comes from the run's folder (recipe.toml, train/log.jsonl, labels*/**/manifest.json, scores/*.json,
predictions/MODEL/BENCHMARK/) and, for the pictures, from the benchmarks that the recipe names. Missing or unreadable
input is replaced by one line that says so; the rest of the report is still written.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.addresses import public
from distill.eval.papers import Scored, verdicts
from distill.eval.reports import figures
from distill.eval.reports.fidelity import fidelity_section
from distill.eval.reports.gallery import UNREADABLE, Recipe, gallery
from distill.eval.reports.page import details, missing, page, pairs, table
from distill.eval.reports.repeat import repeat_section
from distill.eval.reports.scoreboard import paper_table, scoreboard
from distill.eval.reports.summary import summary
from distill.eval.score import Score, read_scores
from distill.eval.stored import read_settings
from distill.shards.shards import LabelDataset
from distill.training.trainlog import read as read_log

LABELS = 4
"""Labelled regions shown of each folder of labels."""


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `out` (default: run_dir/report.html) and return its path.

    Raises FileNotFoundError if the folder does not exist; other problems are reported in the report itself.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run; give the folder that distill train or distill score wrote")
    path = Path(out) if out is not None else run_dir / "report.html"
    recipe, recipe_text, recipe_fault = _recipe(run_dir)
    scores, score_faults = read_run_scores(run_dir)
    log = _log(run_dir)
    folders = _label_folders(run_dir, recipe)
    name = str(recipe.get("run", {}).get("name", "") or run_dir.resolve().name)
    papers = paper_table(verdicts(_with_weights(run_dir, scores)))
    sections = [
        ("short", "In short", summary(scores)),
        ("scores", "Scores", scoreboard(scores, score_faults)),
        ("fidelity", "Fidelity", fidelity_section(run_dir, scores)),
        *([("papers", "Papers", papers)] if papers else []),
        ("pictures", "Pictures", gallery(run_dir, recipe, scores)),
        ("training", "Training", _training_section(log)),
        ("labels", "Labels", _label_section(folders)),
        ("recipe", "Recipe", _recipe_section(recipe_text, recipe_fault)),
        ("again", "How to repeat it", repeat_section(run_dir, recipe, scores)),
    ]
    facts = _facts(recipe, scores, log, folders)
    files.write_text(path, page(name, facts, sections))
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def _recipe(run_dir: Path) -> tuple[Recipe, str, str]:
    """The resolved recipe as a table and as text, and what is wrong with it."""
    path = run_dir / "recipe.toml"
    try:
        text = public(path.read_text(encoding="utf-8"))  # earlier versions stored addresses as they were given
        return tomllib.loads(text), text, ""
    except FileNotFoundError:
        return {}, "", "No recipe.toml in the run's folder: distill writes it with every run."
    except UNREADABLE as error:
        return {}, "", f"recipe.toml cannot be read: {error}."


def read_run_scores(run_dir: Path) -> tuple[list[Score], list[str]]:
    """The score files of a run in the order of a table, and a line for each that cannot be read."""
    scores, faults = [], []
    for path in sorted((run_dir / "scores").glob("*.json")):
        try:
            scores.append(read_scores(path))
        except UNREADABLE as error:
            faults.append(str(error))
    # The student first, the baseline that ignores the image last.
    place = {"student": 0, "plane baseline": 2}
    return sorted(scores, key=lambda s: (s.benchmark, s.protocol.setting, place.get(s.model, 1), s.model)), faults


def _with_weights(run_dir: Path, scores: Sequence[Score]) -> list[Scored]:
    """Each score with the weights, and their settings, that are recorded with its stored predictions."""
    scored = []
    for score in scores:
        stores = (run_dir / "predictions" / score.model.replace(" ", "_")).glob("*")
        settings = [_settings(store) for store in sorted(stores)]
        weights = {str(entry["settings"].get("weights", "")) for entry in settings} - {""}
        used = [entry["used"] for entry in settings if entry["used"].get("benchmark") == score.benchmark]
        # One benchmark under two aliases may have been predicted in two ways, and a score does not record its alias.
        unique = bool(used) and all(entry == used[0] for entry in used)
        scored.append(Scored(score, weights.pop() if len(weights) == 1 else "", used[0] if unique else {}))
    return scored


def _settings(store: Path) -> dict[str, Any]:
    try:
        return read_settings(store) or {"settings": {}, "used": {}}
    except UNREADABLE:
        return {"settings": {}, "used": {}}


def _log(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_log(run_dir / "train" / "log.jsonl")
    except UNREADABLE:
        return []


def _label_folders(run_dir: Path, recipe: Recipe) -> list[Path]:
    """Folders of finished labels: below the run, or those of the same images, crops and teachers in labels.root."""
    folders = [
        path.parent for place in ("labels*", "labels*/*") for path in sorted(run_dir.glob(f"{place}/manifest.json"))
    ]
    root = recipe.get("labels", {}).get("root", "")
    for path in sorted(Path(root).glob("*/manifest.json")) if root else []:
        made_by = _manifest(path.parent)[0].get("recipe", {})
        if all(made_by.get(part) == recipe.get(part) for part in ("images", "crops", "teachers")):
            folders.append(path.parent)
    return folders


def _manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """A labels folder's manifest, and what is wrong with it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return (
            (manifest, "") if isinstance(manifest, dict) else ({}, f"{folder / 'manifest.json'} holds no JSON object.")
        )
    except UNREADABLE as error:
        return {}, f"{folder / 'manifest.json'} cannot be read: {error}."


def _facts(recipe: Recipe, scores: Sequence[Score], log: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> str:
    """A short summary of what was run."""
    student, train = recipe.get("student", {}), recipe.get("train", {})
    teachers = [t.get("alias") or t.get("name", "") for t in recipe.get("teachers", [])]
    heldout = [line for line in log if line.get("heldout") is not None]
    best = min((line for line in heldout if line["step"]), key=lambda line: line["heldout"], default=None)
    steps = max((line["step"] for line in log if line.get("loss") is not None), default=0)
    samples = sum(int(_manifest(folder)[0].get("samples", 0)) for folder in folders)
    planned = train.get("steps", 0)
    benchmarks = dict.fromkeys(s.benchmark for s in scores)
    parts = " + ".join(str(student[k]) for k in ("encoder", "decoder") if student.get(k))
    trained = bool(steps) or any(s.model == "student" for s in scores)
    return pairs(
        [
            ("student", parts if trained or not parts else f"{parts}, not trained yet"),
            ("taught by" if trained else "teachers", ", ".join(teachers)),
            ("labelled regions", f"{samples:,}" if samples else ""),
            ("training", f"{steps:,} of {planned or steps:,} steps of {train.get('batch_size', '?')}" if steps else ""),
            ("best held-out loss", f"{best['heldout']:.4g} at step {best['step']:,}" if best else ""),
            ("scored", f"{len({s.model for s in scores})} models on {', '.join(benchmarks)}" if scores else ""),
        ]
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _training_section(log: Sequence[Mapping[str, Any]]) -> str:
    steps = [line for line in log if line.get("loss") is not None]
    if not steps:
        return missing("No training log: train/log.jsonl is absent or has no step yet; run distill train.")
    heldout = [line for line in log if line.get("heldout") is not None]
    alarms = [(line["step"], line["alarm"]) for line in log if "alarm" in line]
    alarm_lines = "".join(f'<p class="bad">Step {step:,}: {escape(text)}.</p>' for step, text in alarms)
    x = [line["step"] for line in steps]
    parts = list(dict.fromkeys(name for line in steps for name in line.get("parts", {})))
    shares = [_line(steps, x, name, i, part=True) for i, name in enumerate(parts, 2)]
    loss = [line["loss"] for line in steps]
    best = min((line for line in heldout if line["step"]), key=lambda line: line["heldout"], default=None)
    charts = [
        figures.chart(
            "Loss",
            [
                figures.Series(name="each step", x=x, y=loss, style="faint"),
                figures.Series(name="smoothed", x=x, y=figures.smooth(loss)),
            ],
            zero=True,
        ),
        figures.chart("Parts of the loss, unweighted", shares, log=True, note="Smoothed."),
        figures.chart(
            "Held-out loss",
            [
                figures.Series(
                    name="held-out", x=[h["step"] for h in heldout], y=[h["heldout"] for h in heldout], style="points"
                )
            ],
            note=f"Lowest at step {best['step']:,}: {best['heldout']:.4g}. It selects the best checkpoint."
            if best
            else "",
        )
        if len(heldout) > 1
        else "",
        figures.chart(
            "Output scale: mean deviation",
            [_line(steps, x, "output_deviation", 1), _line(steps, x, "label_deviation", 6)],
            log=True,
            marks=alarms,
            note="A shift- and scale-invariant loss does not fix this: it may drift upwards, but must not diverge.",
        ),
        figures.chart(
            "Output scale: median",
            [_line(steps, x, "output_median", 1), _line(steps, x, "label_median", 6)],
            marks=alarms,
        ),
        figures.chart(
            "Learning rate", [_line(steps, x, n, i, raw=True) for n, i in (("lr", 1), ("encoder_lr", 2))], zero=True
        ),
        figures.chart("Gradient norm", [_line(steps, x, "grad_norm", 1)], log=True, note="Smoothed."),
    ]
    drawn = [chart for chart in charts if chart]
    # Three or four in a row, whichever leaves less of the last row empty.
    least = 275 if len(drawn) % 4 in (0, 3) else 340
    return (
        f'{alarm_lines}<dl class="plain">{_speed(steps)}</dl>'
        f'<div class="charts" style="--least:{least}px">{"".join(drawn)}</div>'
    )


def _line(
    steps: Sequence[Mapping[str, Any]],
    x: Sequence[float],
    name: str,
    colour: int,
    *,
    part: bool = False,
    raw: bool = False,
) -> figures.Series:
    """A number of the log as a smoothed line; steps that lack it are left out."""
    numbers = [
        (step, line.get("parts", {}).get(name) if part else line.get(name)) for step, line in zip(x, steps, strict=True)
    ]
    known = [(step, float(value)) for step, value in numbers if value is not None]
    values = [value for _, value in known]
    title = name if part else {"lr": "decoder", "encoder_lr": "encoder"}.get(name, name.split("_")[0])
    colour = min(colour, 6)
    return figures.Series(
        name=title, x=[s for s, _ in known], y=values if raw else figures.smooth(values, 0.9), colour=colour
    )


def _speed(steps: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str) -> float | None:
        values = [line[name] for line in steps if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    speed, wait = mean("images_per_s"), mean("data_wait")
    memory = max((line["memory"] for line in steps if line.get("memory") is not None), default=None)
    return pairs(
        [
            ("images per second", f"{speed:.1f}" if speed else ""),
            ("waiting for data", f"{wait:.1%} of the time" if wait is not None else ""),
            ("peak GPU memory", f"{memory:.1f} GiB" if memory else ""),
        ]
    )


# --- labels -----------------------------------------------------------------------------------------------------------


def _label_section(folders: Sequence[Path]) -> str:
    if not folders:
        return missing(
            "No finished labels: labels/ holds no manifest.json; run distill label, unless the run labels online."
        )
    sections = []
    for folder in folders:
        try:
            sections.append(_labels(folder))
        except (TypeError, ValueError, AttributeError, LookupError):  # a manifest that was edited
            sections.append(missing(f"{folder / 'manifest.json'} is damaged: run distill verify on its folder."))
    return "".join(sections)


def _labels(folder: Path) -> str:
    manifest, fault = _manifest(folder)
    if fault:
        return missing(fault)
    images, shards = manifest.get("images", {}), manifest.get("shards", [])
    quarantine = manifest.get("quarantine", [])
    size = sum(shard.get("bytes", 0) for shard in shards)
    facts = pairs(
        [
            ("samples", f"{manifest.get('samples', 0):,}"),
            ("images", f"{images.get('count', 0):,}"),
            ("tars", f"{len(shards):,}, {size / 2**20:,.1f} MiB"),
            ("images’ licence", str(manifest.get("licence", {}).get("images") or "not stated")),
            ("hash of the image list", str(images.get("sha256", ""))[:16]),
            ("in quarantine", f"{len(quarantine):,}"),
        ]
    )
    cards = [_card(name, card) for name, card in manifest.get("teachers", {}).items()]
    head = ["teacher", "weights", "revision", "depth kind", "stored as", "licence", "commercial use"]
    rows = [[escape(str(line.get(key, ""))) for key in ("key", "origin", "reason")] for line in quarantine]
    reasons = Counter(str(line.get("reason", "")).split(":")[0] for line in quarantine).most_common(4)
    frequent = "; ".join(f"{count} {reason}" for reason, count in reasons)
    return (
        f'<h3>{escape(folder.name)}</h3><dl class="plain">{facts}</dl>{table(head, cards)}'
        + details(
            f"Quarantined images: {frequent}", table(["image", "from", "reason"], rows, kind="reasons") if rows else ""
        )
        + _label_pictures(folder)
    )


def _card(name: str, card: Mapping[str, Any]) -> list[str]:
    allowed = card.get("commercial")
    commercial = "unknown" if allowed is None else "allowed" if allowed else "not allowed"
    stored = card.get("stored", [])
    cells = [name, card.get("weights", ""), str(card.get("revision", ""))[:16], card.get("kind", "")]
    cells += [", ".join(map(str, stored)), card.get("licence", ""), commercial]
    return [escape(str(cell)) for cell in cells]


def _label_pictures(folder: Path) -> str:
    """A few regions with every teacher's label, at equal steps through the folder."""
    strips = []
    try:
        dataset = LabelDataset(folder)
        for index in sorted({round(k * (len(dataset) - 1) / max(1, LABELS - 1)) for k in range(LABELS)}):
            sample = dataset[index]
            photo = sample.image.permute(1, 2, 0).numpy()
            tiles = [figures.tile(sample.key, figures.shrink(photo), photo=True)]
            for name, labels in sample.labels.items():
                values, valid = labels.shared.values[0].numpy(), labels.shared.valid[0].numpy()
                at = figures.own_range(values, valid)
                at = at if labels.shared.kind.larger_is == "nearer" else 1.0 - at
                picture = figures.shrink(figures.colourise(at, valid, figures.NEARNESS))
                tiles.append(figures.tile(name, picture, note=f"{valid.mean():.0%} valid"))
            strips.append(f"<div>{''.join(tiles)}</div>")
    except UNREADABLE as error:
        return missing(f"No pictures of labels: {error}")
    ends = figures.legend(
        "each label on its own scale", figures.NEARNESS, [(0.0, "far"), (1.0, "near")], missing="invalid"
    )
    return f'{ends}<div class="strip">{"".join(strips)}</div>'


# --- recipe, repetition -----------------------------------------------------------------------------------------------


def _recipe_section(text: str, fault: str) -> str:
    if fault:
        return missing(fault)
    lines = text.count("\n")
    return details(f"recipe.toml as it was resolved, defaults included ({lines} lines)", f"<pre>{escape(text)}</pre>")
