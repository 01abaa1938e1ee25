"""Files that only stand where weights should: pointers, web pages, archives, downloads with holes; and why they do.

Each function gives a clause that follows the file's name, or "" where nothing is wrong.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

_STARTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"),
    (b"<", "is a web page, not weights: download it again, logged in where it is gated"),
    (b"{", "is JSON, not weights: an error of the server that it came from, or an index under another name"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
    (b"BZh", "is compressed with bzip2: unpack it"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it"),
    (b"Rar!", "is a RAR archive: unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it"),
    (b"\x89HDF", "is HDF5 (Keras), not weights of a torch network"),
    (b"GGUF", "is GGUF, not weights of a torch network"),
    (b"\x93NUMPY", "is a NumPy array, not weights"),
)


def fault_of_start(path: Path) -> str:
    """By the first bytes."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if start[8:9] == b"{" and len(start) > 9:
        return ""  # safetensors: before its header stands a length, which may look like anything
    if not start:
        return "cannot be read as weights: it is empty; download it again"
    if not any(start):
        return "begins with zeros: an unfinished download; download it again"
    if what := next((what for magic, what in _STARTS if start.lstrip().startswith(magic)), ""):
        return what
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    return "is an ONNX network, not weights" if start[:1] == b"\x08" and b"pytorch" in start[:32] else ""


def fault_of_zip(path: Path) -> str:
    """Of a zip: one that is no torch file, or whose bytes are not those that were written.

    torch does not look at the checksums: the hole of a download would be weights of zeros.
    """
    with path.open("rb") as stream:
        if stream.read(2) != b"PK" or not zipfile.is_zipfile(path):
            return ""  # another format, or cut: its reader says so
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "is a TorchScript program: give the weights that it was made from"
        if not any(name.endswith("data.pkl") for name in names):
            return f"is a zip archive ({', '.join(names[:2])}), not weights: unpack it, and give the file in it"
        damaged = [name for name in names if not _is_whole(archive, name)]
    if not damaged or len(damaged) == len(names):  # all of them: written without checksums
        return ""
    return (
        f"is damaged: {len(damaged)} of its {len(names)} parts have not the checksum that they were written with; "
        "download or copy it again"
    )


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as part:
            while part.read(1 << 22):
                pass
    except (zipfile.BadZipFile, zlib.error, OSError):
        return False
    return True
