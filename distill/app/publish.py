"""Folders in a model hub's layout: labels with a dataset card, a student with a model card; checked without a network.

Images are included only if their licence allows it. If it does not, or does not say, the tars hold only maps and crops,
and regions.jsonl lists for each image what is needed to cut the same region again, and hashes to identify it. The
licence is judged by its wording (`may_share`); the rule is ours, and no legal advice.

A folder is written under a temporary name and renamed. Nothing is uploaded: `hf upload OWNER/NAME FOLDER` does that.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.app.card_scores import scored
from distill.app.inputs import input_shards
from distill.app.lineage import OPEN
from distill.app.recipe import Recipe
from distill.core import files, hub
from distill.core.markdown import inline
from distill.core.private import without_places
from distill.core.progress import Report
from distill.core.seal import sealed
from distill.shards import shards
from distill.shards.codec import dump_json
from distill.shards.readme import labels_readme
from distill.shards.tables import REGIONS
from distill.students import checkpoint
from distill.students.modelcard import page_of
from distill.teachers import revision_of

SUMS = "SHA256SUMS"
_LFS = ("*.tar", "*.safetensors", "*.onnx", "*.pt2")
_FORBIDS = re.compile(r"research|academic|personal|\bnd\b|no deriv|not (be )?(shared|redistribut)", re.IGNORECASE)

Images = Literal["auto", "include", "hashes"]


def may_share(terms: str) -> bool:
    """Whether the wording of an image licence names one that lets crops be redistributed, and none that forbids it."""
    return bool(OPEN.search(terms)) and not _FORBIDS.search(terms)


# --- labels -----------------------------------------------------------------------------------------------------------


def publish_labels(
    folder: Path, out: Path, *, images: Images = "auto", sources: Recipe | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Writes the finished labels in `folder` to `out`; returns a summary in plain values.

    images: "include" them, list them by "hashes", or "auto": what their licence allows. sources: a recipe with the same
    images, which adds the sha256 of each image file to the list.
    Raises ValueError for incomplete labels, or if `out` holds other files, OSError if it cannot be written.
    """
    if problems := shards.verify(folder, report=report):
        raise ValueError(f"{folder} has faults: {problems[0]}; run distill verify {folder} --repair")
    manifest = shards.read_manifest(folder)
    shared = images == "include" or (images == "auto" and may_share(manifest["licence"]["images"] or ""))
    # The paths of photographs, weights and plug-ins on this machine stay private.
    recipe = {key: value for key, value in manifest.get("recipe", {}).items() if key not in ("images", "run")}
    public = without_places({**manifest, "recipe": recipe})
    num_listed = 0
    with _writing(out) as aside:
        if shared and public["teachers"] == manifest["teachers"]:
            for name in [shard["name"] for shard in manifest["shards"]]:
                shutil.copyfile(folder / name, aside / name)
        else:
            file_hashes = _file_hashes(sources) if sources and not shared else {}
            public["shards"], lines = _rewritten(folder, aside, manifest["shards"], file_hashes, shared=shared)
            if not shared:
                files.write_text(aside / REGIONS, "".join(f"{json.dumps(line)}\n" for line in lines))
                num_listed = len(lines)
        if shared:
            _write_tables(folder, aside, public["shards"])
        shards.write_manifest(aside, public)
        files.write_text(aside / "README.md", labels_card(public, name=out.name, shared=shared))
    return {
        "out": str(out),
        "samples": manifest["samples"],
        "images": "included" if shared else "hashes",
        "listed": num_listed,
    }


def _rewritten(
    folder: Path, aside: Path, tars: list[dict[str, Any]], known: Mapping[str, str], *, shared: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Copies the tars without private paths, and unless `shared` without their photographs.

    Returns their manifest entries, and a line for each region.
    """
    entries, lines = [], []
    for tar in tars:
        with tarfile.open(folder / tar["name"]) as old, tarfile.open(aside / tar["name"], "w") as new:
            digest = ""
            for member in old:
                file = old.extractfile(member)
                data = file.read() if file else b""
                if member.name.endswith(".jpg"):
                    digest = hashlib.sha256(data).hexdigest()
                    if not shared:
                        continue
                if member.name.endswith(".json"):
                    record = json.loads(data)
                    data = _public_record(record, data)
                    lines.append(_line(member.name.removesuffix(".json"), tar["name"], record, digest, known))
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
        path = aside / tar["name"]
        entries.append({**tar, "sha256": files.file_sha256(path), "bytes": path.stat().st_size})
    return entries, lines


def _public_record(record: Mapping[str, Any], data: bytes) -> bytes:
    """A sample's json `data` without private paths, with its checksum."""
    public = without_places({key: value for key, value in record.items() if key != "crc32"})
    if all(record[key] == value for key, value in public.items()):
        return data
    return dump_json({**public, "crc32": zlib.crc32(dump_json(public))} if "crc32" in record else public)


def _write_tables(folder: Path, aside: Path, tars: list[dict[str, Any]]) -> None:
    """Copies the json beside each tar, and the settings, without private paths; where nothing changes, to the byte."""
    names = {Path(tar["name"]).with_suffix(".json").name: tar for tar in tars}
    for name in [*names, *([shards.SETTINGS] if (folder / shards.SETTINGS).is_file() else [])]:
        table = shards.read_json(folder / name)
        public = without_places(table)
        if tar := names.get(name):
            public["tar"] = {key: tar[key] for key in table["tar"]}
            if public["tar"] != table["tar"]:
                public["samples"] = shards.index_from_headers(aside / tar["name"])
        if public == table:
            shutil.copyfile(folder / name, aside / name)
        else:
            files.write_bytes(aside / name, dump_json(sealed(public)))


def _line(key: str, tar: str, about: Mapping[str, Any], region: str, known: Mapping[str, str]) -> dict[str, Any]:
    image = about["image"]
    line = {"key": key, "tar": tar, "image": image["key"], "height": image.get("height"), "width": image.get("width")}
    line |= {"crop": about["crop"], "region_sha256": region}
    return line | ({"file_sha256": known[image["key"]]} if image["key"] in known else {})


def _file_hashes(recipe: Recipe) -> dict[str, str]:
    """The sha256 of every image file on this machine, by image key."""
    hashes: dict[str, str] = {}
    for source in input_shards(recipe):
        for entry in source.scan().entries:
            if entry.place is not None and isinstance(entry.place[0], Path):
                path, start, size = entry.place
                with Path(path).open("rb") as file:
                    file.seek(start)
                    hashes[entry.key] = hashlib.sha256(file.read(size)).hexdigest()
    return hashes


def labels_card(manifest: Mapping[str, Any], *, name: str, shared: bool) -> str:
    """The dataset card: front matter for the hub, then what the labels are, who made them, how to stream and decode."""
    _, _, body = labels_readme(manifest).removeprefix("---\n").partition("---\n")
    crop_rows = [f"| {inline(key)} | {inline(str(value))} |" for key, value in manifest["settings"]["crops"].items()]
    count = manifest["samples"]
    sizes = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    size = sizes[min(len(sizes) - 1, max(0, len(str(max(1, count))) - 3))]
    teachers = [
        f"| {inline(teacher)} | {inline(str(card.get('revision', '-')))} | {_permission(card.get('commercial'))} |"
        for teacher, card in manifest["teachers"].items()
    ]
    stream = [
        "import webdataset as wds",
        "",
        'data = wds.WebDataset("https://huggingface.co/datasets/OWNER/NAME/resolve/main/'
        f'{manifest["shards"][0]["name"] if manifest["shards"] else "NAME.tar"}")',
        "for sample in data:  # maps stay bytes: see Decoding",
        "    ...",
    ]
    left_out = (
        "The photographs are not here, since their licence does not say that they may be passed on. "
        f"`{REGIONS}` has a line for each region: the image's key, its size in pixels, the square that was cut "
        "(`crop`: top, left, side, then resized to `size`), and hashes by which to know that it is the same "
        "(`region_sha256` of the JPEG that was labelled; `file_sha256` of the photograph's file, where it was at hand)."
    )
    return "\n".join(
        [
            *("---", f"pretty_name: {json.dumps(name)}", "license: other", "license_name: see-card"),
            *("task_categories:", "- depth-estimation", "tags:", "- depth", "- distillation", "- webdataset"),
            *(f"size_categories:\n- {size}", "configs:", "- config_name: default", '  data_files: "*.tar"', "---"),
            body.rstrip("\n"),
            *(
                "",
                "## Crops",
                "",
                "| | |",
                "|---|---|",
                *crop_rows,
            ),
            *(
                "",
                "## Teachers and licences",
                "",
                "| teacher | revision | commercial use |",
                "|---|---|---|",
                *teachers,
            ),
            "",
            "What may be done with the labels follows from the teachers' and the images' licences together; this is "
            "what their authors state, and no legal advice.",
            *("", "## Images", "", "The photographs' regions are in the tars (`KEY.jpg`)." if shared else left_out),
            *("", "## Streaming", "", "```python", *stream, "```", ""),
            '`datasets.load_dataset("OWNER/NAME", streaming=True)` works too. With the package that made them, '
            "`distill.shards.shards.LabelDataset(FOLDER)` is a dataset of decoded samples"
            + ("." if shared else " where the photographs are."),
            *(
                "",
                "## Decoding",
                "",
                f"`{shards.MANIFEST}` has the rule under `format`; `{SUMS}` every file's checksum.",
                "",
            ),
        ]
    )


def _permission(allowed: Any) -> str:
    return "unknown" if allowed is None else "allowed" if allowed else "not allowed"


# --- a student --------------------------------------------------------------------------------------------------------


def publish_student(folder: Path, out: Path) -> dict[str, Any]:
    """Writes the student in `folder` to `out` with a card that has its run's scores and costs, and no private path.

    Raises ValueError or OSError if `folder` holds no student, or if `out` holds other files.
    """
    about = checkpoint.describe(folder)
    student = checkpoint.load(folder) if about["encoder_weights"] is None else None
    card = checkpoint.read_card(folder)
    card = card | scored(folder, revision_of(folder))
    public = without_places(card)
    with _writing(out) as aside:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                _check_link(path)
                shutil.copyfile(path, aside / path.name)
        if without_places(about["card"]) != about["card"]:
            text = json.dumps(sealed({**about, "card": without_places(about["card"])}), indent=2, ensure_ascii=False)
            files.write_text(aside / checkpoint.DESCRIPTION, text + "\n")
        if student is not None:
            bits = 4 if about["weights"]["dtype"] == "int4" else None
            num_bytes = (folder / checkpoint.WEIGHTS).stat().st_size
            page = page_of(student, out.name, public, bits=bits, num_bytes=num_bytes)
            files.write_text(aside / checkpoint.CARD, page.replace("THIS FOLDER", f"OWNER/{out.name}"))
        elif (aside / checkpoint.CARD).is_file():
            page = (aside / checkpoint.CARD).read_text(encoding="utf-8")
            files.write_text(aside / checkpoint.CARD, without_places(page))
        if not (aside / checkpoint.CARD).is_file():
            raise ValueError(f"{folder}: has no card; give it one first: distill export {folder} OUT --card FILE.toml")
    return {"out": str(out), "commercial": card.get("commercial"), "scores": len(card.get("scores", []))}


def _check_link(path: Path) -> None:
    """Raises ValueError for a link out of a student's folder, whose target nobody meant to publish.

    The files of a student may lie on another disk, and all files of a hub's snapshot lie in the cache's blobs, which
    may be on another disk, too.
    """
    target, folder = path.resolve(), path.parent.resolve()
    known = (checkpoint.WEIGHTS, checkpoint.DESCRIPTION, checkpoint.CARD)
    # The student may be a folder of the snapshot.
    caches = [place for place in folder.parents if place.name == "snapshots"]
    places = (folder, *((cache.parent / "blobs").resolve() for cache in caches))
    if path.is_symlink() and path.name not in known and not any(target.is_relative_to(place) for place in places):
        raise ValueError(f"{path} is a link to a file of another folder: copy that file there, or remove the link")


# --- both -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A folder to fill; once checked, it replaces `out`, with checksums and LFS rules added.

    Raises ValueError if `out` holds anything that was not published by this command.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / SUMS).is_file())):
        raise ValueError(f"{out} exists and was not written by this command: give another folder")
    with files.writing_folder(out) as aside:
        yield aside
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS)
        files.write_text(aside / ".gitattributes", rules)
        listed = sorted(path for path in aside.rglob("*") if path.is_file() and path.name != ".gitattributes")
        sums = "".join(f"{files.file_sha256(path)}  {path.relative_to(aside).as_posix()}\n" for path in listed)
        files.write_text(aside / SUMS, sums)
        if faults := check(aside):
            raise ValueError(f"{out}: not published: {'; '.join(faults)}")


def check(folder: Path) -> list[str]:
    """The faults of a published folder: its card's front matter, checksums, missing files, large ones not in LFS."""
    faults = []
    try:
        about = hub.card_metadata(folder / "README.md")
        faults += [] if "license" in about else ["README.md has no license"]
    except ValueError as error:
        faults.append(f"README.md: {error}")
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return [*faults, f"{SUMS}: {error.strerror or error}"]
    for line in lines:
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif files.file_sha256(path) != expected:
            faults.append(f"{name} does not match its checksum")
    large = [p.name for p in folder.iterdir() if p.stat().st_size > 10**7 and not any(p.match(rule) for rule in _LFS)]
    return faults + [f"{name} is large, but no rule of .gitattributes stores it in LFS" for name in large]
