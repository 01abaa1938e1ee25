"""NYUv2's own file, nyu_depth_v2_labeled.mat (HDF5): the 654 test images of its 1,449, as its authors split them.

Images and `rawDepths` (Kinect's, without filled-in values) are read in place; an image has its name in Marigold's
archive, whose numbers are the file's own, counted from 1. Marigold stored depth in whole millimetres; the file has
float32 metres, which are used unchanged (ours).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core.division import unit_range
from distill.data.hdf5s import open_hdf5

NAME = "nyu_depth_v2_labeled.mat"
# The authors' splits.mat, as ranges.
_TEST = """
1-2 9 14-18 21 28-43 46-47 56-57 59-63 76-79 84-91 117-119 125-129 131-134 137 153-155 167-169 171-176 180-202
207-212 220-222 250 264 271-273 279-285 296-302 310-312 315-317 325-335 351-352 355-364 384-390 395-397 411-414
430-435 441-448 462-466 469-477 508-513 515-526 531-533 537-539 549-551 555-571 579-583 591-594 603-607 612-613
617-621 633-638 644-645 650-651 656-658 663-664 668-673 676-681 686-690 693-694 697-699 706-713 717-718 724-728
731-734 743-744 759-787 800-804 810-814 821-823 833-846 850-852 857-862 869-871 906-908 917-919 926-928 932-935
945-947 959-962 965-967 970-977 991-995 1001-1004 1010-1012 1021-1023 1032-1034 1038-1039 1048-1049 1052-1053
1057-1058 1075-1084 1088-1096 1098-1104 1106-1109 1117-1119 1123-1131 1135-1136 1144-1158 1162-1167 1170-1171
1174-1176 1179-1184 1192-1196 1201-1212 1216-1220 1226-1230 1233-1235 1247-1250 1254-1265 1275-1280 1285-1295
1297-1299 1302-1308 1314-1315 1329-1332 1335-1340 1347-1349 1353-1356 1364-1365 1368-1369 1384-1391 1394-1401
1407-1414 1421-1424 1430-1433 1441-1449
"""
_IMAGE = re.compile(r"(?:test|train)/([^/]+)/rgb_(\d{4})\.png")
_lock = threading.Lock()


def find(root: Path | str | None) -> Path | None:
    """The file, if `root` is it, or a folder that holds it (at most one level down) and no unpacked archive."""
    path = Path(root or "")
    if path.is_file():
        return path if path.suffix.lower() == ".mat" else None
    unpacked = (path / "test").is_dir() or any(path.glob("*nyu_labeled_extracted*"))
    unpacked = unpacked or any((path / "nyuv2").glob("*nyu_labeled_extracted*")) or (path / "nyuv2" / "test").is_dir()
    if unpacked:
        return None
    return next((file for file in (path / NAME, *sorted(path.glob(f"*/{NAME}"))) if file.is_file()), None)


def names(path: Path) -> list[str]:
    """The test images under the archive's names, test/SCENE/rgb_N.png."""
    scenes = _scenes(path)
    if len(scenes) < (last := max(numbers := _test())):
        raise ValueError(f"{path}: {len(scenes)} images, but the last one of the test split is number {last}")
    return [f"test/{scenes[number - 1]}/rgb_{number:04d}.png" for number in numbers]


def check_listed(path: Path, listed: Iterable[str]) -> None:
    """ValueError unless the file has every listed image under its name: other lists count differently (BTS from 0)."""
    scenes = _scenes(path)
    for name in listed:
        match = _IMAGE.fullmatch(name)
        if not match or not 0 < int(match[2]) <= len(scenes) or scenes[int(match[2]) - 1] != match[1]:
            raise ValueError(
                f"{path} has no {name}: its images are called test/SCENE/rgb_N.png, N from 0001 on; with a list of "
                "other names, give the folder of their files as root"
            )


def rgb(path: Path, name: str) -> Tensor:
    """An image (3,H,W) float32 in [0,1]."""
    image = _read(path, "images", name)  # MATLAB writes columns first: (3,W,H)
    return unit_range(torch.from_numpy(np.ascontiguousarray(image.swapaxes(1, 2))))


def depth(path: Path, name: str) -> np.ndarray:
    """Its depth (H,W) in metres, 0 where Kinect measured none."""
    return np.ascontiguousarray(_read(path, "rawDepths", name).T)


def _test() -> Sequence[int]:
    spans = [text.split("-") for text in _TEST.split()]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def _scenes(path: Path) -> list[str]:
    """The scene of every image of the file."""
    file = _open(path)
    with _lock:
        return ["".join(map(chr, np.ravel(file[reference][()]))) for reference in np.ravel(file["scenes"][()])]


def _read(path: Path, field: str, name: str) -> np.ndarray:
    number = int(name.removesuffix(".png").rpartition("_")[2])
    file = _open(path)
    try:
        with _lock:
            return np.asarray(file[field][number - 1])
    except (OSError, ValueError, IndexError) as error:
        raise OSError(f"{path}: {field} of {name} cannot be read ({error}); download it again") from error


@lru_cache(2)
def _open(path: Path) -> Any:
    file = open_hdf5(path)
    if lacking := [field for field in ("images", "rawDepths", "scenes") if field not in file]:
        raise ValueError(f"{path} has no {', '.join(lacking)}: it is not {NAME}")
    return file
