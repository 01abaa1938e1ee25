"""Former names of recipe keys. A recipe that uses one gets a fault with the new name; recipes stored with labels and
students are still read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from distill.training.settings import RENAMED as RENAMED_TRAIN

RENAMED = {
    "images.wheels": "images.bundled_photos",
    "crops.draws": "crops.crops_per_image",
    "crops.small": "crops.on_small",
    "student.start": "student.init_from",
    "student.encoder_start": "student.encoder_init_from",
    "student.decoder_start": "student.decoder_init_from",
    "student.leave_out_frozen_encoder": "student.exclude_frozen_encoder",
    "loss.faithful": "loss.reference_hdn",
    **{f"train.{old}": f"train.{new}" for old, new in RENAMED_TRAIN.items()},
}
"""Old key: new key, in the same table."""

RENAMED_VALUES = {("labels.store", "own"): "as_is", ("labels.sky", "own"): "teacher"}
"""(key, old value): new value."""


def with_current_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that labels or a student were made with, as a nested table with current names."""
    table = copy.deepcopy(dict(recipe))
    for old, new in RENAMED.items():
        name, _, key = old.partition(".")
        for part in _parts(table, name):
            if key in part:
                part[new.partition(".")[2]] = part.pop(key)
    for (path, value), new_value in RENAMED_VALUES.items():
        name, _, key = path.partition(".")
        for part in _parts(table, name):
            if part.get(key) == value:
                part[key] = new_value
    return table


def _parts(table: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    parts = table.get(name, [])
    return [part for part in (parts if isinstance(parts, list) else [parts]) if isinstance(part, dict)]
