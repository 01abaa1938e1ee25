"""The stored encoder features of a recipe (train.cache_features): their folder, and how they are computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.app import build
from distill.app.console import note, progress
from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.labelling.lock import mutex
from distill.shards.features import DONE, FeatureStore, write_features
from distill.shards.shards import LabelDataset, hash_keys
from distill.students import Student

Feature = tuple[Tensor, Tensor]


def features_folder(recipe: Recipe, dataset: LabelDataset, student: Student) -> Path:
    """The folder beside the labels, named by a hash of regions and encoder: labels of other teachers share it.

    If labels.root is itself the labels folder, it is inside that.
    """
    labels, encoder, train = build.labels_folder(recipe), student.encoder, recipe.train
    regions: Any
    if labels == Path(recipe.labels.root or "."):
        regions, parent = labels.name, labels
    else:
        patches = ("patches", "num_patches", "patch_size", "overlap")
        crops = {key: value for key, value in recipe.crops.content.items() if key not in patches}
        images = [images.content for images in recipe.images]
        regions, parent = [images, crops, recipe.run.seed, hash_keys(dataset.keys)], labels.parent
    inputs = [regions, encoder.digest(), encoder.options, train.precision, train.hflip]
    return parent / "features" / hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def stored_features(recipe: Recipe, dataset: Any, student: Any) -> FeatureStore | None:
    """The features that train.cache_features asks for, computed if they are missing; None if it is false.

    Raises RecipeError for labels that are not on disk.
    """
    if not recipe.train.cache_features:
        return None
    if not isinstance(dataset, LabelDataset):
        raise RecipeError("train.cache_features needs labels on disk: set labels.online = false")
    if "feature" in recipe.loss.weights:
        note("loss.feature would compare the frozen encoder with itself: it would be 0, and is left out")
    folder, on = features_folder(recipe, dataset, student), build.device(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with mutex(folder):  # one process computes, the others wait for it
        if not (folder / DONE).is_file():
            _compute(recipe, dataset, student, folder, on)
    return FeatureStore(folder)


def _compute(recipe: Recipe, dataset: LabelDataset, student: Student, folder: Path, on: torch.device) -> None:
    home = next(student.encoder.parameters()).device
    encoder = student.encoder.to(on).eval()

    @torch.no_grad()
    def encode(images: Tensor) -> list[Feature]:
        with torch.autocast(on.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            return list(encoder(images.to(on)))

    with progress("features of the encoder") as report:
        write_features(
            folder,
            dataset.keys,
            lambda index: dataset.get(index, ()).image,
            encode,
            mirrored=recipe.train.hflip,
            facts={"encoder": encoder.digest(), "precision": recipe.train.precision},
            report=report,
        )
    encoder.to(home)  # else the student is on two devices, and `train` takes parameters for unused in this process
