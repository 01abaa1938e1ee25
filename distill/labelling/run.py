"""The labelling run: from input shards to label shards, in parts that are either complete or absent.

Every input shard is split into parts by the order of its entries, even where images are bad, and each part becomes one
output tar. A part depends only on its entries and the settings, so any number of processes, killed and restarted at any
moment, write the same files with the same bytes. Beside each tar is a json (written first) with the tar's content and
the quarantined images; the last process to finish merges these into the manifest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from distill.core.addresses import public
from distill.core.crop_settings import CropSettings
from distill.core.plugins import file_hashes
from distill.core.progress import Report
from distill.data.patience import patiently
from distill.data.sources import BadImageError, Entry, InputShard, Rejected, combine
from distill.labelling.annotate import CPU, annotate, label_photo
from distill.labelling.jobs import TRUTH, CropJob, Teachers, asked_about, prepare
from distill.labelling.leases import ALONE, Claim
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
"""labels.fine_tail applies to about one in this many input shards, the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOutcome:
    """The result of one process of a run.

    complete: all processes' parts exist and the manifest is written. parts, skipped: numbers of parts written now, and
    of parts found done. samples, images, quarantined, bytes: of the parts written now. last: False for a worker beside
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
    """The address of labels: 16 hex digits that depend only on the settings of images, crops and teachers.

    Each is a dataclass, table or list of plain values; order of keys does not matter. For a teacher that is a user's
    file, the file's bytes are hashed too. An address that was signed again is the same.
    """

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    content = [images, crops, teachers]
    content += [hashes for hashes in [file_hashes(teachers)] if hashes]
    text = public(json.dumps(content, sort_keys=True, default=plain))
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
    """Label images into `out`; when called again, it makes the missing parts.

    teachers: (name, teacher) pairs, or (name, "truth") for the images' own ground truth. labels: used for making labels
    only; their folder, the mirror and the choice of teachers are up to the caller. rank, world: this process and the
    number of processes. device: where the teachers are. recipe, machine: written to the manifest. report: called after
    every image with done, total and numbers (images_per_s, bytes_per_image, quarantined, eta_s, disk_bytes) for this
    process. tell: called with a message about each damaged file that is made again: the settings, the manifest, the
    json of a tar.

    Raises RunLockedError where another run holds `out`; ValueError where `out` was made with other settings or from
    other images, or a teacher fails on everything; OSError from the disk. Finished parts are kept in any case.
    """
    out, settings = Path(out), settings_of(teachers, crops, labels, seed=seed)
    make_folder(out, shards, teachers)
    with run_lock(out, rank=rank, world=world):
        with mutex(out):
            keep_settings(out, settings, tell=tell)
            manifest = _existing_manifest(out)
        parts = _own_parts(shards, part_sizes(shards, crops, labels), rank, world)
        todo = [part for part in parts if not is_done(out, part, teachers, manifest=manifest, tell=tell)]
        total, missing = (sum(len(part.entries) for part in group) for group in (parts, todo))
        tally = Tally(total, total - missing, report)
        with thread_pools(max(1, labels.threads), device) as pools:
            for part in todo:
                work = PartSettings(
                    teachers, crops, labels, seed, device, asked_about(part.shard, teachers), pools.stopping
                )
                opened = label_part(out, part, work, tally, pools)
                opened.submit(pools, opened.finish)
        with mutex(out):
            about = made_by(recipe, machine)
            complete = finish(out, shards, settings, about, licence=labels.licence, fresh=bool(todo), tell=tell)
            if complete:
                settle(Folder(out))  # what killed runs and workers left: with a live one we would not have the lock
    return LabelOutcome(
        complete=complete,
        parts=len(todo),
        skipped=len(parts) - len(todo),
        images=tally.images,
        samples=tally.samples,
        quarantined=tally.quarantined,
        bytes=tally.bytes,
    )


def make_folder(out: Path, shards: Sequence[InputShard], teachers: Teachers) -> None:
    """Make the labels folder, after checking that images have distinct names and teachers. Raises what `label` does."""
    combine(shards)
    if not shards:
        raise ValueError("there are no images to label; check [images]")
    _check_same_images(out, shards)
    for shard in shards:
        asked_about(shard, teachers)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the labels folder {out}: {error.strerror}") from error


def _check_same_images(out: Path, shards: Sequence[InputShard]) -> None:
    """Raises ValueError where `out` has finished labels, but none of these shards."""
    if any((out / f"{shard.stem}-000.json").is_file() for shard in shards):
        return  # avoids reading a manifest of millions of images
    tars = [tar["name"] for tar in _existing_manifest(out).get("shards", ())]
    if tars and not {name.rpartition("-")[0] for name in tars} & {shard.stem for shard in shards}:
        raise ValueError(
            f"{out} has finished labels of other images ({tars[0]}, not {shards[0].stem}): label into another folder, "
            "or undo the renaming of the images' tar or folder, after which label tars are named"
        )


def made_by(recipe: Mapping[str, Any] | None, machine: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest's entries on how labels were made."""
    return {"recipe": dict(recipe or {}), **({"machine": dict(machine)} if machine else {})}


def _existing_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a folder that was finished before; {} where there is none, or it is damaged."""
    try:
        return read_manifest(out)
    except (FileNotFoundError, DamagedTableError):
        return {}


def part_sizes(shards: Sequence[InputShard], crops: CropSettings, labels: LabelSettings) -> list[int]:
    """The largest number of images in a part of each shard; smaller in the last shards with labels.fine_tail."""
    size = max(1, labels.samples_per_part // crops.crops_per_image)
    fine_shards = -(-len(shards) // TAIL) if labels.fine_tail > 1 else 0
    return [size] * (len(shards) - fine_shards) + [max(1, size // labels.fine_tail)] * fine_shards


def _own_parts(shards: Sequence[InputShard], sizes: Sequence[int], rank: int, world: int) -> list[Part]:
    """The parts of process `rank`: whole shards where there are many, so that it need not scan the others."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1}, not {rank}")
    if len(shards) >= 4 * world:
        own_shards = zip(shards[rank::world], sizes[rank::world], strict=True)
        return [part for shard, size in own_shards for part in parts_of(shard, size)]
    all_shards = zip(shards, sizes, strict=True)
    return [part for shard, size in all_shards for part in parts_of(shard, size)][rank::world]


# --- one part ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartSettings:
    """The arguments that labelling every part shares."""

    teachers: Teachers
    crops: CropSettings
    labels: LabelSettings
    seed: int
    device: torch.device
    asked: tuple[str, ...]
    stopping: Event
    claim: Claim = ALONE

    def jobs(self, entry: Entry) -> list[CropJob | Rejected]:
        """An entry's regions, or the reason why there are none."""
        try:
            photo = patiently(entry.load)
            return [
                prepare(photo, crops=self.crops, seed=self.seed, draw=draw, sky=self.labels.sky, teachers=self.asked)
                for draw in range(self.crops.crops_per_image)
                if not self.stopping.is_set()
            ]
        except BadImageError as error:
            return [Rejected(entry.origin, entry.key, str(error))]


@dataclass(slots=True)
class Tally:
    """Counts of this process and its reports of progress; without an ETA where others share the work.

    busy: seconds that a worker spent on parts.
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
        eta = {} if self.shared else {"eta_s": (self.total - self.before - self.images) / rate}
        self.report(
            self.before + self.images,
            self.total,
            images_per_s=rate,
            bytes_per_image=per_image,
            quarantined=float(self.quarantined),
            **eta,
            disk_bytes=per_image * self.total,
        )


_Encoded = tuple[Sample | Rejected, list[tuple[str, bytes]]]


def _encode(codec: str, result: Sample | Rejected) -> _Encoded:
    return result, [] if isinstance(result, Rejected) else encode_sample(result, codec=codec)


def _store(writer: ShardWriter, encoded: _Encoded) -> tuple[Sample | Rejected, int]:
    """Write a sample; returns it and its number of bytes."""
    result, members = encoded
    if members:
        writer.add(result.key, members)
    return result, sum(len(data) for _, data in members)


@dataclass(slots=True)
class OpenPart:
    """A part that is being written: its partial tar, and the content of its json."""

    out: Path
    part: Part
    writer: ShardWriter
    quarantine: list[Rejected]
    claim: Claim = ALONE
    contents: Contents = field(default_factory=Contents)

    def finish(self) -> None:
        """Sync the tar, write its json, then rename the tar; raises LeaseLostError where the part is no longer ours.

        The claim is checked once: a worker that takes over after that first removes the partial tar (`Meeting.begin`),
        which then cannot be renamed, and every worker writes the same json.
        """
        with self.writer as writer:
            closed, lines = writer.close(), [line_of(rejected) for rejected in self.quarantine]
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

    def submit(self, pools: ThreadPools, finish: Callable[[], None]) -> None:
        """Run `finish` in the pools; where the part before failed, raise its error and remove this partial tar."""
        try:
            pools.close(finish)
        except BaseException:
            with self.writer:
                raise


def label_part(out: Path, part: Part, work: PartSettings, tally: Tally, pools: ThreadPools) -> OpenPart:
    """Label one part into a partial tar, for `OpenPart.finish`. Raises what `label` raises, and LeaseLostError.

    This thread only asks the teachers: see `labelling.pools`.
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
