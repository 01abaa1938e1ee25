"""A probe's records: one file per item, whose bytes are compared."""

from __future__ import annotations

import contextlib
import json
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe_names import tidy
from safetensors import safe_open


class Record:
    """Items in the order of recording. A section that fails becomes an item with the reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.order: list[str] = []

    def _path(self, name: str, suffix: str) -> Path:
        if name in self.order:
            raise ValueError(f"the item {name} is taken twice")
        self.order.append(name)
        (self.folder / "order.json").write_text(json.dumps(self.order))
        return self.folder / (name.replace("/", "~") + suffix)

    def arrays(self, name: str, values: Mapping[str, Any]) -> None:
        """Named tensors or arrays as one .npz."""
        plain = {key.replace("/", "|"): _array(value) for key, value in values.items()}
        np.savez(self._path(name, ".npz"), **plain)

    def bytes(self, name: str, data: bytes) -> None:
        """Any other data."""
        self._path(name, ".bin").write_bytes(data)

    def json(self, name: str, value: Any) -> None:
        """A json value, tidied first (probe_names.tidy)."""
        self._path(name, ".json").write_text(json.dumps(tidy(value), sort_keys=True, indent=1))

    def failed(self, name: str, error: BaseException) -> None:
        """A section that failed."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        self._path(f"{name}: not taken", ".error").write_text(text)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Records an exception inside, so that the next section can begin."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001  (every error of a checkout is recorded)
            self.failed(name, error)
            with (self.folder.parent / "failures.txt").open("a") as file:
                traceback.print_exception(error, file=file)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16: its bits are stored instead.
        return value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)


def members(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All tars of a labels folder: the members that are not json, and the json records, by tar and name."""
    data: dict[str, bytes] = {}
    records: dict[str, Any] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                content, name = file.read(), f"{path.name}/{member.name}"
                if member.name.endswith(".json"):
                    records[name] = json.loads(content)
                else:
                    data[name] = content
    return data, records
