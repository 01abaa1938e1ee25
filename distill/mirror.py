"""A finished labels folder at a URL: sent there to be kept and shared, and fetched from there to train on.

Labels are made and read on a local disk, where a tar is finished by renaming it and read by byte ranges. The mirror's
manifest is written last, so that a folder without one is known to be unfinished; what is there already is not sent or
fetched again, so that either way goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distill.places import file_system
from distill.shards import MANIFEST, read_manifest

Report = Callable[..., None]


def _files(manifest: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Every labels file among `names` but the manifest, with the sha256 that it must have, or "" where nothing says."""
    tars = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    said = sorted(name for name in names if name.endswith(".json") and name != MANIFEST and name[0] != ".")
    return [*tars.items(), *((name, "") for name in said)]


def publish(folder: Path, url: str, *, report: Report | None = None) -> int:
    """Sends a finished labels folder to `url`/ITS NAME, the manifest last; returns how many files were sent.

    Raises FileNotFoundError for a folder that is not finished, OSError naming the URL where it cannot be written.
    """
    manifest = read_manifest(folder)
    target = f"{url.rstrip('/')}/{folder.name}"
    system, inside = file_system(target)
    files = [name for name, _ in _files(manifest, (path.name for path in folder.iterdir()))]
    sent = 0
    try:
        system.makedirs(inside, exist_ok=True)
        for done, name in enumerate([*files, MANIFEST]):
            remote = f"{inside}/{name}"
            same = system.exists(remote) and system.size(remote) == (folder / name).stat().st_size
            if not same or name == MANIFEST:
                system.put_file(str(folder / name), remote)
                sent += 1
            if report:
                report(done + 1, len(files) + 1)
    except OSError as error:
        raise OSError(error.errno, f"{target} cannot be written: {error}; what was sent stays, call again") from error
    return sent


def fetch(url: str, folder: Path, *, report: Report | None = None) -> None:
    """Brings the labels at `url`/NAME OF folder into `folder`; every tar is checked against the manifest's sha256.

    Raises FileNotFoundError where there are no finished labels, OSError for damage or a URL that cannot be read.
    """
    source = f"{url.rstrip('/')}/{folder.name}"
    system, inside = file_system(source)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        return
    aside = folder / f".{MANIFEST}.mirror"
    try:
        if not system.exists(f"{inside}/{MANIFEST}"):
            raise FileNotFoundError(f"{source} has no finished labels: run `distill label` with this recipe first")
        system.get_file(f"{inside}/{MANIFEST}", str(aside))
        manifest = read_manifest(_named(aside, folder))
        files = _files(manifest, (name.rsplit("/", 1)[-1] for name in system.ls(inside, detail=False)))
        for done, (name, digest) in enumerate(files):
            if not ((folder / name).is_file() and digest in ("", _sha256(folder / name))):
                part = folder / f".{name}.part"
                system.get_file(f"{inside}/{name}", str(part))
                if digest and _sha256(part) != digest:
                    part.unlink()
                    raise OSError(f"{source}/{name} is damaged: its checksum is not the manifest's; publish it again")
                part.replace(folder / name)
            if report:
                report(done + 1, len(files))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{source} cannot be read: {error}") from error
    (aside.parent / f".{folder.name}" / MANIFEST).replace(folder / MANIFEST)
    (aside.parent / f".{folder.name}").rmdir()


def _named(aside: Path, folder: Path) -> Path:
    """A folder that holds the fetched manifest alone, under its own name: what `read_manifest` takes."""
    own = folder / f".{folder.name}"
    own.mkdir(exist_ok=True)
    aside.replace(own / MANIFEST)
    return own


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
