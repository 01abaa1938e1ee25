"""Triton kernels for the losses on CUDA: the numbers of the torch code, which stays the reference, in a few launches.

    keys      floats in the order of integers; the contexts of a pixel
    select    medians and mean deviations of all contexts of both maps
    small     the same of small maps, one launch
    contexts  the loss in contexts
    gradient  the multi-scale gradient loss

Everything is float32, waits for nothing on the host, can be captured in a CUDA graph, and gives the same bits every time.
Nothing here imports Triton before `trusted` has been asked about a CUDA tensor: other machines need not have it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

# True: a kernel that fails raises. Tests and speed scripts set it; a training run goes on with the torch code instead.
loud = False
_found: dict[tuple[Hashable, torch.device], bool] = {}


class KernelError(RuntimeError):
    """The kernels gave other numbers than the torch code."""


def wanted(values: Tensor) -> bool:
    """Whether kernels are for such a tensor at all: float32 on CUDA."""
    return values.is_cuda and values.dtype == torch.float32


def trusted(name: Hashable, values: Tensor, trial: Callable[[torch.device], list[tuple[Tensor, Tensor]]]) -> bool:
    """Whether the kernels of this name do their work for tensors like `values`; tried once a process and device.

    trial: runs them on a small example and returns pairs of what they gave and what the torch code gives. A fault
    (no Triton, no C compiler for its launchers, a card that it does not know, other numbers) is one warning.
    """
    if not wanted(values):
        return False
    key = (name, values.device)
    if key not in _found:
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a trial waits for the device, which a graph cannot
        _found[key] = _works(trial, values.device)
    return _found[key]


def _works(trial: Callable[[torch.device], list[tuple[Tensor, Tensor]]], device: torch.device) -> bool:
    try:
        with torch.device(device):
            for ours, reference in trial(device):
                if not torch.allclose(ours, reference, rtol=1e-3, atol=1e-6 + 1e-4 * float(reference.abs().max())):
                    raise KernelError(f"off by {float((ours - reference).abs().max()):.3g}")
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # noqa: BLE001  whatever a compiler or driver raises, the torch code can do the work
        if loud:
            raise
        if all(_found.values()):
            reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
            warnings.warn(
                f"the fused loss kernels do not work here ({reason}); torch does their work, slower", stacklevel=4
            )
        return False
    return True
