"""The whole range, its halves and its quarters together (Distill-Any-Depth, Sec. 3.1; HDN, depth-range contexts)."""

from __future__ import annotations

from distill.losses.normalize._contexts import comparison

INVARIANT = True
LEVELS = (1, 2, 4)
compare = comparison(LEVELS)
