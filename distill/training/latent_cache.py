"""The VAE's latents on disk, each computed once: the VAE is most of a step's work, and it never learns.

    FOLDER/HASH/part-WORD.safetensors   entries "NAME" of one tensor each; the word is drawn, so that no two meet

Parts are written aside and renamed. Several processes write parts of their own, and see each other's when they next
write one; a latent that two of them computed is stored twice and is the same. A part that cannot be read is passed over
and its latents computed again. What is found is bit for bit what would be computed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.core import files

PART_BYTES = 64 * 2**20
"""A part is written when so much has been computed, and before every checkpoint."""


class LatentCache:
    """Latents by name. identity: whatever else decides their values (VAE, labels, settings)."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
        self.folder = folder / digest
        self.found, self.computed = 0, 0
        self._fresh: dict[str, Tensor] = {}
        self._bytes = 0
        self._places: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._look()

    def _look(self) -> None:
        """Opens parts that it has not seen."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                part = safe_open(path, "pt")
                self._places |= dict.fromkeys(part.keys(), part)
            except (SafetensorError, OSError):
                continue

    def get(self, names: Sequence[str], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The latents of these names, on the CPU. compute(places): those at these places of `names`."""
        missing = [i for i, name in enumerate(names) if name not in self._fresh and name not in self._places]
        if missing:
            for i, value in zip(missing, compute(missing), strict=True):
                kept = value.detach().to("cpu", copy=True).contiguous()
                self._fresh[names[i]] = kept
                self._bytes += kept.numel() * kept.element_size()
        self.computed, self.found = self.computed + len(missing), self.found + len(names) - len(missing)
        values = [self._fresh[name] if name in self._fresh else self._places[name].get_tensor(name) for name in names]
        if self._bytes >= PART_BYTES:
            self.keep()
        return values

    def keep(self) -> None:
        """Writes what was computed since the last part; OSError where it cannot be written."""
        if not self._fresh:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.writing(self.folder / f"part-{uuid.uuid4().hex[:16]}.safetensors") as new:
            save_file(self._fresh, new)
        self._look()
        self._fresh = {name: value for name, value in self._fresh.items() if name not in self._places}
        self._bytes = sum(value.numel() * value.element_size() for value in self._fresh.values())


def stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """(N,...) of N latents."""
    return torch.stack(list(values)).to(device)
