"""Labels at a URL, of which this machine caches only a limited number of bytes.

The folder has manifest.json, the json of every tar, and some of the tars: as many bytes as `labels.cache_gb` allows. A
missing tar is fetched on first use while there is room, checked against the manifest's sha256 and renamed into place.
Once the cache is full, only the bytes of a sample are fetched from the other tars, at every visit. Cached tars are not
evicted: training visits samples in an order shuffled over all tars, so all tars are equally valuable, and a tar evicted
for one sample would be needed by the next.

All processes that see the folder share it: one of them fetches a tar while the others wait. Bytes of a tar that is not
cached are checked by their number, by their tar headers, by their decoder and by the size of the remote tar; a check of
its sha256 would need the whole tar.
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

from distill.core.addresses import public
from distill.core.files import DISK_FULL, PARTIAL, WriteError, file_sha256, publish, raising_write_errors, take_lock
from distill.core.wording import counted
from distill.data.storage import file_system
from distill.shards.shards import MANIFEST, index_from_json
from distill.shards.tables import CACHED, read_json, read_manifest

IDLE_S = 120.0
"""Seconds after which the partial file of a killed process is removed, if no process holds its lock. Ours."""


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What training on partly cached labels fetches, assuming that all tars are alike.

    tars, samples, size: numbers of tars, samples and bytes of the whole folder; limit: the bytes that are cached.
    """

    tars: int
    samples: int
    size: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether all tars are cached, so that every tar is fetched once."""
        return self.size <= self.limit

    @property
    def bytes_per_epoch(self) -> float:
        """The bytes that all processes of a node together fetch in an epoch, once the cache is full."""
        cached = self.size / self.tars * int(self.limit / (self.size / self.tars))
        return max(0.0, self.size - cached)

    @property
    def sentence(self) -> str:
        """The facts in one line."""
        line = f"labels: {_gb(self.limit)} of {_gb(self.size)} in {counted(self.tars, 'tar')} are kept here"
        if self.fits:
            return f"{line}; each tar is fetched once"
        return (
            f"{line}; an epoch fetches about {_gb(self.bytes_per_epoch)} of the others, in "
            f"{self.samples * self.bytes_per_epoch / self.size:,.0f} reads"
        )


class TarCache:
    """Reads the tars of a labels folder that `mirror.fetch(..., cached=True)` has created; a `shards.TarReader`.

    url: the parent of the complete folder of this name; limit: bytes of tars to cache in `folder`, including those
    being fetched. Can be forked or pickled to data workers.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.source, self.folder, self.limit = f"{url.rstrip('/')}/{folder.name}", folder, limit
        self._aside = folder / CACHED
        shards = read_manifest(folder)["shards"]
        self._tars: dict[str, tuple[int, str]] = {shard["name"]: (shard["bytes"], shard["sha256"]) for shard in shards}
        self._size_checked: set[str] = set()
        self._without_room: set[str] = set()
        self.traffic = Traffic(
            tars=max(1, len(shards)),
            samples=sum(shard["samples"] for shard in shards),
            size=float(sum(shard["bytes"] for shard in shards)),
            limit=float(limit),
        )
        with self._locked("room"):
            self._shrink()  # the limit may have been larger before

    def index(self, shard: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """Return (sample key, first byte, number of bytes) of every sample of one tar of the manifest, from its json.

        Raises ValueError if the json does not describe this tar.
        """
        sidecar = (self.folder / shard["name"]).with_suffix(".json")
        table = read_json(sidecar) if sidecar.is_file() else {}
        if (table.get("tar") or {}).get("sha256") != shard["sha256"]:
            raise ValueError(
                f"{sidecar} does not say where the samples of its tar are, so that it cannot be fetched when it is "
                "read: publish labels with their json, or set labels.cache_gb = 0, which fetches all of them"
            )
        return index_from_json(sidecar, table, shard["bytes"])

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read `size` bytes of the tar `name`, which is first fetched if it is missing and fits. Raises OSError."""
        file = self._open_cached(name)
        if file is None:
            try:
                file = self._fetch_and_open(name)
            except OSError as error:
                # Another process has fetched all tars, and removed what the cache needs.
                if error.errno != errno.ENOENT or (file := self._open_cached(name)) is None:
                    raise
        if file is None:
            return self._ranged(name, start, size)
        with file:
            return os.pread(file.fileno(), size, start)

    def _ranged(self, name: str, start: int, size: int) -> bytes:
        """Fetch `size` bytes of a tar that is not cached; a failure is retried once."""
        last_error: OSError | None = None
        for _ in range(2):
            try:
                system, inside = file_system(f"{self.source}/{name}")
                if name not in self._size_checked:
                    if (remote_size := system.size(inside)) != self._tars[name][0]:
                        raise OSError(f"it has {remote_size} bytes, not the {self._tars[name][0]} that {MANIFEST} says")
                    self._size_checked.add(name)
                data: bytes = system.cat_file(inside, start=start, end=start + size)
                return data
            except OSError as error:
                last_error = error
        raise OSError(public(f"{self.source}/{name} cannot be read: {last_error}")) from last_error

    def _open_cached(self, name: str) -> IO[bytes] | None:
        """Open the cached tar; None if it is missing or incomplete."""
        path = self.folder / name
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != self._tars[name][0]:
            file.close()
            return None
        return file

    def _fetch_and_open(self, name: str) -> IO[bytes] | None:
        """Fetch and open the tar; None if there is no room for it."""
        if name in self._without_room:
            return None
        with self._locked(name):
            if (file := self._open_cached(name)) is not None:  # another process has fetched it meanwhile
                return file
            with self._locked("room"):
                if self._size_without(name) + self._tars[name][0] > self.limit:
                    self._without_room.add(name)
                    return None
                new = self._aside / f"{name}.{secrets.token_hex(6)}{PARTIAL}"
                new.touch()
            try:
                self._fetch(name, new)
                file = new.open("rb", buffering=0)
                with raising_write_errors(self.folder / name):
                    publish(new, self.folder / name)
                return file
            finally:
                new.unlink(missing_ok=True)

    def _fetch(self, name: str, new: Path) -> None:
        """Download the tar to `new` and check it; a failure is retried once."""
        last_error: OSError | None = None
        for _ in range(2):
            try:
                system, inside = file_system(f"{self.source}/{name}")
                system.get_file(inside, str(new))
                if file_sha256(new) == self._tars[name][1]:
                    return
                last_error = None
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise WriteError(error.errno, error.strerror, str(self.folder / name)) from error
                last_error = error
        if last_error is not None:
            raise OSError(public(f"{self.source}/{name} cannot be read: {last_error}")) from last_error
        raise OSError(
            f"{public(self.source)}/{name} is damaged, its checksum is not the one in {self.folder / MANIFEST}, also "
            f"when it is fetched again: publish it again, or delete {self.folder} if these labels were made anew"
        )

    # --- room ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of a tar, or of the free room, on this machine; no-op on a file system without locks."""
        lock = take_lock(self._lock_file(name), wait=True)
        assert lock is not None
        try:
            yield
        finally:
            lock.release()

    def _lock_file(self, name: str) -> Path:
        return self._aside / f"{name}.lock"

    def _size_without(self, name: str) -> int:
        """The bytes of all tars that are cached or being fetched, except this one, whose lock we hold.

        A tar that is being fetched counts with its full size.
        """
        # Before the cached tars: one that is renamed in between is counted twice rather than missed.
        fetching = sum(self._sizes_being_fetched(name))
        return fetching + sum(size for tar, size in self._cached_sizes().items() if tar != name)

    def _cached_sizes(self) -> dict[str, int]:
        sizes = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name in self._tars:
                    with contextlib.suppress(FileNotFoundError):
                        sizes[entry.name] = entry.stat().st_size
        return sizes

    def _shrink(self) -> None:
        """Remove tars until the rest is within the limit."""
        sizes = self._cached_sizes()
        while sum(sizes.values()) > self.limit:
            name, _ = sizes.popitem()
            (self.folder / name).unlink(missing_ok=True)

    def _sizes_being_fetched(self, ours: str) -> Iterator[int]:
        """Yield the sizes of the tars being fetched; removes files of dead processes. ours: the tar that we locked."""
        for partial in self._aside.glob(f"*{PARTIAL}"):
            name = partial.name.rsplit(".", 2)[0]
            with contextlib.suppress(FileNotFoundError):
                # Without effective locks (several nodes on one disk, a disk without them) only age shows a dead fetch.
                if time.time() - partial.stat().st_mtime > IDLE_S and (name == ours or self._is_free(name)):
                    partial.unlink()
                    continue
                yield self._tars[name][0] if name in self._tars else partial.stat().st_size

    def _is_free(self, name: str) -> bool:
        lock = take_lock(self._lock_file(name))
        if lock is not None:
            lock.release()
        return lock is not None
