"""Launching compiled kernels without Triton's lookup, because the losses are limited by the host's launch time.

Triton's own launch binds the arguments, describes each one and looks the kernel up, 20 to 30 us of host time each.
Once the constants are fixed, the result depends only on the arguments' alignment and on the integers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _stream_of(device: int) -> int:
    """The current stream, as Triton obtains it."""
    from triton.runtime import driver

    stream: int = driver.active.get_current_stream(device)
    return stream


class Launcher:
    """A kernel and its compile-time arguments; the first launch for a kind of arguments compiles it.

    The kernel's compile-time parameters must come last. Under Triton's interpreter nothing is compiled, and every
    launch is Triton's own. Triton's launch hooks are called for first launches only.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self._last = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launches it on the current stream; tensors must always have the same dtypes and be on the current device."""
        device = args[0].get_device()
        kind = (device, *[a.data_ptr() & 15 if isinstance(a, Tensor) else a for a in args])
        known = self._compiled.get(kind)
        if known is None:
            compiled = self.kernel[grid](*args, **self.constants)
            if compiled is not None:
                self._compiled[kind] = compiled.run, compiled.function, compiled.packed_metadata
        else:
            run, function, metadata = known
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, _stream_of(device), function, metadata, None, None, None, *args, *self._last)
