"""What a checkout calls things: recipe keys, switches, keywords and modules, in the old words or in the new ones.

The probe is written in the words of the old layout. Where a checkout does not know a word, the ones beside it here are
tried in turn, and the first that it takes is used: extend these tables as names change.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import tomli_w

# Recipe keys. A key of [[images]] or [[teachers]] is written without its number.
RENAMED: dict[str, tuple[str, ...]] = {
    "images.wheels": ("images.bundled_photos",),
    "crops.draws": ("crops.crops_per_image",),
    "crops.small": ("crops.on_small",),
    "student.start": ("student.init_from",),
    "student.encoder_start": ("student.encoder_init_from",),
    "student.decoder_start": ("student.decoder_init_from",),
    "student.leave_out_frozen_encoder": ("student.exclude_frozen_encoder",),
    "loss.faithful": ("loss.reference_hdn",),
    "train.holdout": ("train.val_fraction",),
    "train.colour": ("train.color_jitter",),
}
# Words that a key takes, where they change too.
RENAMED_VALUES: dict[tuple[str, Any], tuple[Any, ...]] = {
    ("labels.store", "own"): ("as_is",),
    ("labels.sky", "own"): ("teacher",),
}
# Switches of the command line, and the words behind them.
RENAMED_SWITCHES: dict[str, tuple[str, ...]] = {"--write": ("--formats",), "colour": ("color",)}
# Keywords of functions that the probe calls by name.
RENAMED_KEYWORDS: dict[str, tuple[str, ...]] = {
    "faithful": ("reference_hdn",),
    "colour": ("color", "color_jitter"),
    "crop": ("random_resized_crop",),
    "holdout": ("val_fraction",),
    "small": ("on_small",),
}
# Keys of json records: new word -> old word, before they are compared.
RENAMED_RECORDS: dict[str, str] = {}
# Keys of json records that name recipes, hashes of recipes, clocks or commits: not compared.
UNCOMPARED = frozenset(
    (
        "recipe settings sha256 crc32 bytes identity created software made_by images_per_s data_wait seconds memory "
        "cost image_source"
    ).split()
)
# Where the parts of the house were and are. Top folders are looked for below `distill` first.
PLACES: dict[str, tuple[str, ...]] = {
    "annotate": ("distill.labelling.annotate", "distill.annotate"),
    "augment": ("distill.training.augment", "distill.augment"),
    "align": ("distill.core.align", "distill.align"),
    "batched": ("distill.losses.normalize._batched", "distill.normalize._batched"),
    "codec": ("distill.shards.codec", "distill.codec"),
    "crops": ("distill.core.crops", "distill.crops"),
    "crop settings": ("distill.core.crop_settings", "distill.core.crops"),
    "depth": ("distill.core.depth", "distill.depth"),
    "label choice": ("distill.training.label_choice", "distill.training.sampling", "distill.order"),
    "labels": ("distill.core.labels", "distill.labels"),
    "losses": ("distill.losses.losses", "distill.losses", "distill.losses.terms"),
    "sampling": ("distill.training.sampling", "distill.order"),
    "scenes": ("distill.data.scenes", "distill.scenes"),
    "schedule": ("distill.training.schedule", "distill.schedule"),
    "settings": ("distill.training.settings", "distill.training.schedule", "distill.schedule"),
    "shards": ("distill.shards.shards", "distill.shards"),
}


def part(name: str) -> ModuleType:
    """The module that PLACES calls `name`, or a module of a top folder such as "teachers.marigold"."""
    tried = PLACES.get(name, (f"distill.{name}", name))
    for module in tried:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise
    raise LookupError(f"the checkout has none of {', '.join(tried)}: extend PLACES in {__file__}")


def one(place: str, name: str) -> Any:
    """The first `name` in the modules that PLACES calls `place`."""
    for module in PLACES[place]:
        with contextlib.suppress(ModuleNotFoundError):
            if hasattr(found := importlib.import_module(module), name):
                return getattr(found, name)
    raise LookupError(f"the checkout has no {name} in {', '.join(PLACES[place])}: extend PLACES in {__file__}")


def call(function: Callable[..., Any], *given: Any, **keywords: Any) -> Any:
    """`function` with every keyword in the word that its signature has."""
    taken = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return function(*given, **keywords)
    words = {key: (key, *RENAMED_KEYWORDS.get(key, ())) for key in keywords}
    spelt = {next((word for word in words[key] if word in taken), key): value for key, value in keywords.items()}
    return function(*given, **spelt)


class CommandFailed(RuntimeError):
    """A command ended with a code that is not 0; the message has the command and what it said last."""


def distill(*words: str, allow: tuple[int, ...] = (0,)) -> str:
    """`python -m distill WORDS` in this process, which has torch loaded already; returns what it printed."""
    said = io.StringIO()
    before, code = sys.argv, 0
    sys.argv = ["distill", *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("distill", run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    if code not in allow:
        last = " | ".join(line.strip() for line in said.getvalue().strip().splitlines()[-6:])
        raise CommandFailed(f"distill {' '.join(words)} ended with {code}: {last}")
    return said.getvalue()


_spelt: dict[tuple[str, str], tuple[str, Any]] = {}


def _spelling(key: str, value: Any, scratch: Path) -> tuple[str, Any]:
    """The word for a recipe key, and for its value, that this checkout takes: `distill show` is asked."""
    keys, values = (key, *RENAMED.get(key, ())), (value, *RENAMED_VALUES.get((key, str(value)), ()))
    if len(keys) == len(values) == 1:
        return key, value
    known = _spelt.get((key, repr(value)))
    for word, meant in [known] if known else [(word, meant) for word in keys for meant in values]:
        table, _, name = word.partition(".")
        content = {name: meant}
        scratch.write_text(tomli_w.dumps({"run": {"name": "x"}, table: [content] if table == "images" else content}))
        try:
            distill("show", str(scratch))
        except CommandFailed as error:
            if re.search("unknown key|renamed|must be", str(error)):
                continue  # any other fault is that the key stands alone here
        _spelt[key, repr(value)] = word, meant
        return word, meant
    raise LookupError(f"the checkout takes none of {', '.join(keys)}: extend RENAMED in {__file__}")


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> str:
    """Writes a recipe of the old words in those of this checkout; returns its path."""
    scratch = path.with_suffix(".spelling.toml")
    spelt: dict[str, Any] = {}
    for table, content in recipe.items():
        many = isinstance(content, list)
        rows = []
        for row in content if many else [content]:
            words = [_spelling(f"{table}.{key}", value, scratch) for key, value in row.items()]
            rows.append({word.partition(".")[2]: value for word, value in words})
        spelt[table] = rows if many else rows[0]
    scratch.unlink(missing_ok=True)
    path.write_text(tomli_w.dumps(spelt), encoding="utf-8")
    return str(path)


def switches(verb: str, *words: str) -> list[str]:
    """The words behind a verb, its switches as its --help has them."""
    text = distill(verb, "--help")
    return [next((w for w in (word, *RENAMED_SWITCHES.get(word, ())) if w in text), word) for word in words]


def tidy(value: Any) -> Any:
    """A json record without what may differ: UNCOMPARED keys gone, renamed keys in their old words."""
    if isinstance(value, dict):
        return {RENAMED_RECORDS.get(k, k): tidy(v) for k, v in value.items() if k not in UNCOMPARED}
    return [tidy(one) for one in value] if isinstance(value, list) else value
