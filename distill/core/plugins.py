"""Plug-ins by name: a file of the folder, an entry point of an installed package, or a Python file by its path.

The folder is the registry: a plug-in is one file, and its name is its file name (`global` is in global_.py, because a
module cannot be named like a keyword); files that begin with an underscore are helpers. External plug-ins are

    [project.entry-points."distill.teachers"]     of a package: NAME = "package.module"; the groups are KINDS
    my_depth = "my_package.my_depth"
    name = "./my_depth.py"                        a file in place of a name, recognised by its "/" or ".py"

Paths are relative to the working directory, as all paths of a recipe. Names are unique: using a name that two plug-ins
have is an error that names both. Listing imports nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import keyword
import os
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from distill.core.by_path import module_name
from distill.core.files import file_sha256
from distill.core.home import home_expanded
from distill.core.wording import did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

KINDS = {
    "teachers": "distill.teachers",
    "decoders": "distill.students.decoders",
    "normalizations": "distill.losses.normalize",
    "terms": "distill.losses.terms",
    "datasets": "distill.data.datasets",
    "benchmarks": "distill.eval.benchmarks",
}
"""The kinds of plug-ins and the packages of the built-in ones. The entry point group is "distill." and the kind."""

SIGNS = {
    "teachers": "Teacher",
    "decoders": "Decoder",
    "normalizations": "compare",
    "terms": "term",
    "datasets": "FACTS",
    "benchmarks": "PROTOCOL",
}
"""The attribute that identifies a module of each kind."""

_ROOT = Path(__file__).parents[2]


class PluginError(ImportError):
    """An external plug-in that cannot be imported: one line that names it and the failing line in it."""


def names(package: str) -> list[str]:
    """The plug-ins of `package` ("distill.teachers", "distill.students.decoders", ...), sorted; imports nothing."""
    return sorted({*_own(package), *_installed(package)})


# Cache of built-in modules: a loss looks one up at every step, and searching costs file accesses.
_ours: dict[tuple[str, str], ModuleType] = {}


def find(package: str, name: str | os.PathLike[str]) -> ModuleType:
    """Return the module of plug-in `name`, which may be the path of a file.

    Raises LookupError that lists what exists, with a "did you mean"; PluginError for an external one that cannot be
    imported. A built-in one with a missing dependency raises that ModuleNotFoundError.
    """
    if ours := _ours.get((package, name := os.fspath(name))):
        return ours
    fault = name_fault(package, name)
    if fault:
        raise LookupError(fault)
    if _is_own(package, name):
        return _ours.setdefault((package, name), importlib.import_module(_module(package, name)))
    if is_path(name):
        module = import_file(name)
    else:
        entry = _installed(package)[name][0]
        module = _outside(f"{name} of {_distribution(entry)}", entry.load)
    kind = _kind(package)
    if not hasattr(module, SIGNS[kind]):
        raise LookupError(f"{name} has no {SIGNS[kind]}, so it is not one of the {kind}")
    return module


@functools.lru_cache(maxsize=64)
def not_taken(function: Callable[..., object], options: tuple[str, ...]) -> str:
    """The first, by name, of these keyword arguments that the function does not take; or an empty string.

    Remembered, because a loss asks at every step.
    """
    taken = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return ""
    return min({*options} - taken.keys(), default="")


def import_file(name: str) -> ModuleType:
    """Import a Python file once; returns its module. Raises LookupError if there is none, PluginError as `find`."""
    allow(name)  # its code runs now in any case
    return _outside(name, lambda: importlib.import_module(module_name(Path(name))))


def source(package: str, name: str) -> str:
    """The source text of plug-in `name`, to read it without importing it. Raises LookupError if there is none."""
    if fault := name_fault(package, name):
        raise LookupError(fault)
    if is_path(name):
        path = home_expanded(name)
    elif _is_own(package, name):
        path = _file(package, name)
    else:
        from importlib.util import find_spec

        entry = _installed(package)[name][0]
        spec = find_spec(entry.module)
        if spec is None or spec.origin is None:
            raise LookupError(f"{name} of {_distribution(entry)}: {entry.module} has no file")
        path = Path(spec.origin)
    return path.read_text(encoding="utf-8")


def name_fault(package: str, name: str) -> str:
    """Return what is wrong with `name` as a plug-in of `package`, or an empty string."""
    if is_path(name):
        return _file_fault(name)
    places = where_from(package, name)
    if not places:
        kind, known = _kind(package) or package, names(package)
        return f"{name} is not one of the {kind}{did_you_mean(name, known)}; available: {', '.join(known)}"
    if len(places) > 1:
        return f"{name} is {' and '.join(places)}: rename or uninstall one, or give a file's path in place of the name"
    return ""


def where_from(package: str, name: str) -> list[str]:
    """Describe where plug-ins of this name come from: one place, none, or several that claim the name."""
    if is_path(name):
        return [name]
    ours = [_module(package, name)] if _is_own(package, name) else []
    return ours + [f"{entry.value} of {_distribution(entry)}" for entry in _installed(package).get(name, ())]


def is_path(name: str) -> bool:
    """Whether a plug-in's name is the path of a file."""
    return name.endswith(".py") or "/" in name or os.sep in name


def short_name(name: str) -> str:
    """The plug-in's own name: of a file, its name without folder and suffix."""
    return Path(name).stem if is_path(name) else name


def _is_own(package: str, name: str) -> bool:
    is_plain = name.isidentifier() and not name.startswith("_") and not name.endswith("_")
    return is_plain and _file(package, name).is_file()


def _own(package: str) -> list[str]:
    folder = _ROOT.joinpath(*package.split("."))
    return sorted(path.stem.removesuffix("_") for path in folder.glob("*.py") if not path.stem.startswith("_"))


def _file(package: str, name: str) -> Path:
    return _ROOT.joinpath(*_module(package, name).split(".")).with_suffix(".py")


def _module(package: str, name: str) -> str:
    return f"{package}.{name}{'_' * keyword.iskeyword(name)}"


# --- from outside -----------------------------------------------------------------------------------------------------


@functools.cache
def _installed(package: str) -> Mapping[str, Sequence[EntryPoint]]:
    """The entry points of a kind by name; several if packages claim the same name. Read once per process."""
    from importlib.metadata import entry_points  # slow, and not needed for --help

    kind = _kind(package)
    entries: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"distill.{kind}") if kind else ():
        same_name = entries.setdefault(entry.name, [])
        if not is_path(entry.name) and entry.value not in [other.value for other in same_name]:
            same_name.append(entry)
    return {name: sorted(same_name, key=lambda entry: entry.value) for name, same_name in entries.items() if same_name}


def _kind(package: str) -> str:
    return next((kind for kind, folder in KINDS.items() if folder == package), "")


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"


_ALLOWED: dict[str, dict[Path, None]] = {}
"""By file name, because a student's folder stores only the file name of its decoder."""


def allow(file: str | Path) -> None:
    """Allow students' folders to load this decoder file by its file name. Raises LookupError if there is no such file.

    A folder is its author's data, so naming a file there does not make it run; files that a recipe names are allowed.
    """
    if fault := _file_fault(str(file)):
        raise LookupError(fault)
    path = home_expanded(file).resolve()
    _ALLOWED.setdefault(path.name, {})[path] = None


def allowed(name: str) -> str:
    """Return the path of the allowed file with the same file name as `name`, in whatever folders they are.

    Raises LookupError if there is none, or if there are several and none of them is `name` itself.
    """
    path = home_expanded(name).resolve()
    files = _ALLOWED.get(path.name, {})
    if not files:
        raise LookupError(
            f"{path.name} is a Python file from outside, and a student's folder runs none unasked: name it in "
            "the recipe, by --decoder FILE, or in distill.core.plugins.allow(FILE)"
        )
    if len(files) > 1 and path not in files:
        raise LookupError(f"{path.name} may be {' or '.join(map(str, files))}: give one of them another name")
    return str(path if path in files else next(iter(files)))


def _file_fault(name: str) -> str:
    path = home_expanded(name)
    if path.suffix != ".py":
        return f"{name} is a path, and no Python file (.py)"
    if not path.is_file():
        start = "" if path.is_absolute() else f"; paths are taken from the working directory, {Path.cwd()}"
        return f"{name}: no such file{start}"
    return ""


def _outside(what: str, load: Callable[[], ModuleType]) -> ModuleType:
    """Return the module that `load` imports; converts any exception to a PluginError with the failing line."""
    try:
        return load()
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        raise PluginError(f"{what}{_line(error)}: {type(error).__name__}: {_reason(error)}") from error


def _line(error: Exception) -> str:
    """`, FILE line N`: the last line of the traceback outside Python's import machinery, or ""."""
    steps = [step for step in traceback.extract_tb(error.__traceback__) if not step.filename.startswith("<frozen")]
    where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (steps[-1].filename, steps[-1].lineno)
    own_files = {str(Path(__file__)), importlib.__file__}
    return "" if where[0] is None or str(where[0]) in own_files else f", {Path(where[0]).name} line {where[1]}"


def _reason(error: Exception) -> str:
    text = (error.msg if isinstance(error, SyntaxError) else str(error)).partition("\n")[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        folders = [Path(frame.filename).parent for frame in traceback.extract_tb(error.__traceback__)]
        beside = [folder for folder in folders if (folder / f"{error.name.partition('.')[0]}.py").is_file()]
        if beside:
            text += f"; it lies in {beside[-1]}: put that on PYTHONPATH, or make a package with an entry point of both"
    return text


def file_hashes(value: object) -> dict[str, str]:
    """The sha256 of every Python file that a table of plain values names: {"./my_depth.py": "sha256:..."}."""
    files = {text: home_expanded(text) for text in _texts(value) if text.endswith(".py")}
    return {text: f"sha256:{file_sha256(path)}" for text, path in sorted(files.items()) if path.is_file()}


def origins(value: object) -> dict[str, str]:
    """The external plug-ins that a table of plain values names: files with their sha256, packages with versions."""
    installed = {name: entry for folder in KINDS.values() for name, (entry, *_) in _installed(folder).items()}
    packages = {text: _distribution(installed[text]) for text in sorted(set(_texts(value)) & set(installed))}
    return file_hashes(value) | packages


def _texts(value: object) -> Iterator[str]:
    if is_dataclass(value) and not isinstance(value, type):
        yield from _texts(asdict(value))
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


# --- options ----------------------------------------------------------------------------------------------------------


def option_faults(function: Callable[..., object], options: Mapping[str, object], where: str) -> list[str]:
    """Return what is wrong with `options` as keyword arguments of `function`: the signature is the schema."""
    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in ("self", "cls")
    ]
    offered = [name for name in known if name not in ("weights", "device", "dtype", "in_channels")]  # not options
    suffix = f"; there are {', '.join(offered)}" if offered else "; it takes none"
    faults = [f"unknown key {where}.{key}{did_you_mean(key, offered) or suffix}" for key in options if key not in known]
    for key, value in options.items():
        accepted = _plain_types(function, key) if key in known else ()
        # An int may stand for a float, and a path for its text.
        kinds = {type(value), *((float,) if type(value) is int else (str,) if isinstance(value, os.PathLike) else ())}
        if accepted and not kinds & {*accepted}:
            words = " or ".join(_WORDS[type_] for type_ in accepted if type_ is not type(None))
            faults.append(f"{where}.{key} must be {words}, not {value!r}")
    return faults


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}


def _plain_types(function: Callable[..., object], key: str) -> tuple[type, ...]:
    """The types that a parameter accepts by its annotation, else by its default; () unless all of them are plain."""
    default = inspect.signature(function).parameters[key].default
    plain = type(default) if type(default) in (bool, int, str) else object  # a number may stand for None or a word
    try:
        hint = typing.get_type_hints(function).get(key, plain)
    except (NameError, AttributeError, TypeError):  # names that are imported for type checking only
        hint = plain
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return members if {*members} <= _WORDS.keys() and {*members} != {type(None)} else ()
