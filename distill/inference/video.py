"""Videos, a frame at a time: read with their rate and the length that is to be expected, written as one mp4.

PyAV reads: it shows what players show (OpenCV counts the frames that an edit list hides), has decoders of its own
(AV1), names codecs, and keeps the library's own lines off the terminal.

Shapes: (H,W,3) uint8 RGB frames.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import av.logging
import cv2
import numpy as np
from av.sidedata.sidedata import Type as DataType
from av.stream import Disposition

from distill.core import files, signatures
from distill.data import hdr
from distill.data.photos import BadImageError

av.logging.set_level(av.logging.PANIC)


_CUT = "it is cut, and what says how it is encoded is lost: copy it again"


class Film:
    """The frames that a player would show of a film: edit lists, rotation, oblong pixels and HDR applied, in order.

    Interlaced ones are deinterlaced.

    rate: frames per second. total: how many frames are to be expected, 0 where the file does not say: a claim.
    problem: after the last frame, why there are fewer than should be, or "". Damaged packets are passed over, counted.
    Raises BadImageError for what cannot be opened or has no picture that is decoded here, naming its codec.
    """

    def __init__(self, path: Path) -> None:
        self.problem = ""
        self._path = path
        if (what := _other(path)).startswith("text"):  # a list of films, which FFmpeg would follow to any other file
            raise BadImageError(f"not a video: it is {what}")
        try:
            self._container = av.open(str(path), metadata_errors="ignore")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if what := _other(path):
                raise BadImageError(f"not a video: it is {what}") from error
            cut = path.is_file() and _lacks_boxes(path)
            reason = f"not a video that can be opened ({_short(error)}): copy it again, or convert it to H.264"
            raise BadImageError(_CUT if cut else reason) from error
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        codec = getattr(streams[0], "codec_context", None) if streams else None
        if codec is None:
            what = f"its codec {_codec(path)} has no decoder here: convert it to H.264" if streams else "no video in it"
            if (streams or not self._container.streams) and _lacks_boxes(path):
                what = _CUT
            self._container.close()
            raise BadImageError(what)
        if _of_dolby(path):
            self._container.close()
            raise BadImageError(_DOLBY)
        self._stream, self._codec = streams[0], codec.name
        rates = (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate)
        self.rate = next((float(rate) for rate in rates if rate and 0.01 <= rate <= 1000), 25.0)
        self.total = max(0, self._stream.frames)
        self._edited = "mov" in self._container.format.name
        self._cut = _is_cut(path)
        self._size: tuple[int, int] | None = None
        if self._edited and self._stream.duration and self._stream.time_base:
            # The number of frames in the header counts those that an edit list hides.
            self._end = float((self._stream.start_time or 0) + self._stream.duration) * float(self._stream.time_base)
            shown = round(float(self._stream.duration * self._stream.time_base) * self.rate)
            self.total = min(self.total, shown) if self.total and shown else self.total
        else:
            # mkvmerge's and FFmpeg's word on this track; the container's duration is that of the longest, often sound.
            self._end = _seconds(self._stream.metadata.get("DURATION", ""))
            if self._container.duration and not self.total:
                self.total = round(self._container.duration / av.time_base * self.rate)

    def __iter__(self) -> Iterator[np.ndarray]:
        count, lost, last = 0, 0, 0.0
        deinterlacer = _Deinterlacer()
        try:
            for packet in self._packets():
                try:
                    decoded = packet.decode()
                except (av.error.FFmpegError, ValueError) as error:
                    if isinstance(error, LookupError):
                        self.problem = f"its codec {self._codec} has no decoder here: convert it to H.264"
                        return
                    lost += count > 0  # a cut film may begin with pictures that lean on earlier ones
                    continue
                for frame in decoded:
                    shown = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
                    last = max(last, float(frame.time or 0.0) + max(shown, 1 / self.rate))
                    for whole in deinterlacer.of(frame):
                        count += 1
                        yield self._shown(whole)
            for whole in deinterlacer.rest():
                count += 1
                yield self._shown(whole)
        finally:
            self._container.close()
        self.problem = self._judge(count, lost, last)

    def _shown(self, frame: Any) -> np.ndarray:
        """(H,W,3) uint8 sRGB as it is to be shown: square pixels, upright, every frame of the size of the first."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        aspect = aspect if 0.2 < aspect < 5 else 1.0
        # Wider pixels are stretched, taller ones make the picture higher: nothing is thrown away.
        size = round(frame.width * max(1.0, aspect)), round(frame.height / min(1.0, aspect))
        self._size = self._size or size
        bright = frame.color_trc in (hdr.PQ, hdr.HLG)
        given: dict[str, Any] = {"format": "rgb48le" if bright else "rgb24"}
        if (frame.width, frame.height) != self._size:
            given |= {"width": self._size[0], "height": self._size[1], "interpolation": "BICUBIC"}
        rgb = frame.to_ndarray(**given)
        return _upright(frame, hdr.to_srgb(rgb, frame.color_trc, primaries=frame.color_primaries) if bright else rgb)

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream)
        except av.error.FFmpegError:
            return  # the file ends in the middle of one

    def _judge(self, count: int, lost: int, last: float) -> str:
        if not count and (what := _other(self._path)):
            return f"not a video: it is {what}"
        if not count:
            return f"no frame of this video can be decoded (its codec is {self._codec})"
        # A header's count of frames is of what is stored and at an even rate: its end alone is held against the film.
        whole = not self._cut and (not self._end or last >= self._end - 2 / self.rate)
        if not whole:
            more = f"; {lost} frames are damaged too" if lost > 1 else ""  # one: the picture that the cut goes through
            return f"stops at frame {count} of {self.total if self.total > count else 'more'}{more}"
        return f"{lost} of its frames are damaged; {count} could be decoded" if lost else ""


_DOLBY = (
    "Dolby Vision of profile 5, whose colours are of a space of its own (decoded here they are green and purple): "
    "convert it with `ffmpeg -init_hw_device vulkan -i FILM -vf libplacebo=colorspace=bt709:format=yuv420p NEW.mp4`"
)


def _of_dolby(path: Path) -> bool:
    """Whether an MP4, MOV or Matroska says that it is Dolby Vision without a picture for other players.

    By its configuration record (dvcC, dvvC; Dolby's "Streams within the ISO base media file format", 3.2): profile 5,
    and 10 of AV1 where nothing is compatible.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
        if head[:4] != b"\x1a\x45\xdf\xa3":
            head = b""
            at, size = 0, path.stat().st_size
            while at + 8 <= size and not head:
                file.seek(at)
                box = file.read(16)
                length = int.from_bytes(box[:4], "big")
                length = int.from_bytes(box[8:16], "big") if length == 1 else length or size - at
                if length < 8:
                    break
                head = box[8:] + file.read(min(length, 1 << 22)) if box[4:8] == b"moov" else b""
                at += length
    # Matroska has the name as a number, then the record as another element.
    record = re.search(rb"dv[cv]C(?:.{0,16}?\x41\xed[\x80-\xff])?([\1\2]\0.{3})", head, re.DOTALL)
    if not record:
        return False
    profile, compatible = record[1][2] >> 1, record[1][4] >> 4
    return profile == 5 or (profile == 10 and not compatible)


class _Deinterlacer:
    """FFmpeg's bwdif on the frames that are flagged as interlaced, as television and camcorders write them.

    Every second row of theirs is of another moment: combs where something moves. A film before its first such frame
    passes as it is. The filter looks a frame ahead, so that each call gives the frame before.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._form: tuple[Any, ...] = ()

    def of(self, frame: Any) -> Iterator[Any]:
        form = frame.width, frame.height, frame.format.name
        if self._graph is not None and form != self._form:
            yield from self.rest()
        if self._graph is None and not frame.interlaced_frame:
            yield frame
            return
        if self._graph is None:
            self._graph, self._form = av.filter.Graph(), form
            base = frame.time_base or Fraction(1, 1000)
            source = self._graph.add_buffer(width=form[0], height=form[1], format=form[2], time_base=base)
            combed = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
            self._graph.link_nodes(source, combed, self._graph.add("buffersink")).configure()
        self._graph.vpush(frame)
        yield from self._pulled()

    def rest(self) -> Iterator[Any]:
        """What the filter still holds."""
        if self._graph is not None:
            self._graph.vpush(None)
            yield from self._pulled()
            self._graph = None

    def _pulled(self) -> Iterator[Any]:
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield self._graph.vpull()


def _is_cut(path: Path) -> bool:
    """Whether a film is shorter than it says that it is, or ends in the middle of something: not MP4 and MPEG."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 16)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _segment_end(head) > size
        if head[:3] == b"FLV" and size > 16:  # every tag is followed by its length
            file.seek(size - 4)
            length = int.from_bytes(file.read(4), "big")
            file.seek(max(0, size - 4 - length))
            return not 11 <= length <= size or file.read(1)[0] & 31 not in (8, 9, 18)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 > size
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # the object of the file's properties
    return at >= 0 and int.from_bytes(head[at + 40 : at + 48], "little") > size


def _segment_end(head: bytes) -> int:
    """Where a Matroska file ends by its segment's length; 0 where it does not say, as a live recording."""
    at = 0
    for wanted in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[at : at + 4] != wanted or at + 5 > len(head) or not head[at + 4]:
            return 0
        width = 9 - head[at + 4].bit_length()  # of the length, in bytes
        length = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
        at += 4 + width + (length if wanted[0] == 0x1A else 0)
    return 0 if length == (1 << 7 * width) - 1 else at + length


def _seconds(clock: str) -> float:
    """Of `00:00:05.300000000`; 0 for anything else."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", clock)
    return int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3]) if parts else 0.0


def _other(path: Path) -> str:
    """What a file is that is known to be no film, or ""."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(512)
    kind = signatures.sniff(head) or signatures.text(head) or ("" if head else "empty")
    return "" if kind.startswith("a video") or head.startswith(b"YUV4MPEG2") else kind


def _lacks_boxes(path: Path) -> bool:
    """Whether an MP4 or MOV ends inside one of its boxes."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - at
            if length < 8 or not head[4:8].isascii():
                return False
            at += length
    return at > size


def _upright(frame: Any, rgb: np.ndarray) -> np.ndarray:
    """The picture (H,W,3) under the film's display matrix, to the nearest quarter turn, mirrored where that says so.

    Not by PyAV's angle, which is 180 degrees of a mirrored film, and a large number of a matrix of zeros, as mp4box.js
    writes it (its issue 284): that one says nothing.
    """
    said = next((bytes(data) for data in frame.side_data if data.type == DataType.DISPLAYMATRIX), b"")
    if len(said) < 36:
        return rgb
    right_x, right_y, _, down_x, down_y = np.frombuffer(said, "<i4" if sys.byteorder == "little" else ">i4", 5)
    if abs(right_y) > abs(right_x):
        rgb, right_x, down_y = rgb.swapaxes(0, 1), down_x, right_y
    rgb = rgb[:, ::-1] if right_x < 0 else rgb
    return np.ascontiguousarray(rgb[::-1] if down_y < 0 else rgb)


def _codec(path: Path) -> str:
    with av.open(str(path), metadata_errors="ignore") as container:
        return str(getattr(container.streams.video[0], "name", None) or "of an unknown name")


def _short(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:120]


def frames(path: Path) -> Iterator[tuple[np.ndarray, float, int]]:
    """(H,W,3) frames, each with the frames per second and the number to be expected (0: the file does not say).

    Raises BadImageError as `Film` does.
    """
    film = Film(path)
    for rgb in film:
        yield rgb, film.rate, film.total


_MP4V_SIDE = 8190  # MPEG-4 has 13 bits for a side; an 8K film beside its depth is wider


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Callable[[np.ndarray, float], None]]:
    """write((H,W,3) frame, frames per second) to an mp4, which appears when the block ends well.

    Frames with a side past what MPEG-4 holds are written at every second pixel (third, ...).
    """
    film: Any = None

    with files.writing(path, suffix=path.suffix) as new:  # OpenCV knows a format by its suffix alone

        def write(rgb: np.ndarray, rate: float) -> None:
            nonlocal film
            step = -(-max(rgb.shape[:2]) // _MP4V_SIDE)
            rgb = rgb[::step, ::step]
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
