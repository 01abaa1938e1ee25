"""Compiles the scene-rendering kernels without a GPU: run by test_scenes_gpu.py in a separate process.

`python -m tests.data.compiled_scenes [CAPABILITY]` prints each kernel's registers and stack, and fails on instructions
that round differently from a CPU: contracted multiply-adds, approximate divisions and roots, flushing to zero.
"""

from __future__ import annotations

import re
import sys

import torch
import triton

from distill.data.scenes import gpu
from tests.data.interpreted_scenes import SIZE, stage_of
from tests.losses.compiled_kernels import Card, dump

INEXACT = re.compile(
    r"\b(?:fma|mad)\.\S*f32|\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\S*|\b(?:add|sub|mul|div|sqrt)\S*ftz\S*"
)


def main(capability: int) -> None:
    card = Card(capability)
    triton.runtime.driver.set_active(card)
    for size in (SIZE, (480, 640)):
        gpu.light_up(stage_of("street", 1, variety=True)[0], size, torch.device("cpu"))
    assert card.launches == 4, card.launches
    for kernel in (gpu.first_hit, gpu.shade):
        (compiled,) = (variant for caches in kernel.device_caches.values() for variant in caches[0].values())
        inexact = sorted({*INEXACT.findall(compiled.asm["ptx"])})
        assert "add.rn.f32" in compiled.asm["ptx"] and not inexact, inexact
        (binary,) = card.binaries[kernel.__name__]
        usage = dict(re.findall(r"(REG|STACK):(\d+)", dump(binary, "--dump-resource-usage")))
        print(f"sm_{capability} {kernel.__name__}: reg {usage['REG']}, stack {usage['STACK']}")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
