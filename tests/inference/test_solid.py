"""Maps in three dimensions: points where they should be, no skin over a jump, files that strangers' readers open."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app.cli import main
from distill.core.depth import Kind
from distill.inference import predict, solid
from tests.inference.fake import Fake, call, grey, shoot, silent

RGB = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)


def two_walls():
    """A wall at 2 m, and left of column 10 one at 1 m; a hole."""
    z = np.full((20, 30), 2.0, np.float32)
    z[:, :10] = 1.0
    valid = np.ones(z.shape, bool)
    valid[5, 20] = False
    return z, valid


def test_a_surface_is_cut_at_jumps_and_holes():
    z, valid = two_walls()
    shape = solid.surface(z, valid, solid.camera(60, None, 20, 30))
    depths = shape.points[shape.faces][..., 2]
    assert np.ptp(depths, axis=1).max() == 0, "no triangle spans the step"
    # Of 19 x 29 quads, 19 lie on the step; a hole takes six triangles.
    assert len(shape.faces) == 2 * 19 * 28 - 6 and len(shape.points) == 20 * 30 - 1
    across = np.cross(*(shape.points[shape.faces[:, k]] - shape.points[shape.faces[:, 0]] for k in (1, 2)))
    assert (across[:, 2] < 0).all(), "every triangle looks at the camera"
    slope = np.linspace(1, 3, 20, dtype=np.float32)[:, None].repeat(30, 1)
    for unit in (0.01, 1, 100):  # a jump is a fraction, whatever the unit
        faces = solid.surface(unit * slope, slope > 0, solid.camera(60, None, 20, 30), jump=0.2).faces
        assert len(faces) == 1102
    for ratio, count in ((1.075, 2), (1.085, 0)):  # neighbours differ by 8 % at most
        z = np.array([[1.0, ratio], [1.0, ratio]], np.float32)
        assert len(solid.surface(z, z > 0, solid.camera(60, None, 2, 2)).faces) == count


def test_a_point_is_where_its_pixel_is_and_has_its_colour():
    z = np.random.default_rng(1).uniform(2, 2.05, (20, 30)).astype(np.float32)
    everywhere, lens = np.ones(z.shape, bool), solid.Lens(intrinsics=(25, 20, 12, 7)).of(Path("a.jpg"), 20, 30)
    (place,) = np.argwhere((np.mgrid[:20:3, :30:3][0] == 6) & (np.mgrid[:20:3, :30:3][1] == 21))
    number = place[0] * 10 + place[1]
    cloud = solid.cloud(z, everywhere, RGB, lens, stride=3)
    x, y = (21.5 - 12) / 25 * z[6, 21], (6.5 - 7) / 20 * z[6, 21]
    np.testing.assert_allclose(cloud.points[number], [x, y, z[6, 21]], rtol=1e-6)
    assert tuple(cloud.colors[number]) == tuple(RGB[6, 21]) and len(cloud.points) == 7 * 10
    shape = solid.surface(z, everywhere, lens, stride=3)
    np.testing.assert_allclose(shape.points[number], [x, y, z[6, 21]], rtol=1e-6)
    np.testing.assert_allclose(shape.at[number], [21.5 / 30, 6.5 / 20], rtol=1e-6)
    assert [solid.stride_for(*size) for size in ((10, 10), (600, 800), (4000, 6000))] == [1, 2, 8]


@pytest.mark.parametrize(
    ("kind", "values", "wanted", "said"),
    [
        (Kind.METRIC_DEPTH, [4.0, 0.0, -1.0, 2.0], [4, 2], b"metres"),
        (Kind.SCALE_DISPARITY, [0.5, 0.25, 0.0, 4.0], [2, 4, 0.25], b"no unit"),
        (Kind.AFFINE_DEPTH, [0.0, 5.0, 10.0, 2.5], [1, 2.5, 4, 1.75], b"at most 4 times"),
        (Kind.AFFINE_DISPARITY, [0.0, 5.0, 10.0, 2.5], [4, 1.6, 1, 16 / 7], b"at most 4 times"),
    ],
)
def test_distances_of_every_kind(kind, values, wanted, said):
    maps = torch.tensor(values).reshape(2, 2)
    z, usable = solid.distances(maps, maps < 9e9, kind, 4)
    np.testing.assert_allclose(z[usable], wanted, rtol=1e-6)
    lens = solid.camera(60, None, 2, 2)
    head = solid.encode("ply", maps, maps < 9e9, kind, RGB[:2, :2], lens, far=4, title="a").partition(b"end_header")[0]
    assert said.replace(b"at most 4 times", b"taken to be 4 times as far as the nearest") in head


def test_glb_is_gltf_and_ply_is_ply():
    z, valid = two_walls()
    lens = solid.camera(None, [[20, 0, 15], [0, 20, 10], [0, 0, 1]], 20, 30)
    data = solid.glb(solid.surface(z, valid, lens), RGB, "metres")
    magic, version, total, length, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, total, kind) == (b"glTF", 2, len(data), b"JSON") and length % 4 == 0
    scene, body = json.loads(data[20 : 20 + length]), data[28 + length :]
    place, _, faces = scene["accessors"]
    assert faces["componentType"] == 5125 and len(body) % 4 == 0 == scene["bufferViews"][3]["byteOffset"] % 4
    view = scene["bufferViews"][0]
    points = np.frombuffer(body, "<f4", 3 * place["count"], view["byteOffset"]).reshape(-1, 3)
    assert np.allclose(points.min(0), place["min"]) and np.allclose(points.max(0), place["max"])
    assert (points[:, 2] < 0).all() and points[0, 1] > 0, "y up, z backward"
    view = scene["bufferViews"][2]
    index = np.frombuffer(body, "<u4", faces["count"], view["byteOffset"])
    assert index.max() == place["count"] - 1 and len(body) == scene["buffers"][0]["byteLength"]
    view = scene["bufferViews"][3]
    assert Image.open(io.BytesIO(body[view["byteOffset"] :][: view["byteLength"]])).size == (30, 20)

    points = solid.cloud(z, valid, RGB, lens)
    head, _, rows = solid.ply(points, "a\nb").partition(b"end_header\n")
    assert b"property uchar red\nproperty uchar green\nproperty uchar blue\n" in head
    assert b"element vertex 599\n" in head and b"comment a b\n" in head and len(rows) == 15 * 599
    assert np.allclose(np.frombuffer(rows[:12], "<f4"), points.points[0]) and tuple(rows[12:15]) == tuple(RGB[0, 0])


def test_the_camera_is_told_or_read_or_assumed(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 28
    Image.fromarray(RGB).save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(RGB).save(tmp_path / "plain.jpg")
    lens = solid.Lens().of(tmp_path / "phone.jpg", 24, 36)
    assert (lens.fx, lens.fy, lens.cx, lens.cy) == pytest.approx(
        (28, 28, 18, 12)
    ) and "EXIF: 28 mm" in lens.origin  # as large as film: a pixel a millimetre
    assert "assumed" in solid.Lens().of(tmp_path / "plain.jpg", 24, 36).origin
    assert solid.Lens(fov=90).of(tmp_path / "phone.jpg", 24, 36).fx == pytest.approx(18)
    exif.get_ifd(0x8769)[0xA405] = 3  # no lens
    Image.fromarray(RGB).save(tmp_path / "broken.jpg", exif=exif)
    assert "assumed" in solid.Lens().of(tmp_path / "broken.jpg", 24, 36).origin


@pytest.mark.parametrize("focal", [18, 0.9])
def test_intrinsics_in_millimetres_or_parts_of_the_sides_are_said(tmp_path, focal):
    """As DepthAnything/Depth-Anything-V2#52 gives them: 18 of 6000 x 4000; MoGe's own are parts of the sides."""
    with pytest.raises(ValueError, match=r"see 1\d\d degrees of an image of 6000 x 4000: they are in its pixels"):
        solid.Lens(intrinsics=(focal, focal, 0.5, 0.5)).of(tmp_path / "a.jpg", 4000, 6000)
    for down, told in ((focal, r"1\d\d degrees"), (1e9, r"0.000229 degrees")):  # of that side, not of the other
        with pytest.raises(ValueError, match=f"intrinsics of 4000 and {re.escape(f'{down:g}')} pixels see {told}"):
            solid.camera(None, [[4000, 0, 3000], [0, down, 2000], [0, 0, 1]], 4000, 6000)


def test_predict_writes_them_and_a_page_that_asks_for_nothing(tmp_path):
    photo, out = tmp_path / "a <b>.png", tmp_path / "out"
    Image.fromarray(RGB).save(photo)
    assert call(Fake(), photo, out=out, formats=["ply", "glb", "view"]) == (1, 0, [])
    html = (out / "a <b>_view.html").read_text()
    assert "a &lt;b>" in html and not re.search(r"https?://|src=|import", html)
    facts = json.loads(re.search(r"const data = (.*);", html)[1])
    assert facts["count"] == 600 and facts["half"][0] == pytest.approx(np.tan(np.radians(30)))
    jobs = predict.survey([str(photo)], out=out).jobs
    with pytest.raises(ValueError, match="predictions with another camera"):
        predict.run(Fake(), jobs, out=out, formats=["ply"], report=silent, lens=solid.Lens(fov=90))
    assert predict.run(Fake(), jobs, out=out, formats=["npy"], report=silent).written == 1
    predict.run(Fake(), jobs, out=tmp_path / "far", formats=["ply"], report=silent, lens=solid.Lens(far=4))
    assert b"taken to be 4 times as far" in (tmp_path / "far" / "a <b>.ply").read_bytes()
    shoot(tmp_path / "v.mp4", 2)
    assert "a video has no ply" in call(Fake(), tmp_path / "v.mp4", out=out, formats=["ply"])[2][0]


def test_a_page_holds_every_point_in_its_place(monkeypatch):
    monkeypatch.setattr(solid, "MAX_PAGE_POINTS", 100)
    values, lens = torch.linspace(2, 5, 600).reshape(20, 30), solid.Camera(15, 30, 15, 10)
    given = (values, values > 0, Kind.METRIC_DEPTH, RGB, lens)
    assert b"element vertex 600\n" in solid.encode("ply", *given, far=10, title="a")
    page = solid.encode("view", *given, far=10, title="a").decode()
    facts = json.loads(re.search(r"const data = (.*);", page)[1])
    wanted = solid.cloud(values.numpy(), values.numpy() > 0, RGB, lens, stride=3)
    codes = np.frombuffer(base64.b64decode(facts["xyz"]), "<u2").reshape(-1, 3)
    np.testing.assert_allclose(facts["low"] + codes * np.array(facts["step"]), wanted.points, atol=1e-4)
    assert codes.max() == 65535 and base64.b64decode(facts["rgb"]) == wanted.colors.tobytes()
    assert facts["pitch"] == pytest.approx(3 / 15) and facts["half"] == pytest.approx([1, 1 / 3])
    assert facts["middle"] == pytest.approx(np.median(wanted.points[:, 2]))


def test_a_page_of_a_photo_whose_name_is_not_utf8(tmp_path):
    photo = tmp_path / "caf\udce9.png"
    try:
        with photo.open("wb") as file:
            Image.fromarray(RGB).save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert call(Fake(), photo, out=tmp_path / "out", formats=["view"]) == (1, 0, [])
    assert r"caf\udce9.png" in (tmp_path / "out" / "caf\udce9_view.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fov", "60"], "--fov: only for 3D files"),
        (["--write", "ply", "--fov", "190"], "between 0.01 and 179"),
        (["--write", "ply", "--fov", "5e-324"], "between 0.01 and 179"),
        (["--write", "ply", "--fov", "nan"], "between 0.01 and 179"),
        (["--write", "ply", "--far", "0.5"], "--far must be above 1"),
        (["--write", "ply", "--far", "inf"], "--far must be above 1"),
        (["--write", "glb", "--intrinsics", "9", "nan", "0", "0"], "finite numbers of pixels"),
        (["--write", "glb", "--fov", "60", "--intrinsics", "1", "1", "0", "0"], "keep one"),
    ],
)
def test_a_camera_that_cannot_be_is_told(tmp_path, capsys, words, told):
    grey(tmp_path / "a.png", 9)
    assert main(["predict", str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "o").exists()
