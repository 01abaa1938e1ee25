"""List the members of an uncompressed tar in place, on this disk or at a URL; reading continues behind damage."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO

from distill.core import signatures
from distill.data import filetypes, storage
from distill.data.photos import MAX_BYTES


def walk_tar(path: Path | str) -> Iterator[tuple[tarfile.TarInfo | None, str]]:
    """Yield (member, "") for every member of an uncompressed tar, and (member or None, problem) where it is damaged.

    Pairs come in file order; a problem's member is the one that the end of the file truncates, or None. Behind a
    damaged header reading continues at the next whole header, found byte by byte. Raises OSError for unreadable files.
    """
    with storage.open_place(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(512)
        if packer := signatures.packer(start) or ("zip" if start.startswith(b"PK\3\4") else ""):
            yield None, f"it is compressed with {packer}: unpack it, because members are read by position"
            return
        words = "" if b"ustar" in start else signatures.sniff(start) or signatures.text(start)
        if not start or words:
            is_list = PurePosixPath(str(path)).suffix.lower() in (".txt", ".tsv", ".csv")
            advice = "give the tars that it lists" if words and is_list else "download it again"
            yield None, f"not a tar: it is {words or 'empty'}; {advice}"
            return
        at: int | None = 0
        damaged = 0
        while at is not None:
            end = yield from _whole_members(file, at, size)
            if end is None:
                return
            at, zeros = _next_header(file, end)
            if problem := _gap_problem(end, at, size, zeros=zeros):
                damaged += 1
                yield None, problem
            if damaged > _MOST_DAMAGED and at is not None:
                yield None, f"the tar is damaged in more than {_MOST_DAMAGED} places: from byte {at} on it is not read"
                return


# Exceptions of tarfile on broken headers, which may lead to reads of negative or huge size, or to endless recursion.
_TAR_ERRORS = (tarfile.TarError, ValueError, EOFError, LookupError, ArithmeticError, MemoryError, RecursionError)
_MOST_DAMAGED = 1000
"""Headers that lead from one to the next are refused anew at each of them, which takes a moment each time."""
_END_MARK = 1024 + 10240  # two zero blocks, padded to a record of 10 KiB


def _whole_members(file: IO[bytes], at: int, size: int) -> Generator[tuple[tarfile.TarInfo, str], None, int | None]:
    """Yield the members from the header at `at` on; return the offset of the first non-header, None if one is cut."""
    file.seek(at)
    with suppress(*_TAR_ERRORS), tarfile.open(fileobj=file, mode="r:", errorlevel=0) as tar:
        while member := tar.next():
            end = min(tar.offset, member.offset_data + member.size)
            # An impossible size: the header is treated as broken.
            if member.size < 0 or tar.offset <= at or (end > size and member.size > MAX_BYTES):
                break
            if end > size:
                yield member, f"the tar is cut: it ends {end - size} bytes before the end of this file"
                return None
            yield member, ""
            at = tar.offset
    return at


def _next_header(file: IO[bytes], at: int) -> tuple[int | None, bool]:
    """Offset of the next header behind the block at `at`, None if none, and whether all bytes up to it are zero."""
    file.seek(at)
    start, zeros = at, True
    while chunk := file.read(2**20):
        for magic in re.finditer(rb"ustar", chunk):
            header = magic.start() - 257
            if header % 512 == 0 and start + header > at and _is_header(chunk[header : header + 512]):
                return start + header, zeros and chunk[:header] == bytes(header)
        zeros = zeros and chunk == bytes(len(chunk))
        start += len(chunk)
    return None, zeros


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except tarfile.TarError:
        return False


def _gap_problem(at: int, next_header: int | None, size: int, *, zeros: bool) -> str:
    """What is wrong with the bytes from `at` to the next header, or to the end; "" for a valid end mark."""
    length = (size if next_header is None else next_header) - at
    if next_header is None and length < 512:
        return f"the tar has no end mark: it may have been cut at byte {size}"
    if zeros and length <= _END_MARK and (next_header is None or length >= 1024):
        return ""  # with a header behind it, this is one tar behind another
    if next_header is not None:
        return f"the tar is damaged at byte {at}: {length} bytes are lost, up to the next whole header"
    if zeros:
        return f"the tar ends in {length} zero bytes from byte {at} on: it may be an unfinished download"
    return f"the tar is damaged at byte {at}: what follows is lost" if at else "not a tar: download it again"


def advice_for_folder(folder: Path) -> str:
    """What a folder without tars holds, and what to do about it."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    content = f", but {filetypes.summarize_counts(map(filetypes.skip_category, names))}" if names else ""
    if tar_like := next((name for name in names if ".tar" in name.lower()), ""):
        return f"{content}: unpack {tar_like}, join its parts into a .tar, or rename it to end in .tar"
    if inner := next(iter(sorted(folder.glob("*/*.tar")) or sorted(folder.glob("*/*/*.tar"))), None):
        return f"{content}, but {inner.relative_to(folder)} below it: give {folder}/**/*.tar"
    return f"{content}; for photographs in a folder use `photos`"
