"""Launching a compiled kernel without asking again which one it is: a loss has 17 launches, and the host is slow.

Triton's own launch binds the arguments, describes each one and looks the kernel up, 20 to 30 us of the host each time.
What it would find depends on the arguments' alignment and integers alone once the constants are fixed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Launcher:
    """A kernel and its compile-time arguments; the first launch for a kind of arguments compiles it.

    The kernel's compile-time parameters stand last, as all of ours do. Under Triton's interpreter nothing is compiled,
    and every launch goes its usual way.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self._last = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launches it on the current stream; tensors have always the same dtypes and lie on the current device."""
        kind = (args[0].get_device(), *[a.data_ptr() & 15 if isinstance(a, Tensor) else a for a in args])
        compiled = self._compiled.get(kind)
        if compiled is None:
            self._compiled[kind] = self.kernel[grid](*args, **self.constants)
        else:
            compiled[(*grid, 1, 1)[:3]](*args, *self._last)
