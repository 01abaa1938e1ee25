"""The meaning of each recipe key, read from the settings classes: the string below each field.

`distill show RECIPE --explain` prints a recipe with the meaning above each key, `--explain KEY` one key or one table;
`python -m distill.app.explain` prints the reference page, docs/reference/recipe.md; distill.app.handbook writes all.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import tomli_w

from distill.app.recipe import USES, Recipe
from distill.app.strict import RecipeError, keys_of, plain
from distill.core.settings import hints_of
from distill.core.wording import did_you_mean

WIDTH = 118
_PAGE = """# The keys of a recipe

Every table of a recipe is the settings class of the part that it is for; this page is made from those classes by
`python -m distill.app.explain`. `distill show RECIPE --explain` prints a recipe with the same text above each key.
Tables in double brackets may stand in a recipe several times, one for each source, teacher or benchmark. "Paper" is
Distill-Any-Depth; "Inferred" is what it does not say and related work does; "Ours" is a choice of this project.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe. type, default: in TOML's terms; default is empty if there is none."""

    name: str
    meaning: str
    type: str
    default: str


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One table of a recipe. header: as written in a recipe, "[crops]" or "[[images]]"."""

    name: str
    header: str
    meaning: str
    keys: tuple[Key, ...]


@cache
def meanings(cls: type) -> dict[str, str]:
    """The meaning of every field of a settings class, as one line: the string below it, or in its metadata if the
    class is made from a folder (LossSettings); empty if there is none.
    """
    from_metadata = {f.name: str(f.metadata["meaning"]) for f in dataclasses.fields(cls) if "meaning" in f.metadata}
    if from_metadata:
        return meanings(cls.__bases__[0]) | from_metadata
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    by_field = {}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            by_field[node.target.id] = " ".join(str(text).split())
    return by_field


@cache
def parts() -> tuple[Part, ...]:
    """Every table of a recipe, in a recipe's order."""
    hints, tables = hints_of(Recipe), []
    for name in keys_of(Recipe):
        several = typing.get_origin(hints[name]) is tuple
        cls = typing.get_args(hints[name])[0] if several else hints[name]
        header = f"[[{name}]]" if several else f"[{name}]"
        tables.append(Part(name, header, " ".join((cls.__doc__ or "").split()), tuple(_keys(cls))))
    return tuple(tables)


def _keys(cls: type) -> Iterator[Key]:
    for name, f in keys_of(cls).items():
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        text = "" if default is dataclasses.MISSING else _toml(default)
        yield Key(name, meanings(cls)[name], _type(hints_of(cls)[name]), text)


def _toml(value: Any) -> str:
    if value == {}:
        return "{}"
    text = tomli_w.dumps({"k": plain(value)}).partition("=")[2]
    return re.sub(r",?\s*\n\s*\]", "]", re.sub(r"\[\n\s+", "[", text)).replace("\n    ", " ").strip()


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in inner)
    if origin is tuple:
        return f"array of {_type(inner[0])}s" if inner[1:] == (...,) else f"array of {len(inner)} {_type(inner[0])}s"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, inner))
    names = {str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(hint, "table")


# --- a recipe, explained ----------------------------------------------------------------------------------------------


def explained(recipe: Recipe) -> str:
    """The resolved recipe as TOML, each key below a comment with its meaning; parsing it gives an equal recipe."""
    lines: list[str] = []
    for part in parts():
        settings = getattr(recipe, part.name)
        for table in settings if isinstance(settings, tuple) else (settings,):
            lines += [*_comment(part.meaning), part.header]
            for line in tomli_w.dumps({part.name: plain(table)}).splitlines()[1:]:
                match = re.match(rf"(?:\[{part.name}\.)?([\w-]+)(?: = |[.\]])", line)
                lines += [text for k in part.keys if match and k.name == match[1] for text in _comment(k.meaning)]
                lines.append(line)
            lines.append("")
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def explain_key(key: str, recipe: Recipe | None = None) -> str:
    """The meaning of `key` ("crops.size"), its type, default and value in `recipe`; or those of a table ("crops").

    Raises RecipeError with a "did you mean" for a key that no recipe has.
    """
    name, _, key_path = key.partition(".")
    known = {part.name: part for part in parts()}
    if name not in known:
        raise RecipeError(f"no table {name!r} in a recipe{did_you_mean(name, known)}; there are {', '.join(known)}")
    part = known[name]
    key_path = re.sub(r"^\d+(\.|$)", "", key_path)
    keys = [k for k in part.keys if not key_path or k.name == key_path.partition(".")[0]]
    if not keys:
        near = did_you_mean(key_path, (k.name for k in part.keys), prefix=f"{name}.")
        raise RecipeError(f"no key {key}{near}")
    lines = [] if key_path else [part.header, *textwrap.wrap(part.meaning, WIDTH), ""]
    for k in keys:
        lines += [f"{name}.{k.name}: {k.type}" + (f", default {k.default}" if k.default else ", needed")]
        lines += textwrap.wrap(k.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines += [f"    here: {value}" for value in _values(recipe, name, k.name)]
    return "\n".join(lines) + "\n"


def _values(recipe: Recipe | None, table: str, key: str) -> list[str]:
    if recipe is None:
        return []
    settings = getattr(recipe, table)
    if isinstance(settings, tuple):
        return [f"{table}.{i}.{key} = {_toml(getattr(item, key))}" for i, item in enumerate(settings)]
    return [f"{table}.{key} = {_toml(getattr(settings, key))}"]


# --- the reference page -----------------------------------------------------------------------------------------------


def reference() -> str:
    """docs/reference/recipe.md."""
    text = [_PAGE]
    for part in parts():
        users = [verb for verb, tables in USES.items() if part.name in tables]
        used = f" Used by {', '.join(f'`distill {verb}`' for verb in users)}." if users else ""
        text.append(f"## `{part.header}`\n\n{part.meaning}{used}\n")
        text.append("| key | type | default | meaning |\n|---|---|---|---|")
        for k in part.keys:
            cells = (f"`{k.name}`", k.type, f"`{k.default}`" if k.default else "needed", k.meaning)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    sys.stdout.write(reference())
