"""The checkpoints of a training run on disk: each is complete or absent.

    <out>/checkpoints/step-00000500/
        student/               a student folder as students.checkpoint writes it, of averaged weights if there are any
        training.safetensors   student/<name>, optimizer/<parameter>/<name>, ema/<name>
        state.json             step, settings, data, best step so far, alarm, and sizes and hashes of the other files

A checkpoint is written aside, synced to disk and renamed (core.files). One whose files are missing or differ in size
from state.json is ignored. The best checkpoint by held-out loss is never pruned.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distill.core import files
from distill.core.seal import is_broken, sealed
from distill.core.tensors import save_file

VERSION = 1
_TENSORS = "training.safetensors"
_KEYS = frozenset("step loss best evaluations_since_best alarm settings data samples identity".split())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def digest(self) -> str:
        """The sha256 of state.json, which has the other files' hashes: the same for copies only."""
        return files.file_sha256(self.folder / "state.json")

    @property
    def is_damaged(self) -> bool:
        """Whether a file's bytes have changed; reads all of them."""
        return bool(_damaged_file(self))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Locks `out` for this process; ValueError where another run holds it. A killed process leaves no lock."""
    out.mkdir(parents=True, exist_ok=True)
    lock = files.take_lock(out / ".lock")
    if lock is None:
        raise ValueError(f"{out}: another training run writes here; wait for it or choose another folder")
    try:
        yield
    finally:
        lock.release()


def bytes_of(student: nn.Module) -> int:
    """The approximate bytes of one checkpoint: the student twice, and Adam's two moments."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return 4 * (2 * sum(p.numel() for p in student.parameters()) + 2 * trained)


def folder_of(out: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return out / "checkpoints" / f"step-{step:08d}"


def find(out: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first."""
    folders = sorted((out / "checkpoints").glob("step-*"))
    return [saved for folder in folders if (saved := _whole(folder)) is not None]


def _state_of(folder: Path) -> dict[str, Any]:
    """The content of state.json; empty where it is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) and not is_broken(state) else {}


def _whole(folder: Path) -> Checkpoint | None:
    state = _state_of(folder)
    if state.get("version") != VERSION:
        return None
    if not isinstance(state.get("files"), dict) or not _KEYS <= state.keys() or type(state["step"]) is not int:
        return None
    sizes = {name: (folder / name).stat().st_size for name in state["files"] if (folder / name).is_file()}
    return Checkpoint(folder, state) if sizes == state["files"] else None


_PIECE = 1 << 26  # bytes of a checkpoint that are sent over the network at once


def hand_out(out: Path, step: int, *, share: Callable[[Any], Any], main: bool, writes: bool) -> None:
    """Copies the main process's checkpoint of `step` to every machine; all processes call it.

    share: broadcasts the main process's value. writes: whether this process is the one that writes on its machine.
    Raises OSError.
    """
    folder = folder_of(out, step)
    source = _whole(folder)
    names = share(sorted([*source.state["files"], "state.json"]) if main and source else None)
    keeps = not main and writes and source is None
    with files.writing_folder(folder) if keeps else nullcontext(folder) as new:
        for name in names:
            size = share((folder / name).stat().st_size if main else None)
            for start in range(0, max(1, size), _PIECE):
                piece = share(_piece(folder / name, start) if main else None)
                if keeps:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    with (new / name).open("ab") as file:
                        file.write(piece)


def _piece(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_PIECE)


def clean(out: Path) -> list[str]:
    """Removes partial files of a killed run, and checkpoints that are not whole; never other files.

    Returns a message about each damaged checkpoint. Raises ValueError for one of a newer version.
    """
    matches = (re.search(r"step-\d{8}", path.name) for path in (out / "checkpoints").glob("*"))
    checkpoint_names = {match[0] for match in matches if match}
    for name in checkpoint_names:
        files.clean(out / "checkpoints" / name)
    whole = {saved.folder for saved in find(out)}
    broken = [folder for name in sorted(checkpoint_names) if (folder := out / "checkpoints" / name) not in whole]
    lines = [f"{folder} is damaged: this checkpoint is skipped" for folder in broken if folder.is_dir()]
    for folder in broken:
        version = _state_of(folder).get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"{folder}: written by a newer version of this package; update it, or set another run.out")
        shutil.rmtree(folder, ignore_errors=True)
    return lines


def drop_damaged(out: Path) -> list[str]:
    """Removes the newest and the best checkpoint where their bytes have changed, until those two are whole.

    Returns a message about each. For checkpoints of earlier versions, without hashes, only the header is checked.
    """
    lines: list[str] = []
    while checkpoints := find(out):
        newest = checkpoints[-1]
        best = (newest.state["best"] or {}).get("step")
        checked = [newest, *(saved for saved in checkpoints[:-1] if saved.step == best)]
        damaged = [(saved, name) for saved in checked if (name := _damaged_file(saved))]
        if not damaged:
            break
        for saved, name in damaged:
            lines.append(f"{saved.folder / name} is damaged: the checkpoint of step {saved.step} is skipped")
            shutil.rmtree(saved.folder)
    return lines


def _damaged_file(saved: Checkpoint) -> str:
    hashes = saved.state.get("hashes", {})
    for name, digest in hashes.items():
        if files.file_sha256(saved.folder / name) != digest:
            return str(name)
    try:
        with safe_open(saved.folder / _TENSORS, "pt"):
            return ""
    except SafetensorError:
        return _TENSORS


def save(
    out: Path,
    *,
    state: Mapping[str, Any],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: AveragedModel | None,
    save_student: Callable[[Path], object],
    keep_last: int,
) -> None:
    """Writes the checkpoint of state["step"] and prunes older ones; OSError names the step to resume from."""
    final = folder_of(out, state["step"])
    try:
        with files.writing_folder(final) as new:
            save_file(_tensors(student, optimizer, ema), new / _TENSORS)
            save_student(new / "student")
            sizes = {str(p.relative_to(new)): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
            hashes = {name: files.file_sha256(new / name) for name in sizes}
            text = json.dumps(sealed({"version": VERSION, **state, "files": sizes, "hashes": hashes}), indent=1)
            (new / "state.json").write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        last = max((saved.step for saved in find(out)), default=0)
        path, reason = (error.filename, error.strerror) if isinstance(error, files.WriteError) else (final, error)
        raise OSError(f"{path}: cannot be written ({reason}); run again to continue from step {last}") from None
    _prune(out, keep_last, state["best"])


def _prune(out: Path, keep_last: int, best: Mapping[str, Any] | None) -> None:
    checkpoints = find(out)
    keep = {saved.folder for saved in checkpoints[-keep_last:]}
    if best is not None:
        keep.add(folder_of(out, best["step"]))
    for saved in checkpoints:
        if saved.folder not in keep:  # renamed first: a kill leaves no half of it, which would be called damaged
            shutil.rmtree(saved.folder.rename(files.temporary_name(saved.folder)))


def _names(student: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    by_id = {id(p): name for name, p in student.named_parameters()}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _tensors(student: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel | None) -> dict[str, Tensor]:
    tensors = {f"student/{name}": value for name, value in student.state_dict().items()}
    names = _names(student, optimizer)
    for number, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{names[number]}/{key}": value for key, value in entries.items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    # Copies: safetensors refuses tensors that are strided (channels_last) or share memory (tied weights).
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _read(saved: Checkpoint) -> dict[str, Tensor]:
    path = saved.folder / _TENSORS
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete {saved.folder} to continue from the checkpoint before it"
        ) from None


def restore(
    saved: Checkpoint, *, student: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel | None
) -> None:
    """Puts a checkpoint's weights and optimizer state into these objects, strictly."""
    tensors = _read(saved)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        student.load_state_dict(under("student/"))
        if ema is not None:
            ema.load_state_dict(under("ema/"))
    except RuntimeError as error:
        raise ValueError(
            f"{saved.folder} holds a different student ({str(error).splitlines()[-1].strip()}); build the same one, or "
            f"choose another output folder"
        ) from None
    numbers = {name: number for number, name in enumerate(_names(student, optimizer))}
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in under("optimizer/").items():
        parameter, _, key = name.rpartition("/")
        if parameter not in numbers:
            raise ValueError(f"{saved.folder} trained {parameter}, which is not trainable now; use the same settings")
        entries.setdefault(numbers[parameter], {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(saved: Checkpoint, student: nn.Module, *, averaged: bool) -> None:
    """Loads only the checkpoint's weights into the student; averaged: the averaged ones."""
    prefix = "ema/module." if averaged else "student/"
    tensors = _read(saved)
    student.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
