"""FiffDepth's claims on a Stable Diffusion of 0.2 M parameters and procedural scenes of 32 pixels; minutes on one core.

    python -m tests.speed.one_step_claims [--seeds 5] [--steps 150] [--out /tmp/one_step_claims]

A small VAE is trained on the scenes' images and depth, then a UNet to denoise images: the prior that there is to keep.
Then the UNet becomes a depth network, five ways, each from five seeds: FiffDepth's; without trajectory keeping; keeping
purely image latents (gamma = 1); without pseudo-labels; pseudo-labels on d0 itself. Ground truth is of scenes as they
are rendered; "photographs" are scenes in other colours and with noise, whose pseudo-labels are their blurred disparity.

Printed for each: the held-out loss of d0 on the start's, the denoising loss of image latents on the start's, AbsRel and
boundary F1 of held-out photographs, after a least-squares fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.core.align import fit_affine
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels, Supervision
from distill.data.scenes import render
from distill.eval.boundary import boundary_f1
from distill.losses import latent as maths
from distill.losses.latent_settings import LatentSettings
from distill.teachers import _latent_student
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.latent import LatentLesson
from distill.training.latent_cache import LatentCache
from distill.training.settings import TrainSettings
from distill.training.train import train
from tests import tiny_teachers

SIZE, TRAIN, HELD = 32, 96, 32
WAYS: dict[str, dict[str, Any]] = {
    "FiffDepth": {},
    "without trajectory": {"trajectory": 0.0},
    "purely image latents": {"blend": 1.0},
    "without pseudo-labels": {"pseudo": "off"},
    "pseudo-labels on d0": {"pseudo": "direct"},
}
ASKED = _latent_student.Asked(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH, native_size=SIZE)


class Scenes:
    """Rendered scenes: even numbers as they are, with their truth; odd ones as photographs with pseudo-labels."""

    def __init__(self, first: int, count: int) -> None:
        views = [render(first + i, size=(SIZE, SIZE)) for i in range(count)]
        self.images = torch.stack([v.image if i % 2 == 0 else photograph(v.image, i) for i, v in enumerate(views)])
        self.depth = torch.stack([v.depth for v in views])
        self.valid = torch.stack([v.valid for v in views])
        self.image_keys, self.sources = [f"{first + i}" for i in range(count)], [i % 2 for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def teachers_of(self, index: int) -> tuple[str]:
        return (("truth", "blurred")[index % 2],)

    def get(self, index: int, teachers: Any, *, visit: int | None = None) -> int:
        return index

    def labels(self, rows: list[int], teacher: str) -> Labels:
        depth, valid = self.depth[rows], self.valid[rows]
        kind = Kind.METRIC_DEPTH if teacher == "truth" else Kind.AFFINE_DISPARITY
        if teacher != "truth":
            disparity = torch.where(valid, 1.0 / depth.clamp(min=1e-3), 0.0)
            depth, valid = blurred(disparity), torch.ones_like(valid)
        shared = DepthMap(depth, valid, kind)
        truth = Supervision(teacher, kind, teacher == "truth")
        return Labels(shared, None, torch.zeros(len(rows), 0, 4), supervision=truth)

    def collate(self, rows: list[int]) -> Batch:
        teacher = self.teachers_of(rows[0])[0]
        return Batch(tuple(self.image_keys[r] for r in rows), self.images[rows], {teacher: self.labels(rows, teacher)})


def photograph(image: Tensor, seed: int) -> Tensor:
    """The image in other colours, darker or brighter, and noisy."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.einsum("ij,jhw->ihw", torch.softmax(3 * torch.rand(3, 3, generator=rng), 1), image)
    gamma = 0.6 + 1.2 * torch.rand(1, generator=rng)
    return (mixed**gamma + 0.04 * torch.randn(image.shape, generator=rng)).clamp(0, 1)


def blurred(maps: Tensor) -> Tensor:
    """(B,H,W) without its detail: what a network of patches gives."""
    return F.avg_pool2d(F.pad(maps[:, None], (4, 4, 4, 4), mode="replicate"), 9, 1)[:, 0]


def base(folder: Path, data: Scenes) -> Path:
    """A small Stable Diffusion: a VAE that knows scenes and depth, and a UNet that denoises images."""
    import diffusers

    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tiny_teachers.diffusion(folder, channels=4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    )  # fmt: skip
    grey, _ = maths.to_unit_range(data.depth, data.valid, 0.02)
    pictures = torch.cat([data.images * 2 - 1, grey[:, None].expand(-1, 3, -1, -1)])
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        batch = pictures[torch.randint(len(pictures), (8,))]
        loss = (vae.decode(vae.encode(batch).latent_dist.mean).sample - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"VAE: mean absolute error {loss.item():.3f} of pictures in [-1, 1]", flush=True)
    with torch.no_grad():  # the factor is fixed, so the weights bring the latents to unit deviation
        scale = 1 / (0.18215 * vae.encode(pictures[:64]).latent_dist.mean.std())
        vae.quant_conv.weight[:4] *= scale
        vae.quant_conv.bias[:4] *= scale
        vae.post_quant_conv.weight /= scale
    vae.save_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        block_out_channels=(16, 32), attention_head_dim=(2, 2), use_linear_projection=True,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    student = _latent_student.begin(str(folder), ASKED)
    latents = student.encode(data.images)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 600)
        loss = denoising(student, latents[torch.randint(len(latents), (16,))], torch.randint(1, 1000, (16,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"UNet: {sum(p.numel() for p in student.parameters())} parameters, denoising loss {loss.item():.3f}", flush=True
    )
    student.unet.save_pretrained(folder / "unet")
    (folder / "done").touch()
    return folder


def denoising(student: Any, clean: Tensor, levels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Loss (B,) of the original task: the velocity of images' latents."""
    noise = torch.randn_like(clean) if noise is None else noise
    alphas = student.alphas[levels]
    off = student(maths.add_noise(clean, noise, alphas), levels) - maths.velocity(clean, noise, alphas)
    return off.square().mean((1, 2, 3))


@torch.no_grad()
def measured(student: Any, held: Scenes) -> dict[str, float]:
    """The held-out numbers of a student."""
    student.eval()
    even, odd = list(range(0, len(held), 2)), list(range(1, len(held), 2))
    labels = held.labels(even, "truth")
    keys = tuple(held.image_keys[r] for r in even)
    micro = MicroBatch(keys, held.images[even], (TaughtRows(None, labels, "truth"),), tuple(-1 - r for r in even))
    loss = LatentLesson(student, LatentSettings(trajectory=0.0), 0)(student, micro, precision="fp32").losses.mean()
    latents = student.encode(held.images)
    rng, kept = torch.Generator().manual_seed(0), []
    for level in range(50, 1000, 100):
        noise = torch.randn(latents.shape, generator=rng)
        kept.append(denoising(student, latents, torch.full((len(latents),), level), noise).mean().item())
    maps = student(held.images[odd])
    depth, valid = held.depth[odd], held.valid[odd]
    scale, shift = fit_affine(maps, depth, valid)
    fitted = (maps * scale[:, None, None] + shift[:, None, None]).clamp(min=0.1)
    error = torch.where(valid, (fitted - depth).abs() / depth.clamp(min=1e-3), 0.0).sum((1, 2)) / valid.sum((1, 2))
    edges = boundary_f1(fitted, torch.where(valid, depth, 1e3), valid)
    return {
        "loss": loss.item(),
        "denoising": statistics.fmean(kept),
        "abs_rel": error.mean().item(),
        "boundary_f1": edges.nanmean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("/tmp/one_step_claims"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    data, held = Scenes(0, TRAIN), Scenes(10_000, HELD)
    folder = base(args.out / "base", data)
    start = measured(_latent_student.begin(str(folder), ASKED), held)
    print(f"start: {start}; {time.process_time() - began:.0f} s of one core", flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for way, latent in WAYS.items():
            torch.manual_seed(seed)
            student = _latent_student.begin(str(folder), ASKED)
            settings = TrainSettings(
                steps=args.steps, batch_size=8, lr=5e-4, warmup_steps=20, workers=0, val_fraction=0.0, eval_every=0,
                save_every=0, kind="affine_depth", even_batches=True, keep_unmet=True, trackers=(), seed=seed,
                log_every=50, teacher_shares={"truth": 0.5, "blurred": 0.5}, hflip=False, weight_decay=0.0,
            )  # fmt: skip
            lesson = LatentLesson(student, LatentSettings(**latent), seed, LatentCache(args.out / "latents", {"v": 1}))
            out = args.out / f"{way.replace(' ', '_')}-{seed}-{args.steps}"
            train(
                student, data, lesson, out=out, settings=settings, collate=data.collate, save=_latent_student.save,
                device="cpu",
            )  # fmt: skip
            found.setdefault(way, []).append(measured(student, held))
            print(f"{time.process_time() - began:5.0f} s  seed {seed}  {way}: {found[way][-1]}", flush=True)
    (args.out / "found.json").write_text(json.dumps({"start": start, **found}, indent=1))
    print("| | held-out loss / start's | denoising loss / start's | AbsRel | boundary F1 |\n|---|---|---|---|---|")
    for way, runs in found.items():
        cells = [summary([run[key] / start[key] for run in runs]) for key in ("loss", "denoising")]
        cells += [summary([run[key] for run in runs]) for key in ("abs_rel", "boundary_f1")]
        print(f"| {way} | {' | '.join(cells)} |")
    print(f"{time.process_time() - began:.0f} s of one core")


def summary(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.pstdev(values):.3f}"


if __name__ == "__main__":
    main()
