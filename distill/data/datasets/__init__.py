"""Published data sets with ground truth, read as their authors pack them: one module per data set, named after it.

A module has

    FACTS                   facts about the data set: address, licence, depth kind, number of published images
    groups(root)            names of its scenes or sequences below `root`; empty where the data set is not there
    rows(root, group)       the image and depth files of one group, as `Row`s; no file is opened
    read(root, row)         ground truth of one image: values (H,W) float32 in the units of FACTS.kind, valid (H,W) bool
    scene(group)            optional: the name of a group's scene wherever its folder lies; two of one name are an error

`distill index NAME ROOT` walks a data set once and stores its rows (_index.py); recipes say
`[[images]] dataset = "hypersim", root = "..."`. distill.data.maps reads the file formats; these modules know layouts,
units, invalid values and cameras.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data import maps

FOLDER = "distill.data.datasets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about a data set. licence: of its images, in words; commercial: whether it allows commercial use.

    images: the number that the authors publish, or that AnyDepth counts; 0 where unknown. kept: the number that
    AnyDepth trains on after its filter, 0 where it does not use the set; means: its mean s_dist and s_grad. focal: in
    pixels of an image `width` wide, for all images; 0 where it varies or is unknown. note: peculiarities.
    """

    title: str
    url: str
    licence: str
    commercial: bool
    kind: Kind
    images: int = 0
    kept: int = 0
    means: tuple[float, float] = (0.0, 0.0)
    focal: float = 0.0
    width: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The files of one image and its ground truth, not opened yet.

    name: unique in the data set, words and slashes. rgb, depth: paths below the root. focal: pixels of the image as it
    is stored, 0 where unknown. split: the authors' own ("train", "val", ...), "" where there is none.
    """

    name: str
    rgb: str
    depth: str
    focal: float = 0.0
    split: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one scene or sequence, in order. alone: image files that have no depth file.

    spare: depth files that have no image. unlisted: the number of pairs that the authors' own table leaves out.
    """

    rows: tuple[Row, ...]
    alone: tuple[str, ...] = field(default=())
    spare: tuple[str, ...] = field(default=())
    unlisted: int = 0


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by name, sorted, without hidden ones; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_file()}


def folders_of(folder: Path) -> Iterator[Path]:
    """The folders in a folder, sorted, hidden ones left out."""
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_dir())


def paired(
    root: Path,
    images: Mapping[str, Path],
    depths: Mapping[str, Path],
    *,
    prefix: str,
    focal: float = 0.0,
) -> Group:
    """Pair images and depth files of the same frame, as rows named `prefix`/frame; unpaired files are listed too."""
    rows = [
        Row(f"{prefix}/{frame}", below(root, path), below(root, depths[frame]), focal)
        for frame, path in images.items()
        if frame in depths
    ]
    alone = tuple(below(root, path) for frame, path in images.items() if frame not in depths)
    return Group(tuple(rows), alone, tuple(below(root, path) for frame, path in depths.items() if frame not in images))


def below(root: Path, path: Path) -> str:
    """A file's path below the root, with slashes."""
    return path.relative_to(root).as_posix()


def stored(root: Path, row: Row) -> np.ndarray:
    """(H,W) float32 as the depth file stores it. OSError names the file and the reason."""
    path = root / row.depth
    try:
        values = maps.read_map(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; run `distill index` again, or download it") from error
    except OSError as error:
        raise OSError(f"{path}: {error}; download it again") from error
    if values.dtype.itemsize == 1:
        raise OSError(f"{path}: {maps.REDUCED}")
    return values.astype(np.float32)


def mask_invalid(values: np.ndarray, *, below: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Values (H,W) with invalid ones set to 0, and the mask of those that are finite, positive and under a bound."""
    valid = np.isfinite(values) & (values > 0) & (values < below)
    return np.where(valid, values, np.float32(0)).astype(np.float32), valid


def frames(files: Mapping[str, Path], start: str, end: str) -> dict[str, Path]:
    """Files named start + FRAME + end, by FRAME; in numerical order where frames are numbers without leading zeros."""
    by_frame = {
        name[len(start) : len(name) - len(end)]: path
        for name, path in files.items()
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
    }
    return dict(
        sorted(by_frame.items(), key=lambda item: (len(item[0]), item[0]) if item[0].isdigit() else (99, item[0]))
    )


def unique(groups: Iterable[str]) -> list[str]:
    """Names sorted, each once."""
    return sorted(set(groups))
