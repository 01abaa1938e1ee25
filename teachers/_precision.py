"""The deviation of a teacher's maps from those of the same weights in float32, uncompiled, for the manifest.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.core.crops import generator


def probe_images(size: int, count: int = 2) -> Tensor:
    """(count,3,size,size) in [0,1]: smooth noise at several scales, the same on every machine."""
    layers = []
    for cells in (3, 12, 48):
        noise = torch.from_numpy(generator("precision", cells).random((count, 3, cells, cells))).float()
        layers.append(torch.nn.functional.interpolate(noise, (size, size), mode="bilinear", align_corners=False))
    return torch.stack(layers).mean(0)


def deviation(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """The median and the largest |ours - reference| of maps (B,H,W), relative to the reference's mean deviation."""
    spread = (reference - reference.flatten(1).median(1).values[:, None, None]).abs().mean((1, 2), keepdim=True)
    errors = ((ours - reference).abs() / spread.clamp(min=1e-12)).flatten()
    return {"median": round(float(errors.median()), 6), "largest": round(float(errors.max()), 6)}


def compare(teacher: Any, reference: Any, size: int) -> dict[str, float]:
    """`deviation` of two loaded teachers' maps of `probe_images`, computed on the CPU."""
    images = probe_images(size)
    keys = {"keys": [str(i) for i in range(len(images))]} if getattr(teacher.card, "seeded", False) else {}
    with torch.no_grad():
        ours, theirs = (t.predict(images, **keys).values.cpu() for t in (teacher, reference))
    return deviation(ours, theirs)
