"""Tensors are written as other files are: readable for whom the umask lets read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distill.core.tensors import save_file


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_of_tensors_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
        save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")["a"]) == 3


def test_nobody_else_writes_tensors():
    """The library's own function would leave files that only their owner may read."""
    import distill

    root = distill.__path__[0]
    lines = [
        f"{folder}/{name}"
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py") and name != "tensors.py"
        for text in [Path(folder, name).read_text(encoding="utf-8")]
        if "torch.save_file(" in text or "safetensors.torch import save_file" in text or "serialize_file(" in text
    ]
    assert not lines
