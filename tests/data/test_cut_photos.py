"""Photographs that are incomplete are told as such, and complete ones are never taken for incomplete."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distill.data import damage
from distill.data.photos import BadImageError, decode
from tests.data.pictures import close, encoded, textured

FORMS = [
    *(("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})),
    *(("BMP", {}), ("PPM", {}), ("GIF", {}), ("AVIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})),
    ("TIFF", {"compression": "tiff_deflate"}),
]


@pytest.mark.parametrize(("form", "options"), FORMS, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_unfinished_download_is_never_another_picture(form, options, share):
    whole = encoded(textured(), form, **options)
    kept = int(len(whole) * share)
    for data in (whole[:kept], whole[:kept] + bytes(len(whole) - kept)):
        with pytest.raises(BadImageError):
            decode(data)
    behind = 8 if form == "PPM" else 64  # a PPM has no end of its own
    assert decode(whole + bytes(behind)).equal(decode(whole)), "zeros behind a whole file"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("mode", "restarts"), [("RGB", 0), ("L", 0), ("CMYK", 0), ("RGB", 2)])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_whole(mode, restarts, progressive):
    whole = encoded(textured().convert(mode), "JPEG", progressive=progressive, restart_marker_blocks=restarts)
    assert all(decode(whole[:-lacking]).equal(decode(whole)) for lacking in (1, 2))
    for lacking in (4, 9, 100):
        with pytest.raises(BadImageError, match="truncated"):
            decode(whole[:-lacking])
    for scan in [i for i in range(len(whole)) if progressive and whole[i : i + 2] == b"\xff\xda"]:
        with pytest.raises(BadImageError):  # a whole scan is missing, and no pixel of the others
            decode(whole[:scan])


@pytest.mark.parametrize("form", ["BMP", "PPM", "TIFF"])
def test_a_letterbox_is_no_unfinished_download(form):
    boxed = np.asarray(textured(60, 81)).copy()  # a BMP pads such rows
    boxed[:8] = boxed[-8:] = 0
    assert close(decode(encoded(Image.fromarray(boxed), form)), Image.fromarray(boxed), 0)
    if form == "TIFF":
        out = io.BytesIO()
        planes = {"photometric": "rgb", "planarconfig": "separate"}
        pytest.importorskip("tifffile").imwrite(out, boxed.transpose(2, 0, 1), **planes)
        assert close(decode(out.getvalue()), Image.fromarray(boxed), 0)


@pytest.mark.parametrize(
    ("black", "zero_rows", "is_cut"), [(0, 3, True), (18, 3, True), (45, 3, False), (45, 5, True), (45, 4, False)]
)
def test_a_row_that_ends_in_zeros_is_no_cut_below_black_of_which_little_is_left(black, zero_rows, is_cut):
    rows = np.full((100, 90), 200, np.uint8)
    rows[: 100 - zero_rows, 90 - black :] = 0  # above the row at whose middle the zeros begin
    rows[99 - zero_rows, 30:] = rows[100 - zero_rows :] = 0
    assert damage.stops_mid_row(rows.tobytes(), 90, 3) is is_cut
    rows[99 - zero_rows] = 200
    assert not damage.stops_mid_row(rows.tobytes(), 90, 3), "they begin with a row"


def test_uncompressed_pixels_of_other_kinds_that_stop_mid_row_are_cut():
    grey = np.full((30, 40), 200, np.uint8).tobytes()
    for head, pixels in ((b"P5\n40 30\n255\n", grey), (b"P5\n40 30\n65535\n", grey * 2)):
        row = len(pixels) // 30
        for kept, is_cut in ((20 * row + row // 2, True), (20 * row, False)):
            assert damage.ppm_is_cut(head + pixels[:kept].ljust(len(pixels), b"\0"), 40, 30) is is_cut
    bmp = bytearray(encoded(textured(30, 40).convert("RGBA"), "BMP"))
    bmp[30] = 3  # its colours are declared by bit masks
    assert damage.bmp_is_cut(bytes(bmp[:3000]).ljust(len(bmp), b"\0")) and not damage.bmp_is_cut(bytes(bmp))


def chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + bytes(len(body) % 2)


@pytest.mark.parametrize(("name", "zeros", "is_cut"), [(b"VP8 ", 0, False), (b"VP8 ", 20, True), (b"ANMF", 20, True)])
def test_zeros_in_a_webp_s_pixels_are_found_behind_chunks_of_odd_length(name, zeros, is_cut):
    chunks = chunk(b"ICCP", b"odd") + chunk(name, b"x" * 40 + bytes(zeros))
    data = b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks + bytes(20)
    assert bool(damage.unfinished(data, "WebP")) is is_cut


def test_a_checksum_of_pixels_that_is_wrong_is_told():
    data = bytearray(encoded(textured(), "PNG", compress_level=0))  # stored verbatim: any bytes decode
    assert not damage.png_damage(bytes(data))
    data[data.index(b"IDAT") + 99] ^= 1
    assert damage.png_damage(bytes(data)) == "damaged: a checksum of its pixels is wrong"
    assert damage.png_damage(encoded(form="PNG")[:-12]) == "truncated: its end is missing"


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_heic_is_called_one(share):
    heif, out = pytest.importorskip("pillow_heif"), io.BytesIO()
    heif.from_pillow(textured(64, 64)).save(out, quality=95)
    kept = out.getvalue()[: int(len(out.getvalue()) * share)]
    lacking = len(out.getvalue()) - len(kept)
    with pytest.raises(BadImageError, match=f"truncated: {lacking} bytes are missing at its end"):
        decode(kept)
    with pytest.raises(BadImageError, match=f"truncated: it ends in {lacking} zero bytes"):
        decode(kept + bytes(lacking))


def test_an_end_behind_half_a_photo_makes_no_grey_foot():
    data = encoded(textured(), quality=90)
    with pytest.raises(BadImageError, match="pixels end before its last row"):
        decode(data[: len(data) // 2] + b"\xff\xd9")
    image = np.asarray(textured()).copy()
    image[30:] = 128
    assert (decode(encoded(Image.fromarray(image), quality=90))[:, -8:] == 128).all(), "grey that was photographed"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.93])
def test_an_end_behind_a_cut_is_seen_wherever_the_cut_is(share):
    for mode, options in (("RGB", {"quality": 90}), ("RGB", {"quality": 90, "subsampling": 0}), ("L", {"quality": 90})):
        data = encoded(textured().convert(mode), **options)
        with pytest.raises(BadImageError, match="truncated: its pixels end"):
            decode(data[: int(len(data) * share)] + b"\xff\xd9")


def test_a_progressive_photo_without_its_last_scans_is_no_blurred_one():
    data = encoded(textured(), quality=90, progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at in scans[1:]:
        with pytest.raises(BadImageError, match="truncated: its pixels end"):
            decode(data[:at] + b"\xff\xd9")
    assert decode(data).shape == (3, 60, 80)


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True}), ("AVIF", {})])
def test_a_cut_is_called_one(form, options):
    data = encoded(textured(), form, **options)
    with pytest.raises(BadImageError, match="truncated: 100 bytes are missing at its end: download or copy it again"):
        decode(data[:-100])


def test_a_compressed_tiff_whose_tags_come_first_is_called_cut():
    tifffile = pytest.importorskip("tifffile")
    out = io.BytesIO()
    tifffile.imwrite(out, np.asarray(textured()), photometric="rgb", compression="zlib")
    assert (decode(out.getvalue()).permute(1, 2, 0).numpy() == np.asarray(textured())).all()
    with pytest.raises(BadImageError, match="truncated: its pixels continue beyond its end: download or copy it again"):
        decode(out.getvalue()[:-900])


def test_a_tiff_without_its_tags_is_told_as_truncated():
    buffer = io.BytesIO()
    textured().save(buffer, "TIFF", compression="tiff_lzw")
    data = buffer.getvalue()
    tags = int.from_bytes(data[4:8], "little")
    assert tags > len(data) // 2
    for broken in (data[:tags], data[:tags].ljust(len(data), b"\0")):
        with pytest.raises(BadImageError, match="truncated: its tags, .* are missing: download or copy it again"):
            decode(broken)


@pytest.mark.parametrize("side", [16, 64])
def test_the_padding_of_tiles_is_no_unfinished_download(side):
    out = io.BytesIO()
    pixels = np.asarray(textured(60, 90))
    pytest.importorskip("tifffile").imwrite(out, pixels, photometric="rgb", tile=(side, side))
    whole = out.getvalue()
    assert np.array_equal(decode(whole).permute(1, 2, 0).numpy(), pixels)
    in_last = len(whole) - side * side * 3 + side * 3 + 25  # a row and 8 pixels of the last tile
    with pytest.raises(BadImageError, match="as in an unfinished download"):
        decode(whole[:in_last] + bytes(len(whole) - in_last))


def test_a_jpeg_of_which_only_the_header_arrived_is_told():
    whole = encoded(form="JPEG")
    with pytest.raises(BadImageError, match="truncated: it ends in .* zero bytes, like an unfinished download"):
        decode(whole[:90] + bytes(len(whole) - 90))
