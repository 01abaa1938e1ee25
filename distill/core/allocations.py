"""Pickles of torch files that ask for memory by a number, as bytearray(6000000000) does: told before they are opened.

torch's own reader of weights lets such calls pass. What libraries write calls them with the content, or with zero.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_ALLOCATE = re.compile(r"(__builtin__|builtins) bytearray|numpy ndarray|torch Tensor|_codecs encode")
_HINTS = (b"bytearray", b"numpy\nndarray", b"ctorch\nTensor", b"_codecs\nencode")
_TEXT = re.compile(r".*(UNICODE|STRING|BYTES).*")
_REMEDY = "not opened; save its state_dict() alone"
_UNSUSPECTED, _MOST_TIMES = 1 << 28, 20
"""All content that is passed may take so many bytes together, or else so many times the file's own."""


def fault(path: Path) -> str:
    """The fault of a torch file whose pickle would take memory by a number, or for one text many times; else ""."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        pickles: list[bytes] = []
        with suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error):  # its reader tells it
            with zipfile.ZipFile(path) as archive:
                pickles += [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        faults = [_fault(pickletools.genops(data), size) for data in pickles if any(hint in data for hint in _HINTS)]
        return next(filter(None, faults), "")
    with path.open("rb") as file:
        if not _mentioned(file):
            return ""
        file.seek(0)
        with suppress(ValueError):  # its reader tells what is wrong with it
            for _ in range(4):  # of an earlier torch: magic number, version, system, object
                if found := _fault(pickletools.genops(file), size):
                    return found
    return ""


def _mentioned(file: IO[bytes]) -> bool:
    before = b""
    while piece := file.read(1 << 22):
        if any(hint in before + piece for hint in _HINTS):
            return True
        before = piece[-64:]
    return False


def _fault(steps: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]], size: int) -> str:
    """Follows what is pushed behind each of the names above, also where they are taken from the memo."""
    memo: dict[int, tuple[str, int]] = {}
    last, length, called, passed = "", 0, "", 0
    with suppress(ValueError):
        for code, argument, _ in steps:
            name = code.name
            if "PUT" in name or name in ("MARK", "MEMOIZE"):
                memo[argument if isinstance(argument, int) else len(memo)] = last, length
                continue
            if name in ("BINGET", "LONG_BINGET", "GET"):
                last, length = memo.get(int(argument), ("", 0))
                last = last or ("" if called == "torch Tensor" else "number")
            elif name == "GLOBAL" and _ALLOCATE.fullmatch(str(argument)):
                last = str(argument)
            elif _TEXT.fullmatch(name):
                last, length = "text", len(argument)
            else:
                last = "number" if isinstance(argument, int) and argument > 0 and name != "PROTO" else ""
            if last == "number" and called:
                return f"asks for memory by a number ({called.replace(' ', '.')}): {_REMEDY}"
            passed += length if last == "text" and called else 0
            called = last if _ALLOCATE.fullmatch(last) else ""
            if passed > max(_UNSUSPECTED, _MOST_TIMES * size):
                return f"asks for the memory of one text many times: {_REMEDY}"
    return ""
