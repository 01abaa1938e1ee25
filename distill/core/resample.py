"""Bilinear sampling of maps with reproducible gradients.

On CUDA the gradients of torch's interpolate and grid_sample are summed by atomics, in a nondeterministic order. Under
torch.use_deterministic_algorithms a resize is computed as two matrix products (it is linear and separable), and a read
at scattered points as four gathers. Otherwise torch's own kernels are used.

Shapes: B batch, C channels, H height, W width, N boxes, S their size.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_gradient(x: Tensor) -> bool:
    """Whether the gradient at `x` must be bit-reproducible and torch's own kernel does not guarantee it."""
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


def resize_bilinear(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Resize (B,C,H,W) to (B,C,*size), as F.interpolate's bilinear, no antialiasing."""
    if not exact_gradient(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
    down = _weights(x.shape[-2], size[0], align_corners, x.device, x.dtype)
    across = _weights(x.shape[-1], size[1], align_corners, x.device, x.dtype)
    return down @ x @ across.mT


@functools.lru_cache(maxsize=64)
def _weights(inputs: int, outputs: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs) interpolation weights along one side, computed by torch's own kernel on the CPU.

    Kept on the device: copying them there makes the host wait for it, several times a step.
    """
    with torch.inference_mode(False), torch.no_grad():  # training may follow an inference of the same size
        columns = torch.eye(inputs, dtype=torch.float64)[:, None, :, None]  # one image per input
        down = F.interpolate(columns, size=(outputs, 1), mode="bilinear", align_corners=align_corners)[:, 0, :, 0].T
        return down.to(device, dtype)


def read_boxes(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample maps (B,H,W) at the crossings of rows and columns (B,N,S), fractions of a side: (B,N,S,S), bilinear.

    Border values are repeated. Differentiable in `maps`.
    """
    batch, height, width = maps.shape
    num, size = rows.shape[1:]
    if exact_gradient(maps):
        return _hats(rows * height - 0.5, height) @ maps[:, None] @ _hats(columns * width - 0.5, width).mT
    shape = (batch, num, size, size)
    across, down = (2 * columns - 1)[:, :, None, :], (2 * rows - 1)[:, :, :, None]
    grid = torch.stack([across.expand(shape), down.expand(shape)], dim=-1)
    return F.grid_sample(
        maps[:, None], grid.reshape(batch, num * size, size, 2), padding_mode="border", align_corners=False
    ).reshape(shape)


def _hats(at: Tensor, count: int) -> Tensor:
    """(..., S, count): the weight of each of `count` pixels at positions `at` (..., S), clamped to the map."""
    clamped = at.clamp(0, count - 1)[..., None]
    return (1 - (clamped - torch.arange(count, device=at.device, dtype=at.dtype)).abs()).clamp(min=0)


def read_points(x: Tensor, points: Tensor) -> Tensor:
    """Sample (B,C,H,W) at points (B,h,w,2), x then y in [-1,1] between the outer edges: (B,C,h,w); bilinear.

    Border values are repeated. Differentiable in both.
    """
    if not exact_gradient(x):
        return F.grid_sample(x, points, mode="bilinear", padding_mode="border", align_corners=False)
    batch, channels, height, width = x.shape
    across = (((points[..., 0] + 1) * width - 1) / 2).clamp(0, width - 1).flatten(1)
    down = (((points[..., 1] + 1) * height - 1) / 2).clamp(0, height - 1).flatten(1)
    left, top = across.detach().floor(), down.detach().floor()
    across, down = across - left, down - top
    flat, total = x.flatten(2), x.new_zeros(())
    for row, row_weight in ((top, 1 - down), (top + 1, down)):
        for column, column_weight in ((left, 1 - across), (left + 1, across)):
            index = (row.clamp(max=height - 1) * width + column.clamp(max=width - 1)).long()
            total = (
                total + flat.gather(2, index[:, None].expand(-1, channels, -1)) * (row_weight * column_weight)[:, None]
            )
    return total.reshape(batch, channels, *points.shape[1:3])
