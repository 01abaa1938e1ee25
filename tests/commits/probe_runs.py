"""Runs the commands and records their outputs: labels, students, scores, predictions, exports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import probe_recipes as recipes
from probe_names import distill, one, switches, write_recipe
from probe_record import Record, members, weights

FIRST = "select sdt_fast"  # the training that others start from


def _recipe(name: str, recipe: recipes.Recipe) -> str:
    folder = Path("recipes_here")
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / f"{name}.toml", recipe)


def labels_folder(root: Path) -> Path:
    """The only labels folder below a root; its name is a hash of the recipe."""
    (folder,) = (path for path in root.iterdir() if (path / "manifest.json").is_file())
    return folder


def _npy(folder: Path) -> dict[str, Any]:
    """Every .npy below a folder."""
    return {str(path.relative_to(folder)): np.load(path) for path in sorted(folder.rglob("*.npy"))}


# --- labels -----------------------------------------------------------------------------------------------------------


@contextmanager
def _as_process(rank: int, world: int) -> Iterator[None]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        yield
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def label(record: Record, name: str) -> None:
    """Labels, and records the maps' bytes, the json records, the quarantine and the manifest."""
    path = _recipe(f"label {name}", recipes.labelling(name))
    if name == "two processes":
        for rank in (1, 0):
            with _as_process(rank, 2):
                distill("label", path)
    else:
        distill("label", path)
    folder = labels_folder(Path("runs", name, "labels"))
    data, records = members(folder)
    record.arrays(f"labels/{name}: maps and images", {key: np.frombuffer(v, np.uint8) for key, v in data.items()})
    record.json(f"labels/{name}: records", records)
    manifest = json.loads((folder / "manifest.json").read_text())
    quarantine = manifest.pop("quarantine")
    record.json(f"labels/{name}: quarantine", [[line["origin"], line["key"]] for line in quarantine])
    record.json(f"labels/{name}: reasons", [line["reason"] for line in quarantine])
    record.json(f"labels/{name}: manifest", manifest)


# --- training ---------------------------------------------------------------------------------------------------------


def _take_training(record: Record, item: str, folder: Path, *, optimizer: bool = False) -> None:
    record.arrays(f"{item}: weights", weights(folder / "student" / "model.safetensors"))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    record.json(f"{item}: losses and held-out losses", lines)
    described = json.loads((folder / "student" / "student.json").read_text())
    record.json(f"{item}: card", described.pop("card"))
    record.json(f"{item}: description", described)
    if optimizer:
        last = max((folder / "checkpoints").glob("step-*"))
        record.arrays(f"{item}: optimizer", weights(last / "training.safetensors"))


def train(record: Record, name: str) -> None:
    """Trains 20 steps, and records weights, log, card and the optimizer's state."""
    distill("train", _recipe(f"train {name}", recipes.training(name)))
    _take_training(record, f"train/{name}", Path("runs", name, "train"), optimizer=True)


def resume(record: Record) -> None:
    """Repeats the first training from its checkpoint of step 10."""
    shutil.copytree(Path("runs", FIRST, "train"), "runs/resumed/train")
    shutil.rmtree("runs/resumed/train/student")
    for folder in Path("runs/resumed/train/checkpoints").glob("step-*"):
        if int(folder.name.rpartition("-")[2]) > 10:
            shutil.rmtree(folder)
    distill("train", _recipe("resumed", recipes.training(FIRST, out="runs/resumed")))
    resumed = weights(Path("runs/resumed/train/student/model.safetensors"))
    uninterrupted = weights(Path("runs", FIRST, "train/student/model.safetensors"))
    record.arrays("train/resumed at step 10: weights", resumed)
    record.json("train/resumed at step 10: as straight", all(resumed[k].equal(v) for k, v in uninterrupted.items()))


# --- scores, predictions, exports -------------------------------------------------------------------------------------


def score(record: Record, name: str) -> None:
    """Scores a recipe's models, and records the scores and the predictions."""
    recipe = recipes.scoring(name)
    distill("score", _recipe(f"score {name}", recipe), allow=(0, 1))
    folder = Path(recipe["run"]["out"])
    for path in sorted((folder / "scores").glob("*.json")):
        record.json(f"scores/{name}: {path.stem}", json.loads(path.read_text()))
    record.arrays(f"scores/{name}: predictions", _npy(folder / "predictions"))
    record.bytes(f"scores/{name}: table", distill("report", str(folder), "--format", "md").encode())


def score_stored(record: Record) -> None:
    """Scores stored predictions of the golden evaluations, in both protocols, and DA-2K's point pairs."""
    kinds = {"depth": "affine_depth", "disparity": "affine_disparity", "metric": "metric_depth"}
    for folder in sorted(Path("inputs/predictions").glob("eval_*")):
        case = Path("golden", folder.name)
        root, names = next((case / "data").glob("*/*")), next((case / "data_split").rglob("*.txt"))
        for run in sorted(path.name for path in folder.iterdir()):
            for protocol in ("marigold", "clean"):
                arguments = ["--predictions", str(folder / run), "--kind", kinds[run], "--root", str(root)]
                arguments += [
                    "--benchmark",
                    folder.name.removeprefix("eval_"),
                    "--list",
                    str(names),
                    "--out",
                    "score.json",
                ]
                distill("score", *arguments, "--protocol", protocol)
                record.json(f"scores/{folder.name} {run} {protocol}", json.loads(Path("score.json").read_text()))
    arguments = ["--predictions", "inputs/predictions/da2k", "--kind", "affine_disparity", "--benchmark", "da2k"]
    distill("score", *arguments, "--root", "golden/da2k", "--out", "score.json")
    record.json("scores/da2k", json.loads(Path("score.json").read_text()))


def compare(record: Record) -> None:
    """Compares teachers over the same images."""
    distill("compare", _recipe("compare", recipes.comparing()))
    record.json("scores/compare", json.loads(Path("runs/compare/compare/compare.json").read_text()))
    record.arrays("scores/compare: predictions", _npy(Path("runs/compare/compare")))


def predict(record: Record, item: str, student: str, *inputs: str, size: int = 0, encoder: str = "") -> None:
    """Predicts maps of photos in every format."""
    out = f"maps/{item}"
    arguments = ["--student", student, "--out", out, "--device", "cpu"]
    arguments += (["--size", str(size)] if size else []) + (["--encoder-weights", encoder] if encoder else [])
    formats = switches("predict", "--write", "png", "npy", "colour", "side")
    distill("predict", *inputs, *arguments, *formats, allow=(0, 1))
    files = sorted(path for path in Path(out).rglob("*") if path.suffix in (".png", ".npy", ".jpg"))
    # Named by their index among the files, since the formats' suffixes change.
    record.arrays(
        f"predictions/{item}",
        {f"{i:03d}{path.suffix}": np.frombuffer(path.read_bytes(), np.uint8) for i, path in enumerate(files)},
    )


def export(record: Record, item: str, student: str) -> None:
    """Exports a student in 32, 16 and 4 bits, and predicts with each."""
    for bits in ("32", "16", "4"):
        out = f"exports/{item} {bits}"
        distill("export", student, out, "--bits", bits)
        record.arrays(f"exports/{item} in {bits} bits", weights(Path(out, "model.safetensors")))
        described = json.loads(Path(out, "student.json").read_text())
        record.json(f"exports/{item} in {bits} bits: description", {k: v for k, v in described.items() if k != "card"})
        predict(record, f"{item} in {bits} bits", out, "inputs/photos/inside")


# --- what the old checkout wrote --------------------------------------------------------------------------------------


def read_labels(record: Record, name: str) -> None:
    """Verifies and decodes an old labels folder."""
    folder = labels_folder(Path("old/runs", name, "labels"))
    distill("verify", str(folder))
    dataset, decoded, kinds = one("shards", "LabelDataset")(folder), {}, []
    for index, key in enumerate(dataset.keys):
        sample = dataset[index]
        decoded[f"{key}.image"] = sample.image
        for teacher, labels in sample.labels.items():
            kinds.append([key, teacher, str(labels.shared.kind)])
            decoded |= {f"{key}.{teacher}.values": labels.shared.values, f"{key}.{teacher}.valid": labels.shared.valid}
            if labels.local is not None:
                decoded |= {f"{key}.{teacher}.local": labels.local.values, f"{key}.{teacher}.boxes": labels.boxes}
    record.arrays(f"old labels/{name}: decoded", decoded)
    record.json(f"old labels/{name}: kinds", kinds)


def train_on_old(record: Record) -> None:
    """Repeats the first training on the old checkout's labels, copied to where this one looks for its own."""
    folder = labels_folder(Path("runs", "pocket jls", "labels")).name
    shutil.copytree(labels_folder(Path("old/runs/pocket jls/labels")), f"runs/old labels/{folder}")
    recipe = recipes.training(FIRST, out="runs/on old labels", root="runs/old labels")
    distill("train", _recipe("on old labels", recipe))
    _take_training(record, "old labels/trained on", Path("runs/on old labels/train"))


def label_from_old(record: Record) -> None:
    """Labels with an old labels folder as the teacher."""
    name = "two processes"
    recipe = recipes.labelling(name, root="runs/from old/labels")
    old = labels_folder(Path("old/runs", name, "labels"))
    recipe["teachers"] = [{"name": "stored", "weights": str(old)}]
    distill("label", _recipe("from old", recipe))
    data, _ = members(labels_folder(Path("runs/from old/labels")))
    record.arrays("old labels/as a teacher", {key: np.frombuffer(v, np.uint8) for key, v in data.items()})


def use_old_students(record: Record) -> None:
    """Predicts with old students and exports, exports them, and trains from them."""
    for name in recipes.TRAININGS:
        encoder_weights = "inputs/weights/dinov3_vits16.safetensors" if "dinov3" in name else ""
        student = f"old/runs/{name}/train/student"
        predict(record, f"old student {name}", student, "inputs/photos/inside", encoder=encoder_weights)
    for bits in ("16", "4"):
        predict(record, f"old export in {bits} bits", f"old/exports/first {bits}", "inputs/photos/inside")
    export(record, "old student", f"old/runs/{FIRST}/train/student")
    recipe = recipes.training(
        "features", out="runs/from old student", root="old/runs/corruptions png16/labels", steps=5
    )
    folder = labels_folder(Path("runs", "corruptions png16", "labels")).name
    shutil.copytree(labels_folder(Path("old/runs/corruptions png16/labels")), f"runs/old corruptions/{folder}")
    recipe["labels"] = recipe["labels"] | {"root": "runs/old corruptions"}
    recipe["student"] = recipe["student"] | {"start": f"old/runs/{FIRST}/train/student"}
    distill("train", _recipe("from old student", recipe))
    _take_training(record, "old students/started from", Path("runs/from old student/train"))


def score_old(record: Record) -> None:
    """Scores the old checkout's stored predictions."""
    arguments = ["--predictions", f"old/runs/{FIRST}/predictions/student/pairs", "--kind", "affine_disparity"]
    arguments += ["--benchmark", "pairs", "--root", "inputs/pairs", "--out", "score.json"]
    distill("score", *arguments, allow=(0, 1))
    record.json("old predictions/scored", json.loads(Path("score.json").read_text()))
