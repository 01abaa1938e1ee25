"""How the kernels are compiled: to the bits of plain float32, and kept for the next process where there is a folder."""

from __future__ import annotations

from collections.abc import Callable

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""Lets go of the interpreter's lock; divides by nought as numpy does. No fast maths, so nothing is contracted.

No counts of references (the option has no public name): the kernels make no array and keep none, and counting at each
use of a table takes longer than all that they compute. So whoever calls one gives it the memory that it works in.
"""


def kernel(function: Callable) -> Callable:
    """Compiled at the first call for the types it gets; kept beside its source, or in NUMBA_CACHE_DIR.

    What it calls must stand in its own file: numba looks at no other for changes. A kernel whose tables move to another
    module must move too, by a line at least: what is kept names the old one, and would not load.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to keep it in: compiled anew in every process
        return numba.njit(**_OPTIONS)(function)


def part(function: Callable) -> Callable:
    """A function that kernels of the same file call, compiled into them; Python cannot call it."""
    return numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
