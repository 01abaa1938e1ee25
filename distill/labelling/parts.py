"""The parts of a run, and the json beside each tar: its content, and how it is restored where it is lost or damaged.

Remaking a part's tar takes the teachers, remaking its json does not: the tar lists its samples, the scan the images it
was made from, and the manifest which of those were quarantined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.addresses import public
from distill.core.seal import sealed
from distill.data.sources import Entry, InputShard, Rejected, identity
from distill.labelling.jobs import Teachers, asked_about
from distill.labelling.manifest import is_whole, part_name, sidecar_name
from distill.shards.codec import VERSION, Sample, dump_json
from distill.shards.shards import DamagedTableError, index_from_headers, read_json, read_shard

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive entries that become one tar; the first part of a shard also reports the scan's rejects."""

    shard: InputShard
    number: int
    of: int
    entries: tuple[Entry, ...]
    rejected: tuple[Rejected, ...]
    skipped: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The name of its tar."""
        return part_name(self.shard.stem, self.number)

    @property
    def sidecar(self) -> str:
        """The name of the json beside its tar."""
        return sidecar_name(self.name)


def parts_of(shard: InputShard, images_per_part: int) -> list[Part]:
    """The parts of a shard: at least one, which without entries writes no tar, only a json with the reasons."""
    scan = shard.scan()
    runs = [scan.entries[i : i + images_per_part] for i in range(0, len(scan.entries), images_per_part)] or [()]
    first = (scan.rejected, scan.skipped)
    return [Part(shard, i, len(runs), run, *(first if i == 0 else ((), ()))) for i, run in enumerate(runs)]


@dataclass(slots=True)
class Contents:
    """What a part's json records of its samples: kinds of labels, and how many a bridge or a fit to truth dropped."""

    kinds: dict[str, set[str]] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def note(self, result: Sample) -> None:
        """Record a sample."""
        for name, labels in result.answers.items():
            self.kinds.setdefault(name, set()).add(str(labels.shared.kind))
            label_record = result.record["labels"][name]
            if fit := label_record.get("bridge") or label_record.get("align"):
                count = self.dropped.setdefault(name, {"regions": 0, "patches": 0})
                count["regions"] += fit["shared"]["dropped"]
                count["patches"] += sum(patch["dropped"] for patch in fit["local"])


def describe(
    out: Path,
    part: Part,
    contents: Contents,
    *,
    tar: Mapping[str, Any],
    samples: Sequence[tuple[str, int, int]],
    quarantine: Sequence[Mapping[str, str]],
    suffix: str = "",
) -> None:
    """Write the json of a part. tar: the result of `ShardWriter.close`; samples: (key, first byte, bytes). suffix:
    `files.writing`'s.
    """
    sidecar = {
        "version": VERSION,
        "part": part.number,
        "of": part.of,
        "images": [entry.key for entry in part.entries],
        "tar": tar if samples else None,
        "samples": samples,
        **({"input": input_identity} if (input_identity := identity(part.entries)) else {}),
        "quarantine": quarantine,
        "kinds": {name: sorted(values) for name, values in contents.kinds.items()},
        **({"bridge_dropped": contents.dropped} if contents.dropped else {}),
        **({"passed": dict(part.skipped)} if part.skipped else {}),
    }
    files.write_bytes(out / part.sidecar, dump_json(sealed(sidecar)), suffix=suffix)


def line_of(rejected: Rejected) -> dict[str, str]:
    """The record of an image in quarantine."""
    # Memory addresses would differ from run to run.
    return {**asdict(rejected), "reason": public(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", rejected.reason))}


def _restore_description(out: Path, part: Part, manifest: Mapping[str, Any]) -> bool:
    """Rewrite a part's json from its tar, if that is the manifest's tar byte for byte; returns whether it is."""
    path = out / part.name
    tar = next((shard for shard in manifest.get("shards", ()) if shard["name"] == part.name), None)
    if tar is None or not is_whole(out, tar) or files.file_sha256(path) != tar["sha256"]:
        return False
    contents, keys = Contents(), {entry.key for entry in part.entries}
    for sample in read_shard(path):
        contents.note(sample)
        if sample.image_key not in keys:
            return False
    first_lines = [line_of(rejected) for rejected in part.rejected]
    places = {entry.origin for entry in part.entries}
    later = [line for line in manifest["quarantine"] if line["origin"] in places and line not in first_lines]
    tar = {key: tar[key] for key in ("name", "sha256", "bytes", "samples")}
    describe(out, part, contents, tar=tar, samples=index_from_headers(path), quarantine=first_lines + later)
    return True


def is_done(
    out: Path,
    part: Part,
    teachers: Teachers,
    *,
    manifest: Mapping[str, Any],
    tell: Tell,
    whole: Callable[[Path, Mapping[str, Any]], bool] = is_whole,
) -> bool:
    """Whether a part needs no work; raises ValueError where it was made from other images or by other teachers.

    manifest: the folder's, or {}. whole: checks the tar that a json describes. A json that is lost or damaged is
    restored from its tar, where that is whole.
    """
    sidecar = out / part.sidecar
    described = None
    if sidecar.is_file():
        try:
            described = read_json(sidecar)
        except DamagedTableError as error:
            tell(f"{str(error).partition(';')[0]}; it is made again")
    if described is None:
        if not _restore_description(out, part, manifest):
            return False
        described = read_json(sidecar)
        tell(f"{sidecar} was rebuilt from its tar")
    return _is_same(out, part, described, teachers) and (described["tar"] is None or whole(out, described["tar"]))


def _is_same(out: Path, part: Part, before: Mapping[str, Any], teachers: Teachers) -> bool:
    """Whether the part was made from the current images: False where it has grown, ValueError where it differs."""
    keys = [entry.key for entry in part.entries]
    delete = (
        f"label into another folder (--set run.name=NAME), or delete {part.shard.stem}-[0-9][0-9][0-9].* in this one"
    )
    if before["images"] != keys or before["of"] != part.of:
        grown = before["images"] == keys[: len(before["images"])]
        if not grown and part.shard.is_tar:
            unmatched = iter([entry.key for entry in part.shard.scan().entries])
            grown = all(key in unmatched for key in before["images"])
        if grown and before["of"] <= part.of:
            return False
        why = f": {part.rejected[0].reason}" if part.rejected and not keys else ""
        if before["images"] != keys and {*before["images"]} <= {entry.key for entry in part.shard.scan().entries}:
            delete = (
                "images were added before or between the labelled ones. Move those to a folder of their own, a further "
                f"[[images]] table, and add --set labels.root={out}: only they are labelled then. Or {delete}"
            )
        raise ValueError(
            f"{out / part.name} was labelled from different images than {part.shard.origin} has now "
            f"({len(before['images'])} then, {len(keys)} now{why}): {delete}"
        )
    if input_before := before.get("input"):
        now = identity(part.entries)
        if any(now[key] != input_before[key] for key in input_before if key in now):
            raise ValueError(
                f"{out / part.name} was labelled from different files with the same names as in "
                f"{part.shard.origin} now: restore those, {delete}"
            )
    asked = {*asked_about(part.shard, teachers)}
    if (by := {*before["kinds"]}) and by != asked:
        raise ValueError(
            f"{out / part.name} was labelled by {', '.join(sorted(by))}, but {part.shard.origin} is now to be labelled "
            f"by {', '.join(sorted(asked))}: {delete}"
        )
    return True
