"""PNG and AVIF that say their colours by numbers: those of HDR are shown in the range of screens."""

from __future__ import annotations

import io
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import cicp, hdr
from distill.data.photos import decode

PAPER = {hdr.PQ: 0.5807, hdr.HLG: 0.75}
"""The signal of white paper, which a screen shows as 244."""


def png(codes: np.ndarray, primaries: int, transfer: int) -> bytes:
    """codes: uint8 or uint16 as cv2 writes them."""
    data = cv2.imencode(".png", codes)[1].tobytes()
    body = b"cICP" + bytes([primaries, transfer, 0, 1])
    return data[:33] + (4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big") + data[33:]


def avif(signal: float, transfer: int, *, bits: int = 10) -> bytes:
    import imagecodecs

    codes = np.full((24, 32, 3), round(signal * (2**bits - 1)), np.uint16)
    codes[:12] = 0
    return imagecodecs.avif_encode(codes, 100, speed=10, bitspersample=bits, primaries=9, transfer=transfer, matrix=9)


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_white_paper_is_paper(transfer):
    codes = np.zeros((24, 32, 3), np.uint16)
    codes[12:] = round(PAPER[transfer] * 65535)
    eight = np.full((24, 32), round(PAPER[transfer] * 255), np.uint8)
    for shown in (
        decode(png(codes, hdr.WIDE, transfer))[:, 12:],
        decode(png(eight, hdr.P3, transfer)),
        decode(avif(PAPER[transfer], transfer))[:, 12:],
        decode(avif(PAPER[transfer], transfer, bits=12))[:, 12:],
    ):
        assert np.abs(shown.numpy().astype(int) - 244).max() <= 3


def test_colours_keep_their_order_transparency_and_turn():
    exif = Image.Exif()
    exif[274] = 6
    out = io.BytesIO()
    Image.fromarray(np.zeros((24, 32, 4), np.uint8)).save(out, "PNG", exif=exif)
    turned = out.getvalue()[33 : out.getvalue().index(b"IDAT") - 4]
    codes = np.zeros((24, 32, 4), np.uint16)
    codes[..., 2], codes[..., 3] = 30000, 65535  # red, in OpenCV's order
    codes[:, :16, 3] = 0
    data = png(codes, hdr.WIDE, hdr.PQ)
    rgb = decode(data[:33] + turned + data[33:])
    assert rgb.shape == (3, 32, 24)
    assert (rgb[:, :16] == 255).all() and rgb[0, 20, 0] > 100 > rgb[1:, 20, 0].max()
    codes[:, :16, 3] = 52428
    mixed = decode(png(codes, hdr.WIDE, hdr.PQ)).int()
    assert torch.equal(mixed[:, :, 0], ((4 * mixed[:, :, 20] + 255) / 5 + 0.5).floor().int()), "four fifths opaque"


def test_other_numbers_change_nothing():
    assert (hdr.PQ, hdr.HLG, hdr.WIDE, hdr.P3) == (16, 18, 9, 12), "of ITU-T H.273"
    codes = np.arange(24 * 32 * 3, dtype=np.uint16).reshape(24, 32, 3) * 20
    plain = decode(cv2.imencode(".png", codes)[1].tobytes())
    assert (decode(png(codes, 1, 13)) == plain).all()
    grey = decode(avif(0.5, 13))[:, 12:].numpy().astype(int)
    assert np.abs(grey - 128).max() <= 2


def to_xyz(*corners: tuple[float, float]) -> np.ndarray:
    """Linear RGB of these primaries (x, y) and white D65 to XYZ."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*corners, (0.3127, 0.3290))]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


SRGB = to_xyz((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
OF = {
    1: SRGB,
    hdr.WIDE: to_xyz((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    hdr.P3: to_xyz((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


@pytest.mark.parametrize("primaries", OF)
def test_a_colour_is_the_same_in_any_primaries(primaries):
    light = np.array([0.5, 0.2, 0.1])  # linear sRGB, of paper's 203 cd/m2
    there = np.linalg.solve(OF[primaries], SRGB @ light) * 203 / 10_000
    power = there**0.1593017578125
    signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375  # ST 2084
    codes = np.broadcast_to(np.round(signal[::-1] * 65535).astype(np.uint16), (24, 32, 3)).copy()
    shown = decode(png(codes, primaries, hdr.PQ)).numpy().reshape(3, -1)[:, 0]
    assert shown == pytest.approx(255 * (1.055 * light ** (1 / 2.4) - 0.055), abs=1.5)


def box(name: bytes, body: bytes, *, how: str = "") -> bytes:
    if how == "long":
        return (1).to_bytes(4, "big") + name + (len(body) + 16).to_bytes(8, "big") + body
    return (0 if how == "to the end" else len(body) + 8).to_bytes(4, "big") + name + body


def colour_box(primaries: int, transfer: int) -> bytes:
    return box(b"colr", b"nclx" + bytes([0, primaries, 0, transfer, 0, 9, 0x80]))


def avif_headers(
    *, item: int = 1, wide: bool = False, long: bool = False, how: str = "", own: tuple[int, ...] = (2, 4), icc=b"prof"
) -> bytes:
    """The boxes of an AVIF whose picture `item` has the stored properties `own`, beside another item's."""
    pixi, av1c = (box(name, body) for name, body in ((b"pixi", b"\0\0\0\0\1\x0c"), (b"av1C", b"\x81\0\x40\0")))
    stored = [colour_box(1, 13), colour_box(9, 16), box(b"colr", icc + b"x" * 8), pixi, av1c]
    table = bytes([long, 0, 0, wide]) + (2).to_bytes(4, "big")
    for number, indices in ((item - 1, (1,)), (item, own)):
        marked = b"".join((i | (0x8000 if wide else 0x80)).to_bytes(1 + wide, "big") for i in indices)  # essential
        table += number.to_bytes(4 if long else 2, "big") + bytes([len(indices)]) + marked
    pitm = box(b"pitm", bytes([long, 0, 0, 0]) + item.to_bytes(4 if long else 2, "big"))
    iprp = box(b"iprp", box(b"ipco", b"".join(stored)) + box(b"ipma", table), how=how)
    return box(b"ftyp", b"avif") + box(b"meta", bytes(4) + pitm + iprp, how=how)


@pytest.mark.parametrize(
    ("given", "coding"),
    [
        ({}, (9, 16, 12)),
        ({"wide": True}, (9, 16, 12)),
        ({"long": True, "item": 70_000}, (9, 16, 12)),
        ({"how": "long"}, (9, 16, 12)),
        ({"how": "to the end"}, (9, 16, 12)),
        ({"own": (2, 5)}, (9, 16, 10)),  # no pixi: the depth is in the codec's configuration
        ({"own": (1, 4)}, (1, 13, 12)),
        ({"own": (2, 3, 4)}, None),  # an ICC profile takes precedence
        ({"own": (2, 3, 4), "icc": b"rICC"}, None),
        ({"own": (4,)}, None),
    ],
)
def test_the_numbers_of_an_avif_are_those_of_its_picture(given, coding):
    assert cicp._avif_coding(avif_headers(**given)) == coding


def test_a_colour_brighter_than_the_screen_keeps_its_hue():
    light = np.array([2.0, 1.0, 0.25])  # of paper
    power = (light * 203 / 10_000) ** 0.1593017578125
    signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    codes = np.round(signal * 65535).astype(np.uint16)[None, None]
    shown = light / 2 * (1 - 0.25 * np.exp((0.75 - 2) / 0.25))
    expected = 255 * (1.055 * shown ** (1 / 2.4) - 0.055)
    assert hdr.to_srgb(codes, hdr.PQ, primaries=1)[0, 0] == pytest.approx(expected, abs=1.0)
