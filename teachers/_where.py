"""Locating a teacher's weights: the local file of a path or hub id, its revision, and the config beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core import hub
from distill.core.files import decoded, file_sha256
from distill.core.home import home_expanded
from distill.core.weights import INDEX, WeightsMismatchError, WeightsMissingError
from distill.core.wording import on_one_line

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def resolve(weights: str | Path, *, files: Sequence[str]) -> Path:
    """The local file or folder that `weights` names: a path, or a hub id `org/name[/file or folder][@revision]`.

    files: patterns of the files needed from a hub repository. Raises WeightsMissingError in one line that says what
    to do.
    """
    text = str(weights)
    if text and (path := home_expanded(text)).exists():
        return _snapshot(path)
    repository, inside, revision = _hub_id(text)
    try:
        folder = hub.download(repository, files=_below(inside, files), revision=revision)
    except hub.HubError as error:
        raise WeightsMissingError(f"weights {text!r}: no such file or folder here, and {error}") from error
    if not (folder / inside).exists():
        raise WeightsMissingError(
            f"weights {text!r}: {repository} has no {inside}; see https://huggingface.co/{repository}/tree/main"
        )
    return folder / inside


def to_download(weights: str | Path, *, files: Sequence[str]) -> dict[str, int]:
    """The files that `resolve` would download, with their bytes; empty if all are here. Raises as `resolve` does."""
    text = str(weights)
    if text and home_expanded(text).exists():
        return {}
    repository, inside, revision = _hub_id(text)
    try:
        return hub.to_download(repository, files=_below(inside, files), revision=revision)
    except hub.HubError as error:
        raise WeightsMissingError(f"weights {text!r}: no such file or folder here, and {error}") from error


def _snapshot(path: Path) -> Path:
    """`path`; for the hub's cache of a repository (models--org--name), its main or only snapshot."""
    main = path / "refs" / "main"
    snapshots = [path / "snapshots" / main.read_text(encoding="utf-8").strip()] if main.is_file() else []
    snapshots = snapshots or [inner for inner in (path / "snapshots").glob("*") if inner.is_dir()]
    return snapshots[0] if len(snapshots) == 1 and snapshots[0].is_dir() else path


def _hub_id(text: str) -> tuple[str, str, str | None]:
    """(org/name, path inside it, revision) of a hub id, or of the URL of its page or of a file.

    Raises WeightsMissingError for anything else.
    """
    if page := re.fullmatch(r"https?://(?:huggingface\.co|hf\.co)/([^?#]+?)/?(?:[?#].*)?", text):
        text = re.sub(r"^([^/]+/[^/]+)/(?:resolve|blob|tree)/([^/]+)(.*)", r"\1\3@\2", page[1])
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w.-]+))?", text)
    if match is None or (Path(text).suffix in WEIGHT_SUFFIXES and not match[2]):
        raise WeightsMissingError(
            f"weights {text!r}: no such file or folder, and not a hub id (org/name), which `distill list teachers` has"
        )
    return match[1], match[2].lstrip("/"), match[3]


def _below(inside: str, files: Sequence[str]) -> list[str]:
    return [inside, *(f"{inside}/{f}" for f in files)] if inside else list(files)


def revision_of(path: Path) -> str:
    """The hub's commit if `path` is in a snapshot, else "sha256:" and the start of the weights' digest."""
    parts = path.absolute().parts
    if "snapshots" in parts[:-1] and re.fullmatch("[0-9a-f]{40}", commit := parts[parts.index("snapshots") + 1]):
        return commit
    path = path.parent if path.name.endswith(INDEX) else path
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return f"sha256:{digest.hexdigest()[:16]}"


def cached_revision(weights: str) -> str:
    """The hub's commit of the weights that a hub id names, read from its local cache; "" if not cached."""
    owner, _, name_and_path = weights.partition("/")
    return hub.cached_commit(f"{owner}/{name_and_path.partition('/')[0]}")


def read_config(path: Path) -> dict[str, Any]:
    """The table in a JSON file, empty if there is no such file; raises WeightsMismatchError if it is not a table."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(decoded(path.read_bytes()))
    except ValueError as error:
        raise WeightsMismatchError(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(table, dict):
        raise WeightsMismatchError(f"{path} holds no JSON table: download it again")
    return table


def inner_table(table: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The table under a key of a JSON file, empty if there is none; WeightsMismatchError if it is no table."""
    inner = table.get(key)
    if not isinstance(inner, dict | None):
        raise WeightsMismatchError(f"{path}: {key} must be a table, not {inner!r:.60}")
    return inner or {}


def whole_number(table: Mapping[str, Any], key: str, path: Path, *, least: int) -> int | None:
    """The number under a key of a JSON file, None if there is none; WeightsMismatchError unless it is `least` or more.

    A number that is written as text or with a point (768.0) is taken.
    """
    value = table.get(key)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if value is None or int(value) >= least:
            return None if value is None else int(value)
    raise WeightsMismatchError(f"{path}: {key} must be a whole number of at least {least}, not {value!r:.60}")


@contextlib.contextmanager
def described_by(file: Path | str, what: str) -> Iterator[None]:
    """Convert what a library raises for the content of `file`, which others wrote, to a WeightsMismatchError."""
    try:
        yield
    except (WeightsMismatchError, WeightsMissingError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - text in the place of a table may raise anything
        raise WeightsMismatchError(f"{file} does not describe a {what}: {on_one_line(error, most=160)}") from error
