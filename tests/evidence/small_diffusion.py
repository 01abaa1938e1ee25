"""A small Stable Diffusion for each seed of recipes/ablations/fiffdepth.toml: the prior that the study tries to keep.

    python -m tests.evidence.small_diffusion [--seeds 0,1,2,3,4] [--processes 5] [--labels runs/ablations]

Each seed's labels are made as in the study. A VAE whose latents have 8 times fewer pixels a side than Stable
Diffusion's learns to reconstruct the study's training images and their depth; then a UNet learns to denoise the images'
latents by v-prediction. Neither sees the study's held-out images. runs/fiffdepth-bench/SEED is a diffusers folder; a
complete one is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.app import build, commands
from distill.app.recipe import Recipe
from distill.app.study import cells, read_study
from distill.core.depth import Kind
from distill.losses import latent as maths
from distill.teachers import _latent_student
from distill.training.sampling import hold_out
from tests import tiny_teachers

STUDY = Path(__file__).parents[2] / "recipes" / "ablations" / "fiffdepth.toml"
VAE_STEPS, UNET_STEPS = 300, 500
DONE = "made.json"


def recipe_of(seed: int, out: Path) -> Recipe:
    """A recipe of the study's cells of a seed, which share their labels and initial network."""
    return next(cell.recipe for cell in cells(read_study(STUDY), STUDY, "bench", out, [f"run.seed={seed}"]))


def label(given: tuple[int, int], out: Path) -> None:
    """Makes labels of a seed, as one of several workers."""
    torch.set_num_threads(1)
    recipe = recipe_of(given[0], out)
    commands.run_label(recipe, build.labels_folder(recipe), worker=True)


def make(seed: int, out: Path) -> str:
    """Trains and saves the network of a seed; returns a line about it."""
    torch.set_num_threads(1)
    began = time.process_time()
    recipe = recipe_of(seed, out)
    folder = Path(recipe.student.weights).parent / str(seed)
    if (folder / DONE).is_file():
        return f"{folder}: there already"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    images, maps = _pictures(recipe)
    tiny_teachers.diffusion(folder, channels=4)
    facts: dict[str, Any] = {"images": len(images), "vae_error": _vae(folder, torch.cat([images, maps]))}
    facts |= _unet(folder, images) | {"cpu_seconds": round(time.process_time() - began)}
    (folder / DONE).write_text(json.dumps(facts))
    return f"{folder}: {facts}"


def _pictures(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Images (N,3,S,S) that are not held out, and their maps as grey images, in [-1, 1]."""
    dataset = build.training_labels(recipe)
    training, _ = hold_out(dataset.image_keys, recipe.train.val_fraction)
    samples = [dataset.get(index, dataset.teachers_of(index)) for index in training]
    images = torch.stack([sample.image for sample in samples]).float() / 255
    shared = [next(iter(sample.labels.values())).shared for sample in samples]
    values, valid = torch.cat([depth.values for depth in shared]), torch.cat([depth.valid for depth in shared])
    grey, _ = maths.to_unit_range(values, valid, 0.02)
    return images * 2 - 1, grey[:, None].expand(-1, 3, -1, -1)


def _vae(folder: Path, pictures: Tensor) -> float:
    """Trains and saves the VAE; returns the mean absolute error of its last 50 steps."""
    import diffusers

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    errors = []
    for step in range(VAE_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / VAE_STEPS)
        batch = pictures[torch.randint(len(pictures), (8,))]
        loss = (vae.decode(vae.encode(batch).latent_dist.mean).sample - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        errors.append(loss.item())
    with torch.no_grad():  # the scaling factor is fixed, so the weights are scaled to give latents of unit deviation
        sample = pictures[torch.randperm(len(pictures))[:64]]
        scale = 1 / (0.18215 * vae.encode(sample).latent_dist.mean.std())
        vae.quant_conv.weight[:4] *= scale
        vae.quant_conv.bias[:4] *= scale
        vae.post_quant_conv.weight /= scale
    vae.save_pretrained(folder / "vae")
    return round(sum(errors[-50:]) / 50, 4)


def _unet(folder: Path, images: Tensor) -> dict[str, Any]:
    """Trains and saves the denoiser; returns its parameters and the mean loss of its last 50 steps."""
    import diffusers

    diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        block_out_channels=(16, 32), attention_head_dim=(2, 2), use_linear_projection=True,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    ).save_pretrained(folder / "unet")  # fmt: skip
    asked = _latent_student.LatentStudentSpec(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH, native_size=images.shape[-1])
    student = _latent_student.build_student(str(folder), asked)
    latents = student.encode(torch.cat([images, images.flip(-1)]) / 2 + 0.5)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    losses = []
    for step in range(UNET_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / UNET_STEPS)
        clean, levels = latents[torch.randint(len(latents), (16,))], torch.randint(1, 1000, (16,))
        noise, alphas = torch.randn_like(clean), student.alphas[levels]
        target = maths.velocity(clean, noise, alphas)
        loss = (student(maths.add_noise(clean, noise, alphas), levels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    student.unet.save_pretrained(folder / "unet")
    count = sum(p.numel() for p in student.parameters())
    return {"parameters": count, "denoising": round(sum(losses[-50:]) / 50, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--labels", type=Path, default=Path("runs/ablations"), help="the --out of distill ablate")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with ProcessPoolExecutor(args.processes) as pool:
        list(pool.map(partial(label, out=args.labels), [(seed, worker) for seed in seeds for worker in range(2)]))
        for line in pool.map(partial(make, out=args.labels), seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
