"""Check that a benchmark's download is complete, for `distill doctor --benchmark`.

The published lists are not shipped; their length and hash prove that the images found are the published ones. So an
image whose files are all missing can be counted but not named, unless `--list` names all images. Only the size and both
ends of every file are read, which quickly shows a truncated or empty one; three images are decoded in full. A flipped
bit in the middle of a file is not detected; the archive's checksum detects it (`distill fetch`).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TypeGuard

import numpy as np

from distill.core.depth import DepthMap, Kind
from distill.core.findings import Finding
from distill.core.plugins import find
from distill.core.wording import counted
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.benchmarks._files import Files, locate, packed_hint, rows_found, rows_of_list
from distill.eval.benchmarks._layouts import FileLayout, Rows
from distill.eval.benchmarks._units import unit_doubt
from distill.eval.protocol import Protocol, list_hash
from distill.eval.tasks import size_of

_MAX_NAMED = 5
_NUM_DECODED = 3
_RESUME_HINT = "distill fetch resumes an interrupted download"


def check_benchmark(name: str, root: Path | str | None, list_file: Path | str | None = None) -> list[Finding]:
    """Findings on the benchmark `name` in `root`: what is present, missing or damaged.

    Raises LookupError for an unknown name, ValueError or FileNotFoundError without a root or list.
    """
    module = find("distill.eval.benchmarks", name)
    layout: FileLayout | None = getattr(module, "LAYOUT", None)
    container_file = getattr(module, "container", lambda _: None)(root)  # the authors' own file, read in place
    if layout is None or container_file is not None:
        samples = list(module.samples(root, list_file))
        return [
            _count(module.PROTOCOL, [sample.key for sample in samples], listed=list_file),
            *_decoded(samples, module.PROTOCOL),
        ]
    files = Files(locate(root, name, layout), tolerant=True)
    findings = [_root(files), *_unfinished(Path(root or ""), layout)]
    if list_file is not None:
        rows = rows_of_list(files, list_file, layout)
        complete = [row for row in rows if all(files.has(file) for file in row)]
        incomplete = [row for row in rows if not all(files.has(file) for file in row)]
    else:
        complete, incomplete = rows_found(files, module.PROTOCOL, layout)
    count = _count(module.PROTOCOL, [row[0] for row in (rows if list_file else complete)], listed=list_file)
    if not complete and not incomplete and layout.shape:
        count = replace(count, remedy=f"expected layout: {layout.shape}{packed_hint(files.names())}")
    findings.append(count)
    findings += _parts(layout, complete)
    findings += _missing(files, incomplete, name, listed=list_file is not None, total=len(complete) + len(incomplete))
    damaged = _damaged(files, layout, complete)
    findings.append(damaged)
    if damaged.level == "ok" and complete:
        findings += _decoded(_samples(module, files.root, list_file, [row[0] for row in complete]), module.PROTOCOL)
    return findings


def _root(files: Files) -> Finding:
    if files.damage:
        return Finding("bad", files.damage, _RESUME_HINT)
    if not files.root.is_file():
        return Finding("ok", f"{files.root}: a folder")
    description = f"{files.root}: a tar of {files.root.stat().st_size / 1e6:,.1f} MB"
    with files.root.open("rb") as file:
        file.seek(max(0, files.root.stat().st_size - 512))
        has_end = not any(file.read())
    if not files.packed and not has_end:  # nothing else shows a cut between two files or inside a header
        return Finding("bad", f"{description}, cut short: its end is missing", _RESUME_HINT)
    if files.packed:
        return Finding("ok", f"{description}, compressed", "unpacking it once is faster: every run unpacks it again")
    return Finding("ok", description)


def _unfinished(root: Path, layout: FileLayout) -> list[Finding]:
    """Findings on downloads that are not finished."""
    parts = [path for path in (root / f"{layout.archive}.part", Path(f"{root}.part")) if path.is_file()]
    return [
        Finding("warn", f"{part}: unfinished, {part.stat().st_size / 1e6:,.1f} MB so far", _RESUME_HINT)
        for part in parts
    ]


def _count(protocol: Protocol, keys: Sequence[str], *, listed: Path | str | None) -> Finding:
    """Whether these are the images of the published list."""
    if not protocol.num_images:
        line = f"{counted(len(keys), 'image')}; there is no published list to compare with"
        return Finding("ok" if keys else "bad", line)
    digest = list_hash(keys)
    if len(keys) == protocol.num_images and digest == protocol.list_sha256:
        return Finding("ok", f"{len(keys)} of the {len(keys)} images of the published list (sha256 {digest[:12]}...)")
    difference = "other images than" if len(keys) == protocol.num_images else "images, not"
    message = f"{len(keys)} {difference} the {protocol.num_images} of the published list (sha256 {digest[:12]}...)"
    if listed is not None:
        return Finding("warn", f"{listed}: {message}", "scores on it are not comparable with published ones")
    return Finding("bad", message, "complete the download, or name the images to use with --list")


def _parts(layout: FileLayout, rows: Rows) -> list[Finding]:
    """Findings on the parts of the benchmark that are also reported separately."""
    findings = []
    for part, (number, digest) in layout.parts.items():
        keys = [row[0] for row in rows if row[0].split("/")[0] == part]
        matches = len(keys) == number and list_hash(keys) == digest
        findings.append(Finding("ok" if matches else "warn", f"{part}: {len(keys)} of {number} images"))
    return findings


def _missing(files: Files, broken: Rows, benchmark: str, *, listed: bool, total: int) -> list[Finding]:
    missing = [name for row in broken for name in row if not files.has(name)]
    if not missing:
        return []
    subject = "listed images" if listed else "images with at least one file"
    message = f"{len(broken)} of the {total} {subject} lack {counted(len(missing), 'file')}: {_join(missing)}"
    return [Finding("bad", message, f"distill fetch {benchmark}, or unpack the archive again")]


def _damaged(files: Files, layout: FileLayout, rows: Rows) -> Finding:
    """Files that are empty or cut short, by their sizes and ends."""
    names = [name for row in rows for name in row]
    faults = [f"{name} ({fault})" for name in names if (fault := damage(files, name, layout.size(name)))]
    if faults:
        return Finding("bad", f"{len(faults)} of {len(names)} files are damaged: {_join(faults)}", "fetch them again")
    return Finding("ok", f"{len(names)} files have the size and the ends that their format requires")


def damage(files: Files, name: str, size: int | None = None) -> str:
    """The visible damage of a file, or "". size: its required number of bytes."""
    length, head, tail = files.ends(name)
    if not length:
        return "empty"
    if size is not None:
        return "" if length == size else f"{length} bytes, not {size}"
    suffix = PurePosixPath(name).suffix.lower()
    if head.startswith((b"<!", b"<html", b"<HTML")):
        return "a web page"
    if suffix in (".png", ".jpg", ".jpeg") and head.startswith(b"\x89PNG"):
        intact = b"IEND" in tail[-16:]
    elif suffix in (".png", ".jpg", ".jpeg"):
        # A camera may append data after the end of its image: only decoding tells that from a truncated file.
        intact = (head.startswith(b"\xff\xd8") and b"\xff\xd9" in tail) or _decodes(files, name)
    elif suffix == ".npy":
        expected = _npy_size(head)
        intact = expected is not None and length == expected
    else:
        intact = True
    return "" if intact else f"cut short, or not a {suffix.removeprefix('.')}"


def _decodes(files: Files, name: str) -> bool:
    try:
        files.pixels(name)
    except OSError:
        return False
    return True


def _npy_size(head: bytes) -> int | None:
    """The length of a .npy file according to its header; None without a valid one."""
    if not head.startswith(b"\x93NUMPY"):
        return None
    wide = head[6] >= 2
    start = 12 if wide else 10
    end = start + int.from_bytes(head[8:start], "little")
    try:
        header = ast.literal_eval(head[start:end].decode("latin1").strip())
        return end + math.prod(header["shape"]) * np.dtype(header["descr"]).itemsize
    except (SyntaxError, ValueError, KeyError, TypeError, MemoryError, RecursionError):
        return None


def _samples(
    module: ModuleType, root: Path, list_file: Path | str | None, keys: Sequence[str]
) -> list[BenchmarkSample]:
    """The samples of complete images; empty if the benchmark rejects an incomplete root."""
    complete = set(keys)
    try:
        return [sample for sample in module.samples(root, list_file) if sample.key in complete]
    except (OSError, ValueError):
        return []


def _decoded(samples: Sequence[BenchmarkSample], protocol: Protocol) -> list[Finding]:
    """Decode the first, the middle and the last image in full."""
    if not samples:
        return []
    chosen = sorted({round(k * (len(samples) - 1) / (_NUM_DECODED - 1)) for k in range(_NUM_DECODED)})
    sizes, medians = [], []
    for index in chosen:
        try:
            sample = samples[index]
            image, truth = sample.image(), (sample.mark or sample.truth)()
        except (OSError, ValueError) as error:
            remedy = "" if samples[index].kind else "fetch it again"  # who writes a table of pairs has fetched nothing
            return [Finding("bad", f"{samples[index].key} cannot be decoded: {error}", remedy)]
        height, width = image.shape[-2:]
        valid = getattr(truth, "valid", None)
        if size_of(truth) not in (None, (height, width)):
            return [
                Finding("bad", f"{samples[index].key}: the image is {height} x {width}, its truth has another size")
            ]
        sizes.append(f"{height} x {width}" + (f", {valid.float().mean():.0%} valid" if valid is not None else ""))
        sizes[-1] += _range(truth)
        if _is_metric(truth):
            medians.append(float(truth.values[truth.valid].median()))
    found = [Finding("ok", f"{len(chosen)} images and truths decoded: {'; '.join(dict.fromkeys(sizes))}")]
    if doubt := unit_doubt(medians, protocol):
        found.append(Finding("warn", doubt, "compare a depth file with the published one, or fetch them again"))
    return found


def _is_metric(truth: object) -> TypeGuard[DepthMap]:
    return isinstance(truth, DepthMap) and truth.kind is Kind.METRIC_DEPTH and bool(truth.valid.any())


def _range(truth: object) -> str:
    """The nearest and the farthest metres of a truth, by which a wrong unit is seen; "" where there are none."""
    if not _is_metric(truth):
        return ""
    metres = truth.values[truth.valid]
    return f", {metres.min():.4g} to {metres.max():.4g} m"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
