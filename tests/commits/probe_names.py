"""The names in a checkout, old or new: recipe keys, switches, keywords and modules.

The probe uses the old layout's names. If a checkout does not know one, its alternatives here are tried in turn, and the
first accepted one is used: extend these tables when names change.
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
# A key's values, where these change too.
RENAMED_VALUES: dict[tuple[str, Any], tuple[Any, ...]] = {
    ("labels.store", "own"): ("as_is",),
    ("labels.sky", "own"): ("teacher",),
}
# Switches of the command line, and their values.
RENAMED_SWITCHES: dict[str, tuple[str, ...]] = {"--write": ("--formats",), "colour": ("color",)}
# Keywords of functions that the probe calls by name.
RENAMED_KEYWORDS: dict[str, tuple[str, ...]] = {
    "faithful": ("reference_hdn",),
    "colour": ("color", "color_jitter"),
    "crop": ("random_resized_crop",),
    "holdout": ("val_fraction",),
    "small": ("on_small",),
}
# Keys of json records: new name -> old name, applied before the comparison.
RENAMED_RECORDS: dict[str, str] = {}
# Keys of json records that name recipes, hashes of recipes, clocks or commits: not compared.
UNCOMPARED = frozenset(
    (
        "recipe settings sha256 crc32 bytes identity created software made_by images_per_s data_wait seconds memory "
        "cost image_source"
    ).split()
)
# The present and past modules of each part. Top folders are looked for below `distill` first.
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
    """The module of PLACES[name], or a module of a top folder such as "teachers.marigold"."""
    candidates = PLACES.get(name, (f"distill.{name}", name))
    for module in candidates:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise
    raise LookupError(f"the checkout has none of {', '.join(candidates)}: extend PLACES in {__file__}")


def one(place: str, name: str) -> Any:
    """The first attribute `name` in the modules of PLACES[place]."""
    for module in PLACES[place]:
        with contextlib.suppress(ModuleNotFoundError):
            if hasattr(imported := importlib.import_module(module), name):
                return getattr(imported, name)
    raise LookupError(f"the checkout has no {name} in {', '.join(PLACES[place])}: extend PLACES in {__file__}")


def call(function: Callable[..., Any], *given: Any, **keywords: Any) -> Any:
    """Calls `function` with every keyword under the name in its signature."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(*given, **keywords)
    words = {key: (key, *RENAMED_KEYWORDS.get(key, ())) for key in keywords}
    renamed = {next((word for word in words[key] if word in parameters), key): value for key, value in keywords.items()}
    return function(*given, **renamed)


class CommandFailed(RuntimeError):
    """A command ended with a code that is not 0; the message has the command and its last output."""


def distill(*words: str, allow: tuple[int, ...] = (0,)) -> str:
    """`python -m distill WORDS` in this process, which has torch loaded already; returns what it printed."""
    output = io.StringIO()
    before, code = sys.argv, 0
    sys.argv = ["distill", *words]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            runpy.run_module("distill", run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    if code not in allow:
        last = " | ".join(line.strip() for line in output.getvalue().strip().splitlines()[-6:])
        raise CommandFailed(f"distill {' '.join(words)} ended with {code}: {last}")
    return output.getvalue()


_spelt: dict[tuple[str, str], tuple[str, Any]] = {}


def _spelling(key: str, value: Any, scratch: Path) -> tuple[str, Any]:
    """The name of a recipe key and the value that this checkout accepts, tried with `distill show`."""
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
                continue  # any other fault comes from the recipe having no other keys
        _spelt[key, repr(value)] = word, meant
        return word, meant
    raise LookupError(f"the checkout takes none of {', '.join(keys)}: extend RENAMED in {__file__}")


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> str:
    """Writes a recipe with old names in this checkout's names; returns its path."""
    scratch = path.with_suffix(".spelling.toml")
    renamed: dict[str, Any] = {}
    for table, content in recipe.items():
        is_list = isinstance(content, list)
        rows = []
        for row in content if is_list else [content]:
            words = [_spelling(f"{table}.{key}", value, scratch) for key, value in row.items()]
            rows.append({word.partition(".")[2]: value for word, value in words})
        renamed[table] = rows if is_list else rows[0]
    scratch.unlink(missing_ok=True)
    path.write_text(tomli_w.dumps(renamed), encoding="utf-8")
    return str(path)


def switches(verb: str, *words: str) -> list[str]:
    """The arguments of a command, with switches renamed as in its --help."""
    text = distill(verb, "--help")
    return [next((w for w in (word, *RENAMED_SWITCHES.get(word, ())) if w in text), word) for word in words]


def tidy(value: Any) -> Any:
    """A json record without UNCOMPARED keys, and with renamed keys under their old names."""
    if isinstance(value, dict):
        return {RENAMED_RECORDS.get(k, k): tidy(v) for k, v in value.items() if k not in UNCOMPARED}
    return [tidy(item) for item in value] if isinstance(value, list) else value
