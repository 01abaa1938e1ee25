"""The label shard format: tars of regions and their depth labels, readable by plain webdataset.

    <stem>-<part>.tar    per sample key K, in this order:
        K.jpg                       the region as the student sees it, quality 95, 4:4:4
        K.<teacher>.shared.jls      the teacher's map of the region; other codecs of `distill.shards.codec`: png, npy.gz
        K.<teacher>.local<i>.jls    the teacher's maps of the patches
        K.json                      crop, patches, kinds, ranges, checksums, codec, seed
    <stem>-<part>.json   what the tar holds and at which offsets, so that the tar need not be scanned
    manifest.json        the whole run: recipe, teachers, image list, checksums, quarantine, licences

A tar is written under a temporary name, synced and renamed: if it exists, it is complete. Equal content gives equal
bytes.

Shapes: S region size, N patches per region, P patch size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import webdataset
from torch.utils.data import Dataset

from distill.core import files
from distill.core.links import unlink_link
from distill.core.progress import Report
from distill.core.seal import is_broken
from distill.data.tars import walk_tar
from distill.shards.codec import REPAIR, Sample, decode_sample, disagreements
from distill.shards.codec import collate as collate
from distill.shards.handles import OpenTars
from distill.shards.tables import CACHED, foreign_members, pointer_line, require_photographs
from distill.shards.tables import MANIFEST as MANIFEST
from distill.shards.tables import SETTINGS as SETTINGS
from distill.shards.tables import DamagedTableError as DamagedTableError
from distill.shards.tables import read_json as read_json
from distill.shards.tables import read_manifest as read_manifest
from distill.shards.tables import write_manifest as write_manifest

# --- writing ----------------------------------------------------------------------------------------------------------

WRITEBACK = 1 << 25  # bytes


class _Hashing:
    """A file that computes the checksum and the number of the bytes written to it, and sends them to the disk early."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size, self.sent = file, hashlib.sha256(), 0, 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size, number = self.size + len(data), self.file.write(data)
        if self.size - self.sent >= WRITEBACK:
            files.start_writeback(self.file, self.sent, self.size)
            self.sent = self.size
        return number

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Writes one tar under a temporary name; `close` makes it durable under that name, and `publish` renames it.

    In between, the caller writes the json that describes the tar, so that a visible tar always has a description.
    As a context manager it removes an unpublished file, unless the process is killed: then the next run overwrites it.
    suffix: distinguishes the temporary file from that of another writer of the same tar.
    Every method raises OSError naming the tar if the disk write fails.
    """

    def __init__(self, path: Path, *, suffix: str = "") -> None:
        self.path = path
        self.aside = files.temporary_name(path).with_name(files.temporary_name(path).name + suffix)
        self.index: list[tuple[str, int, int]] = []
        with files.raising_write_errors(path):
            unlink_link(self.aside)
            self._file = self.aside.open("wb")
        self._out = _Hashing(self._file)
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=tarfile.GNU_FORMAT)  # type: ignore[call-overload]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as close_error:
            if error is None:
                raise files.write_error(self.path, close_error) from close_error
        finally:
            self.aside.unlink(missing_ok=True)

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample: `codec.encode_sample`'s members."""
        start = self._tar.offset
        with files.raising_write_errors(self.path):
            for name, data in members:
                # TarInfo's own defaults: time 0, owner 0, mode 0644. Nothing depends on this machine.
                info = tarfile.TarInfo(name)
                info.size = len(data)
                self._tar.addfile(info, io.BytesIO(data))
        self._tar.members = []
        self.index.append((key, start, self._tar.offset - start))

    def close(self) -> dict[str, Any]:
        """Finish and sync the file; returns {"name", "sha256", "bytes", "samples"}."""
        with files.raising_write_errors(self.path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        return {
            "name": self.path.name,
            "sha256": self._out.sha256.hexdigest(),
            "bytes": self._out.size,
            "samples": len(self.index),
        }

    def publish(self) -> None:
        """Rename the finished file into place."""
        with files.raising_write_errors(self.path):
            files.publish(self.aside, self.path)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_shard(path: str | Path, *, teachers: Sequence[str] | None = None) -> Iterator[Sample]:
    """Stream the samples of one tar in order, through webdataset.

    Raises OSError for a damaged or missing tar, ValueError for a newer version, LookupError for an absent teacher.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard")
    # A list, because braces in a plain string are expanded; "file:", because a colon would look like a protocol.
    stream = webdataset.WebDataset([f"file:{path}"], shardshuffle=False, empty_check=False)
    try:
        for members in stream:
            yield decode_sample(members, where=f"{path}:{members['__key__']}", teachers=teachers)
    except tarfile.TarError as error:
        reason = str(error.args[0]).partition(" @ ")[0]  # webdataset appends its own objects
        raise OSError(f"{path} is damaged ({reason}); {REPAIR}") from error
    except ValueError as error:
        if "duplicate file name" not in str(error):  # webdataset's, of two samples in a row with one key
            raise
        raise OSError(f"{path} is damaged ({str(error.args[0]).partition(':')[0]} occurs twice); {REPAIR}") from error


def shard_index(path: Path) -> list[tuple[str, int, int]]:
    """Return (sample key, first byte, number of bytes) of every sample in a tar, from its .json or else its headers."""
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        metadata = read_json(sidecar)
        if metadata.get("tar") and metadata["tar"]["bytes"] == path.stat().st_size:
            return index_from_json(sidecar, metadata, path.stat().st_size)
    return index_from_headers(path)


def index_from_json(sidecar: Path, metadata: Mapping[str, Any], size: int) -> list[tuple[str, int, int]]:
    """`shard_index` from the json of a tar of `size` bytes; raises ValueError unless every sample lies within it."""
    try:
        samples = [(str(key), int(start), int(length)) for key, start, length in metadata["samples"]]
    except (TypeError, ValueError):
        samples = [("", -1, -1)]
    if not all(0 <= start < start + length <= size for _, start, length in samples):
        raise ValueError(f"{sidecar} is damaged: samples in it do not lie in their tar; {REPAIR}")
    return samples


def index_from_headers(path: Path) -> list[tuple[str, int, int]]:
    """`shard_index` from the tar's own headers. Raises OSError for a damaged tar."""
    extents: dict[str, list[int]] = {}
    for member, problem in walk_tar(path):
        if member is None or problem:
            raise OSError(f"{path}: {problem}; delete it and its .json, and run distill label again")
        end = member.offset_data + (member.size + 511) // 512 * 512
        extents.setdefault(member.name.split(".", 1)[0], [member.offset, end])[1] = end
    return [(key, start, end - start) for key, (start, end) in extents.items()]


def members_of(blob: bytes, where: str, *, remedy: str = REPAIR) -> dict[str, bytes]:
    """Return the members of one sample from its bytes in the tar, by the part of their name after the key.

    Raises OSError that names `where` and the remedy for damaged bytes.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(blob + bytes(1024)), mode="r:") as tar:
            return {m.name.split(".", 1)[-1]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise OSError(f"{where} is damaged ({error}); {remedy}") from error


class TarReader(Protocol):
    """A reader of tars that are not all in their labels folder: `distill.shards.cache.TarCache`."""

    def index(self, shard: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """`shard_index` of one tar of the manifest."""
        ...

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read bytes of a tar."""
        ...


class LabelDataset(Dataset[Sample]):
    """Random access to every sample of a finished labels folder, in the order of tars and members.

    folder: as `labelling.run` wrote it. teachers: those to decode (None: all). keys: image or sample keys to keep
    (None: all). cache: reads the tars, if the folder does not have all of them. `keys`, `image_keys` and `sources`
    (the number of the [[images]] table) have an item per sample; `duplicates` counts samples left out because an
    earlier tar has their key. Can be forked or pickled to DataLoader workers.
    Raises FileNotFoundError, OSError, ValueError or LookupError, naming the file, for a folder that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teachers: Sequence[str] | None = None,
        keys: Collection[str] | None = None,
        cache: TarReader | None = None,
    ) -> None:
        self.folder, self.cache = Path(folder), cache
        self.manifest = read_manifest(folder)
        require_photographs(self.folder)
        for option, names in (("teachers", teachers), ("keys", keys)):
            if isinstance(names, str):  # a collection too, of letters
                raise TypeError(f"{option} must be a list of names, not one name: [{names!r}]")
        stored_teachers = list(self.manifest["teachers"])
        self.teachers = stored_teachers if teachers is None else list(teachers)
        for name in self.teachers:
            if name not in stored_teachers:
                raise LookupError(f"{self.folder} has no labels by {name}; it has {', '.join(stored_teachers)}")
        self.tars: list[str] = []
        self.keys: list[str] = []
        self.duplicates = 0
        selected = None if keys is None else frozenset(keys)
        seen: set[str] = set()
        locations: list[tuple[int, int, int]] = []
        for shard in self.manifest["shards"]:
            for key, start, size in cache.index(shard) if cache else shard_index(self._checked(shard)):
                if key in seen:
                    self.duplicates += 1
                elif selected is None or key in selected or key.rsplit("-", 1)[0] in selected:
                    self.keys.append(key)
                    locations.append((len(self.tars), start, size))
                seen.add(key)
            self.tars.append(shard["name"])
        if not self.keys:
            raise ValueError(f"{self.folder} has no samples{'' if keys is None else ' with the keys asked for'}")
        self.image_keys = [key.rsplit("-", 1)[0] for key in self.keys]
        self.sources = [int(self.manifest["shards"][tar].get("image_source", 0)) for tar, _, _ in locations]
        self._places = np.array(locations, dtype=np.int64)
        self._open_tars = OpenTars(self.folder)

    def _checked(self, shard: Mapping[str, Any]) -> Path:
        path = self.folder / shard["name"]
        if not path.is_file():
            remedy = "copy it back or run distill label again"
            if (self.folder / CACHED).is_dir():
                remedy = "the folder caches only some tars; distill train with labels.cache_gb = 0 fetches all"
            raise FileNotFoundError(f"{path} is missing, but {MANIFEST} lists it: {remedy}")
        if path.stat().st_size != shard["bytes"]:
            if pointer := pointer_line(path):
                raise OSError(pointer)
            raise OSError(
                f"{path} is damaged: {path.stat().st_size} bytes, not the {shard['bytes']} that {MANIFEST} says; "
                "delete it and run distill label again"
            )
        return path

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        if not hasattr(index, "__index__"):
            hint = "torch.utils.data.Subset(labels, range(2, 5)) is a part of the samples"
            raise TypeError(f"a sample's index must be a whole number, not {type(index).__name__}: {hint}")
        return self.get(index, self.teachers_of(index))

    stores_codes = True

    def teachers_of(self, index: int) -> list[str]:
        """The teachers to decode whose labels sample `index` has."""
        stored_teachers = self.manifest["shards"][self._places[index][0]].get("teachers", self.teachers)
        return [name for name in self.teachers if name in stored_teachers]

    def get(
        self,
        index: int,
        teachers: Sequence[str],
        *,
        visit: int | None = None,
        patches: Callable[[int], Sequence[int]] | None = None,
        coded: bool = False,
    ) -> Sample:
        """Return sample `index` with only the labels of these teachers, the same at every visit; decodes no other map.

        patches, coded: as in `distill.shards.codec.decode_sample`.
        """
        tar, start, size = self._places[index]
        name = self.tars[tar]
        where = f"{self.folder / name}:{self.keys[index]}"
        blob = (self.cache or self._open_tars).read(name, int(start), int(size))
        if len(blob) != size:
            raise OSError(f"{where} is damaged: the tar ends too early; {REPAIR}")
        return decode_sample(members_of(blob, where), where=where, teachers=teachers, patches=patches, coded=coded)


# --- verification -----------------------------------------------------------------------------------------------------


def verify(folder: str | Path, *, report: Report | None = None) -> list[str]:
    """Read a labels folder to the last pixel; returns its problems, one line each, naming the file; empty if none.

    Raises what `read_manifest` raises if there is no manifest to compare with.
    """
    return [line for lines in find_problems(folder, report=report).values() for line in lines]


def find_problems(folder: str | Path, *, report: Report | None = None) -> dict[str, list[str]]:
    """The problems that `verify` returns, by the file name of the tar, its json or the settings; "" is the manifest.

    In a folder that keeps only some tars (distill.shards.cache), those that exist are checked.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, whole=False)
    require_photographs(folder)
    problems_of: dict[str, list[str]] = {}
    tar_names = {shard["name"] for shard in manifest["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in tar_names and not path.name.startswith("._"):  # macOS's AppleDouble files
            problems_of[path.name] = [f"{path} is not in {MANIFEST}"]
    images = manifest["images"]
    listed = images["keys"] if isinstance(images["keys"], list) else []  # damage changes types, too
    if hash_keys(listed) != images["sha256"] or len(listed) != images["count"]:
        problems_of[""] = [f"{folder / MANIFEST}: the image list does not agree with its own checksum"]
    if is_broken(json.loads((folder / MANIFEST).read_bytes())):
        problems_of.setdefault("", []).append(f"{folder / MANIFEST} does not agree with its own checksum")
    if (folder / SETTINGS).is_file():
        try:
            read_json(folder / SETTINGS)
        except ValueError as error:
            problems_of[SETTINGS] = [str(error)]
    keys = {key for key in listed if isinstance(key, str)}
    is_cached = (folder / CACHED).is_dir()
    for done, shard in enumerate(manifest["shards"]):
        path = folder / shard["name"]
        samples, problems = (None, []) if is_cached and not path.is_file() else _verify_shard(path, shard, keys)
        if problems:
            problems_of[path.name] = problems
        if problems := verify_sidecar(path, shard, samples):
            problems_of[path.with_suffix(".json").name] = problems
        if report:
            report(done + 1, len(manifest["shards"]), problems=float(sum(map(len, problems_of.values()))))
    return problems_of


def verify_sidecar(path: Path, shard: Mapping[str, Any], samples: list[str] | None) -> list[str]:
    """Where the json of a tar differs from the manifest, or from the tar with these `samples` (None: tar not read)."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return [f"{sidecar} is missing"]
    try:
        table = read_json(sidecar)
        recorded = table.get("tar")
        differ = [key for key in ("name", "sha256", "bytes", "samples") if not recorded or recorded[key] != shard[key]]
        problems = [f"{sidecar}: {', '.join(differ)} of the tar are not what {MANIFEST} says"] if differ else []
        if samples is None or not recorded or recorded["bytes"] != path.stat().st_size:
            return problems
        index, tar_index = index_from_json(sidecar, table, path.stat().st_size), index_from_headers(path)
        if samples != [key for key, _, _ in index]:
            problems.append(f"{sidecar} does not list the samples that its tar holds")
        elif index != tar_index:
            wrong_key = next(key for (key, *place), (_, *true) in zip(index, tar_index, strict=True) if place != true)
            problems.append(f"{sidecar} gives the wrong position in its tar for {wrong_key}")
        return problems
    except (OSError, ValueError) as error:
        return [str(error)]


def hash_keys(keys: Sequence[str]) -> str:
    """The sha256 of an image list, one key per line."""
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()


def _verify_shard(path: Path, shard: Mapping[str, Any], images: set[str]) -> tuple[list[str] | None, list[str]]:
    """Return the keys of a tar's samples, None if they cannot be read, and the problems of the tar."""
    if not path.is_file():
        return None, [f"{path} is missing"]
    if pointer := pointer_line(path):
        return None, [pointer]
    problems = []
    if files.file_sha256(path) != shard["sha256"]:
        problems.append(f"{path}: its checksum is not the one in {MANIFEST}")
    seen: list[str] = []
    try:
        problems += foreign_members(path)
        for sample in read_shard(path):
            problems += [f"{path}:{sample.key}: {problem}" for problem in disagreements(sample)]
            if sample.image_key not in images:
                problems.append(f"{path}:{sample.key}: its image is not in {MANIFEST}")
            seen.append(sample.key)
    except (OSError, ValueError) as error:
        return None, [*problems, str(error)]
    if len(seen) != shard["samples"]:
        problems.append(f"{path}: {len(seen)} samples, not the {shard['samples']} in {MANIFEST}")
    if len(set(seen)) != len(seen):
        problems.append(f"{path}: a key occurs twice")
    return seen, problems
