"""Detects a file's format by its first bytes, whatever its name says: the only table of signatures.

Callers decide what to do about an unexpected format: photos (distill.data.photos), maps, tars, weights (standins).
"""

from __future__ import annotations

import re

_PACKERS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
}


def packer(data: bytes) -> str:
    """The compression of a single file: "gzip", "bzip2", "xz", "zstd", "lz4", "compress"; "" if none is recognised."""
    return next((name for magic, name in _PACKERS.items() if data.startswith(magic)), "")


def is_packed(kind: str) -> bool:
    """Whether a result of `sniff` must be unpacked: a compressed file, or an archive."""
    return kind.startswith("compressed") or kind.endswith("archive")


def sniff(data: bytes) -> str:
    """Return the format by the first bytes: "JPEG", "HEIC", "camera raw", "a video (MP4)", ..., "" if unknown."""
    head = bytes(data[:64])
    if bytes(data[128:132]) == b"DICM":
        return "DICOM"
    if bytes(data[257:262]) == b"ustar":
        return "a tar archive"
    if head[4:8] == b"ftyp":
        return _brand(head)
    if compression := packer(head):
        return f"compressed with {compression}"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"AVI ": "a video (AVI)", b"WAVE": "sound (WAV)"}.get(head[8:12], "")
    return ""


_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", "a PNG as iOS apps pack it (CgBI): convert it with a Mac's Preview or pngcrush"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\x89PNG\n", "a PNG whose line ends were changed, as in a transfer as text: copy it again as binary"),
    (b"\x89PNG\r\r", "a PNG whose line ends were changed, as in a transfer as text: copy it again as binary"),
    (b"\xef\xbf\xbd", "a file of bytes that was read and stored as text: copy it again as binary"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIRO", "camera raw"),
    (b"IIRS", "camera raw"),
    (b"MMOR", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"FOVb", "camera raw"),
    (b"\0MRM", "camera raw"),
    (b"II\x1a\0\0\0HEAPCCDR", "camera raw"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"v/1\x01", "OpenEXR"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska)"),
    (b"OggS", "a video or sound (Ogg)"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (Windows Media)"),
    (b"FLV\1", "a video (FLV)"),
    (b"\0\0\1\xba", "a video (MPEG)"),
    (b"%PDF", "a PDF"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\3\4", "a zip archive"),
    (b"\0\5\x16\7", "macOS's notes on a file (AppleDouble)"),
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"\x89HDF", "HDF5"),
    (b"MATLAB", "a .mat"),
    *((b"CDF" + bytes([version]), "netCDF 3: store it as netCDF 4 or .npy") for version in (1, 2, 5)),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"GGUF", "GGUF"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
    *((b"\x80" + bytes([protocol]), "a Python pickle") for protocol in range(2, 6)),
    (b"DDS ", "a DirectDraw texture (DDS)"),
    (b"qoif", "QOI"),
    (b"gimp xcf", "GIMP's XCF"),
    (b"%!PS", "PostScript"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"SIMPLE  =", "FITS"),
    (b"P7\n", "PAM"),
    (b"Pf\n", "PFM"),
    (b"PF\n", "PFM"),
    (b"PIEH", "Sintel's .dpt"),
)


def text(data: bytes) -> str:
    """`text, beginning '<!DOCTYPE'` for readable text (a web page, a server's error message), "" for anything else."""
    head = bytes(data[:512]).removeprefix(b"\xef\xbb\xbf").lstrip()
    readable = head.decode("utf-8", errors="ignore")
    if (
        len(head) < 3
        or len(readable.encode()) < len(head) - 3
        or not all(c.isprintable() or c.isspace() for c in readable)
    ):
        return ""
    if re.match(r"P[1-3]\s+[\d#]", readable):  # PNM images as plain digits
        return ""
    return f"text, beginning {readable[:24]!r}"


def _brand(head: bytes) -> str:
    """Format of an ISO base media file by its major brand, and the compatible brands in the first 64 bytes."""
    size = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, min(max(size, 16), len(head)), 4))]
    if brands[0] in (b"avif", b"avis") or (brands[0] in (b"mif1", b"msf1", b"miaf") and b"avif" in brands):
        return "AVIF"
    if brands[0] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIC"
    return {b"crx ": "camera raw", b"jxl ": "JPEG XL"}.get(brands[0], "a video (MP4)")
