"""Where a student's knowledge comes from and what that allows: images, teachers, and initial weights.

"commercial" is True only if every one of them is known to allow it. Weights from a local file count as unknown,
whatever their name says. The licence of images is the recipe's own text (labels.licence): it must name one that allows
commercial use (CC0, CC BY, Apache, MIT, BSD, public domain, one's own) and none that forbids it. This is no legal
advice; the terms are written beside the answer. The rules are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.app import latent
from distill.app.recipe import Recipe
from distill.students import checkpoint
from distill.students.encoder import licence_of

_FREE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "dinov3-license")
OPEN = re.compile(r"\bcc0|\bcc[ -]by\b|\bapache|\bmit\b|\bbsd|public domain|\bown\b", re.IGNORECASE)
"""Words of licences that allow commercial use and passing on."""
_FORBIDS = re.compile(r"research|academic|commercial|personal|\bnc\b", re.IGNORECASE)


def teachers_of(dataset: Any) -> dict[str, dict[str, Any]]:
    """By teacher: weights, licence and whether it allows commercial use, for labels in shards or made online."""
    manifest = getattr(dataset, "manifest", None)
    if manifest is not None:
        cards = manifest["teachers"]
    else:
        cards_by_name = {name: getattr(teacher, "card", None) for name, teacher in dataset.networks}
        cards = {
            name: {key: getattr(card, key) for key in ("weights", "revision", "licence", "commercial")}
            for name, card in cards_by_name.items()
            if card is not None
        }
    return {name: dict(card) for name, card in cards.items()}


def lineage(recipe: Recipe, teachers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], bool]:
    """The card's "lineage" and "commercial"."""
    terms = recipe.labels.licence
    images = {"licence": terms, "commercial": bool(OPEN.search(terms)) and not _FORBIDS.search(terms)}
    keys = ("weights", "licence", "commercial")
    origins: dict[str, Any] = {
        "images": images,
        **{f"teacher {name}": {key: card[key] for key in keys if key in card} for name, card in teachers.items()},
        **_initial_weights(recipe),
    }
    # The card of procedural scenes' ground truth has no licence: it forbids nothing.
    return origins, all(origin.get("commercial", True) is True for origin in origins.values())


def _initial_weights(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The origins of the student's initial weights; empty for random ones."""
    spec = recipe.student
    origins: dict[str, dict[str, Any]] = {}
    for part, start in (
        ("start", spec.init_from),
        ("encoder", spec.encoder_init_from),
        ("decoder", spec.decoder_init_from),
    ):
        if start:
            card = checkpoint.read_card(checkpoint.fetch(start))
            licence = card.get("licence", "unknown")
            origins[part] = {"weights": start, "licence": licence, "commercial": card.get("commercial") is True}
    if spec.is_one_step:
        origins["start"] = latent.base_licence(spec.weights)
    elif spec.weights == "pretrained":
        licence = licence_of(spec.encoder)
        origins["encoder"] = {"weights": f"timm's {spec.encoder}", "licence": licence, "commercial": licence in _FREE}
    elif spec.weights:
        origins["encoder"] = {"weights": Path(spec.weights).name, "licence": "unknown", "commercial": False}
    if spec.decoder_weights:
        origins["decoder"] = {"weights": Path(spec.decoder_weights).name, "licence": "unknown", "commercial": False}
    return origins
