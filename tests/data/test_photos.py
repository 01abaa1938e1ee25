"""Bytes become a photo or a reason; nothing else gets out."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from distill.data import colour, photos
from distill.data.photos import BadImageError, decode, upright_size
from tests.data.pictures import close, encoded, noise, picture


def test_plain_image_is_uint8_rgb_chw():
    rgb = decode(encoded(form="PNG"))
    assert rgb.dtype == torch.uint8 and rgb.shape == (3, 24, 36)
    assert close(rgb, picture(), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(form=form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode(data).shape[1:] == ((24, 36) if orientation < 5 else (36, 24))
    assert close(decode(data), want, 0)
    assert upright_size(data) == (want.height, want.width, orientation)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_size_of_a_png_needs_no_decoding_unless_its_orientation_may_stand_behind_the_pixels(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    magick = PngImagePlugin.PngInfo()  # as ImageMagick stores it
    magick.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    photo = Image.new("RGB", (12, 8))
    plain, first = encoded(photo, "PNG"), encoded(photo, "PNG", exif=exif)
    at = first.index(b"eXIf") - 4
    chunk = first[at : at + 12 + int.from_bytes(first[at : at + 4], "big")]
    last = plain[:-12] + chunk + plain[-12:]
    for turned in (first, last, *(encoded(photo, "PNG", pnginfo=text) for text in (xmp, magick))):
        assert upright_size(turned) == (12, 8, 6) and decode(turned).shape == (3, 12, 8)

    def never(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert upright_size(plain) == (8, 12, 1)


def test_broken_exif_does_not_cost_the_image():
    assert close(decode(encoded(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01garbage", quality=95)), picture(), 12)


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        rgb = decode(encoded(Image.fromarray(ramp), form))
        assert rgb.amin() == 0 and rgb.amax() == 255
        assert (rgb[0].double() - torch.from_numpy(ramp / 257.0)).abs().max() <= 0.5


def test_a_picture_of_several_bands_is_that_of_one(monkeypatch):
    ramp = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    half = np.full((24, 36, 4), 255, np.uint8)
    half[:12, :, :3] = 0  # within each band all pixels are equal
    shaded = np.dstack([np.asarray(picture()), np.asarray(picture())[..., 0]])
    images = [picture(), Image.fromarray(ramp), Image.fromarray(half), Image.fromarray(shaded)]
    whole = [decode(encoded(image, "PNG")) for image in images]
    for rows in (12, 7, 23):
        monkeypatch.setattr(colour, "BAND", rows * 36)
        assert all(decode(encoded(image, "PNG")).equal(want) for image, want in zip(images, whole, strict=True))


def test_the_bits_of_deep_grey_are_those_that_the_file_declares():
    for codes, bits, shown in (([0, 4095], 12, 255), ([0, 40950], 12, 159), ([0, 65535], 16, 255)):
        assert colour.srgb(Image.fromarray(np.array([codes], np.uint16)), bits=bits)[0, 1, 0] == shown


def test_alpha_is_composited_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 200, 255
    rgb = decode(encoded(Image.fromarray(rgba), "PNG"))
    assert rgb[:, 0, 0].tolist() == [200, 0, 0] and rgb[:, 3, 3].tolist() == [255, 255, 255]


def test_palette_with_transparency_is_composited():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 0, 0, 200] + [0] * 762)
    image.putpixel((0, 0), 1)
    rgb = decode(encoded(image, "PNG", transparency=0))
    assert rgb[:, 0, 0].tolist() == [0, 0, 200] and rgb[:, 3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "clear"), [("L", 0), ("RGB", (0, 0, 0))])
def test_one_colour_that_is_transparent_is_white(mode, clear):
    image = Image.new("L", (4, 4), 0)
    image.putpixel((0, 0), 255)
    image.putpixel((1, 0), 90)
    shown = decode(encoded(image.convert(mode), "PNG", transparency=clear))
    assert shown[:, 3, 3].tolist() == [255, 255, 255]
    assert shown[:, 0, 1].tolist() == [90, 90, 90]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "RGBA", "YCbCr"])
def test_modes_become_rgb(mode):
    image = picture().convert(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert close(decode(encoded(image, form)), image.convert("RGB"), 3)


def halved_chroma(image: Image.Image) -> bytes:
    """An uncompressed TIFF of a picture with even sides: 2 x 2 of luma, then one blue and one red difference."""
    ycbcr = np.asarray(image.convert("YCbCr"))
    height, width = ycbcr.shape[:2]
    luma = ycbcr[..., 0].reshape(height // 2, 2, width // 2, 2).transpose(0, 2, 1, 3).reshape(height // 2, -1, 4)
    pixels = np.concatenate([luma, ycbcr[::2, ::2, 1:]], -1).tobytes()
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 6, 277: 3, 278: height, 279: len(pixels), 284: 1}
    tags |= {273: 8 + 2 + 12 * 12 + 4 + 6, 530: 2 | 2 << 16, 531: 1}
    counts = {258: 3, 530: 2}
    rows = [
        struct.pack("<HHII", tag, 3 if tag in (258, 259, 262, 277, 284, 530, 531) else 4, counts.get(tag, 1), value)
        for tag, value in sorted((tags | {258: 8 + 2 + 12 * 12 + 4}).items())
    ]
    header = b"II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(rows) + bytes(4)
    return header + struct.pack("<3H", 8, 8, 8) + pixels


@pytest.mark.parametrize("behind", [0, 9000])
def test_uncompressed_ycbcr_is_no_noise_in_any_version_of_pillow(behind):
    image = picture().convert("YCbCr")
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(image, "TIFF", exif=exif)
        turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}.get(orientation)
        assert close(decode(data + bytes(behind)), image.transpose(turn) if turn else image, 3)
    data = halved_chroma(picture())
    assert close(decode(data + bytes(behind)), picture(), 10)
    with pytest.raises(BadImageError, match="truncated: its pixels continue beyond its end"):
        decode(data[:-1])


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_ycbcr_is_read(compression):
    image = picture().convert("YCbCr")
    assert close(decode(encoded(image, "TIFF", compression=compression)), image, 10)


def test_cmyk_jpeg_has_the_right_polarity():
    rgb = decode(encoded(Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK"), quality=95)).float().mean((1, 2))
    assert rgb[0] > 200 and rgb[1] < 60 and rgb[2] < 60


def test_multi_picture_jpeg_of_a_phone_is_read():
    data = encoded(form="MPO", save_all=True, append_images=[picture(seed=1)], quality=95)
    assert close(decode(data), picture(), 12)


def png_claiming(width, height) -> bytes:
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9500, 60000])
def test_bombs_are_refused_before_they_are_decoded(side):
    assert side * side > 89_478_485
    with pytest.raises(BadImageError, match="bomb"):
        decode(png_claiming(side, side))


def test_the_limit_of_pixels_is_the_users(monkeypatch):
    monkeypatch.setenv(photos.LIMIT, "800")
    with pytest.raises(BadImageError, match="36x24 is more than 800 pixels.*If not, set DISTILL_MAX_PIXELS=864"):
        decode(encoded(form="PNG"))
    for wrong in ("many", "0"):
        monkeypatch.setenv(photos.LIMIT, wrong)
        with pytest.raises(ValueError, match="DISTILL_MAX_PIXELS must be a number"):
            decode(encoded(form="PNG"))


def test_who_sets_the_limit_of_pixels_says_that_it_is_no_bomb(monkeypatch):
    claimed, size = SimpleNamespace(width=9500, height=9500), 9500 * 9500 // 401
    with pytest.raises(BadImageError, match=f"in {size} bytes: a decompression bomb. If not, set {photos.LIMIT}="):
        photos._check_size(claimed, size, photos.MAX_PIXELS)
    photos._check_size(claimed, 9500 * 9500 // 399, photos.MAX_PIXELS)
    monkeypatch.setenv(photos.LIMIT, "100000000")
    photos._check_size(claimed, 99, photos.max_pixels())
    with pytest.raises(BadImageError, match=r"20000x20000 is more than 100000000 pixels.* \(2.8 GB of memory\)"):
        photos._check_size(SimpleNamespace(width=20000, height=20000), 1 << 30, photos.max_pixels())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert close(decode(encoded(form="PNG")), picture(), 0), "Pillow's own limit is not that of this project"


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(data := encoded(form="PNG"))
    monkeypatch.setattr(photos, "MAX_BYTES", len(data))
    assert close(photos.load_file(tmp_path / "a.png", "a", "a.png").rgb, picture(), 0)
    monkeypatch.setattr(photos, "MAX_BYTES", len(data) - 1)
    with pytest.raises(BadImageError, match=f"{len(data)} bytes is more than {len(data) - 1}"):
        photos.load_file(tmp_path / "a.png", "a", "a.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "it is text, beginning '<html>"),
        (b'{"error": 1}', "it is text"),
        (b"\0" * 4000, "not an image"),
        (encoded(picture(200, 200))[:-400], "truncated"),
        (encoded(form="PNG")[:90], "truncated: its end is missing"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "integers from 70000"),
        (encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "integers from -5"),
        (encoded(noise(99), quality=95)[:6000] + bytes(6000), "truncated: it ends in 6000 zero bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_zeros_behind_a_whole_jpeg_do_no_harm():
    assert close(decode(encoded(quality=95) + bytes(5000)), picture(), 12)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "YCbCr", "GIF", "BMP", "PPM"])
def test_no_damage_raises_anything_but_bad_image(form):
    rng = np.random.default_rng(5)
    whole = encoded(picture().convert("YCbCr"), "TIFF") if form == "YCbCr" else encoded(form=form)
    read = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), size=rng.integers(1, 12)):
            data[place] = rng.integers(0, 256)
        data = bytes(data[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.5 else bytes(data)
        try:
            read += decode(data).shape[0] == 3
        except BadImageError as error:
            assert "\n" not in str(error)
    assert read < 60


@pytest.mark.parametrize("given", ["a.png", Path("a.png"), io.BytesIO(), None], ids=lambda given: type(given).__name__)
def test_what_is_no_bytes_is_told(given):
    with pytest.raises(TypeError, match=r"an encoded image is bytes, not \w+: of a file, Path"):
        decode(given)
