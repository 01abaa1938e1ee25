"""The strict TOML reader: tables into frozen dataclasses, every fault of a file at once, with the key's path.

It works for any dataclass, not only recipes. `set_key` writes one `a.b.0.c=value` into a table, as `--set` does.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from distill.core.files import decoded
from distill.core.settings import hints_of
from distill.core.wording import did_you_mean

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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, typing.get_args(hint)))
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a table")


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The origin and arguments of a type; cached, since typing is slower here than everything else together."""
    return typing.get_origin(hint), typing.get_args(hint)


@functools.cache
def keys_of(cls: type) -> Mapping[str, dataclasses.Field[Any]]:
    """The fields of a settings class that are keys, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("key", True)}


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """The state of one read: the renamed keys and values, and the faults found so far."""

    renamed: Mapping[str, str]
    renamed_values: Mapping[tuple[str, str], str]
    faults: list[str]

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` converted to the type `hint`; None, with a fault recorded, if that fails."""
        origin, inner = _parts(hint)
        # The parts of a table or array of known type are checked one by one, so that the fault names the key.
        check_whole = hint is Any or not isinstance(value, Mapping | list)
        if check_whole and (fault := _limit_fault(value)):
            self.faults.append(f"{path} {fault}")
            return None
        if hint is Any:
            return value
        if origin in (typing.Union, types.UnionType):  # an integer or a word
            hint = next((type_ for type_ in inner if type(value) is type_ or value in typing.get_args(type_)), hint)
            origin, inner = _parts(hint)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return self.table(typing.cast(type, hint), value, path)
        if origin is tuple and isinstance(value, list):
            item_types = inner[:1] * len(value) if inner[1:] == (...,) else inner
            if len(item_types) != len(value):
                self.faults.append(f"{path} must have {len(item_types)} entries, not {len(value)}")
                return None
            return tuple(
                self.value(type_, item, f"{path}[{i}]")
                for i, (type_, item) in enumerate(zip(item_types, value, strict=True))
            )
        if origin is Literal and value in inner and isinstance(value, str):
            return value
        if origin is dict and isinstance(value, Mapping):
            return {key: self.value(inner[1], item, f"{path}.{key}") for key, item in value.items()}
        if hint is float and type(value) in (int, float):
            return float(value)
        if hint in (str, int, bool) and type(value) is hint:
            return value
        new_value = self.renamed_values.get((_without_numbers(path), value)) if isinstance(value, str) else None
        self.faults.append(
            f"{path} = {value!r} is renamed to {new_value!r}"
            if new_value
            else _brackets_fault(hint, value, path) or f"{path} must be {_expected(hint)}, not {_kind(value)}"
        )
        return None

    def table(self, cls: type, table: Mapping[str, Any], path: str) -> Any:
        """`table` converted to a `cls`; None, with its faults recorded, if that fails."""
        hints = hints_of(cls)
        known = keys_of(cls)
        prefix = f"{path}." if path else ""
        num_faults = len(self.faults)
        values = {}
        for key, value in table.items():
            if key in known:
                values[key] = self.value(hints[key], value, f"{prefix}{key}")
            elif new_name := self.renamed.get(_without_numbers(prefix + key)):
                self.faults.append(f"{prefix}{key} is renamed to {prefix}{new_name.rpartition('.')[2]}")
            else:
                near = did_you_mean(key, known, prefix=prefix)
                known_keys = f"; {path or 'the file'} has {', '.join(known)}"
                self.faults.append(f"unknown key {prefix}{key}{near or known_keys}")
        for name, f in known.items():
            if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                self.faults.append(f"{prefix}{name} is missing")
        if len(self.faults) > num_faults:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            self.faults.append(f"{path}: {error}" if path else str(error))
            return None


def _brackets_fault(hint: Any, value: Any, path: str) -> str:
    """What is wrong with the brackets of a table's header: single for one of several, double for an only one; or ""."""
    origin, inner = _parts(hint)
    if origin is tuple and dataclasses.is_dataclass(inner[0]) and isinstance(value, Mapping):
        return f"[{path}] needs double brackets, [[{path}]]"
    only_tables = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    if dataclasses.is_dataclass(hint) and value and only_tables:
        return f"[[{path}]] needs single brackets, [{path}]"
    return ""


def _limit_fault(value: Any, depth: int = 0) -> str:
    """What is wrong with a value whatever its type should be: integers beyond 32 bits, tables nested too deep."""
    if type(value) is int and not -(2**31) <= value < 2**31:
        return "must be a whole number below 2,147,483,648"
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if depth > 16:
        return "has tables nested more than 16 deep"
    return next((fault for item in inner if (fault := _limit_fault(item, depth + 1))), "")


def _without_numbers(path: str) -> str:
    return re.sub(r"\[\d+\]", "", path)


def set_key(table: dict[str, Any], assignment: str) -> None:
    """Writes one `a.b.0.c=value` into a nested table; the value is read as TOML, or as a string if that fails."""
    path, separator, text = assignment.partition("=")
    if not separator or not path.strip():
        raise RecipeError(f"--set {assignment}: write it as KEY=VALUE, as in --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    set_value(table, path.strip(), value, where="--set ")


def set_value(table: dict[str, Any], path: str, value: Any, *, where: str) -> None:
    """Writes a value at the key path `a.b.0.c` of a nested table. Raises RecipeError, beginning with `where`."""
    *parents, last = path.split(".")
    node: Any = table
    for i, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(f"{where}{path}: {'.'.join(parents[:i])} has {len(node)} entries, numbered from 0")
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"{where}{path}: {'.'.join(parents)} is not a table")


def parse_into(
    cls: type[T],
    table: Mapping[str, Any],
    *,
    where: str,
    renamed: Mapping[str, str] | None = None,
    renamed_values: Mapping[tuple[str, str], str] | None = None,
) -> T:
    """A `cls` from a nested table. Raises RecipeError with one line per fault, each beginning with `where`.

    A field with the metadata {"key": False} is not a key. renamed: {old key: new key}, as paths without numbers
    ("images.wheels"), for the fault's line; renamed_values: {(path, old value): new value}, likewise.
    """
    reading = _Reading(renamed or {}, renamed_values or {}, [])
    value = reading.table(cls, table, "")
    if reading.faults:
        raise RecipeError("\n".join(f"{where}: {fault}" for fault in reading.faults))
    return typing.cast(T, value)


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested table in the file `path` with `overrides` ("train.steps=100") applied. Raises RecipeError."""
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    text = ""
    try:
        text = decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        table = tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{path}: not a recipe: its tables or arrays are nested too deep") from error
    except ValueError as error:  # from tomllib, for a byte that is not UTF-8, or a number of more than 4300 digits
        raise RecipeError(f"{path}: not valid TOML: {error}{_toml_hint(text, error)}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
    for assignment in overrides:
        set_key(table, assignment)
    return table


def _toml_hint(text: str, error: ValueError) -> str:
    """How to fix a common mistake in the line at which the TOML parser stopped; "" if none is recognized."""
    if isinstance(error, UnicodeDecodeError):
        return "; save it as UTF-8"
    position = re.search(r"at line (\d+)", str(error))
    lines = text.split("\n")
    line = lines[int(position[1]) - 1] if position and int(position[1]) <= len(lines) else ""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
    if odd := next((c for c in unquoted if not c.isascii()), ""):
        return f"; there is a {unicodedata.name(odd, repr(odd))}: type a plain character in its place"
    if re.search(r'"[^"]*\\[^"]*"', line):
        return "; a backslash in double quotes starts an escape: write C:/photos, or 'C:\\photos' in single quotes"
    if word := re.search(r"=\s*(True|False|None|null|yes|no|on|off)\b", unquoted):
        return f"; instead of {word[1]} write true or false, or leave the key out"
    if re.match(r"\s*[\w.-]+\s*:", unquoted):
        return "; keys and values are joined by =, as in steps = 100"
    if number := re.search(r"=\s*(-?\d+),(\d+)\s*$", unquoted):
        return f"; a decimal point is needed: {number[1]}.{number[2]}"
    return ""


def plain(value: Any) -> Any:
    """Dataclasses and tuples as plain tables and lists: the form that is written and hashed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: plain(getattr(value, key)) for key in keys_of(type(value))}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return dict(value) if isinstance(value, types.MappingProxyType) else value
