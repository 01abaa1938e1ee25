"""Terminal output: lines, tables and progress. The only file that draws.

Results go to standard output, everything else (progress, notes, errors) to standard error, so that output can be piped.
Of several processes only the first prints, and others only the fault that ends them. With `--json` every line of either
is a JSON object.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.markup import escape as _markup
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill.core.addresses import public
from distill.core.printable import printable
from distill.core.progress import Report

_quiet = os.environ.get("RANK", "").strip() not in ("", "-1", "0")
# A service or a scheduler may start the process with closed streams: its output is then discarded.
sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  (open until the process ends)
sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
# A pipe has no width: tables must not be folded to the 80 columns that rich then assumes.
_out = Console(quiet=_quiet, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, quiet=_quiet, soft_wrap=True)
_notes = True
_json = False

EVERY_S = 30.0
"""Seconds between progress lines where the output is not a terminal."""


def escape(text: str) -> str:
    """Escapes text so that rich prints it verbatim: no markup, no control characters, no passwords in addresses."""
    return _markup(printable(public(text), keep="\n\t"))


def say(text: str, **values: Any) -> None:
    """Prints one line of results; values: the same as plain values, for `--json`."""
    if _json:
        _object(_out, values or {"said": text})
    else:
        _out.print(escape(text), highlight=False)


def note(text: str) -> None:
    """Prints one line about what is being done."""
    if _notes and _json:
        _object(_err, {"note": text})
    elif _notes:
        _err.print(f"[dim]{escape(text)}[/dim]", highlight=False)


def values(**values: Any) -> None:
    """With `--json`, prints the unrounded values of a result that is otherwise shown in a table."""
    if _json:
        _object(_out, values)


def _public_text(value: object) -> str:
    return str(public(str(value)))


def _object(console: Console, values: Mapping[str, Any]) -> None:
    """A JSON object on one line; what is not finite is null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in public(values).items()
    }
    console.print(
        json.dumps(plain, default=_public_text),
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )


def quiet(on: bool = True) -> None:
    """Turns notes and progress off, or on again; results and errors are always printed."""
    global _notes
    _notes = not on


def as_json(on: bool = True) -> None:
    """Makes every line a JSON object, or plain text again: results to standard output, all else to standard error."""
    global _json
    _json = on


def fail(text: str) -> None:
    """Prints what went wrong, a line per fault."""
    for line in text.splitlines() or ["failed"]:
        if _json:
            _object(_err, {"error": line})
        else:
            _err.print(f"[bold red]error:[/bold red] {escape(line)}", highlight=False)


ALONE_S = 2.0
"""Seconds in which a launcher ends the other processes after the first one's fault."""


def fail_and_end(text: str) -> None:
    """`fail` before this process ends: with its number where it is not the first one, whose own fault this may be.

    A fault that all processes have is printed once: the launcher ends the others while they wait here.
    """
    if _quiet:
        time.sleep(ALONE_S)
        _err.quiet = False
        text = "\n".join(f"process {os.environ['RANK']}: {line}" for line in text.splitlines())
    fail(text)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    best: Sequence[set[str]] = (),
    text: bool = False,
) -> None:
    """Prints a table; `best[row]` names the columns to embolden in that row; text: words, not numbers."""
    if _json:
        paired_rows = [[*zip(columns, row, strict=True)] for row in rows]
        _object(_out, {"table": title, "rows": [{key: cell for key, cell in row} for row in paired_rows]})
        return
    rich_table = Table(title=escape(title), title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        # A wrapped name or path cannot be copied: columns without spaces are not wrapped.
        one_word = text and all(" " not in row[i] for row in rows)
        justify: JustifyMethod = "left" if i == 0 or text else "right"
        rich_table.add_column(escape(column), justify=justify, overflow="fold", no_wrap=one_word)
    for i, row in enumerate(rows):
        marked = best[i] if i < len(best) else set()
        cells = [
            escape(c) if name not in marked else f"[bold]{escape(c)}[/bold]"
            for name, c in zip(columns, row, strict=True)
        ]
        rich_table.add_row(*cells)
    width = _out.width
    try:
        if text:
            _out.width = max(width, Measurement.get(_out, _out.options.update(max_width=10_000), rich_table).minimum)
        _out.print(rich_table)
    finally:
        _out.width = width


def _words(numbers: dict[str, float]) -> str:
    return "  ".join(_word(name, value) for name, value in numbers.items())


def _word(name: str, value: float) -> str:
    """Formats one number; "bytes" in its name makes it a size, a trailing "_s" a duration."""
    label = name.replace("_", " ").replace(" per ", "/").removesuffix(" bytes").removeprefix("bytes")
    if "bytes" in name:
        power = next((p for p in range(4) if abs(value) < 1000 ** (p + 1)), 4)
        scaled, unit = value / 1000**power, ("B", "kB", "MB", "GB", "TB")[power]
        return f"{scaled:.3g} {unit}{label}" if label.startswith("/") else f"{label} {scaled:.3g} {unit}"
    if name.endswith("_s") and not name.endswith("per_s") and math.isfinite(value):
        return f"{label.removesuffix(' s')} {int(value // 3600)}:{int(value % 3600 // 60):02d}:{int(value % 60):02d}"
    if name == "data_wait":
        return f"{label} {100 * value:.1f} %"
    digits = ".3g" if name.endswith("per_s") else ".4g"
    return f"{label} {value:,.0f}" if abs(value) >= 1000 else f"{label} {value:{digits}}"


def _bar(*, eta: bool = True) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *([TimeRemainingColumn(compact=True)] if eta else []),
        TextColumn("[dim]{task.fields[numbers]}[/dim]"),
        console=_err,
        refresh_per_second=4,
        disable=not (_err.is_terminal and _notes),
    )


class _Lines:
    """Progress without a terminal: a line every EVERY_S seconds, and one at the end."""

    def __init__(self, what: str, *, eta: bool = True) -> None:
        self._title, self._eta = what, eta
        self._began = self._last_line_at = time.monotonic()
        self._first_done: int | None = None
        self._last_report: tuple[int, int, dict[str, float]] | None = None
        self._needs_last_line = True

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        if self._first_done is None:
            self._first_done, self._began = done, time.monotonic()
        self._last_report = (done, total, numbers)
        now = time.monotonic()
        self._needs_last_line = now - self._last_line_at < EVERY_S or done < total
        if now - self._last_line_at >= EVERY_S:
            self._last_line_at = now
            pace = self._pace(done, total, now)
            if "images_per_s" in numbers:
                pace.pop("items_per_s", None)
            self._write(done, total, pace | _without_eta(numbers))

    def _write(self, done: int, total: int, numbers: dict[str, float]) -> None:
        if _json and _notes:
            _object(_err, {"progress": self._title, "done": done, "total": total, **numbers})
        elif not _json:
            note(f"{self._title}: {done}/{total}  {_words(numbers)}".rstrip())

    def _pace(self, done: int, total: int, now: float) -> dict[str, float]:
        """Items per second and remaining seconds; items that were done before the start are not counted."""
        since, seconds = done - (self._first_done or 0), now - self._began
        if since <= 0 or seconds <= 0:
            return {}
        pace = {"items_per_s": since / seconds}
        return pace | ({"eta_s": (total - done) * seconds / since} if self._eta and total > done else {})

    def close(self) -> None:
        """Writes the last line, without a rate, which the work's own numbers include."""
        if self._last_report is not None and self._needs_last_line:  # unless the last report was written as it came
            done, total, numbers = self._last_report
            self._write(done, total, _without_eta(numbers))


def _without_eta(numbers: Mapping[str, float]) -> dict[str, float]:
    """Drops the work's own ETA, which counts from its start, model loading included: far too long after one image."""
    return {name: value for name, value in numbers.items() if name != "eta_s"}


@contextmanager
def progress(what: str, *, eta: bool = True) -> Iterator[Report]:
    """A progress bar with remaining time and the work's numbers; without a terminal, a line every EVERY_S seconds.

    eta: False where others share the work, whose pace this process does not know.
    """
    if _json or not _err.is_terminal:
        lines = _Lines(what, eta=eta)
        yield lines
        lines.close()
        return
    with _bar(eta=eta) as bar:
        task = bar.add_task(escape(what), total=None, numbers="")

        def report(done: int, total: int, **numbers: float) -> None:
            bar.update(task, completed=done, total=total, numbers=_words(numbers))

        yield report


_SPARKS = "▁▂▃▄▅▆▇█"
_REMEMBERED = 48  # points of the loss curve that are kept


def _curve(values: Sequence[float]) -> str:
    """A line of blocks from the lowest to the highest value."""
    low, high = min(values), max(values)
    return "".join(_SPARKS[round((v - low) / (high - low or 1.0) * (len(_SPARKS) - 1))] for v in values)


def _training(numbers: Mapping[str, float], losses: Sequence[float]) -> Table:
    """A training run's numbers at this step: a line each for loss, its parts, output scale, learning rate and speed."""
    grid = Table.grid(padding=(0, 2))

    def pick(*names: str) -> str:
        return _words({name: numbers[name] for name in names if name in numbers})

    parts = {name.removeprefix("parts/"): value for name, value in numbers.items() if name.startswith("parts/")}
    for head, text in (
        ("loss", f"{pick('loss', 'heldout').removeprefix('loss ')}  {_curve(losses) if losses else ''}"),
        ("parts", _words(parts)),
        ("scale", pick("output_median", "output_deviation", "grad_norm")),
        ("rate", pick("lr", "encoder_lr")),
        ("speed", pick("images_per_s", "data_wait", "memory_bytes")),
    ):
        if text.strip():
            grid.add_row(f"[dim]{head}[/dim]", escape(text))
    return grid


@contextmanager
def dashboard(what: str) -> Iterator[Report]:
    """`progress` for a training run: a live panel with the parts of the loss, the output's scale, rates and speed."""
    if _json or not (_err.is_terminal and _notes):
        with progress(what) as plain:
            yield lambda done, total, **numbers: plain(
                done, total, **{name: value for name, value in numbers.items() if not name.startswith("parts/")}
            )
        return
    bar, losses = _bar(), deque[float](maxlen=_REMEMBERED)
    task = bar.add_task(escape(what), total=None, numbers="")
    with Live(Panel(bar, expand=False), console=_err, refresh_per_second=4) as live:

        def report(done: int, total: int, **numbers: float) -> None:
            bar.update(task, completed=done, total=total)
            if math.isfinite(loss := numbers.get("loss", math.nan)):
                losses.append(loss)
            live.update(Panel(Group(bar, _training(numbers, losses)), expand=False))

        yield report
