"""Latent networks that were trained here: how their folders are known, and whose work and licence they carry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill.core.depth import Kind
from distill.teachers import Card, WeightsMismatchError, read_config

TRAINED = "distill.json"
"""Beside the parts of a latent network that was trained here: what it is, of whom it learnt, under which licence."""


def trained_card(card: Card, folder: Path) -> Card:
    """The card of a latent network that was trained here, by the folder's own word; any other as it is."""
    told = read_config(folder / TRAINED)
    if not told:
        return card
    made = told.get("card") if isinstance(told.get("card"), dict) else {}
    assert isinstance(made, dict)
    if told.get("kind") not in Kind._value2member_map_:
        raise WeightsMismatchError(f"{folder / TRAINED}: kind is {told.get('kind')!r}, which is no kind of map")
    return replace(
        card,
        kind=Kind(told["kind"]),
        licence=str(made.get("licence", "unknown")),
        commercial=made.get("commercial") is True,
        note=str(made.get("name", "")),
    )
