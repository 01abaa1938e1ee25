"""JSON files beside the tars: the manifest and other tables of ours, each with a checksum of its own content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.core import files, signatures
from distill.core.printable import printable
from distill.core.seal import KEY as SEAL
from distill.core.seal import is_broken, sealed
from distill.data.tars import walk_tar
from distill.shards.codec import REPAIR, VERSION, check_version

MANIFEST, SETTINGS = "manifest.json", "settings.json"
CACHED = ".cached"
"""The subfolder that marks a labels folder with only some of its tars (distill.shards.cache)."""
REGIONS = "regions.jsonl"
"""The list of regions, beside tars that were published without their photographs (distill.app.publish)."""


class DamagedTableError(ValueError):
    """A table of ours is damaged; its content can be regenerated."""


def write_manifest(folder: Path, manifest: Mapping[str, Any], *, suffix: str = "") -> None:
    """Write `folder`/manifest.json atomically; suffix: as in `files.writing`."""
    files.write_json(folder / MANIFEST, sealed({**manifest, "version": VERSION}), sort_keys=True, suffix=suffix)


def read_manifest(folder: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """Read the manifest of a labels folder; whole: require that it matches its own checksum.

    Raises FileNotFoundError if there is none, DamagedTableError if it is damaged, ValueError if it is too new.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_no_labels(path.parent)}")
    return read_json(path, whole=whole)


def labels_address(folder: Path) -> str:
    """What identifies the labels in a folder: its name, if that is their hash (`labelling.run.labels_hash`), else the
    checksums of its tars, since a folder of any other name may be replaced by one with other labels.
    """
    if re.fullmatch(r"[0-9a-f]{16}", folder.name):
        return folder.name
    sums = [tar["sha256"] for tar in read_manifest(folder)["shards"]]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _no_labels(folder: Path) -> str:
    """Return why a folder has no manifest."""
    if not folder.is_dir():
        return f"{folder} is a file; give the folder that it lies in" if folder.is_file() else "no such folder"
    if manifests := sorted([*folder.glob(f"labels/*/{MANIFEST}"), *folder.glob(f"*/{MANIFEST}")]):
        return f"the labels lie in {', '.join(str(path.parent) for path in manifests[:3])}; give that folder"
    return "labelling has not finished there; run distill label"


def require_photographs(folder: Path) -> None:
    """Raise ValueError for labels published without their photographs: complete, but unusable for training."""
    if (folder / REGIONS).is_file():
        raise ValueError(
            f"{folder} was published without its photographs, which training needs ({REGIONS} names each region): get "
            f"them and label them, or labels with them; sha256sum -c SHA256SUMS says whether the rest is whole"
        )


def pointer_line(path: Path) -> str:
    """Return the message for a tar that is a git-lfs pointer (a clone without git-lfs), "" for any other."""
    with path.open("rb") as file:
        format_ = signatures.sniff(file.read(64))
    return f"{path} is {format_}" if "git-lfs" in format_ else ""


def _check_keys(path: Path, value: dict[str, Any]) -> None:
    """Raise DamagedTableError unless a manifest or the json of a tar has the required keys; other tables pass."""
    required: list[tuple[str, Any, str]] = []
    tars: Any = []
    if path.name == MANIFEST:
        required += [("it", value, "teachers shards images quarantine")]
        required += [("images", value.get("images"), "count sha256 keys")]
        tars = value.get("shards", [])
    elif re.search(r"-\d{3,}$", path.stem):
        required += [("it", value, "part of images tar samples quarantine kinds")]
        tars = [value["tar"]] if value.get("tar") is not None else []
        _check_samples(path, value)
    required += [
        ("a tar in it", tar, "name sha256 bytes samples") for tar in (tars if isinstance(tars, list) else [tars])
    ]
    for part, table, keys in required:
        missing = [key for key in keys.split() if not isinstance(table, dict) or key not in table]
        if missing:
            raise DamagedTableError(f"{path} is damaged: {part} has no {', '.join(missing)}; {REPAIR}")
        if part == "a tar in it":
            _check_tar(path, table)


def _check_samples(path: Path, value: Mapping[str, Any]) -> None:
    """Raise DamagedTableError unless the json of a tar lists samples as (key, first byte, number of bytes)."""
    samples = value.get("samples", [])
    well_formed = isinstance(samples, list) and all(
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and type(entry[1]) is type(entry[2]) is int
        for entry in samples
    )
    types: dict[str, type] = {"part": int, "of": int, "images": list, "quarantine": list, "kinds": dict}
    if not well_formed or not all(isinstance(value[key], kind) for key, kind in types.items() if key in value):
        raise DamagedTableError(f"{path} is damaged: what it says of its samples is not what was written; {REPAIR}")


def _check_tar(path: Path, tar: Mapping[str, Any]) -> None:
    """Raise ValueError unless a tar's entry in a table of ours has the right types and a plain file name."""
    numbers = [tar["bytes"], tar["samples"], tar.get("image_source", 0)]
    valid_numbers = all(type(number) is int and number >= 0 for number in numbers)
    teachers = tar.get("teachers", [])
    words = [tar["name"], tar["sha256"], *(teachers if isinstance(teachers, list) else [None])]
    if not valid_numbers or not all(isinstance(word, str) for word in words):
        raise DamagedTableError(
            f"{path} is damaged: what it says of a tar is not a name, a sha256 and two numbers; {REPAIR}"
        )
    name = tar["name"]
    if files.leaves_root(name) or "/" in name or "\\" in name or name[0] == "." or not name.endswith(".tar"):
        raise ValueError(f"{path} names the tar {name!r}, which is no .tar of its own folder: refused")


def foreign_members(path: Path) -> list[str]:
    """A line for each member of a tar that unpacking could write elsewhere, or that is no plain file; OSError.

    Readers pass over such members, so that they would go unseen to everyone who is given the tar.
    """
    found = [member for member, problem in walk_tar(path) if member is not None and not problem]
    odd = [m.name for m in found if not m.isreg() or m.issparse() or re.search(r"^\.|[/\\]", m.name)]
    return [f"{path}: {printable(name)} in it is no plain file of its own folder" for name in odd[:3]]


def read_json(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """Read a json table of ours, without its checksum; raises ValueError naming the file if it is too new.

    Raises DamagedTableError if it is damaged. whole: False accepts a table that does not match its own checksum.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedTableError(f"{path} is damaged ({error}); {REPAIR}") from error
    if not isinstance(value, dict):
        raise DamagedTableError(f"{path} is not a JSON table: not written by distill label; {REPAIR}")
    if not isinstance(value.get("version"), int):
        raise DamagedTableError(f"{path} has no version: not written by distill label; {REPAIR}")
    if is_broken(value) and (whole or value["version"] > VERSION):
        raise DamagedTableError(f"{path} is damaged: it does not agree with its own checksum; {REPAIR}")
    check_version(value, path)
    _check_keys(path, value)
    value.pop(SEAL, None)
    return value
