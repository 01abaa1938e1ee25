"""Measures teachers on this machine once, before labelling, and keeps the results in the labels folder.

These are the fastest batch size, and the error of a compiled or half-precision teacher against the same weights in
eager float32. The first process writes both: every other process, and a resumed run, uses the same numbers, so that the
bytes of labels do not depend on timings.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core import files
from distill.core.seal import sealed
from distill.labelling.asking import predict
from distill.labelling.jobs import Teachers
from distill.labelling.lock import mutex
from distill.labelling.settings import LabelSettings
from distill.shards.codec import VERSION, dump_json
from distill.shards.shards import DamagedTableError, read_json
from distill.teachers._precision import compare, probe_images

TUNED = "machine.json"
GAIN = 1.03  # a larger batch must be faster by this factor, or it only costs memory
MOST = 128

References = Mapping[str, Callable[[], Any]]


def tune(
    folder: Path, teachers: Teachers, labels: LabelSettings, *, size: int, device: torch.device, references: References
) -> tuple[LabelSettings, dict[str, Any]]:
    """Settings with a numeric batch size, and the manifest's facts about this machine ({}: none).

    size: the side of the crops in pixels. references: loaders of the eager float32 twin of each teacher that is not one
    itself, by the teacher's name. Nothing is measured or written where it is not needed.
    """
    if labels.batch_size != "auto" and not references:
        return labels, {}
    folder.mkdir(parents=True, exist_ok=True)
    with mutex(folder):
        path = folder / TUNED
        results: dict[str, Any] = _read_results(path)
        before = copy.deepcopy(results)
        networks = {name: teacher for name, teacher in teachers if hasattr(teacher, "predict")}
        unmeasured = [name for name in references if name not in results.get("from_float32", {})]
        if unmeasured:
            results.setdefault("from_float32", {}).update(
                {name: compare(_plain(networks[name]), references[name](), size) for name in unmeasured}
            )
        if labels.batch_size == "auto" and "batch_size" not in results:
            results["batch_size"] = fastest(list(networks.items()), size, device)
        if device.type == "cuda":
            results.setdefault("device", torch.cuda.get_device_name(device))
        if results != before:  # the last worker of a run removes half-written files, and one may join then
            files.write_bytes(path, dump_json(sealed({**results, "version": VERSION})))
    number = int(results["batch_size"]) if labels.batch_size == "auto" else labels.crops_at_once
    return labels.with_batch_size(number), results


def _read_results(path: Path) -> dict[str, Any]:
    """The stored results; {} where they are damaged, to measure again, unless parts are finished.

    Raises ValueError then: with another batch size the remaining parts could differ in their last bits.
    """
    try:
        table = read_json(path) if path.is_file() else {}
    except DamagedTableError as error:
        if any(path.parent.glob("*.tar")):
            raise ValueError(
                f"{path} is damaged, so the batch size of finished parts is unknown: delete it to continue with a new "
                "one, whose maps may differ in their last bits, or label into another folder"
            ) from error
        return {}
    return {key: value for key, value in table.items() if key != "version"}


def _plain(teacher: Any) -> Any:
    """The innermost teacher, without a bridge and a sky policy."""
    while hasattr(teacher, "teacher"):
        teacher = teacher.teacher
    return teacher


def fastest(networks: Teachers, size: int, device: torch.device, *, most: int = MOST) -> int:
    """The smallest batch of (3,size,size) crops beyond which doubling gains less than GAIN, or memory runs out."""
    best, rate = 1, 0.0
    count = 1
    while count <= most:
        try:
            seconds = sum(_seconds(name, teacher, size, count, device) for name, teacher in networks)
        except torch.OutOfMemoryError:
            seconds = -1.0
        if seconds < 0:  # not in the except block, where the error still holds the batch's tensors on the device
            torch.cuda.empty_cache()
            break
        if seconds and count / seconds < GAIN * rate:
            break
        best, rate = count, count / max(seconds, 1e-9)
        count *= 2
    return best


def _seconds(name: str, teacher: Any, size: int, count: int, device: torch.device) -> float:
    """The smaller of two timings of one batch, after a warm-up (which compiles)."""
    images: Tensor = probe_images(size).to(device)[torch.arange(count) % 2]
    keys, timings = [str(i) for i in range(count)], []
    for _ in range(3):
        before = time.perf_counter()
        predict(name, teacher, images, keys).values.sum().item()  # waits for the device
        timings.append(time.perf_counter() - before)
    return min(timings[1:])
