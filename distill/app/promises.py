"""What checks of plug-ins are written with: the plug-in that is checked, and how a promise is found broken."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distill.core.depth import DepthMap
from distill.core.plugins import KINDS, find, short_name
from distill.students.encoder import Encoder

EXPECTED = (OSError, ValueError, LookupError)
"""What a person's mistake may raise; everything else is a fault of the plug-in."""


class ContractError(AssertionError):
    """A promise that a plug-in does not keep."""


class NotCheckedError(Exception):
    """A promise that cannot be looked at with what was given; the message says what is missing."""


@dataclass
class Subject:
    """A plug-in to be checked. asked: its name or path. weights, options: of a teacher, or a decoder's options.

    folder: an empty one that nothing lies in.
    """

    kind: str
    asked: str
    folder: Path
    weights: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def module(self) -> Any:
        """The plug-in, imported."""
        return find(KINDS[self.kind], self.asked)

    @property
    def name(self) -> str:
        """Its own name: of a file that without folder and ending."""
        return short_name(self.asked)

    @cached_property
    def teacher(self) -> Any:
        """The loaded teacher; without `weights` the one whose first card needs none but what is here."""
        weights = self.weights or self.module.CARDS[0].weights
        if not self.weights and weights not in ("none", "pocket"):
            raise NotCheckedError("needs weights: --weights PATH, and --set KEY=VALUE for options of load")
        return self.module.Teacher.load(weights, **self.options)

    def predict(self, images: torch.Tensor) -> DepthMap:
        """The teacher's answer to images; noise is drawn from keys where it draws any."""
        keys = {"keys": [f"key{i}" for i in range(len(images))]} if self.teacher.card.seeded else {}
        answer: DepthMap = self.teacher.predict(images, **keys)
        return answer

    @cached_property
    def encoder(self) -> Encoder:
        """A tiny one with random weights."""
        return Encoder("vit_tiny_patch16_224", blocks=[0, 1])

    @property
    def decoder(self) -> Any:
        """A new decoder, narrow where it can be said how."""
        given = {"in_channels": [self.encoder.channels] * 4, "patch_size": self.encoder.patch_size}
        narrow = {"fusion_channels": 32, "channels": 16, "post_process_channels": [8, 8, 8, 8]}
        taken = inspect.signature(self.module.Decoder).parameters
        options = {key: value for key, value in (given | narrow).items() if key in taken} | dict(self.options)
        return self.module.Decoder(**options)


Contract = Callable[[Subject], None]


def require(kept: object, broken: str) -> None:
    """Raises ContractError, which says how it is broken, unless `kept`."""
    if not kept:
        raise ContractError(broken)


def signature(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function that is the schema of a recipe's keys; ContractError where it takes just any."""
    parameters = inspect.signature(function).parameters
    loose = [p.name for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    require(not loose, f"{function.__qualname__} takes *{', *'.join(loose)}: no key could be told to be unknown")
    return parameters
