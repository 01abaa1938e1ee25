"""Pictures, their encoded bytes and tars of them, for every test that reads photos."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import torch
from PIL import Image


def picture(height=24, width=36, seed=0) -> Image.Image:
    """A picture without equal regions that survives JPEG: smooth ramps, a different colour in each corner."""
    y, x = np.mgrid[:height, :width]
    ramps = [255 * x / width, 255 * y / height, np.full_like(x, 40 + 40 * (seed % 5))]
    return Image.fromarray(np.stack(ramps, -1).astype(np.uint8))


def encoded(image=None, form="JPEG", **options) -> bytes:
    out = io.BytesIO()
    (picture() if image is None else image).save(out, form, **options)
    return out.getvalue()


def noise(side) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pack(path, members, *, cut=None):
    """A tar of (name, bytes or TarInfo) members, cut after `cut` bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(out.getvalue()[:cut])
    return path


def close(rgb: torch.Tensor, image: Image.Image, tolerance=6) -> bool:
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return rgb.shape == expected.shape and (rgb.int() - expected.int()).abs().max() <= tolerance


def textured(height=60, width=80) -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(30, 250, (height, width, 3), dtype=np.uint8))
