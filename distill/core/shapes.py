"""The check of maps that functions of several take: (B,H,W), all of one shape, with a bool mask.

Without it torch would broadcast (B,1,H,W) beside (B,H,W) to every pair of images, and flattened maps of different sizes
would be compared at wrong pixels: a wrong number, and no error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_maps(*, valid: Tensor | None = None, any_rank: bool = False, **maps: Tensor | None) -> None:
    """Raise ValueError unless the named maps and `valid` are (B,H,W) of one shape and `valid` is bool; None is skipped.

    any_rank: other shapes are allowed if they are equal. Raises TypeError for what is not a tensor.
    """
    given = {name: each for name, each in {**maps, "valid": valid}.items() if each is not None}
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(each).__name__}")
    shapes = [each.shape for each in given.values()]
    if any(shape != shapes[0] for shape in shapes) or not (any_rank or len(shapes[0]) == 3):
        listed = ", ".join(f"{name} {tuple(each.shape)}" for name, each in given.items())
        hint = ": squeeze(1)" if any(len(shape) == 4 and shape[1] == 1 for shape in shapes) else ""
        raise ValueError(
            f"maps must be {'of one shape' if any_rank else '(B,H,W), all of one shape'}, not {listed}{hint}"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, not {valid.dtype}: valid > 0")
