"""The Python interface: `depth = load("pocket")("photo.jpg")`, for students and teachers, and operations on maps.

    from distill import load, load_teacher

    model = load("runs/demo")                  # a run, a student's folder, "pocket", or OWNER/NAME on the hub
    depth = model("photo.jpg")                 # or a PIL image, an array, a tensor, a list, a generator
    depth.numpy(); depth.save("depth.png"); depth.colorize(cmap="turbo"); depth.point_cloud(fov=60)

Shapes: H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import Kind
from distill.core.home import home_expanded
from distill.eval.reports.figures import NEARNESS, colourise
from distill.inference import outputs, predict, solid
from distill.inference.pictures import checked, is_batch, is_file, picture, within_jpeg

COLOUR_MAPS = ("distill", "turbo", "inferno", "magma", "viridis", "plasma", "jet", "gray")


@dataclass(frozen=True, slots=True, repr=False)
class Depth:
    """The depth map of one picture.

    values: (H,W) float32. valid: (H,W) bool. kind: of the values, affine disparity for most students. photo: (3,H,W)
    uint8, the picture. licence: of the model that made the map.
    """

    values: Tensor
    valid: Tensor
    kind: Kind
    photo: Tensor
    licence: str = "unknown"

    def __repr__(self) -> str:
        # Not the dataclass's, which prints every pixel of the map and of the photo at a prompt.
        height, width = self.values.shape
        values = self.values[self.valid]
        span = f"{values.min():.4g} to {values.max():.4g}" if values.numel() else "no valid pixel"
        return f"Depth({height} x {width}, {self.kind}, {span})"

    def numpy(self) -> np.ndarray:
        """(H,W) float32, NaN where the model gives no value."""
        return torch.where(self.valid, self.values, torch.nan).cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy().astype(dtype or np.float32)

    def save(
        self, path: str | Path, *, fov: float | None = None, intrinsics: Any = None, far: float = solid.FAR
    ) -> Path:
        """Write the map in the format of the suffix, as `distill predict` does: 16-bit .png with its range, .npy, .jpg
        of colours.

        In 3D, with the camera of `point_cloud`: .ply (points), .glb (a surface, cut where depth jumps), .html (a page
        that shows the points offline). Returns the path; raises ValueError for another suffix or a map that is not
        finite, OSError if it cannot be written.
        """
        path = home_expanded(path)
        names = {".png": "png", ".npy": "npy", ".jpg": "jpg", ".jpeg": "jpg"}
        names |= {".ply": "ply", ".glb": "glb", ".html": "view"}
        if (name := names.get(path.suffix.lower())) is None:
            raise ValueError(
                f"{path}: a map is saved as .png (16 bits), .npy (float32), .jpg (colours), .ply, .glb or .html"
            )
        if name in outputs.SOLID:
            lens = solid.camera(fov, intrinsics, *self.values.shape)
            solid_inputs = (self.values, self.valid, self.kind, self._rgb(), lens)
            files.write_bytes(path, solid.encode(name, *solid_inputs, far=far, title=path.stem))
        elif name == "jpg":
            colours = within_jpeg(self.colorize())
            _, data = cv2.imencode(".jpg", colours[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            files.write_bytes(path, data.tobytes())
        else:
            values, valid = self.numpy(), self.valid.cpu().numpy()
            if name == "png" and (not valid.any() or not np.isfinite(values[valid]).all()):
                raise ValueError(f"{path}: the map has no valid pixels, or values that are not finite: save it as .npy")
            predict.write_map(path, name, values, self._rgb(), str(self.kind))
        return path

    def colorize(self, cmap: str = "distill") -> np.ndarray:
        """(H,W,3) uint8 RGB, near is bright (or the map's high end); cmap: one of COLOUR_MAPS; grey where invalid."""
        if cmap not in COLOUR_MAPS:
            raise ValueError(f"cmap must be one of {', '.join(COLOUR_MAPS)}, not {cmap!r}")
        near = predict.nearness(self.values.cpu().numpy(), str(self.kind))
        valid = self.valid.cpu().numpy() & np.isfinite(near)
        low, high = np.percentile(near[valid], [1, 99]) if valid.any() else (0.0, 1.0)
        position = np.clip((near - low) / max(float(high - low), 1e-12), 0.0, 1.0)
        if cmap == "distill":
            return colourise(position, valid, NEARNESS)
        codes = (np.where(valid, position, 0.0) * 255).round().astype(np.uint8)
        if cmap == "gray":
            colours = np.repeat(codes[..., None], 3, axis=-1)
        else:
            colours = cv2.applyColorMap(codes, getattr(cv2, f"COLORMAP_{cmap.upper()}"))[..., ::-1]
        return np.where(valid[..., None], colours, np.uint8(128)).astype(np.uint8)

    def point_cloud(
        self, *, fov: float | None = None, intrinsics: Any = None, far: float = solid.FAR, stride: int = 1
    ) -> solid.PointCloud:
        """The valid pixels as points in front of a pinhole camera.

        fov: the horizontal field of view in degrees; or intrinsics: 3 x 3, in pixels. Give one of them: a map does not
        contain it. far: the assumed ratio of the farthest to the nearest distance, for maps whose shift is unknown; the
        cloud is then a relief, not a measurement. Other maps do not use it. stride: take every n-th pixel. Raises
        ValueError for an impossible camera.
        """
        lens = solid.camera(fov, intrinsics, *self.values.shape)
        z, valid = solid.distances(self.values, self.valid, self.kind, far)
        return solid.cloud(z, valid, self._rgb(), lens, stride=stride)

    def _rgb(self) -> np.ndarray:
        return self.photo.permute(1, 2, 0).numpy()


class Model:
    """A student or teacher that is called with pictures; `card` describes it, `estimator` is the batched interface."""

    def __init__(self, estimator: predict.Estimator) -> None:
        self.estimator = estimator
        self.card = estimator.card

    def __repr__(self) -> str:
        return f"Model({self.card.name}, {self.card.weights}, {self.card.kind})"

    def __call__(self, images: Any, *, fov: float | None = None, intrinsics: Any = None) -> Any:
        """Return a Depth for a picture, a list of them for a batch or a list, a generator of them for another iterable.

        A picture: see inference.pictures.picture. Batches are tensors B x 3 x H x W or arrays B x H x W x 3.
        fov: of the camera, horizontal, in degrees, or intrinsics, 3 x 3 in pixels: for a model whose metres depend on
        it (estimator.takes_focal); raises ValueError for any other model, or for an impossible camera.
        """
        given = [name for name, value in (("fov", fov), ("intrinsics", intrinsics)) if value is not None]
        if given and not self.estimator.takes_focal:
            raise ValueError(f"{given[0]}: the map of {self.card.weights} does not depend on the camera; leave it out")
        depth_of = partial(self._predict, fov=fov, intrinsics=intrinsics)
        if is_batch(images) and isinstance(images, Tensor):
            checked(images)
        if is_batch(images) or isinstance(images, list | tuple):
            return [depth_of(image) for image in images]
        single = isinstance(images, str | bytes | bytearray | memoryview | np.ndarray | Tensor) or is_file(images)
        if isinstance(images, Iterable) and not single:
            return (depth_of(image) for image in images)
        return depth_of(images)

    def _predict(self, image: Any, *, fov: float | None, intrinsics: Any) -> Depth:
        tensor = picture(image).cpu()
        has_camera = fov is not None or intrinsics is not None
        focal_option = {"focal": solid.camera(fov, intrinsics, *tensor.shape[-2:]).focal} if has_camera else {}
        depth = self.estimator.predict(tensor, **focal_option)
        # A copy, because the caller may read the next frame into the same array.
        photo = tensor.clone() if tensor.dtype == torch.uint8 else (tensor.clamp(0, 1) * 255).round().to(torch.uint8)
        return Depth(depth.values[0].cpu(), depth.valid[0].cpu(), depth.kind, photo, str(self.card.licence))


def load(
    student: str | Path = "pocket",
    *,
    device: str = "auto",
    size: int | None = None,
    encoder_weights: str | None = None,
) -> Model:
    """Load a student to be called with pictures: "pocket", a run's or a student's folder, or OWNER/NAME on the hub.

    device: "auto" is CUDA, then Apple's GPU, then the CPU. size: the short side at which it runs, instead of its own.
    Raises what distill.inference.predict.load raises.
    """
    return Model(predict.load(student, device=device, size=size, encoder_weights=encoder_weights))


def load_teacher(name: str, weights: str | Path | None = None, *, device: str = "auto", **options: Any) -> Model:
    """Load a teacher (`distill list teachers`) with its weights: a hub id or a file in its authors' format.

    weights: None takes the teacher's first card. options: the teacher's own, as in a recipe's `options`.
    Raises LookupError for an unknown teacher, ValueError for unknown options, OSError for missing weights.
    """
    return Model(predict.load_teacher(name, weights, device=device, **options))
