"""Bilinear reading of maps, with a gradient that is the same at every run.

On CUDA the gradients of torch's interpolate and grid_sample add up by atomics, in an order that nobody knows. Where
torch.use_deterministic_algorithms asks for more, a resize is two matrix products (it is linear and separable), and
scattered points are four gathers. Elsewhere torch's own kernels do the work.

Shapes: B batch, C channels, H height, W width, N boxes, S their size.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_gradient(x: Tensor) -> bool:
    """Whether the gradient at `x` must have the same bits at every run, and torch's own kernel would not see to it."""
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


def resize_bilinear(x: Tensor, size: tuple[int, int], *, align_corners: bool, exact: bool | None = None) -> Tensor:
    """(B,C,H,W) at (B,C,*size), as F.interpolate's bilinear without antialiasing. exact: None asks `exact_gradient`."""
    if not (exact_gradient(x) if exact is None else exact):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
    down = _weights(x.shape[-2], size[0], align_corners).to(x)
    across = _weights(x.shape[-1], size[1], align_corners).to(x)
    return down @ x @ across.mT


@functools.lru_cache(maxsize=64)
def _weights(inputs: int, outputs: int, align_corners: bool) -> Tensor:
    """(outputs, inputs): what each output takes of each input along one side; made by torch's own kernel on the CPU."""
    with torch.no_grad():
        columns = torch.eye(inputs, dtype=torch.float64)[:, None, :, None]  # one image per input
        return F.interpolate(columns, size=(outputs, 1), mode="bilinear", align_corners=align_corners)[:, 0, :, 0].T


def read_boxes(maps: Tensor, rows: Tensor, columns: Tensor, *, exact: bool | None = None) -> Tensor:
    """Maps (B,H,W) at the crossings of rows and columns (B,N,S), fractions of a side: (B,N,S,S), bilinear.

    The border is repeated. Differentiable in `maps`.
    """
    batch, height, width = maps.shape
    num, size = rows.shape[1:]
    if exact_gradient(maps) if exact is None else exact:
        return _hats(rows * height - 0.5, height) @ maps[:, None] @ _hats(columns * width - 0.5, width).mT
    shape = (batch, num, size, size)
    across, down = (2 * columns - 1)[:, :, None, :], (2 * rows - 1)[:, :, :, None]
    grid = torch.stack([across.expand(shape), down.expand(shape)], dim=-1)
    return F.grid_sample(
        maps[:, None], grid.reshape(batch, num * size, size, 2), padding_mode="border", align_corners=False
    ).reshape(shape)


def _hats(at: Tensor, count: int) -> Tensor:
    """(..., S, count): the weight of each of `count` pixels at positions (..., S), which are held inside."""
    held = at.clamp(0, count - 1)[..., None]
    return (1 - (held - torch.arange(count, device=at.device, dtype=at.dtype)).abs()).clamp(min=0)


def read_points(x: Tensor, points: Tensor, *, exact: bool | None = None) -> Tensor:
    """(B,C,H,W) at points (B,h,w,2), x then y in [-1,1] between the outer edges: (B,C,h,w); bilinear, border repeated.

    Differentiable in both.
    """
    if not (exact_gradient(x) if exact is None else exact):
        return F.grid_sample(x, points, mode="bilinear", padding_mode="border", align_corners=False)
    batch, channels, height, width = x.shape
    across = (((points[..., 0] + 1) * width - 1) / 2).clamp(0, width - 1).flatten(1)
    down = (((points[..., 1] + 1) * height - 1) / 2).clamp(0, height - 1).flatten(1)
    left, top = across.detach().floor(), down.detach().floor()
    across, down = across - left, down - top
    flat, read = x.flatten(2), x.new_zeros(())
    for row, by_row in ((top, 1 - down), (top + 1, down)):
        for column, by_column in ((left, 1 - across), (left + 1, across)):
            index = (row.clamp(max=height - 1) * width + column.clamp(max=width - 1)).long()
            read = read + flat.gather(2, index[:, None].expand(-1, channels, -1)) * (by_row * by_column)[:, None]
    return read.reshape(batch, channels, *points.shape[1:3])
