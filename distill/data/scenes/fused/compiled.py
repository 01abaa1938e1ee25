"""Compilation of the kernels: bit-exact float32, cached on disk for later processes where a folder is writable."""

from __future__ import annotations

from collections.abc import Callable

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""Releases the GIL; divides by zero as numpy does. No fast-math, so no operations are contracted.

No reference counting (the option is private): the kernels allocate and keep no arrays, and counting at each use of a
table would take longer than their computation. Therefore callers pass in the working memory.
"""


def kernel(function: Callable) -> Callable:
    """Compile a function at its first call for the argument types; cached beside its source, or in NUMBA_CACHE_DIR.

    The functions that it calls must be in the same file: numba checks no other for changes. If its tables move to
    another module, the kernel must move by a line at least: the cache names the old module and would fail to load.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder for the cache: compiled in every process
        return numba.njit(**_OPTIONS)(function)


def part(function: Callable) -> Callable:
    """Compile a function to be inlined into the kernels of the same file; it cannot be called from Python."""
    return numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
