"""Photographs as phones, cameras, scanners and broken downloads leave them: the right pixels or a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from distill.data import hdr
from distill.data.maps import BadMapError, decode_map
from distill.data.photos import BadImageError, decode
from tests.data.pictures import close, encoded, picture, textured


@pytest.mark.parametrize("form", ["AVIF", "PNG", "JPEG"])
def test_a_profile_of_srgb_changes_nothing_and_another_does(form):
    options = {} if form == "PNG" else {"quality": 100, "subsampling": "4:4:4"}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(encoded(form=form, **options))
    assert (decode(encoded(form=form, icc_profile=srgb, **options)).int() - plain.int()).abs().max() <= 1
    assert (decode(encoded(form=form, icc_profile=b"broken" * 40, **options)).int() - plain.int()).abs().max() == 0


def profile_of(curve: bytes = bytes(8)) -> bytes:
    """sRGB's own profile with other tone curves: by default those of light itself."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(data[128:132], "big")):
        name, offset, size = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + size] = (b"curv" + curve).ljust(size, b"\0")
    return bytes(data)


def test_linear_light_becomes_srgb():
    light, image = profile_of(), Image.new("RGB", (4, 4), (55, 55, 55))
    large = light + bytes(1 << 18)  # Pillow does not read it from a PNG
    large = len(large).to_bytes(4, "big") + large[4:]
    deep = Image.fromarray(np.full((4, 4), 55 * 257, np.uint16))
    tifffile, out = pytest.importorskip("tifffile"), io.BytesIO()
    tifffile.imwrite(out, np.asarray(deep), byteorder=">", iccprofile=light)
    for data in (
        *(encoded(image.convert(mode), "PNG", icc_profile=icc) for icc in (light, large) for mode in ("RGB", "RGBA")),
        encoded(deep, "PNG", icc_profile=light),
        out.getvalue(),
    ):
        assert abs(int(decode(data)[0, 0, 0]) - 128) <= 2, "a fifth of the light is the middle of sRGB"
    assert abs(int(decode(encoded(deep, "PNG", icc_profile=None))[0, 0, 0]) - 55) <= 1


def test_a_profile_that_differs_in_the_shadows_alone_is_applied():
    gamma = profile_of(bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)))
    got = [decode(encoded(Image.new("RGB", (4, 4), 3 * (v,)), "PNG", icc_profile=gamma))[0, 0, 0] for v in (10, 128)]
    assert abs(int(got[0]) - 3) <= 1 and abs(int(got[1]) - 128) <= 1


def chunks(*added: tuple[bytes, bytes], image: Image.Image) -> bytes:
    """A PNG with chunks (name, body) before its pixels."""
    data = encoded(image, "PNG")
    made = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in added]
    return data[:33] + b"".join(made) + data[33:]


@pytest.mark.parametrize(("gamma", "shown"), [(100000, 128), (45455, 55), (40000, 40), (20000, 2)])
def test_png_gamma_without_a_profile_is_applied(gamma, shown):
    grey, chunk = Image.new("RGB", (4, 4), (55, 55, 55)), (b"gAMA", struct.pack(">I", gamma))
    assert abs(int(decode(chunks(chunk, image=grey))[0, 0, 0]) - shown) <= 1
    assert int(decode(chunks((b"sRGB", b"\0"), chunk, image=grey))[0, 0, 0]) == 55, "sRGB counts before gAMA"


@pytest.mark.parametrize(
    "options", [{}, {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()}]
)
def test_lab_becomes_srgb(options):
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    stored = ImageCms.profileToProfile(picture(), srgb, lab, outputMode="LAB")
    got = decode(encoded(stored, "TIFF", **options)).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - np.asarray(picture())).mean() < 4, "eight bits of Lab are coarse"


def test_avif_and_heic_are_read():
    assert close(decode(encoded(form="AVIF", quality=95)), picture(), 12)
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(picture(64, 64)).save(out, quality=95)
    assert close(decode(out.getvalue()), picture(64, 64), 16)


def test_heic_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(BadImageError, match=r'HEIC.*pip install "depth-distill\[heif\]"'):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100) + b"\1")


def test_large_text_beside_the_pixels_costs_nothing():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * (3 << 20), zip=True)
    assert close(decode(encoded(form="PNG", pnginfo=info)), picture(), 0)


def test_what_is_transparent_everywhere_shows_its_colours_or_nothing():
    clear = np.dstack([np.asarray(picture()), np.zeros((24, 36), np.uint8)])
    assert close(decode(encoded(Image.fromarray(clear), "PNG")), picture(), 0)
    white_shown = np.dstack([np.asarray(picture()), np.zeros((24, 36), np.uint8)])
    white_shown[0, 0] = 255
    for image in (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.fromarray(white_shown)):
        with pytest.raises(BadImageError, match="nothing is visible"):
            decode(encoded(image, "PNG"))
    assert (decode(encoded(Image.new("RGBA", (8, 8), (255, 255, 255, 255)), "PNG")) == 255).all()


def tiff(pages, **options) -> bytes:
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:], **options)
    return out.getvalue()


def test_a_thumbnail_before_the_picture_is_passed_over():
    small = picture().resize((9, 6))
    assert decode(tiff([small, picture()])).shape == (3, 24, 36)
    assert decode(tiff([picture(), small])).shape == (3, 24, 36)
    with pytest.raises(BadImageError, match="thumbnail"):
        decode(encoded(small, "TIFF", tiffinfo={254: 1}))
    assert decode(tiff([picture(), picture(30, 45)])).shape == (3, 24, 36), "not much larger: no thumbnail of it"
    assert decode(tiff([small, picture(36, 24)])).shape == (3, 6, 9), "of another shape"
    assert decode(tiff([small, picture()], tiffinfo={254: 0})).shape == (3, 6, 9), "declared to be whole"
    for tags in ({"subfiletype": 1}, {"extratags": [(255, 3, 1, 2, True)]}):
        tifffile, out = pytest.importorskip("tifffile"), io.BytesIO()
        with tifffile.TiffWriter(out) as writer:
            writer.write(np.asarray(small), photometric="rgb", **tags)
            writer.write(np.asarray(picture()), photometric="rgb")
        mask = out.getvalue().replace(struct.pack("<HHII", 254, 4, 1, 1), struct.pack("<HHII", 254, 4, 1, 4))
        assert decode(out.getvalue()).shape == decode(mask).shape == (3, 24, 36), tags
    raws = [encoded(small, "TIFF", tiffinfo={50706: b"\1\4\0\0"}), b"II*\0\x10\0\0\0CR\2\0" + bytes(99)]
    for data in raws:
        with pytest.raises(BadImageError, match="camera raw"):
            decode(data)


def test_deep_grey_with_white_at_zero_is_inverted():
    ramp = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    data = bytearray(encoded(Image.fromarray(ramp), "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8] = 0
    assert np.abs(decode(bytes(data))[0].numpy() - (255 - ramp / 257.0)).max() <= 0.5


RAMP = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP // 2], -1)
PLANES = np.moveaxis(COLOURS, 2, 0).copy()


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (RAMP, {"byteorder": ">"}),
        (65535 - RAMP, {"byteorder": ">", "photometric": "miniswhite"}),
        (
            np.stack([RAMP, np.full_like(RAMP, 65535)], -1),
            {"photometric": "minisblack", "extrasamples": ["unassalpha"]},
        ),
        ((RAMP >> 8).astype(np.uint32), {}),
        (PLANES, {"photometric": "rgb", "planarconfig": "separate"}),
        (PLANES, {"photometric": "rgb", "planarconfig": "separate", "bigtiff": True}),
        (PLANES, {"photometric": "rgb", "planarconfig": "separate", "bigtiff": True, "byteorder": ">"}),
        (
            np.concatenate([PLANES, RAMP[None]]),
            {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unspecified"]},
        ),
    ],
    ids=["big-endian", "white is zero", "alpha", "8 of 32 bits", "planes", "big", "big, big-endian", "no alpha"],
)
def test_deep_tiffs_as_scanners_and_microscopes_write_them(pixels, options):
    out = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(out, pixels, **options)
    wanted = COLOURS if "planarconfig" in options else np.stack([RAMP] * 3, -1)
    assert np.abs(decode(out.getvalue()).permute(1, 2, 0).numpy() - wanted / 257.0).max() <= 1


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_white_at_zero_inverts_no_alpha_and_an_unspecified_sample_is_no_alpha(photometric):
    grey, alpha = RAMP if photometric == "minisblack" else 65535 - RAMP, np.full_like(RAMP, 65535)
    alpha[:, :18] = 0
    shown = np.where(alpha == 0, 65535, RAMP)
    for meaning, wanted in (("unassalpha", shown), ("unspecified", RAMP)):
        out, options = io.BytesIO(), {"photometric": photometric, "extrasamples": [meaning]}
        pytest.importorskip("tifffile").imwrite(out, np.stack([grey, alpha]), planarconfig="separate", **options)
        assert np.abs(decode(out.getvalue()).numpy() - wanted / 257.0).max() <= 1, meaning


def test_planes_are_turned_and_have_their_profile():
    out, options = io.BytesIO(), {"photometric": "rgb", "planarconfig": "separate"}
    grey = np.full((3, 24, 36), 55 * 257, np.uint16)
    grey[:, 0] = 0
    turned = [(274, 3, 1, 6, True)]
    pytest.importorskip("tifffile").imwrite(out, grey, iccprofile=profile_of(), extratags=turned, **options)
    shown = decode(out.getvalue())
    assert shown.shape == (3, 36, 24) and (shown[..., -1] == 0).all() and abs(int(shown[0, 0, 0]) - 128) <= 2


@pytest.mark.parametrize(
    ("pixels", "options", "said"),
    [
        (np.ones((4, 5, 3), np.float32), {"photometric": "rgb"}, "floating-point 32-bit samples, 3 per pixel, .*"),
        (PLANES, {"photometric": "cielab", "planarconfig": "separate"}, "unsigned 16-bit samples, 3 per pixel, .*"),
    ],
)
def test_a_tiff_that_is_no_photograph_says_what_it_is(pixels, options, said):
    out = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(out, pixels, **options)
    with pytest.raises(BadImageError, match=f"{said}: save it with 8 or 16 bits"):
        decode(out.getvalue())


def test_a_wrong_checksum_beside_the_pixels_costs_nothing():
    data = encoded(form="PNG")
    note = struct.pack(">I", 4) + b"tEXt" + b"abcd" + bytes(4)
    assert close(decode(data[:33] + note + data[33:]), picture(), 0)


def test_gamma_is_that_of_deep_grey_too():
    data = chunks((b"gAMA", struct.pack(">I", 100000)), image=Image.fromarray(np.full((4, 4), 55 * 257, np.uint16)))
    assert abs(int(decode(data)[0, 0, 0]) - 128) <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xef\xbb\xbf<svg/>", "text, beginning '<svg/>'"),
        (b"Access denied", "text, beginning 'Access denied'"),
        (bytes(128) + b"DICM" + bytes(99), "DICOM"),
        (b"\r\n\xff\xd8\xff\xe0" + bytes(99), r"a JPEG begins 2 bytes in, after b'\\r\\n'"),
        (b"\1" * 31 + b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG begins 31 bytes in"),
    ],
)
def test_what_stands_in_a_photos_place_is_named(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def graded(transfer):
    """sRGB colours (H,W,3) below the shoulder, and their numbers of 16 bits on the curve of PQ or HLG, paper at 203."""
    shown = np.random.default_rng(0).integers(0, 225, (8, 9, 3))
    code = shown / 255
    light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    # The inverse of BT.2087's matrix: BT.2020's share of each of sRGB's primaries.
    wide = light @ np.array(
        [[0.627404, 0.069097, 0.016391], [0.329283, 0.919540, 0.088013], [0.043313, 0.011362, 0.895595]]
    )
    if transfer == hdr.PQ:
        power = (wide * 203 / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        screen = wide * 203 / 1000
        luminance = screen @ np.array([[0.2627], [0.6780], [0.0593]])
        scene = screen * np.maximum(luminance, 1e-9) ** (1 / 1.2 - 1)
        log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
    return shown, np.round(signal * 65535).astype(np.uint16)


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_high_dynamic_range_is_shown_as_it_was_graded(transfer):
    shown, signal = graded(transfer)
    assert np.abs(hdr.to_srgb(signal, transfer).astype(int) - shown).max() <= 1
    ramp = np.repeat(np.arange(0, 65536, 16, dtype=np.uint16)[None, :, None], 3, 2)
    grey = hdr.to_srgb(ramp, transfer).astype(int)
    assert np.ptp(grey, -1).max() <= 1 and np.diff(grey[0, :, 1]).min() >= 0, "grey stays grey, brighter is brighter"
    assert (grey[0, 0] == 0).all() and (grey[0, -1] >= 254).all()


def test_a_photo_in_high_dynamic_range_is_no_pale_one():
    pillow_heif = pytest.importorskip("pillow_heif")
    shown, signal = graded(hdr.PQ)
    plain = np.broadcast_to(signal[0, 0], (48, 64, 3)).copy()
    stream = io.BytesIO()
    pillow_heif.from_bytes(mode="RGB;16", size=(64, 48), data=plain.tobytes()).save(
        stream, quality=95, color_primaries=9, transfer_characteristics=16, matrix_coefficients=9, full_range_flag=1
    )
    assert np.abs(decode(stream.getvalue())[:, 20, 20].numpy().astype(int) - shown[0, 0]).max() <= 6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "a JPEG of 12 bits per sample.*convert it"),
        (b"\xff\xd8\xff\xf7\0\x0b\x08\0\x10\0\x10\1\1\x11\0" + bytes(9), "JPEG-LS.*convert it"),
        (encoded().replace(b"\xff\xc0\0\x11\x08\0\x18", b"\xff\xc0\0\x11\x08\0\0"), "a height of 0.*convert it"),
        (b"\xff\x0a" + bytes(40), "JPEG XL: convert it"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "a video .MP4.: give it a video's suffix"),
        (b"PK\3\4" + bytes(40), "a zip archive: unpack it"),
        (encoded(textured())[:-900], "truncated.*download or copy it again"),
    ],
)
def test_a_refusal_says_what_to_do(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_plain_digits_with_a_comment_are_a_picture():
    assert decode(b"P3\n# by hand\n1 1\n255\n9 8 7\n").ravel().tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.replace(b"\r\n", b"\n"), "line ends were changed"),
        (lambda data: data.replace(b"\n", b"\r\n"), "line ends were changed"),
        (lambda data: data.decode("utf-8", "replace").encode(), "read and stored as text"),
    ],
)
def test_a_png_that_went_through_text_is_said(change, said):
    data = change(encoded(form="PNG"))
    with pytest.raises(BadImageError, match=f"{said}.*: copy it again as binary"):
        decode(data)
    with pytest.raises(BadMapError, match=said):
        decode_map(data, "d.png")


@pytest.mark.parametrize(("kind", "top"), [(b"P4", b""), (b"P5", b"255"), (b"P6", b"255"), (b"P5", b"65535")])
def test_a_header_with_the_line_ends_of_windows_shifts_no_pixel(kind, top):
    width, height = 16, 6
    samples = {b"P4": width // 8, b"P5": width, b"P6": 3 * width}[kind] * height * (2 if len(top) > 3 else 1)
    pixels = np.random.default_rng(0).integers(0, 256, samples, dtype=np.uint8).tobytes()
    lines = [kind, b"16 6", *([top] if top else [])]
    plain, windows = (end.join([*lines, b""]) + pixels for end in (b"\n", b"\r\n"))
    assert (decode(windows) == decode(plain)).all()


def test_a_png_of_an_ios_app_is_told():
    data = bytearray(encoded(form="PNG"))
    data[8:8] = struct.pack(">I", 4) + b"CgBI" + b"\x50\0\x20\6" + bytes(4)
    with pytest.raises(BadImageError, match=r"a PNG as iOS apps pack it .CgBI.: convert it"):
        decode(bytes(data))
    with pytest.raises(BadMapError, match=r"a PNG as iOS apps pack it .CgBI.: convert it"):
        decode_map(bytes(data), "a.png")
