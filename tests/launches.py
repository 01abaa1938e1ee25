"""What a card would be asked for, counted on a CPU: kernels launched, waits for the card, tensors made on the host.

A step on a card is often bound by the host: each kernel costs its launch, and each number that Python reads makes it
wait until the card has done all that was asked of it. `pretended_card` takes the code paths of a card, with kernels
that do nothing, so that numbers are meaningless; `Asked` counts.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).parent.parent)
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "unique_dim", "equal", "bincount")
NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "resize_", "record_stream")
triton_launches = 0


class Asked(TorchDispatchMode):
    """launches: kernels by operation, those of Triton too. waits: by the line of code; the host's tensors likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __enter__(self) -> Asked:
        self._before = triton_launches
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.launches["triton"] += triton_launches - self._before

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema = operation._schema.name.removeprefix("aten::"), operation._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        by_mask = name.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name.startswith(WAITS) or by_mask:
            self.waits[_caller()] += 1
        elif name in ("lift_fresh", "lift_fresh_copy"):
            self.uploads[_caller()] += 1
        elif not is_view and name not in NOTHING and not name.startswith("prim"):
            self.launches[name] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """The number of launches."""
        return self.launches.total()


def _caller() -> str:
    """The line of this repository that asked."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and frame.filename != __file__ and "/.venv/" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}"
    return "?"


class _Compiled:
    function = packed_metadata = None
    src = SimpleNamespace(signature={})

    def run(self, *args: Any) -> None:
        global triton_launches
        triton_launches += 1


class Kernel:
    """In place of a Triton kernel: counts a launch."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names, self.__name__ = kernel.arg_names, kernel.__name__

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> _Compiled:
            (compiled := _Compiled()).run()
            return compiled

        return launch


@contextmanager
def pretended_card() -> Iterator[None]:
    """Inside, the CPU's losses and labels go the way of a card's."""
    from distill.core import codes, codes_kernel, launch
    from distill.losses import fused
    from distill.losses.kernels import boxes, contexts, gradient, select, small

    def forget() -> None:
        for module in (boxes, contexts, gradient, select, small, codes_kernel):
            for name in ("_kernels", "_plan", "_launcher"):
                if hasattr(module, name):
                    getattr(module, name).cache_clear()

    forget()
    make = launch.Launcher.__init__
    with mock.patch.multiple(
        fused, has_kernels=lambda values: values.dtype == torch.float32, _trusted=lambda *given: True
    ), mock.patch.object(launch.Launcher, "__init__", lambda self, kernel, how: make(self, Kernel(kernel), how)), \
        mock.patch.object(launch, "_stream_of", lambda: lambda device: 0), \
        mock.patch.object(codes, "decode_values", codes_kernel.decode_values):  # fmt: skip
        yield
    forget()
