"""Checks the kernel that decodes labels, without a GPU; run by test_codes.py, each in a process of its own.

TRITON_INTERPRET=1 python -m tests.core.codes_kernel     runs it in Triton's interpreter: the bits of the torch code
python -m tests.core.codes_kernel                        compiles it for an H100: no multiplication is fused with a sum
"""

from __future__ import annotations

import os
import re
import warnings

import torch
import triton

from distill.core import codes_kernel
from distill.core.codes import decode_values
from tests.losses.compiled_kernels import Card

INEXACT = re.compile(r"\b(?:fma|mad)\.\S*f(?:32|64)|\bcvt\.\S*ftz\S*")


def interpreted() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about infinities
    codes, low, high, units = codes_kernel.example()
    large = (torch.arange(2 * 70_000) % 65536).reshape(2, 1, 70_000).to(torch.uint16)
    for given in (codes, codes[:, ::2], large, codes[:0]):
        ours = codes_kernel.decode_values(given, low[: len(given)], high[: len(given)], units)
        expected = decode_values(given, low[: len(given)], high[: len(given)], units)
        for mine, its in zip(ours, expected, strict=True):
            assert mine.dtype == its.dtype and torch.equal(mine, its)


def compiled() -> None:
    triton.runtime.driver.set_active(Card(90))
    ours = codes_kernel.decode_values(*codes_kernel.example())
    assert [x.dtype for x in ours] == [torch.float32, torch.bool]
    (kernel,) = next(iter(codes_kernel._decode.device_caches.values()))[0].values()
    assert "mul.rn.f64" in kernel.asm["ptx"]
    assert not INEXACT.findall(kernel.asm["ptx"]), kernel.asm["ptx"]


if __name__ == "__main__":
    interpreted() if os.environ.get("TRITON_INTERPRET") == "1" else compiled()
