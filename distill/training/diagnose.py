"""Diagnoses a training run from its log: names each failure, with its numbers and the remedy.

The failures are those reported by people who re-implement Distill-Any-Depth: the output's scale runs away, the output
collapses to a constant, contexts carry no information, the learning rate is too high or too low, the GPU waits for
data. Thresholds are ours.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.core.findings import Finding
from distill.core.plugins import PluginError, find, names
from distill.core.seal import is_broken
from distill.core.wording import counted
from distill.training import trainlog

FEWEST = 10
"""The smallest number of steps to judge."""
DRIFT, COLLAPSE = 3.0, 0.02
"""A ratio of the output's deviation to its labels' above the first, or below the second, is a failure."""

Line = dict[str, Any]


def find_log(path: Path) -> Path:
    """The log of `path`: a log, a run's folder or its train folder. FileNotFoundError names the paths tried."""
    candidates = [path] if path.is_file() else [path / "log.jsonl", path / "train" / "log.jsonl"]
    existing = [candidate for candidate in candidates if candidate.is_file()]
    if not existing:
        raise FileNotFoundError(f"{path}: no training log; looked for {' and '.join(map(str, candidates))}")
    return existing[0]


def check_run(path: Path) -> list[Finding]:
    """All findings, the worst first. path: see `find_log`. Raises ValueError for a file that is not a log."""
    log = find_log(path)
    try:
        lines, damaged = trainlog.read_and_count(log)
        run = _about(log.with_name("run.json"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{log}: not a training log ({error}); give the log.jsonl of a run") from error
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ValueError(f"{log}: no step was logged; the run stopped before its first step")
    settings: Line = (run or {}).get("settings", {})
    findings = [*_stopped(steps, log), *_idle(lines), *_damage(log.name, damaged, run)]
    finite = [line for line in steps if line["loss"] is not None and line["grad_norm"] is not None]
    if len(finite) < FEWEST:
        findings.append(
            Finding("warn", f"only {counted(len(finite), 'step')}: too few to judge", "train longer and run this again")
        )
    else:
        warmup = min(int(settings.get("warmup_steps", 0)), len(finite) // 2)
        findings += [
            _scale(finite, warmup),
            _contexts(finite, run or {}),
            _rate(finite, warmup, settings),
            _gradient(finite, settings),
            _waiting(finite, settings),
            *_held_out(lines),
        ]
    order = ("bad", "warn", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _about(path: Path) -> Line | None:
    """The content of run.json; {} where there is none, None where it is damaged."""
    try:
        run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return None
    return run if isinstance(run, dict) and not is_broken(run) and isinstance(run.get("settings", {}), dict) else None


def _damage(log: str, damaged: int, run: Line | None) -> list[Finding]:
    findings = []
    if damaged:
        findings.append(Finding("warn", f"damaged lines of {log} skipped: {damaged}", "check the disk for faults"))
    if run is None:
        findings.append(Finding("warn", "run.json is damaged and was not used", "distill train rewrites it"))
    return findings


def _mean(lines: Sequence[Line], name: str) -> float:
    """The mean of the numbers of a column; NaN where none of the lines has one."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def _ends(lines: Sequence[Line], warmup: int) -> tuple[Sequence[Line], Sequence[Line]]:
    """The first fifth after the warm-up, and the last fifth."""
    after = lines[warmup:]
    size = max(3, len(after) // 5)
    return after[:size], after[-size:]


def _stopped(steps: Sequence[Line], log: Path) -> list[Finding]:
    bad = [line["step"] for line in steps if line["loss"] is None or line["grad_norm"] is None]
    if not bad:
        return []
    dumped = sorted(log.parent.glob(f"bad_batch_{bad[-1]}*"))
    where = f"; the batch is in {dumped[0]}" if dumped else ""
    remedy = "check that batch's labels; if they are correct, lower lr or clip_norm"
    return [Finding("bad", f"the loss or the gradient of step {bad[-1]} is not finite{where}", remedy)]


def _idle(lines: Sequence[Line]) -> list[Finding]:
    idle = [name for line in lines for name in line.get("without_gradient", [])]
    if not idle:
        return []
    message = f"{counted(len(idle), 'parameter')} without a gradient: {', '.join(idle[:3])}"
    return [Finding("warn", message, "harmless for a mask token; otherwise the decoder does not use that part")]


def _scale(steps: Sequence[Line], warmup: int) -> Finding:
    """Drift and collapse of the output's deviation relative to its labels'."""
    deviations = ("output_deviation", "label_deviation")
    if not any(name in line for line in steps for name in deviations):
        return Finding("ok", "scale: not logged")
    for name in deviations:
        if any(math.isnan(_mean(part, name)) for part in _ends(steps, warmup)):
            whose = name.partition("_")[0]
            message = f"scale: the {whose}'s deviation has no number in the first or the last fifth of the steps"
            return Finding("warn", message, "check with `distill inspect` that labels have valid pixels")
    first, last = [
        _mean(part, "output_deviation") / max(_mean(part, "label_deviation"), 1e-12) for part in _ends(steps, warmup)
    ]
    numbers = f"the output's deviation went from {first:.3g} to {last:.3g} times the labels'"
    if last > DRIFT and last > 1.5 * first:
        remedy = (
            "set loss.anchor = 0.05, or loss.label_only = true; an invariant loss alone can only enlarge the output"
        )
        return Finding("bad" if last > 3 * DRIFT else "warn", f"drift: {numbers}", remedy)
    if last < COLLAPSE:
        remedy = "lower lr, warm up longer, and check the labels with `distill inspect`"
        return Finding("bad", f"collapse to a constant: {numbers}", remedy)
    return Finding("ok", f"scale: {numbers}")


def _contexts(steps: Sequence[Line], run: Line) -> Finding:
    dead = [line["parts"]["dead_contexts"] for line in steps if "dead_contexts" in line.get("parts", {})]
    if not dead:
        return Finding("ok", "contexts: not logged")
    loss = run.get("card", {}).get("recipe", {}).get("loss", {})
    total = _number_of_contexts(loss.get("normalization", ""))
    mean = statistics.fmean(dead)
    of = f" of {total}" if total else ""
    message = f"{mean:.2f}{of} contexts carry no information (too few pixels, or a constant label)"
    if total and mean > 0.5 * total:
        remedy = "labels are flat or mostly invalid: check them with `distill inspect`, or normalize globally"
        return Finding("bad", f"dead contexts: {message}", remedy)
    return Finding("ok", f"contexts: {message}")


def _number_of_contexts(normalization: str) -> int | None:
    """Contexts per label; None where unknown, e.g. for a normalization file, which reading a log must not execute."""
    folder = "distill.losses.normalize"
    try:
        return max(1, sum(find(folder, normalization).LEVELS)) if normalization in names(folder) else None
    except (LookupError, PluginError):
        return None


def _rate(steps: Sequence[Line], warmup: int, settings: Line) -> Finding:
    """Whether the loss fell after the warm-up: a rise means a rate that is too high, a plateau one that is too low."""
    first, last = (_mean(part, "loss") for part in _ends(steps, warmup))
    change = (last - first) / max(abs(first), 1e-12)
    lr = settings.get("lr")
    trend = f"the loss went from {first:.4g} to {last:.4g} ({change:+.0%}) after the warm-up" + (
        f", lr {lr:g}" if lr else ""
    )
    if change > 0.1:
        return Finding("bad", f"learning rate too high: {trend}", "divide lr by 3 to 10, or warm up longer")
    if abs(change) < 0.01 and len(steps) >= 5 * FEWEST:
        remedy = "raise lr, or unfreeze more, unless the student had already converged at the start"
        return Finding("warn", f"learning rate too low, or converged: {trend}", remedy)
    return Finding("ok", f"learning rate: {trend}")


def _gradient(steps: Sequence[Line], settings: Line) -> Finding:
    limit = float(settings.get("clip_norm") or 0.0)
    norms = [line["grad_norm"] for line in steps]
    middle, largest = statistics.median(norms), max(norms)
    message = f"gradient norm: median {middle:.3g}, largest {largest:.3g}" + (
        f", clipped at {limit:g}" if limit else ""
    )
    if limit and middle > 10 * limit:
        return Finding(
            "warn", f"every step is clipped: {message}", "lower lr, or raise clip_norm: gradients are far above it"
        )
    return Finding("ok", message)


def _waiting(steps: Sequence[Line], settings: Line) -> Finding:
    timed = [line for line in steps[1:] if "data_wait" in line and "seconds" in line]
    if not timed:
        return Finding("ok", "data wait: not logged")
    wait = sum(line["data_wait"] * line["seconds"] for line in timed) / sum(line["seconds"] for line in timed)
    message = f"{wait:.1%} of the time is spent waiting for data (workers: {settings.get('workers', '?')})"
    if wait > 0.05:
        remedy = 'raise train.workers; keep the labels on a local disk; store them with labels.codec = "zst"'
        return Finding("bad" if wait > 0.3 else "warn", f"data wait: {message}", remedy)
    return Finding("ok", f"data wait: {message}")


def _held_out(lines: Sequence[Line]) -> list[Finding]:
    evaluations = [(line["step"], line["heldout"]) for line in lines if line.get("heldout") is not None]
    if len(evaluations) < 3:
        return []
    step, best = min(evaluations, key=lambda pair: pair[1])
    last = evaluations[-1][1]
    message = f"held-out loss: best {best:.4g} at step {step}, last {last:.4g}"
    if last > 1.1 * best:
        return [
            Finding(
                "warn",
                f"overfitting: {message}",
                "add images, raise crops.crops_per_image, or set patience to stop early",
            )
        ]
    return [Finding("ok", message)]
