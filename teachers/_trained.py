"""Latent networks that were trained here: how their folders are recognised, and their cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill.core.depth import Kind
from distill.core.folders import LATENT
from distill.teachers import Card, WeightsMismatchError, read_config


def trained_card(card: Card, folder: Path) -> Card:
    """`card` with the facts of distill.json, for a latent network that was trained here; else unchanged."""
    description = read_config(folder / LATENT)
    if not description:
        return card
    stored = description.get("card")
    student_card = stored if isinstance(stored, dict) else {}
    if description.get("kind") not in list(Kind):
        raise WeightsMismatchError(f"{folder / LATENT}: kind is {description.get('kind')!r}, which is no kind of map")
    return replace(
        card,
        kind=Kind(description["kind"]),
        licence=str(student_card.get("licence", "unknown")),
        commercial=student_card.get("commercial") is True,
        note=str(student_card.get("name", "")),
    )
