"""`distill filter`: every sample of data sets, pairs and labels folders is scored once, and then kept or dropped.

    OUT/NAME.scores.jsonl     a line per sample, in the source's order, with every score, or why it could not be read
    OUT/NAME.txt              the names that are kept: images.names, or labels.names for a labels folder
    OUT/filter.json           thresholds, counts, reasons, means
    OUT/filter.html           distill.app.filter_page

Scoring streams: worker processes read ahead, lines are written in order, and a killed run resumes after its last
complete line. A further run reads only samples that could not be read before: a disk that was away costs none of them.
Dropping reads scores only, so new thresholds take a second. AnyDepth's rule: first drop samples with fewer than 20 %
valid pixels; of the rest, per source, drop the lowest 20 % of s_dist and the lowest 20 % of s_grad.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from distill.core import files
from distill.core.progress import Report
from distill.core.wording import first_line
from distill.data.patience import patiently
from distill.data.photos import BadImageError
from distill.data.quality import SCORES, depth_scores, image_scores
from distill.training.loading import end_with_parent, explain_dead_workers

CHUNK = 16
"""Samples that a worker process returns at once."""
VERSION = 2
"""Version of a scores file; a file of another version is scored again, not resumed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One sample to score. image: (H,W,3) uint8. depth: (H,W) float32, disparity where `nearer`.

    more: scores that the sample brings along (labels: disagreement, bridge, align).
    """

    image: np.ndarray
    depth: np.ndarray
    valid: np.ndarray
    nearer: bool
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Samples at random access, by number. name: of the files that are written. facts: AnyDepth's of its data set.

    names: one per sample, as lists have them. load raises BadImageError, OSError, ValueError or LookupError. key: the
    recipe key that takes such a list; "" if none does.
    """

    name: str
    what: str
    names: Sequence[str]
    load: Callable[[int], Scored]
    facts: Any = None
    key: str = "images.names"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which samples are dropped. valid: the minimum share of valid pixels. worst: by score, the share of samples to
    drop, the lowest or, where low is good, the highest. cuts: (score, "<" or ">", bound), each of which drops.
    """

    valid: float = 0.2
    worst: Mapping[str, float] = field(default_factory=lambda: {"s_dist": 0.2, "s_grad": 0.2})
    cuts: tuple[tuple[str, str, float], ...] = ()

    def __post_init__(self) -> None:
        faults = [f"valid must be in [0, 1], not {self.valid}"] if not 0 <= self.valid <= 1 else []
        faults += [f"{name} must be a share in [0, 1), not {s}" for name, s in self.worst.items() if not 0 <= s < 1]
        known = [*self.worst, *(name for name, *_ in self.cuts)]
        faults += [f"no score {name}; there are {', '.join(SCORES)}" for name in known if name not in SCORES]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for a source. reasons: why each sample is dropped, "" for kept ones. scores: (N,) by name, NaN where
    unknown. errors: of samples that could not be read, by number.
    """

    source: Source
    reasons: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    errors: Mapping[int, str]

    @property
    def kept(self) -> list[str]:
        """The names that are kept, in order."""
        return [name for name, reason in zip(self.source.names, self.reasons, strict=True) if not reason]


def cut(text: str) -> tuple[str, str, float]:
    """`disagreement>0.3` as (score, sign, bound); ValueError for any other text."""
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a cut; write a score, < or >, and a number, as in 'disagreement>0.3'")
    return match[1], match[2], float(match[3])


def worst(text: str) -> tuple[str, float]:
    """`s_dist=0.2` as (score, share); ValueError for any other text."""
    name, _, share = text.partition("=")
    try:
        return name.strip(), float(share)
    except ValueError:
        raise ValueError(f"{text!r} is not a score with a share; write both, as in s_dist=0.2") from None


# --- scoring ----------------------------------------------------------------------------------------------------------


class _Chunks(Dataset[list[str]]):
    """The score lines of some samples of a source, CHUNK samples per item."""

    def __init__(self, source: Source, numbers: Sequence[int], *, with_image: bool) -> None:
        self.source, self.numbers, self.with_image = source, numbers, with_image

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / CHUNK)

    def __getitem__(self, chunk: int) -> list[str]:
        if chunk >= len(self):
            raise IndexError(chunk)
        numbers = self.numbers[chunk * CHUNK : (chunk + 1) * CHUNK]
        return [score_line(self.source, number, with_image=self.with_image) for number in numbers]


def score_line(source: Source, number: int, *, with_image: bool) -> str:
    """One sample's line: its name and its scores, or the error that it raised."""
    line: dict[str, Any] = {"name": source.names[number]}
    try:
        sample = patiently(partial(source.load, number))
        scores = depth_scores(sample.depth, sample.valid)
        if with_image:
            scores |= image_scores(sample.image, sample.depth, sample.valid, larger_is_nearer=sample.nearer)
        scores |= sample.more
        line |= {name: round(value, 6) for name, value in scores.items() if math.isfinite(value)}
    except (BadImageError, OSError, ValueError, LookupError) as error:
        line["error"] = first_line(error)
    return json.dumps(line, ensure_ascii=False)


def score_source(
    source: Source, out: Path, *, workers: int = 0, with_image: bool = True, report: Report | None = None
) -> int:
    """Writes OUT/NAME.scores.jsonl, or its missing lines; returns how many samples an earlier call had scored.

    Samples that an earlier call could not read are read again. Raises OSError if a write fails; lines that are written
    stay.
    """
    path = scores_path(out, source)
    head = {"version": VERSION, "source": source.what, "samples": len(source.names), "image_scores": with_image}
    with explain_dead_workers("--workers"), files.raising_write_errors(path), files.only_writer(path):
        written = _resume(path, head, source)
        unread = [number for number, record in enumerate(_lines(path)) if "error" in record] if written else []
        count = done = written - len(unread)
        lines_again = []
        for lines in _score_lines(source, unread, workers=workers, with_image=with_image):
            lines_again += lines
            count += len(lines)
            if report:
                report(count, len(source.names))
        _replace_lines(path, dict(zip(unread, lines_again, strict=True)))
        with path.open("a", encoding="utf-8") as file:
            if not path.stat().st_size:
                file.write(json.dumps(head) + "\n")
            missing = range(written, len(source.names))
            for lines in _score_lines(source, missing, workers=workers, with_image=with_image):
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                count += len(lines)
                if report:
                    report(count, len(source.names))
    return done


def _score_lines(source: Source, numbers: Sequence[int], *, workers: int, with_image: bool) -> Iterator[list[str]]:
    """The lines of these samples, in their order, CHUNK at once, from worker processes that read ahead."""
    chunks = _Chunks(source, numbers, with_image=with_image)
    readers = min(workers, len(chunks))
    loader: DataLoader[list[str]] = DataLoader(
        chunks,
        batch_size=None,
        num_workers=readers,
        prefetch_factor=4 if readers else None,
        worker_init_fn=end_with_parent,
    )
    yield from loader


def _replace_lines(path: Path, lines: Mapping[int, str]) -> None:
    """Replace the lines of these samples, all at once."""
    if not lines:
        return
    with path.open(encoding="utf-8") as old, files.writing(path) as new, new.open("w", encoding="utf-8") as file:
        file.write(next(old))
        file.writelines(f"{lines[number]}\n" if number in lines else line for number, line in enumerate(old))


def scores_path(out: Path, source: Source) -> Path:
    """Where a source's scores lie."""
    return out / f"{source.name}.scores.jsonl"


def _resume(path: Path, head: Mapping[str, Any], source: Source) -> int:
    """Number of samples with complete lines; cuts off what follows. 0 for another head, and deletes the file."""
    if not path.is_file():
        return 0
    complete_bytes = count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            record = _json_object(line)
            if record is None or (number == 0 and record != head):
                break
            if number and (number > len(source.names) or record.get("name") != source.names[number - 1]):
                break
            complete_bytes, count = complete_bytes + len(line), number
    if not complete_bytes:
        path.unlink()
        return 0
    with path.open("r+b") as file:
        file.truncate(complete_bytes)
    return count


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


# --- dropping ---------------------------------------------------------------------------------------------------------


def judge(source: Source, out: Path, rules: Rules) -> Verdict:
    """Applies the rules to a scored source. Raises ValueError if not every sample is scored."""
    path = scores_path(out, source)
    scores = {name: np.full(len(source.names), np.nan) for name in SCORES}
    errors: dict[int, str] = {}
    num_scored = 0
    for number, record in enumerate(_lines(path)):
        if number >= len(source.names):
            break
        num_scored += 1
        if "error" in record:
            errors[number] = str(record["error"])
        for name in SCORES:
            scores[name][number] = record.get(name, math.nan)
    if num_scored != len(source.names):
        raise ValueError(f"{path}: {num_scored} of {len(source.names)} samples are scored; run the same command again")
    return Verdict(source, tuple(_reasons(scores, errors, rules)), scores, errors)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        next(file, None)
        for line in file:
            yield json.loads(line)


def _reasons(scores: Mapping[str, np.ndarray], errors: Mapping[int, str], rules: Rules) -> list[str]:
    """Why each sample is dropped: the first reason in the order unreadable, valid, the worst of each score, cuts."""
    count = len(scores["valid"])
    reasons = [""] * count

    def drop(numbers: Any, why: str) -> None:
        for number in numbers:
            reasons[number] = reasons[number] or why

    drop(errors, "unreadable")
    with np.errstate(invalid="ignore"):
        drop(np.flatnonzero(scores["valid"] < rules.valid), f"valid < {rules.valid:g}")
        remaining = np.array([number for number in range(count) if not reasons[number]], dtype=np.intp)
        for name, share in rules.worst.items():
            drop(
                _worst(scores[name], remaining, share, high_is_good=SCORES[name].high_is_good),
                f"worst {share:.0%} of {name}",
            )
        for name, sign, bound in rules.cuts:
            beyond = scores[name] < bound if sign == "<" else scores[name] > bound
            drop(np.flatnonzero(beyond), f"{name} {sign} {bound:g}")
    return reasons


def _worst(values: np.ndarray, left: np.ndarray, share: float, *, high_is_good: bool) -> np.ndarray:
    """The worst floor(share * n) of the n samples in `left` that have this score, worst first; ties in their order."""
    known = left[np.isfinite(values[left])]
    order = np.argsort(values[known] if high_is_good else -values[known], kind="stable")
    return known[order[: int(share * len(known) + 1e-9)]]


def write_results(verdicts: Sequence[Verdict], out: Path, rules: Rules) -> dict[str, Any]:
    """Writes the lists of names and filter.json; returns the content of the latter."""
    sources = []
    for verdict in verdicts:
        kept = verdict.kept
        files.write_text(out / f"{verdict.source.name}.txt", "".join(f"{name}\n" for name in kept))
        means = {name: float(np.nanmean(v)) for name, v in verdict.scores.items() if np.isfinite(v).any()}
        reasons = Counter(reason for reason in verdict.reasons if reason)
        sources.append(
            {"name": verdict.source.name, "source": verdict.source.what, "samples": len(verdict.reasons)}
            | {"kept": len(kept), "dropped": dict(reasons.most_common()), "means": means}
        )
    table = {"version": VERSION, "rules": asdict(rules), "sources": sources}
    files.write_json(out / "filter.json", table)
    return table
