"""The contact sheet of a labels folder: regions beside their labels, histograms, quarantine, where teachers disagree.

A page to check before a day of training. Samples are spaced evenly over the whole folder, the same ones every time.
With two teachers, the samples on which they disagree most are shown too; disagreement is measured after the best
scale and shift (distill.eval.agreement.alignment_error), since neither is known.

Maps are H x W.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from distill.core import files
from distill.core.align import fit_affine
from distill.core.depth import DepthMap
from distill.core.labels import Labels
from distill.core.progress import Report
from distill.core.wording import counted
from distill.eval.agreement import alignment_error, to_disparity
from distill.eval.reports.fidelity import agreement
from distill.eval.reports.figures import BINS, NEARNESS, bars, histogram, legend, own_colours, own_range, shrink, tile
from distill.eval.reports.page import details, missing, page, pairs, table
from distill.shards.codec import Sample
from distill.shards.shards import MANIFEST, LabelDataset, read_manifest

MEASURED = 200  # samples in the histograms, at most
WORST = 6  # samples shown with the largest disagreement between teachers
PIXELS = 40  # pixels per sample in the chart of two teachers' agreement
POINTS = 4000  # the most points that such a chart draws
_PATCH_COLOURS = ((255, 214, 64), (90, 200, 250), (120, 230, 140), (255, 120, 150))  # outlines, in patch order


@dataclass(frozen=True, slots=True)
class _Seen:
    """The statistics of one sample."""

    key: str
    side: float
    valid: dict[str, float]
    shape: dict[str, np.ndarray]  # histogram of each map between its 2nd and 98th percentile
    apart: dict[tuple[str, str], float]  # alignment error between two teachers' maps
    pixels: dict[tuple[str, str], list[tuple[float, float]]]  # of two teachers, the second fitted to the first


def write_contact(
    folder: str | Path,
    out: Path | None = None,
    *,
    shown: int = 12,
    report: Report | None = None,
) -> Path:
    """Writes FOLDER/contact.html, or `out`: `shown` samples as pictures, at most MEASURED in the histograms.

    Raises what `LabelDataset` raises for an unfinished or damaged folder.
    """
    folder = Path(folder)
    dataset, manifest = LabelDataset(folder), read_manifest(folder)
    chosen = _evenly(len(dataset), MEASURED)
    stats: list[_Seen] = []
    for done, index in enumerate(chosen):
        stats.append(_statistics(dataset[index]))
        if report:
            report(done + 1, len(chosen))
    places = dict(zip((sample_stats.key for sample_stats in stats), chosen, strict=True))
    sections = [("samples", "Samples", _samples([dataset[i] for i in _evenly(len(dataset), shown)]))]
    if len(dataset.teachers) > 1:
        sections.append(("disagreement", "Where teachers disagree", _disagreement(dataset, stats, places)))
    sections.append(("histograms", "Histograms", _histograms(stats)))
    sections.append(("quarantine", "Quarantine", _quarantine(manifest["quarantine"])))
    sections.append(("teachers", "Teachers", _teachers(manifest["teachers"])))
    path = out or folder / "contact.html"
    html = page(f"Labels {folder.name}", _facts(folder, manifest, len(dataset)), sections, what="Contact sheet")
    files.write_text(path, html)
    return path


def _evenly(count: int, highest: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, highest)).round()}) if count else []


def _statistics(sample: Sample) -> _Seen:
    maps = {name: labels.shared for name, labels in sample.labels.items()}
    shape = {}
    for name, depth in maps.items():
        values = depth.values[depth.valid].numpy()
        shape[name] = np.histogram(own_range(values, np.ones_like(values, bool)), BINS, (0.0, 1.0))[0] / max(
            1, values.size
        )
    apart = {pair: _pair_error(*(maps[name] for name in pair)) for pair in combinations(maps, 2)}
    pixels = {pair: _pixels(*(maps[name] for name in pair)) for pair in apart}
    valid = {name: float(depth.valid.float().mean()) for name, depth in maps.items()}
    return _Seen(sample.key, float(sample.record["crop"]["side"]), valid, shape, apart, pixels)


def _pair_error(first: DepthMap, second: DepthMap) -> float:
    disparity1, disparity2 = to_disparity(first), to_disparity(second)
    return float(alignment_error(disparity1.values, disparity2.values, disparity1.valid & disparity2.valid)[0])


def _pixels(first: DepthMap, second: DepthMap) -> list[tuple[float, float]]:
    """Nearness of some pixels in both maps, the second fitted to the first by least squares in disparity; 0 and 1 are
    the ends of the first's own range.
    """
    reference = to_disparity(first)
    other = to_disparity(second, reference)
    both = reference.valid & other.valid
    values = reference.values[both].numpy()
    if not len(values):
        return []
    scale, shift = fit_affine(other.values, reference.values, both)
    fitted = (scale * other.values[both] + shift).numpy()
    low, high = (float(v) for v in np.percentile(values, [2, 98]))
    indices = np.linspace(0, len(values) - 1, min(PIXELS, len(values))).astype(int)
    span = max(high - low, 1e-12)
    return list(zip(((values[indices] - low) / span).tolist(), ((fitted[indices] - low) / span).tolist(), strict=True))


# --- pictures ---------------------------------------------------------------------------------------------------------


def _picture_row(sample: Sample, note: str = "") -> str:
    """A region with its patches outlined, then each teacher's map of it; near is bright."""
    region = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    size, side = region.shape[0], sample.record["crop"]["side"]
    for i, (top, left, length) in enumerate(sample.record["patches"]):
        a, b = (
            (round(v * size / side) for v in (left, top)),
            (round((v + length) * size / side) - 1 for v in (left, top)),
        )
        cv2.rectangle(region, tuple(a), tuple(b), _PATCH_COLOURS[i % len(_PATCH_COLOURS)], max(1, size // 180))
    tiles = [tile(sample.key, shrink(region), note=f"{side} px", photo=True)]
    for name, labels in sample.labels.items():
        values, valid = labels.shared.values[0].numpy(), labels.shared.valid[0].numpy()
        picture = own_colours(values, valid, larger_is_nearer=labels.shared.kind.quantity == "disparity")
        tiles.append(tile(name, shrink(picture), note=f"{100 * valid.mean():.0f} % valid"))
        tiles += _patch_tiles(name, labels)
    head = f"{escape(sample.record['image']['origin'])} <small>{escape(note)}</small>"
    return f'<h4>{head}</h4><div class="strip">{"".join(tiles)}</div>'


def _patch_tiles(name: str, labels: Labels) -> list[str]:
    """Tiles of the first patch: cut from the region's map, and predicted alone (Distill-Any-Depth, Fig. 5)."""
    if labels.local is None or not labels.local.valid[0].any():
        return []
    size = labels.shared.values.shape[-1]
    top, left, bottom, right = (round(float(v) * size) for v in labels.boxes[0, 0])
    window = slice(max(0, top), max(1, bottom)), slice(max(0, left), max(1, right))
    shared = labels.shared.values[0][window].numpy(), labels.shared.valid[0][window].numpy()
    alone = labels.local.values[0].numpy(), labels.local.valid[0].numpy()
    tiles = []
    for label, (values, valid) in (("in the region", shared), ("alone", alone)):
        picture = own_colours(values, valid, larger_is_nearer=labels.shared.kind.quantity == "disparity")
        picture = cv2.resize(picture, alone[0].shape[::-1], interpolation=cv2.INTER_NEAREST)
        tiles.append(tile(f"{name}: patch 1 {label}", shrink(picture), note=f"{values.shape[1]} px"))
    return tiles


def _samples(samples: Sequence[Sample]) -> str:
    key = legend("each map in its own range", NEARNESS, [(0.0, "far"), (1.0, "near")], missing="invalid")
    return key + "".join(map(_picture_row, samples))


def _disagreement(dataset: LabelDataset, seen: Sequence[_Seen], places: Mapping[str, int]) -> str:
    rows, pictures, charts = [], [], []
    for pair in combinations(dataset.teachers, 2):
        ranked = sorted(
            (stats for stats in seen if np.isfinite(stats.apart[pair])), key=lambda stats: -stats.apart[pair]
        )
        if not ranked:
            continue
        values = np.array([stats.apart[pair] for stats in ranked])
        rows.append([escape(" and ".join(pair)), *(f"{np.quantile(values, q):.3f}" for q in (0.5, 0.9, 1.0))])
        points = [point for stats in seen for point in stats.pixels[pair]]
        charts.append(agreement(pair, points[:: -(-len(points) // POINTS)]))
        pictures += [
            _picture_row(dataset[places[stats.key]], f"apart by {stats.apart[pair]:.3f}") for stats in ranked[:WORST]
        ]
    lead = (
        '<p class="key">What is left between two teachers’ maps of a region after the best scale and shift, as a '
        "fraction of the map’s spread: 0 is the same map, 1 has nothing in common.</p>"
    )
    head = ["teachers", "median", "9 in 10 below", "most"]
    drawn = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return lead + table(head, rows, kind="scores") + drawn + "<h3>The most disagreement</h3>" + "".join(pictures)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _histograms(seen: Sequence[_Seen]) -> str:
    if not seen:
        return missing("no samples")
    sides = [stats.side for stats in seen]
    charts = [
        bars(
            "Side of the region",
            histogram(sides, min(sides), max(sides)),
            (f"{min(sides):.0f}", f"{max(sides):.0f} px"),
        )
    ]
    for number, name in enumerate(seen[0].valid):
        colour = number % 5 + 1
        mean = np.mean([stats.shape[name] for stats in seen], axis=0)
        note = "2nd to 98th percentile of each map, the mean of all"
        charts.append(bars(f"Values of {name}", list(mean), ("low", "high"), note=note, colour=colour))
        valid = [stats.valid[name] for stats in seen]
        charts.append(bars(f"Valid pixels of {name}", histogram(valid, 0.0, 1.0), ("none", "all"), colour=colour))
    for pair in seen[0].apart:
        apart = [stats.apart[pair] for stats in seen if np.isfinite(stats.apart[pair])]
        charts.append(bars(f"{pair[0]} and {pair[1]} apart", histogram(apart, 0.0, 1.0), ("0", "1"), colour=5))
    count = counted(len(seen), "sample")
    return f'<p class="key">Over {count}.</p><div class="charts">{"".join(charts)}</div>'


def _quarantine(lines: Sequence[Mapping[str, str]]) -> str:
    if not lines:
        return missing("nothing was rejected")
    reasons = Counter(line["reason"].split(":")[0] for line in lines)
    short = table(
        ["reason", "images"], [[escape(reason), str(n)] for reason, n in reasons.most_common()], kind="scores"
    )
    rows = [[escape(line["origin"]), escape(line["reason"])] for line in lines[:500]]
    return short + details(f"all {len(lines)}", table(["image", "reason"], rows, kind="reasons"))


def _teachers(cards: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("weights", "revision", "kind", "stored", "licence")

    def word(value: Any) -> str:
        return escape(", ".join(value) if isinstance(value, list) else str(value))

    rows = [[escape(name), *(word(card.get(field, "")) for field in columns)] for name, card in cards.items()]
    return table(["teacher", *columns], rows)


def _facts(folder: Path, manifest: Mapping[str, Any], samples: int) -> str:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    settings = manifest.get("settings", {})
    return pairs(
        [
            ("samples", f"{samples} of {counted(manifest['images']['count'], 'image')}"),
            ("tars", f"{len(manifest['shards'])}, {size / 1e6:.1f} MB"),
            ("per sample", f"{size / max(1, samples) / 1e3:.0f} kB"),
            ("teachers", ", ".join(manifest["teachers"])),
            ("quarantined", str(len(manifest["quarantine"]))),
            ("codec", str(settings.get("codec", "png16"))),
            ("images' licence", str(manifest.get("licence", {}).get("images", ""))),
            ("from", f"{folder.name}/{MANIFEST}"),
        ]
    )
