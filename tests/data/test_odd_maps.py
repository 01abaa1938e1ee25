"""Stored maps as other tools write them, with the values that they mean."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from distill.core.depth import Kind
from distill.data import hdf5s, packing
from distill.data.maps import BadMapError, read_map
from distill.data.pairs import read_pairs
from distill.eval.stored import BadPredictionError, read_prediction
from distill.teachers import stored

CODES = np.arange(1, 13).reshape(3, 4)
MAP = CODES.astype(np.float32)
BIG = np.arange(1, 49, dtype=np.float32).reshape(6, 8)


def test_of_depth_and_disparity_in_one_file_the_one_that_is_meant_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", depth=BIG, disparity=1 / BIG)
    assert read_map(tmp_path / "a.npz").tolist() == BIG.tolist()
    assert read_map(tmp_path / "a.npz", "disparity").tolist() == (1 / BIG).tolist()
    for kind, meant in ((Kind.AFFINE_DISPARITY, 1 / BIG), (Kind.METRIC_DEPTH, BIG), (None, BIG)):
        assert read_prediction(tmp_path / "a.npz", None, kind)[0].tolist() == meant.tolist()
    for kind, meant in (("affine_disparity", 1 / BIG), ("metric_depth", BIG)):
        teacher = stored.Teacher.load(str(tmp_path), kind=kind)
        assert teacher.predict(torch.zeros(1, 3, 6, 8), keys=["a"]).values[0].tolist() == meant.tolist()
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    row = "name\trgb\tdepth\tkind\tscale_to_metres\nx\ta.png\ta.npz\t{}\t{}\n"
    for kind, scale, meant in (("disparity", "unknown", 1 / BIG), ("depth", "1", BIG), ("", "2*3/disp", 6 * BIG)):
        (tmp_path / "INDEX.tsv").write_text(row.format(kind, scale))
        np.testing.assert_allclose(read_pairs(tmp_path)[0].truth().values[0], meant, rtol=1e-6)


def test_depths_of_several_groups_are_not_one_map(tmp_path):
    np.savez(tmp_path / "a.npz", **{"left/depth": BIG, "right/depth": BIG * 2})
    with pytest.raises(BadMapError, match="holds left/depth, right/depth: one map is needed"):
        read_map(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **{"small/depth": BIG[:4, :4], "depth": BIG})
    assert read_map(tmp_path / "a.npz").shape == (6, 8)


def test_what_is_no_array_of_numbers_is_told_in_few_words(tmp_path):
    sparse, scipy = pytest.importorskip("scipy.sparse"), pytest.importorskip("scipy.io")
    for value, said in (
        ({"s": {"depth": BIG, "K": BIG}}, r"s \(a struct of depth, K: save its field\)"),
        ({"depth": sparse.csc_matrix(BIG)}, r"depth \(a sparse matrix\)"),
        ({"depth": np.array([BIG, BIG[:2]], object)}, r"depth \(cells or objects\)"),
        ({"mask": BIG > 2}, r"mask \(only true and false\)"),
    ):
        scipy.savemat(tmp_path / "a.mat", value)
        with pytest.raises(BadMapError, match=f"holds {said}; one map is needed"):
            read_map(tmp_path / "a.mat")
    scipy.savemat(tmp_path / "a.mat", {"mask": BIG > 2, "z": BIG})
    assert read_map(tmp_path / "a.mat").tolist() == BIG.tolist(), "a mask is no second map"


@pytest.mark.parametrize("dtype", ["f8", "f4", "i4", "i2", "u2", "u1"])
def test_version_4_of_matlab_in_every_type(tmp_path, dtype):
    pytest.importorskip("scipy.io").savemat(tmp_path / "a.mat", {"depth": BIG.astype(dtype)}, format="4")
    assert read_map(tmp_path / "a.mat").tolist() == BIG.tolist()


def test_a_logical_of_matlab_7_3_is_a_mask(tmp_path):
    with pytest.importorskip("h5py").File(tmp_path / "a.mat", "w") as file:
        file.create_dataset("m", data=(BIG > 2).T.astype("u1")).attrs["MATLAB_class"] = np.bytes_("logical")
        file.create_dataset("z", data=BIG.T).attrs["MATLAB_class"] = np.bytes_("single")
    assert read_map(tmp_path / "a.mat").tolist() == BIG.tolist()


def test_a_large_mask_is_no_map_either(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2100, 2000), bool))
    with pytest.raises(BadMapError, match="a mask, not a map"):
        read_map(tmp_path / "a.npy")


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_are_not_stretched(tmp_path, bits):
    values = (np.arange(32).reshape(4, 8) % 2**bits).astype(np.uint8)
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel()).tobytes() for row in values]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b""))
    assert read_map(tmp_path / "a.png").tolist() == values.tolist()


@pytest.mark.parametrize("top", [255, 65535])
def test_a_header_of_windows_is_not_a_pixel(tmp_path, top):
    pixels = CODES.astype(">u2" if top > 255 else "u1").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5\r\n4 3\r\n%d\r\n" % top + pixels)
    assert read_map(tmp_path / "a.pgm").tolist() == CODES.tolist()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"Pf\n4 3\n0\n" + MAP.tobytes(), "its scale is 0"),
        (b"Pf\n4 3\n-1\n" + CODES.astype(float).tobytes(), "8 bytes per number"),
        (b"P5\n4 3\n70000\n" + CODES.astype("u2").tobytes(), "exceeds 16 bits"),
    ],
)
def test_headers_that_pixels_contradict(tmp_path, data, reason):
    (tmp_path / "a.pfm").write_bytes(data)
    with pytest.raises(BadMapError, match=reason):
        read_map(tmp_path / "a.pfm")


def exr(path, *parts, **header):
    openexr = pytest.importorskip("OpenEXR")
    head = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage, **header}
    made = [openexr.Part({**head, "name": f"p{i}"}, channels) for i, channels in enumerate(parts)]
    openexr.File(made).write(str(path))


PICTURE = {name: BIG * (i + 2) for i, name in enumerate("RGBA")}


@pytest.mark.parametrize(
    "parts",
    [
        [PICTURE, {"Z": BIG}],
        [{"Z": BIG}, PICTURE],
        [{**{f"V.Combined.{name}": value for name, value in PICTURE.items()}, "V.Depth.Z": BIG, "V.Mist.Z": BIG * 9}],
        [{"V.Depth.Z": BIG, **{f"V.Normal.{axis}": BIG * 7 for axis in "XYZ"}}],
        [{"Z": BIG, "UV.U": BIG * 3, "UV.V": BIG * 5, "Flow.X": BIG * 3, "Flow.Y": BIG * 6}],
    ],
    ids=["second part", "first part", "mist", "normals", "vectors"],
)
def test_the_depth_of_a_renderers_exr_is_found_in_any_part_and_layer(tmp_path, parts):
    exr(tmp_path / "a.exr", *parts)
    assert read_map(tmp_path / "a.exr").tolist() == BIG.tolist()


@pytest.mark.parametrize("axes", ["XY", "UV", "XYZ"])
def test_a_vector_is_no_map(tmp_path, axes):
    exr(tmp_path / "a.exr", {f"Flow.{axis}": BIG * i for i, axis in enumerate(axes)})
    with pytest.raises(BadMapError, match="a picture, not a map"):
        read_map(tmp_path / "a.exr")


def test_the_pixels_of_an_exr_lie_where_its_windows_say(tmp_path):
    def window(*corners):
        return tuple(np.array(corner, np.int32) for corner in corners)

    cropped = {"dataWindow": window((2, 1), (9, 6)), "displayWindow": window((0, 0), (15, 11))}
    exr(tmp_path / "a.exr", {"Z": BIG}, **cropped)
    read = read_map(tmp_path / "a.exr")
    assert read.shape == (12, 16) and read[1:7, 2:10].tolist() == BIG.tolist() and np.isfinite(read).sum() == 48
    wider = {"dataWindow": window((-1, -2), (6, 3)), "displayWindow": window((0, 0), (5, 3))}
    exr(tmp_path / "a.exr", {"Z": BIG}, **wider)
    assert read_map(tmp_path / "a.exr").tolist() == BIG[2:, 1:7].tolist()


def test_what_lies_in_a_zip_is_not_quoted(tmp_path):
    data = io.BytesIO()
    np.savez(data, readme=np.zeros(3))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("photo.jpg", bytes(5000))
    (tmp_path / "a.npz").write_bytes(data.getvalue())
    with pytest.raises(BadMapError, match=r"holds readme \(3,\), photo.jpg \(no array\); one map is needed"):
        read_map(tmp_path / "a.npz")


def hdf5_with(path, **notes):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.create_dataset("depth", data=CODES.astype(np.uint16)).attrs.update(notes)


def gdal_with(path, items):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[42112] = f"<GDALMetadata>{items}</GDALMetadata>"
    Image.fromarray(CODES.astype(np.uint16)).save(path, tiffinfo=tags)


SCALE = '<Item name="SCALE" sample="0" role="scale">0.001</Item>'
OFFSET = '<Item name="OFFSET" sample="0" role="offset">0.5</Item>'


def test_a_scale_that_a_file_declares_is_applied_by_its_reader_or_refused(tmp_path):
    hdf5_with(tmp_path / "a.h5", scale_factor=0.001, add_offset=0.0)
    gdal_with(tmp_path / "a.tif", SCALE)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    for name in ("a.h5", "a.tif"):
        with pytest.raises(BadMapError, match="mean stored x 0.001 by its own .* 0.001 as scale_to_metres"):
            read_map(tmp_path / name)
        assert read_map(tmp_path / name, scale=0.001).tolist() == CODES.tolist()
        assert type(read_map(tmp_path / name, scale=None)) is np.ndarray
        with pytest.raises(BadPredictionError, match="stored x 0.001"):
            read_prediction(tmp_path / name, None, Kind.METRIC_DEPTH)
        assert read_prediction(tmp_path / name, None, Kind.AFFINE_DEPTH)[0].tolist() == MAP.tolist()
        for scale, fits in (("1", False), ("mm", True), ("unknown", True)):
            (tmp_path / "INDEX.tsv").write_text(f"name\trgb\tdepth\tscale_to_metres\nx\ta.png\t{name}\t{scale}\n")
            if fits:
                assert read_pairs(tmp_path)[0].truth().valid.all()
                continue
            with pytest.raises(OSError, match=f"{name}: not a readable depth map .its numbers mean stored x 0.001"):
                read_pairs(tmp_path)[0].truth()
    hdf5_with(tmp_path / "a.h5", scale_factor=1.0, add_offset=-2.0)
    gdal_with(tmp_path / "a.tif", OFFSET)
    for name, rule in (("a.h5", "stored x 1 - 2"), ("a.tif", r"stored x 1 \+ 0.5")):
        with pytest.raises(BadMapError, match=f"mean {rule} by its own declaration, which is not applied: store that"):
            read_map(tmp_path / name, scale=None)
    hdf5_with(tmp_path / "a.h5", scale_factor=1.0, add_offset=0.0, units="m")
    gdal_with(tmp_path / "a.tif", SCALE.replace('"0"', '"1"'))
    assert read_map(tmp_path / "a.h5").tolist() == read_map(tmp_path / "a.tif").tolist() == CODES.tolist()


UNIT = '<Item name="UNITTYPE" sample="0" role="unittype">cm</Item>'


def test_a_unit_that_a_file_declares_is_a_scale(tmp_path):
    hdf5_with(tmp_path / "a.h5", units="Centimeters")
    gdal_with(tmp_path / "a.tif", UNIT)
    for name in ("a.h5", "a.tif"):
        with pytest.raises(BadMapError, match=r"stored x 0.01 .it is in (cm|Centimeters). by its own .* 0.01 as scale"):
            read_map(tmp_path / name)
        assert read_map(tmp_path / name, scale=0.01).tolist() == CODES.tolist()
        assert read_map(tmp_path / name, scale=None).tolist() == CODES.tolist()
    hdf5_with(tmp_path / "a.h5", units=np.bytes_("mm"), scale_factor=0.25)
    gdal_with(tmp_path / "a.tif", UNIT.replace("cm", "mm") + SCALE.replace("0.001", "0.25"))
    for name in ("a.h5", "a.tif"):
        assert read_map(tmp_path / name, scale=0.00025).tolist() == CODES.tolist()
        with pytest.raises(BadMapError, match="stored x 0.00025"):
            read_map(tmp_path / name, scale=0.25)
    for unit in ("m", "1", "pixel", 7):
        hdf5_with(tmp_path / "a.h5", units=unit)
        assert read_map(tmp_path / "a.h5").tolist() == CODES.tolist()


@pytest.mark.parametrize(
    ("notes", "valid"),
    [
        ({"valid_range": np.array([3, 10], np.uint16)}, range(3, 11)),
        ({"valid_min": np.uint16(3)}, range(3, 13)),
        ({"valid_max": 10, "missing_value": np.array([4, 5])}, [1, 2, 3, *range(6, 11)]),
        ({"valid_range": np.array([0.003, 0.0105]), "scale_factor": 0.001}, range(3, 11)),  # of what is meant
        ({"valid_range": np.array([3, 10]), "scale_factor": 0.001}, range(3, 11)),  # of what is stored
        ({"valid_range": "3 to 10", "valid_max": "ten"}, range(1, 13)),
    ],
)
def test_what_netcdf_declares_out_of_range_is_invalid(tmp_path, notes, valid):
    hdf5_with(tmp_path / "a.nc", **notes)
    read = read_map(tmp_path / "a.nc", scale=None)
    assert read[np.isfinite(read)].tolist() == list(valid)
    assert (read.dtype == np.uint16) == (len(valid) == 12)


def test_the_ends_of_a_range_are_within_it(tmp_path):
    with pytest.importorskip("h5py").File(tmp_path / "a.nc", "w") as file:
        file["depth"] = MAP / 10
        file["depth"].attrs["valid_range"] = np.array([0.7, 1.1])  # float64: within what float32 makes of them
    assert np.isfinite(read_map(tmp_path / "a.nc")).sum() == 5


def test_unsigned_integers_that_netcdf_stores_as_signed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file["depth"] = (CODES * 5000).astype(np.uint16).view(np.int16)
        file["depth"].attrs["_Unsigned"] = "true"
    assert read_map(tmp_path / "a.nc").tolist() == (CODES * 5000).tolist()
    with h5py.File(tmp_path / "signed.nc", "w") as file:
        file["depth"] = CODES.astype(np.int16) - 3
    assert read_map(tmp_path / "signed.nc").tolist() == (CODES.astype(int) - 3).tolist()
    with h5py.File(tmp_path / "a.nc", "a") as file:  # signed in the file, like the values: 60000 and 1 to 55000
        file["depth"].attrs["_FillValue"] = np.int16(-5536)
        file["depth"].attrs["valid_range"] = np.array([1, -10536], np.int16)
    assert np.isnan(read_map(tmp_path / "a.nc")).ravel().tolist() == [False] * 11 + [True]


def test_a_filter_of_hdf5_that_is_not_installed_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((3, 4))
        properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (0,))
        kind, space = h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3, 4))
        h5py.h5d.create(file.id, b"depth", kind, space, properties).write_direct_chunk((0, 0), bytes(20))
    with pytest.raises(BadMapError, match="depth is compressed with HDF5's filter 32001, which is not installed"):
        read_map(tmp_path / "a.h5")


def pages(path, *with_kinds):
    with TiffImagePlugin.AppendingTiffWriter(str(path), True) as file:
        for image, kind in with_kinds:
            image.save(file, format="TIFF", tiffinfo={254: kind})
            file.newFrame()


def test_a_mask_within_a_tiff_says_what_is_valid(tmp_path):
    whole, mask = Image.fromarray(MAP), Image.fromarray(CODES > 3)
    pages(tmp_path / "a.tif", (whole, 0), (mask, 4), (mask.resize((2, 2)), 5))
    read = read_map(tmp_path / "a.tif")
    assert np.isnan(read.ravel()[:3]).all() and read.ravel()[3:].tolist() == list(range(4, 13))
    pages(tmp_path / "a.tif", (Image.new("LA", (4, 3)), 0), (mask, 4))
    with pytest.raises(BadMapError, match=r"has the shape \(3, 4, 2\): a depth map has one channel"):
        read_map(tmp_path / "a.tif")
    pages(tmp_path / "a.tif", (whole, 0), (whole, 0))
    with pytest.raises(BadMapError, match="holds 2 pictures of one size"):
        read_map(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_a_tiff_of_three_equal_channels_is_its_grey(tmp_path, kind):
    three = np.dstack([CODES.astype(kind)] * 3)
    cv2.imwrite(str(tmp_path / "a.tif"), three)
    assert read_map(tmp_path / "a.tif").tolist() == CODES.tolist()
    three[0, 0, 1] += 1
    cv2.imwrite(str(tmp_path / "a.tif"), three)
    with pytest.raises(BadMapError, match="has 3 channels: a picture, not a map"):
        read_map(tmp_path / "a.tif")


@pytest.mark.parametrize("form", ["npy", "npz", "h5"])
def test_a_file_without_its_end_is_called_so(tmp_path, form):
    path = tmp_path / f"a.{form}"
    big = np.ones((1100, 1000), np.float32)
    if form == "h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["depth"] = big
    else:
        (np.save if form == "npy" else np.savez)(path, big)
    for share in (0.99, 0.5):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(BadMapError, match=f"a readable .{form} .truncated: its end is missing"):
            read_map(path)


def test_bfloat16_has_no_type_in_numpy(tmp_path):
    np.save(tmp_path / "a.npy", MAP.astype(np.float16).view("V2"))
    with pytest.raises(BadMapError, match="as numpy stores bfloat16: save it as float32"):
        read_map(tmp_path / "a.npy")


def test_disparity_by_its_name_is_not_read_as_depth(tmp_path):
    for name in ("disparity", "inverse_depth", "inv_depth"):
        np.savez(tmp_path / "a.npz", **{name: BIG, "confidence": BIG})
        assert (
            read_map(tmp_path / "a.npz", "disparity").tolist() == read_map(tmp_path / "a.npz").tolist() == BIG.tolist()
        )
        with pytest.raises(BadMapError, match=f"holds {name}, but depth is expected: give the kind disparity"):
            read_map(tmp_path / "a.npz", "depth")


def test_an_old_netcdf_and_numbers_beyond_float32_are_told(tmp_path, recwarn):
    (tmp_path / "a.nc").write_bytes(b"CDF\1" + bytes(99))
    with pytest.raises(BadMapError, match="netCDF 3: store it as netCDF 4 or .npy"):
        read_map(tmp_path / "a.nc")
    np.save(tmp_path / "a.npy", BIG.astype(float) * 1e300)
    assert np.isinf(read_prediction(tmp_path / "a.npy", None)[0]).all() and not recwarn.list


def test_a_declared_scale_is_the_callers_only_if_it_is_the_same_number():
    stored = packing.packed(np.ones((2, 3), np.uint16), 0.001, 0.0)
    assert packing.conflict(stored, 0.001) == "" == packing.conflict(stored, None)
    assert "its numbers mean stored x 0.001 by its own" in packing.conflict(stored, 0.00101)
    for notes in ({"add_offset": np.inf}, {"scale_factor": np.nan}, {"scale_factor": "metres"}):  # say nothing
        assert packing.conflict(packing.by_netcdf(np.ones((2, 3)), notes), 1.0) == ""


@pytest.mark.parametrize(
    ("unit", "metres"),
    [(" Feet.", 0.3048), ("inches", 0.0254), ("dm", 0.1), ("um", 1e-6), ("km", 1000), (np.array([b"cm"]), 0.01)],
)
def test_a_declared_unit_is_that_of_the_offset_too(unit, metres):
    stored = packing.by_netcdf(np.ones((2, 3)), {"scale_factor": 2.0, "add_offset": -3.0, "units": unit})
    assert (stored.factor, stored.offset) == pytest.approx((2 * metres, -3 * metres))
    assert f"{2 * metres:g} - {3 * metres:g} (it is in {stored.unit})" in packing.conflict(stored, None)
    assert packing.meant(np.array([4]), {"scale_factor": 2.0, "add_offset": -3.0}).tolist() == [5.0]


def test_a_file_of_many_maps_that_cannot_be_read_is_named(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "maps.mat").write_bytes(b"not HDF5")
    with pytest.raises(OSError, match=r"maps.mat is not a readable .mat of version 7.3 .*; download it again"):
        hdf5s.open_hdf5(tmp_path / "maps.mat")


def test_whole_numbers_with_gaps_keep_all_their_digits():
    filled = hdf5s._filled(np.array([-1, 16_777_217], np.int32), {"_FillValue": np.int32(-1)})
    assert np.isnan(filled[0]) and int(filled[1]) == 16_777_217


def test_the_transparent_level_of_a_grey_png_is_no_data(tmp_path):
    """GDAL writes -a_nodata so, whatever the level: 65535 would be 65.535 m."""
    for dtype, empty in ((np.uint16, 65535), (np.uint8, 255)):
        Image.fromarray(np.array([[7, empty], [0, 12]], dtype)).save(tmp_path / "a.png", transparency=empty)
        values = read_map(tmp_path / "a.png")
        assert np.isnan(values[0, 1]) and values[~np.isnan(values)].tolist() == [7, 0, 12]
        with pytest.raises(BadPredictionError, match="integers .* with gaps. of unknown unit"):
            read_prediction(tmp_path / "a.png", (2, 2), Kind.METRIC_DEPTH)
        assert np.isnan(read_prediction(tmp_path / "a.png", (2, 2), Kind.SCALE_DEPTH)[0][0, 1])
        Image.fromarray(np.array([[7, 3], [0, 12]], dtype)).save(tmp_path / "a.png", transparency=empty)
        assert read_map(tmp_path / "a.png").dtype == dtype


def test_a_jpeg_that_is_none_of_the_usual_is_named(tmp_path):
    import imagecodecs

    (tmp_path / "a.jls").write_bytes(imagecodecs.jpegls_encode(np.arange(12, dtype=np.uint16).reshape(3, 4)))
    with pytest.raises(BadMapError, match=r"not a readable \.jls \(JPEG-LS of 16 bits per sample\); supported"):
        read_map(tmp_path / "a.jls")


def test_a_map_without_any_number_is_not_called_integers(tmp_path):
    np.savez(tmp_path / "a.npz", depth=np.full((2, 2), np.nan, np.float32))
    assert np.isnan(read_prediction(tmp_path / "a.npz", (2, 2), Kind.METRIC_DEPTH)[0]).all()
