"""The labelling run: input shards in, label shards out, in parts that are either complete or absent.

Every input shard is cut into parts by the order of its entries, whatever is wrong with the images, and each part is
one output tar. A part depends on nothing but its entries and the settings, so any number of processes, killed and
started again at any moment, write the same files with the same bytes. Beside each tar lies a json (written first)
with what the tar holds and which images were quarantined; the last process to finish merges them into the manifest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from distill.core.crop_settings import CropSettings
from distill.core.plugins import file_hashes
from distill.core.progress import Report
from distill.data.sources import BadImageError, Entry, InputShard, Rejected, combine
from distill.labelling.annotate import CPU, annotate, label_photo
from distill.labelling.jobs import TRUTH, CropJob, Teachers, asked_about, prepare
from distill.labelling.leases import ALONE, NOTES, Claim
from distill.labelling.lock import RunLockedError, mutex, run_lock
from distill.labelling.manifest import finish, keep_settings, settings_of
from distill.labelling.meeting import Folder
from distill.labelling.online import OnlineDataset
from distill.labelling.parts import Contents, Part, Tell, describe, is_done, line_of, parts_of
from distill.labelling.pools import ThreadPools, ahead, thread_pools
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.labelling.worker_costs import settle
from distill.shards.codec import Sample, encode_sample
from distill.shards.shards import DamagedTableError, ShardWriter, read_manifest

__all__ = [
    "TRUTH",
    "RunLockedError",
    "CropSettings",
    "LabelSettings",
    "OnlineDataset",
    "LabelOutcome",
    "label",
    "label_photo",
    "labels_hash",
]


TAIL = 20
"""labels.fine_tail is about one in so many input shards, the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOutcome:
    """What one process of a run did.

    complete: every part of every shard is there (of all processes) and the manifest is written. parts, skipped: written
    now, and found done. samples, images, quarantined, bytes: of the parts written now. last: False for a worker beside
    others, of whom another one wrote the manifest.
    """

    complete: bool
    parts: int
    skipped: int
    images: int
    samples: int
    quarantined: int
    bytes: int
    last: bool = True


def labels_hash(images: Any, crops: Any, teachers: Any) -> str:
    """The address of labels: 16 hex digits that depend on what images, crops and teachers are asked for, alone.

    Each is a dataclass, table or list of plain values; order of keys does not matter. A teacher that is a user's file
    counts with the file's bytes.
    """

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    what = [images, crops, teachers]
    what += [found for found in [file_hashes(teachers)] if found]
    text = json.dumps(what, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label(
    shards: Sequence[InputShard],
    teachers: Teachers,
    *,
    out: str | Path,
    crops: CropSettings,
    labels: LabelSettings = DEFAULTS,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
    recipe: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
    report: Report | None = None,
    tell: Tell = lambda line: None,
) -> LabelOutcome:
    """Label images into `out`; called again, it does what is missing.

    teachers: (name, teacher) pairs, or (name, "truth") for the images' own ground truth. labels: what of them concerns
    making labels; where they lie, a mirror and which teachers are taken are the caller's. rank, world: this process and
    how many there are. device: where the teachers are. recipe, machine: written to the manifest. report: called
    after every image with done, total and numbers (images_per_s, bytes_per_image, quarantined, eta_s, disk_bytes) for
    this process. tell: called with a line about what was damaged and is made again: the settings, the manifest, the
    json of a tar.

    Raises RunLockedError where another run holds `out`; ValueError where `out` was made with other settings or from
    other images, or a teacher fails on everything; OSError where the disk refuses. Finished parts are kept in any case.
    """
    out, settings = Path(out), settings_of(teachers, crops, labels, seed=seed)
    make_folder(out, shards, teachers)
    with run_lock(out, rank=rank, world=world):
        with mutex(out):
            keep_settings(out, settings, tell=tell)
            manifest = _manifest_there(out)
        mine = _share(shards, part_sizes(shards, crops, labels), rank, world)
        todo = [part for part in mine if not is_done(out, part, teachers, manifest=manifest, tell=tell)]
        tally = Tally(sum(len(p.entries) for p in mine), sum(len(p.entries) for p in mine if p not in todo), report)
        with thread_pools(max(1, labels.threads), device) as pools:
            for part in todo:
                work = Work(teachers, crops, labels, seed, device, asked_about(part.shard, teachers), pools.stopping)
                pools.close(label_part(out, part, work, tally, pools).finish)
        with mutex(out):
            about = made_by(recipe, machine)
            complete = finish(out, shards, settings, about, licence=labels.licence, fresh=bool(todo), tell=tell)
            if complete and (out / NOTES).is_dir():
                settle(Folder(out))  # notes of workers that are dead, or the lock were not ours
    return LabelOutcome(
        complete=complete,
        parts=len(todo),
        skipped=len(mine) - len(todo),
        images=tally.images,
        samples=tally.samples,
        quarantined=tally.quarantined,
        bytes=tally.bytes,
    )


def make_folder(out: Path, shards: Sequence[InputShard], teachers: Teachers) -> None:
    """The labels folder, once the images are known to be named apart and to have teachers. Raises what `label` does."""
    combine(shards)
    if not shards:
        raise ValueError("there are no images to label; check [images]")
    _check_own(out, shards)
    for shard in shards:
        asked_about(shard, teachers)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the labels folder {out}: {error.strerror}") from error


def _check_own(out: Path, shards: Sequence[InputShard]) -> None:
    """Raises ValueError where `out` has finished labels, and none of them is of these shards."""
    if any((out / f"{shard.stem}-000.json").is_file() for shard in shards):
        return  # a manifest of millions of images is not read for nothing
    tars = [tar["name"] for tar in _manifest_there(out).get("shards", ())]
    if tars and not {name.rpartition("-")[0] for name in tars} & {shard.stem for shard in shards}:
        raise ValueError(
            f"{out} has finished labels of other images ({tars[0]}, and these are {shards[0].stem}): label into "
            "another folder; tars are named after the images' own tar or folder, so one that was renamed is another"
        )


def made_by(recipe: Mapping[str, Any] | None, machine: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of how labels were made."""
    return {"recipe": dict(recipe or {}), **({"machine": dict(machine)} if machine else {})}


def _manifest_there(out: Path) -> dict[str, Any]:
    """The manifest of a folder that was finished before; an empty one where there is none, or none that is whole."""
    try:
        return read_manifest(out)
    except (FileNotFoundError, DamagedTableError):
        return {}


def part_sizes(shards: Sequence[InputShard], crops: CropSettings, labels: LabelSettings) -> list[int]:
    """How many images a part of each shard has at most; fewer in the last of them where labels.fine_tail says so."""
    size = max(1, labels.samples_per_part // crops.crops_per_image)
    fine = -(-len(shards) // TAIL) if labels.fine_tail > 1 else 0
    return [size] * (len(shards) - fine) + [max(1, size // labels.fine_tail)] * fine


def _share(shards: Sequence[InputShard], sizes: Sequence[int], rank: int, world: int) -> list[Part]:
    """The parts of process `rank`: whole shards where there are plenty, so that it need not look into the others."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1}, not {rank}")
    if len(shards) >= 4 * world:
        mine = zip(shards[rank::world], sizes[rank::world], strict=True)
        return [part for shard, size in mine for part in parts_of(shard, size)]
    every = zip(shards, sizes, strict=True)
    return [part for shard, size in every for part in parts_of(shard, size)][rank::world]


# --- one part ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What every part is labelled with."""

    teachers: Teachers
    crops: CropSettings
    labels: LabelSettings
    seed: int
    device: torch.device
    asked: tuple[str, ...]
    stopping: Event
    claim: Claim = ALONE

    def jobs(self, entry: Entry) -> list[CropJob | Rejected]:
        """An entry's regions, or why there are none."""
        try:
            photo = entry.load()
            return [
                prepare(photo, crops=self.crops, seed=self.seed, draw=draw, sky=self.labels.sky, teachers=self.asked)
                for draw in range(self.crops.crops_per_image)
                if not self.stopping.is_set()
            ]
        except BadImageError as error:
            return [Rejected(entry.origin, entry.key, str(error))]


@dataclass(slots=True)
class Tally:
    """Counts of this process, and what they say about the rest; nothing about its end where others share the work.

    busy: seconds spent on parts, of a worker.
    """

    total: int
    before: int
    report: Report | None
    shared: bool = False
    busy: float = 0.0
    images: int = 0
    samples: int = 0
    quarantined: int = 0
    bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        if self.report is None or self.images == 0:
            return
        rate = self.images / max(time.monotonic() - self.started, 1e-9)
        per_image = self.bytes / self.images
        left = {} if self.shared else {"eta_s": (self.total - self.before - self.images) / rate}
        self.report(
            self.before + self.images,
            self.total,
            images_per_s=rate,
            bytes_per_image=per_image,
            quarantined=float(self.quarantined),
            **left,
            disk_bytes=per_image * self.total,
        )


_Encoded = tuple[Sample | Rejected, list[tuple[str, bytes]]]


def _encode(codec: str, result: Sample | Rejected) -> _Encoded:
    return result, [] if isinstance(result, Rejected) else encode_sample(result, codec=codec)


def _store(writer: ShardWriter, encoded: _Encoded) -> tuple[Sample | Rejected, int]:
    """Writes a sample; gives its bytes."""
    result, members = encoded
    if members:
        writer.add(result.key, members)
    return result, sum(len(data) for _, data in members)


@dataclass(slots=True)
class OpenPart:
    """A part that is being written: its tar aside, and what its json will say."""

    out: Path
    part: Part
    writer: ShardWriter
    quarantine: list[Rejected]
    claim: Claim = ALONE
    contents: Contents = field(default_factory=Contents)

    def finish(self) -> None:
        """The tar to the disk, its json, and then its name; raises LeaseLostError where the part is no longer ours.

        Asked once: whoever takes it over after that takes its file aside away first (`Meeting.begin`), which then
        cannot be renamed, and the json is the same from all.
        """
        with self.writer as writer:
            closed, lines = writer.close(), [line_of(one) for one in self.quarantine]
            self.claim.check()
            describe(
                self.out,
                self.part,
                self.contents,
                tar=closed,
                samples=writer.index,
                quarantine=lines,
                suffix=self.claim.suffix,
            )
            if writer.index:
                writer.publish()


def label_part(out: Path, part: Part, work: Work, tally: Tally, pools: ThreadPools) -> OpenPart:
    """Label one part, its tar still aside, for `OpenPart.finish`. Raises what `label` raises, and LeaseLostError.

    This thread does nothing but ask the teachers: see `labelling.pools`.
    """
    writer = ShardWriter(out / part.name, suffix=work.claim.suffix)
    try:
        opened = OpenPart(out, part, writer, list(part.rejected), work.claim)
        tally.quarantined += len(part.rejected)
        prepared = ahead(pools.workers, work.jobs, part.entries, 2 * pools.threads)
        jobs = (job for several in prepared for job in several)
        results = annotate(jobs, work.teachers, labels=work.labels, device=work.device)
        last = ""
        encoded = ahead(pools.workers, partial(_encode, work.labels.codec), results, 2 * pools.threads)
        for result, size in ahead(pools.writer, partial(_store, writer), encoded, 2 * pools.threads):
            if work.claim.lost:
                work.claim.check()
            if isinstance(result, Rejected):
                opened.quarantine.append(result)
                tally.quarantined += 1
            else:
                tally.samples += 1
                tally.bytes += size
                opened.contents.note(result)
            origin = result.origin if isinstance(result, Rejected) else result.record["image"]["origin"]
            tally.images, last = tally.images + (origin != last), origin
            tally.tell()
    except BaseException:
        with writer:
            raise
    return opened
