"""MoGe-2: metric depth from a point map whose focal length and shift are fitted afterwards; the authors' model.pt.

The network predicts points up to a shift along the view, a mask of pixels with a depth (sky has none) and the metric
scale. The focal length and the shift are fitted so that 64 x 64 of the points project onto their own pixels, by scipy's
Levenberg-Marquardt as in the authors' code. The authors run it in float16 under autocast; here in the requested dtype.

Source: microsoft/MoGe moge/model/v2.py (infer), moge/utils/geometry_torch.py and geometry_numpy.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.core.weights import read_described
from distill.teachers import (
    Card,
    WeightsMismatchError,
    below_prefix,
    card_for,
    check_images,
    check_resize,
    find_weights,
    load_strictly,
    resolve,
    revision_of,
    sizing_tensors,
)
from distill.teachers._da3_network import NetworkLayout
from distill.teachers._dino import PATCH
from distill.teachers._moge_network import Network, view_plane
from distill.teachers._where import described_by

NATIVE = 840
"""The side of a square of 3600 patches, the maximum of the authors' range and their default."""
CAMERA_GRID = 64  # rows and columns of the points that the camera is fitted to


def _card(weights: str) -> Card:
    return Card(
        name="moge",
        weights=weights,
        kind=Kind.METRIC_DEPTH,
        licence="unknown",
        code_licence="MIT",
        commercial=False,
        multiple=PATCH,
        native_size=NATIVE,
        source="microsoft/MoGe",
        note="MoGe-2; the repository is MIT and says nothing of the weights apart; what its mask leaves out is invalid",
    )


FILES = ("model.pt",)
"""Files read from a hub repository."""
CARDS: tuple[Card, ...] = (
    _card("Ruicheng/moge-2-vitl"),
    _card("Ruicheng/moge-2-vitl-normal"),
    _card("Ruicheng/moge-2-vitb-normal"),
    _card("Ruicheng/moge-2-vits-normal"),
)


class Teacher:
    """MoGe-2 on [0,1] images."""

    def __init__(
        self,
        network: Network,
        card: Card,
        *,
        resize: str = "native",
        native_size: int | None = None,
        focal: float | None = None,
        apply_mask: bool = True,
    ) -> None:
        check_resize(resize, native_size)
        if focal is not None and not 0 < focal < float("inf"):
            raise ValueError(f"focal is a length in pixels, above 0, not {focal}")
        self.network = network
        self.card = card
        self.resize = resize
        self.native_size = native_size or card.native_size or NATIVE
        self.focal = focal
        self.apply_mask = apply_mask

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        focal: float | None = None,
        apply_mask: bool = True,
    ) -> Teacher:
        """A teacher from the authors' model.pt, a folder that holds it, or a hub id.

        native_size: the network works on as many patches as a square of this side has, whatever the image's shape; by
        default the maximum of the file's range. focal: of the images, in pixels at their own size, in place of the
        fitted one. apply_mask: pixels outside the mask are invalid.
        """
        check_resize(resize, native_size)
        file = find_weights(resolve(weights, files=FILES), ("model.pt", "*.pt", "*.pth"))
        state, description = read_described(file, "model_config")
        state = below_prefix(state, ("encoder.backbone.pos_embed",), file)
        state = {key: tensor for key, tensor in state.items() if key != "encoder.backbone.mask_token"}
        if isinstance(description.get("encoder"), str):
            raise WeightsMismatchError(f"{file} is of MoGe-1, by its model_config: take a MoGe-2 checkpoint")
        with described_by(f"{file}: its model_config", "MoGe-2 that is known here"):
            network = Network(_layout(state, description, file), description)
            max_tokens = max(description.get("num_tokens_range", (0, (NATIVE / PATCH) ** 2)))
            size = native_size or round(PATCH * max_tokens**0.5)
        load_strictly(network, state, file, what="MoGe-2")
        kind = Kind.METRIC_DEPTH if hasattr(network, "scale_head") else Kind.SCALE_DEPTH
        card = replace(card_for(CARDS, weights), revision=revision_of(file), native_size=size, kind=kind)
        network = network.eval().to(device=device, dtype=dtype)
        return cls(network, card, resize=resize, native_size=native_size, focal=focal, apply_mask=apply_mask)

    @property
    def takes_focal(self) -> bool:
        """Whether `predict` accepts each image's focal length."""
        return self.card.kind == Kind.METRIC_DEPTH and self.focal is None

    @torch.no_grad()
    def field_of_view(self, images: Tensor) -> Tensor:
        """The horizontal field of view in degrees, (B,), of images (B,3,H,W) in [0,1]."""
        points, valid, _ = self._run(check_images(images))
        focal, _ = camera(points, valid)
        height, width = images.shape[-2:]
        return torch.rad2deg(2 * torch.atan(width / (height**2 + width**2) ** 0.5 / focal))

    @torch.no_grad()
    def predict(self, images: Tensor, *, focal: float | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) depth in metres; invalid outside the mask and where it is not positive.

        focal: in pixels of the images, in place of the option of `load` and of the fitted one.
        """
        images = check_images(images)
        height, width = images.shape[-2:]
        points, valid, scale = self._run(images)
        focal = self.focal if focal is None else focal
        relative_focal = None if focal is None else 2.0 * focal / (height**2 + width**2) ** 0.5
        _, shift = camera(points, valid, focal=relative_focal)
        depth = points[..., 2] + shift[:, None, None]
        valid = (depth > 0) & depth.isfinite() & (valid if self.apply_mask else True)
        depth = depth if scale is None else depth * scale[:, None, None]
        return DepthMap(torch.where(valid, depth, 0.0), valid, self.card.kind).to(images.device)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Points (B,H,W,3), whether the mask has a depth (B,H,W), and the metric scale (B,), float32."""
        height, width = images.shape[-2:]
        tokens = (self.native_size / PATCH) ** 2 if self.resize == "native" else height * width / PATCH**2
        device = next(self.network.parameters()).device
        # Whole patches, as their range has them: 839 and 840 pixels are not told apart by a rounding of the root.
        points, mask, scale = self.network(images.to(device), max(1, round(tokens)))
        valid = torch.ones(points.shape[:3], dtype=torch.bool, device=device) if mask is None else mask > 0.5
        return points, valid, scale


def camera(points: Tensor, valid: Tensor, *, focal: float | None = None) -> tuple[Tensor, Tensor]:
    """(focal length in half diagonals, shift along the view), (B,) each, that project points onto their pixels.

    points: (B,H,W,3), valid: (B,H,W). focal: if it is known. With fewer than two valid points: 1 (or focal) and 0.
    """
    height, width = points.shape[1:3]

    def sampled(maps: Tensor) -> np.ndarray:
        """(B,C,H,W) -> (B,64,64,C)."""
        small = F.interpolate(maps, (CAMERA_GRID, CAMERA_GRID), mode="nearest")
        return small.permute(0, 2, 3, 1).cpu().numpy()

    places = sampled(view_plane(height, width, width / height))[0]
    masks = sampled(valid.float()[:, None])[..., 0] > 0
    solutions = [
        _solve_camera(image_points[usable], places[usable], focal)
        if usable.sum() > 1
        else (1.0 if focal is None else focal, 0.0)
        for image_points, usable in zip(sampled(points.permute(0, 3, 1, 2)), masks, strict=True)
    ]
    focals, shifts = torch.tensor(solutions, dtype=points.dtype, device=points.device).T
    return focals, shifts


def _solve_camera(points: np.ndarray, place: np.ndarray, focal: float | None) -> tuple[float, float]:
    """(focal length, shift) of points (n,3) whose pixels are at places (n,2) of the view plane."""
    from scipy.optimize import least_squares

    across, depth = points[:, :2], points[:, 2]

    def length(projected: np.ndarray) -> Any:
        return (projected * place).sum() / np.square(projected).sum() if focal is None else focal

    def residuals(shift: np.ndarray) -> np.ndarray:
        projected = across / (depth + shift)[:, None]
        return (length(projected) * projected - place).ravel()

    shift = np.float32(least_squares(residuals, x0=0, ftol=1e-3, method="lm")["x"].item())
    return float(length(across / (depth + shift)[:, None])), float(shift)


def _layout(state: Mapping[str, Tensor], description: Mapping[str, Any], where: Path) -> NetworkLayout:
    """The DINOv2's sizes from the tensors; the blocks that are read from the description."""
    prefix = "encoder.backbone."
    swiglu = f"{prefix}blocks.0.mlp.w3.weight" in state
    dimensions = {f"{prefix}pos_embed": 3, f"{prefix}blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight": 2}
    table, last = sizing_tensors(state, dimensions, where, what="MoGe-2")
    blocks = len({key.split(".")[3] for key in state if key.startswith(f"{prefix}blocks.")})
    taps = description["encoder"]["intermediate_layers"]
    taps = tuple(range(blocks - taps, blocks)) if isinstance(taps, int) else tuple(taps)
    return NetworkLayout(
        width=table.shape[-1],
        blocks=blocks,
        heads=max(1, table.shape[-1] // 64),
        hidden=last.shape[-1],
        swiglu=swiglu,
        positions=table.shape[1],
        taps=taps,
        main_from=None,
        features=0,
        channels=(),
        sky=False,
    )
