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
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core import signatures
from distill.core.depth import DepthMap, Kind
from distill.core.division import unit_range
from distill.core.files import files_below, inside
from distill.data import maps
from distill.data.filetypes import is_litter
from distill.data.photos import BadImageError, decode
from distill.eval.benchmarks._layouts import FileLayout, Rows, read_list
from distill.eval.benchmarks._units import check_unit
from distill.eval.protocol import Protocol, list_hash

_OPENERS: dict[str, Callable[..., IO[Any]]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}

MARIGOLD_HOST = "https://share.phys.ethz.ch/~pf/bingkedata/marigold/evaluation_dataset/"
"""Where Marigold's authors host the archives. They publish no checksums."""


class Files:
    """The files below a root, by name.

    tolerant: a truncated tar is read up to the cut, and `damage` says where that is; otherwise it is an error.
    packed: whether the root is a compressed tar. ended: False for a tar without its end, as if cut between two files.
    """

    def __init__(self, root: Path, *, tolerant: bool = False) -> None:
        self.root = root
        self.damage = ""
        self.packed = False
        self.ended = True
        self._tar: BinaryIO | None = None
        self._members: dict[str, tuple[int, int]] = {}
        self._aliases: Mapping[str, str] = {}
        if root.is_file():
            self.packed, self._tar = _unpacked(root)
            self._members, self.damage, self.ended = _index(root, self._tar)
        if self.damage and not tolerant:
            raise OSError(self.damage)

    def names(self) -> set[str]:
        """Every file's path relative to the root, without what systems leave behind (macOS's ._NAME)."""
        if self._tar is not None:
            return {name for name in self._members if not is_litter(name)}
        paths = (path.relative_to(self.root).as_posix() for path in files_below(self.root, complete=True))
        return {name for name in paths if not is_litter(name)}

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

    def map(self, name: str) -> np.ndarray:
        """A map of one channel as it is stored, (H,W), in any format of distill.data.maps."""
        try:
            return maps.decode_map(self.read(name), name)
        except maps.BadMapError as error:
            raise OSError(f"{self.root}: {name}: {error}") from error

    def codes(self, name: str) -> np.ndarray:
        """A map of 16-bit integers, (H,W); OSError for one that a tool reduced to eight: its numbers mean others."""
        values = self.map(name)
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
        rows, broken = rows_found(files, protocol, layout)
        _check_listed(files, protocol, layout, [row[0] for row in rows], broken)
    names = [name for row in rows for name in row]
    missing = [name for name in names if not files.has(name)]
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        if files.root.is_dir() and (files.root.absolute().parent / missing[0]).is_file():
            listed += f"; the list begins one folder higher: give {files.root.absolute().parent}"
        raise FileNotFoundError(f"{files.root}: {len(missing)} of the {len(names)} files listed are missing: {listed}")
    return files, rows


def rows_of_list(files: Files, list_file: Path | str, layout: FileLayout) -> Rows:
    """The rows of a list; its names become aliases of the files, wherever below the root these lie."""
    rows = read_list(list_file, layout, files.names)
    if not all(files.has(name) for row in rows for name in row):
        files.set_aliases(
            _find_aliases(files, layout, lambda names: ([row for row in rows if names.issuperset(row)], []))
        )
    return rows


def rows_found(files: Files, protocol: Protocol, layout: FileLayout) -> tuple[Rows, Rows]:
    """The rows that the layout's rule finds, and those that lack a file; their names become aliases of the files."""
    rows = layout.rows(files.names())
    if not _is_published(protocol, [row[0] for row in rows[0]]):
        aliases = _find_aliases(files, layout, layout.rows, protocol)
        if aliases:
            files.set_aliases(aliases)
            return layout.rows(set(aliases))
    return rows


def _find_aliases(
    files: Files,
    layout: FileLayout,
    find: Callable[[set[str]], tuple[Rows, Rows]],
    protocol: Protocol | None = None,
) -> dict[str, str]:
    """Names of the layout -> the files' own, if the benchmark lies in an inner folder or as its host ships it.

    Chooses the folder (at most three levels down, of the 24 with the most files) whose rows, by `find` (complete, and
    lacking a file), are worth most: the published ones, most rows, or else most incomplete ones. Empty if none is worth
    more than the root itself. ValueError where two are worth as much, and are not copies of each other: either may be
    the resized one.
    """
    there = sorted(files.names())
    parts = [name.split("/") for name in there]
    heads = Counter("/".join(part[:depth]) + "/" for part in parts for depth in (1, 2, 3) if len(part) > depth)
    candidates = [
        {name[len(head) :]: name for name in there if name.startswith(head)} for head, _ in heads.most_common(24)
    ]
    shipped: dict[str, list[str]] = {}
    for name in there:
        if called := layout.canonical(name):
            shipped.setdefault(called, []).append(name)
    candidates += [{called: names[end] for called, names in shipped.items()} for end in (-1, 0)]
    found = [(candidate, find(set(candidate))) for candidate in candidates]
    best, rows = max(found, key=lambda pair: _worth(protocol, *pair[1]))
    if _worth(protocol, *rows) <= _worth(protocol, *find(set(there))):
        return {}
    for other, others in found:
        if _worth(protocol, *others) == _worth(protocol, *rows):
            _check_copies(files, best, other, [name for row in rows[0] for name in row])
    return best


def _check_copies(files: Files, best: Mapping[str, str], other: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise ValueError if a name means two different files, by the sizes and ends of the first hundred."""
    two = [name for name in names if name in other and other[name] != best[name]]
    for name in two[:100]:
        if files.ends(best[name]) != files.ends(other[name]):
            raise ValueError(
                f"{files.root}: {best[name]} and {other[name]} differ, and either may be meant: give the folder of one "
                "as root"
            )


def _is_published(protocol: Protocol, keys: Sequence[str]) -> bool:
    return len(keys) == protocol.num_images and list_hash(keys) == protocol.list_sha256


def _worth(protocol: Protocol | None, rows: Rows, broken: Rows) -> tuple[bool, int, int]:
    """The rank of rows in a search: the published ones are worth more than any number of others."""
    is_published = protocol is not None and _is_published(protocol, [row[0] for row in rows])
    return is_published, len(rows), 0 if rows else len(broken)


def ranged(depth: np.ndarray, protocol: Protocol, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H,W) as float32 metres, and where it lies strictly inside the protocol's range; name: for errors."""
    metres = depth.astype(np.float32, copy=False)
    check_unit(metres, metres > 0, protocol, name)
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


def _check_listed(files: Files, protocol: Protocol, layout: FileLayout, keys: Sequence[str], broken: Rows) -> None:
    """Raise ValueError unless these are the images of the published list; says what was searched for, and where.

    broken: images that lack a file. Without a published list, one of them is an error: its score would go unnoticed.
    """
    if _is_published(protocol, keys):
        return
    lack = ""
    if broken:
        lacking = next(name for name in broken[0] if not files.has(name))
        lack = f"{len(broken)} of {len(keys) + len(broken)} images lack a file, such as {lacking}"
    if keys and not protocol.num_images:
        if broken:
            raise ValueError(f"{files.root}: {lack}; complete the folder, or name the images with --list")
        if not files.ended:
            raise OSError(f"{files.root}: cut short after {len(keys)} images: its end is missing; download it again")
        return  # no list is published
    how = f"expected layout: {layout.shape}" if layout.shape else f"{protocol.benchmark}.py has the expected layout"
    hint = f"{lack}; {how}" if lack else how
    hint += "; searched here and in the folders below" + _what_lies_there(files.names(), protocol, not keys)
    if not protocol.num_images:
        raise ValueError(f"{files.root}: no images of {protocol.benchmark}; {hint}")
    too_many = len(keys) > protocol.num_images
    remedy = "name the images to use with --list" if too_many else "complete the folder, or name the images with --list"
    raise ValueError(
        f"{files.root}: found {len(keys)} images of {protocol.benchmark}, which are not the {protocol.num_images} of "
        f"the published list; {remedy} ({hint})"
    )


def _what_lies_there(there: set[str], protocol: Protocol, nothing: bool) -> str:
    """What a search went through; where it found nothing, what is packed, or kept in a format that is not read."""
    if not there:
        return "; it is empty"
    hint = f", among {len(there)} files such as {min(there)}"
    if not nothing:
        return hint
    hint += packed_hint(there)
    if any(name.endswith(".mat") for name in there):
        hint += f"; the only .mat read is NYU's nyu_depth_v2_labeled.mat; or `distill fetch {protocol.benchmark}`"
    return hint


def packed_hint(there: set[str]) -> str:
    """What to do about archives and containers among files, each advice after a semicolon."""
    firsts = {
        advice: min((n for n in there if n.lower().endswith(ends)), default="") for ends, advice in _PACKED.items()
    }
    return "".join(f"; {name} {advice}" for advice, name in firsts.items() if name)


_PACKED = {
    (".zip", ".7z", ".rar"): "should be unpacked",
    (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"): "should be unpacked, or given as root itself",
    (".parquet", ".arrow", ".h5", ".hdf5"): "is not read: store its images and depth as files, laid out as expected",
}


_LEAST, _MOST_TIMES = 1 << 30, 200
"""What a packed tar may unpack to: this many bytes, and this many times its own; maps of zeros pack to a hundredth."""


def _unpacked(path: Path) -> tuple[bool, BinaryIO]:
    """Whether the tar is compressed, and a plain, seekable file of it: itself, or an anonymous temporary file."""
    file = path.open("rb")
    opener = _OPENERS.get(signatures.packer(file.peek(6)))
    if opener is None:
        return False, file
    plain = tempfile.TemporaryFile()
    try:
        most = _LEAST + _MOST_TIMES * os.fstat(file.fileno()).st_size
        with file, opener(file) as packed:
            while piece := packed.read(1 << 20):
                plain.write(piece)
                if plain.tell() > most:
                    raise OSError(f"it unpacks to more than {_MOST_TIMES} times its size: unpack it yourself")
            plain.flush()  # it is read, and its size taken, by its descriptor
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        plain.close()
        raise OSError(f"{path}: could not be unpacked ({error}): the download was cut or the disk is full") from error
    return True, plain


def _index(path: Path, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], str, bool]:
    """The position of each complete member, name -> (offset, size), what is wrong with the tar, or "", and whether
    it has an end."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                    return members, f"{path}: the tar is cut short inside {member.name}; download it again", False
                if member.issparse():
                    return members, f"{path}: {member.name} is stored sparse: pack it without --sparse", True
                name = member.name.removeprefix("./")
                if member.isreg():
                    members[name] = member.offset_data, member.size
                elif member.islnk() and (target := member.linkname.removeprefix("./")) in members:
                    members[name] = members[target]  # tar stores the second name of a file as a link to the first
            ended = tar.offset < size
    except tarfile.TarError as error:
        file.seek(0)
        start = file.read(512)
        kind = "" if members else signatures.sniff(start) or signatures.text(start)
        unpack = ": unpack it" if signatures.is_packed(kind) else "; download it again"
        return members, f"{path}: not a readable tar ({f'{kind}{unpack}' if kind else error})", False
    if size and not members and not any(os.pread(file.fileno(), 512, 0)):
        return members, f"{path}: begins with zeros: an unfinished download; download it again", False
    return members, "", ended
