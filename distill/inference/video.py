"""Reads videos frame by frame, with their rate and expected length, and writes them as mp4.

PyAV reads: it yields what players show (OpenCV counts the frames that an edit list hides), has its own decoders (AV1),
names codecs, and can keep FFmpeg's log lines off the terminal.

Shapes: (H,W,3) uint8 RGB frames.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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
from distill.core.wording import first_line
from distill.data import hdr
from distill.data.photos import BadImageError

av.logging.set_level(av.logging.PANIC)


_WITH_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "asf", "mxf", "rm")
_CUT = "it is cut short, and the description of its encoding is lost: copy it again"


class Film:
    """The frames of a film as a player shows them, in order: edit lists, rotation, non-square pixels and HDR applied.

    Interlaced frames are deinterlaced.

    rate: frames per second. total: the number of frames that the file claims, 0 if unknown. problem: after the last
    frame, why frames are missing, or "". Damaged packets are skipped and counted. Raises BadImageError, naming the
    codec, for a file that cannot be opened or whose pictures cannot be decoded here.
    """

    def __init__(self, path: Path) -> None:
        self.problem = ""
        self._path = path
        self._container = _opened(path)
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if fault := _stream_fault(path, self._container, streams):
            self._container.close()
            raise BadImageError(fault)
        self._stream, self._codec_name = streams[0], streams[0].codec_context.name
        rates = (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate)
        self.rate = next((float(rate) for rate in rates if rate and 0.01 <= rate <= 1000), 25.0)
        self.total = self._stored = max(0, self._stream.frames)
        self._format = self._container.format.name
        self._truncated = _is_truncated(path)
        self._size: tuple[int, int] | None = None
        if "mov" in self._format and self._stream.duration and self._stream.time_base:
            # The number of frames in the header counts those that an edit list hides.
            self._end_s = float((self._stream.start_time or 0) + self._stream.duration) * float(self._stream.time_base)
            shown = round(float(self._stream.duration * self._stream.time_base) * self.rate)
            self.total = min(self.total, shown) if self.total and shown else self.total
        else:
            # mkvmerge and FFmpeg write this track's; the container's duration is that of the longest, often sound.
            self._end_s = _seconds(self._stream.metadata.get("DURATION", ""))
            if self._container.duration and not self.total:
                self.total = round(self._container.duration / av.time_base * self.rate)

    def __iter__(self) -> Iterator[np.ndarray]:
        count, lost, end = 0, 0, 0.0
        seen_whole = False
        # Packets of a joined transport stream are flagged at every joint, though nothing is missing there.
        flags_mean_damage = self._format != "mpegts"
        deinterlacer = _Deinterlacer()
        try:
            for packet in self._packets():
                try:
                    decoded = packet.decode()
                except (av.error.FFmpegError, ValueError) as error:
                    if isinstance(error, LookupError):
                        self.problem = f"its codec {self._codec_name} has no decoder here: convert it to H.264"
                        return
                    lost += count > 0  # a trimmed film may begin with frames that depend on earlier ones
                    continue
                for frame in decoded:
                    duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
                    end = max(end, float(frame.time or 0.0) + max(duration, 1 / self.rate))
                    lost += flags_mean_damage and seen_whole and frame.is_corrupt
                    seen_whole |= not frame.is_corrupt
                    for full_frame in deinterlacer.of(frame):
                        count += 1
                        yield self._to_display(full_frame)
            for full_frame in deinterlacer.rest():
                count += 1
                yield self._to_display(full_frame)
        finally:
            self._container.close()
        self.problem = self._find_problem(count, lost, end)

    def _to_display(self, frame: Any) -> np.ndarray:
        """Convert a frame to (H,W,3) uint8 sRGB for display: square pixels, upright, all of the first frame's size."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        aspect = aspect if 0.2 < aspect < 5 else 1.0
        # Wide pixels make the picture wider, tall ones make it higher: no resolution is lost.
        size = round(frame.width * max(1.0, aspect)), round(frame.height / min(1.0, aspect))
        self._size = self._size or size
        is_hdr = frame.color_trc in (hdr.PQ, hdr.HLG)
        options: dict[str, Any] = {"format": "rgb48le" if is_hdr else "rgb24"}
        if (frame.width, frame.height) != self._size:
            options |= {"width": self._size[0], "height": self._size[1], "interpolation": "BICUBIC"}
        rgb = frame.to_ndarray(**options)
        return _upright(frame, hdr.to_srgb(rgb, frame.color_trc, primaries=frame.color_primaries) if is_hdr else rgb)

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream)
        except av.error.FFmpegError:
            return  # the file ends inside a packet

    def _find_problem(self, count: int, lost: int, last: float) -> str:
        if not count and (detected := _other_format(self._path)):
            return f"not a video: it is {detected}"
        if not count and (self._truncated or _cut_box(self._path) is not None or _ends_in_zeros(self._path)):
            return "it is cut short before the end of its first frame: copy it again"
        if not count:
            return f"no frame of this video can be decoded (its codec is {self._codec_name})"
        # The header counts stored frames and assumes an even rate, so only the end time is compared.
        complete = not self._truncated and (not self._end_s or last >= self._end_s - 2 / self.rate)
        # Formats that say how long they are may end in padding, and uncompressed pixels in black.
        may_end_so = (complete and self._format in _WITH_LENGTH) or self._codec_name == "rawvideo"
        zeros = not may_end_so and _ends_in_zeros(self._path)
        if not complete or (zeros and count != self._stored):
            damage_note = f"; {lost} frames are damaged too" if lost > 1 else ""  # one: the frame at the cut
            damage_note += "; it ends in zeros, as an unfinished download does" if zeros else ""
            return f"stops at frame {count} of {self.total if self.total > count else 'more'}{damage_note}"
        return f"{lost} of its frames are damaged; {count} could be decoded" if lost else ""


def _opened(path: Path) -> Any:
    """PyAV's container of a film; BadImageError for a file that is none."""
    # Text may be a playlist, which FFmpeg would follow to any other file.
    if (detail := _other_format(path)).startswith("text"):
        raise BadImageError(f"not a video: it is {detail}")
    try:
        return _open(path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if detail:
            raise BadImageError(f"not a video: it is {detail}") from error
        truncated = path.is_file() and (_cut_box(path) is not None or _ends_in_zeros(path))
        reason = f"not a video that can be opened ({_reason(error)}): copy it again, or convert it to H.264"
        raise BadImageError(_CUT if truncated else reason) from error


def _stream_fault(path: Path, container: Any, streams: Sequence[Any]) -> str:
    """Why none of the container's video streams can be shown here, or ""."""
    if streams and getattr(streams[0], "codec_context", None) is not None:
        return _DOLBY_VISION if _of_dolby(path) else ""
    cut_inside = _cut_box(path)
    if cut_inside == b"moov" or (cut_inside is not None and (streams or not container.streams)):
        return _CUT
    return f"its codec {_codec_name(path)} has no decoder here: convert it to H.264" if streams else "no video in it"


_DOLBY_VISION = (
    "Dolby Vision of profile 5, whose colours are of a space of its own (decoded here they are green and purple): "
    "convert it with `ffmpeg -init_hw_device vulkan -i FILM -vf libplacebo=colorspace=bt709:format=yuv420p NEW.mp4`"
)


def _of_dolby(path: Path) -> bool:
    """Whether an MP4, MOV or Matroska declares Dolby Vision without a picture that other players can show.

    From its configuration record (dvcC, dvvC; Dolby's "Streams within the ISO base media file format", 3.2): profile 5,
    or profile 10 (AV1) without compatibility.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
        if head[:4] != b"\x1a\x45\xdf\xa3":
            moov = next(((start, end) for name, start, end in _boxes(path) if name == b"moov"), (0, 0))
            file.seek(moov[0])
            head = file.read(min(moov[1] - moov[0], 1 << 22))
    # Matroska stores the name as a number, then the record as another element.
    record = re.search(rb"dv[cv]C(?:.{0,16}?\x41\xed[\x80-\xff])?([\1\2]\0.{3})", head, re.DOTALL)
    if not record:
        return False
    profile, compatibility = record[1][2] >> 1, record[1][4] >> 4
    return profile == 5 or (profile == 10 and not compatibility)


class _Deinterlacer:
    """Applies FFmpeg's bwdif to frames that are flagged as interlaced, as television and camcorders write them.

    Every second row of such a frame is from another moment, which shows as combs on moving objects. Frames before the
    first interlaced one pass unchanged. The filter looks one frame ahead, so each call yields the previous frame.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._layout: tuple[Any, ...] = ()

    def of(self, frame: Any) -> Iterator[Any]:
        layout = frame.width, frame.height, frame.format.name
        if self._graph is not None and layout != self._layout:
            yield from self.rest()
        if self._graph is None and not frame.interlaced_frame:
            yield frame
            return
        if self._graph is None:
            self._graph, self._layout = av.filter.Graph(), layout
            base = frame.time_base or Fraction(1, 1000)
            source = self._graph.add_buffer(width=layout[0], height=layout[1], format=layout[2], time_base=base)
            bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
            self._graph.link_nodes(source, bwdif, self._graph.add("buffersink")).configure()
        self._graph.vpush(frame)
        yield from self._filtered()

    def rest(self) -> Iterator[Any]:
        """Yield the frames that the filter still holds."""
        if self._graph is not None:
            self._graph.vpush(None)
            yield from self._filtered()
            self._graph = None

    def _filtered(self) -> Iterator[Any]:
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield self._graph.vpull()


def _is_truncated(path: Path) -> bool:
    """Whether a film is shorter than its header says, or ends inside an element; not for MPEG and plain MP4."""
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
    if head[4:8] == b"ftyp":
        return _lacks_fragments(path)
    offset = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # the file properties object of ASF
    return offset >= 0 and int.from_bytes(head[offset + 40 : offset + 48], "little") > size


def _segment_end(head: bytes) -> int:
    """The end of a Matroska file by its segment's length; 0 if not given, as in a live recording."""
    offset = 0
    for element_id in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[offset : offset + 4] != element_id or offset + 5 > len(head) or not head[offset + 4]:
            return 0
        width = 9 - head[offset + 4].bit_length()  # of the length, in bytes
        length = int.from_bytes(head[offset + 4 : offset + 4 + width], "big") & ((1 << 7 * width) - 1)
        offset += 4 + width + (length if element_id[0] == 0x1A else 0)
    return 0 if length == (1 << 7 * width) - 1 else offset + length


def _seconds(clock: str) -> float:
    """Seconds of `00:00:05.300000000`; 0 for anything else."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", clock)
    return int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3]) if parts else 0.0


def _other_format(path: Path) -> str:
    """The format of a file that is recognised as something other than a film, or ""."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(512)
    if head and not any(head):
        return "zeros at its start, as of an unfinished download: download it again"
    kind = signatures.sniff(head) or signatures.text(head) or ("" if head else "empty")
    return "" if kind.startswith("a video") or head.startswith(b"YUV4MPEG2") else kind


def _boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, start and end of each box of an MP4 or MOV file; the last one may end behind the file.

    Bytes too few for a box are one without a name.
    """
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - offset
            if length < 8 or not head[4:8].isascii():
                return
            yield head[4:8], offset, offset + length
            offset += length
    if offset < size:
        yield b"", offset, offset + 8


def _cut_box(path: Path) -> bytes | None:
    """The name of the box inside which an MP4 or MOV file ends, or None."""
    size = path.stat().st_size
    return next((name for name, _, end in _boxes(path) if end > size), None)


def _lacks_fragments(path: Path) -> bool:
    """Whether an MP4 of fragments, as recorders and streaming sites write it, ends inside one.

    No header says how long all of them are.
    """
    return _cut_box(path) in (b"moof", b"mdat") and any(name == b"moof" for name, _, _ in _boxes(path))


def _ends_in_zeros(path: Path) -> bool:
    """Whether the end of a file never arrived, by programs that reserve the whole file's room first."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        end = file.read(4096)
    return len(end) == 4096 and not any(end)


def _upright(frame: Any, rgb: np.ndarray) -> np.ndarray:
    """Apply the film's display matrix to a picture (H,W,3): rotation to the nearest quarter turn, and mirroring.

    PyAV's angle is not used: it is 180 degrees for a mirrored film, and a large number for the matrix of zeros that
    mp4box.js writes (its issue 284), which means no rotation.
    """
    data = frame.side_data.get(DataType.DISPLAYMATRIX)
    matrix = b"" if data is None else bytes(data)
    if len(matrix) < 36:
        return rgb
    right_x, right_y, _, down_x, down_y = np.frombuffer(matrix, "<i4" if sys.byteorder == "little" else ">i4", 5)
    if abs(right_y) > abs(right_x):
        rgb, right_x, down_y = rgb.swapaxes(0, 1), down_x, right_y
    rgb = rgb[:, ::-1] if right_x < 0 else rgb
    return np.ascontiguousarray(rgb[::-1] if down_y < 0 else rgb)


def _open(path: Path) -> Any:
    """A film, whatever the encoding of its tags; PyAV 19 takes no setting for that and reads any."""
    tolerant: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
    return av.open(str(path), **tolerant)


def _codec_name(path: Path) -> str:
    with _open(path) as container:
        return str(getattr(container.streams.video[0], "name", None) or "of an unknown name")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or first_line(error))[:120]


_MP4V_SIDE = 8190  # MPEG-4 has 13 bits per side; an 8K film beside its depth map is wider


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Callable[[np.ndarray, float], None]]:
    """Yield write((H,W,3) frame, frames per second) for an mp4, which appears if the block succeeds.

    Frames with a side too long for MPEG-4 are written at every second pixel (third, ...).
    """
    film: Any = None

    with files.writing(path, suffix=path.suffix) as new:  # OpenCV infers the format from the suffix

        def write(rgb: np.ndarray, rate: float) -> None:
            nonlocal film
            step = -(-max(rgb.shape[:2]) // _MP4V_SIDE)
            rgb = rgb[::step, ::step]
            # mp4v's chroma needs even sides; one row or column is repeated.
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
