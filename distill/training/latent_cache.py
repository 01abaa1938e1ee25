"""A disk cache of the VAE's latents: the VAE is most of a step's work, and it is frozen.

    FOLDER/HASH/part-WORD.safetensors   entries "NAME" of one tensor each; the word is random, so that names never clash

Parts are written aside and renamed. Several processes write parts of their own, and see each other's when they next
write one; a latent that two of them computed is stored twice and is the same. A part that cannot be read is skipped and
its latents are computed again. A cached latent equals a computed one bit for bit.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.core import files
from distill.core.tensors import save_file

PART_BYTES = 64 * 2**20
"""A part is written when this many bytes have been computed, and before every checkpoint."""


class LatentCache:
    """Latents by name. identity: everything else that determines their values (VAE, labels, settings)."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
        self.folder = folder / digest
        self.found, self.computed = 0, 0
        self._unwritten: dict[str, Tensor] = {}
        self._bytes = 0
        self._part_of: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._open_new_parts()

    def _open_new_parts(self) -> None:
        """Opens parts that it has not seen yet."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                part = safe_open(path, "pt")
                self._part_of |= dict.fromkeys(part.keys(), part)
            except (SafetensorError, OSError):
                continue

    def get(self, names: Sequence[str], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The latents of these names, on the CPU. compute(indices): those at these indices of `names`."""
        missing = [i for i, name in enumerate(names) if name not in self._unwritten and name not in self._part_of]
        if missing:
            for i, value in zip(missing, compute(missing), strict=True):
                latent = value.detach().to("cpu", copy=True).contiguous()
                self._unwritten[names[i]] = latent
                self._bytes += latent.numel() * latent.element_size()
        self.computed, self.found = self.computed + len(missing), self.found + len(names) - len(missing)
        values = [
            self._unwritten[name] if name in self._unwritten else self._part_of[name].get_tensor(name) for name in names
        ]
        if self._bytes >= PART_BYTES:
            self.keep()
        return values

    def keep(self) -> None:
        """Writes the latents computed since the last part; raises OSError where it cannot."""
        if not self._unwritten:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.writing(self.folder / f"part-{uuid.uuid4().hex[:16]}.safetensors") as new:
            save_file(self._unwritten, new)
        self._open_new_parts()
        self._unwritten = {name: value for name, value in self._unwritten.items() if name not in self._part_of}
        self._bytes = sum(value.numel() * value.element_size() for value in self._unwritten.values())


def stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """(N,...) of N latents."""
    return torch.stack(list(values)).to(device)
