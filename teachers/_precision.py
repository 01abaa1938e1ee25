"""How far a teacher's maps are from those of the same weights in float32, not compiled: a line for the manifest.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.core.crops import generator


def probe_images(size: int, count: int = 2) -> Tensor:
    """(count,3,size,size) in [0,1]: clouds of noise at several scales, the same on every machine."""
    layers = []
    for cells in (3, 12, 48):
        noise = torch.from_numpy(generator("precision", cells).random((count, 3, cells, cells))).float()
        layers.append(torch.nn.functional.interpolate(noise, (size, size), mode="bilinear", align_corners=False))
    return torch.stack(layers).mean(0)


def deviation(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """The median and the largest |ours - reference| of maps (B,H,W), as shares of the reference's mean deviation."""
    spread = (reference - reference.flatten(1).median(1).values[:, None, None]).abs().mean((1, 2), keepdim=True)
    off = ((ours - reference).abs() / spread.clamp(min=1e-12)).flatten()
    return {"median": round(float(off.median()), 6), "largest": round(float(off.max()), 6)}


def compare(teacher: Any, reference: Any, size: int) -> dict[str, float]:
    """`deviation` of two loaded teachers' maps of `probe_images`, on the host."""
    images = probe_images(size)
    keys = {"keys": [str(i) for i in range(len(images))]} if getattr(teacher.card, "seeded", False) else {}
    with torch.no_grad():
        ours, theirs = (t.predict(images, **keys).values.cpu() for t in (teacher, reference))
    return deviation(ours, theirs)
