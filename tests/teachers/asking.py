"""Loads the tiny teachers of tests/tiny_teachers.py and predicts with them."""

from __future__ import annotations

import inspect

import torch

from distill.core.plugins import find, names
from tests.tiny_teachers import KEYS, SIZE

NAMES = names("distill.teachers")
NETWORKS = [name for name in NAMES if name not in ("analytic", "stored")]
# Networks that support more than one input size; Depth Pro does not.
RESIZING = [n for n in NETWORKS if "resize" in inspect.signature(find("distill.teachers", n).Teacher.load).parameters]
IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
_LOADED: dict[str, object] = {}


def load(made, name, **options):
    """A tiny teacher; the same options give the same object, so tests must not modify it."""
    key = f"{name} {sorted(options.items(), key=str)}"
    if key not in _LOADED:
        weights, defaults = made(name)
        if options.get("resize") == "none":
            defaults = {key: value for key, value in defaults.items() if key != "native_size"}
        _LOADED[key] = find("distill.teachers", name).Teacher.load(weights, **(defaults | options))
    return _LOADED[key]


def predict(teacher, images, keys=KEYS):
    return teacher.predict(images, keys=list(keys)) if teacher.card.seeded else teacher.predict(images)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text
