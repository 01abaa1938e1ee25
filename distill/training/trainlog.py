"""The log of a training run: a line per step, an alarm when the output's scale runs away, and dumps of bad batches.

log.jsonl holds one JSON object per line, of three kinds: {"step", "loss", ...} of a training step, {"step", "heldout",
"heldout_parts", ...} of an evaluation (step 0: before the first), {"step", "alarm"} of a warning. A resumed run
truncates the file to its checkpoint, so that apart from the fields in WALL_CLOCK it ends up equal to an uninterrupted
run's. Each line ends in its own checksum, which readers remove; a line with a wrong one is skipped.

Why an alarm: the gradient of a scale- and shift-invariant loss is orthogonal to the prediction, so each step can only
lengthen it, and the effective step shrinks as it grows; people who re-implemented Distill-Any-Depth report just that.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import DepthMap
from distill.core.labels import Batch
from distill.core.tensors import save_file
from distill.losses.losses import median_and_mean_abs_dev

_SEAL = "crc32"
WALL_CLOCK = ("images_per_s", "data_wait", "seconds", "memory")
# Statistics of a map use at most this many rows and columns: a median over 64 x 64 pixels is accurate to about 1 % of
# the deviation and 75 times cheaper than one over 560 x 560.
GRID = 64
SMOOTHING = 0.9
COLLAPSED = 1e-3


def map_statistics(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """(3,) float64: sums over the batch of median, mean absolute deviation, and 1 for each map with a valid pixel.

    values, valid: (B,H,W); both statistics use an evenly spaced grid of at most GRID x GRID pixels.
    """
    rows, columns = (max(1, -(-n // GRID)) for n in values.shape[-2:])
    thin = values.detach()[:, ::rows, ::columns].float()
    counted = torch.ones_like(thin, dtype=torch.bool) if valid is None else valid[:, ::rows, ::columns]
    median, deviation = median_and_mean_abs_dev(thin, counted)
    usable = counted.flatten(1).any(1)
    return torch.stack([median, deviation, torch.ones_like(median)]).mul(usable).double().sum(1)


class StepLog:
    """Appends lines to log.jsonl; each line is flushed at once, so that a killed process loses none.

    damaged: how many existing lines were damaged and are dropped.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Opens `path` and drops every line after `last_step`, and a torn last line."""
        self.path = path
        self.damaged = 0
        with files.writing(path) as new, new.open("w", encoding="utf-8") as file:
            for line in _complete_lines(path):  # one by one: a log of days would fill the memory
                if line is None:
                    self.damaged += 1
                elif line["step"] <= last_step and last_step:
                    file.write(_encode(line))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; numbers that are not finite become null."""
        self._file.write(_encode(line))
        self._file.flush()

    def sync(self) -> None:
        """Syncs everything written so far to disk; called before each checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, in order, without a truncated last line or one that a power cut filled with NULs.

    Raises ValueError for a file that has lines but no log line.
    """
    return read_and_count(path)[0]


def read_and_count(path: Path) -> tuple[list[dict[str, Any]], int]:
    """As `read`; and how many complete lines are invalid, without reading the log once more."""
    complete = list(_complete_lines(path))
    lines = [line for line in complete if line is not None]
    if complete and not lines:
        raise ValueError("none of its lines is a log line")
    return lines, len(complete) - len(lines)


def number(path: Path, name: str, *, relative: bool = False) -> float | None:
    """The value of `name` ("heldout", "parts.mae") in the last line that has it; None where no line has a number there.

    relative: as a multiple of the first line's value; None where that is 0 or the only one.
    """
    values = []
    for line in _lines(path):
        node: Any = line
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, int | float) and not isinstance(node, bool):
            values.append(float(node))
    if not values or (relative and (len(values) == 1 or not values[0])):
        return None
    return values[-1] / values[0] if relative else values[-1]


def _complete_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a log that end in a newline, None for an invalid one; no lines where there is no log."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (_line(text) for text in file if text.endswith("\n"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (line for line in _complete_lines(path) if line is not None)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    checksum = line.pop(_SEAL, None)
    return line if checksum in (None, zlib.crc32(_dumps(line).encode())) else None  # earlier versions wrote none


def _dumps(line: Mapping[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"))


def _encode(line: Mapping[str, Any]) -> str:
    text = _dumps(finite := _finite(line))
    return _dumps({**finite, _SEAL: zlib.crc32(text.encode())}) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(slots=True)
class ScaleAlarm:
    """Watches the output's mean deviation, smoothed over about ten steps, against its value at the end of the warm-up.

    Warns once, when it is `growth` times larger than both that value and the labels' own deviation (a fresh decoder
    starts near zero and has to grow up to its labels), or when it falls below a thousandth of that value.
    """

    growth: float
    smoothed: float = math.nan
    baseline: float = 0.0
    labels: float = 0.0
    warned: bool = False

    def watch(self, step: int, deviation: float, *, label_deviation: float, warmup_end: int) -> str | None:
        """The warning due at 1-based `step`, if any."""
        first = math.isnan(self.smoothed)  # on a GPU only steps with a log line are watched, so it may not be step 1
        momentum = 0.0 if first else SMOOTHING
        self.smoothed = deviation if first else momentum * self.smoothed + (1.0 - momentum) * deviation
        self.labels = momentum * self.labels + (1.0 - momentum) * label_deviation
        if first or step <= warmup_end:
            self.baseline = self.smoothed
            return None
        if self.warned:
            return None
        grown = self.smoothed > self.growth * max(self.baseline, self.labels)
        collapsed = self.smoothed <= max(COLLAPSED * self.baseline, 1e-12)
        if not (grown or collapsed):
            return None
        self.warned = True
        numbers = (
            f"its mean deviation is {self.smoothed:.3g}, against {self.baseline:.3g} at step {warmup_end} and "
            f"{self.labels:.3g} of the labels"
        )
        if grown:
            return f"the output's scale runs away: {numbers}; add the anchor loss, or normalize by the label only"
        return f"the output has collapsed to a constant: {numbers}; lower lr, warm up longer or look at the labels"

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return asdict(self)


def dump_batch(
    folder: Path, name: str, *, batches: Sequence[Batch], losses: Sequence[Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the micro-batches that made a step fail: NAME.safetensors (images, maps, boxes) and NAME.json (the rest).

    Tensors are called <micro-batch>/images, <micro-batch>/<teacher>/shared/values and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    images = []
    for i, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        tensors[f"{i}/images"] = batch.images
        for teacher, labels in batch.labels.items():
            tensors[f"{i}/{teacher}/boxes"] = labels.boxes
            maps: dict[str, DepthMap | None] = {"shared": labels.shared, "local": labels.local}
            for context, depth_map in maps.items():
                if depth_map is not None:
                    tensors[f"{i}/{teacher}/{context}/values"] = depth_map.values
                    tensors[f"{i}/{teacher}/{context}/valid"] = depth_map.valid
        images += [{"key": k, "loss": v} for k, v in zip(batch.keys, loss.tolist(), strict=True)]
    # Copies: safetensors refuses tensors that are strided or share memory.
    with files.writing(folder / f"{name}.safetensors") as new:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, new)
    table = _finite({**facts, "images": [_finite(image) for image in images]})
    files.write_json(folder / f"{name}.json", table, allow_nan=True)
