"""How the files of a published benchmark are called, and lists of them as people have them.

A list may have Windows' line ends and backslashes, commas between its columns, "./" before its names, or the absolute
paths of the machine that it was written on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from distill.core.files import leaves_root
from distill.data.pairs import table_text

ListRow = tuple[str, ...]
Rows = list[ListRow]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a published benchmark on disk.

    archive: the published archive, relative to the folder of all of them. columns: the number of columns of the
    published list that name files. row: name -> the files of one image (rgb first) if `name` is the file that defines
    an image, else None. strip: an optional prefix of every name in a list. size: name -> the required number of bytes,
    None if unknown. parts: group -> its number of images and the hash of their list. shape: the layout in words.
    canonical: a file's name as its own host ships it -> the name in the published archive, None for any other.
    """

    archive: str
    columns: int
    row: Callable[[str], ListRow | None]
    strip: str = ""
    size: Callable[[str], int | None] = lambda _: None
    parts: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    shape: str = ""
    canonical: Callable[[str], str | None] = lambda _: None

    def rows(self, names: set[str]) -> tuple[Rows, Rows]:
        """The rows whose files all exist, and those that lack one, both sorted."""
        rows = sorted(row for name in names if (row := self.row(name)) is not None)
        return [row for row in rows if names.issuperset(row)], [row for row in rows if not names.issuperset(row)]


def read_list(path: Path | str, layout: FileLayout, there: Callable[[], Iterable[str]] = tuple) -> Rows:
    """The rows of a list in the published columns, cut to those that name files; reports all faults at once.

    A layout of one column takes a list of images, whose other files follow from the layout. A file `None` stands for
    "no truth": such rows are left out. there: the names of all files; an absolute path becomes its longest end among
    them that has a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list")
    rows, faults = [], []
    seen: set[str] = set()
    is_there = _known_ends(layout, there)
    for number, line in enumerate(table_text(path).splitlines(), 1):
        row = tuple(_name(word, layout, is_there) for word in _words(line, layout.columns))
        if not row:
            continue
        if layout.columns == 1:
            row = layout.row(row[0].removeprefix(layout.strip)) or ()
        if fault := _fault(row, layout.columns, seen):
            faults.append(f"line {number} {fault}")
        seen.add(row[0] if row else "")
        rows.append(row)
    if faults or not rows:
        raise ValueError(f"{path}: " + ("; ".join(faults[:5]) if faults else "the list is empty"))
    return [row for row in rows if "None" not in row]


def _words(line: str, columns: int) -> list[str]:
    """The cells of a line that name files: separated by white space, or else by commas. One name may hold spaces."""
    if columns == 1:
        return [line.strip()] if line.strip() else []
    words = line.split()
    if any(word.endswith(",") for word in words[:columns]) or 0 < len(words) < columns:
        words = line.replace(",", " ").split()
    return words[:columns]


def _name(word: str, layout: FileLayout, is_there: Callable[[str], bool]) -> str:
    """A cell as a name below the root; an absolute path that cannot be one stays as it is."""
    name = word.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    if leaves_root(name) != leaves_root("/"):
        return name
    if called := layout.canonical(name):
        return called
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(1, len(parts) - 1))
    return next((end for end in ends if is_there(end)), name)


def _known_ends(layout: FileLayout, there: Callable[[], Iterable[str]]) -> Callable[[str], bool]:
    """Whether a name, folder included, is the end of a file's; for lists of images alone, whether it is an image's."""

    @cache
    def ends() -> set[str]:
        parts = [name.split("/") for name in there()]
        return {"/".join(part[start:]) for part in parts for start in range(len(part) - 1)}

    if layout.columns == 1:
        return lambda name: layout.row(name.removeprefix(layout.strip)) is not None
    return lambda name: name in ends()


def _fault(row: ListRow, columns: int, seen: set[str]) -> str:
    """What is wrong with a row of a list, or ""."""
    if not row:
        return "names no image"
    if len(row) < min(columns, 2):
        return f"has {len(row)} of {columns} columns"
    if outside := next((f"leaves the root ({name}: {why})" for name in row if (why := leaves_root(name))), ""):
        return outside
    if columns > 1 and not PurePosixPath(row[0]).suffix:
        return f"begins with {row[0]}, not the path of an image file"
    if row[0] in seen:
        return f"repeats {row[0]}"
    return f"has {len(row)} of {columns} columns" if len(row) < columns else ""
