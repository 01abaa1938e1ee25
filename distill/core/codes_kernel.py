"""Decoding of maps on a GPU in one launch, where the torch code takes fifteen operations.

B maps of N pixels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.core.launch import Launcher

BLOCK = 1024


@triton.jit(do_not_specialize=["pixels"])
def _decode(codes, low, high, units, values, valid, pixels, BLOCK: tl.constexpr):
    image, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, at = at < pixels, image * pixels + at
    unit = tl.load(units + tl.load(codes + at, mask=there, other=0).to(tl.int32))
    lowest = tl.load(low + image)
    value = lowest + unit * (tl.load(high + image) - lowest)
    tl.store(values + at, tl.where(value == value, value, 0.0).to(tl.float32), mask=there)
    tl.store(valid + at, (tl.abs(unit) < float("inf")).to(tl.uint8), mask=there)


@functools.cache
def _launcher() -> Launcher:
    # Without fusion: a product that is not rounded before the sum would have other bits than torch's.
    return Launcher(_decode, {"BLOCK": BLOCK, "enable_fp_fusion": False})


def decode_values(codes: Tensor, low: Tensor, high: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """As `codes.decode_values`."""
    codes = codes.contiguous()
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    valid = torch.empty(codes.shape, dtype=torch.bool, device=codes.device)
    pixels = codes[:1].numel()
    if codes.numel():
        with torch.cuda.device_of(codes):
            tensors = (codes, low.contiguous(), high.contiguous(), units, values, valid.view(torch.uint8))
            _launcher()((-(-pixels // BLOCK), len(codes), 1), tensors, (pixels,))
    return values, valid


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `decode_values`: ranges of every size, float32's least ones included, broken and empty ones, and
    codes that are not finite; of more pixels than a block.
    """
    codes = (torch.arange(6 * 1100) * 40503 % 65536).reshape(6, 44, 25).to(torch.uint16)
    low = torch.tensor([-3.7, 1e-41, 0.1, 5.0, -torch.inf, 0.0], dtype=torch.float64)
    high = torch.tensor([1e5, 3e-40, 0.3, 5.0, torch.inf, 1e39], dtype=torch.float64)
    units = torch.arange(65536, dtype=torch.float64) / 65535
    units[:3], units[3], units[4] = torch.nan, torch.inf, -torch.inf
    return codes, low, high, units
