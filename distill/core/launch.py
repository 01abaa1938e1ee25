"""Launching compiled kernels without Triton's lookup, because the losses are limited by the host's launch time.

Triton's own launch binds the arguments, describes each one and looks the kernel up, 20 to 30 us of host time each.
Once the constants are fixed, the result depends only on the tensors' alignment and on the numbers. Later launches pass
addresses in place of tensors, which Triton's launcher accepts and does not look up in the driver: nothing checks then
that a tensor lies on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Grid = tuple[int, int, int]
_address_of = Tensor.data_ptr


def _stream_of() -> Callable[[int], int]:
    """What gives a device's current stream, as Triton obtains it."""
    from triton.runtime import driver

    stream: Callable[[int], int] = driver.active.get_current_stream
    return stream


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, at no cost where no second derivative is asked for."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx: Any, *upstream: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *upstream)

    return either


class Launcher:
    """A kernel and its compile-time arguments; the first launch for a kind of arguments compiles it.

    The kernel's parameters are tensors, then numbers, then those of compile time. Under Triton's interpreter nothing is
    compiled, and every launch is Triton's own. Triton's launch hooks are called for first launches only.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: Grid, tensors: Sequence[Tensor], numbers: tuple[float, ...]) -> None:
        """Launches it on the current stream. The tensors must always have the same dtypes, and all be on the current
        device: one that is not ends in an illegal access.
        """
        device, any_bit = tensors[0].get_device(), 0
        addresses = [*map(_address_of, tensors)]
        for address in addresses:
            any_bit |= address
        kind = (device, numbers, *[address & 15 for address in addresses]) if any_bit & 15 else (device, numbers)
        known = self._compiled.get(kind)
        if known is None:
            compiled = self.kernel[grid](*tensors, *numbers, **self.constants)
            if compiled is not None:
                known = compiled.run, compiled.function, compiled.packed_metadata, _stream_of(), self._last(compiled)
                self._compiled[kind] = *known, compiled  # Triton unloads a kernel that nothing holds
        else:
            run, function, metadata, stream_of, last, _ = known
            hooks = (None, None, None)
            run(*grid, stream_of(device), function, metadata, *hooks, *addresses, *numbers, *last)

    def _last(self, compiled: Any) -> tuple[Any, ...]:
        """The compile-time arguments that a launch passes: none before Triton 3.3, whose signature leaves them out."""
        names = [name for name in self.kernel.arg_names if name in self.constants and name in compiled.src.signature]
        return tuple(self.constants[name] for name in names)
