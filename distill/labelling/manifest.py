"""The description of a labels folder: its settings from the start, its manifest once it is complete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.addresses import public
from distill.core.crop_settings import CropSettings
from distill.core.depth import Kind
from distill.core.plugins import origins
from distill.core.seal import sealed
from distill.data.corruptions import Corruptions
from distill.data.sources import InputShard
from distill.labelling.alignment import Aligned
from distill.labelling.bridge import Bridged
from distill.labelling.finishing import stored_kind
from distill.labelling.jobs import TRUTH, Teachers
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.shards.codec import VERSION, dump_json
from distill.shards.readme import README, describe_format, labels_readme
from distill.shards.shards import (
    MANIFEST,
    SETTINGS,
    DamagedTableError,
    hash_keys,
    read_json,
    read_manifest,
    read_shard,
    write_manifest,
)


def _card(teacher: Any, store: str) -> dict[str, Any]:
    """The manifest's record of a teacher; `stored` is the kind of its labels."""
    if isinstance(teacher, str):
        return {"name": TRUTH, "licence": "that of the images"}
    if isinstance(teacher, Corruptions):
        return {"name": TRUTH, "licence": "that of the images", "faults": asdict(teacher)}
    kind = Kind(teacher.card.kind)
    if isinstance(teacher, Bridged):
        bridge = {"primary": teacher.primary, "most": teacher.max_residual}
        return {**asdict(teacher.card), "kind": str(kind), "stored": str(Kind.AFFINE_DISPARITY), "bridge": bridge}
    if isinstance(teacher, Aligned):
        align = {"to": TRUTH, "most": teacher.max_residual, "inliers": teacher.min_inliers}
        return {**asdict(teacher.card), "kind": str(kind), "align": align}
    return {**asdict(teacher.card), "kind": str(kind), "stored": str(stored_kind(kind, store))}


def settings_of(teachers: Teachers, crops: CropSettings, labels: LabelSettings, *, seed: int) -> dict[str, Any]:
    """The settings that all labels of a folder share; raises ValueError for teachers that cannot be recorded."""
    names = [name for name, _ in teachers]
    for name, teacher in teachers:
        if not re.fullmatch(r"[a-z0-9_\-]+", name):
            raise ValueError(f"the teacher name {name!r} becomes part of file names: use only a-z, 0-9, _ and -")
        if isinstance(teacher, str) and teacher != TRUTH:
            raise ValueError(f'teacher {name} must be a loaded teacher or "{TRUTH}", not {teacher!r}')
    if not names or len(set(names)) != len(names):
        raise ValueError(f"each teacher needs a distinct name: {', '.join(names) or 'there is no teacher'}")
    return {
        "version": VERSION,
        "crops": crops.content,
        "seed": seed,
        **{name: getattr(labels, name) for name in ("store", "sky", "codec", "samples_per_part")},
        **({"fine_tail": labels.fine_tail} if labels.fine_tail > 1 else {}),
        "teachers": [{"as": name, **_card(teacher, labels.store)} for name, teacher in teachers],
    }


def keep_settings(out: Path, settings: dict[str, Any], *, tell: Callable[[str], object], suffix: str = "") -> None:
    """Write the folder's settings, or raise ValueError where it was begun with others; suffix: `files.writing`'s.

    Of processes that begin it simultaneously with different settings, all but one raise. Damaged settings are
    rewritten, unless the manifest, or else a label, contradicts them.
    """
    path, ours = out / SETTINGS, dump_json(sealed(settings))
    if not path.is_file() and files.write_new(path, ours):
        return
    write = False
    try:
        before = _with_current_keys(read_json(path))
    except DamagedTableError as error:
        tell(f"{str(error).partition(';')[0]}; it is rewritten")
        write, before = True, {**settings, **_with_current_keys(_settings_from_labels(out, settings))}
    changed = [name for name in dict.fromkeys([*settings, "fine_tail"]) if settings.get(name) != before.get(name)]
    if changed:
        raise ValueError(
            f"{out} holds labels made with different settings: {', '.join(changed)} (see {path}). Label into another "
            "folder, or delete this one"
        )
    if write:
        files.write_bytes(path, ours, suffix=suffix)


def _settings_from_labels(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings according to the manifest, or else to the first sample of the first tar."""
    try:
        return dict(read_manifest(out)["settings"])
    except (FileNotFoundError, DamagedTableError):
        tar = next(iter(sorted(out.glob("*.tar"))), None)
    if tar is None:
        return {}
    record = next(read_shard(tar)).record
    sizes = {name: record["crop"][name] for name in ("size", "patch_size") if name in settings["crops"]}
    return {"seed": record["seed"], "codec": record["codec"], "crops": {**settings["crops"], **sizes}}


def _with_current_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with current keys, from those of a folder that was begun before keys were renamed."""
    if "draws" not in settings:
        return settings
    crops = dict(settings["crops"])
    crops |= {"on_small": crops.pop("small"), "patch_size": crops["patch_size"] or 0}
    return {**settings, "crops": {**crops, "crops_per_image": settings["draws"]}, "sky": settings["sky"] or "teacher"}


def finish(
    out: Path,
    shards: Sequence[InputShard],
    settings: dict[str, Any],
    about: Mapping[str, Any],
    *,
    licence: str,
    fresh: bool,
    tell: Callable[[str], object],
    whole: Callable[[Path, Mapping[str, Any]], bool] | None = None,
    suffix: str = "",
) -> bool:
    """Write the manifest if every part of every shard is there; returns whether. about: the recipe and the machine.

    fresh: writes it even where it already lists these tars, with this licence of images. whole: checks a tar, by
    default `is_whole`. suffix: as `files.writing` has it.
    """
    sidecars: list[dict[str, Any]] = []
    sources: dict[str, int] = {}
    for shard in shards:
        number, of = 0, 1
        while number < of:
            tar = part_name(shard.stem, number)
            path = out / sidecar_name(tar)
            if not path.is_file():
                return False
            try:
                entry = read_json(path)
            except DamagedTableError:
                return False  # another process's part, which that process makes again
            if entry["tar"] is not None and not (whole or is_whole)(out, entry["tar"]):
                return False
            sidecars.append(entry)
            sources[tar] = shard.source
            number, of = number + 1, entry["of"]
    if (out / MANIFEST).is_file():
        try:
            before = read_manifest(out)
            if before["shards"] == _tars(sidecars, settings, sources):
                # A recipe without a licence keeps the manifest's.
                licence = before["licence"]["images"] if licence == DEFAULTS.licence else licence
                if not fresh and licence == before["licence"]["images"]:
                    return True
        except DamagedTableError as error:
            tell(f"{str(error).partition(';')[0]}; it is rewritten")
    manifest = _manifest(sidecars, settings, about, licence, sources)
    files.write_text(out / README, labels_readme(manifest), suffix=suffix)
    write_manifest(out, manifest, suffix=suffix)
    return True


def _tars(
    sidecars: Sequence[dict[str, Any]], settings: dict[str, Any], sources: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The manifest's record of each tar: also its source if there are several, and its teachers if not all."""
    all_teachers = [card["as"] for card in settings["teachers"]]
    tars = []
    for entry in (entry for entry in sidecars if entry["tar"]):
        teachers = [name for name in all_teachers if name in entry["kinds"]]
        extras = {"image_source": sources[entry["tar"]["name"]]} if any(sources.values()) else {}
        tars.append({**entry["tar"], **extras, **({} if teachers == all_teachers else {"teachers": teachers})})
    return tars


def _manifest(
    sidecars: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    about: Mapping[str, Any],
    licence: str,
    sources: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest of all parts; it does not depend on which process writes it."""
    quarantine = [line for entry in sidecars for line in entry["quarantine"]]
    images: dict[str, str] = {}
    for entry in sidecars:
        for key in dict.fromkeys(sample[0].rsplit("-", 1)[0] for sample in entry["samples"]):
            if key in images:
                reason = f"duplicate key: {images[key]} has it too, and readers use that one"
                quarantine.append({"origin": entry["tar"]["name"], "key": key, "reason": reason})
            images.setdefault(key, entry["tar"]["name"])
    cards = {card["as"]: dict(card) for card in settings["teachers"]}
    for name, card in cards.items():
        card["stored"] = sorted({kind for entry in sidecars for kind in entry["kinds"].get(name, [])})
        for fitted in {"bridge", "align"} & {*card}:
            counts = [entry.get("bridge_dropped", {}).get(name, {}) for entry in sidecars]
            dropped = {which: sum(count.get(which, 0) for count in counts) for which in ("regions", "patches")}
            card[fitted] = {**card[fitted], "dropped": dropped}
    tars = _tars(sidecars, settings, sources)
    skipped = sum((Counter(entry.get("passed", {})) for entry in sidecars), Counter[str]())
    return {
        **public(about),
        **({"plugins": plugins} if (plugins := origins(about["recipe"].get("teachers"))) else {}),
        "settings": settings,
        "format": describe_format(settings["codec"]),
        "teachers": cards,
        "images": {"count": len(images), "sha256": hash_keys(list(images)), "keys": list(images)},
        "shards": tars,
        "samples": sum(tar["samples"] for tar in tars),
        "quarantine": quarantine,
        **({"passed": dict(sorted(skipped.items()))} if skipped else {}),
        "licence": {
            "images": licence,
            "teachers": {name: {k: c[k] for k in ("licence", "commercial") if k in c} for name, c in cards.items()},
        },
    }


def part_name(stem: str, number: int) -> str:
    """The name of a part's tar."""
    return f"{stem}-{number:03d}.tar"


def sidecar_name(part: str) -> str:
    """The name of the json beside a part's tar."""
    return part.removesuffix(".tar") + ".json"


def is_whole(out: Path, tar: Mapping[str, Any]) -> bool:
    """Whether the tar that a part's json describes exists in its full size."""
    path = out / tar["name"]
    return path.is_file() and path.stat().st_size == tar["bytes"]
