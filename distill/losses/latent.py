"""The maths of latent depth networks: maps in the VAE's range, noise, and losses between latents.

A depth map enters Stable Diffusion's VAE as a grey image: scaled to [-1, 1] by two of its own quantiles and clipped
(Marigold). A latent pixel is valid if every pixel that it covers is. Each loss is one value per image, (B,), in
float32; an image without a valid latent pixel gives 0.

Sources: FiffDepth Eq. 2-6; Marigold src/trainer/marigold_depth_trainer.py, src/util/multi_res_noise.py; GenPercept
src/trainer/genpercept_trainer.py. Shapes: B images, H x W pixels, h x w latent pixels, T training noise levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.shapes import check_maps
from distill.losses.losses import gradient_loss

COARSEST = 10
"""The maximum number of coarser noise levels, from the official loop."""
TO_POSITIVE = 2.0
"""GenPercept adds this to maps in [-1, 1] before it fits one to the other: its fit needs positive values."""


def to_unit_range(values: Tensor, valid: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Maps (B,H,W) scaled so that each map's `quantile` and 1 - quantile become -1 and 1, clipped, and their validity.

    Invalid pixels are -1, as in Marigold where depth is unknown (0, clipped); pixels that Marigold excludes as too far
    (Virtual KITTI beyond 80 m) are 1 in Marigold. A map with no valid pixel or a single value is invalid everywhere.
    """
    out, usable = torch.full_like(values, -1.0), valid & torch.isfinite(values)
    ends = values.new_tensor([quantile, 1.0 - quantile])
    for b in range(len(values)):
        if not bool(usable[b].any()):
            continue
        low, high = torch.quantile(_thinned(values[b][usable[b]]), ends)
        if bool(high <= low):
            usable = usable.clone()
            usable[b] = False
            continue
        scaled = (values[b] - low) / (high - low) * 2.0 - 1.0
        out[b] = torch.where(usable[b], scaled.clip(-1.0, 1.0), -1.0)
    return out, usable


def _thinned(values: Tensor) -> Tensor:
    """Every n-th value: torch.quantile fails for more than 2**24 values, and the quantiles stay about the same."""
    return values[:: -(-len(values) // 2**24)]


def inverted(values: Tensor, valid: Tensor, *, quantile: float, reach: float) -> Tensor:
    """1 / maps (B,H,W) of unknown shift, which is set so that the far end is `reach` times the near one.

    The ends are quantiles of each map. Ours, and only plausible: the inverse of an affine map has no meaning by itself.
    """
    unit, _ = to_unit_range(values, valid, quantile)
    near, far = 1.0, 1.0 / reach
    return 1.0 / ((unit + 1.0) / 2.0 * (near - far) + far)


def pooled(valid: Tensor, factor: int) -> Tensor:
    """(B,H,W) bool -> (B,h,w) bool: the latent pixels all of whose pixels are valid."""
    return ~F.max_pool2d((~valid).float()[:, None], factor, factor)[:, 0].bool()


def add_noise(clean: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """sqrt(a) clean + sqrt(1 - a) noise; clean, noise (B,C,h,w), alphas (B,), the cumulative products of DDPM."""
    a = alphas.reshape(-1, 1, 1, 1).to(clean)
    return a.sqrt() * clean + (1.0 - a).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """The target of v-prediction, sqrt(a) noise - sqrt(1 - a) clean (FiffDepth Eq. 3)."""
    a = alphas.reshape(-1, 1, 1, 1).to(clean)
    return a.sqrt() * noise - (1.0 - a).sqrt() * clean


def denoised(noisy: Tensor, predicted: Tensor, alphas: Tensor) -> Tensor:
    """The clean latents that a predicted velocity implies."""
    a = alphas.reshape(-1, 1, 1, 1).to(noisy)
    return a.sqrt() * noisy - (1.0 - a).sqrt() * predicted


def multi_resolution_noise(shape: tuple[int, ...], strength: Tensor, generator: torch.Generator) -> Tensor:
    """Noise (1,C,h,w) of unit deviation with coarser noise added, level i times strength**i (a scalar); on the CPU.

    Marigold's "original" rule, whose sizes shrink faster at each level: the divisor is drawn in [2, 4) and raised to
    the level's number. The first level has full size (r**0), so plain noise is added twice. strength = 0 is not plain
    noise either, but two such draws, since 0**0 is 1. Both are kept as they are.
    """
    _, channels, rows, columns = shape
    size = (rows, columns)
    noise = torch.randn(shape, generator=generator)
    for level in range(COARSEST):
        divisor = (torch.rand(1, generator=generator) * 2 + 2) ** level
        rows, columns = max(1, int(rows / divisor)), max(1, int(columns / divisor))
        coarse = torch.randn((1, channels, rows, columns), generator=generator)
        noise = noise + F.interpolate(coarse, size, mode="bilinear") * strength**level
        if rows == 1 or columns == 1:
            break
    return noise / noise.std()


def latent_distance(pred: Tensor, target: Tensor, valid: Tensor, *, squared: bool) -> Tensor:
    """Mean |difference| (FiffDepth Eq. 5), or of its square, over valid latent pixels and channels, (B,).

    pred, target: (B,C,h,w); valid: (B,h,w).
    """
    check_maps(pred=pred, target=target, any_rank=True)
    difference = torch.where(valid[:, None], pred.float() - target.float(), 0.0)
    each = difference.square() if squared else difference.abs()
    return each.mean(1).sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)


def latent_gradient(pred: Tensor, target: Tensor, valid: Tensor, *, scales: int) -> Tensor:
    """Gradient matching between latents (FiffDepth Eq. 6 at one scale, MiDaS at four), the mean over channels, (B,)."""
    batch, channels = pred.shape[:2]
    each = valid[:, None].expand(-1, channels, -1, -1).flatten(0, 1)
    flat = gradient_loss(pred.flatten(0, 1), target.flatten(0, 1), each, scales=scales, normalize=False)
    return flat.reshape(batch, channels).mean(1)


def aligned_l1(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """L1 after a least-squares fit of scale and shift to the target, (B,): GenPercept's least_square_ssi_loss.

    pred, target: (B,H,W) in [-1, 1], which are shifted to [1, 3] first. The gradient flows through the fit too, as
    there. Where the fitted scale is not positive, the ratio of medians replaces it, with shift 0.
    """
    check_maps(pred=pred, target=target, valid=valid)
    mask = valid & torch.isfinite(target)
    weight = mask.float()
    p = torch.where(mask, pred.float() + TO_POSITIVE, 0.0)
    t = torch.where(mask, target.float() + TO_POSITIVE, 0.0)
    n, sp, spp = weight.sum((1, 2)), p.sum((1, 2)), p.square().sum((1, 2))
    st, spt = t.sum((1, 2)), (p * t).sum((1, 2))
    determinant = spp * n - sp.square()
    solvable = determinant > 0
    divisor = torch.where(solvable, determinant, 1.0)
    scale = torch.where(solvable, (n * spt - sp * st) / divisor, 0.0)
    shift = torch.where(solvable, (spp * st - sp * spt) / divisor, 0.0)
    ratio = _medians(t, mask) / (_medians(p, mask) + 1e-8)
    not_positive = scale <= 0
    scale, shift = torch.where(not_positive, ratio, scale), torch.where(not_positive, 0.0, shift)
    difference = torch.where(mask, p * scale[:, None, None] + shift[:, None, None] - t, 0.0)
    return difference.abs().sum((1, 2)) / n.clamp(min=1)


def _medians(values: Tensor, mask: Tensor) -> Tensor:
    """The lower median of the valid values, (B,); 1 where nothing is valid."""
    return torch.where(mask, values, torch.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
