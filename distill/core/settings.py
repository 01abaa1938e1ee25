"""What settings classes share: a recipe's table is the settings class of the part that it is for.

Such a class is a frozen dataclass whose fields each carry their meaning as a string below them (`distill show
--explain` prints it), it judges itself when it is made, and its file imports no torch: a recipe is read in an instant.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal


def refuse(faults: Sequence[str]) -> None:
    """Raises ValueError with every fault, where there is one."""
    if faults:
        raise ValueError("; ".join(faults))


def below(table: object, **least: float) -> list[str]:
    """A clause for every field of `table` that is less than its least value, or not finite."""
    values = {name: getattr(table, name) for name in least}
    return [
        f"{name} must be {'finite and ' if isinstance(value, float) else ''}at least {least[name]}, not {value}"
        for name, value in values.items()
        if not least[name] <= value < math.inf
    ]


def above(table: object, **greatest: float) -> list[str]:
    """A clause for every field of `table` that is more than its greatest value."""
    values = {name: getattr(table, name) for name in greatest}
    return [f"{name} must be at most {greatest[name]}, not {v}" for name, v in values.items() if v > greatest[name]]


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """The types of a settings class's fields. Read once: a study of fifty recipes asks two thousand times."""
    return typing.get_type_hints(cls)


def unknown_words(table: object) -> list[str]:
    """A clause for every field whose type is a Literal that does not hold its value."""
    return [
        f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(table, name)!r}"
        for name, allowed, only in _choices(typing.cast(Any, type(table)))
        if getattr(table, name) not in allowed and (only or isinstance(getattr(table, name), str))
    ]


@cache
def _choices(cls: type) -> Sequence[tuple[str, tuple[str, ...], bool]]:
    """The fields of words: the name, the words allowed, and whether nothing else is."""
    hints = hints_of(cls)
    named = [(f.name, _words(hints[f.name])) for f in fields(cls)]
    return [(name, words, _is_literal(hints[name])) for name, words in named if words]


def _words(hint: object) -> tuple[str, ...]:
    """The words that a hint allows: a Literal's, or those of the Literal beside a number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(word for one in typing.get_args(hint) for word in _words(one))
    return typing.get_args(hint) if _is_literal(hint) else ()


def _is_literal(hint: object) -> bool:
    return typing.get_origin(hint) is Literal
