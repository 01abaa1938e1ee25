"""Mirrors a finished labels folder at a URL: `publish` uploads it, `fetch` downloads it for training.

Labels are written and read on a local disk, where tars are finished by renaming and read by byte ranges. The mirror's
manifest is written last, so a folder without one is unfinished. Complete tars at the destination are not transferred
again, so both directions resume after an interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.core.addresses import public
from distill.core.files import file_sha256
from distill.core.files import publish as rename
from distill.core.progress import Report
from distill.data.storage import file_system
from distill.shards.readme import README
from distill.shards.tables import CACHED, MANIFEST, read_manifest


def _files(manifest: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the tars and the other labels files among `names`, except the manifest, with their sha256 or ""."""
    tars = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    others = [name for name in names if name.endswith(".json") or name == README]
    sidecars = sorted(name for name in others if name != MANIFEST and name[0] != ".")
    return [*tars.items(), *((name, "") for name in sidecars)]


def publish(folder: Path, url: str, *, report: Report | None = None) -> int:
    """Upload a finished labels folder to `url`/ITS NAME, the manifest last; returns how many files were sent.

    Raises FileNotFoundError for an unfinished folder, OSError naming the URL if it cannot be written.
    """
    manifest = read_manifest(folder)
    target = f"{url.rstrip('/')}/{folder.name}"
    files = _files(manifest, (path.name for path in folder.iterdir()))
    system, inside = file_system(target)
    sent = 0
    try:
        system.makedirs(inside, exist_ok=True)
        remote_sha256 = _listed_sha256(system, f"{inside}/{MANIFEST}")
        for done, (name, digest) in enumerate([*files, (MANIFEST, "")]):
            remote = f"{inside}/{name}"
            same = system.exists(remote) and system.size(remote) == (folder / name).stat().st_size
            # A tar may have been relabelled at the same size: the sha256 decides. Small files are compared in full.
            if same and digest:
                same = remote_sha256.get(name, digest) == digest
            elif same:
                same = system.cat_file(remote) == (folder / name).read_bytes()
            if not same:
                system.put_file(str(folder / name), remote)
                sent += 1
            if report:
                report(done + 1, len(files) + 1)
    except OSError as error:
        line = public(f"{target} cannot be written: {error}; what was sent stays, call again")
        raise OSError(error.errno, line) from error
    return sent


def _listed_sha256(system: Any, manifest: str) -> dict[str, str]:
    """The tars that a manifest at a URL lists, with their sha256; empty if it does not exist or cannot be read."""
    if not system.exists(manifest):
        return {}
    try:
        return {shard["name"]: shard["sha256"] for shard in json.loads(system.cat_file(manifest))["shards"]}
    except (ValueError, KeyError, TypeError):
        return {}


def fetch(url: str, folder: Path, *, cached: bool = False, report: Report | None = None) -> None:
    """Download the labels at `url`/NAME OF folder to `folder`; every tar is checked against the manifest's sha256.

    cached: everything except the tars, which `distill.shards.cache` fetches; a complete folder is left unchanged.
    Without it, a folder that was begun as cached is completed.

    Raises FileNotFoundError if there are no finished labels, ValueError for a manifest that is not ours, OSError for
    damage or a URL that cannot be read.
    """
    marker = folder / CACHED
    if (folder / MANIFEST).is_file() and (cached or not marker.is_dir()):
        return
    source = f"{url.rstrip('/')}/{folder.name}"
    system, inside = file_system(source)
    if not system.exists(f"{inside}/{MANIFEST}"):
        raise FileNotFoundError(f"{public(source)} has no finished labels: run `distill label` with this recipe first")
    temporary = folder / ".mirror"
    temporary.mkdir(parents=True, exist_ok=True)
    if cached:
        marker.mkdir(exist_ok=True)
    try:
        system.get_file(f"{inside}/{MANIFEST}", str(temporary / MANIFEST))
        manifest = read_manifest(temporary)
        names = (name.rsplit("/", 1)[-1] for name in system.ls(inside, detail=False))
        files = _files(manifest, names)
        for done, (name, digest) in enumerate(files):
            is_complete = digest and (folder / name).is_file() and file_sha256(folder / name) == digest
            if digest and cached:
                if not is_complete:
                    (folder / name).unlink(missing_ok=True)
            elif not is_complete:
                system.get_file(f"{inside}/{name}", str(temporary / name))
                if digest and file_sha256(temporary / name) != digest:
                    raise OSError(
                        f"{name} is damaged there, its checksum is not the manifest's: delete it, publish again"
                    )
                rename(temporary / name, folder / name)
            if report:
                report(done + 1, len(files))
    except OSError as error:
        raise OSError(error.errno, public(f"{source} cannot be read: {error}")) from error
    rename(temporary / MANIFEST, folder / MANIFEST)
    shutil.rmtree(temporary)
    if not cached:
        shutil.rmtree(marker, ignore_errors=True)
