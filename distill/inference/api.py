"""The Python door: `depth = load("pocket")("photo.jpg")`, for students and teachers, and what a person does with a map.

    from distill import load, load_teacher

    model = load("runs/demo")                  # a run, a student's folder, "pocket", or OWNER/NAME on the hub
    depth = model("photo.jpg")                 # or a PIL image, an array, a tensor, a list, a generator
    depth.numpy(); depth.save("depth.png"); depth.colorize(cmap="turbo"); depth.point_cloud(fov=60)

Shapes: H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import Kind
from distill.eval.reports.figures import NEARNESS, colourise
from distill.inference import outputs, predict, solid
from distill.inference.pictures import checked, is_batch, is_file, picture

COLOUR_MAPS = ("distill", "turbo", "inferno", "magma", "viridis", "plasma", "jet", "gray")


@dataclass(frozen=True, slots=True)
class Depth:
    """The depth map of one picture.

    values: (H,W) float32. valid: (H,W) bool. kind: what the values are, affine disparity of most students. photo:
    (3,H,W) uint8, the picture. licence: of the model that made it.
    """

    values: Tensor
    valid: Tensor
    kind: Kind
    photo: Tensor
    licence: str = "unknown"

    def numpy(self) -> np.ndarray:
        """(H,W) float32, NaN where the model says nothing."""
        return torch.where(self.valid, self.values, torch.nan).cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy().astype(dtype or np.float32)

    def save(
        self, path: str | Path, *, fov: float | None = None, intrinsics: Any = None, far: float = solid.FAR
    ) -> Path:
        """Write the map, by its suffix, as `distill predict` does: 16-bit .png with its range, .npy, .jpg of colours.

        In three dimensions, with the camera of `point_cloud`: .ply (points), .glb (a surface that is cut where depth
        jumps), .html (a page that shows the points offline).
        Returns the path; raises ValueError for another suffix or a map that is not finite, OSError where it cannot be
        written.
        """
        path = Path(path).expanduser()
        names = {".png": "png", ".npy": "npy", ".jpg": "jpg", ".jpeg": "jpg"}
        names |= {".ply": "ply", ".glb": "glb", ".html": "view"}
        if (name := names.get(path.suffix.lower())) is None:
            raise ValueError(
                f"{path}: a map is saved as .png (16 bits), .npy (float32), .jpg (colours), .ply, .glb or .html"
            )
        if name in outputs.SOLID:
            lens = solid.camera(fov, intrinsics, *self.values.shape)
            given = (self.values, self.valid, self.kind, self._rgb(), lens)
            files.write_bytes(path, solid.encode(name, *given, far=far, title=path.stem))
        elif name == "npy":
            files.write_bytes(path, _npy(self.numpy()))
        elif name == "jpg":
            _, data = cv2.imencode(".jpg", self.colorize()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            files.write_bytes(path, data.tobytes())
        else:
            values, valid = self.numpy(), self.valid.cpu().numpy()
            if not valid.any() or not np.isfinite(values[valid]).all():
                raise ValueError(f"{path}: the map has no value where it should, which only .npy keeps")
            predict.write_map(path, "png", values, self._rgb(), predict.value_range(values), str(self.kind))
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
            picture_ = np.repeat(codes[..., None], 3, axis=-1)
        else:
            picture_ = cv2.applyColorMap(codes, getattr(cv2, f"COLORMAP_{cmap.upper()}"))[..., ::-1]
        return np.where(valid[..., None], picture_, np.uint8(128)).astype(np.uint8)

    def point_cloud(
        self, *, fov: float | None = None, intrinsics: Any = None, far: float = solid.FAR, stride: int = 1
    ) -> solid.PointCloud:
        """The valid pixels as points in front of a pinhole camera.

        fov: the horizontal field of view in degrees; or intrinsics: 3 x 3, in pixels. Give one of them: no map knows
        it. far: how many times farther the farthest point is than the nearest, for maps whose shift is unknown: an
        assumption, which makes the cloud a relief and no measurement. Maps of known depth do not use it. stride: every
        so many pixels. Raises ValueError for a camera that cannot be.
        """
        lens = solid.camera(fov, intrinsics, *self.values.shape)
        z, valid = solid.distances(self.values, self.valid, self.kind, far)
        return solid.cloud(z, valid, self._rgb(), lens, stride=stride)

    def _rgb(self) -> np.ndarray:
        return self.photo.permute(1, 2, 0).numpy()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


class Model:
    """A student or a teacher, called with pictures; its `card` says what it is, `estimator` is the batched way in."""

    def __init__(self, estimator: predict.Estimator) -> None:
        self.estimator = estimator
        self.card = estimator.card

    def __call__(self, images: Any, *, fov: float | None = None, intrinsics: Any = None) -> Any:
        """One picture gives a Depth; a batch or a list, a list of them; any other iterable, a generator of them.

        A picture: see inference.pictures.picture. Batches are tensors B x 3 x H x W or arrays B x H x W x 3.
        fov: of the camera, horizontal, in degrees, or intrinsics, 3 x 3 in pixels: for a model whose metres depend on
        it (estimator.takes_focal); ValueError for another, or for a camera that cannot be.
        """
        told: dict[str, Any] = {"fov": fov, "intrinsics": intrinsics}
        takes = getattr(self.estimator, "takes_focal", False)  # estimators of other people's may not say
        if not takes and (given := [name for name, v in told.items() if v is not None]):
            raise ValueError(f"{given[0]}: the map of {self.card.weights} does not depend on the camera; leave it out")

        def one(image: Any) -> Depth:
            return self._one(image, **told)

        if is_batch(images):
            if isinstance(images, Tensor):
                checked(images)
            return [one(image) for image in images]
        if isinstance(images, list | tuple):
            return [one(image) for image in images]
        single = isinstance(images, str | bytes | bytearray | memoryview | np.ndarray | Tensor) or is_file(images)
        if isinstance(images, Iterable) and not single:
            return (one(image) for image in images)
        return one(images)

    def _one(self, image: Any, *, fov: float | None = None, intrinsics: Any = None) -> Depth:
        given = picture(image).cpu()
        told = fov is not None or intrinsics is not None
        more = {"focal": solid.camera(fov, intrinsics, *given.shape[-2:]).focal} if told else {}
        made = self.estimator.predict(given, **more)
        photo = given if given.dtype == torch.uint8 else (given.clamp(0, 1) * 255).round().to(torch.uint8)
        return Depth(made.values[0].cpu(), made.valid[0].cpu(), made.kind, photo, str(self.card.licence))


def load(
    student: str | Path = "pocket",
    *,
    device: str = "auto",
    size: int | None = None,
    encoder_weights: str | None = None,
) -> Model:
    """A student, ready to be called with pictures: "pocket", a run's or a student's folder, or OWNER/NAME on the hub.

    device: "auto" is CUDA, then Apple's GPU, then the CPU. size: the short side it works at, in place of its own.
    Raises what distill.inference.predict.load raises.
    """
    return Model(predict.load(student, device=device, size=size, encoder_weights=encoder_weights))


def load_teacher(name: str, weights: str | Path | None = None, *, device: str = "auto", **options: Any) -> Model:
    """A teacher (`distill list teachers`) with its weights: a hub id or a file in its authors' format.

    weights: None takes the teacher's first card. options: the teacher's own, as in a recipe's `options`.
    Raises LookupError for an unknown teacher, ValueError for unknown options, OSError for weights that are not there.
    """
    return Model(predict.load_teacher(name, weights, device=device, **options))
