"""Compiles the losses' kernels without a GPU: run by test_kernels.py in a separate process.

Triton needs no GPU to compile for one, only a driver that names it. The driver here also accepts the launches, so
everything happens as on a GPU except the kernels' execution. `python -m tests.losses.compiled_kernels [CAPABILITY]`
(80: A100; 90: H100, H200, the default; 100: B200) prints each kernel's registers per thread, its stack (spilled
registers) and shared memory, in bytes, and fails on instructions whose result could differ between two runs, and where
the programs of the cooperative launch would not all fit on the card.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from distill.core.crops import sample_boxes
from distill.losses import fused
from distill.losses.kernels import select
from distill.losses.kernels.small import LARGEST
from distill.losses.losses import compare, gradient_loss, median_and_mean_abs_dev

ATOMIC_FLOAT = re.compile(r"\b(?:ATOM|RED)\w*\.\S*F(?:16|32|64)\S*")
"""Atomic float addition, whose order is arbitrary: the only instruction whose result can differ between two runs."""


class Card:
    """A Triton driver for a GPU of this capability: stores the kernels in `binaries` and counts launches."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launches = capability, 0
        self.binaries: dict[str, list[bytes]] = {}
        self.shared: dict[str, int] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=self.load,
            unload_module=lambda module: None,
        )

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        self.shared[name] = max(shared, self.shared.get(name, 0))  # a binary's own says only what is reserved
        variants = self.binaries.setdefault(name, [])
        if binary not in variants:
            variants.append(binary)
        return object(), 1, 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, seen: Any, *rest: Any) -> None:
            entered, left, *args = rest
            assert min(x, y, z) > 0 and len(args) == len(source.fn.arg_names), source.fn.arg_names
            self.launches += 1

        return launch


def losses() -> Iterator[torch.Tensor]:
    """Losses that use every kernel, each differentiable; no kernel is executed, so the numbers are meaningless."""
    pred, target = torch.rand(2, 2, 64, 96)
    valid, weight = torch.ones(2, 64, 96, dtype=torch.bool), torch.rand(2, 64, 96)
    pred.requires_grad_()
    for name in ("none", "global", "hybrid", "local"):
        comparison = compare(pred, target, valid, name)
        yield comparison.loss
        yield gradient_loss(pred, target, valid, whole_image=comparison.whole_image)
    yield compare(pred, target, valid, "hybrid", weight=weight, trim_top=0.1).loss
    yield compare(pred, target, valid, "hybrid", label_only=True).loss
    for normalize in (True, False):
        yield gradient_loss(pred, target, valid, normalize=normalize)
    odd = torch.rand(1 + 2 * 61 * 97, requires_grad=True)[1:].view(2, 61, 97)  # not aligned to 16 bytes
    yield compare(odd, odd.detach(), odd > 0, "hybrid").loss + gradient_loss(odd, odd.detach(), odd > 0)
    yield fused.sample_boxes(pred, torch.rand(2, 3, 4), 40, reference=sample_boxes)[0]  # type: ignore[index]
    large = torch.rand(1, LARGEST // 64 + 1, 64, requires_grad=True)
    for values in (pred, large):
        yield median_and_mean_abs_dev(values, torch.ones_like(values, dtype=torch.bool))[1]


def dump(binary: bytes, *what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, *what, file.name], capture_output=True, text=True, check=True).stdout


def main(capability: int) -> None:
    fused.has_kernels, fused.raise_faults = lambda values: values.dtype == torch.float32, True
    fused._trusted = lambda name, device, trial: True  # type: ignore[assignment]
    card = Card(capability)
    triton.runtime.driver.set_active(card)
    launches = []
    for _ in range(2):  # the second time, all kernels are compiled already
        card.launches = 0
        for loss in losses():
            loss.sum().backward()
        launches.append(card.launches)
    assert launches[0] == launches[1] > 45, launches
    for name, variants in sorted(card.binaries.items()):
        dumps = [dump(variant, "--dump-resource-usage") for variant in variants]
        usage = [dict(re.findall(r"(REG|STACK|SHARED):(\d+)", text)) for text in dumps]
        registers, stack = (max(int(u[key]) for u in usage) for key in ("REG", "STACK"))
        text = f"reg {registers}, stack {stack}, shared {card.shared[name]}"
        atomics = {instruction for v in variants for instruction in ATOMIC_FLOAT.findall(dump(v, "--dump-sass"))}
        print(f"sm_{capability} {name}: {len(variants)} variants, at most {text}", flush=True)  # noqa: T201
        assert not atomics, f"{name} adds floats in any order: {sorted(atomics)}"
        if name == select._select.__name__:
            held = 32 * select.HOW["num_warps"] * registers, card.shared[name]
            assert all(n * select.PROGRAMS_EACH <= m for n, m in zip(held, (65536, 227 * 1024), strict=True)), held


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
