"""The README.md of a labels folder: text for people, and front matter for `datasets.load_dataset(FOLDER)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.core.markdown import inline
from distill.core.wording import counted
from distill.shards.codec import CODECS, UNITS, code_rule

README = "README.md"


def labels_readme(manifest: Mapping[str, Any]) -> str:
    """Return Markdown for a manifest: what the labels are, by whom, under which licences, and how to read them."""
    form, crops = manifest["format"], manifest["settings"]["crops"]
    rows = [
        f"| {inline(name)} | {inline(str(card.get('weights', '-')))} | {inline(', '.join(card['stored']))} "
        f"| {inline(str(card.get('licence', 'unknown')))} |"
        for name, card in manifest["teachers"].items()
    ]
    rule = f"invalid: {form.get('invalid')}"
    if "first" in form:
        rule = f"first {form['first']}, last {form['last']}, invalid below {form['invalid_below']}"
    return "\n".join(
        [
            # Without these lines, load_dataset takes the json files beside the tars as the data.
            *("---", "configs:", "- config_name: default", '  data_files: "*.tar"', "---", ""),
            *("# Depth labels", ""),
            f"{counted(manifest['samples'], 'square')} of {counted(manifest['images']['count'], 'image')}, "
            f"{crops['size']} pixels.",
            *("", "| teacher | weights | depth type | licence |", "|---|---|---|---|", *rows, ""),
            f"Licence of the images: {inline(str(manifest['licence']['images'] or 'unknown'))}.",
            "",
            f"Maps (`.{form['suffix']}`, codec {form['codec']}) are 16-bit codes with the range that each "
            f"sample's json gives: value = {form['value']}; {rule}. Each sample's json has them under `decode`, "
            "manifest.json under `format`; docs/formats.md of depth-distill has a reader of ten lines.",
            "",
        ]
    )


def describe_format(codec: str) -> dict[str, Any]:
    """How a reader without this package decodes the maps of a codec, in plain values; also in docs/formats.md."""
    spec = CODECS[codec]
    table: dict[str, Any] = {
        "codec": codec,
        "suffix": spec.suffix,
        "max_error": spec.bound,
        "units": UNITS,
        "patches": "[top, left, side] in the photograph's pixels, from the region's top left corner",
    }
    if not (rule := code_rule(codec)):
        return {**table, "invalid": "NaN", "value": "low + (x + 1) / 2 * (high - low)"}
    return {**table, **rule, "value": "low + clip((code - first) / (last - first), 0, 1) * (high - low)"}
