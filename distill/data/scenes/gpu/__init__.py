"""Rendering by Triton kernels: a view's rays are cast and shaded on a GPU, in two launches.

    tables   a stage as two arrays, the only data copied to the GPU (`slots`: their layout)
    hits     the first surface along each ray
    shadows  whether a light is hidden
    shading  colours

Each line of the kernels corresponds to one of the torch path, as in `distill.data.scenes.fused`: float32, rounded after
every operation (division and square root too, and nothing is contracted to a fused multiply-add), so that the picture
is bit-identical to the CPU's. Only `distill.data.scenes` calls them, and imports Triton only then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.scenes import texture
from distill.data.scenes.gpu.hits import first_hit
from distill.data.scenes.gpu.shading import shade
from distill.data.scenes.gpu.tables import tables_of
from distill.data.scenes.stage import Stage

TILE = (8, 16)
"""Rows and columns of pixels per program: one ray for each of its 128 threads."""
_EXACT = {"enable_fp_fusion": False, "num_warps": 4}

_banks: dict[torch.device, tuple[Tensor, set[int]]] = {}
_filling = threading.Lock()


def _bank(patterns: Sequence[int], device: torch.device) -> Tensor:
    """The bank of textures on a device (51 MB), containing at least these patterns."""
    with _filling:
        if device not in _banks:
            _banks[device] = torch.empty(texture.COUNT * texture.STRIDE, 2, device=device), set()
        bank, filled = _banks[device]
        missing = sorted({*patterns} - filled)
        drawn = torch.from_numpy(texture.bank(missing))
        for number in missing:
            part = slice(number * texture.STRIDE, (number + 1) * texture.STRIDE)
            bank[part].copy_(drawn[part])
        if missing and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # before other threads read it on their own streams
        filled.update(missing)
    return bank


def light_up(stage: Stage, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Depth (2,H+1,W+1), inf for sky, and linear colour (3,2,H+1,W+1) on the corner and centre grids, on the device.

    Launched on its current stream; the spare row and column of the centres, which no pixel reads, are undefined.
    """
    height, width = size
    integers, floats, patterns = tables_of(stage, size)
    bank = _bank(patterns, device)
    on_device = [torch.from_numpy(table).to(device) for table in (integers, floats)]
    depth = torch.empty(2, height + 1, width + 1, device=device)
    surface, colour = torch.empty_like(depth, dtype=torch.int32), torch.empty((3, *depth.shape), device=device)
    rows, columns = TILE
    grid = (-(-(height + 1) // rows) * -(-(width + 1) // columns), 2)
    first_hit[grid](*on_device, depth, surface, ROWS=rows, COLUMNS=columns, **_EXACT)
    shade[grid](*on_device, bank, depth, surface, colour, ROWS=rows, COLUMNS=columns, **_EXACT)
    return depth, colour
