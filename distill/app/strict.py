"""The strict TOML reader: tables into frozen dataclasses, every fault of a file at once, with the key's path.

It knows no recipe: give it a dataclass. `set_key` writes one `a.b.0.c=value` into a table, as `--set` does.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from distill.core.plugins import did_you_mean

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used: one line per fault."""


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "an array"
    return repr(value)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "an array"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a table")


def _read_value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _read_table(typing.cast(type, hint), value, path, faults)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_read_value(inner, item, f"{path}[{i}]", faults) for i, item in enumerate(value))
    if origin is Literal and value in typing.get_args(hint) and isinstance(value, str):
        return value
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    faults.append(f"{path} must be {_expected(hint)}, not {_kind(value)}")
    return None


def _read_table(cls: type, table: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    before = len(faults)
    values = {}
    for key, value in table.items():
        if key not in fields:
            near = did_you_mean(key, list(fields))
            faults.append(f"unknown key {prefix}{key}{near.replace('mean ', 'mean ' + prefix) if near else ''}")
        else:
            values[key] = _read_value(hints[key], value, f"{prefix}{key}", faults)
    for name, f in fields.items():
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name} is missing")
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        faults.append(f"{path}: {error}" if path else str(error))
        return None


def set_key(table: dict[str, Any], assignment: str) -> None:
    """Writes one `a.b.0.c=value` into a nested table; the value is read as TOML, or as a string where that fails."""
    path, found, text = assignment.partition("=")
    if not found or not path.strip():
        raise RecipeError(f"--set {assignment}: write it as KEY=VALUE, as in --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = path.strip().split(".")
    here: Any = table
    for i, part in enumerate(parents):
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise RecipeError(f"--set {path}: {'.'.join(parents[:i])} has {len(here)} entries, numbered from 0")
            here = here[int(part)]
        else:
            here = here.setdefault(part, {})
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError(f"--set {path}: {'.'.join(parents)} is not a table")


def parse_into(cls: type[T], table: Mapping[str, Any], *, where: str) -> T:
    """A `cls` from a nested table. Raises RecipeError with one line per fault, each beginning with `where`."""
    faults: list[str] = []
    value = _read_table(cls, table, "", faults)
    if faults:
        raise RecipeError("\n".join(f"{where}: {fault}" for fault in faults))
    return typing.cast(T, value)


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested table in the file `path` with `overrides` ("train.steps=100") applied. Raises RecipeError."""
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    for assignment in overrides:
        set_key(table, assignment)
    return table


def plain(value: Any) -> Any:
    """Dataclasses and tuples as plain tables and lists: what is written and hashed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return dict(value) if isinstance(value, types.MappingProxyType) else value
