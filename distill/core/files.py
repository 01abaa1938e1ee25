"""What reaches the disk, whole: files and folders that are the old ones or the new ones, locks, checksums.

Everything is written beside its place under a name that starts with a dot, brought to the disk, renamed, and the folder
brought to the disk too, so that neither a kill nor a power cut leaves half a file under a name that is read. A writer
that was killed leaves `.NAME.partial`, and a folder that was being replaced `.NAME.old`; the next writer of that NAME
takes them away. What cannot be written is told as a WriteError of the file that was meant, not of the one aside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PARTIAL, OLD = ".partial", ".old"
# What killed writers of earlier versions may have left, by what goes around the name.
_EARLIER = ((".", ".tmp"), (".", ".part"), (".", ".new"), (".new.", ""))


def decoded(data: bytes) -> str:
    """Text as people save it: UTF-8, with a mark or without, or the UTF-16 of Excel and PowerShell.

    Raises UnicodeDecodeError, a ValueError, for any other encoding.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    zero = data[:2].find(0)  # UTF-16 without a mark
    return data.decode("utf-8-sig" if zero < 0 else "utf-16-le" if zero else "utf-16-be")


def files_below(folder: Path) -> list[Path]:
    """Every file of a folder to the bottom, sorted: links to files, links to nothing and pipes too.

    Links to folders are followed, each folder once, so that a circle ends; hidden ones are among them.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        here = os.stat(place)  # noqa: PTH116
        if (here.st_dev, here.st_ino) in seen:
            inner.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        inner.sort()
        found += [Path(place, name) for name in names]
    return sorted(found)


class WriteError(OSError):
    """A file or folder that cannot be written; `filename` is the target, `strerror` the reason."""

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.strerror}. What was finished is kept; fix this and rerun the same "
            "command again"
        )


def write_error(path: Path, error: OSError) -> OSError:
    """`error` told of `path`, or of the file in it or the folder above it that it names; of another file it stays."""
    if error.filename is None:
        # What numpy and tarfile raise themselves has no number either.
        return WriteError(error.errno or errno.EIO, error.strerror or str(error), str(path))
    at = Path(os.fsdecode(error.filename))
    for new in (new for new in (at, *at.parents) if new.name.startswith(f".{path.name}{PARTIAL}")):
        return WriteError(error.errno, error.strerror, str(path / at.relative_to(new)))
    return WriteError(error.errno, error.strerror, str(at)) if at in (path, *path.parents) else error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Every OSError of the block becomes a WriteError of `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


# --- names that came from data ----------------------------------------------------------------------------------------


def leaves_root(name: str, root: str = "its folder") -> str:
    """Why a name that came from data must not be joined to a folder, or "": it is absolute, it climbs, it is none.

    Read as POSIX and Windows both would: backslashes separate, a drive letter is absolute.
    """
    if ".." in re.split(r"[/\\]", name):
        return f"its path climbs out of {root}"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "its path is absolute"
    return "it is no file's name" if not name.strip("./") or "\0" in name else ""


def inside(root: Path | str, name: str) -> Path:
    """`root`/`name`, for a name that came from data; ValueError where that would lie outside of `root`."""
    if why := leaves_root(name):
        raise ValueError(f"{root}: the name {name!r} is refused, since {why}")
    return Path(root) / name


# --- files ------------------------------------------------------------------------------------------------------------


def aside(path: Path) -> Path:
    """The name that `path` has while it is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def meant(name: str) -> str:
    """The name that a file called `name` gets when it is finished: its own, unless a writer left it aside."""
    match = re.fullmatch(rf"\.(.+){re.escape(PARTIAL)}(\.\w+)?|\.new\.(.+)", name)
    return name if match is None else match[1] or match[3]


def leftovers(path: Path) -> tuple[Path, ...]:
    """Every name that a killed writer of `path` may have left, of this version and of earlier ones."""
    return (aside(path), *(path.with_name(f"{before}{path.name}{after}") for before, after in _EARLIER))


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def publish(new: Path, path: Path) -> None:
    """Give the finished file `new` the name `path`, replacing what is there, for good."""
    sync(new)
    new.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def writing(path: Path, *, suffix: str = "", durable: bool = True) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well; nothing is left of it otherwise.

    Makes the folder. suffix: for a library that knows a format by the end of the name alone, and for one of several
    writers of the same file, who must not write into each other's. durable: False for one of
    many files, of which the caller brings all to the disk at once (`sync_tree`). A block that wrote nothing leaves
    `path` as it is. Raises WriteError.
    """
    new = aside(path).with_name(aside(path).name + suffix)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            if new.is_file():
                if durable:
                    publish(new, path)
                else:
                    new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, suffix: str = "") -> None:
    """`path` is the old file or this one, never half of it. suffix: as `writing` has it. Raises WriteError."""
    with writing(path, suffix=suffix) as new:
        new.write_bytes(data)


def write_text(path: Path, text: str, *, suffix: str = "") -> None:
    """As `write_bytes`, in UTF-8; line ends stay as they are given."""
    write_bytes(path, text.encode(), suffix=suffix)


def write_json(
    path: Path,
    table: Any,
    *,
    indent: int | None = 1,
    sort_keys: bool = False,
    allow_nan: bool = False,
    suffix: str = "",
) -> None:
    """As `write_text`, with a newline at the end; ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(table, indent=indent, sort_keys=sort_keys, allow_nan=allow_nan)
    write_text(path, text + "\n", suffix=suffix)


# --- folders ----------------------------------------------------------------------------------------------------------


def replaced(path: Path) -> Path:
    """The name that a folder has while another takes its place."""
    return path.with_name(f".{path.name}{OLD}")


def clean(path: Path) -> None:
    """Take away what killed writers of the folder `path` left; the folder before it comes back where it has no other.

    Two renames exchange folders, and a kill between them leaves the old one under its name aside alone.
    """
    old = replaced(path)
    if old.is_dir() and not path.exists():
        old.rename(path)
    for left in (old, *leftovers(path)):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` when the block ends well; nothing is left otherwise.

    What killed writers of `path` left is taken away first (`clean`). Raises WriteError.
    """
    new = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path)
        new.mkdir()
        yield new
        sync_tree(new)
        if path.exists():
            path.rename(replaced(path))
        new.rename(path)
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:  # else a sentence of the block's own
            raise write_error(path, error) from error
        raise
    shutil.rmtree(replaced(path), ignore_errors=True)


# --- locks ------------------------------------------------------------------------------------------------------------

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[IO[str]] = set()


def _let_go() -> None:
    """A forked child (a data worker) has every open file of its parent, and would hold its locks after its death."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Lock:
    """A lock file that this process holds until `release`, which removes it; a killed process holds nothing.

    The kernel's flock, on a name of its own. Not the package filelock: it leaves its files behind, lets a fork of the
    holder go on holding before its version 4, and refuses a file system that has no locks, where here nothing is held
    and nothing is refused.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self._file = path, file
        _held.add(file)

    def write(self, text: str) -> None:
        """What others may read in the lock file; a full disk may not keep it, and the lock holds all the same."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()

    def release(self) -> None:
        """Remove the file and let go; does nothing in a forked child."""
        if self._file in _held:
            _held.discard(self._file)
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._file.close()


def take_lock(path: Path, *, wait: bool = False) -> Lock | None:
    """The lock of the file `path`, or None where somebody else has it; wait: until it is free. Raises OSError."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Lock(path, file)
            file.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        # Its last holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return Lock(path, file)
        file.close()


# --- checksums --------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hexadecimal digits; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
