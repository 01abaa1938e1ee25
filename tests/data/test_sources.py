"""Every kind of broken, odd or hostile image ends as a photo or as a reason; nothing else gets out."""

from __future__ import annotations

import http.server
import importlib.util
import io
import os
import pickle
import re
import struct
import tarfile
import threading
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from distill.core.depth import Kind
from distill.data import sources, storage
from distill.data.photos import MAX_PIXELS, BadImageError, decode


def picture(height=24, width=36, seed=0) -> Image.Image:
    """A picture that differs everywhere and survives JPEG: smooth ramps, another colour in each corner."""
    y, x = np.mgrid[:height, :width]
    ramps = [255 * x / width, 255 * y / height, np.full_like(x, 40 + 40 * (seed % 5))]
    return Image.fromarray(np.stack(ramps, -1).astype(np.uint8))


def encoded(image=None, form="JPEG", **options) -> bytes:
    out = io.BytesIO()
    (picture() if image is None else image).save(out, form, **options)
    return out.getvalue()


def noise(side) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pack(path, members, *, cut=None):
    """A tar of (name, bytes or TarInfo) members, cut after `cut` bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(out.getvalue()[:cut])
    return path


def close(rgb: torch.Tensor, image: Image.Image, tolerance=6) -> bool:
    want = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return rgb.shape == want.shape and (rgb.int() - want.int()).abs().max() <= tolerance


# --- decoding ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_does_not_cost_the_image():
    assert close(decode(encoded(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01garbage", quality=95)), picture(), 12)


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        rgb = decode(encoded(Image.fromarray(ramp), form))
        assert rgb.amin() == 0 and rgb.amax() == 255
        assert (rgb[0].double() - torch.from_numpy(ramp / 257.0)).abs().max() <= 0.5


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


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "RGBA", "YCbCr"])
def test_modes_become_rgb(mode):
    image = picture().convert(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert close(decode(encoded(image, form)), image.convert("RGB"), 3)


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
    assert side * side > MAX_PIXELS
    with pytest.raises(BadImageError, match="bomb"):
        decode(png_claiming(side, side))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "it is text, beginning '<html>"),
        (b'{"error": 1}', "it is text"),
        (b"\0" * 4000, "not an image"),
        (encoded(picture(200, 200))[:-400], "truncated"),
        (encoded(form="PNG")[:90], "cannot be decoded"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "integers from 70000"),
        (encoded(noise(99), quality=95)[:6000] + bytes(6000), "truncated: it ends in 6000 zero bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in any known format"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(data)


def test_zeros_behind_a_whole_jpeg_do_no_harm():
    assert close(decode(encoded(quality=95) + bytes(5000)), picture(), 12)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_no_damage_raises_anything_but_bad_image(form):
    rng = np.random.default_rng(5)
    whole = encoded(form=form)
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


# --- tars -------------------------------------------------------------------------------------------------------------


def damaged(path):
    good = encoded()
    link = tarfile.TarInfo("./sa_13.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("./more")
    folder.type = tarfile.DIRTYPE
    return pack(
        path,
        [
            ("./sa_1.jpg", good),
            ("./sa_1.json", b"{}"),
            ("./sa_2.jpg", b""),
            ("./sa_3.jpg", b"<html>404</html>"),
            ("./sa_4.jpg", encoded(picture(99, 99))[:-400]),
            ("./sa_1.jpg", encoded(picture(seed=3))),
            ("../../escape.jpg", good),
            ("/etc/absolute.jpg", good),
            ("C:\\windows.jpg", good),
            ("..\\up.jpg", good),
            ("./notes/readme.txt", b"hello"),
            ("./more", folder),
            ("./sa_13.jpg", link),
            ("./more/sa_1.jpg", good),
            ("./sa.v2.14.jpg", good),
            ("./sa_15.jpg", encoded(form="PNG")),
        ],
    )


def test_damaged_tar_gives_every_good_image_and_a_reason_for_the_rest(tmp_path):
    [shard] = sources.tars(damaged(tmp_path / "sa_000900.tar"))
    scan = shard.scan()
    assert shard.stem == "sa_000900"
    good, bad = [], {one.origin: one.reason for one in scan.rejected}
    for entry in scan.entries:
        try:
            photo = entry.load()
            assert (photo.key, photo.origin, photo.truth) == (entry.key, entry.origin, None)
            good.append(photo.key)
        except BadImageError as error:
            bad[entry.origin] = str(error)
    assert good == ["sa_1", "more_sa_1", "sa_v2_14", "sa_15"]
    assert close(scan.entries[0].load().rgb, picture(), 12), "the first of two with one key is used"
    assert {name.split(":", 1)[1]: reason.split(";")[0][:33] for name, reason in bad.items()} == {
        "sa_2.jpg": "empty file",
        "sa_3.jpg": "not an image: it is text, beginni",
        "sa_4.jpg": "cannot be decoded: image file is ",
        "sa_1.jpg": "duplicate key",
        "../../escape.jpg": "its path climbs out of the archiv",
        "/etc/absolute.jpg": "its path is absolute",
        "C:\\windows.jpg": "its path is absolute",
        "..\\up.jpg": "its path climbs out of the archiv",
        "notes/readme.txt": "not an image file",
        "sa_13.jpg": "not a plain file (a link or a dev",
    }
    assert not list(tmp_path.parent.glob("escape*"))


def test_a_tar_cut_anywhere_gives_its_complete_members_and_one_line(tmp_path):
    members = [(f"./sa_{i}.jpg", encoded(picture(30 + i, 40))) for i in range(4)]
    whole = pack(tmp_path / "whole.tar", members)
    with tarfile.open(whole) as tar:
        ends = [m.offset_data + m.size for m in tar]
    size = ends[-1] + 512 - ends[-1] % 512
    for cut in range(1, size, 211):
        path = pack(tmp_path / "cut.tar", members, cut=cut)
        scan = sources.tars(path)[0].scan()
        assert len(scan.entries) == sum(end <= cut for end in ends), cut
        assert len(scan.rejected) == 1 and "tar" in scan.rejected[0].reason, cut
        for entry in scan.entries:
            entry.load()
    assert sources.tars(whole)[0].scan().rejected == ()


def photo_tar(path, count=4):
    """A tar of photos and, for each, where its header and its data begin."""
    pack(path, [(f"./sa_{i}.jpg", encoded(picture(seed=i))) for i in range(count)])
    with tarfile.open(path) as tar:
        return bytearray(path.read_bytes()), [(member.offset, member.offset_data) for member in tar]


def scanned(path, data=None):
    """The keys of a tar's images, every one of them readable, and the reasons for what is not there."""
    if data is not None:
        path.write_bytes(data)
    scan = sources.tars(path)[0].scan()
    assert all(entry.load().key == entry.key for entry in scan.entries)
    return [entry.key for entry in scan.entries], [one.reason for one in scan.rejected]


def checksummed(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


@pytest.mark.parametrize("damage", ["noise", "flip", "zeros", "negative", "huge", "endless name"])
def test_behind_a_broken_header_the_next_images_are_found(tmp_path, damage):
    data, places_ = photo_tar(tmp_path / "a.tar")
    at, body = places_[1]
    if damage == "noise":
        data[at:body] = b"\xaa" * 512
    elif damage == "flip":
        data[at + 150] ^= 0xFF
    elif damage == "zeros":
        data[at : body + 512] = bytes(1024)
    else:
        size = {"negative": b"\xff" * 10 + b"\x80\0", "huge": b"\x80" + b"\0" * 3 + b"\1" * 8}.get(damage)
        data[at + 124 : at + 136] = size or b"\x80" + b"\0" * 3 + b"\1" * 8
        data[at + 156 : at + 157] = b"0" if size else b"L"
        data[at:body] = checksummed(data[at:body])
    keys, reasons = scanned(tmp_path / "a.tar", data)
    assert keys == ["sa_0", "sa_2", "sa_3"]
    lost = places_[2][0] - at
    assert reasons == [f"the tar is damaged at byte {at}: {lost} bytes are lost, up to the next whole header"]


def test_a_broken_last_header_is_not_taken_for_the_end(tmp_path):
    data, places_ = photo_tar(tmp_path / "a.tar")
    at, body = places_[-1]
    for broken in (bytes(512), b"\xaa" * 512):
        data[at:body] = broken
        keys, reasons = scanned(tmp_path / "a.tar", data)
        assert keys == ["sa_0", "sa_1", "sa_2"] and reasons == [
            f"the tar is damaged at byte {at}: what follows is lost"
        ]


def test_zeros_to_the_end_are_an_unfinished_download(tmp_path):
    data, places_ = photo_tar(tmp_path / "a.tar", count=20)
    at = places_[2][0]
    data[at:] = bytes(len(data) - at)
    keys, reasons = scanned(tmp_path / "a.tar", data)
    assert keys == ["sa_0", "sa_1"] and len(data) - at > 12000
    assert reasons == [
        f"the tar ends in {len(data) - at} zero bytes from byte {at} on: it may be an unfinished download"
    ]


def test_a_tar_behind_another_is_read(tmp_path):
    first, _ = photo_tar(tmp_path / "a.tar", count=2)
    second = pack(tmp_path / "b.tar", [("./sa_8.jpg", encoded()), ("./sa_9.jpg", encoded())]).read_bytes()
    assert scanned(tmp_path / "a.tar", first + second) == (["sa_0", "sa_1", "sa_8", "sa_9"], [])


def test_what_looks_like_a_header_is_none(tmp_path):
    inner = pack(tmp_path / "inner.tar", [("./inside.jpg", encoded())]).read_bytes()
    jpeg = encoded()
    hidden = jpeg + bytes(-len(jpeg) % 512) + inner
    pack(tmp_path / "a.tar", [("./sa_0.jpg", hidden), ("./sa_1.jpg", jpeg)])
    assert scanned(tmp_path / "a.tar") == (["sa_0", "sa_1"], []), "an image's own bytes are not searched"
    data, places_ = photo_tar(tmp_path / "a.tar")
    at, body = places_[1]
    fake = bytearray(data[at:body])
    fake[:12] = b"./sa_9.jpg\0\0"  # its checksum is wrong
    data[at : body + 512] = bytes(512) + fake
    assert scanned(tmp_path / "a.tar", data)[0] == ["sa_0", "sa_2", "sa_3"]
    data[at:body] = b"\xaa" * 512
    data[body + 100 : body + 612] = checksummed(fake)  # not on a block
    assert scanned(tmp_path / "a.tar", data)[0] == ["sa_0", "sa_2", "sa_3"]


def test_no_damage_of_a_tar_raises(tmp_path):
    rng = np.random.default_rng(7)
    long = [(f"./{'d' * 90}/{'é' * 90}_{i}.jpg", encoded()) for i in range(3)]
    whole = pack(tmp_path / "a.tar", [*long, *((f"sa_{i}.jpg", encoded()) for i in range(3))]).read_bytes()
    for _ in range(80):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) // 512, size=rng.integers(1, 4)):
            start = 512 * int(place) + int(rng.integers(0, 500))
            data[start : start + 9] = rng.bytes(9) if rng.random() < 0.5 else bytes(9)
            block = data[512 * place : 512 * place + 512]
            if block[257:262] == b"ustar" and rng.random() < 0.7:
                data[512 * place : 512 * place + 512] = checksummed(block)
        (tmp_path / "a.tar").write_bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        for entry in sources.tars(tmp_path / "a.tar")[0].scan().entries:
            try:
                entry.load()
            except BadImageError:
                pass


def test_a_sound_tar_is_listed_from_its_headers_alone(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.tar", [(f"./sa_{i}.jpg", encoded(noise(400), quality=95)) for i in range(9)])
    plain, read = storage.open_place, []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(len(data := super().read(size)))
            return data

    monkeypatch.setattr(storage, "open_place", lambda place: Counted(place))
    assert len(sources.tars(path)[0].scan().entries) == 9
    assert sum(read) < 9 * 1024 + 12000 < plain(path).seek(0, io.SEEK_END) / 10


def test_a_name_that_is_no_name_is_one_line(tmp_path):
    data, places_ = photo_tar(tmp_path / "a.tar")
    at, body = places_[1]
    data[at : at + 100] = bytes(100)
    data[at:body] = checksummed(data[at:body])
    assert scanned(tmp_path / "a.tar", data) == (["sa_0", "sa_2", "sa_3"], ["not an image file"])


def test_tars_that_cannot_be_opened_are_a_line_each(tmp_path):
    photo_tar(tmp_path / "good.tar", count=1)
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "nowhere.tar").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    scans = {shard.stem: shard.scan() for shard in sources.tars(str(tmp_path / "*.tar"))}
    assert [entry.key for entry in scans.pop("good").entries] == ["sa_0"]
    said = {stem: scan.rejected[0].reason for stem, scan in scans.items() if not scan.entries}
    assert said == {
        "folder": f"{tmp_path / 'folder.tar'}: a folder, not a file",
        "loop": f"{tmp_path / 'loop.tar'}: a link to nothing: Too many levels of symbolic links",
        "nowhere": f"{tmp_path / 'nowhere.tar'}: a link to nothing: No such file or directory",
        "pipe": f"{tmp_path / 'pipe.tar'}: not a plain file (a named pipe, a socket or a device)",
    }


def test_a_disk_that_fails_in_a_tar_costs_its_tail(tmp_path, monkeypatch):
    photo_tar(tmp_path / "a.tar")
    plain = sources._whole_members

    def failing(*args):
        yield next(plain(*args))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources, "_whole_members", failing)
    assert scanned(tmp_path / "a.tar") == (["sa_0"], [f"{tmp_path / 'a.tar'} cannot be read: Input/output error"])


def test_tars_without_images_say_so(tmp_path):
    none = ([], ["the tar holds no images"])
    assert scanned(pack(tmp_path / "a.tar", [])) == none
    assert scanned(pack(tmp_path / "a.tar", [("./sa_1.json", b"{}")])) == none


def test_other_names_of_one_key_are_other_images(tmp_path):
    names = ["./北京.jpg", "上海.jpg", "sa 1.jpg", "./sa_1.jpg", "a/b.jpg", "a_b.jpg", "a_b.png", "./sa 1.jpg"]
    keys, reasons = scanned(pack(tmp_path / "a.tar", [(name, encoded()) for name in names]))
    assert [re.sub("-[0-9a-f]{10}$", "-*", key) for key in keys] == [
        *("image", "image-*", "sa_1", "sa_1-*", "a_b", "a_b-*", "a_b-*")
    ]
    assert len(set(keys)) == 7 and reasons == ["duplicate key; the first good one is used"]


def test_the_first_good_copy_of_an_image_is_used(tmp_path):
    broken, good = encoded(picture(99, 99))[:-400], encoded(picture(20, 30))
    path = pack(tmp_path / "a.tar", [("./a.jpg", broken), ("a.jpg", b"<html>"), ("./a.jpg", good), ("b.jpg", good)])
    assert scanned(path) == (["a", "b"], ["duplicate key; the first good one is used"] * 2)
    assert sources.tars(path)[0].scan().entries[0].load().rgb.shape == (3, 20, 30)
    pack(path, [("./a.jpg", broken), ("./a.jpg", b"<html>")])
    with pytest.raises(BadImageError, match="truncated"):
        sources.tars(path)[0].scan().entries[0].load()


@pytest.mark.parametrize("data", [b"", b"<html>not a tar</html>" * 99, b"\x1f\x8b\x08" + b"1" * 2000])
def test_what_is_no_tar_gives_one_line(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    scan = sources.tars(tmp_path / "a.tar")[0].scan()
    assert not scan.entries and len(scan.rejected) == 1


def test_names_that_are_not_utf8_can_be_written_down(tmp_path):
    path = pack(tmp_path / "a.tar", [("./sa_xx.jpg", encoded()), ("./sa_yy.txt", b"1")])
    path.write_bytes(fix_headers(path.read_bytes(), {b"sa_xx": b"sa_\xff\xfe", b"sa_yy": b"sa_\xff\xfd"}))
    scan = sources.tars(path)[0].scan()
    assert len(scan.entries) == 1 and len(scan.rejected) == 1
    for one in (scan.entries[0], scan.rejected[0]):
        (one.key + one.origin).encode("utf-8")


def fix_headers(data: bytes, changes: dict[bytes, bytes]) -> bytes:
    for old, new in changes.items():
        at = data.index(b"./" + old)
        header = checksummed(bytearray(data[at : at + 512].replace(old, new)))
        data = data[:at] + bytes(header) + data[at + 512 :]
    return data


def test_brace_ranges_and_globs(tmp_path):
    for i in range(3):
        pack(tmp_path / f"sa_00000{i}.tar", [])
    stems = ["sa_000000", "sa_000001", "sa_000002"]
    assert [s.stem for s in sources.tars(str(tmp_path / "sa_{000000..000002}.tar"))] == stems
    assert [s.stem for s in sources.tars([str(tmp_path / "sa_00*.tar"), tmp_path / "sa_000001.tar"])] == stems
    assert storage.expand("{a,b}{8..10}") == ["a8", "a9", "a10", "b8", "b9", "b10"]
    with pytest.raises(FileNotFoundError, match=r"sa_000003.tar and 1 more: no such tar"):
        sources.tars(str(tmp_path / "sa_{000000..000004}.tar"))
    with pytest.raises(FileNotFoundError, match="none_"):
        sources.tars(str(tmp_path / "none_*.tar"))


def test_two_tars_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="would both write sa_1-000.tar"):
        sources.tars([pack(tmp_path / "sa_1.tar", []), pack(tmp_path / "b" / "sa_1.tar", [])])


# --- folders, pairs, scenes, wheels -----------------------------------------------------------------------------------


def test_folder_in_sorted_order_with_unique_safe_keys(tmp_path):
    root = tmp_path / "my photos"
    for name in ("b/1.jpg", "b_1.jpg", "a.v2.png", "ü ber.JPG", "deep/er/x.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "broken.jpg").write_bytes(b"")
    shards = sources.folders(root, per_shard=4)
    entries = [entry for shard in shards for entry in shard.scan().entries]
    keys = [entry.key for entry in entries]
    assert [s.stem for s in shards] == ["my_photos_000000", "my_photos_000001"]
    assert len(shards[0].scan().entries) == 4 and len(set(keys)) == len(keys) == 6
    assert not any(set(key) & set("./ ü") for key in keys)
    assert "a_v2" in keys and "deep_er_x" in keys and sum(key.startswith("b_1-") for key in keys) == 2
    assert [e.origin for e in entries] == sorted(e.origin for e in entries)
    with pytest.raises(BadImageError, match="empty"):
        entries[[e.origin for e in entries].index("my photos/broken.jpg")].load()
    assert entries[0].load().rgb.shape == (3, 8, 8)


def test_glob_of_photos_and_no_photos(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    [shard] = sources.folders(str(tmp_path / "[01].png"))
    assert [e.key for e in shard.scan().entries] == ["0", "1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no photos"):
        sources.folders(tmp_path / "empty")


def test_a_file_that_vanishes_is_a_bad_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entry = sources.folders(tmp_path)[0].scan().entries[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImageError, match="No such file"):
        entry.load()


def test_links_to_nothing_and_pipes_in_a_folder_are_named(tmp_path):
    for name in ("a.jpg", "z.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "absent")
    (tmp_path / "album.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    first, second = sources.folders(tmp_path, per_shard=1)
    assert [entry.key for shard in (first, second) for entry in shard.scan().entries] == ["a", "z"]
    assert [(Path(one.origin).name, one.reason) for one in first.scan().rejected] == [
        ("dead.jpg", "a link to nothing: No such file or directory"),
        ("pipe.png", "not a plain file (a named pipe, a socket or a device)"),
    ]
    assert second.scan().rejected == ()
    with pytest.raises(BadImageError, match="named pipe"):
        sources.folders(str(tmp_path / "*.png"))[0].scan().entries[0].load()


def test_keys_stay_short_and_distinct():
    first, second = sources.safe_key("x" * 300 + "/a" + "y" * 150), sources.safe_key("z" * 300 + "/a" + "y" * 150)
    assert first != second and max(len(first), len(second)) <= 120
    assert len(sources.safe_key("\udcff" + "x" * 300)) <= 120, "a name that is not UTF-8"
    assert sources.safe_key("../..") and "." not in sources.safe_key("a.b.c")


def make_pairs(folder, count=3):
    folder.mkdir()
    rows = ["name\trgb\tdepth\tscale_to_metres\tinvalid\tkind"]
    for i in range(count):
        picture(seed=i).save(folder / f"{i}.png")
        np.save(folder / f"{i}.npy", np.linspace(0, 8, 24 * 36, dtype=np.float32).reshape(24, 36))
        rows.append(f"room.{i}\t{i}.png\t{i}.npy\t0.5\t0\tdepth")
    (folder / "INDEX.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_pairs_carry_truth_and_can_be_split(tmp_path):
    folder = make_pairs(tmp_path / "rgbd")
    photo = sources.pairs(folder)[0].scan().entries[1].load()
    assert photo.truth.kind == Kind.METRIC_DEPTH and photo.truth.values.shape == (1, *photo.rgb.shape[1:])
    assert photo.truth.values.max() == 4.0 and not photo.truth.valid[0, 0, 0] and photo.key == "room_1"
    [shard] = sources.pairs(folder, names=["room.2"])
    assert [e.origin for e in shard.scan().entries] == ["rgbd:room.2"]
    (folder / "0.npy").write_bytes(b"not numpy")
    with pytest.raises(BadImageError, match="0.npy"):
        sources.pairs(folder)[0].scan().entries[0].load()


def test_scenes_are_exact_and_named_by_seed(monkeypatch):
    def render(seed, *, size, kind):  # the real one draws its textures first, for seconds
        depth = torch.full(size, float(seed))
        return SimpleNamespace(image=torch.full((3, *size), 0.5), depth=depth, valid=depth > 0, kind=kind)

    monkeypatch.setattr(sources.procedural, "render", render)
    shards = sources.scenes(3, size=(24, 32), seed=5, per_shard=2)
    entries = [e for s in shards for e in s.scan().entries]
    assert [e.key for e in entries] == ["scene_000005", "scene_000006", "scene_000007"] and len(shards) == 2
    assert len(sources.combine(shards, sources.scenes(3, seed=8), sources.scenes(3, seed=5, kind="street"))) == 4
    photo = entries[1].load()
    assert photo.rgb.dtype == torch.uint8 and photo.rgb.shape == (3, 24, 32) and photo.rgb[0, 0, 0] == 128
    assert photo.truth.kind == Kind.METRIC_DEPTH and (photo.truth.values == 6).all() and photo.truth.valid.all()
    assert [e.key for e in sources.scenes(1, kind="street")[0].scan().entries] == ["scene_street_000000"]


def test_wheels_have_seven_photos_and_one_truth():
    if not all(importlib.util.find_spec(name) for name in ("skimage", "sklearn")):
        pytest.skip("the demo extra is not installed")
    photos = {e.key: e.load() for e in sources.wheels()[0].scan().entries}
    assert sorted(photos) == ["astronaut", "chelsea", "china", "coffee", "flower", "motorcycle_left", "rocket"]
    truth = photos["motorcycle_left"].truth
    depth = truth.values[truth.valid]
    assert truth.values.shape[1:] == photos["motorcycle_left"].rgb.shape[1:]
    assert 2.0 < depth.min() < depth.max() < 5.5 and 0.9 < truth.valid.float().mean() < 1.0
    assert all(photo.truth is None for key, photo in photos.items() if key != "motorcycle_left")


def test_absent_wheels_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "depth-distill\[demo\]"'):
        sources.wheels()


def test_everything_goes_to_worker_processes(tmp_path):
    make_pairs(tmp_path / "rgbd")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tar = pack(tmp_path / "a.tar", [("./sa_1.jpg", encoded())])
    shards = sources.combine(sources.tars(tar), sources.folders(tmp_path / "a.png"), sources.pairs(tmp_path / "rgbd"))
    for shard in pickle.loads(pickle.dumps(shards)):
        assert pickle.loads(pickle.dumps(shard.scan().entries[0])).load().rgb.dtype == torch.uint8


# --- addresses --------------------------------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server that answers byte ranges, and counts the bytes it sends."""

    sent = 0

    def do_GET(self):
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        Ranges.sent += len(data)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def same_scan(remote, local):
    assert [(e.key, e.origin) for e in remote.entries] == [(e.key, e.origin) for e in local.entries]
    assert remote.rejected == local.rejected
    for a, b in zip(remote.entries, local.entries, strict=True):
        assert torch.equal(a.load().rgb, b.load().rgb)


def test_tars_in_another_file_system_are_those_on_disk(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = pack(tmp_path / "sa_0.tar", [("./sa_1.jpg", encoded(picture(20, 30))), ("../up.jpg", b"1")])
    memory = fsspec.filesystem("memory")
    memory.pipe("/photos/sa_0.tar", path.read_bytes())
    memory.pipe("/photos/sa_1.tar", path.read_bytes()[:900])
    [whole, cut] = sources.tars("memory://photos/sa_{0..1}.tar")
    assert (whole.stem, cut.stem) == ("sa_0", "sa_1")
    same_scan(whole.scan(), sources.tars(path)[0].scan())
    assert cut.scan().rejected[-1].reason.startswith("the tar is cut: it ends")
    assert [s.stem for s in sources.tars("memory://photos/sa_*.tar")] == ["sa_0", "sa_1"]
    assert [s.stem for s in sources.tars(["memory://photos/sa_1.tar", path])] == ["sa_0", "sa_1"]
    with pytest.raises(FileNotFoundError, match="memory://photos/sa_7.tar: no such tar"):
        sources.tars("memory://photos/sa_7.tar")
    with pytest.raises(ValueError, match="nowhere://x.tar cannot be opened"):
        sources.tars("nowhere://x.tar")
    with pytest.raises(ValueError, match="a pipe has no middle"):
        sources.tars("pipe:curl http://host/sa_0.tar")
    pickle.loads(pickle.dumps(whole)).scan().entries[0].load()


def test_a_tar_behind_http_is_read_by_ranges(tmp_path, served):
    members = [(f"./sa_{i}.jpg", encoded(noise(400), quality=95)) for i in range(12)]
    path = pack(tmp_path / "sa_0.tar", members)
    [shard] = sources.tars(f"{served}/sa_0.tar")
    Ranges.sent = 0
    scan = shard.scan()
    assert Ranges.sent < path.stat().st_size * 0.7, "listing it does not fetch it"
    same_scan(scan, sources.tars(path)[0].scan())
