"""Every key of a recipe with hostile values, through the loader and the first seconds of the commands."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from distill.app import recipe as recipes_module
from distill.app.strict import read_toml
from tests.chaos.lab import Lab
from tests.chaos.sweep import Counts, sweep
from tests.chaos.trial import trial

DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"a": DEEP}
HOSTILE = [
    *(10**18, -(10**18), 10**400, -1, 0, 1, 3, 2**31 - 1, 0.5, 1e-300, 1e308, float("inf"), float("nan"), True, False),
    *(
        "",
        "\0",
        "..",
        "../../x",
        "/proc/none",
        "x" * 100_000,
        "\x1b[2J",
        "\ud800",
        "{1..100000000}",
        "s3://x/y",
        "a://",
    ),
    *([], [[]], [10**18], [""], {}, {"a": 10**18}, {"": []}, DEEP, [DEEP]),
]
PARTS = {
    name: (typing.get_args(hint) or (hint,))[0]
    for name, hint in typing.get_type_hints(recipes_module.Recipe).items()
    if name != "ignored"
}
COMMANDS = {
    "run": ("label", "train"),
    "images": ("label",),
    "crops": ("label",),
    "teachers": ("label", "score"),
    "labels": ("label",),
    "student": ("train",),
    "loss": ("train",),
    "train": ("train",),
    "benchmarks": ("score",),
    "score": ("score",),
    "compare": ("show",),
}
SECONDS = 5.0
QUICK = ["train.steps=1", "train.warmup_steps=0", "train.val_fraction=0.0"]


def keys() -> list[tuple[str, str]]:
    """(table, key) of every key of a recipe."""
    return [(part, field.name) for part, settings in PARTS.items() for field in dataclasses.fields(settings)]


def changed(table: dict[str, Any], part: str, key: str, value: Any) -> dict[str, Any]:
    """The recipe with another value at a key; in the first of several tables."""
    settings = table.get(part, {})
    if part == "images" and key in ("tars", "photos", "pairs"):
        return {**table, part: [{key: value}]}
    if isinstance(settings, list):
        return {**table, part: [{**(settings[0] if settings else {}), key: value}, *settings[1:]]}
    return {**table, part: {**settings, key: value}}


def command(verb: str, table: dict[str, Any]) -> None:
    """Run the recipe as the command line does, without reading it from a file."""
    from distill.app import commands

    recipe = recipes_module.parse(table, uses=recipes_module.USES.get(verb))
    recipes_module.dumps(recipe)
    work: dict[str, Callable[..., object]] = {
        "label": commands.run_label,
        "train": commands.run_train,
        "score": commands.run_score,
    }
    if verb in work:
        work[verb](recipe)


def tried(base: dict[str, Any], item: tuple[str, str, str, Any]) -> None:
    """Run one command on the recipe with one changed value; the next step discards its output."""
    verb, part, key, value = item
    before = signal.signal(signal.SIGALRM, _enough)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        command(verb, changed(base, part, key, value))
    except _EnoughError:
        pass  # a long training is a valid choice
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _EnoughError(BaseException):
    pass


def _enough(*_: object) -> None:
    raise _EnoughError


def world(lab: Lab) -> dict[str, Any]:
    """The lab's recipe as a table, with a short training; labels, trains and scores it once."""
    table = read_toml(lab.folder / "r.toml", QUICK)
    table["images"] = [{"photos": str(lab.folder / "photos")}]

    def run_all() -> int:
        for verb in ("label", "train", "score"):
            command(verb, table)
        return 0

    done = trial(run_all, limit=300)
    assert done.rc == 0, done.said
    return table


def in_folder(folder: Path, base: dict[str, Any], item: tuple[str, str, str, Any]) -> None:
    """As `tried`, in a folder."""
    os.chdir(folder)  # a path with ".." stays inside the lab
    tried(base, item)


def recipes(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Random keys, each with a random value."""
    base, all_keys = world(lab), keys()
    backup, deep = lab.keep(), lab.folder / "deep" / "er"
    deep.mkdir(parents=True)
    while True:
        items = []
        for _ in range(20):
            (part, key), value = rng.choice(all_keys), rng.choice(HOSTILE)
            verb = rng.choice(COMMANDS.get(part, ("label",)))
            items.append((f"{verb} {part}.{key} = {str(value)[:40]}", (verb, part, key, value)))
        sweep(counts, items, partial(in_folder, deep, base), limit=60)
        lab.back(backup)
        for path in lab.folder.iterdir():
            if path.name not in ("photos", "run", "deep", "r.toml", "sa_0.tar", "sa_1.tar"):
                shutil.rmtree(path, ignore_errors=True)
        yield len(items)
