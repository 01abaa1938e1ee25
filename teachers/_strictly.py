"""Strict loading of weights: every parameter must be in the file, and every tensor of the file in the network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.strictness import mismatches, unmatched
from distill.core.weights import WeightsMismatchError
from distill.core.wording import on_one_line, shortened

if TYPE_CHECKING:
    from torch import Tensor, nn


REPORT_MISMATCHES: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which transformers' `from_pretrained` reports every mismatch, shapes too, for us to judge."""


def check_claimed(missing: Iterable[str], unexpected: Iterable[str], where: str | Path, *, what: str) -> None:
    """Raises WeightsMismatchError that names the first keys, unless both are empty."""
    _raise(unmatched(sorted(missing), sorted(unexpected)), where, what)


def sizing_tensors(
    state: Mapping[str, Tensor], dimensions: Mapping[str, int], where: str | Path, *, what: str
) -> list[Tensor]:
    """The tensors whose shapes are a network's sizes, in the order of `dimensions`: name -> number of dimensions.

    Raises WeightsMismatchError that names those that are missing, empty or of another number of dimensions.
    """
    check_claimed([name for name in dimensions if name not in state], (), where, what=what)
    odd = [
        f"{name} ({tuple(state[name].shape)}, not {count} dimensions)"
        for name, count in dimensions.items()
        if state[name].ndim != count or not state[name].numel()
    ]
    _raise([f"has another shape for {shortened(odd)}"] if odd else [], where, what)
    return [state[name] for name in dimensions]


def _raise(faults: Sequence[str], where: str | Path, what: str) -> None:
    if faults:
        raise WeightsMismatchError(f"{where} is not a {what} checkpoint: it {'; it '.join(faults)}")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str | Path, *, what: str) -> None:
    """`module.load_state_dict`, but every key must match in name and shape; WeightsMismatchError names those that do
    not.
    """
    _raise(mismatches(state, module.state_dict()), where, what)
    module.load_state_dict(dict(state), assign=True)
    module.requires_grad_(False)


def load_checked(
    build: Callable[[], tuple[Any, Any]], where: str | Path, *, what: str, optional: tuple[str, ...] = ()
) -> Any:
    """The model of `build`, a `from_pretrained(..., output_loading_info=True)` of transformers or diffusers.

    Both libraries report mismatches and continue with random weights; here they raise WeightsMismatchError. optional:
    parts of names that may be missing or unexpected. Silences the progress bars and reports while building.
    """
    libraries = [sys.modules[name].utils.logging for name in ("transformers", "diffusers") if name in sys.modules]
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        model, info = build()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a description's wrong types raise anything; `where` is the user's file
        raise WeightsMismatchError(
            f"{where} cannot be loaded as a {what} checkpoint: {on_one_line(error, most=200)}"
        ) from error
    finally:
        for library, verbosity, had_bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if had_bar:
                library.enable_progress_bar()
    missing, unexpected = (
        [key for key in info[name] if not any(part in key for part in optional)]
        for name in ("missing_keys", "unexpected_keys")
    )
    check_claimed(missing, unexpected, where, what=what)
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        _raise([f"has another shape for {key} ({tuple(stored)}, not {tuple(expected)})"], where, what)
    return model
