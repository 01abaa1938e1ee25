"""A finished labels folder at a URL: sent there to be kept and shared, and fetched from there to train on.

Labels are made and read on a local disk, where a tar is finished by renaming it and read by byte ranges. The mirror's
manifest is written last, so that a folder without one is known to be unfinished. A tar that is there already, whole,
is not sent or fetched again, so that either way goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.core.files import file_sha256
from distill.core.files import publish as rename
from distill.core.progress import Report
from distill.data.storage import file_system
from distill.shards.readme import README
from distill.shards.tables import CACHED, MANIFEST, read_manifest


def _files(manifest: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Every labels file among `names` but the manifest, with the sha256 that it must have, or "" where nothing says."""
    tars = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    beside = [name for name in names if name.endswith(".json") or name == README]
    sidecars = sorted(name for name in beside if name != MANIFEST and name[0] != ".")
    return [*tars.items(), *((name, "") for name in sidecars)]


def publish(folder: Path, url: str, *, report: Report | None = None) -> int:
    """Sends a finished labels folder to `url`/ITS NAME, the manifest last; returns how many files were sent.

    Raises FileNotFoundError for a folder that is not finished, OSError naming the URL where it cannot be written.
    """
    manifest = read_manifest(folder)
    target = f"{url.rstrip('/')}/{folder.name}"
    files = _files(manifest, (path.name for path in folder.iterdir()))
    system, inside = file_system(target)
    sent = 0
    try:
        system.makedirs(inside, exist_ok=True)
        there = _listed(system, f"{inside}/{MANIFEST}")
        for done, (name, digest) in enumerate([*files, (MANIFEST, "")]):
            remote = f"{inside}/{name}"
            same = system.exists(remote) and system.size(remote) == (folder / name).stat().st_size
            # A tar may have been labelled again at the same size: the manifest there knows. What is small is compared.
            if same and digest:
                same = there.get(name, digest) == digest
            elif same:
                same = system.cat_file(remote) == (folder / name).read_bytes()
            if not same:
                system.put_file(str(folder / name), remote)
                sent += 1
            if report:
                report(done + 1, len(files) + 1)
    except OSError as error:
        raise OSError(error.errno, f"{target} cannot be written: {error}; what was sent stays, call again") from error
    return sent


def _listed(system: Any, manifest: str) -> dict[str, str]:
    """The tars that a manifest at a URL lists, with their sha256; none where it is not there or cannot be read."""
    if not system.exists(manifest):
        return {}
    try:
        return {shard["name"]: shard["sha256"] for shard in json.loads(system.cat_file(manifest))["shards"]}
    except (ValueError, KeyError, TypeError):
        return {}


def fetch(url: str, folder: Path, *, cached: bool = False, report: Report | None = None) -> None:
    """Brings the labels at `url`/NAME OF folder into `folder`; every tar is checked against the manifest's sha256.

    cached: all but the tars, for `distill.shards.cache` to fetch; a folder that has them all stays as it is. Without, a
    folder that was begun so is completed.

    Raises FileNotFoundError where there are no finished labels, ValueError for a manifest that is not ours, OSError for
    damage or a URL that cannot be read.
    """
    marker = folder / CACHED
    if (folder / MANIFEST).is_file() and (cached or not marker.is_dir()):
        return
    source = f"{url.rstrip('/')}/{folder.name}"
    system, inside = file_system(source)
    if not system.exists(f"{inside}/{MANIFEST}"):
        raise FileNotFoundError(f"{source} has no finished labels: run `distill label` with this recipe first")
    aside = folder / ".mirror"
    aside.mkdir(parents=True, exist_ok=True)
    if cached:
        marker.mkdir(exist_ok=True)
    try:
        system.get_file(f"{inside}/{MANIFEST}", str(aside / MANIFEST))
        manifest = read_manifest(aside)
        there = (name.rsplit("/", 1)[-1] for name in system.ls(inside, detail=False))
        files = _files(manifest, there)
        for done, (name, digest) in enumerate(files):
            whole = digest and (folder / name).is_file() and file_sha256(folder / name) == digest
            if digest and cached:
                if not whole:
                    (folder / name).unlink(missing_ok=True)
            elif not whole:
                system.get_file(f"{inside}/{name}", str(aside / name))
                if digest and file_sha256(aside / name) != digest:
                    raise OSError(
                        f"{name} is damaged there, its checksum is not the manifest's: delete it, publish again"
                    )
                rename(aside / name, folder / name)
            if report:
                report(done + 1, len(files))
    except OSError as error:
        raise OSError(error.errno, f"{source} cannot be read: {error}") from error
    rename(aside / MANIFEST, folder / MANIFEST)
    shutil.rmtree(aside)
    if not cached:
        shutil.rmtree(marker, ignore_errors=True)
