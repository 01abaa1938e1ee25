"""What a person sees: lines, tables and progress on the terminal. The only file that draws.

Results go to standard output, everything else (progress, notes, errors) to standard error, so that output can be piped.
Only the first process of several speaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

_quiet = os.environ.get("RANK", "0") != "0"
# A pipe has no width: tables must not be folded to the 80 columns that rich then assumes.
_out = Console(quiet=_quiet, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, quiet=_quiet, soft_wrap=True)


class Report(Protocol):
    """How long work tells where it is: `report(done, total, images_per_s=12.5)`."""

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Called as often as the work likes; drawing is limited to a few times a second."""
        ...


def say(text: str) -> None:
    """One line of result."""
    _out.print(escape(text), highlight=False)


def note(text: str) -> None:
    """One line about what is being done."""
    _err.print(f"[dim]{escape(text)}[/dim]", highlight=False)


def fail(text: str) -> None:
    """What went wrong, a line per fault."""
    for line in text.splitlines() or ["failed"]:
        _err.print(f"[bold red]error:[/bold red] {escape(line)}", highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, best: Sequence[set[str]] = ()) -> None:
    """A table on standard output; `best[row]` names the columns to embolden in that row."""
    drawn = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for i, row in enumerate(rows):
        marked = best[i] if i < len(best) else set()
        cells = [
            escape(c) if name not in marked else f"[bold]{escape(c)}[/bold]"
            for name, c in zip(columns, row, strict=True)
        ]
        drawn.add_row(*cells)
    _out.print(drawn)


def _words(numbers: dict[str, float]) -> str:
    return "  ".join(_word(name, value) for name, value in numbers.items())


def _word(name: str, value: float) -> str:
    """One number for people; "bytes" in its name makes it a size, a trailing "_s" a time."""
    label = name.replace("_", " ").replace(" per ", "/").removesuffix(" bytes").removeprefix("bytes")
    if "bytes" in name:
        power = next((p for p in range(4) if abs(value) < 1000 ** (p + 1)), 4)
        scaled, unit = value / 1000**power, ("B", "kB", "MB", "GB", "TB")[power]
        return f"{scaled:.3g} {unit}{label}" if label.startswith("/") else f"{label} {scaled:.3g} {unit}"
    if name.endswith("_s") and not name.endswith("per_s"):
        return f"{label.removesuffix(' s')} {int(value // 3600)}:{int(value % 3600 // 60):02d}:{int(value % 60):02d}"
    return f"{label} {value:,.0f}" if abs(value) >= 1000 else f"{label} {value:.4g}"


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A progress bar with time remaining and the work's numbers; off a terminal, one plain line at the end."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[numbers]}[/dim]"),
        console=_err,
        refresh_per_second=4,
        disable=not _err.is_terminal,
    )
    last: tuple[int, int, dict[str, float]] | None = None
    with bar:
        task = bar.add_task(what, total=None, numbers="")

        def report(done: int, total: int, **numbers: float) -> None:
            nonlocal last
            last = (done, total, numbers)
            bar.update(task, completed=done, total=total, numbers=_words(numbers))

        yield report
    if last is not None and not _err.is_terminal:
        note(f"{what}: {last[0]}/{last[1]}  {_words(last[2])}")
