"""The Python door: every form of a picture gives one map, a wrong one gives the advice that helps."""

from __future__ import annotations

import dataclasses
import inspect
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import distill
from distill.core.depth import DepthMap, Kind
from distill.data.maps import read_map
from distill.data.photos import BadImageError
from distill.inference import solid
from distill.inference.api import Depth, Model
from distill.inference.pictures import picture, within_jpeg

RGB = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 2).astype(np.uint8)
CHW = torch.from_numpy(RGB).permute(2, 0, 1)


class Red:
    """Its map is the red channel in [0,1]."""

    takes_focal = False

    def __init__(self, kind=Kind.AFFINE_DISPARITY):
        self.card = type("card", (), {"licence": "CC0", "kind": kind})

    def predict(self, images):
        values = images[:1].float() / (255.0 if images.dtype == torch.uint8 else 1.0)
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), self.card.kind)


def forms(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    alpha = np.concatenate([RGB, np.full((5, 7, 1), 255, np.uint8)], axis=-1)
    return {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "open file": io.BytesIO(path.read_bytes()),
        "pil": Image.fromarray(RGB),
        "pil rgba": Image.fromarray(alpha),
        "numpy": RGB,
        "numpy rgba": alpha,
        "numpy float": RGB / 255.0,
        "tensor": CHW,
        "tensor float": CHW.float() / 255.0,
        "tensor half": CHW.double() / 255.0,
    }


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    model = Model(Red())
    for name, form in forms(tmp_path).items():
        depth = model(form)
        assert np.allclose(depth.numpy(), RGB[..., 0] / 255.0, atol=1e-6), name
        assert (depth.photo.permute(1, 2, 0).numpy() == RGB).all(), name
        assert depth.licence == "CC0"
    read = io.BytesIO((tmp_path / "a.png").read_bytes())
    read.read()  # as a web framework may have done
    assert torch.equal(picture(read), CHW)


def test_what_is_transparent_is_white_and_what_is_nearly_a_level_is_that_level():
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[..., 3] = [[0, 25], [100, 255]]
    shown = [[255, 250], [233, 200]]  # rounded, not cut off
    assert picture(rgba)[0].tolist() == shown
    assert (picture(torch.from_numpy(rgba).permute(2, 0, 1) / 255)[0] * 255).round().tolist() == shown
    for level, stored in ((0.999, 255), (1.1, 255), (-0.1, 0), (0.498, 127)):
        assert (Model(Red())(torch.full((3, 2, 2), level)).photo == stored).all()


class Metres(Red):
    """Its map depends on the focal length."""

    takes_focal, focal = True, 0.0

    def predict(self, images, *, focal=None):
        self.focal = focal
        return super().predict(images)


def test_a_camera_is_for_a_model_that_takes_one():
    metres = Metres(Kind.METRIC_DEPTH)
    for camera, focal in (
        ({"fov": 90}, 3.5),  # half of the width of 7
        ({"intrinsics": [[6, 0, 3.5], [0, 8, 2.5], [0, 0, 1]]}, 7),
        ({}, None),
    ):
        Model(metres)(RGB, **camera)
        assert metres.focal == (focal and pytest.approx(focal))
    plain = Red()
    plain.card.weights = "red.pth"
    for camera in ({"fov": 60}, {"intrinsics": np.eye(3)}):
        with pytest.raises(ValueError, match=f"{next(iter(camera))}: the map of red.pth does not depend on the camera"):
            Model(plain)(RGB, **camera)


def test_grey_and_several():
    model = Model(Red())
    assert picture(RGB[..., 0]).shape == (3, 5, 7) and picture(CHW[:1]).shape == (3, 5, 7)
    for several in ([RGB, RGB], (CHW, CHW), torch.stack([CHW, CHW]), np.stack([RGB, RGB])):
        maps = model(several)
        assert isinstance(maps, list) and len(maps) == 2 and maps[1].values.shape == (5, 7)
    lazily = model(x for x in [RGB, RGB])
    assert inspect.isgenerator(lazily) and len(list(lazily)) == 2


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (RGB.astype(np.float32), "divide by 255"),
        (CHW.float(), "divide by 255"),
        (CHW.float() / 64 - 2, "before normalisation"),
        (torch.from_numpy(RGB), r"permute\(2, 0, 1\)"),
        (torch.from_numpy(np.stack([RGB, RGB])), r"permute\(0, 3, 1, 2\)"),
        (RGB.transpose(2, 0, 1), r"transpose\(1, 2, 0\)"),
        (RGB.astype(np.int64), "uint8"),
        (RGB.astype(np.uint16), "65535"),
        (Image.fromarray(RGB[..., 0].astype(np.float32)), "mode F has no known range"),
        (torch.full((3, 4, 4), torch.nan), "not finite"),
        (torch.stack([torch.zeros(3, 4), torch.full((3, 4), torch.inf)], -1), "not finite"),
        (torch.zeros(4, 4), r"image\[None\]"),
        (torch.zeros(5, 4, 4), "3 channels"),
        (torch.zeros(3, 0, 4), "no pixels"),
    ],
)
def test_a_wrong_picture_gets_the_right_advice(wrong, advice):
    with pytest.raises(ValueError, match=advice):
        Model(Red())(wrong)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(TypeError, match="not int"):
        Model(Red())(3)
    with pytest.raises(ValueError, match="distill predict"):
        Model(Red())(tmp_path)


def test_a_map_is_saved_as_predict_does(tmp_path):
    depth = Model(Red())(RGB)
    assert (np.load(depth.save(tmp_path / "a.npy")) == depth.numpy()).all()
    with Image.open(depth.save(tmp_path / "a.png")) as png:
        low, high = float(png.text["low"]), float(png.text["high"])
        values = low + np.asarray(png) / 65535 * (high - low)
    assert np.allclose(values, depth.numpy(), atol=1e-4) and png.text["kind"] == "affine_disparity"
    large = dataclasses.replace(depth, values=torch.arange(64.0 * 48).reshape(64, 48) % 999)
    large = dataclasses.replace(large, valid=large.values >= 0, photo=torch.zeros(3, 64, 48, dtype=torch.uint8))
    with Image.open(large.save(str(tmp_path / "a.jpg"))) as jpg:
        assert np.abs(np.asarray(jpg).astype(int) - large.colorize()).mean() < 6
    head, _, rows = large.save(tmp_path / "a.ply", fov=60, far=3).read_bytes().partition(b"end_header\n")
    z = np.frombuffer(rows, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))["xyz"][:, 2]
    assert z.max() / z.min() == pytest.approx(3) and b"3 times as far" in head
    assert "<title>a</title>" in large.save(tmp_path / "a.html", fov=60).read_text()
    with pytest.raises(ValueError, match="values that are not finite: save it as .npy"):
        dataclasses.replace(large, values=large.values / 0).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"\.npy"):
        depth.save(tmp_path / "a.exr")
    some = dataclasses.replace(depth, valid=torch.arange(35).reshape(5, 7) > 9)  # sky, of some teachers
    np.testing.assert_allclose(read_map(some.save(tmp_path / "sky.png")), some.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="save it as .npy"):
        dataclasses.replace(some, valid=some.valid & False).save(tmp_path / "sky.png")


def test_colours_show_near_bright():
    values = torch.linspace(1, 9, 60).reshape(6, 10)
    valid = torch.ones(6, 10, dtype=torch.bool)
    valid[0, 5] = False
    for kind in Kind:
        depth = Depth(values, valid, kind, torch.zeros(3, 6, 10, dtype=torch.uint8))
        for cmap in ("distill", "gray", "magma"):
            picture_ = depth.colorize(cmap)
            assert picture_.shape == (6, 10, 3) and picture_.dtype == np.uint8
            first, last = picture_[0, 0].sum(), picture_[-1, -1].sum()
            assert (last > first) == (kind.quantity == "disparity"), (kind, cmap)
            assert len(set(picture_[0, 5])) == 1 or cmap == "distill"
    assert np.isnan(depth.numpy()[0, 5])


def test_colours_are_of_the_values_between_which_nearly_all_lie():
    values = torch.arange(400.0).reshape(20, 20)
    values[19, 19], values[10, 10:] = 1e6, torch.inf
    depth = Depth(values, values < 9e9, Kind.AFFINE_DISPARITY, torch.zeros(3, 20, 20, dtype=torch.uint8))
    grey = depth.colorize("gray")
    assert abs(int(grey[10, 0, 0]) - 128) <= 2 and grey[19, 19, 0] == 255 and grey[0, 0, 0] == 0
    assert grey[10, 10].tolist() == [128, 128, 128], "no value"
    jet = depth.colorize("jet").astype(int)
    assert jet[0, 0, 2] > 100 > jet[0, 0, 0] and jet[19, 19, 0] > 100 > jet[19, 19, 2], "far is blue, near is red"
    with pytest.raises(ValueError, match="turbo"):
        depth.colorize("rainbow")


def test_at_a_prompt_a_map_is_one_line():
    values, valid = torch.tensor([[0.25, 9.0], [1.5, 0.5]]), torch.tensor([[True, False], [True, True]])
    depth = Depth(values, valid, Kind.AFFINE_DISPARITY, torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert repr(depth) == "Depth(2 x 2, affine_disparity, 0.25 to 1.5)"
    assert repr(dataclasses.replace(depth, valid=valid & False)) == "Depth(2 x 2, affine_disparity, no valid pixel)"


def test_points_lie_where_the_camera_saw_them():
    photo = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    everywhere = torch.ones(4, 6, dtype=torch.bool)
    flat = Depth(torch.full((4, 6), 2.0), everywhere, Kind.METRIC_DEPTH, photo)
    cloud = flat.point_cloud(fov=90)
    assert cloud.points.shape == (24, 3) and np.allclose(cloud.points[:, 2], 2.0)
    # At 90 degrees the left edge of the picture is as far to the left as it is deep.
    assert np.isclose(cloud.points[:, 0].min(), -2.0 * (1 - 1 / 6)) and np.isclose(cloud.points[:, 0].mean(), 0)
    assert (cloud.colors[1] == photo[:, 0, 1].numpy()).all()
    assert len(flat.point_cloud(fov=90, stride=2).points) == 2 * 3
    same = flat.point_cloud(intrinsics=[[3, 0, 3], [0, 3, 2], [0, 0, 1]])
    assert np.allclose(same.points, cloud.points)
    inverse = Depth(torch.full((4, 6), 0.5), everywhere, Kind.METRIC_DISPARITY, photo)
    assert np.allclose(inverse.point_cloud(fov=90).points, cloud.points)
    relief = Depth(torch.linspace(0, 1, 24).reshape(4, 6), everywhere, Kind.AFFINE_DISPARITY, photo)
    z = relief.point_cloud(fov=60, far=4).points[:, 2]
    assert np.isclose(z.max() / z.min(), 4) and z[0] > z[-1]
    cameras = [{"intrinsics": [[fx, 0, cx], [0, 3, 2], [0, 0, 1]]} for fx, cx in ((np.inf, 3), (1e9, 3), (3, np.nan))]
    cameras += [{"fov": fov} for fov in (180, 0, -1, np.nan, np.inf, 5e-324)]
    for wrong in ({}, {"fov": 60, "intrinsics": np.eye(3)}, {"intrinsics": np.eye(2)}, *cameras):
        with pytest.raises(ValueError, match=r"fov|intrinsics"):
            relief.point_cloud(**wrong)
    for far in (1, np.nan, np.inf):
        with pytest.raises(ValueError, match="far must be above 1"):
            relief.point_cloud(fov=60, far=far)
    for fov in (solid.NARROWEST, solid.WIDEST):
        assert np.isfinite(relief.point_cloud(fov=fov, far=solid.MAX_FAR).points).all()


def test_the_built_in_model_and_a_run(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    depth = distill.load("pocket", device="cpu")(photo)
    assert depth.values.shape == (40, 60) and depth.kind == Kind.AFFINE_DISPARITY and np.asarray(depth).ndim == 2
    run = tmp_path / "runs" / "demo"
    (run / "train").mkdir(parents=True)
    from distill.students import checkpoint

    (run / "train" / "student").symlink_to(checkpoint.fetch("pocket"), target_is_directory=True)
    again = distill.load(run, device="cpu")
    assert torch.equal(again(photo).values, depth.values)
    assert repr(again) == f"Model(checkpoint, {run / 'train' / 'student'}, affine_disparity)"
    assert checkpoint.located(run / "train") == checkpoint.located(run) == run / "train" / "student"
    taught = distill.load_teacher("checkpoint", str(run), device="cpu")
    assert torch.equal(taught(photo).values, depth.values)
    with pytest.raises(ValueError, match="less than one patch"):
        distill.load("pocket", device="cpu", size=5)
    with pytest.raises(ValueError, match="^size must be a positive number of pixels, not 0"):
        distill.load("pocket", device="cpu", size=0)


def test_a_film_is_told_where_films_go(tmp_path):
    film = tmp_path / "clip.mp4"
    film.write_bytes(b"\0\0\0\x18ftypisom" + bytes(range(1, 200)))
    with pytest.raises(ValueError, match="clip.mp4: a video: run distill predict .*clip.mp4, or give its frames"):
        distill.load("pocket", device="cpu")(film)


def test_a_teacher_by_name():
    teacher = distill.load_teacher("checkpoint", "pocket", device="cpu", native_size=112)
    assert teacher(RGB).values.shape == (5, 7)
    with pytest.raises(ValueError, match="native_sise"):
        distill.load_teacher("checkpoint", device="cpu", native_sise=3)
    with pytest.raises(LookupError, match="depth_anything_v2"):
        distill.load_teacher("depth_anything_2", device="cpu")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_an_opened_image_is_read_as_its_file_is(tmp_path):
    ramp = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
    Image.fromarray(ramp).save(tmp_path / "white.tif")
    data = bytearray((tmp_path / "white.tif").read_bytes())
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8 : at + 10] = bytes(2)  # white is zero
    (tmp_path / "white.tif").write_bytes(data)
    (tmp_path / "12.pgm").write_bytes(b"P5 8 6 4095\n" + (ramp // 16).astype(">u2").tobytes())
    Image.fromarray((ramp // 257).astype(np.uint8)).convert("RGB").save(tmp_path / "light.png")
    data = bytearray((tmp_path / "light.png").read_bytes())
    data[33:33] = chunk(b"gAMA", struct.pack(">I", 100000))  # samples in proportion to light
    (tmp_path / "light.png").write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    assert picture(tmp_path / "turned.png").shape == (3, 8, 6)
    for name in ("white.tif", "12.pgm", "light.png", "turned.png"):
        with Image.open(tmp_path / name) as opened:
            assert torch.equal(picture(opened), picture(tmp_path / name)), name
    bytes_only = Image.fromarray((ramp // 257).astype(np.uint8))
    assert torch.equal(picture(bytes_only.convert("I")), picture(bytes_only))
    bytes_only.save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:-20])
    with pytest.raises(BadImageError, match="cannot be decoded: image file is truncated"):
        picture(Image.open(tmp_path / "cut.bmp"))
    with pytest.raises(FileNotFoundError, match="https://a.b/c.jpg: a URL, but only local files are read: download it"):
        picture("https://a.b/c.jpg")


def test_a_panorama_is_thinned_alike_on_both_sides_where_a_jpeg_could_not_hold_it():
    wide = np.broadcast_to(np.uint8(0), (8, 131_001, 3))
    assert within_jpeg(wide).shape == (3, 43_667, 3)
    assert within_jpeg(wide[:, :65_500]).shape == (8, 65_500, 3)


def test_the_colours_of_a_panorama_that_no_jpeg_holds_are_saved_smaller(tmp_path):
    values = torch.rand(4, 66_000)
    depth = Depth(values, values >= 0, Kind.AFFINE_DISPARITY, torch.zeros(3, 4, 66_000, dtype=torch.uint8))
    with Image.open(depth.save(tmp_path / "wide.jpg")) as saved:
        assert saved.size == (33_000, 2)


def test_a_picture_that_the_caller_overwrites_stays_in_its_map():
    frame = RGB.copy()
    for shown in (frame, torch.from_numpy(frame).permute(2, 0, 1)):
        frame[:] = RGB
        depth = Model(Red())(shown)
        frame[:] = 0
        assert (depth.photo.permute(1, 2, 0).numpy() == RGB).all()
