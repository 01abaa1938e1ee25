"""What the checks of plug-ins are written with: the plug-in under test, and how a broken contract is reported."""

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
"""What a user's mistake may raise; any other exception is a fault of the plug-in."""


class ContractError(AssertionError):
    """A plug-in breaks its contract."""


class NotCheckedError(Exception):
    """A contract cannot be checked with the given arguments; the message says what is missing."""


@dataclass
class Subject:
    """A plug-in to be checked. asked: its name or path. weights: a teacher's. options: a teacher's or a decoder's.

    folder: an empty folder.
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
        """Its own name; for a file, without folder and suffix."""
        return short_name(self.asked)

    @cached_property
    def teacher(self) -> Any:
        """The loaded teacher; without `weights`, its first card's, if they need no download."""
        weights = self.weights or self.module.CARDS[0].weights
        if not self.weights and weights not in ("none", "pocket"):
            raise NotCheckedError("needs weights: give --weights PATH, and --set KEY=VALUE for options of load")
        return self.module.Teacher.load(weights, **self.options)

    def predict(self, images: torch.Tensor) -> DepthMap:
        """The teacher's prediction for images; its noise, if any, is drawn from keys."""
        keys = {"keys": [f"key{i}" for i in range(len(images))]} if self.teacher.card.seeded else {}
        answer: DepthMap = self.teacher.predict(images, **keys)
        return answer

    @cached_property
    def encoder(self) -> Encoder:
        """A tiny encoder with random weights."""
        return Encoder("vit_tiny_patch16_224", blocks=[0, 1])

    @property
    def decoder(self) -> Any:
        """A new decoder, narrow if its signature has an option for that."""
        inputs = {"in_channels": [self.encoder.channels] * 4, "patch_size": self.encoder.patch_size}
        narrow = {"fusion_channels": 32, "channels": 16, "post_process_channels": [8, 8, 8, 8]}
        parameters = inspect.signature(self.module.Decoder).parameters
        options = {key: value for key, value in (inputs | narrow).items() if key in parameters} | dict(self.options)
        return self.module.Decoder(**options)


Contract = Callable[[Subject], None]


def require(kept: object, broken: str) -> None:
    """Raises ContractError with the message `broken` unless `kept` is true."""
    if not kept:
        raise ContractError(broken)


def signature(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, as the schema of a recipe's keys; ContractError if it takes *args or **kwargs."""
    parameters = inspect.signature(function).parameters
    loose = [p.name for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    require(not loose, f"{function.__qualname__} takes *{', *'.join(loose)}: unknown keys could not be detected")
    return parameters
