"""Where models disagree, in pictures: image, every map, their disagreement, and the worst square enlarged.

Pictures are not chosen by hand: the images on which the models disagree most, and the one on which they agree best; the
zoom shows the square where they disagree most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distill.core.align import apply_affine, fit_affine
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import TRUTH, ImageView, ModelComparison, read_view
from distill.eval.reports import figures
from distill.eval.reports.page import missing

PICTURES = 6
ZOOM = 0.3
"""The zoomed square's side, as a fraction of the image's shorter side."""
SPREAD_END = 1.0
"""Disagreement at the dark end of its scale, in standard deviations of the reference."""


def gallery(comparison: ModelComparison, samples: Sequence[BenchmarkSample], folder: Path) -> str:
    """The images of most disagreement and the one of least: picture, maps, disagreement; below each its zoom."""
    by_key = {sample.key: sample for sample in samples}
    ranked = [i for i in comparison.images if i["disagreement"] is not None and i["key"] in by_key]
    ranked.sort(key=lambda image: -image["disagreement"])
    if not ranked:
        return missing("No pictures: no image has maps of two models.")
    chosen = ranked[: PICTURES - 1] + ranked[-1:] if len(ranked) > PICTURES else ranked
    names = [model["name"] for model in comparison.models]
    ticks = [(0.0, "they agree"), (0.5, "½ spread"), (1.0, "1 spread or more")]
    parts = [
        '<p class="key">Maps are aligned by scale and shift to the truth where there is one, else to the first model, '
        "and share its colours: bright is near. The frame in the picture is the square where the models disagree most, "
        "enlarged below. Disagreement is the standard deviation between the models, in units of the "
        "reference’s spread.</p>",
        figures.legend("disagreement", figures.ERROR, ticks, missing="no value"),
    ]
    for rank, image in enumerate(chosen, 1):
        rank_text = "where they agree best" if image is ranked[-1] and len(ranked) > 1 else f"disagreement {rank}"
        heading = f"mean error between models {image['disagreement']:.2f}"
        parts.append(f"<h4>{escape(image['key'])} <small>{rank_text}, {heading}</small></h4>")
        parts.append(_strip(read_view(by_key[image["key"]], names, folder), image))
    return "".join(parts)


def _strip(view: ImageView, image: Mapping[str, Any]) -> str:
    aligned = _aligned(view)
    spread = _spread(aligned, view)
    box = _busiest(spread)
    photo = (view.image[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    reference = view.maps[view.reference]
    near, far = _ends(reference.values[0].numpy(), reference.valid[0].numpy())
    columns = [_column("image", _framed(photo, box), photo, box, photo_like=True)]
    for key in dict.fromkeys([*([TRUTH] if TRUTH in aligned else []), *aligned]):
        values, valid = aligned[key]
        position = (values - far) / max(near - far, 1e-12)
        picture = figures.colourise(position, valid, figures.NEARNESS)
        columns.append(_column(key, picture, picture, box, note=_note(key, view, image)))
    disagreement = figures.colourise(spread / SPREAD_END, np.ones_like(spread, bool), figures.ERROR)
    columns.append(_column("disagreement", disagreement, disagreement, box))
    style = "grid-template-columns:repeat(auto-fit,minmax(150px,1fr))"
    return f'<div class="strip" style="{style}">{"".join(columns)}</div>'


def _note(key: str, view: ImageView, image: Mapping[str, Any]) -> str:
    if key == view.reference:
        return "reference"
    numbers = image["pairs"].get(f"{key}|{view.reference}") or image["pairs"].get(f"{view.reference}|{key}") or {}
    return f"error {numbers['error']:.2f}" if numbers.get("error") is not None else ""


def _column(
    caption: str,
    whole: np.ndarray,
    source: np.ndarray,
    box: tuple[int, int, int],
    *,
    note: str = "",
    photo_like: bool = False,
) -> str:
    top, left, side = box
    cut = source[top : top + side, left : left + side]
    times = max(1, round(figures.SIDE / max(1, cut.shape[0])))
    zoom = cut.repeat(times, 0).repeat(times, 1)
    return (
        f"<div>{figures.tile(caption, figures.shrink(whole), note=note, photo=photo_like)}"
        f"{figures.tile(f'{caption} × {times}', zoom, photo=photo_like)}</div>"
    )


def _aligned(view: ImageView) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every map on the scale of the reference, with where it is valid."""
    reference = view.maps[view.reference]
    maps = {}
    for key, depth in view.maps.items():
        scale, shift = fit_affine(depth.values, reference.values, depth.valid & reference.valid)
        values = depth.values if key == view.reference else apply_affine(depth.values, scale, shift)
        maps[key] = values[0].numpy(), depth.valid[0].numpy()
    return maps


def _spread(aligned: Mapping[str, tuple[np.ndarray, np.ndarray]], view: ImageView) -> np.ndarray:
    """(H,W) standard deviation of the models' aligned maps, without the truth, over that of the reference."""
    aligned_values = [np.where(valid, values, np.nan) for key, (values, valid) in aligned.items() if key != TRUTH]
    reference = view.maps[view.reference]
    unit = float(reference.values[reference.valid].std(correction=0)) or 1.0
    stack = np.stack(aligned_values)
    count = np.isfinite(stack).sum(0)
    filled = np.nan_to_num(stack)
    mean = filled.sum(0) / np.maximum(count, 1)
    power = np.where(np.isfinite(stack), (filled - mean) ** 2, 0.0).sum(0) / np.maximum(count, 1)
    spread: np.ndarray = np.where(count > 1, np.sqrt(power), 0.0) / unit
    return spread


def _ends(values: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    """The near and the far end of the colours: the reference's 98th and 2nd percentile."""
    low, high = np.percentile(values[valid], [2, 98]) if valid.any() else (0.0, 1.0)
    return float(high), float(low)


def _busiest(spread: np.ndarray) -> tuple[int, int, int]:
    """(top, left, side) of the square with the most disagreement."""
    side = max(8, round(ZOOM * min(spread.shape)))
    side = min(side, *spread.shape)
    tensor = torch.from_numpy(np.minimum(spread, 2 * SPREAD_END).astype(np.float32))[None, None]
    means = F.avg_pool2d(tensor, side, stride=1)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return top, left, side


def _framed(photo: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    top, left, side = box
    width = max(2, round(max(photo.shape) / figures.SIDE * 2))
    out = photo.copy()
    for rows, columns in (
        (slice(top, top + width), slice(left, left + side)),
        (slice(top + side - width, top + side), slice(left, left + side)),
        (slice(top, top + side), slice(left, left + width)),
        (slice(top, top + side), slice(left + side - width, left + side)),
    ):
        out[rows, columns] = (255, 214, 10)
    return out
