"""Location of an input: a path on this machine, or a URL that fsspec reads by byte ranges (https, s3, gs, memory, ...).

fsspec is optional: a path never imports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from distill.core.addresses import public

# The headers of a tar are about 1 MB apart: with fsspec's default read-ahead of 5 MB, listing a tar would fetch it all.
_BLOCK = 2**16


MOST_NAMES = 1_000_000
"""The most names that one pattern may expand to."""


def expand(pattern: str) -> list[str]:
    """Expand `sa_{000..017}.tar` to every name and `{a,b}` to both, each once; braces may be nested and repeated.

    Raises ValueError for a pattern of more than MOST_NAMES names, before they are all in memory, and for a range that
    counts down.
    """
    names = list(islice(_expanded(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise ValueError(f"{pattern}: expands to more than {MOST_NAMES:,} names; use a narrower pattern")
    return list(dict.fromkeys(names))  # the inner of nested braces are expanded first, once for each outer name


def _expanded(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", braces[1])
    options: Iterable[str] = braces[1].split(",")
    if span:
        if int(span[1]) > int(span[2]):
            raise ValueError(f"{pattern}: {{{braces[1]}}} counts down: write the smaller number first")
        options = (str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1))
    for option in options:
        yield from _expanded(pattern[: braces.start()] + option + pattern[braces.end() :])


def is_url(name: str | Path) -> bool:
    """Whether `name` is an address (https://..., s3://..., memory://...) and not a path."""
    return isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://", name) is not None


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the name inside it; ValueError says what to install."""
    try:
        import fsspec.core
    except ImportError as error:
        raise ValueError(f'{public(url)}: a URL needs pip install "depth-distill[urls]"') from error
    try:
        system, inside = fsspec.core.url_to_fs(url)
        return system, inside
    except (ImportError, ValueError) as error:
        raise ValueError(public(f"{url} cannot be opened: {error}")) from error


def find_urls(patterns: Iterable[str], what: str) -> list[str]:
    """Every URL that the patterns (braces, `*`) match, each once; FileNotFoundError for a pattern without a match."""
    urls: dict[str, None] = {}
    for url in (name for pattern in patterns for name in expand(pattern)):
        system, inside = file_system(url)
        try:
            names = sorted(system.glob(inside)) if "*" in inside else [inside] if system.exists(inside) else []
        except OSError as error:
            raise OSError(error.errno, public(f"{url} cannot be reached: {error}")) from error
        if not names:
            raise FileNotFoundError(f"{public(url)}: no such {what}; check the address in [images]")
        # A file system whose addresses hold a user and a host (ftp, sftp) gives neither back.
        keeps_address = "*" not in inside and "@" in urlsplit(url).netloc
        urls.update((url if keeps_address else str(system.unstrip_protocol(name)), None) for name in names)
    return list(urls)


def open_place(place: Path | str) -> IO[bytes]:
    """A file to read and seek in; the caller closes it. Raises OSError."""
    if isinstance(place, Path):
        return place.open("rb")
    system, inside = file_system(place)
    file: IO[bytes] = system.open(inside, "rb", block_size=_BLOCK)
    return file


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of each (offset, size) of a file, which is opened once; fewer at its end. Raises OSError."""
    with path.open("rb") as file:
        for offset, size in ranges:
            file.seek(offset)
            yield file.read(size)


def read_range(place: Path | str, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset`; fewer at the end of the file. Raises OSError."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    system, inside = file_system(place)
    return bytes(system.cat_file(inside, start=offset, end=offset + size))
