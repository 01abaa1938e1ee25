"""Maps in every format that they are stored in, and the names that they go by."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

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
    "a.bin": lambda path, value: path.write_bytes(b"4&3&1&" + value.astype("<f4").tobytes()),
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
        (b"", r"not a readable \.npy \(empty\); supported: \.npy, \.npz"),
        (bytes(99), "unknown format: store numbers without a header"),
        (b"PK\3\4" + bytes(90), r"not a readable \.npz"),
        (b"\x93NUMPY\1\0\xff\xff{", r"not a readable \.npy"),
        (b"PIEH" + struct.pack("<ii", 1 << 30, 4), "not a whole .dpt"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "JPEG, which changes the numbers"),
        (b"<!DOCTYPE html><html>", r"\(text, beginning '<!DOCTYPE html><html>'\)"),
        (b"PIEH" + struct.pack("<ii", 4, 3) + bytes(96), "optical flow"),
        (b"\x80\4\x95" + bytes(30), "a Python pickle"),
    ],
)
def test_what_is_no_map_says_what_is(tmp_path, data, reason):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadMapError, match=reason):
        read_map(tmp_path / "a.npy")


def header(kind, *more):
    return b"\n".join([kind, *more])


def pgm(top, values):
    return header(b"P5", b"4 3", b"%d\n" % top) + values.astype(">u2" if top > 255 else "u1").tobytes()


CODES = np.arange(1, 13).reshape(3, 4)


@pytest.mark.parametrize(
    "data",
    [
        *(pgm(top, CODES) for top in (100, 255, 4095, 65535)),
        header(b"P2", b"# by hand", b"4 3", b"4095", *(b" ".join(b"%d" % v for v in row) for row in CODES)),
        *(
            header(b"Pf", b"4 3", b"%s\n" % s) + CODES[::-1].astype(d).tobytes()
            for s, d in ((b"-3", "<f4"), (b"1", ">f4"))
        ),
        b"Pf\r\n4 3\r\n-1.0\r\n" + CODES[::-1].astype("<f4").tobytes(),
        header(b"PF", b"4 3", b"-1\n") + np.dstack([CODES] * 3)[::-1].astype("<f4").tobytes(),
    ],
    ids=["100", "255", "4095", "65535", "P2", "little", "big", "crlf", "grey in three"],
)
def test_numbers_stand_as_they_are_whatever_the_header_promises(tmp_path, data):
    (tmp_path / "a.pgm").write_bytes(data)
    assert read_map(tmp_path / "a.pgm").tolist() == CODES.tolist()
    (tmp_path / "a.pgm").write_bytes(data[:-3])
    with pytest.raises(BadMapError, match="not a whole"):
        read_map(tmp_path / "a.pgm")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_map_in_three_equal_channels_is_its_grey(tmp_path, dtype):
    full = np.iinfo(dtype).max
    for channels in (3, 4):
        picture = np.dstack([CODES.astype(dtype) * 20] * 3 + [np.full((3, 4), full, dtype)] * (channels - 3))
        cv2.imwrite(str(tmp_path / "a.png"), picture)
        assert read_map(tmp_path / "a.png").tolist() == (CODES * 20).tolist()
    picture[0, 0, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    with pytest.raises(BadMapError, match="store invalid pixels as 0"):
        read_map(tmp_path / "a.png")


def test_what_lies_beside_a_map_is_no_map(tmp_path):
    camera, big = np.eye(3), np.ones((8, 9), np.float32)
    np.savez(tmp_path / "a.npz", predicted_depth=big[None], K=camera, notes=np.array({"a": 1}, object))
    assert read_map(tmp_path / "a.npz").shape == (8, 9)
    np.savez(tmp_path / "b.npz", depth=np.stack([big, big]), K=camera)
    with pytest.raises(BadMapError, match=r"holds depth \(2, 8, 9\), K \(3, 3\)"):
        read_map(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.array([big], object))
    with pytest.raises(BadMapError, match=r"not a readable .npy .pickled Python objects, which are not loaded"):
        read_map(tmp_path / "c.npy")
    Image.fromarray(big).save(tmp_path / "d.tif", save_all=True, append_images=[Image.fromarray(big)])
    with pytest.raises(BadMapError, match="holds 2 pictures of one size"):
        read_map(tmp_path / "d.tif")
    Image.fromarray(big[:4, :4]).save(tmp_path / "e.tif", save_all=True, append_images=[Image.fromarray(big)])
    assert read_map(tmp_path / "e.tif").shape == (8, 9), "the first is a thumbnail"


def test_several_arrays_need_a_name(tmp_path):
    np.savez(tmp_path / "two.npz", one=MAP, two=MAP)
    with pytest.raises(BadMapError, match="one map is needed, or one named depth"):
        read_map(tmp_path / "two.npz")


@pytest.mark.parametrize(
    "stored",
    [
        *("x/rgb_1.npy", "x/rgb_1.png.npy", "x/pred_1.npy", "x/1_pred.npz", "x/rgb_1.NPY", "x/rgb_1_depth.npy"),
        *("x/rgb_1_raw_depth_meter.npy", "x/rgb_1/depth.exr"),  # of Depth Anything V2's and MoGe's own scripts
    ],
)
def test_names(tmp_path, stored):
    (tmp_path / stored).parent.mkdir(parents=True)
    (tmp_path / stored).write_bytes(b"1")
    assert find_map(tmp_path, ["x/rgb_1.png"]) == tmp_path / stored


def test_accents_in_two_characters_are_the_same_name(tmp_path):
    for table, disk in (("\u00e9.png", "e\u0301.npy"), ("e\u0301.png", "\u00e9.npy")):
        (tmp_path / disk).write_bytes(b"1")
        found = find_map(tmp_path, [table])
        assert found == tmp_path / disk and found.exists()
        found.unlink()


def test_the_most_particular_name_wins(tmp_path):
    assert stored_stems("a.jpg")[:3] == ["a.jpg", "a_jpg", "a"] and find_map(tmp_path, ["a.jpg"]) is None
    for stem in ("a", *(f"{i}e\u0301" for i in range(16))):
        for name in (f"{stem}.npy", f"{stem}_jpg.npy", f"{stem}_depth.npy"):
            (tmp_path / name).write_bytes(b"1")
    assert find_map(tmp_path, ["a.jpg"]) == tmp_path / "a_jpg.npy"
    composed = [find_map(tmp_path, [f"{i}\u00e9.jpg"]) for i in range(16)]
    assert composed == [tmp_path / f"{i}e\u0301_jpg.npy" for i in range(16)], "also among names of a Mac"


# --- in tables of pairs -----------------------------------------------------------------------------------------------


def pair(folder, photo: Image.Image, depth: np.ndarray, *, scale="1", encoding="utf-8", **options):
    photo.save(folder / "a.jpg", **options)
    np.save(folder / "d.npy", depth.astype(np.float32))
    text = f"name\trgb\tdepth\tscale_to_metres\nx\ta.jpg\td.npy\t{scale}\n"
    (folder / "INDEX.tsv").write_bytes(text.encode(encoding))
    return read_pairs(folder)[0]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_portrait_meets_its_truth_upright(tmp_path, orientation):
    lying = Image.fromarray(np.repeat(np.arange(0, 240, 6, dtype=np.uint8)[None], 30, 0)).convert("RGB")  # 40 x 30
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.arange(1, 41) + 100 * np.arange(30)[:, None]
    upright = {5: stored.T, 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}[orientation]
    for truth in (upright, stored):
        one = pair(tmp_path, lying, truth, exif=exif, quality=95)
        values = one.truth().values[0]
        assert one.rgb().shape == (3, 40, 30)
        assert values.tolist() == upright.tolist()
    with pytest.raises(ValueError, match="differs in aspect ratio from its photograph, 30 x 40"):
        pair(tmp_path, lying, np.ones((40, 40)), exif=exif).truth()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_of_a_spreadsheet_are_read(tmp_path, encoding):
    assert pair(tmp_path, Image.new("RGB", (4, 3)), MAP, encoding=encoding).name == "x"


@pytest.mark.parametrize(
    ("scale", "metres"),
    [("1/1000", 0.001), ("mm", 0.001), ("1e-3 m", 0.001), ("0.5 cm", 0.005), ("Millimeters", 0.001), ("unknown", None)],
)
def test_scales_are_understood(tmp_path, scale, metres):
    one = pair(tmp_path, Image.new("RGB", (4, 3)), MAP, scale=scale)
    assert one.kind == (Kind.SCALE_DEPTH if metres is None else Kind.METRIC_DEPTH)
    assert one.scale == pytest.approx(metres or 1.0)


@pytest.mark.parametrize(
    "scale", ["0,001", "1.000,5", "-", "1/0", "3 feet", "ft", "/1000", "depth/1000", "mm (Kinect)"]
)
def test_what_looks_like_a_number_and_is_none_is_an_error(tmp_path, scale):
    with pytest.raises(ValueError, match="is not a number"):
        pair(tmp_path, Image.new("RGB", (4, 3)), MAP, scale=scale)


@pytest.mark.parametrize(
    ("invalid", "usable"),
    [
        ("0 and 65535", [60000, 70000 * 0]),
        ("1e10", [60000, 70000]),
        (">=65000", [60000]),
        ("<=0", [60000, 70000]),
        ("\u2265 65000", [60000]),
    ],
)
def test_what_is_invalid(tmp_path, invalid, usable):
    np.save(tmp_path / "d.npy", np.array([[60000, 70000, 1e10, 0]], np.float32))
    Image.new("RGB", (4, 1)).save(tmp_path / "a.png")
    (tmp_path / "INDEX.tsv").write_text(f"name\trgb\tdepth\tinvalid\nx\ta.png\td.npy\t{invalid}\n")
    truth = read_pairs(tmp_path)[0].truth()
    assert truth.values[truth.valid].tolist() == [value for value in usable if value]


@pytest.mark.parametrize("comma", [",", ";"])
def test_a_table_as_people_write_it(tmp_path, comma):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "sub" / "e\u0301.png")
    np.save(tmp_path / "sub" / "d.npy", MAP)
    rows = ["Name,RGB,Depth,kind,focal", "# old,x,y,,", 'x,"sub\\\u00e9.png",sub\\d.npy,Disparity,nan', ",,,,"]
    (tmp_path / "t.csv").write_text("\r\n".join(rows).replace(",", comma), encoding="utf-8")
    (one,) = read_pairs(tmp_path / "t.csv")
    assert one.rgb().shape == (3, 3, 4) and one.truth().kind == Kind.AFFINE_DISPARITY and not one.focal
    (tmp_path / "t.csv").write_text("name,image,depth\n")
    with pytest.raises(ValueError, match='no column "rgb"; it has name, image, depth'):
        read_pairs(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("name,rgb,depth,invalid\nx,a,b,<100\n")
    with pytest.raises(ValueError, match="'<100': bounds must be >=NUMBER"):
        read_pairs(tmp_path / "t.csv")


def test_a_mask_is_no_map(tmp_path):
    np.save(tmp_path / "m.npy", MAP > 2)
    Image.fromarray(MAP > 2).save(tmp_path / "m.png")
    for name in ("m.npy", "m.png"):
        with pytest.raises(BadMapError, match="a mask, not a map"):
            read_map(tmp_path / name)


@pytest.mark.parametrize(("kind", "said"), [("u2", "65535"), ("u1", "255\0"), ("f4", "-3.4028234663852886e+38")])
def test_where_a_tiff_says_that_there_is_no_data_there_is_none(tmp_path, kind, said):
    values = np.arange(1, 13).reshape(3, 4).astype(kind)
    values[0, 0] = np.float32(said.strip("\0"))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[42113] = said
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
    read = read_map(tmp_path / "a.tif")
    assert np.isnan(read[0, 0]) and read.ravel()[1:].tolist() == list(range(2, 13))
    tifffile = pytest.importorskip("tifffile")
    for order, big in (("<", True), (">", True), (">", False)):
        tag = (42113, "s", 0, said.strip("\0"), True)
        tifffile.imwrite(tmp_path / "b.tif", values, byteorder=order, bigtiff=big, extratags=[tag])
        np.testing.assert_array_equal(read_map(tmp_path / "b.tif"), read, err_msg=f"{order} {big}")


@pytest.mark.parametrize("note", ["_FillValue", "missing_value"])
def test_what_nothing_was_written_to_in_hdf5_is_nothing(tmp_path, note):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("depth", data=CODES.astype("i2")).attrs[note] = np.int16(5)
        file["note"] = h5py.Empty("f4")  # a data set without an array
    read = read_map(tmp_path / "a.h5")
    assert np.isnan(read[1, 0]) and np.isfinite(read).sum() == 11


def test_a_renderers_background_is_no_depth(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    for background in (1e10, np.finfo(np.float32).max):
        np.save(tmp_path / "a.npy", np.where(CODES == 5, background, CODES).astype(np.float32))
        (tmp_path / "INDEX.tsv").write_text("name\trgb\tdepth\tscale_to_metres\na\ta.png\ta.npy\t1\n")
        truth = read_pairs(tmp_path)[0].truth()
        assert not truth.valid[0, 1, 0] and truth.valid.sum() == 11 and truth.values.max() == 12
