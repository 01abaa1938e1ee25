"""Videos, a frame at a time: read with their rate and the length that they claim, written as one mp4.

Shapes: (H,W,3) uint8 RGB frames.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from distill.core import files
from distill.data.photos import BadImageError


def frames(path: Path) -> Iterator[tuple[np.ndarray, float, int]]:
    """(H,W,3) frames, each with the frames per second and the number that the file claims (0: it does not say).

    Raises BadImageError for a video that cannot be opened.
    """
    reader = cv2.VideoCapture(str(path))
    try:
        if not reader.isOpened():
            raise BadImageError("OpenCV cannot open this video (a codec that it does not have, or not a video)")
        rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
        total = max(0, int(reader.get(cv2.CAP_PROP_FRAME_COUNT)))
        while True:
            there, frame = reader.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate, total
    finally:
        reader.release()


def check_whole(path: Path, count: int, rate: float, total: int) -> None:
    """Raises BadImageError where `count` decoded frames are fewer than the file claims; the rest of it is damaged."""
    if not count:
        raise BadImageError("no frame of this video can be decoded")
    # Matroska stores no count: OpenCV derives it from the longest track's time, and sound may last a little longer.
    slack = rate if path.suffix.lower() in (".mkv", ".webm") else 0.0
    if count < total - slack:
        raise BadImageError(f"stops at frame {count} of {total}")


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Callable[[np.ndarray, float], None]]:
    """write((H,W,3) frame, frames per second) to an mp4, which appears when the block ends well."""
    film: Any = None

    with files.writing(path, suffix=path.suffix) as new:  # OpenCV knows a format by its suffix alone

        def write(rgb: np.ndarray, rate: float) -> None:
            nonlocal film
            # mp4v's chroma wants even sides; one row or column is repeated.
            even = np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
            if film is None:
                film = cv2.VideoWriter(str(new), cv2.VideoWriter.fourcc(*"mp4v"), rate, (even.shape[1], even.shape[0]))
                if not film.isOpened():
                    reason = "OpenCV cannot write this video; ask for png or npy instead"
                    raise OSError(errno.EIO, reason, str(path))
            film.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            if film is not None:
                film.release()
