"""Index of a data set: a tab-separated file of names, image and depth files, focal lengths and splits.

A walk over hundreds of thousands of files takes minutes on a network disk, so the index is written once and then read.
Groups (scenes, sequences) are appended to a temporary file as they are walked, each followed by an end line; a run that
was killed resumes behind the last complete group, and the finished index is byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.links import unlink_link
from distill.core.plugins import find, short_name
from distill.core.progress import Report
from distill.data.datasets import FOLDER, Group, Row, folders_of

COLUMNS = ("name", "rgb", "depth", "focal", "split")
_END = "#end"
_ENDS = frozenset("\t\n\r")
_OWN = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
"""The data sets of this folder."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """An index that was written. rows: images with depth; alone: images without depth; spare: depth files without an
    image; `examples` and `spare_examples`: the first of these; resumed: groups that an earlier call had finished;
    unlisted: pairs that the authors' own table leaves out.
    """

    path: Path
    rows: int
    groups: int
    alone: int
    examples: tuple[str, ...]
    resumed: int
    spare: int = 0
    spare_examples: tuple[str, ...] = ()
    unlisted: int = 0


def place(name: str, root: Path) -> Path:
    """The default path of a data set's index: INDEX.NAME.tsv in its root."""
    return root / f"INDEX.{short_name(name)}.tsv"


def write(name: str, root: Path, out: Path | None = None, *, report: Report | None = None) -> Indexed:
    """Walks the data set `name` below `root` and writes its index, by default to `place(name, root)`.

    Raises FileNotFoundError where the data set is not found there, ValueError where no image has a depth file or a
    scene lies there twice, LookupError for an unknown name.
    """
    plugin = find(FOLDER, name)
    if not root.is_dir():
        what = "a file, not a folder; unpack it" if root.exists() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; it should hold {plugin.FACTS.title}")
    path = out or place(name, root)
    groups = sorted(set(plugin.groups(root)))
    if not groups:
        raise FileNotFoundError(f"{root}: no files of {plugin.FACTS.title} found there; {_where_instead(plugin, root)}")
    _check_copies(plugin, root, groups)
    aside = files.temporary_name(path)
    with files.raising_write_errors(path), files.only_writer(path):
        unlink_link(aside)
        done = _finished_groups(aside, root, groups)
        with aside.open("a", encoding="utf-8", newline="") as file:
            if not done:
                file.write(f"#root\t{root.resolve()}\n")
            for number, group in enumerate(groups):
                if group not in done:
                    file.write(_lines(group, plugin.rows(root, group)))
                    file.flush()
                if report:
                    report(number + 1, len(groups))
        return _finish(path, aside, groups, len(done), partial(_no_pair, plugin, root))


def _check_copies(plugin: Any, root: Path, groups: Sequence[str]) -> None:
    """Raise ValueError where a scene lies in two folders: its images, or smaller ones, would be used twice."""
    seen: dict[str, str] = {}
    for group in groups if hasattr(plugin, "scene") else ():
        if (first := seen.setdefault(plugin.scene(group), group)) != group:
            raise ValueError(
                f"{root}: {first} and {group} are one scene, perhaps in two resolutions: move one of the folders away"
            )


def _no_pair(plugin: Any, root: Path, alone: Sequence[str], spare: Sequence[str], unlisted: int) -> ValueError:
    """The error for images without any depth file, or the reverse: probably an archive was not unpacked."""
    if unlisted:
        return ValueError(f"{root}: the authors' table of released images leaves out all {unlisted} that are here")
    first = next(iter([*alone, *spare]), "")
    if not first:  # only folders of the right names
        return ValueError(f"{root}: no files of {plugin.FACTS.title} found there; {_where_instead(plugin, root)}")
    return ValueError(
        f"{root}: images of {plugin.FACTS.title} without depth, or depth without images (such as {first}), but no "
        f"pairs: unpack the other archive too; {_layout(plugin)}"
    )


def _layout(plugin: Any) -> str:
    """`its layout is: SCENE/...`: the layout in a plug-in's docstring, without its summary line."""
    parts = (plugin.__doc__ or "").strip().partition("\n\n")
    return f"its layout is: {textwrap.shorten(parts[2] or parts[0], 300, placeholder=' ...')}"


def _where_instead(plugin: Any, root: Path) -> str:
    """A hint: where the data set lies instead, what lies here, which archive to unpack, or the expected layout."""
    looked = root.resolve()
    if inside := next((inner for inner in _subfolders(looked) if _holds(plugin, inner, inner)), None):
        return f"it is in {inside}: give that folder"
    if above := next((above for above in looked.parents[:2] if _holds(plugin, above, looked)), None):
        return f"it is a part of the data in {above}: give that folder"
    if other := next((name for name in _OWN if _holds(find(FOLDER, name), looked, looked)), None):
        return f"it is {find(FOLDER, other).FACTS.title}: `distill index {other} {root}`"
    packed = next(filter(None, map(_packed, [looked, *_subfolders(looked)])), [])
    if packed:
        others = f" and {len(packed) - 1} more" if packed[1:] else ""
        return f"{packed[0].relative_to(looked)}{others} should be unpacked; {_layout(plugin)}"
    return _layout(plugin)


def _packed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".zip", ".tar", ".gz", ".7z"))


def _holds(plugin: Any, root: Path, within: Path) -> bool:
    """Whether any of the first three groups of `root` that lie in the folder `within` has rows."""
    groups = (group for group in plugin.groups(root) if (root / group).is_relative_to(within))
    return any(plugin.rows(root, group).rows for group in islice(groups, 3))


def _subfolders(folder: Path) -> Iterator[Path]:
    """Subfolders, three levels deep, breadth first: at most 20 of each folder and 100 per level."""
    level = [folder]
    for _ in range(3):
        level = [inner for outer in level for inner in islice(folders_of(outer), 20)][:100]
        yield from level


def _lines(group: str, found: Group) -> str:
    """A group's rows as text, with the line that ends it."""
    text = io.StringIO()
    table = csv.writer(
        text, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar=None, lineterminator="\n"
    )
    for row in found.rows:
        if odd := next((cell for cell in (row.name, row.rgb, row.depth, row.split) if _ENDS & set(cell)), None):
            raise ValueError(f"{odd!r}: a name with a tab or a line break cannot stand in an index: rename it")
        table.writerow([row.name, row.rgb, row.depth, f"{row.focal:.6g}" if row.focal else "", row.split])
    ends = [cell for left in (found.alone, found.spare) for cell in (len(left), *(left[:1] or ("",)))]
    table.writerow([_END, group, len(found.rows), *ends, found.unlisted])
    return text.getvalue()


def _finished_groups(aside: Path, root: Path, groups: Sequence[str]) -> set[str]:
    """The groups that an earlier call finished; an incomplete last one is cut off. Empty if root or groups differ."""
    if not aside.is_file():
        return set()
    text = aside.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if line.startswith(f"{_END}\t") and line.endswith("\n")]
    done = [lines[i].split("\t")[1] for i in ends]
    if not ends or lines[0] != f"#root\t{root.resolve()}\n" or done != list(groups[: len(done)]):
        aside.unlink()
        return set()
    aside.write_text("".join(lines[: ends[-1] + 1]), encoding="utf-8")
    return set(done)


def _finish(
    path: Path,
    aside: Path,
    groups: Sequence[str],
    resumed: int,
    no_pair: Callable[[Sequence[str], Sequence[str], int], Exception],
) -> Indexed:
    """Turn the temporary file into the index, which has rows only; no_pair makes the error where there are none."""
    rows = alone = spare = unlisted = 0
    examples: list[str] = []
    spares: list[str] = []
    seen: set[str] = set()
    with files.writing(path, suffix=".new") as new:
        with new.open("w", encoding="utf-8") as out, aside.open(encoding="utf-8") as file:
            out.write("\t".join(COLUMNS) + "\n")
            for line in file:
                cells = line.rstrip("\n").split("\t")
                if cells[0] == _END:
                    alone += int(cells[3])
                    examples += filter(None, cells[4:5])
                    spare += int("".join(cells[5:6]) or 0)  # an older version's line has no such cell
                    spares += filter(None, cells[6:7])
                    unlisted += int("".join(cells[7:8]) or 0)
                elif not line.startswith("#"):
                    if cells[0] in seen:
                        raise ValueError(f"{path}: two images are called {cells[0]}: remove one copy of the data")
                    seen.add(cells[0])
                    out.write(line)
                    rows += 1
        if not rows:
            aside.unlink()  # the missing files may be there the next time
            raise no_pair(examples, spares, unlisted)
    aside.unlink()
    return Indexed(path, rows, len(groups), alone, tuple(examples[:3]), resumed, spare, tuple(spares[:3]), unlisted)


def read(name: str, root: Path, path: Path | None = None, *, names: Iterable[str] | None = None) -> list[Row]:
    """The rows of an index in its order, or those that `names` lists, in the order of `names`.

    A line of `names` is a name of the index or, as in published lists, the image's path (the first word of the line;
    it may begin with folders above the root). Raises FileNotFoundError without an index, ValueError for a damaged one
    or for unknown names.
    """
    path = path or place(name, root)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such index; `distill index {name} {root}` writes it")
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path}: empty; delete it and run `distill index {name} {root}`")
    return rows if names is None else _choose(path, rows, list(names))


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        head = file.readline().rstrip("\n").split("\t")
        if head != list(COLUMNS):
            raise ValueError(f"{path}: its columns are {', '.join(head)[:80]}, not {', '.join(COLUMNS)}; index again")
        for number, line in enumerate(file, 2):
            cells = line.rstrip("\n").split("\t")
            try:
                name, rgb, depth, focal, split = cells
                if why := files.leaves_root(rgb) or files.leaves_root(depth):
                    raise ValueError(why)
                yield Row(name, rgb, depth, float(focal or 0), split)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is damaged ({error}); index again") from error


def _choose(path: Path, rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    by_name = {row.name: row for row in rows} | {row.rgb: row for row in rows}
    chosen, unknown = [], []
    for name in names:
        word = name.split()[0].replace("\\", "/").removeprefix("./")
        while word not in by_name and "/" in word:
            word = word.partition("/")[2]
        if word in by_name:
            chosen.append(by_name[word])
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{path} has no {', '.join(unknown[:3])} ({len(unknown)} names unknown, {len(rows)} known)")
    return chosen
