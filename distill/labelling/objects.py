"""A meeting place of workers without a common disk: a folder of an object store (s3://, gs://, az://).

A worker labels on its own disk and sends each finished part: json first, then the tar, which only appears once it is
complete. A lease is an object that only one worker can create and only its last writer can replace, because conditional
puts name the version that they replace; its age is how long an observer has seen the same version, by its own clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.addresses import public
from distill.core.wording import first_line
from distill.labelling.leases import BEATS, LEASE_S, NOTES, SUFFIX, Claim, Holder, LeaseLostError
from distill.labelling.manifest import sidecar_name
from distill.labelling.meeting import AGE, LAST, SPENT
from distill.shards.readme import README
from distill.shards.shards import MANIFEST

ALIKE = 32  # small objects that are fetched concurrently


class _Taken(Exception):  # noqa: N818  (an answer, not a fault)
    """Another worker has written the object meanwhile."""


@dataclass(slots=True)
class _Store:
    """obstore's calls with errors as OSError, and its two conditional puts as one method."""

    url: str
    store: Any

    def get(self, name: str) -> tuple[bytes, dict[str, Any]] | None:
        import obstore

        with self._raising_os_errors(), contextlib.suppress(FileNotFoundError):
            response = obstore.get(self.store, name)
            return bytes(response.bytes()), dict(response.meta)
        return None

    def head(self, name: str) -> dict[str, Any]:
        """Size, e_tag and last_modified; {} where there is no object."""
        import obstore

        with self._raising_os_errors(), contextlib.suppress(FileNotFoundError):
            return dict(obstore.head(self.store, name))
        return {}

    def put(self, name: str, data: bytes | Path) -> None:
        import obstore

        with self._raising_os_errors():
            obstore.put(self.store, name, data)

    def replace(self, name: str, data: bytes, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Create the object, or replace its version `before`; raises _Taken where another version is there."""
        import obstore

        mode: Any = "create"
        if before is not None:
            mode = {key: before[key] for key in ("e_tag", "version") if before.get(key)}
        with self._raising_os_errors():
            try:
                return dict(obstore.put(self.store, name, data, mode=mode))
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
                raise _Taken from error
            except FileNotFoundError as error:
                if before is None:  # no bucket of this name
                    raise self._error(error) from error
                raise _Taken from error

    def lease(self, name: str, token: str, beats: int, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Write a lease as `replace` does. If a put succeeds but its answer is lost, the client repeats it and is
        refused: then the object has our token.
        """
        try:
            return self.replace(name, _record(token, beats), before)
        except _Taken:
            current = self.get(name)
            if token and current and json.loads(current[0])["token"] == token:
                return current[1]
            raise

    def now(self) -> datetime:
        """The time of an object that is written now; this machine's where none can be written."""
        import obstore

        name = f"{NOTES}/clock-{secrets.token_hex(6)}"
        try:
            obstore.put(self.store, name, b"")
            when: datetime = obstore.head(self.store, name)["last_modified"]
            obstore.delete(self.store, name)
        except (obstore.exceptions.BaseError, FileNotFoundError):
            return datetime.now(UTC)
        return when

    def names(self, folder: str) -> dict[str, dict[str, Any]]:
        """A folder's objects by name, with size, e_tag and last_modified; without its subfolders."""
        import obstore

        with self._raising_os_errors():
            entries = obstore.list_with_delimiter(self.store, prefix=folder or None)["objects"]
        return {entry["path"].rsplit("/", 1)[-1]: dict(entry) for entry in entries}

    def delete(self, *names: str) -> None:
        import obstore

        for name in names:
            with self._raising_os_errors(), contextlib.suppress(FileNotFoundError):
                obstore.delete(self.store, name)

    @contextlib.contextmanager
    def _raising_os_errors(self) -> Iterator[None]:
        import obstore

        try:
            yield
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> OSError:
        line = first_line(error)
        return OSError(public(f"{self.url} cannot be reached: {line}; files already sent are kept: run again"))


@dataclass(slots=True, eq=False)
class _Held:
    """A lease that its own thread refreshes."""

    store: _Store
    name: str
    token: str
    seconds: float
    version: dict[str, Any]
    lost: bool = False
    beats: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    @property
    def suffix(self) -> str:
        return f".{self.token}"

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name=f"lease-{self.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        heard = time.monotonic()
        while not self.lost and not self.stop.wait(self.seconds / BEATS):
            try:
                self.check()
                heard = time.monotonic()
            except LeaseLostError:
                return
            except OSError:
                self.lost = time.monotonic() - heard > self.seconds * (1 - 1 / BEATS)

    def check(self) -> None:
        """Write it again, which only succeeds while nobody else has written it."""
        with self.lock:
            if not self.lost:
                self.beats += 1
                try:
                    self.version = self.store.lease(self.name, self.token, self.beats, self.version)
                except _Taken:
                    self.lost = True
        if self.lost:
            raise LeaseLostError(f"{public(self.store.url)}/{self.name}: another worker has taken it over")

    def release(self) -> None:
        """Clear its holder: a delete could not be made conditional on the version."""
        self.stop.set()
        with self.lock, contextlib.suppress(OSError, _Taken):
            if not self.lost:
                self.store.lease(self.name, "", 0, self.version)
            self.lost = True


def _record(token: str, beats: int) -> bytes:
    record = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "beats": beats}
    return json.dumps(record).encode()


class Objects:
    """A meeting place at a URL; `out` is this worker's local folder. See `meeting.Meeting` for the methods.

    store: an obstore store in place of the URL's, for tests. Raises ValueError where the URL cannot be opened.
    """

    def __init__(self, url: str, out: Path, *, lease_s: float = LEASE_S, store: Any = None) -> None:
        self.url, self.out, self.lease_s = url.rstrip("/"), out, lease_s
        self._store = _Store(self.url, store if store is not None else _open(self.url))
        self._seen: dict[str, tuple[str, float]] = {}
        self._sizes: dict[str, int] = {}

    def take(self, name: str) -> Claim | None:
        """As Meeting has it."""
        path, token, before = f"{NOTES}/{name}{SUFFIX}", secrets.token_hex(16), None
        if current := self._store.get(path):
            data, before = current
            if json.loads(data)["token"]:
                version, since = self._seen.get(name, ("", 0.0))
                if version != str(before["e_tag"]):
                    self._seen[name] = (str(before["e_tag"]), time.monotonic())
                    return None
                if time.monotonic() - since < self.lease_s:
                    return None
        try:
            version_now = self._store.lease(path, token, 0, before)
        except _Taken:
            return None
        self._seen.pop(name, None)
        claim = _Held(self._store, path, token, self.lease_s, version_now)
        claim.start()
        return claim

    def holders(self) -> list[Holder]:
        """As Meeting has it; ages by the store's clock."""
        entries, now = self._store.names(NOTES), self._store.now()
        holders = []
        for name, meta in sorted(entries.items()):
            if not name.endswith(SUFFIX) or (lease_object := self._store.get(f"{NOTES}/{name}")) is None:
                continue
            record = json.loads(lease_object[0])
            age = max(0.0, (now - meta["last_modified"]).total_seconds())
            if record["token"]:
                part = name.removesuffix(SUFFIX)
                holders.append(Holder(part, record["host"], record["pid"], age, age > self.lease_s))
        return holders

    def finished(self) -> set[str]:
        """One listing of the folder."""
        self._sizes = {name: entry["size"] for name, entry in self._store.names("").items()}
        return {name for name in self._sizes if name.endswith((".tar", ".json"))}

    def has(self, name: str) -> bool:
        """As Meeting has it; an earlier listing is enough, because finished files stay."""
        return name in self._sizes or self._ask_size(name)

    def _ask_size(self, name: str) -> bool:
        if metadata := self._store.head(name):
            self._sizes[name] = metadata["size"]
        return bool(metadata)

    def whole(self, out: Path, tar: Mapping[str, Any]) -> bool:
        """As Meeting has it, by its size at the URL."""
        return self.has(tar["name"]) and self._sizes[tar["name"]] == tar["bytes"]

    def begin(self, part: str, claim: Claim) -> None:
        """Remove partial files of a killed worker on this disk. Others cannot send: they check their claim first."""
        for name in (part, sidecar_name(part)):
            for partial_file in self.out.glob(f"{files.temporary_name(self.out / name).name}*"):
                partial_file.unlink(missing_ok=True)

    def deliver(self, part: str, claim: Claim) -> None:
        """As Meeting has it; the local tar is removed."""
        tar, sidecar = self.out / part, self.out / sidecar_name(part)
        claim.check()
        self._store.put(sidecar.name, sidecar.read_bytes())
        if tar.is_file():
            claim.check()
            self._store.put(part, tar)
            tar.unlink()

    def withdraw(self, part: str) -> None:
        """As Meeting has it."""
        self._store.delete(part, sidecar_name(part))
        for name in (part, sidecar_name(part)):
            self._sizes.pop(name, None)
            (self.out / name).unlink(missing_ok=True)

    def download(self, name: str = "") -> None:
        """As Meeting has it."""
        names = [name] if name else [n for n in self.finished() if n.endswith(".json") and n != MANIFEST]
        with ThreadPoolExecutor(ALIKE) as pool:
            for sidecar, found in zip(names, pool.map(self._store.get, names), strict=True):
                if found is not None:
                    self._keep(sidecar, found[0])

    def _keep(self, name: str, data: bytes) -> None:
        """Write a local file; again where the last worker has just finished all: its `tidy` removes a half-written one.

        The processes of a machine share the folder.
        """
        for is_last in (False, True):
            try:
                return files.write_bytes(self.out / name, data, suffix=f".{secrets.token_hex(6)}")
            except OSError as error:
                if is_last or error.errno != errno.ENOENT:
                    raise

    def publish_file(self, name: str) -> None:
        """As Meeting has it."""
        try:
            self._store.replace(name, (self.out / name).read_bytes(), None)
        except _Taken:
            self.download(name)

    def note(self, name: str) -> dict[str, Any]:
        """As Meeting has it."""
        try:
            response = self._store.get(f"{NOTES}/{name}.json")
            table = json.loads(response[0]) if response else {}
        except ValueError:
            return {}
        return table if isinstance(table, dict) else {}

    def write_note(self, name: str, note: Mapping[str, Any]) -> None:
        """As Meeting has it."""
        self._store.put(f"{NOTES}/{name}.json", json.dumps(note).encode())

    def notes(self, prefix: str) -> dict[str, dict[str, Any]]:
        """As Meeting has it."""
        stored_entries, now = self._store.names(NOTES), self._store.now()
        names = [n.removesuffix(".json") for n in stored_entries if n.startswith(prefix) and n.endswith(".json")]
        ages = [max(0.0, (now - stored_entries[f"{n}.json"]["last_modified"]).total_seconds()) for n in names]
        with ThreadPoolExecutor(ALIKE) as pool:
            notes = zip(names, pool.map(self.note, names), ages, strict=True)
            return {n.removeprefix(prefix): {**note, AGE: age} for n, note, age in notes if note}

    def stamp(self) -> str:
        """As Meeting has it."""
        metadata = self._store.head(MANIFEST)
        return str(metadata["e_tag"]) if metadata else ""

    def publish(self, claim: Claim) -> None:
        """As Meeting has it, the manifest last; the local one is removed, because the tars are not there."""
        try:
            claim.check()
            self._store.put(README, (self.out / README).read_bytes())
            self._store.put(MANIFEST, (self.out / MANIFEST).read_bytes())
        finally:
            (self.out / MANIFEST).unlink()

    def tidy(self) -> None:
        """As Meeting has it, at the URL and locally."""
        names = sorted(self._store.names(NOTES), key=lambda name: name == f"{LAST}{SUFFIX}")
        self._store.delete(*(f"{NOTES}/{name}" for name in names if name != f"{SPENT}.json"))
        for partial_file in self.out.glob(f".*{files.PARTIAL}*"):
            partial_file.unlink(missing_ok=True)
        shutil.rmtree(self.out / NOTES, ignore_errors=True)


def _open(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise ValueError(
            f'{public(url)}: workers that meet at a URL need pip install "depth-distill[objects]"'
        ) from error
    import obstore

    try:
        return from_url(url)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ValueError(public(f"{url} cannot be opened: {first_line(error)}")) from error
