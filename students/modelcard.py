"""A student's README.md: what it is, how to use it, where its knowledge comes from, under which licence, how it scores.

Written from the card's plain values alone, for people and for model hubs (the block at the top is theirs). A card can
also be given as a TOML file.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core.depth import Kind

# What goes under a heading of its own; every other value is a row of the first table.
_SECTIONS = {
    "Lineage": ("teachers", "lineage", "images", "made_from"),
    "Scores": ("scores",),
    "Training recipe": ("recipe",),
}


def model_card(
    name: str, card: Mapping[str, Any], *, native_size: int | None = None, kind: Kind = Kind.AFFINE_DISPARITY
) -> str:
    """Markdown of `card`; name: the folder's, for a card without one. kind: what the student predicts."""
    title = str(card.get("name", name))
    commercial = "apache-2.0" if card.get("licence") == "Apache-2.0" else "other"
    lines = [
        "---",
        "library_name: depth-distill",
        "pipeline_tag: depth-estimation",
        f"license: {commercial}",
        "---",
        "",
    ]
    lines += [f"# {title}", ""]
    held = {key for keys in _SECTIONS.values() for key in keys if not _is_plain(card.get(key))}
    lines += _rows({key: value for key, value in card.items() if key not in held})
    size = f" Made for images whose short side is {native_size} pixels." if native_size else ""
    metric = kind is Kind.METRIC_DEPTH
    what = "depth in metres" if metric else "affine disparity: scale and shift are unknown"
    lines += [
        *("", "## Use", "", "```python", "from distill.inference.predict import load, read"),
        *(
            "",
            f'depth = load("THIS FOLDER").predict(read("photo.jpg"))  # depth.values: larger is {kind.larger_is}',
            "```",
            "",
        ),
        f"It predicts {what}, larger is {kind.larger_is}.{size}",
    ]
    for heading, keys in _SECTIONS.items():
        present = {key: card[key] for key in keys if key in held and card.get(key)}
        if present:
            lines += ["", f"## {heading}", ""]
            for key, value in present.items():
                lines += _section(key, value)
    return "\n".join([*lines, ""])


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple)


def _rows(table: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in table.items())]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")


def _section(key: str, value: Any) -> list[str]:
    if key == "recipe":
        return ["```json", json.dumps(value, indent=1, ensure_ascii=False), "```"]
    if isinstance(value, Mapping):
        return [f"**{key}**", "", *_rows(value), ""]
    if value and all(isinstance(row, Mapping) for row in value):
        return [*_table(value), ""]
    return [f"**{key}**", "", *(f"- {_cell(item)}" for item in value), ""]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of equal meaning as one table; a key that some lack stays empty there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_cell(row[key]) if key in row else "" for key in columns] for row in rows]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in shown),
    ]


def read_card_file(path: Path) -> dict[str, Any]:
    """The values of a TOML file for a student's card; ValueError naming the file, and the key that JSON cannot hold."""
    try:
        card = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    if faults := _not_plain(card, ""):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return card


def _not_plain(value: Any, key: str) -> list[str]:
    """What in a TOML value is neither text, nor true or false, nor a finite number."""
    if isinstance(value, dict):
        return [fault for name, v in value.items() for fault in _not_plain(v, f"{key}.{name}".removeprefix("."))]
    if isinstance(value, list):
        return [fault for i, v in enumerate(value) for fault in _not_plain(v, f"{key}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key} is {value}, which a card cannot hold"]
    if isinstance(value, str | int | float):
        return []
    return [f'{key} is a date or a time; put it in quotes: "{value}"']
