"""The four quarters of the depth range alone: the finest contexts of `hybrid` (Distill-Any-Depth, Sec. 3.1)."""

from __future__ import annotations

from distill.losses.normalize._contexts import comparison

INVARIANT = True
LEVELS = (4,)
compare = comparison(LEVELS)
