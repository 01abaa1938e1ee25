"""Photographs that are incomplete are told as such, and complete ones are never taken for incomplete."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

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
    decode(whole)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_whole(mode, progressive):
    whole = encoded(textured().convert(mode), "JPEG", progressive=progressive)
    assert all(decode(whole[:-lacking]).equal(decode(whole)) for lacking in (1, 2))
    for lacking in (4, 9, 100):
        with pytest.raises(BadImageError, match="truncated"):
            decode(whole[:-lacking])
    for scan in [i for i in range(len(whole)) if progressive and whole[i : i + 2] == b"\xff\xda"]:
        with pytest.raises(BadImageError):  # a whole scan is missing, and no pixel of the others
            decode(whole[:scan])


@pytest.mark.parametrize("form", ["BMP", "PPM", "TIFF"])
def test_a_letterbox_is_no_unfinished_download(form):
    boxed = np.asarray(textured()).copy()
    boxed[:8] = boxed[-8:] = 0
    assert close(decode(encoded(Image.fromarray(boxed), form)), Image.fromarray(boxed), 0)


def test_an_end_behind_half_a_photo_makes_no_grey_foot():
    data = encoded(textured(), quality=90)
    with pytest.raises(BadImageError, match="pixels end before its last row"):
        decode(data[: len(data) // 2] + b"\xff\xd9")
    image = np.asarray(textured()).copy()
    image[30:] = 128
    assert (decode(encoded(Image.fromarray(image), quality=90))[:, -8:] == 128).all(), "grey that was photographed"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.93])
def test_an_end_behind_a_cut_is_seen_wherever_the_cut_is(share):
    for options in ({"quality": 90}, {"quality": 90, "subsampling": 0}):
        data = encoded(textured(), **options)
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
