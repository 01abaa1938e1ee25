"""Camera model, from linear light to pixels: white balance, exposure, tone curve, vignette, noise, eight bits.

All random numbers are drawn before the light is known, so that a picture can be developed twice, on any device, with
the same bits: all operations are single float32 ones, and none divides a tensor by a Python number, for which a GPU
would multiply by the reciprocal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.data.scenes.cast import root


@dataclass(frozen=True, slots=True)
class Film:
    """Parameters for developing a picture of H x W. balance: (3,) float32. grain: (3,H,W) float32 noise, deviation ~1.

    corner: darkening of the corners. shoulder: the light that becomes white. colourful: saturation, 0 for grey.
    noise: standard deviation of the grain in the picture, as a fraction of full scale.
    """

    balance: Tensor
    exposure: float
    corner: float
    grain: Tensor
    shoulder: float
    contrast: float
    colourful: float
    noise: float


def draw_film(rng: np.random.Generator, height: int, width: int) -> Film:
    """Draw a random film."""
    balance = torch.tensor(1 + rng.normal(0, 0.06, 3), dtype=torch.float32)
    exposure = float(rng.lognormal(-1.15, 0.35))
    corner = float(rng.uniform(0, 0.25)) if rng.random() < 0.5 else 0.0
    grain = torch.from_numpy(rng.standard_normal((4, height, width), dtype=np.float32))
    return Film(
        balance=balance,
        exposure=exposure,
        corner=corner,
        grain=grain[:3] * float(rng.uniform(0.2, 1)) + grain[3:],
        shoulder=float(rng.uniform(1.0, 5.0)),
        contrast=float(rng.uniform(-0.1, 0.5)),
        colourful=max(float(rng.normal(1.0, 0.2)), 0.0) if rng.random() > 0.03 else 0.0,
        noise=float(0.008 * rng.random() if rng.random() < 0.7 else rng.uniform(0.008, 0.025)),
    )


def develop(film: Film, linear: Tensor) -> Tensor:
    """Develop linear light (3,H,W) to a picture (3,H,W) in [0,1], on the same device."""
    _, height, width = linear.shape
    device = linear.device

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=device)

    grey = (linear[0] + linear[1] + linear[2]).flatten()
    middle = grey.kthvalue(max(1, int(0.6 * len(grey)))).values.clamp(min=1e-3) / number(3)
    bright = linear * film.balance.to(device)[:, None, None] * (film.exposure / middle)
    y = ((torch.arange(height) + 0.5) / height * 2 - 1).to(device)
    x = ((torch.arange(width) + 0.5) / width * 2 - 1).to(device)
    bright = bright * (1 - film.corner * (x[None, :] ** 2 + y[:, None] ** 2) / 2)
    bright = bright.clamp(min=0)
    bright = bright * (1 + bright / number(film.shoulder**2)) / (1 + bright)  # Reinhard: white at `shoulder`
    toned = root(bright.clamp(0, 1))
    toned = toned + film.contrast * (toned * toned * (3 - 2 * toned) - toned)
    mean = (toned[0] + toned[1] + toned[2]) / number(3)
    toned = mean + (toned - mean) * film.colourful
    noisy = toned + film.grain.to(device) * film.noise
    return (noisy.clamp(0, 1) * 255).round() / number(255)
