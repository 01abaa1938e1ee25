"""What a file is: by its name where a folder or a tar is searched, by its first bytes where it is read.

A name is a claim, so it only decides what is looked at: a photo that is called .dat is passed over and counted, and a
.jpg that is a PNG is read. Everything that a search finds is one of three: ours (a photo, or a film where films are
read), refused with a reason (pictures of kinds that are not read), or not ours (captions, thumbnails' caches, ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

PHOTOS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif", ".heic", ".heif", ".hif"),
)
"""Suffixes of photographs that can be read (HEIC needs an extra package); of a moving one the first picture."""
FILMS = (
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mts", ".m2ts", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob"),
    *(".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".y4m", ".qt", ".insv", ".lrv"),
)
RAWS = (
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".pef", ".orf", ".rw2", ".raf", ".raw"),
    *(".srw", ".x3f", ".3fr", ".fff", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".mos", ".rwl", ".gpr"),
)
_OTHER_PICTURES = {
    ".jxl": "JPEG XL",
    ".jp2": "JPEG 2000",
    ".j2k": "JPEG 2000",
    ".jpx": "JPEG 2000",
    ".jxr": "JPEG XR",
    ".psd": "Photoshop",
    ".tga": "Targa",
    ".hdr": "Radiance HDR",
    ".exr": "OpenEXR",
    ".svg": "a drawing (SVG)",
    ".insp": "a 360-degree photo",
}
RAW = "a camera raw: develop it and save it as JPEG, PNG or TIFF; its TIFF reading is a thumbnail or unfinished"


def refusal(name: str) -> str:
    """Why a picture is not read whose suffix is of a kind that nothing here reads; "" for any other name."""
    suffix = "" if is_litter(name) else PurePosixPath(name).suffix.lower()
    if suffix in RAWS:
        return RAW
    kind = _OTHER_PICTURES.get(suffix)
    return f"{kind}, which is not read here: convert it to JPEG, PNG or TIFF" if kind else ""


def is_litter(name: str) -> bool:
    """Whether a name is a system's own: macOS's ._NAME twins and __MACOSX, hidden files, Windows' caches."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    litter = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or "__MACOSX" in parts or "@eaDir" in parts or (bool(parts) and parts[-1].lower() in litter)


def is_photo(name: str) -> bool:
    """Whether a search takes a name for a photo that can be read."""
    return PurePosixPath(name).suffix.lower() in PHOTOS and not is_litter(name) and not field(name)


def is_film(name: str) -> bool:
    """Whether a search takes a name for a film."""
    return PurePosixPath(name).suffix.lower() in FILMS and not is_litter(name)


_FIELDS = re.compile(
    r"\.(depth|disp|disparity|masks?|seg|segmentation|semantic|instances?|normals?|flow|pred\w*)\.\w+$",
    re.IGNORECASE,
)


def field(name: str) -> str:
    """`.depth.png` of a file that is another field of its sample than the photograph; "" of any other."""
    found = _FIELDS.search(PurePosixPath(name).name)
    return found[0].lower() if found else ""


def sort_of(name: str) -> str:
    """How a file that is not ours is counted: by its suffix, its field's with it, or as one of the system's own."""
    if is_litter(name):
        return "of the system (._*, .DS_Store, Thumbs.db)"
    return field(name) or PurePosixPath(name).suffix.lower()[:12] or "without a suffix"


def counted(sorts: Mapping[str, int] | Iterable[str]) -> str:
    """`3 .txt, 2 .json`: the most frequent first; "" for none."""
    counts = Counter(sorts).most_common()
    more = sum(number for _, number in counts[6:])
    return ", ".join([f"{number} {sort}" for sort, number in counts[:6]] + ([f"{more} others"] if more else []))


def sniff(data: bytes) -> str:
    """What the first bytes say: "JPEG", "HEIC", "camera raw", "a video (MP4)", ..., "" where they say nothing."""
    head = bytes(data[:64])
    if bytes(data[128:132]) == b"DICM":
        return "DICOM"
    if bytes(data[257:262]) == b"ustar":
        return "a tar archive"
    if head[4:8] == b"ftyp":
        return _brand(head)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"AVI ": "a video (AVI)", b"WAVE": "sound (WAV)"}.get(head[8:12], "")
    return ""


_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
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
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"\0\5\x16\7", "macOS's notes on a file (AppleDouble)"),
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"MATLAB", "a .mat"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
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


def way_out(kind: str) -> str:
    """What to do about a file of a kind that is no photo here, as `sniff` says it; "" where that says it itself."""
    if kind.startswith("a video"):
        return ": give it the name of a film (.mp4, .mkv, .avi), or take pictures out of it"
    if "archive" in kind or kind.startswith("compressed"):
        return ": unpack it"
    pictures = ("JPEG", "Photoshop", "Radiance", "OpenEXR", "a DirectDraw", "QOI", "GIMP", "PostScript", "an icon")
    if kind.startswith((*pictures, "FITS", "PAM", "PFM", "DICOM", "a PDF")):
        return ": convert it to JPEG, PNG or TIFF"
    return "" if ":" in kind else ": take it out"


def text(data: bytes) -> str:
    """`text, beginning '<!DOCTYPE'` of bytes that are words: a web page, an error of a server; "" of anything else."""
    head = bytes(data[:512]).removeprefix(b"\xef\xbb\xbf").lstrip()
    readable = head.decode("utf-8", errors="ignore")
    if (
        len(head) < 3
        or len(readable.encode()) < len(head) - 3
        or not all(c.isprintable() or c.isspace() for c in readable)
    ):
        return ""
    if re.match(r"P[1-3]\s+[\d#]", readable):  # pictures and maps in plain digits
        return ""
    return f"text, beginning {readable[:24]!r}"


def _brand(head: bytes) -> str:
    """Of an ISO base media file: its major brand, then the compatible ones that the first 64 bytes hold."""
    size = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, min(max(size, 16), len(head)), 4))]
    if brands[0] in (b"avif", b"avis") or (brands[0] in (b"mif1", b"msf1", b"miaf") and b"avif" in brands):
        return "AVIF"
    if brands[0] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIC"
    return {b"crx ": "camera raw", b"jxl ": "JPEG XL"}.get(brands[0], "a video (MP4)")
