"""Maps in every format that they are stored in, and the names that they go by."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from distill.core.depth import Kind
from distill.data.maps import BadMapError, find_map, read_map, stored_stems
from distill.data.pairs import read_pairs

MAP = np.linspace(1, 5, 12, dtype=np.float32).reshape(3, 4)


def exr(path, value):
    openexr = pytest.importorskip("OpenEXR")
    openexr.File({"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}, {"Z": value}).write(str(path))


def hdf5(path, value):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["depth"] = value


def tiff(path, value):
    pytest.importorskip("imagecodecs")
    import imagecodecs

    path.write_bytes(imagecodecs.tiff_encode(value))


def png16(path, value):
    text = PngImagePlugin.PngInfo()
    for key, word in {"kind": "affine_disparity", "low": repr(1.0), "high": repr(5.0)}.items():
        text.add_text(key, word)
    Image.fromarray(np.round((value - 1) / 4 * 65535).astype(np.uint16)).save(path, pnginfo=text)


WRITERS = {
    "A.NPY": lambda path, value: path.open("wb").close() or np.save(path.open("wb"), value),
    "a.npz": lambda path, value: np.savez(path, depth=value, focal=np.float32(3)),
    "one.npz": lambda path, value: np.savez(path, value),
    "a.tif": tiff,
    "half.tif": lambda path, value: tiff(path, value.astype(np.float16)),
    "a.pfm": lambda path, value: path.write_bytes(b"Pf\n4 3\n-1.0\n" + value[::-1].tobytes()),
    "a.dpt": lambda path, value: path.write_bytes(struct.pack("<fii", 202021.25, 4, 3) + value.tobytes()),
    "a.exr": exr,
    "a.h5": hdf5,
    "a.png": png16,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path, name):
    WRITERS[name](tmp_path / name, MAP)
    assert np.abs(read_map(tmp_path / name).astype(float) - MAP).max() < (2e-3 if name == "half.tif" else 1e-4)


def test_a_grey_palette_means_its_greys_and_colours_are_no_map(tmp_path):
    grey = Image.fromarray(np.array([[10, 200], [90, 10]], np.uint8))
    grey.quantize(4).save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P" and read_map(tmp_path / "p.png").tolist() == [[10, 200], [90, 10]]
    for mode in ("RGB", "P"):
        colours = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        colours.convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "c.png")
        with pytest.raises(BadMapError, match="a picture of a map|a picture, not a map"):
            read_map(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"not a readable \.npy \(empty\); read are \.npy, \.npz"),
        (bytes(99), "of no known format"),
        (b"PK\3\4" + bytes(90), r"not a readable \.npz"),
        (b"\x93NUMPY\1\0\xff\xff{", r"not a readable \.npy"),
        (b"PIEH" + struct.pack("<ii", 1 << 30, 4), "not a whole .dpt"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "JPEG"),
    ],
)
def test_what_is_no_map_says_what_is(tmp_path, data, reason):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadMapError, match=reason):
        read_map(tmp_path / "a.npy")


def test_several_arrays_need_a_name(tmp_path):
    np.savez(tmp_path / "two.npz", one=MAP, two=MAP)
    with pytest.raises(BadMapError, match="one map is needed, or one that is called depth"):
        read_map(tmp_path / "two.npz")


@pytest.mark.parametrize("stored", ["x/rgb_1.npy", "x/rgb_1.png.npy", "x/pred_1.npy", "x/1_pred.npz", "x/rgb_1.NPY"])
def test_names(tmp_path, stored):
    (tmp_path / "x").mkdir()
    (tmp_path / stored).write_bytes(b"1")
    assert find_map(tmp_path, ["x/rgb_1.png"]) == tmp_path / stored


def test_the_most_particular_name_wins(tmp_path):
    assert stored_stems("a.jpg")[:3] == ["a.jpg", "a_jpg", "a"] and find_map(tmp_path, ["a.jpg"]) is None
    for name in ("a.npy", "a_jpg.npy"):
        (tmp_path / name).write_bytes(b"1")
    assert find_map(tmp_path, ["a.jpg"]) == tmp_path / "a_jpg.npy"


# --- in tables of pairs -----------------------------------------------------------------------------------------------


def pair(folder, photo: Image.Image, depth: np.ndarray, *, scale="1", encoding="utf-8", **options):
    photo.save(folder / "a.jpg", **options)
    np.save(folder / "d.npy", depth.astype(np.float32))
    text = f"name\trgb\tdepth\tscale_to_metres\nx\ta.jpg\td.npy\t{scale}\n"
    (folder / "INDEX.tsv").write_bytes(text.encode(encoding))
    return read_pairs(folder)[0]


def test_a_portrait_meets_its_truth_upright(tmp_path):
    lying = Image.fromarray(np.repeat(np.arange(0, 240, 6, dtype=np.uint8)[None], 30, 0)).convert("RGB")  # 40 x 30
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.arange(1, 41)[None].repeat(30, 0)
    upright = np.rot90(stored, -1)
    for truth in (upright, stored):
        one = pair(tmp_path, lying, truth, exif=exif, quality=95)
        values = one.truth().values[0]
        assert one.rgb().shape == (3, 40, 30) and values.shape == (40, 30)
        assert values[:, 0].tolist() == upright[:, 0].tolist()
    with pytest.raises(ValueError, match="another aspect than its photograph, 30 x 40"):
        pair(tmp_path, lying, np.ones((40, 40)), exif=exif).truth()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_of_a_spreadsheet_are_read(tmp_path, encoding):
    assert pair(tmp_path, Image.new("RGB", (4, 3)), MAP, encoding=encoding).name == "x"


@pytest.mark.parametrize(
    ("scale", "metres"), [("1/1000", 0.001), ("mm", 0.001), ("1e-3 m", 0.001), ("0.5 cm", 0.005), ("unknown", None)]
)
def test_scales_are_understood(tmp_path, scale, metres):
    one = pair(tmp_path, Image.new("RGB", (4, 3)), MAP, scale=scale)
    assert one.kind == (Kind.SCALE_DEPTH if metres is None else Kind.METRIC_DEPTH)
    assert one.scale == pytest.approx(metres or 1.0)


@pytest.mark.parametrize("scale", ["0,001", "1.000,5", "-", "1/0", "3 feet"])
def test_what_looks_like_a_number_and_is_none_is_an_error(tmp_path, scale):
    with pytest.raises(ValueError, match="is no number"):
        pair(tmp_path, Image.new("RGB", (4, 3)), MAP, scale=scale)
