"""Where an input lies: a path on this machine, or a URL that fsspec reads by byte ranges (https, s3, gs, memory, ...).

fsspec is optional: nothing here imports it for a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

# Headers of a tar lie a megabyte apart: fsspec's usual five of read-ahead would fetch the whole tar to list it.
_BLOCK = 2**16


MOST_NAMES = 1_000_000
"""So many names one pattern may stand for."""


def expand(pattern: str) -> list[str]:
    """`sa_{000..017}.tar` -> every name, `{a,b}` -> both; nested and repeated braces too.

    Raises ValueError for a pattern of more than MOST_NAMES, before they are in memory.
    """
    names = list(islice(_expanded(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise ValueError(f"{pattern}: stands for more than {MOST_NAMES:,} names; name fewer at once")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", braces[1])
    options: Iterable[str] = braces[1].split(",")
    if span:
        options = (str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1))
    for option in options:
        yield from _expanded(pattern[: braces.start()] + option + pattern[braces.end() :])


def is_url(name: str | Path) -> bool:
    """Whether `name` is an address (https://..., s3://..., memory://...) and not a path."""
    return isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://", name) is not None


def file_system(url: str) -> tuple[Any, str]:
    """Fsspec's file system of a URL and the name in it; ValueError naming what to install."""
    try:
        import fsspec.core
    except ImportError as error:
        raise ValueError(f'{url}: a URL needs pip install "depth-distill[urls]"') from error
    try:
        system, inside = fsspec.core.url_to_fs(url)
        return system, inside
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error


def find_urls(patterns: Iterable[str], what: str) -> list[str]:
    """Every address that the patterns (braces, `*`) name, each once; FileNotFoundError for one with nothing there."""
    urls: dict[str, None] = {}
    for url in (name for pattern in patterns for name in expand(pattern)):
        system, inside = file_system(url)
        try:
            names = sorted(system.glob(inside)) if "*" in inside else [inside] if system.exists(inside) else []
        except OSError as error:
            raise OSError(error.errno, f"{url} cannot be reached: {error}") from error
        if not names:
            raise FileNotFoundError(f"{url}: no such {what}; check the address in [images]")
        urls.update((str(system.unstrip_protocol(name)), None) for name in names)
    return list(urls)


def open_place(place: Path | str) -> IO[bytes]:
    """A file to read and seek in; the caller closes it. Raises OSError."""
    if isinstance(place, Path):
        return place.open("rb")
    system, inside = file_system(place)
    file: IO[bytes] = system.open(inside, "rb", block_size=_BLOCK)
    return file


def read_range(place: Path | str, offset: int, size: int) -> bytes:
    """So many bytes from there on; fewer where the file ends. Raises OSError."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    system, inside = file_system(place)
    return bytes(system.cat_file(inside, start=offset, end=offset + size))
