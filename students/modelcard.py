"""A student's README.md: what it is, how to use it, its lineage, its licence and its scores.

Written only from the card's plain values, for people and for model hubs (which read the block at the top). A card can
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
from distill.core.markdown import inline
from distill.students import vggt

# Keys under a heading of their own; every other value is a row of the first table.
_SECTIONS = {
    "Lineage": ("teachers", "lineage", "images", "made_from"),
    "Scores": ("scores",),
    "Cost": ("cost",),
    "Training recipe": ("recipe",),
}


_CLASSES = {
    "sdt": "AnyDepth's SDTHead",
    "dpt": "AnyDepth's DPTHead, which is DINOv3's",
    "dav2": "Depth Anything V2's DPTHead, without the refinenet4.resConfUnit1 that it never calls",
}
"""The class whose parameter names a decoder has."""

_DISTILL = ("from distill import load", "", 'depth = load("THIS FOLDER")("photo.jpg").numpy()')
_PIPELINE = (
    *("from transformers import pipeline", ""),
    'depth = pipeline("depth-estimation", model="THIS FOLDER")("photo.jpg")["predicted_depth"]',
)


def model_card(
    name: str,
    card: Mapping[str, Any],
    *,
    native_size: int | None = None,
    kind: Kind = Kind.AFFINE_DISPARITY,
    canonical_focal: float | None = None,
    alone: Sequence[str] = (),
    parameters: int = 0,
    num_bytes: int = 0,
    library: str = "depth-distill",
) -> str:
    """Markdown of `card`. name: the folder's, if the card has none. kind: what the student predicts.

    canonical_focal: of its camera convention (core.focal), in pixels. alone: the lines of `without_package`. library:
    what opens the folder, "depth-distill" or "transformers".
    """
    lines = _top(name, card, library)
    size = f" Made for images whose short side is {native_size} pixels." if native_size else ""
    metric = kind is Kind.METRIC_DEPTH
    what = "depth in metres" if metric else "affine disparity: scale and shift are unknown"
    use = (
        [line.replace(')("photo.jpg")', ')("photo.jpg", fov=60)') for line in _DISTILL] if canonical_focal else _DISTILL
    )
    camera = [f"Camera: {canonical_rule(canonical_focal)}."] if canonical_focal else []
    lines += [
        *("", "## Use", "", "```python", *(use if library == "depth-distill" else _PIPELINE)),
        *(f"depth  # H x W, larger is {kind.larger_is}", "```", ""),
        f"It predicts {what}, larger is {kind.larger_is}.{size}",
        *camera,
        *([f"{parameters / 1e6:.3g} million parameters, {num_bytes / 1e6:.3g} MB on disk."] if parameters else []),
    ]
    return "\n".join([*lines, *alone, *_sections(card), ""])


def canonical_rule(focal: float) -> str:
    """The camera convention of a student of canonical depth, in a sentence."""
    return (
        f"the network's output is depth in metres for a focal length of {focal:g} pixels; metres = output * focal / "
        f"{focal:g}, with the camera's focal length in pixels of the image as the network sees it, after resizing"
    )


def page_of(
    student: Any, name: str, card: Mapping[str, Any], *, bits: int | None, num_bytes: int, has_encoder: bool = True
) -> str:
    """README.md of a student's folder. name: the folder's; bits: 4 where matrices are stored so; num_bytes: on disk."""
    return model_card(
        name,
        card,
        native_size=student.native_size,
        kind=student.kind,
        canonical_focal=student.canonical_focal,
        alone=without_package(_network(student), bits=bits, has_encoder=has_encoder),
        parameters=sum(p.numel() for p in student.parameters()),
        num_bytes=num_bytes,
    )


def _network(student: Any) -> dict[str, Any]:
    """Facts about the network for people who use it without this package."""
    encoder = student.encoder
    return {**student.spec, "timm_name": encoder.timm_name, "patch_size": encoder.patch_size}


def latent_card(name: str, card: Mapping[str, Any], *, teacher: str, kind: Kind) -> str:
    """Markdown of `card`, of a latent-diffusion network whose folder the teacher called `teacher` reads."""
    code = [
        "from distill import load_teacher",
        "",
        f'teacher = load_teacher("{teacher}", "THIS FOLDER")  # teacher.predict(images (B,3,H,W) in [0,1])',
    ]
    use = ["", "## Use", "", "```python", *code, "```", ""]
    use += [
        f'In a recipe: `[[teachers]]` with `name = "{teacher}"` and `weights = "THIS FOLDER"`. '
        f"It predicts {kind.quantity} in [0, 1], larger is {kind.larger_is}: scale and shift are unknown."
    ]
    return "\n".join([*_top(name, card), *use, *_sections(card), ""])


def _section_keys(card: Mapping[str, Any]) -> set[str]:
    """The keys of `card` that go under a heading of their own."""
    return {key for keys in _SECTIONS.values() for key in keys if not _is_plain(card.get(key))}


def _top(name: str, card: Mapping[str, Any], library: str = "depth-distill") -> list[str]:
    """The block for hubs, the title and the table of plain values."""
    licence = "apache-2.0" if card.get("licence") == "Apache-2.0" else "other"
    block = [
        *("---", f"library_name: {library}", "pipeline_tag: depth-estimation", f"license: {licence}"),
        *(["license_name: see-card"] if licence == "other" else []),
        *("tags:", "- depth", "- distillation", "---", ""),
    ]
    in_sections = _section_keys(card)
    plain = {key: value for key, value in card.items() if key not in in_sections}
    if isinstance(training := plain.get("training"), Mapping):  # its settings repeat the recipe, which follows
        plain["training"] = {key: value for key, value in training.items() if key != "settings"}
    rows = _rows(plain)
    return [*block, f"# {inline(str(card.get('name', name)))}", "", *rows]


def _sections(card: Mapping[str, Any]) -> list[str]:
    in_sections, lines = _section_keys(card), []
    for heading, keys in _SECTIONS.items():
        present = {key: card[key] for key in keys if key in in_sections and card.get(key)}
        if present:
            lines += ["", f"## {heading}", ""]
            for key, value in present.items():
                lines += _section(key, value)
    return lines


def without_package(network: Mapping[str, Any], *, bits: int | None = None, has_encoder: bool = True) -> list[str]:
    """The card's paragraph for people who have only timm and safetensors.

    network: a student's `spec`, with the ViT's "timm_name" and "patch_size". bits: 4 where matrices are stored so.
    Empty for VGGT, which timm does not have, and for a BEiT, which timm alone runs at one size only.
    """
    if network["encoder"] == vggt.NAME or network["timm_name"].startswith("beit"):
        return []
    options, patch = network["encoder_options"], network["patch_size"]
    vit_options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    vit_options |= {} if "distilled" in network["timm_name"] else {"global_pool": ""}
    arguments = ", ".join(f"{key}={value!r}" for key, value in (vit_options | options["timm_options"]).items())
    code = [f'vit = timm.create_model("{network["timm_name"]}", {arguments})']
    if options["pos_grid"]:
        rows, columns = options["pos_grid"]
        code.append(f"vit.set_input_size(img_size=({rows * patch}, {columns * patch}))")
    last = max(options["indices"]) + 1
    blocks = f"[vit.blocks[i] for i in {options['blocks'][:last]}]" if options["blocks"] else f"vit.blocks[:{last}]"
    code.append(f"vit.blocks = torch.nn.ModuleList({blocks})")
    code += [] if options["final_norm"] else ["vit.norm = torch.nn.Identity()"]
    if has_encoder and bits != 4:
        code += [
            'state = load_file("model.safetensors")',
            'own = {k[17:]: v for k, v in state.items() if k.startswith("encoder.backbone.")}',
            "vit.load_state_dict(own)",
        ]
    size = network["native_size"]
    resized = f"resize the image's short side to {size} (each side a multiple of {patch}), " if size else ""
    four_bits = (
        "Matrices are in four bits: KEY:codes holds two a byte, the lower half first (KEY:codes of eight bits where "
        "there are as many codes as values), in groups of 64 over the flattened tensor, value = code x step + low. "
        "`distill export THIS_FOLDER OUT --bits 32` writes them plainly."
    )
    max_depth = network.get("max_depth")
    class_name = _CLASSES.get(network["decoder"])
    named = f", by the names of {class_name}" if class_name else ""
    return [
        *("", "## Without this package", "", "```python"),
        *("import timm, torch", "from safetensors.torch import load_file", "", *code, "```", ""),
        f"Then {resized}scale it to [0,1], subtract the mean {options['mean']} and divide by {options['std']}. "
        f"The decoder ({network['decoder']}; `decoder.*` in the file{named}; its class is in "
        f"distill/students/decoders) reads blocks {options['indices']} as patch maps with their class tokens, "
        "and gives one channel, "
        f"{f'sigmoid of it times {max_depth} is metres; ' if max_depth else ''}resized bilinearly "
        "(align_corners=False) to the image.",
        *(["", four_bits] if bits == 4 else []),
        *(
            []
            if has_encoder
            else ["", "The frozen encoder's weights are not in this folder; student.json names the file."]
        ),
    ]


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple)


def _rows(table: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {inline(key)} | {_cell(value)} |" for key, value in table.items())]


def _cell(value: Any) -> str:
    return inline(_words(value))


def _words(value: Any) -> str:
    """A value for people: of a table "key: value; ...", of a list its entries; else as JSON, numbers in six digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        inner = ((key, f"({_words(v)})" if isinstance(v, Mapping) else _words(v)) for key, v in value.items())
        return "; ".join(f"{key}: {text}" for key, text in inner)
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        value = float(f"{value:.6g}")  # student.json keeps all digits
    return json.dumps(value, ensure_ascii=False)


def _section(key: str, value: Any) -> list[str]:
    if key == "recipe":
        return ["```json", json.dumps(value, indent=1, ensure_ascii=False), "```"]
    if isinstance(value, Mapping):
        return [f"**{inline(key)}**", "", *_rows(value), ""]
    if value and all(isinstance(row, Mapping) for row in value):
        return [*_table(value), ""]
    return [f"**{inline(key)}**", "", *(f"- {_cell(item)}" for item in value), ""]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the same kind as one table; the cell of a missing key stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_cell(row[key]) if key in row else "" for key in columns] for row in rows]
    return [
        "| " + " | ".join(map(inline, columns)) + " |",
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
    """Faults of a TOML value: entries that are neither text, nor true or false, nor a finite number."""
    if isinstance(value, dict):
        return [fault for name, v in value.items() for fault in _not_plain(v, f"{key}.{name}".removeprefix("."))]
    if isinstance(value, list):
        return [fault for i, v in enumerate(value) for fault in _not_plain(v, f"{key}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key} is {value}, which a card cannot hold"]
    if isinstance(value, str | int | float):
        return []
    return [f'{key} is a date or a time; put it in quotes: "{value}"']
