"""The score of one model on one benchmark, as an object and as a file.

A score file is JSON, with a .csv of the images beside it:

    {"version": 1, "model": str, "benchmark": str, "kind": str, "created": ISO time, "software": str,
     "protocol": {... every field of distill.eval.protocol.Protocol, "id": str, "setting": str},
     "num_images": n, "num_failed": m, "num_remarks": k, "num_extra": e, "partial": bool,
     "metrics": {name: mean over images or null},      of the task: ten for depth (eval.tasks); DA-2K's is over pairs
     "pooled": {name: over all pixels of all images},  not comparable with any paper
     "floors": {"0.001" and "1/max truth": {name: mean}},  under either floor; only for fits in disparity
     "nonpositive": share of scored pixels where an affine disparity is <= 0, mean over images,
     "scale_error": mean over images of |median(prediction / truth) - 1|; null unless scored in metres, unfitted,
     "groups": {group: {"num_images": n, "num_failed": m, "metrics": {...}}},  {} where a benchmark has no parts
     "cost": {...} or null,                            eval.cost: what predicting cost, and on which machine
     "images": [{"key", "group", "metrics": {...} or null, "scale", "shift", "failed": bool, "problem": str or null,
                 "scale_error": median(prediction / truth) - 1, above 0 is too far; only if metric}]}

An image with a problem was either not scored (`failed`) or scored with a remark. NaN and infinity are null.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.depth import Kind
from distill.core.wording import counted
from distill.eval.protocol import Protocol, from_dict
from distill.eval.tasks import TASKS, Task

Means = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image: its ten metrics, or None and the problem. failed: it should have been scored and was not."""

    key: str
    group: str
    metrics: dict[str, float] | None
    problem: str | None = None
    failed: bool = False
    scale: float | None = None
    shift: float | None = None
    scale_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The score of one model on one benchmark; the fields of a score file, see the module docstring."""

    model: str
    benchmark: str
    protocol: Protocol
    kind: Kind
    images: tuple[ImageScore, ...]
    metrics: Means
    pooled: Means
    floors: dict[str, Means]
    groups: dict[str, dict[str, Any]]
    num_extra: int = 0
    partial: bool = False
    nonpositive: float = 0.0
    software: str = ""
    created: str = ""
    cost: Mapping[str, Any] | None = None
    scale_error: float | None = None

    @property
    def task(self) -> Task:
        """What was measured, with the rows of its metrics."""
        return TASKS[self.protocol.task]

    @property
    def num_images(self) -> int:
        """Images of the list, scored or not."""
        return len(self.images)

    @property
    def count_text(self) -> str:
        """The number of images in words: "24 images", "1 image"."""
        return counted(self.num_images, "image")

    @property
    def num_failed(self) -> int:
        """Images that should have been scored and were not."""
        return sum(image.failed for image in self.images)

    def problems(self) -> list[str]:
        """One line per image with a problem, the failures first, then one about extra files."""
        marked = sorted((image for image in self.images if image.problem), key=lambda image: not image.failed)
        lines = [f"{image.key}: {image.problem}" for image in marked]
        if self.num_extra:
            verb = "belongs" if self.num_extra == 1 else "belong"
            lines.append(f"{counted(self.num_extra, '.npy file')} {verb} to no image of the list")
        return [self.left_out, *lines] if self.left_out else lines

    @property
    def left_out(self) -> str:
        """A line about non-positive pixels that the fit left out; "" if there were none."""
        if not self.nonpositive or not self.protocol.fit_positive or self.protocol.offset_positive:
            return ""
        return (
            f"{self.nonpositive:.1%} of the scored pixels are <= 0. Marigold's fit leaves them out, which penalizes "
            "a disparity of unknown shift: --offset-positive adds a constant first (another protocol id)"
        )


def require_writable(path: Path | str) -> None:
    """Raise OSError or ValueError if a score and its .csv cannot be written to `path`; creates its folder."""
    path = Path(path)
    csv_path = path.with_suffix(".csv")
    if csv_path == path:
        raise ValueError(f"{path}: scores are written as JSON, with a .csv of the same name; give a FILE.json")
    for file in (path, csv_path):
        if file.is_dir():
            raise OSError(f"{file} is a folder; name a file, such as {file / 'scores.json'}")
        try:
            files.make_folder(path.parent)
            with contextlib.suppress(FileNotFoundError):
                files.temporary_name(file).lstat()  # raises for a name that is too long
            # A name of its own: another process may be writing the file, or ask the same.
            probe = file.with_name(f".{secrets.token_hex(6)}{files.PARTIAL}")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"{file}: cannot be written ({error.strerror or error}); name another file") from error


def write_scores(result: Score, path: Path | str) -> None:
    """Write a score as JSON to `path` and its images as .csv beside it, each through a temporary file."""
    path = Path(path)
    require_writable(path)
    images = [
        {
            "key": image.key,
            "group": image.group,
            "metrics": None if image.metrics is None else finite(image.metrics),
            "scale": image.scale,
            "shift": image.shift,
            "failed": image.failed,
            "problem": image.problem,
            **({} if image.scale_error is None else {"scale_error": image.scale_error}),
        }
        for image in result.images
    ]
    protocol = {**result.protocol.as_dict(), "id": result.protocol.id, "setting": result.protocol.setting}
    content = {
        "version": 1,
        "model": result.model,
        "benchmark": result.benchmark,
        "kind": str(result.kind),
        "created": result.created,
        "software": result.software,
        "protocol": protocol,
        "num_images": result.num_images,
        "num_failed": result.num_failed,
        "num_remarks": sum(image.problem is not None and not image.failed for image in result.images),
        "num_extra": result.num_extra,
        "partial": result.partial,
        "nonpositive": result.nonpositive,
        "scale_error": result.scale_error,
        "metrics": result.metrics,
        "pooled": result.pooled,
        "floors": result.floors,
        "groups": result.groups,
        "cost": None if result.cost is None else dict(result.cost),
        "images": images,
    }
    files.write_json(path, content)
    names = [name for name in result.task.rows if name != result.task.group_mean]
    table = io.StringIO(newline="")
    rows: list[list[Any]] = [["key", "group", *names, "scale", "shift", "failed", "problem"]]
    for image in result.images:
        values = [repr((image.metrics or {}).get(name, math.nan)) for name in names]
        rows.append([image.key, image.group, *values, image.scale, image.shift, image.failed, image.problem or ""])
    csv.writer(table).writerows(rows)
    files.write_text(path.with_suffix(".csv"), table.getvalue())


def read_scores(path: Path | str) -> Score:
    """Read a score file; raises ValueError naming the file if it is not one, or was edited."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise ValueError(f"version {content['version']}, but this program reads version 1")
        protocol = from_dict({key: value for key, value in content["protocol"].items() if key != "setting"})
        images = tuple(
            ImageScore(
                **{name: row[name] for name in ("key", "group", "metrics", "problem", "failed", "scale", "shift")},
                scale_error=row.get("scale_error"),
            )
            for row in content["images"]
        )
        return Score(
            protocol=protocol,
            kind=Kind(content["kind"]),
            images=images,
            **{name: content[name] for name in ("model", "benchmark", "metrics", "pooled", "floors", "groups")},
            nonpositive=content.get("nonpositive", 0.0),
            scale_error=content.get("scale_error"),
            cost=dict(content["cost"]) if content.get("cost") else None,
            **{name: content[name] for name in ("num_extra", "partial", "software", "created")},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a score file ({error}); write one with distill score") from error


def finite(values: Mapping[str, float]) -> Means:
    """Replace NaN and infinity by None, since JSON has neither."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
