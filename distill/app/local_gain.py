"""`distill compare RECIPE --local`: would patches help? Measured before a day of labelling.

For every model and every image with ground truth, AbsRel in the central half of the image of three predictions: the
map of the whole image aligned over the whole, the same map aligned over the part (Distill-Any-Depth, Fig. 2), and the
map predicted from the part alone (Fig. 5).
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from distill.app.comparison import chosen_samples, entrants, note_left_out
from distill.app.console import note, progress, say, table
from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.core import files
from distill.core.depth import DepthMap
from distill.eval.compare import PROTOCOL
from distill.eval.fit import NoGroundTruthError
from distill.eval.local import LocalError, central, local_error
from distill.eval.verdict import quantile


def run_local(recipe: Recipe) -> Path:
    """Runs every model on the images and on their central parts, writes RUN/compare/local.json; returns its path.

    Raises RecipeError if no image has ground truth, or if there is no model.
    """
    samples, rejected = chosen_samples(recipe)
    with_truth = [sample for sample in samples if bool(sample.truth().valid.any())]
    if not with_truth:
        raise RecipeError("compare --local needs ground truth, which none of the recipe's images has")
    results: dict[str, Any] = {}
    for entrant in entrants(recipe, with_truth):
        teacher = entrant.load()
        errors: list[LocalError] = []
        with progress(f"compare --local {entrant.name}") as report:
            for done, sample in enumerate(with_truth, 1):
                error = _ask(teacher, sample)
                errors += [error] if error else []
                report(done, len(with_truth))
        if errors:
            results[entrant.name] = summary(errors)
    path = recipe.run.folder / "compare" / "local.json"
    files.write_json(path, {"version": 1, "models": results, "images": len(with_truth)})
    head = ["model", "aligned globally", "aligned locally", "gain", "the part alone", "gain of patches", "images"]
    table(
        "AbsRel in the middle of the image",
        head,
        [[name, *(row[key] for key in ("globally", "locally", "gain", "patch", "patch_gain")), row["images"]]
         for name, row in ((n, _shown(r)) for n, r in results.items())],
    )  # fmt: skip
    note_left_out(rejected)
    say(f"local: {path.resolve()}")
    return path


@torch.no_grad()
def _ask(teacher: Any, sample: Any) -> LocalError | None:
    image, truth = sample.image(), sample.truth()
    rows, columns = central(*image.shape[-2:])
    options: dict[str, Any] = {"keys": [sample.key]} if teacher.card.seeded else {}
    options |= {"focal": sample.focal()} if sample.focal and getattr(teacher, "takes_focal", False) else {}
    whole_map = teacher.predict(image[None], **options)
    # A model whose maps are looked up by key has none of a part.
    looked_up = teacher.card.name in ("truth", "stored")
    part_map = None if looked_up else teacher.predict(image[None, :, rows, columns], **options)
    try:
        patch = None if part_map is None else _values(part_map)
        return local_error(_values(whole_map), truth, whole_map.kind, PROTOCOL, patch=patch)
    except (NoGroundTruthError, ValueError) as error:
        note(f"  left out {sample.key}: {error}")
        return None


def _values(depth: DepthMap) -> np.ndarray:
    return torch.where(depth.valid, depth.values, torch.nan)[0].float().cpu().numpy()


def summary(errors: list[LocalError]) -> dict[str, Any]:
    """Means over images, and the relative gains with their 90 % interval over images."""
    table = np.array([[e.globally, e.locally, e.patch] for e in errors])
    row: dict[str, Any] = dict(zip(("globally", "locally", "patch"), map(fmean, table.T.tolist()), strict=True))
    row |= {
        "images": len(errors),
        "gain": _gain(table[:, 0], table[:, 1]),
        "patch_gain": _gain(table[:, 0], table[:, 2]),
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _gain(before: np.ndarray, after: np.ndarray) -> list[float | None] | None:
    """[relative gain of the means, half width of its interval by linearizing the ratio (None for one image)]."""
    if np.isnan(after).any():
        return None
    ratio = float(after.mean() / before.mean())
    if len(before) < 2:
        return [1 - ratio, None]
    half = quantile(len(before) - 1) * stdev((after - ratio * before).tolist()) / before.mean() / math.sqrt(len(before))
    return [1 - ratio, float(half)]


def _shown(row: dict[str, Any]) -> dict[str, str]:
    shown = {key: "-" if row[key] is None else f"{row[key]:.4f}" for key in ("globally", "locally", "patch")}
    for key in ("gain", "patch_gain"):
        gain, half = row[key] or (None, None)
        shown[key] = "-" if gain is None else f"{gain:+.1%}" + ("" if half is None else f" ± {half:.1%}")
    return shown | {"images": str(row["images"])}
