"""The files of a published benchmark: a folder or a tar, plain or compressed, read by name from any thread.

A plain tar is indexed once and read in place. A compressed one cannot be read out of order, so it is unpacked once into
an anonymous temporary file, which takes its unpacked size on disk until the program ends. Member names may start
with "./", as in Marigold's archives, or not.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import os
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core import signatures
from distill.core.depth import DepthMap, Kind
from distill.core.division import unit_range
from distill.core.files import decoded, files_below, inside, leaves_root
from distill.data import maps
from distill.data.photos import BadImageError, decode
from distill.eval.protocol import Protocol, list_hash

_OPENERS: dict[str, Callable[..., IO[Any]]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}

MARIGOLD_HOST = "https://share.phys.ethz.ch/~pf/bingkedata/marigold/evaluation_dataset/"
"""Where Marigold's authors host the archives. They publish no checksums."""

ListRow = tuple[str, ...]
Rows = list[ListRow]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a published benchmark on disk.

    archive: the published archive, relative to the folder of all of them. columns: the number of columns of the
    published list that name files. row: name -> the files of one image (rgb first) if `name` is the file that defines
    an image, else None. strip: an optional prefix of every name in a list. size: name -> the required number of bytes,
    None if unknown. parts: group -> its number of images and the hash of their list. shape: the layout in words.
    canonical: a file's name as its own host ships it -> the name in the published archive, None for any other.
    """

    archive: str
    columns: int
    row: Callable[[str], ListRow | None]
    strip: str = ""
    size: Callable[[str], int | None] = lambda _: None
    parts: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    shape: str = ""
    canonical: Callable[[str], str | None] = lambda _: None

    def rows(self, names: set[str]) -> tuple[Rows, Rows]:
        """The rows whose files all exist, and those that lack one, both sorted."""
        rows = sorted(row for name in names if (row := self.row(name)) is not None)
        return [row for row in rows if names.issuperset(row)], [row for row in rows if not names.issuperset(row)]


class Files:
    """The files below a root, by name.

    tolerant: a truncated tar is read up to the cut, and `damage` says where that is; otherwise it is an error.
    packed: whether the root is a compressed tar.
    """

    def __init__(self, root: Path, *, tolerant: bool = False) -> None:
        self.root = root
        self.damage = ""
        self.packed = False
        self._tar: BinaryIO | None = None
        self._members: dict[str, tuple[int, int]] = {}
        self._aliases: Mapping[str, str] = {}
        if root.is_file():
            self.packed, self._tar = _unpacked(root)
            self._members, self.damage = _index(root, self._tar)
        if self.damage and not tolerant:
            raise OSError(self.damage)

    def names(self) -> set[str]:
        """Every file's path relative to the root."""
        if self._tar is not None:
            return set(self._members)
        return {path.relative_to(self.root).as_posix() for path in files_below(self.root)}

    def set_aliases(self, names: Mapping[str, str]) -> None:
        """Set aliases of files: requested name -> the file's own name."""
        self._aliases = names

    def has(self, name: str) -> bool:
        """Whether the file exists."""
        name = self._aliases.get(name, name)
        return name in self._members if self._tar is not None else inside(self.root, name).is_file()

    def read(self, name: str) -> bytes:
        """The file's bytes; OSError names the root and the file."""
        name = self._aliases.get(name, name)
        if self._tar is None:
            return inside(self.root, name).read_bytes()
        offset, size = self._members[name]
        data = os.pread(self._tar.fileno(), size, offset)
        while len(data) < size:  # one read call returns at most 2 GiB
            chunk = os.pread(self._tar.fileno(), size - len(data), offset + len(data))
            if not chunk:
                raise OSError(f"{self.root}: cut short inside {name}; download it again")
            data += chunk
        return data

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A file of raw little-endian float32 as a memory-mapped array; its size is checked.

        Mapped copy-on-write: a 24-megapixel map is neither read twice nor copied to new memory, which costs as much.
        """
        name = self._aliases.get(name, name)
        offset, size = self._members[name] if self._tar is not None else (0, inside(self.root, name).stat().st_size)
        if size != 4 * math.prod(shape):
            expected = " x ".join(map(str, shape))
            raise OSError(f"{self.root}: {name} has {size} bytes; raw float32 of {expected} has {4 * math.prod(shape)}")
        if self._tar is not None and os.fstat(self._tar.fileno()).st_size < offset + size:
            raise OSError(f"{self.root}: cut short inside {name}; download it again")
        file = inside(self.root, name) if self._tar is None else self._tar
        return np.asarray(np.memmap(file, "<f4", mode="c", offset=offset, shape=shape))

    def ends(self, name: str, length: int = 256) -> tuple[int, bytes, bytes]:
        """The file's size, and its first and last `length` bytes, without reading all of it."""
        name = self._aliases.get(name, name)
        if self._tar is not None:
            start, size = self._members[name]
            descriptor = self._tar.fileno()
            head = os.pread(descriptor, min(length, size), start)
            return size, head, os.pread(descriptor, min(length, size), start + max(0, size - length))
        with inside(self.root, name).open("rb") as file:
            head = file.read(length)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            return size, head, file.read(length)

    def rgb(self, name: str) -> Tensor:
        """An image as (3,H,W) float32 in [0,1], sRGB, upright."""
        try:
            return unit_range(decode(self.read(name)).contiguous())
        except BadImageError as error:
            raise OSError(f"{self.root}: {name} is not a readable image ({error})") from error

    def png(self, name: str) -> np.ndarray:
        """A map of one channel as it is stored, (H,W)."""
        try:
            return maps.decode_map(self.read(name), name)
        except maps.BadMapError as error:
            raise OSError(f"{self.root}: {name}: {error}") from error

    def codes(self, name: str) -> np.ndarray:
        """A map of 16-bit integers, (H,W); OSError for one that a tool reduced to eight: its numbers mean others."""
        values = self.png(name)
        if values.dtype.itemsize == 1:
            raise OSError(f"{self.root}: {name} {maps.REDUCED}")
        return values

    def pixels(self, name: str, mode: str | None = None) -> np.ndarray:
        """An image as stored, or in a mode of Pillow, which rejects a truncated file where OpenCV may fill it up."""
        try:
            with Image.open(io.BytesIO(self.read(name))) as image:
                mode = mode or ("RGB" if image.mode == "P" else None)  # palette indices are not brightness
                return np.array(image.convert(mode) if mode else image)
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{self.root}: {name} is not a readable image ({error})") from error

    def npy(self, name: str) -> np.ndarray:
        """A .npy map, (H,W)."""
        try:
            return maps.decode_map(self.read(name), name)
        except maps.BadMapError as error:
            raise OSError(f"{self.root}: {name}: {error}") from error


def published(
    root: Path | str | None,
    list_file: Path | str | None,
    *,
    protocol: Protocol,
    layout: FileLayout,
) -> tuple[Files, Rows]:
    """The files of a published benchmark, and its rows (rgb first) in order.

    root: the archive, a folder that holds its content, or one that holds the archive as Marigold lays it out.
    list_file: see `read_list`. Without it the layout's rule finds the rows, and their number and hash must be the
    published ones (else ValueError). FileNotFoundError counts and names missing files.
    """
    files = Files(locate(root, protocol.benchmark, layout))
    if list_file is not None:
        rows = rows_of_list(files, list_file, layout)
    else:
        rows, _ = rows_found(files, protocol, layout)
        _check_listed(files.root, protocol, layout, files.names(), [row[0] for row in rows])
    names = [name for row in rows for name in row]
    missing = [name for name in names if not files.has(name)]
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{files.root}: {len(missing)} of the {len(names)} files listed are missing: {listed}")
    return files, rows


def rows_of_list(files: Files, list_file: Path | str, layout: FileLayout) -> Rows:
    """The rows of a list; its names become aliases of the files, wherever below the root these lie."""
    rows = read_list(list_file, layout)
    if not all(files.has(name) for row in rows for name in row):
        files.set_aliases(
            _find_aliases(files.names(), layout, lambda names: sum(names.issuperset(row) for row in rows))
        )
    return rows


def rows_found(files: Files, protocol: Protocol, layout: FileLayout) -> tuple[Rows, Rows]:
    """The rows that the layout's rule finds, and those that lack a file; their names become aliases of the files."""
    names = files.names()
    rows = layout.rows(names)
    if not _is_published(protocol, rows[0]):
        aliases = _find_aliases(names, layout, lambda names: _worth(protocol, layout.rows(names)[0]))
        if aliases:
            files.set_aliases(aliases)
            return layout.rows(set(aliases))
    return rows


def _find_aliases(there: set[str], layout: FileLayout, worth: Callable[[set[str]], int]) -> dict[str, str]:
    """Names of the layout -> the files' own, if the benchmark lies in an inner folder or as its host ships it.

    Chooses the folder (at most three levels down, of the 24 with the most files) of the highest `worth`; empty if none
    is worth more than the root itself.
    """
    parts = [name.split("/") for name in there]
    heads = Counter("/".join(part[:depth]) + "/" for part in parts for depth in (1, 2, 3) if len(part) > depth)
    candidates = [
        {name[len(head) :]: name for name in there if name.startswith(head)} for head, _ in heads.most_common(24)
    ]
    candidates.append({called: name for name in sorted(there) if (called := layout.canonical(name))})
    best = max(candidates, key=lambda names: worth(set(names)))
    return best if worth(set(best)) > worth(there) else {}


def _is_published(protocol: Protocol, rows: Rows) -> bool:
    keys = [row[0] for row in rows]
    return len(keys) == protocol.num_images and list_hash(keys) == protocol.list_sha256


def _worth(protocol: Protocol, rows: Rows) -> int:
    """The rank of rows in a search: the published ones are worth more than any number of others."""
    return len(rows) + (1 << 30) * _is_published(protocol, rows)


def ranged(depth: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H,W) as float32 metres, and where it lies strictly inside the protocol's range."""
    metres = depth.astype(np.float32, copy=False)
    return metres, (metres > protocol.min_depth) & (metres < protocol.max_depth)


def as_truth(metres: np.ndarray, valid: np.ndarray) -> DepthMap:
    """Metric ground truth (1,H,W)."""
    return DepthMap(torch.from_numpy(metres)[None], torch.from_numpy(valid)[None], Kind.METRIC_DEPTH)


def locate(root: Path | str | None, benchmark: str, layout: FileLayout) -> Path:
    """The archive or folder that `root` refers to; ValueError without a root, FileNotFoundError if it is missing."""
    archive = layout.archive
    if root is None:
        raise ValueError(f"the benchmark {benchmark} needs a root: {archive}, or the folder it unpacks to")
    root = Path(root)
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such file or folder; it should be {archive}, or the folder it unpacks to")
    for inner in (archive, PurePosixPath(archive).name):
        for name in (inner, inner + ".gz", inner.removesuffix(".tar")):
            if (root / name).exists():
                return root / name
    return root


def _check_listed(root: Path, protocol: Protocol, layout: FileLayout, there: set[str], keys: Sequence[str]) -> None:
    """Raise ValueError unless these are the images of the published list; says what was searched for, and where."""
    if len(keys) == protocol.num_images and list_hash(keys) == protocol.list_sha256:
        return
    if keys and not protocol.num_images:
        return  # no list is published
    how = f"expected layout: {layout.shape}" if layout.shape else f"{protocol.benchmark}.py has the expected layout"
    hint = f"{how}; searched here and in the folders below"
    hint += f", among {len(there)} files such as {min(there)}" if there else "; it is empty"
    if any(name.endswith(".mat") for name in there) and not keys:
        hint += f"; the only .mat read is NYU's nyu_depth_v2_labeled.mat; or `distill fetch {protocol.benchmark}`"
    if not protocol.num_images:
        raise ValueError(f"{root}: no images of {protocol.benchmark}; {hint}")
    too_many = len(keys) > protocol.num_images
    remedy = "name the images to use with --list" if too_many else "complete the folder, or name the images with --list"
    raise ValueError(
        f"{root}: found {len(keys)} images of {protocol.benchmark}, which are not the {protocol.num_images} of the "
        f"published list; {remedy} ({hint})"
    )


def read_list(path: Path | str, layout: FileLayout) -> Rows:
    """The rows of a list in the published columns, cut to those that name files; reports all faults at once.

    A layout of one column takes a list of images, whose other files follow from the layout.

    A file `None` stands for "no truth": such rows are left out.
    """
    path, columns = Path(path), layout.columns
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list")
    rows, faults = [], []
    seen: set[str] = set()
    try:
        lines = decoded(path.read_bytes()).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        row = tuple(line.split())[:columns]
        if row and columns == 1:  # a name may hold spaces
            row = layout.row(line.strip().removeprefix(layout.strip)) or ()
            if not row:
                faults.append(f"line {number} names no image")
                continue
        if not row:
            continue
        if len(row) < columns:
            faults.append(f"line {number} has {len(row)} of {columns} columns")
        elif row[0] in seen:
            faults.append(f"line {number} repeats {row[0]}")
        elif any(leaves_root(name) for name in row):
            faults.append(f"line {number} leaves the root")
        seen.add(row[0] if row else "")
        rows.append(row)
    if faults or not rows:
        raise ValueError(f"{path}: " + ("; ".join(faults[:5]) if faults else "the list is empty"))
    return [row for row in rows if "None" not in row]


def _unpacked(path: Path) -> tuple[bool, BinaryIO]:
    """Whether the tar is compressed, and a plain, seekable file of it: itself, or an anonymous temporary file."""
    file = path.open("rb")
    opener = _OPENERS.get(signatures.packer(file.peek(6)))
    if opener is None:
        return False, file
    plain = tempfile.TemporaryFile()
    try:
        with file, opener(file) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
            plain.flush()  # it is read, and its size taken, by its descriptor
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        plain.close()
        raise OSError(f"{path}: could not be unpacked ({error}): the download was cut or the disk is full") from error
    return True, plain


def _index(path: Path, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], str]:
    """The position of each complete member, name -> (offset, size), and what is wrong with the tar, or ""."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                    return members, f"{path}: the tar is cut short inside {member.name}; download it again"
                if member.issparse():
                    return members, f"{path}: {member.name} is stored sparse: pack it without --sparse"
                name = member.name.removeprefix("./")
                if member.isreg():
                    members[name] = member.offset_data, member.size
                elif member.islnk() and (target := member.linkname.removeprefix("./")) in members:
                    members[name] = members[target]  # tar stores the second name of a file as a link to the first
    except tarfile.TarError as error:
        file.seek(0)
        start = file.read(512)
        kind = "" if members else signatures.sniff(start) or signatures.text(start)
        unpack = ": unpack it" if signatures.is_packed(kind) else "; download it again"
        return members, f"{path}: not a readable tar ({f'{kind}{unpack}' if kind else error})"
    if size and not members and not any(os.pread(file.fileno(), 512, 0)):
        return members, f"{path}: begins with zeros: an unfinished download; download it again"
    return members, ""
