"""filter.html: what `distill filter` kept and dropped, beside AnyDepth's table, with histograms and pictures.

For each source and rule the page shows the samples with the worst scores, and those nearest to its threshold on either
side, to be looked at before a threshold is moved. Pictures are read again; scores are not.

Shapes: H, W of an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from distill.app.filtering import Rules, Source, Verdict
from distill.core import files
from distill.core.wording import counted
from distill.data.quality import SCORES
from distill.eval.reports.figures import NEARNESS, bars, histogram, legend, own_colours, shrink, tile
from distill.eval.reports.page import details, missing, page, pairs, table

SHOWN = 4
"""Number of worst samples, and of samples on either side of the threshold, for each rule."""


def write_page(verdicts: Sequence[Verdict], out: Path, rules: Rules) -> Path:
    """Writes OUT/filter.html."""
    sections = [("counts", "Kept and dropped", _counts(verdicts))]
    for number, verdict in enumerate(verdicts):
        content = _histograms(verdict) + _pictures(verdict, rules) + _errors(verdict)
        sections.append((f"source{number}", verdict.source.name, content))
    total, kept = (sum(map(len, parts)) for parts in zip(*((v.reasons, v.kept) for v in verdicts), strict=True))
    facts = pairs(
        [
            ("samples", f"{total:,}"),
            ("kept", f"{kept:,} ({kept / max(1, total):.1%})"),
            ("fewer valid pixels than", f"{rules.valid:.0%}"),
            ("worst of", ", ".join(f"{name} {share:.0%}" for name, share in rules.worst.items())),
            ("cuts", ", ".join(f"{name} {sign} {bound:g}" for name, sign, bound in rules.cuts)),
        ]
    )
    path = out / "filter.html"
    files.write_text(path, page(out.name, facts, sections, what="Data filter"))
    return path


def _counts(verdicts: Sequence[Verdict]) -> str:
    """The table of sources: our counts and means, then AnyDepth's if it has them."""
    rows = []
    for verdict in verdicts:
        facts = verdict.source.facts
        means = [_mean(verdict.scores[name]) for name in ("s_dist", "s_grad", "total")]
        ours = [f"{len(verdict.reasons):,}", f"{len(verdict.kept):,}", *means]
        theirs = ["-"] * 5
        if facts is not None and facts.kept:
            mean_total = sum(facts.means) / 2
            theirs = [f"{facts.images:,}", f"{facts.kept:,}", *(f"{m:.3f}" for m in (*facts.means, mean_total))]
        rows.append([escape(verdict.source.name), *ours, *theirs])
    head = ["source", "samples", "kept", "s_dist", "s_grad", "total"]
    head += [f"AnyDepth: {word}" for word in ("samples", "kept", "s_dist", "s_grad", "total")]
    why = Counter(reason for verdict in verdicts for reason in verdict.reasons if reason)
    reasons = table(["dropped for", "samples"], [[escape(r), f"{n:,}"] for r, n in why.most_common()], kind="scores")
    return table(head, rows, kind="scores") + (reasons if why else missing("nothing was dropped"))


def _mean(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else "-"


def _histograms(verdict: Verdict) -> str:
    charts = []
    for number, (name, values) in enumerate(verdict.scores.items()):
        known = values[np.isfinite(values)]
        if known.size:
            high = 1.0 if known.max() <= 1.0 else float(known.max())
            note = f"{SCORES[name].words}; median {np.median(known):.3f}, {counted(known.size, 'sample')}"
            heights = histogram(list(known), 0.0, high)
            charts.append(bars(name, heights, ("0", f"{high:.3g}"), note=note, colour=number % 5 + 1))
    return f'<div class="charts">{"".join(charts)}</div>'


def _pictures(verdict: Verdict, rules: Rules) -> str:
    """For each rule on a score: the worst samples, and those on either side of its threshold."""
    parts = [legend("each map in its own range", NEARNESS, [(0.0, "far"), (1.0, "near")], missing="invalid")]
    shares: Mapping[str, float] = dict(rules.worst) | {name: 0.0 for name, *_ in rules.cuts}
    for name, share in shares.items():
        values = verdict.scores[name]
        known = np.flatnonzero(np.isfinite(values) & (verdict.scores["valid"] >= rules.valid))
        if not known.size:
            continue
        order = known[np.argsort(values[known] if SCORES[name].high_is_good else -values[known], kind="stable")]
        border = int(share * len(order)) or _num_cut(verdict, name, order, rules)
        near_border = order[max(0, border - SHOWN) : border + SHOWN]
        parts.append(f"<h3>{escape(name)}: the worst</h3>{_strips(verdict.source, order[:SHOWN], values, verdict)}")
        parts.append(f"<h3>{escape(name)}: at the border</h3>{_strips(verdict.source, near_border, values, verdict)}")
    return "".join(parts)


def _num_cut(verdict: Verdict, name: str, order: np.ndarray, rules: Rules) -> int:
    """How many of the samples in `order` a cut of this score drops."""
    for score, sign, bound in rules.cuts:
        if score == name:
            values = verdict.scores[name][order]
            return int(np.count_nonzero(values < bound if sign == "<" else values > bound))
    return 0


def _strips(source: Source, numbers: np.ndarray, values: np.ndarray, verdict: Verdict) -> str:
    tiles = []
    for number in numbers.tolist():
        try:
            sample = source.load(number)
        except (OSError, ValueError, LookupError) as error:
            tiles.append(missing(f"{source.names[number]}: {error}"))
            continue
        picture = own_colours(sample.depth, sample.valid, larger_is_nearer=sample.nearer)
        state = verdict.reasons[number] or "kept"
        tiles.append(
            f"<div>{tile(source.names[number], shrink(sample.image), photo=True)}"
            f"{tile(state, shrink(picture), note=f'{values[number]:.3f}')}</div>"
        )
    return f'<div class="strip">{"".join(tiles)}</div>'


def _errors(verdict: Verdict) -> str:
    if not verdict.errors:
        return ""
    rows = [[escape(verdict.source.names[n]), escape(error)] for n, error in list(verdict.errors.items())[:500]]
    return details(f"{len(verdict.errors)} could not be read", table(["sample", "reason"], rows, kind="reasons"))
