"""The folder is the registry: a plug-in is one file, its name is its file name (`global` lies in global_.py, for a
module cannot be called like a keyword).

Files whose name starts with an underscore are parts of their neighbours, not plug-ins. Listing reads the folder and
imports nothing. A plug-in whose own dependency is missing raises that ModuleNotFoundError, never "unknown plug-in".
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[2]


def names(package: str) -> list[str]:
    """The plug-ins of `package` ("distill.teachers", "distill.students.decoders", ...), sorted; imports nothing."""
    folder = _ROOT.joinpath(*package.split("."))
    return sorted(path.stem.removesuffix("_") for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """The module of plug-in `name`; LookupError that lists what exists, with a "did you mean"."""
    fault = name_fault(package, name)
    if fault:
        raise LookupError(fault)
    return importlib.import_module(f"{package}.{name}{'_' * keyword.iskeyword(name)}")


def name_fault(package: str, name: str) -> str:
    """What is wrong with `name` as a plug-in of `package`, or an empty string."""
    known = names(package)
    if name in known:
        return ""
    folder = re.sub(r"^distill/(?=teachers|students|eval)", "", package.replace(".", "/"))
    return f"no {folder}/{name}.py{did_you_mean(name, known)}; {folder}/ has: {', '.join(known)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ "; did you mean NAME?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def option_faults(function: Callable[..., object], options: Mapping[str, object], where: str) -> list[str]:
    """What is wrong with `options` as keyword arguments of `function`: the signature is the schema."""
    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in ("self", "cls")
    ]
    faults = [f"unknown key {where}.{key}{did_you_mean(key, known)}" for key in options if key not in known]
    for key in options.keys() & set(known):
        default = inspect.signature(function).parameters[key].default
        # Other types say little of what is meant: a path may be a string, a number None.
        if type(default) in (bool, int, str) and type(options[key]) is not type(default):
            faults.append(f"{where}.{key} must be {_WORDS[type(default)]}, not {options[key]!r}")
    return faults


_WORDS = {bool: "true or false", int: "a whole number", str: "text"}
