"""Download a benchmark's archive; received bytes are kept, and running the same command again resumes.

Bytes go to ARCHIVE.part, beside a JSON note that identifies the file on the host (address, length, ETag or date). A
later call requests the rest with an HTTP range, on condition that the file has not changed; if the host sends the whole
file instead, the download starts again. Only a complete and verified file gets the archive's name.

A checksum is verified where one is known: given by the caller, published by the authors, or recorded beside the archive
by an earlier download. Marigold's host publishes none; the computed one is recorded as ARCHIVE.sha256 (the format of
`sha256sum -c`), so that two people can compare their files.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.addresses import public
from distill.core.plugins import find
from distill.core.progress import Report
from distill.eval.benchmarks import Download

_CHUNK = 1 << 20
_ATTEMPTS = 3
_SLOW_S, _SLOWEST = 60.0, 1000  # fewer than 1000 bytes per second over 60 seconds: a dead connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A complete archive. resumed: bytes left by earlier calls. published: the checksum was published by the authors or
    given; otherwise it is only that of the received file."""

    path: Path
    num_bytes: int
    sha256: str
    resumed: int
    published: bool


class DownloadCutError(OSError):
    """The connection ended early; received bytes are kept."""


class ManualDownloadError(ValueError):
    """The host asks for a form, or has no file to fetch; the message says what to do."""


def fetch_benchmark(
    name: str, root: Path | str, *, url: str = "", sha256: str = "", report: Report | None = None
) -> Fetched:
    """Download the archive of the benchmark `name` to its place below `root`, the folder of all benchmarks.

    url: a mirror: the archive's own address, or a folder's, ending in "/", with the same layout. sha256: the
    required checksum. Raises LookupError (no such benchmark), ManualDownloadError (the user has to act) or OSError.
    """
    module = find("distill.eval.benchmarks", name)
    download: Download | None = getattr(module, "DOWNLOAD", None)
    if download is None:
        raise ManualDownloadError(f"the benchmark {name} needs no download: score it as it is")
    if not (url or download.url):
        raise ManualDownloadError(f"{name}: {download.manual}")
    address = url + download.archive if url.endswith("/") else url or download.url
    return fetch(address, Path(root) / download.archive, sha256=sha256 or download.sha256, report=report)


def fetch(url: str, path: Path, *, sha256: str = "", report: Report | None = None, patience: float = 1.0) -> Fetched:
    """Download `url` to `path`, resuming from PATH.part if it exists.

    sha256: 64 hexadecimal digits, "" if unknown. report: (done, total, bytes_per_s) in megabytes. patience: seconds
    before the first retry after a broken connection. Every OSError has a one-line message that names the address or the
    file, and the received bytes are kept.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{public(url)}: only http:// and https:// addresses can be fetched")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = files.take_lock(path.with_name(f".{path.name}.lock"))
    if lock is None:
        raise OSError(f"{path} is being fetched by another process: wait for it, or stop it")
    try:
        return _fetch(url, path, sha256, report, patience)
    except OSError as error:
        if (line := public(str(error))) != str(error):
            raise type(error)(line) from None
        raise
    finally:
        lock.release()


def _fetch(url: str, path: Path, sha256: str, report: Report | None, patience: float) -> Fetched:
    record = path.with_name(f"{path.name}.sha256")
    expected, published = (sha256 or _read_record(record)).lower(), bool(sha256)
    if path.is_file():
        digest = files.file_sha256(path)
        if expected and digest != expected:
            raise OSError(f"{path} exists, but its sha256 is {digest}, not {expected}: move it away to fetch it again")
        length = None if expected else _host_length(url)
        if length not in (None, path.stat().st_size):
            raise OSError(
                f"{path} has {path.stat().st_size} bytes, but the file on the host {length}, as if another program's "
                "download was interrupted: move it away to fetch it again"
            )
        _write_record(record, digest, path.name)
        return Fetched(path=path, num_bytes=path.stat().st_size, sha256=digest, resumed=0, published=published)
    part = path.with_name(f"{path.name}.part")
    resumed = _complete(url, part, report, patience)
    digest = files.file_sha256(part)
    if expected and digest != expected:
        wrong = path.with_name(f"{path.name}.wrong")
        part.replace(wrong)
        _note_path(part).unlink(missing_ok=True)
        raise OSError(f"{url}: sha256 {digest}, not {expected}; kept as {wrong} to look at; the next call starts anew")
    size = part.stat().st_size
    files.publish(part, path)
    _note_path(part).unlink(missing_ok=True)
    _write_record(record, digest, path.name)
    return Fetched(path=path, num_bytes=size, sha256=digest, resumed=resumed, published=published)


def _host_length(url: str) -> int | None:
    """The length of the file on the host; None where it does not say so, or cannot be reached."""
    try:
        with urllib.request.urlopen(_request(url, {}, method="HEAD"), timeout=20) as answer:
            length = answer.headers.get("Content-Length", "")
            is_file = answer.status == 200 and answer.headers.get_content_type() != "text/html"
            return int(length) if is_file and length.isascii() and length.isdigit() else None
    except (OSError, http.client.HTTPException):
        return None


def _request(url: str, headers: dict[str, str], *, method: str = "GET") -> urllib.request.Request:
    """A request of the file as it is stored; the user and password of an address are sent as HTTP expects them."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "distill", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(
        parts._replace(netloc=host).geturl() if at else url, headers=headers, method=method
    )
    if at:  # urllib takes the password for a port; a redirection to another host must not get it
        name, _, password = user.partition(":")
        pair = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(password)}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    return request


def _complete(url: str, part: Path, report: Report | None, patience: float) -> int:
    """Complete `part`, retrying until three attempts in a row bring nothing; returns the bytes left by earlier
    calls."""
    resumed = part.stat().st_size if part.is_file() else 0
    failed = 0
    while True:
        size_before = part.stat().st_size if part.is_file() else 0
        try:
            _attempt(url, part, report)
            return resumed
        except DownloadCutError:
            progressed = part.is_file() and part.stat().st_size > size_before
            failed = 0 if progressed else failed + 1
            if failed >= _ATTEMPTS:
                raise
            time.sleep(patience * 2.0**failed)


def _attempt(url: str, part: Path, report: Report | None) -> None:
    """Request the missing bytes once and write them as they arrive; raises DownloadCutError if they end early."""
    received = part.stat().st_size if part.is_file() else 0
    note = _read_note(part) if received else {}
    if public(note.get("url")) != public(url):  # these bytes cannot be matched to the file on the host
        received, note = 0, {}
    headers = {}
    if received:
        headers["Range"] = f"bytes={received}-"
        if note.get("version"):
            headers["If-Range"] = note["version"]
    try:
        with urllib.request.urlopen(_request(url, headers), timeout=60) as answer:
            start, total = _response_range(url, answer)
            if start and note.get("total") not in (None, total):
                _discard(part)
                raise DownloadCutError(f"{url}: the file on the host has changed; starting again")
            if start and start != received:
                raise OSError(f"{url}: the host sent bytes from {start}, not from {received} as requested")
            if not start:
                part.unlink(missing_ok=True)  # before its note: a kill in between would give old bytes the new name
                _write_note(part, url, answer, total)
            _receive(url, answer, part, start, total, report)
    except urllib.error.HTTPError as error:
        if error.code == 416 and received and note.get("total") == received:
            return  # nothing was missing
        if error.code == 416:
            _discard(part)
            raise DownloadCutError(f"{url}: the file on the host has changed; starting again") from error
        if error.code in (408, 429, 500, 502, 503, 504):
            raise DownloadCutError(f"{url}: the host answered {error.code} {error.reason}; try again later") from error
        raise OSError(f"{url}: the host answered {error.code} {error.reason}; try another --url") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        num_bytes = part.stat().st_size if part.is_file() else 0
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise DownloadCutError(
            f"{url}: {reason}; {num_bytes / 1e6:,.1f} MB are kept, rerun the same command to resume"
        ) from error


def _response_range(url: str, answer: Any) -> tuple[int, int | None]:
    """The offset at which this response starts, and the length of the file (None if the host does not state it)."""
    if answer.headers.get_content_type() == "text/html":
        raise OSError(f"{url}: the host answered with a web page instead of the archive; open it in a browser")
    if answer.status == 206:
        span, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        start = span.partition("-")[0]
        if not start.isdigit():
            raise OSError(f"{url}: the host sent a part of the file without saying which")
        return int(start), int(total) if total.isdigit() else None
    length = answer.headers.get("Content-Length")
    if length and not (length.isascii() and length.isdigit()):
        raise OSError(f"{url}: the host sent the Content-Length {length!r}; try another --url")
    return 0, int(length) if length else None


def _receive(url: str, answer: Any, part: Path, start: int, total: int | None, report: Report | None) -> None:
    """Append the response to the part file. Written bytes are kept, whatever happens."""
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise OSError(
            f"{part.parent}: {(total - start) / 1e6:,.1f} MB are needed, only {free / 1e6:,.1f} MB are free; make room"
        )
    done, start_time, window = start, time.monotonic(), (time.monotonic(), start)
    with part.open("ab" if start else "wb", buffering=0) as file:
        try:
            # read1 returns what has arrived; an incomplete chunk would be lost if the connection ended first.
            while chunk := answer.read1(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if (now := time.monotonic()) - window[0] >= _SLOW_S:
                    if done - window[1] < _SLOW_S * _SLOWEST and done != total:
                        raise DownloadCutError(
                            f"{url}: too slow: {done - window[1]} bytes came in {now - window[0]:.0f} s; "
                            f"{done / 1e6:,.1f} MB are kept, rerun the same command to resume"
                        )
                    window = (now, done)
                if report:
                    speed = (done - start) / max(time.monotonic() - start_time, 1e-6)
                    report(round(done / 1e6), round((total or done) / 1e6), bytes_per_s=speed)
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in files.DISK_FULL:
                raise
            raise OSError(f"{part}: the disk is full; make room, then rerun the same command to resume") from error
    if total is not None and done > total:
        _discard(part)
        raise OSError(f"{url}: {done} bytes came, but the host announced {total}; try another --url")
    if total is not None and done < total:
        raise DownloadCutError(
            f"{url}: cut after {done / 1e6:,.1f} of {total / 1e6:,.1f} MB; rerun the same command to resume"
        )


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    try:
        table = json.loads(_note_path(part).read_text(encoding="utf-8"))
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_note(part: Path, url: str, answer: Any, total: int | None) -> None:
    """Record which file on the host the bytes are of. A weak ETag must not guard a range (RFC 9110, 13.1.5)."""
    tag = answer.headers.get("ETag", "")
    version = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
    files.write_json(_note_path(part), {"url": public(url), "total": total, "version": version}, indent=None)


def _read_record(record: Path) -> str:
    """The sha256 recorded by an earlier download, or ""; raises ValueError for a file without one."""
    if not record.is_file():
        return ""
    words = record.read_text(encoding="utf-8", errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise ValueError(f"{record} does not begin with a sha256: delete it, or write the archive's sha256 into it")
    return words[0]


def _write_record(record: Path, digest: str, name: str) -> None:
    files.write_text(record, f"{digest}  {name}\n")
