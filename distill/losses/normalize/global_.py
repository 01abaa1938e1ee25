"""One context, the whole image: (d - median) / mean|d - median| (Distill-Any-Depth, Sec. 3.1, N_glo; MiDaS)."""

from __future__ import annotations

from distill.losses.normalize._contexts import comparison

INVARIANT = True
LEVELS = (1,)
compare = comparison(LEVELS)
