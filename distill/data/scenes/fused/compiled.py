"""How the kernels are compiled: to the bits of plain float32, and kept for the next process where there is a folder."""

from __future__ import annotations

from collections.abc import Callable

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy"}
"""Lets go of the interpreter's lock; divides by nought as numpy does. No fast maths, so nothing is contracted."""


def kernel(function: Callable) -> Callable:
    """Compiled at the first call for the types it gets; kept beside its source, or in NUMBA_CACHE_DIR.

    What it calls must stand in its own file: numba looks at no other for changes.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to keep it in: compiled anew in every process
        return numba.njit(**_OPTIONS)(function)


def part(function: Callable) -> Callable:
    """A function that kernels of the same file call, compiled into them; Python cannot call it.

    Into them: a call would push every array of the tables on the stack, which costs more than most parts do.
    """
    return numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
