"""Depth maps in 3D: a pinhole camera, points, a surface that is cut where depth jumps, and their file formats.

A map of unknown shift does not determine a shape: `far`, the assumed ratio of the farthest to the nearest distance,
makes it a relief for viewing, not a measurement. Files: PLY (points with colours, binary), GLB
(glTF 2.0: a textured surface), and a page that shows the points offline.

Shapes: H height, W width, N points, F triangles. Coordinates: x right, y down, z forward, in metres if the map is
metric; GLB files use glTF's y up, z backward.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.core.printable import printable
from distill.inference.pictures import within_jpeg

FAR = 10.0
"""The assumed ratio of the farthest to the nearest distance in a map whose shift is unknown. Ours."""
FOV = 60.0
"""Horizontal degrees that `distill predict` assumes without --fov or EXIF data. Ours; phones: 60 to 75."""
NARROWEST, WIDEST = 0.01, 179.0
"""Degrees of view that a camera may have: beyond, its points would lie on one line, or at distances outside float32.
Ours."""
MAX_FAR = 1e6
"""The largest allowed `far`. Ours."""
JUMP = 0.08
"""Neighbouring depths that differ by more than this fraction belong to different surfaces. Ours."""
MAX_POINTS, MAX_PAGE_POINTS = 400_000, 300_000
"""The largest number of points of a written surface or cloud, and of an HTML page."""


class PointCloud(NamedTuple):
    """points: (N,3) float32, x right, y down, z forward, in metres if the map is metric. colors: (N,3) uint8 RGB."""

    points: np.ndarray
    colors: np.ndarray


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera: focal lengths and centre in pixels. origin: of these numbers, in words."""

    fx: float
    fy: float
    cx: float
    cy: float
    origin: str = ""

    @property
    def focal(self) -> float:
        """The mean focal length in pixels."""
        return (self.fx + self.fy) / 2


def camera(fov: float | None, intrinsics: Any, height: int, width: int) -> Camera:
    """The camera of a horizontal field of view in degrees, or of 3 x 3 intrinsics in pixels; ValueError unless one."""
    if (fov is None) == (intrinsics is None):
        raise ValueError("give the camera: either fov=DEGREES (horizontal; phones have 60 to 75) or intrinsics=3 x 3")
    if fov is not None:
        if not NARROWEST <= fov <= WIDEST:
            raise ValueError(f"fov must be between {NARROWEST:g} and {WIDEST:g} degrees, not {fov}")
        focal = width / 2 / math.tan(math.radians(fov) / 2)
        return Camera(focal, focal, width / 2, height / 2, f"a field of view of {fov:g} degrees")
    matrix = np.asarray(intrinsics, dtype=np.float64)
    if matrix.shape != (3, 3) or not (matrix[0, 0] > 0 and matrix[1, 1] > 0 and np.isfinite(matrix).all()):
        raise ValueError("intrinsics must be 3 x 3 in pixels: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    fx, fy, cx, cy = (float(matrix[index]) for index in ((0, 0), (1, 1), (0, 2), (1, 2)))
    narrow = math.tan(math.radians(NARROWEST) / 2)
    if wrong := [(f, side) for f, side in ((fx, width), (fy, height)) if f < 0.1 * side or side / 2 / f < narrow]:
        focal, side = wrong[0]
        degrees = math.degrees(2 * math.atan(side / 2 / focal))
        raise ValueError(
            f"intrinsics of {fx:g} and {fy:g} pixels see {degrees:.3g} degrees of an image of {width} x {height}: they "
            "are in its pixels, not in millimetres or parts of its sides"
        )
    return Camera(fx, fy, cx, cy, "intrinsics")


def exif_camera(photo: Path, height: int, width: int) -> Camera | None:
    """The camera by the 35 mm equivalent focal length in a photo's EXIF; None if it has none.

    The equivalence is of diagonals (CIPA DCG-001), 43.27 mm on film, so that rotating the photo changes nothing.
    """
    try:
        with Image.open(photo) as image:
            film_focal = float(image.getexif().get_ifd(0x8769).get(0xA405) or 0)
    except (OSError, ValueError, TypeError, SyntaxError):
        return None
    if not 4 <= film_focal <= 2000:
        return None
    focal = math.hypot(height, width) * film_focal / math.hypot(36, 24)
    return Camera(focal, focal, width / 2, height / 2, f"EXIF: {film_focal:g} mm on 35 mm film")


def distances(values: Tensor, valid: Tensor, kind: Kind, far: float = FAR) -> tuple[np.ndarray, np.ndarray]:
    """Distances (H,W) along the optical axis of a map (H,W), and where they are valid. ValueError for a wrong `far`."""
    if not 1 < far <= MAX_FAR:
        raise ValueError(f"far must be above 1, and at most {MAX_FAR:g}, not {far}")
    if kind.unknown != "affine":
        target = Kind.METRIC_DEPTH if kind.unknown == "metric" else Kind.SCALE_DEPTH
        converted = DepthMap(values[None], valid[None], kind).convert(target)
        z, usable = converted.values[0].cpu().numpy(), converted.valid[0].cpu().numpy()
        return z, usable & np.isfinite(z) & (z > 0)
    raw, usable = values.cpu().numpy(), valid.cpu().numpy()
    usable = usable & np.isfinite(raw)
    low, high = (float(raw[usable].min()), float(raw[usable].max())) if usable.any() else (0.0, 1.0)
    unit = np.where(usable, raw - low, 0.0) / max(high - low, 1e-12)
    z = 1.0 / (1.0 / far + unit * (1.0 - 1.0 / far)) if kind.quantity == "disparity" else 1.0 + unit * (far - 1.0)
    return z.astype(np.float32), usable


def cloud(z: np.ndarray, valid: np.ndarray, rgb: np.ndarray, lens: Camera, *, stride: int = 1) -> PointCloud:
    """The valid pixels of distances (H,W) as points; rgb: (H,W,3) uint8. stride: every n-th pixel, at least 1."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, not {stride}")
    rows, columns = np.mgrid[0 : z.shape[0] : stride, 0 : z.shape[1] : stride]
    mask = valid[::stride, ::stride]
    rows, columns = rows[mask], columns[mask]
    return PointCloud(_lifted(z[rows, columns], rows, columns, lens), rgb[rows, columns])


def _lifted(z: np.ndarray, rows: np.ndarray, columns: np.ndarray, lens: Camera) -> np.ndarray:
    x, y = (columns + 0.5 - lens.cx) / lens.fx * z, (rows + 0.5 - lens.cy) / lens.fy * z
    return np.stack([x, y, z], axis=-1).astype(np.float32)


class Surface(NamedTuple):
    """points: (N,3) float32. at: (N,2) float32 position in the photo, 0..1 right and down. faces: (F,3) uint32,
    counter-clockwise in glTF's axes as seen from the camera."""

    points: np.ndarray
    at: np.ndarray
    faces: np.ndarray


def surface(z: np.ndarray, valid: np.ndarray, lens: Camera, *, stride: int = 1, jump: float = JUMP) -> Surface:
    """Make two triangles between four neighbouring pixels, except those with an invalid corner or a depth jump.

    jump: the fraction by which the corners of a triangle may differ at most. Points of no triangle are left out.
    """
    height, width = z.shape
    rows, columns = np.mgrid[0:height:stride, 0:width:stride]
    depths, usable = z[::stride, ::stride], valid[::stride, ::stride]
    index = np.arange(depths.size, dtype=np.int64).reshape(depths.shape)
    a, b, c, d = (part.ravel() for part in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    faces = np.concatenate([np.stack([a, c, b], -1), np.stack([b, c, d], -1)])
    corner_depths, is_valid = depths.ravel()[faces], usable.ravel()[faces].all(-1)
    nearest = np.where(is_valid, corner_depths.min(-1), 1.0)
    faces = faces[is_valid & (corner_depths.max(-1) <= nearest * (1 + jump))]
    used, new_index = np.unique(faces, return_inverse=True)
    rows, columns = rows.ravel()[used], columns.ravel()[used]
    points = _lifted(z[rows, columns], rows, columns, lens)
    at = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=-1).astype(np.float32)
    return Surface(points, at, new_index.reshape(-1, 3).astype(np.uint32))


def stride_for(height: int, width: int, most: int = MAX_POINTS) -> int:
    """Return the smallest stride that leaves about `most` points of a picture."""
    return max(1, math.ceil(math.sqrt(height * width / most)))


@dataclass(frozen=True, slots=True)
class Lens:
    """The camera settings of `distill predict`: a field of view, intrinsics, or neither; and `far` of the depth."""

    fov: float | None = None
    intrinsics: tuple[float, float, float, float] | None = None
    far: float = FAR

    def of(self, photo: Path, height: int, width: int) -> Camera:
        """The camera of a photo of (H,W) pixels: as set, else from its EXIF, else FOV."""
        if self.intrinsics is not None:
            fx, fy, cx, cy = self.intrinsics
            return camera(None, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], height, width)
        if self.fov is not None:
            return camera(self.fov, None, height, width)
        assumed = camera(FOV, None, height, width)
        origin = f"{assumed.origin}, assumed: neither --fov nor EXIF says it"
        return exif_camera(photo, height, width) or Camera(assumed.fx, assumed.fy, assumed.cx, assumed.cy, origin)


def encode(
    name: str, values: Tensor, valid: Tensor, kind: Kind, rgb: np.ndarray, lens: Camera, *, far: float, title: str
) -> bytes:
    """Encode a map (H,W) with its photo (H,W,3) uint8 as the bytes of a "ply", "glb" or "view"."""
    height, width = rgb.shape[:2]
    z, mask = distances(values, valid, kind, far)
    assumption = f"; its shift is unknown: the farthest point is taken to be {far:g} times as far as the nearest"
    unit = "metres" if kind.unknown == "metric" else "no unit" + (assumption if kind.unknown == "affine" else "")
    comment = f"{unit}; camera: {lens.origin}"
    if name == "glb":
        return glb(surface(z, mask, lens, stride=stride_for(height, width)), rgb, comment)
    stride = stride_for(height, width, MAX_POINTS if name == "ply" else MAX_PAGE_POINTS)
    points = cloud(z, mask, rgb, lens, stride=stride)
    if name == "ply":
        return ply(points, comment)
    return viewer(points, lens, (height, width), stride=stride, title=title, comment=comment).encode()


# --- files ------------------------------------------------------------------------------------------------------------


def ply(points: PointCloud, comment: str = "") -> bytes:
    """Encode points with colours as a binary PLY."""
    vertex = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    body = np.empty(len(points.points), vertex)
    body["xyz"], body["rgb"] = points.points, points.colors
    lines = ["ply", "format binary_little_endian 1.0", f"comment {' '.join(comment.split())}"]
    lines += [f"element vertex {len(body)}", *(f"property float {axis}" for axis in "xyz")]
    lines += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header", ""]
    return "\n".join(lines).encode("ascii", "replace") + body.tobytes()


def glb(shape: Surface, rgb: np.ndarray, comment: str = "") -> bytes:
    """Encode a surface as binary glTF 2.0 with the photo (H,W,3) uint8 as its texture, unlit and double-sided."""
    texture = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(within_jpeg(rgb))).save(texture, "JPEG", quality=90)
    points = shape.points * np.array([1, -1, -1], np.float32)
    parts = [points.tobytes(), shape.at.tobytes(), shape.faces.tobytes(), texture.getvalue()]
    views, body = [], b""
    for data, target in zip(parts, (34962, 34962, 34963, None), strict=True):
        view = {"buffer": 0, "byteOffset": len(body), "byteLength": len(data)}
        views.append(view | ({"target": target} if target else {}))
        body += data + b"\0" * (-len(data) % 4)
    span = [points.min(0).tolist(), points.max(0).tolist()] if len(points) else [[0.0] * 3] * 2
    count = len(points)
    scene = {
        "asset": {"version": "2.0", "generator": "depth-distill", "extras": {"comment": comment}},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2, "material": 0}]}],
        "materials": [
            {
                "doubleSided": True,
                "extensions": {"KHR_materials_unlit": {}},
                "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0},
            }
        ],
        "textures": [{"source": 0, "sampler": 0}],
        "samplers": [{"wrapS": 33071, "wrapT": 33071}],
        "images": [{"bufferView": 3, "mimeType": "image/jpeg"}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": count, "type": "VEC3", "min": span[0], "max": span[1]},
            {"bufferView": 1, "componentType": 5126, "count": count, "type": "VEC2"},
            {"bufferView": 2, "componentType": 5125, "count": shape.faces.size, "type": "SCALAR"},
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": len(body)}],
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(body)
    head = struct.pack("<4sII", b"glTF", 2, total) + struct.pack("<I4s", len(text), b"JSON")
    return head + text + struct.pack("<I4s", len(body), b"BIN\0") + body


def viewer(points: PointCloud, lens: Camera, size: tuple[int, int], *, stride: int, title: str, comment: str) -> str:
    """Return one HTML page that shows the points, rotated by mouse or finger; it works offline, and needs WebGL.

    size: the picture's (H,W); the page first shows the points as the camera saw them.
    """
    xyz = points.points
    low, high = (xyz.min(0), xyz.max(0)) if len(xyz) else (np.zeros(3), np.ones(3))
    step = np.maximum(high - low, 1e-9) / 65535
    codes = ((xyz - low) / step).round().astype("<u2")
    facts = {
        "count": len(xyz),
        "low": [float(v) for v in low],
        "step": [float(v) for v in step],
        "middle": float(np.median(xyz[:, 2])) if len(xyz) else 1.0,
        "pitch": stride / lens.fx,
        "half": [size[1] / 2 / lens.fx, size[0] / 2 / lens.fy],
        "xyz": base64.b64encode(codes.tobytes()).decode(),
        "rgb": base64.b64encode(np.ascontiguousarray(points.colors).tobytes()).decode(),
    }
    page = resources.files("distill").joinpath("assets/viewer.html").read_text(encoding="utf-8")
    for key, text in {"TITLE": printable(title), "COMMENT": comment}.items():
        page = page.replace(f"[[{key}]]", text.replace("&", "&amp;").replace("<", "&lt;"))
    return page.replace('"[[POINTS]]"', json.dumps(facts))
