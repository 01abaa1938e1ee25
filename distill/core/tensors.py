"""Writes a .safetensors with the permissions of any other new file."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """As safetensors.torch.save_file, whose file only its owner may read (0600), whatever the umask of a group is.

    Raises OSError and SafetensorError.
    """
    import safetensors.torch

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.torch.save_file(dict(tensors), path, metadata=metadata)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod(mode)
