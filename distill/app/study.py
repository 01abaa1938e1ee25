"""An ablation as a file: a base recipe, the axes that vary, the paper's numbers, and the orderings it claims.

    name, title, source
    [full], [bench]      the study at two scales, or one of them at any: base recipe, seeds, columns, set: overrides for
                         every row; "{seed}" in one is the cell's seed
                         a column is a metric of a benchmark (benchmark, group, metric) or a loss of the training log
                         (log, relative_to); it has a name
    [[axes]]             choices with a name and what each sets; the rows are the product, named "choice/choice"
    [[rows]]             or rows one by one
    [[paper]]            row, values: the paper's, one per column of `full`; model, table: its row in eval/papers.toml
    equivalence          rows whose relative difference lies within it are equal; stated before anything runs
    [[orderings]]        claim in words, kind (distill.eval.verdict), first, second or a bound; metrics: the only ones
                         that it is judged by

A cell is a row with a seed. Its address is a hash of everything that determines it, so that studies share cells.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill.app.recipe import Recipe, as_table, parse, trusted
from distill.app.strict import RecipeError, parse_into, read_toml, set_key, set_value
from distill.core.plugins import file_hashes, find
from distill.eval.metrics import METRICS
from distill.eval.tasks import TASKS
from distill.eval.verdict import BOUNDED, CLAIMS

EDGES, RECALL, ORDER = "boundary_f1", "boundary_recall", "accuracy"
KNOWN = {**METRICS, **{name: TASKS[name].rows[name] for name in (EDGES, RECALL)}, ORDER: TASKS["order"].rows[ORDER]}
"""What a column may show. boundary_f1 needs a benchmark of edges or one with edges = true, boundary_recall one of
mattes, accuracy one of point pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One number of a table: a metric of a benchmark, of all its images or of one of its groups; or a loss of the log.

    log: the path of a number in the lines of log.jsonl: "heldout", "heldout_parts.mae"; the last line that has it
    counts.
    relative_to: "start" divides it by the value in the first line, which is the untrained network's with
    `train.eval_start`.
    """

    benchmark: str = ""
    metric: str = "abs_rel"
    group: str = ""
    name: str = ""
    log: str = ""
    relative_to: Literal["", "start"] = ""

    def __post_init__(self) -> None:
        if bool(self.log) == bool(self.benchmark):
            raise ValueError("a column shows a benchmark or a number of the log: give benchmark or log")
        if self.benchmark and self.relative_to:
            raise ValueError("relative_to needs log")
        if self.metric not in KNOWN:
            raise ValueError(f"no metric {self.metric!r}; there are {', '.join(KNOWN)}")

    @property
    def title(self) -> str:
        """The column's heading."""
        if self.log:
            return self.name or f"{self.log}{f' / its {self.relative_to}' if self.relative_to else ''}"
        return self.name or f"{self.group or self.benchmark} {self.metric}"

    @property
    def measure(self) -> str:
        """What claims are judged by: the metric, its columns taken together, or this column of the log."""
        return self.title if self.log else self.metric

    @property
    def lower_is_better(self) -> bool:
        """Whether the number is an error; a loss is one."""
        return bool(self.log) or KNOWN[self.metric].lower_is_better

    @property
    def scores(self) -> tuple[str, ...]:
        """Possible names of the score file, without suffix; edges are scored beside depth or alone."""
        edges = (f"{self.benchmark}.edges--student",) if self.metric == EDGES else ()
        return (*edges, f"{self.benchmark}--student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """The study at one scale. base: a recipe beside the study. set: keys for every row. seeds: values of `seed_key`."""

    base: str
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_key: str = "train.seed"
    columns: tuple[Column, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A value of an axis, or a row: its name and the keys it sets, in both versions or in one only."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Something that varies: a `key` with `values`, or `choices` that set several keys."""

    name: str
    key: str = ""
    values: tuple[Any, ...] = ()
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.key and self.values) == bool(self.choices):
            raise ValueError("an axis needs a key with values, or choices")

    def all(self) -> tuple[Choice, ...]:
        """The choices; a choice made from a value is named after it."""
        return self.choices or tuple(Choice(name=str(v), set={self.key: v}) for v in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The paper's numbers of a row, one per column of `full`.

    model, table: its row in eval/papers.toml, by its model, and by its table if that is not the study's own.
    """

    row: str
    values: tuple[float, ...]
    model: str = ""
    table: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordering:
    """A claim: in words, and as distill.eval.verdict.judge takes it. source: where it is claimed.

    bound: for "below" and "above", instead of second. metrics: the metrics, or names of log columns, by which it is
    judged; all by default.
    """

    claim: str
    kind: str
    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    bound: float = 0.0
    metrics: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in CLAIMS:
            raise ValueError(f"kind must be one of {', '.join(CLAIMS)}, not {self.kind!r}")
        bounded = self.kind in BOUNDED
        if bounded != (self.bound > 0) or bounded == bool(self.second):
            raise ValueError(f"{self.kind} takes {'a bound above 0 and no' if bounded else 'no bound and a'} second")
        if self.kind == "gap_grows" and len(self.first) != len(self.second):
            raise ValueError("gap_grows compares rows pairwise: first and second must have the same length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One ablation; see the module's docstring. equivalence: rows whose relative difference is within it are equal."""

    name: str
    title: str
    full: Version
    bench: Version
    source: str = ""
    equivalence: float = 0.05
    axes: tuple[Axis, ...] = ()
    rows: tuple[Choice, ...] = ()
    paper: tuple[Published, ...] = ()
    orderings: tuple[Ordering, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.axes) == bool(self.rows):
            raise ValueError("a study needs axes or rows")
        names = [row.name for row in self.all_rows()]
        referenced = [p.row for p in self.paper] + [r for o in self.orderings for r in (*o.first, *o.second)]
        unknown = sorted({row for row in referenced if row not in names})
        if unknown:
            raise ValueError(f"no row {', '.join(unknown)}; the rows are {', '.join(names)}")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rows named twice: {', '.join(repeated)}; give each its own name")
        shown = list(dict.fromkeys(column.measure for column in (*self.bench.columns, *self.full.columns)))
        if missing := [metric for o in self.orderings for metric in o.metrics if metric not in shown]:
            raise ValueError(f"no column shows {', '.join(missing)}; columns show {', '.join(shown)}")

    def version(self, name: Literal["full", "bench"]) -> Version:
        """The study at one of its scales."""
        return self.full if name == "full" else self.bench

    def all_rows(self) -> tuple[Choice, ...]:
        """The rows in order."""
        if self.rows:
            return self.rows
        rows = []
        for choices in itertools.product(*(axis.all() for axis in self.axes)):
            name = "/".join(choice.name for choice in choices)
            rows.append(
                Choice(
                    name=name,
                    set=_merged(c.set for c in choices),
                    full=_merged(c.full for c in choices),
                    bench=_merged(c.bench for c in choices),
                )
            )
        return tuple(rows)


@dataclass(frozen=True, slots=True)
class StudyCell:
    """One training of a study: a row with a seed, its recipe, and its folder, which is named by its address."""

    row: str
    seed: int
    recipe: Recipe
    folder: Path


def read_study(path: Path | str) -> Study:
    """The study in the file `path`. Raises RecipeError with one line per fault."""
    table = read_toml(Path(path))
    only = [name for name in ("full", "bench") if name in table]
    copied = {"full", "bench"} - set(only) if only else set()
    try:
        return parse_into(Study, table | {name: table[only[0]] for name in copied}, where=str(path))
    except RecipeError as error:  # the faults of a copy are those of what was written
        lines = str(error).splitlines()
        of_copy = re.compile(rf"\b({'|'.join(copied) or '(?!)'})\.")
        raise RecipeError(
            "\n".join(line for line in lines if not of_copy.search(line.removeprefix(str(path))))
        ) from None


def cells(
    study: Study, path: Path, version: Literal["full", "bench"], out: Path, overrides: Sequence[str]
) -> list[StudyCell]:
    """Every cell, seeds innermost; `overrides` ("train.steps=10") are applied last. Raises RecipeError."""
    chosen = study.version(version)
    base = read_toml(path.parent / chosen.base)
    study_cells = []
    for row in study.all_rows():
        for seed in chosen.seeds:
            table = copy.deepcopy(base)
            version_set = row.full if version == "full" else row.bench
            for key, value in {**chosen.set, **row.set, **version_set, chosen.seed_key: seed}.items():
                value = value.replace("{seed}", str(seed)) if isinstance(value, str) else value
                set_value(table, key, value, where=f"{path}, row {row.name}: ")
            for assignment in overrides:
                set_key(table, assignment)
            table["run"] |= {"name": f"{study.name}: {row.name}, seed {seed}", "out": ""}
            table.setdefault("labels", {})["root"] = str(out / "labels")
            recipe = trusted(parse(table, where=f"{path}, row {row.name}"))
            _check_columns(chosen.columns, recipe, f"{path}, row {row.name}")
            folder = out / "cells" / _address(recipe)
            recipe = replace(recipe, run=replace(recipe.run, out=str(folder)))
            study_cells.append(StudyCell(row.name, seed, recipe, folder))
    return study_cells


def _check_columns(columns: Sequence[Column], recipe: Recipe, where: str) -> None:
    """Raises RecipeError for a column that a cell's scores will not have: else it shows only after every cell ran."""
    asked = {spec.alias_or_name: spec for spec in recipe.benchmarks}
    for column in (column for column in columns if column.benchmark):
        spec = asked.get(column.benchmark)
        if spec is None:
            there_are = f"there are {', '.join(asked)}" if asked else "it has none"
            raise RecipeError(f"{where}: a column shows {column.benchmark}, no benchmark of the recipe; {there_are}")
        rows = list(TASKS[find("distill.eval.benchmarks", spec.name).PROTOCOL.task].rows)
        if column.metric in rows or (column.metric == EDGES and spec.edges):
            continue
        way_out = f"set edges = true in its [[benchmarks]], or show {rows[0]}" if column.metric == EDGES else ""
        way_out = way_out or f"it has {', '.join(rows)}"
        raise RecipeError(f"{where}: {column.benchmark} is not scored by {column.metric}; {way_out}")


def _merged(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for table in tables for key, value in table.items()}


def _address(recipe: Recipe) -> str:
    table = as_table(recipe)
    table["run"] = {key: value for key, value in table["run"].items() if key not in ("name", "out")}
    table["labels"].pop("root")
    table |= {"files": files} if (files := file_hashes(table)) else {}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]
