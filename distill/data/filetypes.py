"""File types by name, for searching folders and tars; distill.core.signatures detects them by their first bytes.

A name only decides whether a file is opened: a photo named .dat is skipped and counted, and a .jpg that is in fact a
PNG is read. Every file that a search finds is accepted (a photo, or a video where videos are read), refused with a
reason (pictures of unsupported formats), or skipped (captions, thumbnail caches, ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from distill.core import signatures

PHOTOS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".avif", ".heic", ".heif", ".hif"),
)
"""Suffixes of photographs that can be read (HEIC needs an extra package); an animation gives its first frame."""
FILMS = (
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mts", ".m2ts", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob"),
    *(".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".y4m", ".qt", ".insv", ".lrv"),
    *(".m2t", ".m1v", ".divx", ".ogm", ".rm", ".rmvb", ".dv", ".ivf", ".mjpeg"),
    *(".h264", ".264", ".h265", ".265", ".hevc"),
)
"""Suffixes of films; not .ts, which names programs in TypeScript far more often: such a film is given by its name."""
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
RAW = "a camera raw: develop it and save it as JPEG, PNG or TIFF; read as a TIFF, it is a thumbnail or undeveloped"


def refusal(name: str) -> str:
    """Why a picture of an unsupported format is not read, by its suffix; "" for any other name."""
    suffix = "" if is_litter(name) else PurePosixPath(name).suffix.lower()
    if suffix in RAWS:
        return RAW
    kind = _OTHER_PICTURES.get(suffix)
    return f"{kind}, which is not supported: convert it to JPEG, PNG or TIFF" if kind else ""


def is_litter(name: str) -> bool:
    """Whether a name is an operating system's metadata: macOS's ._NAME and __MACOSX, hidden files, Windows' caches."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    litter = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or "__MACOSX" in parts or "@eaDir" in parts or (bool(parts) and parts[-1].lower() in litter)


def is_photo(name: str) -> bool:
    """Whether a search reads a file of this name as a photo."""
    return PurePosixPath(name).suffix.lower() in PHOTOS and not is_litter(name) and not field_suffix(name)


def is_film(name: str) -> bool:
    """Whether a search reads a file of this name as a video."""
    return PurePosixPath(name).suffix.lower() in FILMS and not is_litter(name)


_FIELDS = re.compile(
    r"\.(depth|disp|disparity|masks?|seg|segmentation|semantic|instances?|normals?|flow|pred\w*)\.\w+$",
    re.IGNORECASE,
)
_TARTANAIR_FIELDS = re.compile(r"^\d{6}(?:_[lr]cam_\w+|_\d{6})(_(?:depth|seg|flow|mask)\.png)$")
"""TartanAir V2's: 000000_lcam_front_depth.png holds the bytes of floats in the place of colours."""


def field_suffix(name: str) -> str:
    """The ending, such as `.depth.png`, of a file that is another field of a sample than its photo; else ""."""
    file = PurePosixPath(name).name
    if match := _FIELDS.search(file):
        return match[0].lower()
    return match[1] if (match := _TARTANAIR_FIELDS.match(file)) else ""


def skip_category(name: str) -> str:
    """The category under which a skipped file is counted: its field's ending, its suffix, or system metadata."""
    if name.endswith(".icloud"):
        return ".icloud (photos that were not downloaded from it)"
    if is_litter(name):
        return "of the system (._*, .DS_Store, Thumbs.db)"
    return field_suffix(name) or PurePosixPath(name).suffix.lower()[:12] or "without a suffix"


def summarize_counts(sorts: Mapping[str, int] | Iterable[str]) -> str:
    """A summary of categories such as `3 .txt, 2 .json`, the most frequent first; "" for none."""
    counts = Counter(sorts).most_common()
    others = sum(number for _, number in counts[6:])
    return ", ".join([f"{number} {sort}" for sort, number in counts[:6]] + ([f"{others} others"] if others else []))


def advice_for_kind(kind: str) -> str:
    """What to do about a file of an unsupported kind (of `signatures.sniff`); "" where the kind itself says it."""
    if kind.startswith("a video"):
        return ": give it a video's suffix (.mp4, .mkv, .avi), or extract frames from it"
    if signatures.is_packed(kind):
        return ": unpack it"
    convertible = ("JPEG", "Photoshop", "Radiance", "OpenEXR", "a DirectDraw", "QOI", "GIMP", "PostScript", "an icon")
    if kind.startswith((*convertible, "FITS", "PAM", "PFM", "DICOM", "a PDF")):
        return ": convert it to JPEG, PNG or TIFF"
    return "" if ":" in kind else ": remove it"
