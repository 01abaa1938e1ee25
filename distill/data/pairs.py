"""Photographs with a measured depth or disparity, described by a table.

Columns are separated by tabs, or by commas or semicolons where the first line has no tab. Required are name, rgb and
depth; optional are kind, scale_to_metres, invalid, trust, dataset and focal; other columns are ignored. Paths are
relative to the table. `rgb` is any photograph that distill.data.photos reads, with its EXIF rotation applied; `depth`
any map that distill.data.maps reads.

- kind: depth (default) or disparity, or one of the six kinds of distill.core.depth, unless a stereo formula is given.
- scale_to_metres: a number (metres per stored unit; for disparity, pixels per stored unit); a stereo formula
  `Z[m]=f*b/disp`, `Z[m]=f*b/(disp+offset)` or, as KITTI stores it, `Z[m]=f*b/(disp/256)` with its numbers filled in,
  which converts disparity to metric depth; a unit (m, cm, mm) or a fraction (1/256); or words: the scale is unknown.
  What looks like a number or a unit but cannot be parsed ("0,001", "ft") is an error. With an unknown scale, depth
  becomes scale_depth, and disparity affine_disparity, since a disparity of unknown calibration also has an unknown
  offset.
- invalid: the numbers in it are invalid values; `>=65000` makes a bound, and so does a number from 65000 on that fits
  in 16 bits (`0 and 65535`): sensors blend the code for "invalid" into neighbouring values, so everything from
  65000 on is invalid. A number beyond 16 bits (1e10) is a bound too.
  Values that are not finite, not positive, or from 9.9e9 on (a renderer's background) are always invalid.
- focal: the camera's focal length in pixels of the photograph as it is stored; empty where unknown.

A depth map is rotated as its own orientation tag says (PNG, TIFF) and resized to its photograph's size by nearest
neighbour. Another aspect ratio is an error, unless it matches the photograph without its EXIF rotation: then the map is
rotated with it; or without the map's own tag: then that tag was copied to an upright map, and is passed over.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distill
from distill.core import signatures
from distill.core.depth import DepthMap, Kind
from distill.core.files import decoded
from distill.core.home import home_expanded
from distill.data import cells, maps
from distill.data.orientation import of_map, turn, turn_back
from distill.data.photos import BadImageError, decode, upright_size

_BACKGROUND = 9.9e9
"""Values from here on are a renderer's background: Blender writes 1e10, others the largest float."""
_told: set[Path] = set()
_log = logging.getLogger(__name__)
_FARTHEST = 1e5
"""Metres: where even the nearest point is farther, the scale was probably inverted."""
_STEREO = re.compile(
    rf"(?:[A-Za-z]\w*\s*(?:\[m\]\s*)?=\s*)?({cells.NUMBER})\s*\*\s*({cells.NUMBER})\s*/\s*"
    rf"(?:\(\s*disp\w*\s*/\s*(?P<parts>{cells.NUMBER})|\(?\s*disp\w*)\s*(?:(?P<sign>[+-])\s*(?P<offset>{cells.NUMBER}))?\s*\)?$"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One photograph and its ground truth, decoded on demand.

    scale: metres (for disparity, pixels) per stored unit. baseline: focal length x baseline in pixel metres where the
    truth is stereo disparity to be converted to depth, else 0. offset: added to that disparity. photo: the rgb cell of
    the table. focal: in pixels of the photograph, 0 where the table does not give it. invalid_values, invalid_from:
    invalid stored values, and the bound from which on all are invalid.
    """

    name: str
    rgb_path: Path
    depth_path: Path
    kind: Kind
    scale: float = 1.0
    baseline: float = 0.0
    offset: float = 0.0
    invalid_values: tuple[float, ...] = ()
    invalid_from: float = float("inf")
    dataset: str = ""
    photo: str = ""
    focal: float = 0.0

    def rgb(self) -> Tensor:
        """(3,H,W) uint8, sRGB, upright."""
        try:
            return decode(self.rgb_path.read_bytes())
        except (OSError, BadImageError) as error:
            raise OSError(f"{self.rgb_path}: not a readable image ({error}); fix the file or remove its row") from error

    def truth(self) -> DepthMap:
        """The ground truth at the photograph's size, (1,H,W), of `kind`; metres where it is metric.

        ValueError where its aspect ratio differs from the photograph's, or its metres are implausibly large.
        """
        stored = self._stored()
        raw, size = self._upright(stored.astype(np.float64))
        valid = np.isfinite(raw) & (raw > 0) & (raw < min(self.invalid_from, _BACKGROUND))
        for value in self.invalid_values:
            valid &= raw != value
        if self.baseline:
            valid &= raw + self.offset > 0
            values = self.baseline / np.where(valid, raw + self.offset, 1.0)
        else:
            values = raw * self.scale
        if self.kind is Kind.METRIC_DEPTH and valid.any() and (nearest := values[valid].min()) > _FARTHEST:
            raise ValueError(
                f"{self.depth_path}: its nearest point is at {nearest:g} m: scale_to_metres is metres per stored "
                f"unit (0.001 for millimetres); {self.scale:g} may be its inverse"
            )
        values = np.where(valid, values, 0.0).astype(np.float32)
        return DepthMap(_nearest(torch.from_numpy(values), size), _nearest(torch.from_numpy(valid), size), self.kind)

    def _stored(self) -> np.ndarray:
        """The map's values (H,W) as stored."""
        is_metric = self.kind.unknown == "metric"
        quantity = "disparity" if self.baseline else self.kind.quantity
        try:
            stored = maps.read_map(self.depth_path, quantity, scale=self.scale if is_metric else None)
        except OSError as error:
            raise OSError(
                f"{self.depth_path}: not a readable depth map ({error}); fix the file or remove its row"
            ) from error
        below = np.empty(0) if (stored > 0).any() else np.unique(stored[(stored < 0) & np.isfinite(stored)])
        if below.size > 2:  # one number or two mean "no data"
            raise ValueError(
                f"{self.depth_path}: all its values are negative, from {below.min():g} to {below.max():g}, but only "
                "positive ones are valid: where they are depth along -z, store their absolute values"
            )
        top = maps.largest(stored.dtype)
        if is_metric and top < self.invalid_from and top not in self.invalid_values and stored.max() == top:
            self._tell_saturated(top, int((stored == top).sum()))
        return stored

    def _tell_saturated(self, top: float, count: int) -> None:
        """Say once for a folder that its maps may use their largest number for pixels without a measurement."""
        if self.depth_path.parent not in _told:
            _told.add(self.depth_path.parent)
            metres = self.baseline / (top + self.offset) if self.baseline else top * self.scale
            _log.warning(
                "%s: %d of its pixels are %.10g, the largest number of its type, which mostly means that nothing was "
                "measured; they count as %g m: write %.10g in the column invalid, unless that is their depth",
                *(self.depth_path, count, top, metres, top),
            )

    def _upright(self, raw: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """The map in the orientation of the upright photograph, and the photograph's (H,W)."""
        try:
            height, width, orientation = upright_size(self.rgb_path.read_bytes())
        except (OSError, BadImageError) as error:
            raise OSError(f"{self.rgb_path}: not a readable image ({error}); fix the file or remove its row") from error
        if _fits(raw.shape, (height, width)):
            return raw, (height, width)
        own = of_map(self.depth_path.read_bytes()) if _fits(raw.shape, (width, height)) else 1
        if own >= 5:  # copied from the photograph to a map that was upright already
            return np.ascontiguousarray(turn_back(raw, own)), (height, width)
        if orientation >= 5 and _fits(raw.shape, (width, height)):
            return np.ascontiguousarray(turn(raw, orientation)), (height, width)
        raise ValueError(
            f"{self.depth_path}: {raw.shape[1]} x {raw.shape[0]} differs in aspect ratio from its photograph, "
            f"{width} x {height}: they do not show the same view; crop or rotate one of them"
        )


def _fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a map's aspect ratio matches the photograph's: within 3 %, or 1.5 pixels of the shorter side."""
    (rows, columns), (height, width) = shape, size
    down, across = rows / height, columns / width
    return abs(down / across - 1) <= max(0.03, 1.5 / min(rows, columns))


def read_pairs(table: Path | str, *, names: list[str] | None = None, first_word: bool = False) -> list[Pair]:
    """The pairs of a table, in its order, or those in `names`, in the order of `names`.

    table: the .tsv, or a folder with an INDEX.tsv. first_word: of an unknown name, its first word is taken. All faults
    of a table are reported at once (ValueError). Raises FileNotFoundError for files that are named but missing, if
    nothing else is wrong.
    """
    path = Path(table)
    path = path / "INDEX.tsv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; a folder of pairs needs an INDEX.tsv with name, rgb, depth")
    _file_names.cache_clear()
    pairs, faults = {}, []
    for line, row in _rows(path):
        try:
            pair = _pair(row, path.parent)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
            continue
        if pair.name in pairs:
            faults.append(f"line {line}: the name {pair.name!r} was used before")
        pairs[pair.name] = pair
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    if not pairs:
        raise ValueError(f"{path}: has a header, but no pairs below it")
    if names is not None and first_word:
        names = [name if name in pairs else name.split()[0] for name in names]
    return _choose(path, pairs, names)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column name of each row that is neither empty nor a comment."""
    text_lines = table_text(path).splitlines(keepends=True)
    skipped = next((i for i, line in enumerate(text_lines) if not _PREAMBLE.match(line)), 0)
    header = text_lines[skipped] if text_lines else ""
    # Commas are frequent in paths and text: they separate columns only where there are no tabs.
    separator = "\t" if "\t" in header else max(",;", key=header.count)
    lines = io.StringIO("".join(text_lines[skipped:]), newline="")
    reader = (
        csv.DictReader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
        if separator == "\t"
        else csv.DictReader(lines, delimiter=separator)
    )
    try:
        reader.fieldnames = _columns(path, reader.fieldnames or ())
        for row in reader:
            if any(map(str.strip, row.get(None) or ())):
                where = f"{path}: line {skipped + reader.line_num}"
                raise ValueError(
                    f"{where}: more cells than columns: put quotes around a cell that contains the separator"
                )
            cells_by_column = {key: _unquoted(value or "") for key, value in row.items() if isinstance(key, str)}
            if any(cells_by_column.values()) and not next(iter(cells_by_column.values())).startswith("# "):
                yield skipped + reader.line_num, cells_by_column
    except csv.Error as error:
        raise ValueError(f"{path}: line {skipped + reader.line_num}: not a table ({error})") from error


_PREAMBLE = re.compile(r"\s*$|\"?sep=|#(?!\s*\"?name\b)", re.IGNORECASE)
"""Lines that may precede the header: empty ones, Excel's separator declaration, comments."""


def _columns(path: Path, given: Sequence[str]) -> list[str]:
    """The normalized column names; ValueError where one is missing, duplicated, or probably misspelt."""
    columns = [_unquoted(name).lstrip("# ").lower().replace("meters", "metres") for name in given]
    if missing := {"name", "rgb", "depth"} - set(columns):
        listed = f"; it has {', '.join(columns[:8])}" if any(columns) else ""
        absent = ", ".join(f'"{name}"' for name in _KNOWN_COLUMNS if name in missing)
        raise ValueError(
            f"{path}: no column {absent}{listed} (needed: name, rgb, depth, separated by tabs, commas or semicolons)"
        )
    if duplicates := [name for name in _KNOWN_COLUMNS if columns.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {duplicates[0]}: remove one of them")
    for column, (pattern, content) in cells.MISNAMED.items():
        if column not in columns and (found := next(filter(pattern.search, columns), None)):
            raise ValueError(f"{path}: the column {found} is not read: {content} belong in {column}")
    return columns


def _unquoted(text: str) -> str:
    """A cell without the quotes that pandas and R may add, and without the invisible marks of copied text."""
    text = text.strip().strip(_INVISIBLE).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


_INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff"


def read_names(path: Path | str) -> list[str]:
    """The lines of a list of names, without empty ones; "recipes/..." may also be a list that ships with the package.

    Raises FileNotFoundError or ValueError, which name the list.
    """
    shipped = Path(path).parts[:1] == ("recipes",) and not Path(path).is_file()
    file = Path(distill.__file__).parent / path if shipped else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no such list; give a text file with one name per line, like those of `distill filter`"
        )
    names = [line.strip() for line in table_text(file).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path}: empty; it should have one name per line")
    return names


_KNOWN_COLUMNS = ("name", "rgb", "depth", "kind", "scale_to_metres", "invalid", "trust", "dataset", "focal")
_WORKBOOKS = {
    "a zip archive": "an Excel workbook or another zip archive: save it as CSV",
    "an old Office file": "an old Excel workbook: save it as CSV",
}


def _not_text(data: bytes) -> str:
    """What a file is that is not a text table, and what to do about it; "" for a table."""
    if data.lstrip().startswith(b"<"):
        return "a web page: download the file itself"
    kind = signatures.sniff(data)
    if "git-lfs" in kind:
        return kind
    if not kind or signatures.text(data):  # a table's text may begin with a signature: BM_001.jpg
        return ""
    return _WORKBOOKS.get(kind) or kind + (": unpack it" if signatures.is_packed(kind) else "")


def table_text(path: Path) -> str:
    """The text of a table or a list; ValueError names a file that is none."""
    data = path.read_bytes()
    if problem := _not_text(data):
        raise ValueError(f"{path}: not a text file but {problem}")
    try:
        return decoded(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8 text") from error


def _choose(path: Path, pairs: dict[str, Pair], names: list[str] | None) -> list[Pair]:
    """The pairs with these names, after checking that their files exist."""
    unknown = [name for name in names or [] if name not in pairs]
    if unknown:
        raise ValueError(f"{path} has no {', '.join(unknown[:5])} ({len(unknown)} names unknown, {len(pairs)} known)")
    chosen = list(pairs.values()) if names is None else [pairs[name] for name in names]
    absent = [str(p) for pair in chosen for p in (pair.rgb_path, pair.depth_path) if not p.is_file()]
    if addresses := [pair.photo for pair in chosen if "://" in pair.photo and not pair.rgb_path.is_file()]:
        raise FileNotFoundError(f"{path}: {addresses[0]} is a URL, but only paths are read: download the files")
    if absent:
        raise FileNotFoundError(
            f"{path}: {len(absent)} of {2 * len(chosen)} files are missing: {', '.join(absent[:3])}"
        )
    return chosen


def _pair(row: dict[str, str], folder: Path) -> Pair:
    """One row as a Pair; ValueError says what is wrong with it."""
    empty = [column for column in ("name", "rgb", "depth") if not row.get(column)]
    if empty:
        raise ValueError(f"{', '.join(empty)} is empty")
    if row["name"].startswith("/") or ".." in row["name"].split("/"):
        raise ValueError(f"the name {row['name']!r} points outside the folder that predictions are stored in")
    scale_text = row.get("scale_to_metres", "")
    stereo = _STEREO.match(scale_text)
    scale, baseline, offset = 1.0, 0.0, 0.0
    if stereo:
        parts = float(stereo["parts"] or 1)  # stored units per pixel
        baseline = float(stereo[1]) * float(stereo[2]) * parts
        if not 0 < baseline < math.inf:
            raise ValueError(f"scale_to_metres must have f*b finite and above 0, not {scale_text}")
        offset = float(stereo["offset"] or 0) * parts * (-1.0 if stereo["sign"] == "-" else 1.0)
        kind = Kind.METRIC_DEPTH
    else:
        number = cells.scale(scale_text)
        if number is not None and not 0 < number < math.inf:
            raise ValueError(
                f"scale_to_metres must be finite and above 0, not {scale_text}; words mean an unknown scale"
            )
        scale = 1.0 if number is None else number
        kind = _kind(row.get("kind") or "depth", known=number is not None)
        if number is None and scale_text and kind.unknown == "metric":
            raise ValueError(f"scale_to_metres {scale_text!r} is no number, which the kind {kind} needs")
        if number is None and kind.quantity == "depth" and cells.OF_DISPARITY.search(scale_text):
            raise ValueError(
                f"scale_to_metres {scale_text!r} is a disparity formula that cannot be parsed, but kind says "
                "depth: write Z[m]=f*b/disp or Z[m]=f*b/(disp/256), or set kind to disparity"
            )
    bounds, values = cells.invalid(row.get("invalid", ""))
    return Pair(
        name=row["name"],
        rgb_path=_file_of_cell(folder, row["rgb"]),
        depth_path=_file_of_cell(folder, row["depth"]),
        kind=kind,
        scale=scale,
        baseline=baseline,
        offset=offset,
        invalid_values=values,
        invalid_from=bounds,
        dataset=row.get("dataset", ""),
        photo=row["rgb"],
        focal=cells.focal(row.get("focal", "")),
    )


def _file_of_cell(folder: Path, text: str) -> Path:
    """The file of a cell: as written, else with this system's slashes, Unicode normalization or letter case."""
    as_written = folder / home_expanded(text)
    if as_written.exists():
        return as_written
    spellings = [unicodedata.normalize(form, text.replace("\\", "/")) for form in ("NFC", "NFD")]
    if existing := next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None):
        return existing
    # Tables from Windows or macOS, where Photo.JPG and photo.jpg are the same file.
    place = folder / spellings[0]
    matches = [path for path in _file_names(place.parent) if path.casefold() == place.name.casefold()]
    return place.with_name(matches[0]) if len(matches) == 1 else as_written


@lru_cache(maxsize=8)
def _file_names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(path.name for path in folder.iterdir())
    except OSError:
        return ()


def _kind(text: str, *, known: bool) -> Kind:
    text = text.lower()
    if text == "depth":
        return Kind.METRIC_DEPTH if known else Kind.SCALE_DEPTH
    if text == "disparity":
        return Kind.SCALE_DISPARITY if known else Kind.AFFINE_DISPARITY
    try:
        return Kind(text)
    except ValueError:
        raise ValueError(f"kind must be depth, disparity or one of {', '.join(Kind)}, not {text!r}") from None


def _nearest(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (H,W) to (1,*size) by nearest neighbour."""
    if plane.shape == size:
        return plane[None]
    resized = F.interpolate(plane.float()[None, None], size=size, mode="nearest-exact")[0]
    return resized > 0.5 if plane.dtype == torch.bool else resized
