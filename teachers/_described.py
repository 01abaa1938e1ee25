"""Folders with a config.json beside the weights, as transformers and diffusers write them.

The libraries' own readers accept NaN and eight-bit numbers, know none of the names that trainers put around a network,
and run off to a quantizer or to the hub. So the tensors come from `read_state`, as everywhere else; the libraries only
build the network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.files import decoded
from distill.core.weights import WeightsMismatchError, below_prefix, find_weights, read_state
from distill.teachers._strictly import REPORT_MISMATCHES, load_checked
from distill.teachers._where import described_by, read_config

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("model.safetensors", "*.safetensors", "*.bin")
"""Patterns of transformers' weights in a folder."""


def read_either(
    path: Path, names: Sequence[str], *, anchor: str, authors: Sequence[str], weights_key: str | None = None
) -> tuple[Path, dict[str, Tensor], Path | None]:
    """(what was read, its tensors, the folder of its config.json: None for a file of the authors).

    path: a folder with a config.json, or a weights file or its folder (names: patterns). anchor, authors: tensors'
    names in transformers' files and in the authors'. Raises as read_described does, and WeightsMismatchError for
    transformers' names without a config.json, which says what network it is.
    """
    if path.is_dir() and is_described(path):
        return path, read_described(find_weights(path, FILES), anchors=(anchor,), weights_key=weights_key), path
    file = find_weights(path, names)
    state = below_prefix(read_state(file, weights_key=weights_key), (*authors, anchor), file)
    if anchor not in state:
        return file, state, None
    if not is_described(file.parent):
        raise WeightsMismatchError(
            f"{file} has transformers' names ({anchor}), but no config.json beside it, which says what network it is"
        )
    _check_whole(file)
    return file, state, file.parent


def is_described(folder: Path) -> bool:
    """Whether a folder has a config.json."""
    return (folder / "config.json").is_file()


def read_described(file: Path, *, anchors: Sequence[str], weights_key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file beside a config.json, without a trainer's prefix before an anchor.

    Raises WeightsMismatchError for a network that is quantised or has an adapter, and as read_state does.
    """
    _check_whole(file)
    return below_prefix(read_state(file, weights_key=weights_key), anchors, file)


def _check_whole(file: Path) -> None:
    folder = file.parent
    if (folder / "adapter_config.json").is_file() and not file.name.startswith("adapter_"):
        raise WeightsMismatchError(f"{folder} has an adapter (adapter_config.json): merge it with its network")
    if quantised := read_config(folder / "config.json").get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise WeightsMismatchError(
            f"{folder / 'config.json'} says that the network is quantised ({method}): give the weights that it was "
            "made from"
        )


def described_config(config_class: Any, folder: Path, *, what: str) -> Any:
    """The configuration in a folder's config.json; WeightsMismatchError if it cannot be read as one."""
    file = folder / "config.json"
    read_config(file)  # whose error names this file, and not a copy
    stored = file.read_bytes() if file.is_file() else b""
    with described_by(file, what):
        if (text := decoded(stored)).encode() == stored:
            return config_class.from_pretrained(folder)
        # transformers reads UTF-8 without a mark alone; editors on Windows write a mark, or UTF-16.
        with tempfile.TemporaryDirectory() as plain:
            Path(plain, file.name).write_text(text, encoding="utf-8")
            return config_class.from_pretrained(plain)


def build_described(
    model_class: Any, config: Any, state: dict[str, Tensor], where: Path, *, what: str, optional: tuple[str, ...] = ()
) -> Any:
    """transformers' network of a configuration with the tensors of `state`, loaded strictly."""
    return load_checked(
        lambda: model_class.from_pretrained(None, config=config, state_dict=state, **REPORT_MISMATCHES),
        where,
        what=what,
        optional=optional,
    )
