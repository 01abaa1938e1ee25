"""Shared code of the settings classes: each table of a recipe is the settings class of the part it configures.

Such a class is a frozen dataclass with a docstring below each field (`distill show --explain` prints them). It
validates itself on construction, and its file does not import torch, so that recipes load instantly.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal


def raise_faults(faults: Sequence[str]) -> None:
    """Raise ValueError that lists every fault, if there are any."""
    if faults:
        raise ValueError("; ".join(faults))


def below(table: object, **least: float) -> list[str]:
    """Return a clause for every field of `table` that is below its least value or not finite."""
    values = {name: getattr(table, name) for name in least}
    return [
        f"{name} must be {'finite and ' if isinstance(value, float) else ''}at least {least[name]}, not {value}"
        for name, value in values.items()
        if not least[name] <= value < math.inf
    ]


def above(table: object, **greatest: float) -> list[str]:
    """Return a clause for every field of `table` that is above its greatest value."""
    values = {name: getattr(table, name) for name in greatest}
    return [f"{name} must be at most {greatest[name]}, not {v}" for name, v in values.items() if v > greatest[name]]


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """The types of a settings class's fields; cached, because a study of fifty recipes asks two thousand times."""
    return typing.get_type_hints(cls)


def unknown_words(table: object) -> list[str]:
    """Return a clause for every field whose type is a Literal that does not contain its value."""
    return [
        f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(table, name)!r}"
        for name, allowed, only in _choices(typing.cast(Any, type(table)))
        if getattr(table, name) not in allowed and (only or isinstance(getattr(table, name), str))
    ]


@cache
def _choices(cls: type) -> Sequence[tuple[str, tuple[str, ...], bool]]:
    """The fields that take words: the name, the words allowed, and whether only words are allowed."""
    hints = hints_of(cls)
    allowed = [(f.name, _words(hints[f.name])) for f in fields(cls)]
    return [(name, words, _is_literal(hints[name])) for name, words in allowed if words]


def _words(hint: object) -> tuple[str, ...]:
    """The words that a type hint allows: a Literal's, or those of a Literal in a union with a number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(word for member in typing.get_args(hint) for word in _words(member))
    return typing.get_args(hint) if _is_literal(hint) else ()


def _is_literal(hint: object) -> bool:
    return typing.get_origin(hint) is Literal
