"""Image sources: tars, folders, depth pairs, rendered scenes and the photographs that ship in wheels.

A source is a list of input shards. A shard is scanned (names only) into entries and rejected names, and each entry
decodes one photo on demand, so that a bad image costs one quarantine line and never a run. Nothing is unpacked to
disk: a tar's members are read in place, on this disk or at a URL (distill.data.storage).

Shapes: H height, W width of the photo as a viewer shows it, EXIF rotation applied.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from distill.core.addresses import public
from distill.core.depth import DepthMap, Kind
from distill.core.files import files_below, leaves_root
from distill.core.home import home_expanded
from distill.core.printable import printable
from distill.data import filetypes, photos, storage
from distill.data import pairs as depth_pairs
from distill.data import scenes as procedural
from distill.data.photos import DECODE_ERRORS, MAX_BYTES, BadImageError, Photo, decode, safe_key
from distill.data.tars import advice_for_folder, walk_tar


@dataclass(frozen=True, slots=True)
class Entry:
    """A photo that has not been read yet; `load` returns it or raises BadImageError.

    place: (path or URL, first byte, bytes) of its file, where it has one.
    """

    key: str
    origin: str
    load: Callable[[], Photo]
    place: tuple[Path | str, int, int] | None = None


_SAMPLE = 4096  # bytes from the middle of each file


def identity(entries: Sequence[Entry]) -> dict[str, str]:
    """Hashes that detect changed files behind the same names: of their sizes and of bytes from their middles.

    The bytes are only read from local files; URLs are too slow. Empty where the entries have no files. Modification
    times are not used, since a copy has another one. Raises OSError.
    """
    sizes, samples = hashlib.sha256(), hashlib.sha256()
    places = [entry.place for entry in entries if entry.place is not None]
    for _, _, size in places:
        sizes.update(f"{size} ".encode())
    for path, several in groupby(places, key=itemgetter(0)):
        if isinstance(path, Path):  # a tar is opened once, not once per image: on a network disk that takes the time
            middles = ((start + max(0, size - _SAMPLE) // 2, min(size, _SAMPLE)) for _, start, size in several)
            for data in storage.read_ranges(path, middles):
                samples.update(data)
    local = places and all(isinstance(place, Path) for place, _, _ in places)
    return ({"sizes": sizes.hexdigest()} if places else {}) | ({"samples": samples.hexdigest()} if local else {})


@dataclass(frozen=True, slots=True)
class Rejected:
    """A name that is not a usable image, and the reason."""

    origin: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """The content of a shard, in a fixed order, and what was rejected or skipped without being read.

    skipped: the number of skipped files (captions, videos, system metadata) by suffix, sorted. Every file found is in
    exactly one of entries, rejected and skipped.
    """

    entries: tuple[Entry, ...]
    rejected: tuple[Rejected, ...] = ()
    skipped: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class InputShard:
    """A unit of work: one tar, or a sequence of files. Output shards are named after `stem`.

    source: the index of its source in the recipe. teachers: aliases of those that label its images; empty: all.
    """

    stem: str
    origin: str
    scan: Callable[[], Scan]
    is_tar: bool = False
    source: int = 0
    teachers: tuple[str, ...] = ()


def combine(*sources: Sequence[InputShard]) -> list[InputShard]:
    """Concatenate sources; raises ValueError where two shards would write output of the same name."""
    shards = [shard for source in sources for shard in source]
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.stem in seen:
            both = public(f"{seen[shard.stem]} and {shard.origin}")
            raise ValueError(f"{both} would both write {shard.stem}-000.tar: rename one of them")
        seen[shard.stem] = shard.origin
    return shards


# --- tars -------------------------------------------------------------------------------------------------------------


def _paths(patterns: str | Path | Iterable[str | Path], what: str) -> list[Path]:
    """Every path that the patterns match, each once; raises FileNotFoundError for a pattern without a match."""
    listed = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    paths: dict[Path, None] = {}
    missing: list[str] = []
    for name in (str(home_expanded(name)) for pattern in listed for name in storage.expand(str(pattern))):
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207  (Path.glob refuses absolute patterns)
        if not matches:
            missing.append(name)
        if what == "tar" and Path(name).is_dir() and not (matches := sorted(glob.glob(f"{glob.escape(name)}/*.tar"))):  # noqa: PTH207
            raise FileNotFoundError(f"{name}: no .tar in this folder{advice_for_folder(Path(name))}")
        paths.update(dict.fromkeys(map(Path, matches)))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        is_url = any(storage.is_url(pattern) for pattern in listed)
        advice = "only tars are read from URLs: download it" if is_url else "check the path or pattern in [images]"
        raise FileNotFoundError(f"{missing[0]}{others}: no such {what}; {advice}")
    if not paths:
        raise FileNotFoundError(f"[images] names no {what}")
    return list(paths)


def tars(patterns: str | Path | Iterable[str | Path]) -> list[InputShard]:
    """One input shard per tar of images, packed as SA-1B packs them (`./sa_1.jpg`, `./sa_1.json`; json is ignored).

    Members that are another field of a sample (KEY.depth.png, KEY.mask.png) are skipped and counted.

    patterns: paths, folders of tars, globs, brace ranges, and URLs that fsspec reads by byte ranges; not pipes, since a
    resumed run starts in the middle of a tar. Raises FileNotFoundError for a tar that is named but missing, ValueError
    for two tars of the same name.
    """
    listed = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if pipes := [p for p in listed if str(p).startswith("pipe:")]:
        raise ValueError(f"{pipes[0]}: a pipe cannot be resumed in the middle; give the tar's path or URL")
    urls = storage.find_urls([str(p) for p in listed if storage.is_url(p)], "tar")
    local = [p for p in listed if not storage.is_url(p)]
    paths: list[Path | str] = [*(_paths(local, "tar") if local or not urls else []), *urls]
    stems = [safe_key(PurePosixPath(public(str(p))).stem) for p in paths]
    return combine(
        [InputShard(stem, str(p), partial(_scan_tar, p), True) for stem, p in zip(stems, paths, strict=True)]
    )


def _scan_tar(path: Path | str) -> Scan:
    """Scan the images of a tar; OSError for a URL that cannot be read, a rejected line for a bad local file."""
    members: dict[str, tuple[str, str, list[tuple[int, int]]]] = {}
    keys: set[str] = set()
    rejected: list[Rejected] = []
    skipped: Counter[str] = Counter()
    tar = PurePosixPath(public(str(path))).name
    if isinstance(path, Path) and (reason := photos.not_a_file(path)):
        return Scan((), (Rejected(tar, "", f"{path}: {reason}"),))
    try:
        for member, problem in walk_tar(path):
            if member is None:
                rejected.append(Rejected(tar, "", problem))
                continue
            pure = PurePosixPath(member.name)
            if not problem and member.isdir():
                continue
            ours = filetypes.is_photo(member.name) or filetypes.refusal(member.name) or not pure.name
            if not problem and (filetypes.field_suffix(member.name) or not ours):
                skipped[filetypes.skip_category(member.name)] += 1
                continue
            name, origin = str(pure), f"{tar}:{printable(member.name.removeprefix('./'))}"
            key = safe_key(str(pure.with_suffix("")) if pure.name else name)
            if reason := problem or _member_problem(member):
                rejected.append(Rejected(origin, key, reason))
                continue
            if name in members:
                rejected.append(Rejected(origin, members[name][0], "duplicate key; the first good one is used"))
            elif key in keys:
                key = photos.with_hash(key, name)
            keys.add(key)
            members.setdefault(name, (key, origin, []))[2].append((member.offset_data, member.size))
    except OSError as error:
        if isinstance(path, str):
            raise OSError(public(f"{path} cannot be read: {error}; run again when it is reachable")) from error
        rejected.append(Rejected(tar, "", f"{path} cannot be read: {error.strerror or error}"))
    if not members and not rejected:
        content = f", but {filetypes.summarize_counts(skipped)}" if skipped else ""
        rejected.append(Rejected(tar, "", f"the tar holds no images{content}"))
    entries = [tar_entry(path, key, origin, tuple(copies)) for key, origin, copies in members.values()]
    return Scan(tuple(entries), tuple(rejected), tuple(sorted(skipped.items())))


def tar_entry(path: Path | str, key: str, origin: str, copies: tuple[tuple[int, int], ...]) -> Entry:
    """A photo of a tar; copies: (offset, size) of every member of that name."""
    return Entry(key, origin, partial(_load_member, path, copies, key, origin), (path, *copies[0]))


def _member_problem(member: tarfile.TarInfo) -> str:
    if reason := leaves_root(member.name, "the archive") if member.name.strip("./") else "":
        return reason
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        advice = (
            ": pack what it points to, with --dereference --hard-dereference"
            if member.issym() or member.islnk()
            else ""
        )
        if member.issparse():
            return "not a plain file (it is stored sparse): pack it without --sparse"
        return f"not a plain file (a link or a device){advice}"
    if reason := filetypes.refusal(member.name):
        return reason
    if not PurePosixPath(member.name).name:
        return "its header has no name"
    if member.size == 0:
        return "empty file"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes is more than {MAX_BYTES}"
    return ""


def _load_member(path: Path | str, copies: Sequence[tuple[int, int]], key: str, origin: str) -> Photo:
    """The first of the copies (offset, size) that can be decoded; raises the BadImageError of the first copy."""

    def read(offset: int, size: int) -> Photo:
        return Photo(key, decode(storage.read_range(path, offset, size)), None, origin)

    try:
        return read(*copies[0])
    except BadImageError:
        for copy in copies[1:]:
            with suppress(BadImageError):
                return read(*copy)
        raise


# --- folders ----------------------------------------------------------------------------------------------------------


def folders(patterns: str | Path | Iterable[str | Path], *, per_shard: int = 1000) -> list[InputShard]:
    """Photos in folders (searched recursively) or matched by globs, `per_shard` to an input shard, in sorted order.

    Raises FileNotFoundError where nothing matches.
    """
    candidates: list[tuple[Path, str, Path]] = []  # searched folder, name in it, file
    rejected: list[Rejected] = []
    skipped: Counter[str] = Counter()
    for path in _paths(patterns, "folder or photo"):
        if not path.is_dir():
            candidates.append((path.parent, path.name, path))
            continue
        for file in files_below(path):
            inside = file.relative_to(path).as_posix()
            name, refused = f"{path.name}/{printable(inside)}", filetypes.refusal(inside)
            is_other = not filetypes.is_photo(inside) and (filetypes.is_litter(inside) or not refused)
            if filetypes.field_suffix(inside) or is_other:
                skipped[filetypes.skip_category(inside)] += 1
            elif reason := refused or photos.not_a_file(file):
                rejected.append(Rejected(name, safe_key(file.stem), reason))
            else:
                candidates.append((path, inside, file))
    files = photos.unique_names(candidates)
    if not files:
        details = f"; there are {filetypes.summarize_counts(skipped)}" if skipped else ""
        details += ': give the tars as tars = "FOLDER/*.tar"' if ".tar" in skipped else ""
        details += f"; {rejected[0].origin}: {rejected[0].reason}" if rejected else ""
        raise FileNotFoundError(f"{patterns}: no photos there ({', '.join(filetypes.PHOTOS)}){details}")
    names = sorted(files)
    folder_names = {name.split("/", 1)[0] for name in names}
    # The folder's name is only needed to distinguish equal names in several folders.
    key_names = [name.split("/", 1)[1] if len(folder_names) == 1 else name for name in names]
    keys = photos.unique_keys(key_names)
    entries = [
        Entry(key, name, partial(photos.load_file, files[name], key, name), (files[name], 0, _size(files[name])))
        for key, name in zip(keys, names, strict=True)
    ]
    return in_shards(safe_key(min(folder_names)), str(files[names[0]].parent), entries, per_shard, rejected, skipped)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def in_shards(
    stem: str,
    origin: str,
    entries: Sequence[Entry],
    per_shard: int,
    rejected: Sequence[Rejected] = (),
    skipped: Mapping[str, int] | None = None,
) -> list[InputShard]:
    """Input shards of `per_shard` entries each, stem_000000, ...; the first one carries `rejected` and `skipped`."""
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, not {per_shard}")
    runs = [tuple(entries[i : i + per_shard]) for i in range(0, len(entries), per_shard)]
    first = (tuple(rejected), tuple(sorted((skipped or {}).items())))
    scans = [partial(Scan, run, *(first if i == 0 else ())) for i, run in enumerate(runs)]
    return [InputShard(f"{stem}_{i:06d}", origin, scan) for i, scan in enumerate(scans)]


# --- images with ground truth -----------------------------------------------------------------------------------------


def pairs(table: str | Path, *, names: Sequence[str] | None = None, per_shard: int = 100) -> list[InputShard]:
    """Photos with measured depth from a table (see distill.data.pairs), in its order; `names` selects a split.

    Raises what distill.data.pairs.read_pairs raises: a missing table or file, a faulty row, an unknown name.
    """
    rows = depth_pairs.read_pairs(table, names=None if names is None else list(names))
    folder = Path(table) if Path(table).is_dir() else Path(table).parent
    keys = photos.unique_keys([f"{row.name}.x" for row in rows])
    entries = []
    for key, row in zip(keys, rows, strict=True):
        origin = f"{folder.name}:{row.name}"
        entries.append(Entry(key, origin, partial(_load_pair, row, key, origin)))
    return in_shards(safe_key(folder.name), str(table), entries, per_shard)


def _load_pair(row: depth_pairs.Pair, key: str, origin: str) -> Photo:
    try:
        return Photo(key, row.rgb(), row.truth(), origin, row.focal)
    except DECODE_ERRORS as error:
        raise BadImageError(str(error)) from error


def scenes(
    count: int,
    *,
    size: tuple[int, int] = (480, 640),
    kind: str | None = None,
    seed: int = 0,
    per_shard: int = 100,
    variety: bool = False,
) -> list[InputShard]:
    """`count` rendered views with exact depth, of seeds `seed` to `seed + count - 1`; kind and variety as for
    data.scenes.render."""
    if count < 1:
        raise ValueError(f"the number of scenes must be at least 1, not {count}")
    entries = []
    prefix = ("varied_" if variety else "") + (f"{kind}_" if kind else "")
    for number in range(seed, seed + count):
        key = f"scene_{prefix}{number:06d}"
        entries.append(Entry(key, f"scenes:{number}", partial(_load_scene, number, size, kind, key, variety)))
    stem = f"scenes_{prefix}{seed}"
    return in_shards(stem, stem, entries, per_shard)


def _load_scene(number: int, size: tuple[int, int], kind: str | None, key: str, variety: bool = False) -> Photo:
    view = procedural.render(number, size=size, kind=kind, variety=variety)
    rgb = (view.image.clamp(0, 1) * 255).round().to(torch.uint8)
    truth = DepthMap(view.depth[None].float(), view.valid[None], Kind.METRIC_DEPTH)
    return Photo(key, rgb, truth, f"scenes:{number}", view.focal)


# Package, folder, files. The left view of the motorcycle has a disparity map.
_WHEELS = (
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
# The camera as documented in scikit-image (Middlebury 2014 `Motorcycle`): depth = f b / (disparity + offset), metres.
_FOCAL, _BASELINE, _OFFSET = 994.978, 0.193001, 31.086


def bundled_photos() -> list[InputShard]:
    """The photographs in the scikit-image and scikit-learn wheels, read from the installed files, as one shard.

    `motorcycle_left` has metric depth from its stereo disparity. Raises FileNotFoundError where a wheel is missing.
    """
    entries = []
    for package, folder, files in _WHEELS:
        spec = importlib.util.find_spec(package)
        place = Path(next(iter(spec.submodule_search_locations or ())), folder) if spec else None
        for name in files:
            if place is None or not (place / name).is_file():
                raise FileNotFoundError(
                    f"{package}/{folder}/{name} is not installed: the demo photographs come with "
                    'pip install "depth-distill[demo]"'
                )
            key = safe_key(Path(name).stem)
            disparity = place / "motorcycle_disp.npz" if name == "motorcycle_left.png" else None
            entries.append(Entry(key, f"{package}:{name}", partial(_load_wheel, place / name, disparity, key, package)))
    return [InputShard("wheels", "the photographs in scikit-image and scikit-learn", partial(Scan, tuple(entries)))]


def _load_wheel(path: Path, disparity: Path | None, key: str, package: str) -> Photo:
    photo = photos.load_file(path, key, f"{package}:{path.name}")
    if disparity is None:
        return photo
    with np.load(disparity) as stored:
        values = torch.from_numpy(stored["arr_0"].astype(np.float32))
    valid = torch.isfinite(values) & (values + _OFFSET > 0)
    depth = _FOCAL * _BASELINE / torch.where(valid, values + _OFFSET, 1.0)
    truth = DepthMap(torch.where(valid, depth, 0.0)[None], valid[None], Kind.METRIC_DEPTH)
    return Photo(photo.key, photo.rgb, truth, photo.origin, _FOCAL)
