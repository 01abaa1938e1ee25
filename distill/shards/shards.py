"""The label shard format: tars of regions and their depth labels, readable by plain webdataset.

    <stem>-<part>.tar    per sample key K, in this order:
        K.jpg                       the region as the student sees it, quality 95, 4:4:4
        K.<teacher>.shared.jls      the teacher's map of it, in a codec of `distill.shards.codec.CODECS` (png, npy.gz)
        K.<teacher>.local<i>.jls    its maps of the patches
        K.json                      crop, patches, kinds, ranges, checksums, codec, seed
    <stem>-<part>.json   what the tar holds and where, so that nothing has to be searched for
    manifest.json        the whole run: recipe, teachers, image list, checksums, quarantine, licences

A tar is written aside, synced and renamed: where it exists, it is complete. Equal content gives equal bytes.

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

from distill.core import files, machine
from distill.core.files import file_sha256
from distill.core.progress import Report
from distill.core.seal import is_broken
from distill.data.tars import walk_tar
from distill.shards.codec import REPAIR, Sample, decode_sample, disagreements
from distill.shards.codec import collate as collate
from distill.shards.tables import CACHED, pointer_line, require_photographs
from distill.shards.tables import MANIFEST as MANIFEST
from distill.shards.tables import SETTINGS as SETTINGS
from distill.shards.tables import DamagedTableError as DamagedTableError
from distill.shards.tables import read_json as read_json
from distill.shards.tables import read_manifest as read_manifest
from distill.shards.tables import write_manifest as write_manifest

# --- writing ----------------------------------------------------------------------------------------------------------


class _Hashing:
    """A file that knows the checksum and the number of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Writes one tar: aside until `close`, which makes it durable but leaves it aside; `publish` renames it.

    In between, the caller writes down what the tar holds, so that a tar that can be seen has always been described.
    As a context manager it removes an unpublished file, unless the process is killed: then the next run overwrites it.
    suffix: sets the file aside apart from that of another writer of the same tar.
    Every method raises OSError naming the tar where the disk refuses.
    """

    def __init__(self, path: Path, *, suffix: str = "") -> None:
        self.path = path
        self.aside = files.aside(path).with_name(files.aside(path).name + suffix)
        self.index: list[tuple[str, int, int]] = []
        with files.naming(path):
            self._file = self.aside.open("wb")
        self._out = _Hashing(self._file)
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=tarfile.GNU_FORMAT)  # type: ignore[call-overload]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failed:
            if error is None:
                raise files.write_error(self.path, failed) from failed
        finally:
            self.aside.unlink(missing_ok=True)

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample: `codec.encode_sample`'s members."""
        start = self._tar.offset
        with files.naming(self.path):
            for name, data in members:
                # TarInfo's own defaults: time 0, owner 0, mode 0644. Nothing of this machine gets in.
                info = tarfile.TarInfo(name)
                info.size = len(data)
                self._tar.addfile(info, io.BytesIO(data))
        self._tar.members = []
        self.index.append((key, start, self._tar.offset - start))

    def close(self) -> dict[str, Any]:
        """Finish and sync the file; returns {"name", "sha256", "bytes", "samples"}."""
        with files.naming(self.path):
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
        with files.naming(self.path):
            files.publish(self.aside, self.path)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_shard(path: str | Path, *, teachers: Sequence[str] | None = None) -> Iterator[Sample]:
    """Stream the samples of one tar in order, through webdataset.

    Raises OSError for a damaged or absent tar, ValueError for a newer version, LookupError for an absent teacher.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard")
    # A list, since a plain string would have its braces expanded; "file:", since a colon would look like a protocol.
    stream = webdataset.WebDataset([f"file:{path}"], shardshuffle=False, empty_check=False)
    try:
        for members in stream:
            yield decode_sample(members, where=f"{path}:{members['__key__']}", teachers=teachers)
    except tarfile.TarError as error:
        reason = str(error.args[0]).partition(" @ ")[0]  # webdataset adds its objects
        raise OSError(f"{path} is damaged ({reason}); {REPAIR}") from error


def shard_index(path: Path) -> list[tuple[str, int, int]]:
    """(sample key, first byte, number of bytes) of every sample in a tar, from its .json or else by walking it."""
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        metadata = read_json(sidecar)
        if metadata.get("tar") and metadata["tar"]["bytes"] == path.stat().st_size:
            return listed(sidecar, metadata, path.stat().st_size)
    return walked_index(path)


def listed(sidecar: Path, metadata: Mapping[str, Any], size: int) -> list[tuple[str, int, int]]:
    """`shard_index`: the samples in the json of a tar of `size` bytes; ValueError unless each lies in it."""
    try:
        places = [(str(key), int(start), int(length)) for key, start, length in metadata["samples"]]
    except (TypeError, ValueError):
        places = [("", -1, -1)]
    if not all(0 <= start < start + length <= size for _, start, length in places):
        raise ValueError(f"{sidecar} is damaged: samples in it do not lie in their tar; {REPAIR}")
    return places


def walked_index(path: Path) -> list[tuple[str, int, int]]:
    """`shard_index` by the tar's own headers. Raises OSError for a damaged tar."""
    extents: dict[str, list[int]] = {}
    for member, problem in walk_tar(path):
        if member is None or problem:
            raise OSError(f"{path}: {problem}; delete it and its .json, and run distill label again")
        end = member.offset_data + (member.size + 511) // 512 * 512
        extents.setdefault(member.name.split(".", 1)[0], [member.offset, end])[1] = end
    return [(key, start, end - start) for key, (start, end) in extents.items()]


def members_of(blob: bytes, where: str) -> dict[str, bytes]:
    """The members of one sample, by what follows the key, from its bytes in the tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(blob + bytes(1024)), mode="r:") as tar:
            return {m.name.split(".", 1)[-1]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise OSError(f"{where} is damaged ({error}); {REPAIR}") from error


class TarReader(Protocol):
    """What reads tars that do not all lie in their labels folder: `distill.shards.cache.TarCache`."""

    def index(self, shard: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """`shard_index` of one of the manifest's tars."""
        ...

    def read(self, name: str, start: int, size: int) -> bytes:
        """Bytes of a tar."""
        ...


class LabelDataset(Dataset[Sample]):
    """Every sample of a finished labels folder, at random access, in the order of tars and members.

    folder: as `labelling.run` wrote it. teachers: the ones to decode (None: all). keys: image or sample keys to keep
    (None: all). cache: what reads its tars, where the folder does not have them all. `keys`, `image_keys` and `sources`
    (the number of the [[images]] table) have an item per sample; `duplicates` counts samples left out because an
    earlier tar has their key. Goes to DataLoader workers by fork or pickle; each process opens the tars for itself.
    Raises FileNotFoundError, OSError, ValueError or LookupError, naming the file, for a folder that cannot be read.
    """

    _MAX_OPEN = 64  # tars, and a quarter of the files that may be open

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
        known = list(self.manifest["teachers"])
        self.teachers = known if teachers is None else list(teachers)
        for name in self.teachers:
            if name not in known:
                raise LookupError(f"{self.folder} has no labels by {name}; it has {', '.join(known)}")
        self.tars: list[str] = []
        self.keys: list[str] = []
        self.duplicates = 0
        wanted = None if keys is None else frozenset(keys)
        seen: set[str] = set()
        places: list[tuple[int, int, int]] = []
        for shard in self.manifest["shards"]:
            for key, start, size in cache.index(shard) if cache else shard_index(self._checked(shard)):
                if key in seen:
                    self.duplicates += 1
                elif wanted is None or key in wanted or key.rsplit("-", 1)[0] in wanted:
                    self.keys.append(key)
                    places.append((len(self.tars), start, size))
                seen.add(key)
            self.tars.append(shard["name"])
        if not self.keys:
            raise ValueError(f"{self.folder} has no samples{'' if keys is None else ' with the keys asked for'}")
        self.image_keys = [key.rsplit("-", 1)[0] for key in self.keys]
        self.sources = [int(self.manifest["shards"][tar].get("image_source", 0)) for tar, _, _ in places]
        self._places = np.array(places, dtype=np.int64)
        self._open: dict[str, IO[bytes]] = {}

    def _checked(self, shard: Mapping[str, Any]) -> Path:
        path = self.folder / shard["name"]
        if not path.is_file():
            way_out = "copy it back or run distill label again"
            if (self.folder / CACHED).is_dir():
                way_out = "the folder keeps some tars alone (labels.cache_gb), distill train with 0 fetches all"
            raise FileNotFoundError(f"{path} is missing, but {MANIFEST} lists it: {way_out}")
        if path.stat().st_size != shard["bytes"]:
            if pointer := pointer_line(path):
                raise OSError(pointer)
            raise OSError(
                f"{path} is damaged: {path.stat().st_size} bytes, not the {shard['bytes']} that {MANIFEST} says; "
                "delete it and run distill label again"
            )
        return path

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        return self.get(index, self.teachers_of(index))

    stores_codes = True

    def teachers_of(self, index: int) -> list[str]:
        """Whose labels sample `index` has, of those to decode."""
        known = self.manifest["shards"][self._places[index][0]].get("teachers", self.teachers)
        return [name for name in self.teachers if name in known]

    def get(
        self,
        index: int,
        teachers: Sequence[str],
        *,
        visit: int | None = None,
        patches: Callable[[int], Sequence[int]] | None = None,
        coded: bool = False,
    ) -> Sample:
        """Sample `index` with the labels of these teachers alone, the same at every visit; no other map is decoded.

        patches, coded: as `distill.shards.codec.decode_sample` takes them.
        """
        tar, start, size = self._places[index]
        name = self.tars[tar]
        where = f"{self.folder / name}:{self.keys[index]}"
        if self.cache is not None:
            blob = self.cache.read(name, int(start), int(size))
        else:
            # pread leaves the file's position alone, so that a forked worker may share the handle.
            blob = os.pread(self._handle(name).fileno(), int(size), int(start))
        if len(blob) != size:
            raise OSError(f"{where} is damaged: the tar ends too early; {REPAIR}")
        return decode_sample(members_of(blob, where), where=where, teachers=teachers, patches=patches, coded=coded)

    def _handle(self, name: str) -> IO[bytes]:
        file = self._open.get(name)
        if file is None:
            if len(self._open) >= min(self._MAX_OPEN, (machine.open_files() or 1 << 20) // 4):
                # Dropped, not closed: another thread may be reading from it.
                self._open.pop(next(iter(self._open)), None)
            file = self._open[name] = (self.folder / name).open("rb", buffering=0)
        return file


# --- verification -----------------------------------------------------------------------------------------------------


def verify(folder: str | Path, *, report: Report | None = None) -> list[str]:
    """Read a labels folder to the last pixel; returns its problems, one line each, naming the file. Empty is good.

    Raises what `read_manifest` raises where there is nothing to compare with.
    """
    return [line for lines in find_problems(folder, report=report).values() for line in lines]


def find_problems(folder: str | Path, *, report: Report | None = None) -> dict[str, list[str]]:
    """What `verify` says, by the name of the tar, or of its json or the settings; "" has the manifest's faults.

    Of a folder that keeps some tars alone (distill.shards.cache), those that are there.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, whole=False)
    require_photographs(folder)
    problems_of: dict[str, list[str]] = {}
    listed = {shard["name"] for shard in manifest["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed and not path.name.startswith("._"):  # macOS's twins of files
            problems_of[path.name] = [f"{path} is not in {MANIFEST}"]
    images = manifest["images"]
    if hash_keys(images["keys"]) != images["sha256"] or len(images["keys"]) != images["count"]:
        problems_of[""] = [f"{folder / MANIFEST}: the image list does not agree with its own checksum"]
    if is_broken(json.loads((folder / MANIFEST).read_bytes())):
        problems_of.setdefault("", []).append(f"{folder / MANIFEST} does not agree with its own checksum")
    if (folder / SETTINGS).is_file():
        try:
            read_json(folder / SETTINGS)
        except ValueError as error:
            problems_of[SETTINGS] = [str(error)]
    keys = set(images["keys"])
    some = (folder / CACHED).is_dir()
    for done, shard in enumerate(manifest["shards"]):
        path = folder / shard["name"]
        samples, problems = (None, []) if some and not path.is_file() else _verify_shard(path, shard, keys)
        if problems:
            problems_of[path.name] = problems
        if problems := verify_sidecar(path, shard, samples):
            problems_of[path.with_suffix(".json").name] = problems
        if report:
            report(done + 1, len(manifest["shards"]), problems=float(sum(map(len, problems_of.values()))))
    return problems_of


def verify_sidecar(path: Path, shard: Mapping[str, Any], samples: list[str] | None) -> list[str]:
    """What the json of a tar says otherwise than the manifest, or than the tar of these samples (None: not read)."""
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
        index, held = listed(sidecar, table, path.stat().st_size), walked_index(path)
        if samples != [key for key, _, _ in index]:
            problems.append(f"{sidecar} does not list the samples that its tar holds")
        elif index != held:
            wrong = next(key for (key, *place), (_, *true) in zip(index, held, strict=True) if place != true)
            problems.append(f"{sidecar} says another place than its tar has for {wrong}")
        return problems
    except (OSError, ValueError) as error:
        return [str(error)]


def hash_keys(keys: Sequence[str]) -> str:
    """The sha256 of an image list, one key to a line."""
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()


def _verify_shard(path: Path, shard: Mapping[str, Any], images: set[str]) -> tuple[list[str] | None, list[str]]:
    """The keys of a tar's samples, None where they cannot be read, and what is wrong with the tar."""
    if not path.is_file():
        return None, [f"{path} is missing"]
    if pointer := pointer_line(path):
        return None, [pointer]
    problems = []
    if file_sha256(path) != shard["sha256"]:
        problems.append(f"{path}: its checksum is not the one in {MANIFEST}")
    seen: list[str] = []
    try:
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
