"""Marigold's ensemble: members aligned to one another by scale and shift, then their median.

The alignment is not reproducible to better than about 0.1: the parameters are cast to float32 inside the cost, so the
solver's finite differences (1.5e-8) are rounding noise, and where it stops depends on the last bits of the members. It
is kept as published. The median of an even number is the lower of the two in the middle.

Source: prs-eth/Marigold marigold/util/ensemble.py (ensemble_depth).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REGULARIZER = 0.02


def first_parameters(members: Tensor) -> np.ndarray:
    """(2E,) scales then shifts that bring each member (E,H,W) to [0,1]."""
    flat = members.flatten(1)
    low, high = flat.min(dim=1).values, flat.max(dim=1).values
    scales = 1.0 / (high - low).clamp(min=1e-6)
    return torch.cat([scales, -scales * low]).cpu().numpy()


def aligned(members: Tensor, parameters: np.ndarray) -> Tensor:
    """(E,H,W) members by their scales and shifts."""
    scales, shifts = (torch.from_numpy(part).to(members).view(-1, 1, 1) for part in np.split(parameters, 2))
    return members * scales + shifts


def cost(parameters: np.ndarray, members: Tensor) -> float:
    """Sum over pairs of the root mean square difference, plus a regularizer that pulls the median's range to [0,1]."""
    maps = aligned(members, parameters)
    total = sum(float((maps[i] - maps[j]).square().mean().sqrt()) for i, j in combinations(range(len(maps)), 2))
    median = maps.median(dim=0).values
    return total + REGULARIZER * (float(median.min().abs()) + float((1 - median.max()).abs()))


def ensemble(members: Tensor, *, max_iter: int = 50, tol: float = 1e-6, max_size: int = 1024) -> Tensor:
    """(E,H,W) affine maps -> (H,W) their aligned median, brought to [0,1].

    max_iter, tol: of the BFGS solver. max_size: longer sides are subsampled for the alignment.
    """
    from scipy.optimize import minimize

    small = members.float()
    if max(small.shape[-2:]) > max_size:
        height, width = small.shape[-2:]
        scale = min(max_size / width, max_size / height)
        small = F.interpolate(small[None], (int(height * scale), int(width * scale)), mode="nearest-exact")[0]
    solution = minimize(
        cost, first_parameters(small), args=(small,), method="BFGS", tol=tol, options={"maxiter": max_iter}
    )
    median = aligned(members, solution.x).median(dim=0).values
    low, high = median.min(), median.max()
    return (median - low) / (high - low).clamp(min=1e-6)
