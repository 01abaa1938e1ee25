"""Labels at a URL of which this machine keeps no more than it has room for: tars are fetched when they are first read.

The folder has manifest.json, every json of a tar, and some of the tars: as many bytes as `labels.cache_gb` allows.
What is missing is fetched, checked against the manifest's sha256 and renamed into place; the tars that were read
longest ago make room. All processes that see the folder share it: a tar is fetched by one of them while the others
wait. No descriptor stays open between two reads, so that a tar which goes gives its bytes back, and one that another
process is reading is read to its end.

What it costs: training visits samples in an order that is shuffled over all tars, so that a batch of B samples touches
about n (1 - (1 - 1/n)^B) of n tars (`touched`), 55 of 200 for B = 64, and a sample whose tar is not here costs a whole
tar (`Traffic`). A cache that holds all of them fetches each once. A smaller one is for tars of few samples
(labels.samples_per_part): its traffic is proportional to their size.
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
_POLL_S = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)


def touched(tars: int, batch: int) -> float:
    """How many of `tars` equal tars hold the samples of a batch that is drawn from all of them, in the mean."""
    return tars * (1.0 - (1.0 - 1.0 / tars) ** batch)


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
        """The bytes that all processes of a node fetch together in an epoch, once the cache is full.

        A sample's tar is missing with the probability 1 - limit / size, and then comes whole.
        """
        missing = max(0.0, 1.0 - self.limit / self.size)
        return self.samples * missing * self.size / self.tars

    def sentence(self, batch: int) -> str:
        """The facts in a line, for batches of so many samples."""
        line = f"labels: {_gb(self.limit)} of {_gb(self.size)} in {self.tars} tars are kept here"
        if self.fits:
            return f"{line}; each tar is fetched once"
        return (
            f"{line}; a batch of {batch} touches about {touched(self.tars, batch):.0f} tars, and an epoch fetches "
            f"about {_gb(self.bytes_per_epoch)}"
        )


class TarCache:
    """Reads from the tars of a labels folder that `mirror.fetch(..., cached=True)` has begun; a `shards.TarReader`.

    url: where the folder of this name lies whole; limit: bytes of tars to keep in `folder`, those included that are
    being fetched. Goes to data workers by fork or pickle. Raises ValueError where the largest tar is larger than that.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.source, self.folder, self.limit = f"{url.rstrip('/')}/{folder.name}", folder, limit
        self._aside = folder / CACHED
        shards = read_manifest(folder)["shards"]
        self._tars: dict[str, tuple[int, str]] = {shard["name"]: (shard["bytes"], shard["sha256"]) for shard in shards}
        size, largest = max(((bytes_, name) for name, (bytes_, _) in self._tars.items()), default=(0, ""))
        if size > limit:
            raise ValueError(
                f"labels.cache_gb = {limit / 1e9:g} is less than one tar: {largest} of {self.source} has "
                f"{size / 1e9:.3g} GB; allow that, or label with a smaller labels.samples_per_part"
            )
        self.traffic = Traffic(
            tars=max(1, len(shards)),
            samples=sum(shard["samples"] for shard in shards),
            size=float(sum(shard["bytes"] for shard in shards)),
            limit=float(limit),
        )
        with self._locked("room"):
            self._make_room("", 0)  # the limit may have been a larger one

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
        """So many bytes of the tar `name`, fetched first where it is not here. Raises OSError."""
        with self._here(name) or self._brought(name) as file:
            return os.pread(file.fileno(), size, start)

    def _here(self, name: str) -> IO[bytes] | None:
        """The tar, marked as read now; None where it is not here, or not whole."""
        path = self.folder / name
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != self._tars[name][0]:
            file.close()
            return None
        now = time.time_ns()  # the kernel's own "now" is that of its last tick
        with contextlib.suppress(OSError):  # it may have gone by now, and file is it all the same
            os.utime(path, ns=(now, now))
        return file

    def _brought(self, name: str) -> IO[bytes]:
        with self._locked(name):
            if (file := self._here(name)) is not None:  # another process has brought it meanwhile
                return file
            new = self._begun(name)
            try:
                self._fetch(name, new)
                # Before others can see it, who may take it away at once.
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

    def _begun(self, name: str) -> Path:
        """An empty file to fetch the tar to, once there is room for it: what others are fetching is waited for."""
        new = self._aside / f"{name}.{secrets.token_hex(6)}{PARTIAL}"
        while True:
            with self._locked("room"):
                if self._make_room(name, self._tars[name][0]):
                    new.touch()
                    return new
            time.sleep(_POLL_S)

    def _make_room(self, name: str, need: int) -> bool:
        """Take away the tars read longest ago until `need` bytes more are within the limit; False where they cannot be.

        name: the tar that they are for, whose lock we have. Whoever is fetching has its whole tar counted at once.
        """
        # Before the tars: one that is renamed in between is counted twice and not overlooked.
        coming = sum(self._coming(name))
        if coming + need > self.limit:
            return False
        kept = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name in self._tars:
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        kept.append((stat.st_mtime_ns, entry.path, stat.st_size))
        total = coming + need + sum(size for _, _, size in kept)
        for _, path, size in sorted(kept):
            if total <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return True

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
