"""Tiny files in the exact layout of each published data set: the names, formats and units of the authors.

    WRITERS[name](root, frames)    frames: (image (H,W,3) uint8, depth (H,W) float32 metres, 0 where unknown) per frame

Values are rounded to the precision of each format: centimetres, float16 distances, disparity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Frame = tuple[np.ndarray, np.ndarray]


def _image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def distances(depth: np.ndarray, focal: float = 886.81) -> np.ndarray:
    """Planar depth as distance from the camera's centre, pixel by pixel: the inverse of the reader's conversion."""
    height, width = depth.shape
    focal = focal * width / 1024
    out = np.empty_like(depth)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5 - width / 2, row + 0.5 - height / 2
            out[row, column] = depth[row, column] * np.linalg.norm([x, y, focal]) / focal
    return out


def hypersim(root: Path, frames: Sequence[Frame], scene: str = "ai_001_001") -> None:
    import h5py

    images = root / scene / "images"
    for number, (pixels, depth) in enumerate(frames):
        _image(images / "scene_cam_00_final_preview" / f"frame.{number:04d}.tonemap.jpg", pixels)
        folder = images / "scene_cam_00_geometry_hdf5"
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / f"frame.{number:04d}.depth_meters.hdf5", "w") as file:
            known = np.where(depth > 0, depth, np.nan).astype(np.float32)
            file["dataset"] = distances(known).astype(np.float16)


def hypersim_prepared(root: Path, frames: Sequence[Frame]) -> None:
    folder = root / "train" / "ai_001_001"
    for number, (pixels, depth) in enumerate(frames):
        _image(folder / f"rgb_cam_00_fr{number:04d}.png", pixels)
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(
            folder / f"depth_plane_cam_00_fr{number:04d}.png"
        )


def virtual_kitti2(root: Path, frames: Sequence[Frame], variation: str = "clone") -> None:
    for number, (pixels, depth) in enumerate(frames):
        at = root / "Scene01" / variation / "frames"
        _image(at / "rgb" / "Camera_0" / f"rgb_{number:05d}.jpg", pixels)
        codes = np.where(depth > 0, np.minimum(depth * 100, 65535), 65535).round().astype(np.uint16)
        path = at / "depth" / "Camera_0" / f"depth_{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(codes).save(path)


def blendedmvs(root: Path, frames: Sequence[Frame]) -> None:
    scene = root / "5a3ca9cb270f0e3f14d0eddb"
    for number, (pixels, depth) in enumerate(frames):
        _image(scene / "blended_images" / f"{number:08d}.jpg", pixels)
        _image(scene / "blended_images" / f"{number:08d}_masked.jpg", pixels)
        maps = scene / "rendered_depth_maps"
        maps.mkdir(parents=True, exist_ok=True)
        height, width = depth.shape
        head = f"Pf\n{width} {height}\n-1.000000\n".encode()
        # PFM stores the bottom row first.
        (maps / f"{number:08d}.pfm").write_bytes(head + depth[::-1].astype("<f4").tobytes())
        cameras = scene / "cams"
        cameras.mkdir(parents=True, exist_ok=True)
        pose = "\n".join(" ".join("1" if i == j else "0" for j in range(4)) for i in range(4))
        text = f"extrinsic\n{pose}\n\nintrinsic\n575.5 0 384\n0 575.5 288\n0 0 1\n\n1.0 0.1 128 9.0\n"
        (cameras / f"{number:08d}_cam.txt").write_text(text)


def irs(root: Path, frames: Sequence[Frame]) -> None:
    folder = root / "IRSDataset" / "Home" / "ArchVizInterior03"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pixels, depth) in enumerate(frames, 1):
        _image(folder / f"l_{number}.png", pixels)
        _image(folder / f"r_{number}.png", pixels)
        disparity = np.where(depth > 0, 480.0 * 0.1 / np.maximum(depth, 1e-6), 0).astype(np.float32)
        import OpenEXR

        kind = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(kind, {"Y": disparity}).write(str(folder / f"d_{number}.exr"))


def tartanair(root: Path, frames: Sequence[Frame], world: str = "abandonedfactory") -> None:
    flight = root / world / "Easy" / "P000"
    for number, (pixels, depth) in enumerate(frames):
        _image(flight / "image_left" / f"{number:06d}_left.png", pixels)
        path = flight / "depth_left" / f"{number:06d}_left_depth.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.where(depth > 0, depth, 10000).astype(np.float32))


def tartanair_v2(root: Path, frames: Sequence[Frame], camera: str = "lcam_front", world: str = "CarWelding") -> None:
    flight = root / world / "Data_easy" / "P000"
    for number, (pixels, depth) in enumerate(frames):
        _image(flight / f"image_{camera}" / f"{number:06d}_{camera}.png", pixels)
        path = flight / f"depth_{camera}" / f"{number:06d}_{camera}_depth.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = np.where(depth > 0, depth, 10000).astype("<f4")
        cv2.imwrite(str(path), packed[..., None].view(np.uint8))  # OpenCV's order, as the authors write it


def virtual_kitti(root: Path, frames: Sequence[Frame], variation: str = "clone") -> None:
    for number, (pixels, depth) in enumerate(frames):
        _image(root / "vkitti_1.3.1_rgb" / "0001" / variation / f"{number:05d}.png", pixels)
        codes = np.where(depth > 0, np.minimum(depth * 100, 65535), 65535).round().astype(np.uint16)
        _image(root / "vkitti_1.3.1_depthgt" / "0001" / variation / f"{number:05d}.png", codes)


WRITERS: dict[str, Callable[..., None]] = {
    "hypersim": hypersim,
    "virtual_kitti2": virtual_kitti2,
    "blendedmvs": blendedmvs,
    "irs": irs,
    "tartanair": tartanair,
    "tartanair_v2": tartanair_v2,
    "virtual_kitti": virtual_kitti,
}
