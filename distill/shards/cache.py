"""Labels at a URL of which this machine keeps no more than it has room for.

The folder has manifest.json, every json of a tar, and some of the tars: as many bytes as `labels.cache_gb` allows. A
tar that is missing when it is first read is fetched while there is room, checked against the manifest's sha256 and
renamed into place; once there is none, of the others the bytes of a sample alone are fetched, at every visit. What is
here stays: training visits samples in an order that is shuffled over all tars, so that none is worth more than another,
and a tar that would make way for one sample would be missed by the next.

All processes that see the folder share it: a tar is fetched by one of them while the others wait. Bytes of a tar that
is not here are known by their number, by their headers in the tar and by what decodes them, and by the size of the tar
that they come from; its sha256 takes the whole of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distill.core.files import PARTIAL, WriteError, file_sha256, naming, publish, take_lock
from distill.data.storage import file_system
from distill.shards.shards import MANIFEST, listed
from distill.shards.tables import CACHED, read_json, read_manifest

IDLE_S = 120.0
"""Seconds after which what a killed process was fetching is taken away, if nobody holds its lock. Ours."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What training on labels of which only a part is kept fetches, if all tars are alike.

    tars, samples: of the whole folder; size: its bytes; limit: the bytes that are kept.
    """

    tars: int
    samples: int
    size: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether all of it is kept, so that every tar is fetched once."""
        return self.size <= self.limit

    @property
    def bytes_per_epoch(self) -> float:
        """The bytes that all processes of a node fetch together in an epoch, once no further tar has room."""
        kept = self.size / self.tars * int(self.limit / (self.size / self.tars))
        return max(0.0, self.size - kept)

    @property
    def sentence(self) -> str:
        """The facts in a line."""
        line = f"labels: {_gb(self.limit)} of {_gb(self.size)} in {self.tars} tars are kept here"
        if self.fits:
            return f"{line}; each tar is fetched once"
        return (
            f"{line}; an epoch fetches about {_gb(self.bytes_per_epoch)} of the others, in "
            f"{self.samples * self.bytes_per_epoch / self.size:,.0f} reads"
        )


class TarCache:
    """Reads from the tars of a labels folder that `mirror.fetch(..., cached=True)` has begun; a `shards.TarReader`.

    url: where the folder of this name lies whole; limit: bytes of tars to keep in `folder`, those included that are
    being fetched. Goes to data workers by fork or pickle.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.source, self.folder, self.limit = f"{url.rstrip('/')}/{folder.name}", folder, limit
        self._aside = folder / CACHED
        shards = read_manifest(folder)["shards"]
        self._tars: dict[str, tuple[int, str]] = {shard["name"]: (shard["bytes"], shard["sha256"]) for shard in shards}
        self._same: set[str] = set()
        self._left_out: set[str] = set()
        self.traffic = Traffic(
            tars=max(1, len(shards)),
            samples=sum(shard["samples"] for shard in shards),
            size=float(sum(shard["bytes"] for shard in shards)),
            limit=float(limit),
        )
        with self._locked("room"):
            self._shrink()  # the limit may have been a larger one

    def index(self, shard: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """(sample key, first byte, number of bytes) of every sample of one of the manifest's tars, by its json alone.

        Raises ValueError where that does not describe this tar.
        """
        sidecar = (self.folder / shard["name"]).with_suffix(".json")
        table = read_json(sidecar) if sidecar.is_file() else {}
        if (table.get("tar") or {}).get("sha256") != shard["sha256"]:
            raise ValueError(
                f"{sidecar} does not say where the samples of its tar are, so that it cannot be fetched when it is "
                "read: publish labels with their json, or set labels.cache_gb = 0, which fetches all of them"
            )
        return listed(sidecar, table, shard["bytes"])

    def read(self, name: str, start: int, size: int) -> bytes:
        """So many bytes of the tar `name`, which is fetched first where it is not here and has room. Raises OSError."""
        file = self._here(name) or self._brought(name)
        if file is None:
            return self._ranged(name, start, size)
        with file:
            return os.pread(file.fileno(), size, start)

    def _ranged(self, name: str, start: int, size: int) -> bytes:
        """So many bytes of a tar that is not kept; what fails is tried once more."""
        failed: OSError | None = None
        for _ in range(2):
            try:
                system, inside = file_system(f"{self.source}/{name}")
                if name not in self._same:
                    if (there := system.size(inside)) != self._tars[name][0]:
                        raise OSError(f"it has {there} bytes, not the {self._tars[name][0]} that {MANIFEST} says")
                    self._same.add(name)
                found: bytes = system.cat_file(inside, start=start, end=start + size)
                return found
            except OSError as error:
                failed = error
        raise OSError(f"{self.source}/{name} cannot be read: {failed}") from failed

    def _here(self, name: str) -> IO[bytes] | None:
        """The tar; None where it is not here, or not whole."""
        path = self.folder / name
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != self._tars[name][0]:
            file.close()
            return None
        return file

    def _brought(self, name: str) -> IO[bytes] | None:
        """The tar, fetched; None where there is no room for it."""
        if name in self._left_out:
            return None
        with self._locked(name):
            if (file := self._here(name)) is not None:  # another process has brought it meanwhile
                return file
            with self._locked("room"):
                if self._size_but(name) + self._tars[name][0] > self.limit:
                    self._left_out.add(name)
                    return None
                new = self._aside / f"{name}.{secrets.token_hex(6)}{PARTIAL}"
                new.touch()
            try:
                self._fetch(name, new)
                file = new.open("rb", buffering=0)
                with naming(self.folder / name):
                    publish(new, self.folder / name)
                return file
            finally:
                new.unlink(missing_ok=True)

    def _fetch(self, name: str, new: Path) -> None:
        """The tar's bytes into `new`, checked; what fails is fetched once more."""
        failed: OSError | None = None
        for _ in range(2):
            try:
                system, inside = file_system(f"{self.source}/{name}")
                system.get_file(inside, str(new))
                if file_sha256(new) == self._tars[name][1]:
                    return
                failed = None
            except OSError as error:
                if error.errno in _FULL:
                    raise WriteError(error.errno, error.strerror, str(self.folder / name)) from error
                failed = error
        if failed is not None:
            raise OSError(f"{self.source}/{name} cannot be read: {failed}") from failed
        raise OSError(
            f"{self.source}/{name} is damaged, its checksum is not the one in {self.folder / MANIFEST}, also when it "
            f"is fetched again: publish it again, or delete {self.folder} if these labels were made anew"
        )

    # --- room ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process of this machine at a time, for a tar or the room; where there are no locks, all."""
        lock = take_lock(self._lock_file(name), wait=True)
        assert lock is not None
        try:
            yield
        finally:
            lock.release()

    def _lock_file(self, name: str) -> Path:
        return self._aside / f"{name}.lock"

    def _size_but(self, name: str) -> int:
        """The bytes of all tars that are here or being fetched, but this one's, whose lock we have.

        Whoever is fetching has its whole tar counted at once.
        """
        # Before the tars: one that is renamed in between is counted twice and not overlooked.
        coming = sum(self._coming(name))
        return coming + sum(size for tar, size in self._kept().items() if tar != name)

    def _kept(self) -> dict[str, int]:
        sizes = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name in self._tars:
                    with contextlib.suppress(FileNotFoundError):
                        sizes[entry.name] = entry.stat().st_size
        return sizes

    def _shrink(self) -> None:
        """Take tars away until the rest is within the limit."""
        kept = self._kept()
        while sum(kept.values()) > self.limit:
            name, _ = kept.popitem()
            (self.folder / name).unlink(missing_ok=True)

    def _coming(self, ours: str) -> Iterator[int]:
        """The sizes of the tars that are being fetched; what was left by the dead goes. ours: whose lock we have."""
        for partial in self._aside.glob(f"*{PARTIAL}"):
            name = partial.name.rsplit(".", 2)[0]
            with contextlib.suppress(FileNotFoundError):
                # Where locks do not reach (nodes on one disk, a disk without them) an old one is what tells the dead.
                if time.time() - partial.stat().st_mtime > IDLE_S and (name == ours or self._is_free(name)):
                    partial.unlink()
                    continue
                yield self._tars[name][0] if name in self._tars else partial.stat().st_size

    def _is_free(self, name: str) -> bool:
        lock = take_lock(self._lock_file(name))
        if lock is not None:
            lock.release()
        return lock is not None
