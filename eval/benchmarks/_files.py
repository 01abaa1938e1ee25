"""The files of a published benchmark: a folder or a tar, plain or compressed, read by name from any thread.

A plain tar is indexed once and read in place. A compressed one cannot be read out of order, so it is unpacked once into
a nameless temporary file, which takes its unpacked size on disk until the program ends. Member names may start
with "./", as in Marigold's archives, or not.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.depth import DepthMap, Kind
from eval.protocol import Protocol, list_hash

_PACKED: dict[bytes, Callable[..., IO[Any]]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}

Rows = list[tuple[str, ...]]


class Files:
    """Named files below a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tar = _unpacked(root) if root.is_file() else None
        self._members = {} if self._tar is None else _index(root, self._tar)

    def names(self) -> set[str]:
        """Every file's path relative to the root."""
        if self._tar is not None:
            return set(self._members)
        found = (Path(folder) / name for folder, _, names in os.walk(self.root, followlinks=True) for name in names)
        return {path.relative_to(self.root).as_posix() for path in found}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._members if self._tar is not None else (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        """The file's bytes; OSError names the root and the file."""
        if self._tar is None:
            return (self.root / name).read_bytes()
        offset, size = self._members[name]
        data = os.pread(self._tar.fileno(), size, offset)
        while len(data) < size:  # one read call returns at most 2 GiB
            more = os.pread(self._tar.fileno(), size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self.root}: cut short inside {name}; download it again")
            data += more
        return data

    def rgb(self, name: str) -> Tensor:
        """An image as (3,H,W) float32 in [0,1], RGB."""
        return torch.from_numpy(self._pixels(name, "RGB")).permute(2, 0, 1).contiguous() / 255.0

    def png(self, name: str) -> np.ndarray:
        """A one-channel image of 8 or 16 bits as it is stored, (H,W)."""
        values = self._pixels(name, None)
        if values.ndim != 2:
            raise OSError(f"{self.root}: {name} has {values.shape[-1]} channels, a depth map has one")
        return values

    def _pixels(self, name: str, mode: str | None) -> np.ndarray:
        """Decoded by Pillow, which refuses a truncated file where OpenCV may fill it up."""
        try:
            with Image.open(io.BytesIO(self.read(name))) as image:
                return np.array(image.convert(mode) if mode else image)
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{self.root}: {name} is not a readable image ({error})") from error

    def npy(self, name: str) -> np.ndarray:
        """A .npy array, without its axes of length 1."""
        try:
            return np.squeeze(np.load(io.BytesIO(self.read(name)), allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise OSError(f"{self.root}: {name} is not a readable .npy ({error})") from error


def published(
    root: Path | str | None,
    list_file: Path | str | None,
    *,
    protocol: Protocol,
    archive: str,
    columns: int,
    find: Callable[[set[str]], Rows],
) -> tuple[Files, Rows]:
    """The files of a published benchmark, and its rows (rgb first) in order.

    root: the archive, a folder that holds its content, or one that holds `archive` as Marigold lays it out. list_file:
    rows in the published columns, of which the first `columns` count and in which a file `None` stands for "no truth".
    Without it `find(names)` finds the rows, and number and hash must be the published ones (ValueError). Rows whose
    truth is None are left out. FileNotFoundError counts and names missing files.
    """
    if root is None:
        raise ValueError(f"the benchmark {protocol.benchmark} needs a root: {archive}, or the folder it unpacks to")
    files = Files(_locate(Path(root), archive))
    if list_file is not None:
        rows = [row for row in _read_list(Path(list_file), columns) if "None" not in row]
    else:
        rows = sorted(find(files.names()))
        _prove(files.root, protocol, [row[0] for row in rows])
    names = [name for row in rows for name in row]
    missing = [name for name in names if not files.has(name)]
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{files.root}: {len(missing)} of the {len(names)} files listed are missing: {listed}")
    return files, rows


def ranged(depth: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H,W) as float32 metres, and where it lies strictly inside the protocol's range."""
    metres = depth.astype(np.float32, copy=False)
    return metres, (metres > protocol.min_depth) & (metres < protocol.max_depth)


def as_truth(metres: np.ndarray, valid: np.ndarray) -> DepthMap:
    """Metric ground truth (1,H,W)."""
    return DepthMap(torch.from_numpy(metres)[None], torch.from_numpy(valid)[None], Kind.METRIC_DEPTH)


def _locate(root: Path, archive: str) -> Path:
    """The archive or folder that `root` means."""
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such file or folder; it should be {archive}, or the folder it unpacks to")
    for inner in (archive, PurePosixPath(archive).name):
        for name in (inner, inner + ".gz", inner.removesuffix(".tar")):
            if (root / name).exists():
                return root / name
    return root


def _prove(root: Path, protocol: Protocol, keys: Sequence[str]) -> None:
    """Raise ValueError unless these are the images of the published list."""
    if len(keys) == protocol.num_images and list_hash(keys) == protocol.list_sha256:
        return
    raise ValueError(
        f"{root}: found {len(keys)} images of {protocol.benchmark}, and they are not the {protocol.num_images} of the "
        f"published list; complete the folder, or name the images to use with --list"
    )


def _read_list(path: Path, columns: int) -> Rows:
    """The rows of a list file, its first `columns` columns; all faults at once."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list")
    rows, faults = [], []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = tuple(line.split())[:columns]
        if not row:
            continue
        if len(row) < columns:
            faults.append(f"line {number} has {len(row)} columns of {columns}")
        elif row[0] in seen:
            faults.append(f"line {number} repeats {row[0]}")
        elif any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in row):
            faults.append(f"line {number} climbs out of the root")
        seen.add(row[0] if row else "")
        rows.append(row)
    if faults or not rows:
        raise ValueError(f"{path}: " + ("; ".join(faults[:5]) if faults else "the list is empty"))
    return rows


def _unpacked(path: Path) -> BinaryIO:
    """The tar as a plain, seekable file: itself, or unpacked into a nameless temporary file."""
    file = path.open("rb")
    opener = next((opener for magic, opener in _PACKED.items() if file.peek(6).startswith(magic)), None)
    if opener is None:
        return file
    plain = tempfile.TemporaryFile()
    try:
        with file, opener(file) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        plain.close()
        raise OSError(f"{path}: could not be unpacked ({error}); a cut download or a full disk") from error
    return plain


def _index(path: Path, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie: name -> (offset, size)."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar if m.isreg()}
    except tarfile.TarError as error:
        raise OSError(f"{path}: not a readable tar ({error})") from error
    cut = [name for name, (offset, length) in members.items() if offset + length > size]
    if cut:
        raise OSError(f"{path}: the tar is cut short inside {cut[0]}; download it again")
    return members
