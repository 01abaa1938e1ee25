"""Whether tensors are exactly those of a network: the one comparison behind every strict loading of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from distill.core.wording import shortened

if TYPE_CHECKING:
    from torch import Tensor


def unmatched(missing: Iterable[str], unknown: Iterable[str]) -> list[str]:
    """A clause for each of the two that is not empty: "lacks a, b, c and 2 more", "has unknown d"."""
    named = (("lacks", list(missing)), ("has unknown", list(unknown)))
    return [f"{fault} {shortened(keys)}" for fault, keys in named if keys]


def mismatches(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, may_lack: tuple[str, ...] = ()
) -> list[str]:
    """What keeps `state` from being loaded as `expected`, a network's own state; clauses about "it", none if it fits.

    Names, shapes, and whole numbers in place of floating ones. may_lack: ends of names that may be missing.
    """
    faults = unmatched(
        (key for key in expected if key not in state and not key.endswith(may_lack)),
        (key for key in state if key not in expected),
    )
    pairs = {key: (state[key], tensor) for key, tensor in expected.items() if key in state}
    reshaped = [
        f"{key} ({tuple(ours.shape)}, not {tuple(theirs.shape)})"
        for key, (ours, theirs) in pairs.items()
        if ours.shape != theirs.shape
    ]
    if reshaped:
        faults.append(f"has another shape for {shortened(reshaped)}")
    quantized = [
        f"{key} as {str(ours.dtype).removeprefix('torch.')}"
        for key, (ours, theirs) in pairs.items()
        if theirs.is_floating_point() and not ours.is_floating_point()
    ]
    if quantized:
        faults.append(f"has {shortened(quantized)}: give weights that are not quantized")
    return faults
