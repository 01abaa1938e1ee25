"""A damaged tar gives every good image and a reason for the rest."""

from __future__ import annotations

import io
import os
import re
import tarfile

import numpy as np
import pytest

from distill.data import sources, storage, tars
from distill.data.photos import BadImageError
from distill.inference.inputs import survey
from tests.data.pictures import close, encoded, noise, pack, picture


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
        "sa_13.jpg": "not a plain file (a link or a dev",
    }
    assert scan.skipped == ((".json", 1), (".txt", 1)), "neither good nor bad: not ours"
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
        inside = [end for start, end in zip([0, *ends], ends, strict=False) if start + 1024 < cut < end]
        for end in inside:  # as much as a member's data lacks
            said = f"the tar is cut: it ends {end - cut} bytes before the end of this file"
            assert scan.rejected[0].reason == said
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


def test_the_end_mark_may_be_one_block_and_no_less(tmp_path):
    data, places_ = photo_tar(tmp_path / "a.tar", count=1)
    end = places_[0][1] + 512 * -(-len(encoded(picture(seed=0))) // 512)
    assert scanned(tmp_path / "a.tar", data[: end + 512]) == (["sa_0"], [])
    for rest in (0, 100):
        said = f"the tar has no end mark: it may have been cut at byte {end + rest}"
        assert scanned(tmp_path / "a.tar", data[: end + rest]) == (["sa_0"], [said])


def test_a_broken_header_before_a_large_file_or_none(tmp_path):
    # Of nearly 1 MiB, so that what follows lies in the next part that is read.
    large = encoded() + np.random.default_rng(0).bytes(2**20 - 512 - len(encoded()))
    path = pack(tmp_path / "a.tar", [("a.jpg", large), ("b.jpg", encoded())])
    whole = path.read_bytes()
    assert scanned(path, b"\xaa" * 512 + whole[512:])[0] == ["b"]
    path = pack(tmp_path / "a.tar", [("a.jpg", encoded()), ("b.jpg", large)])
    at = len(whole) - len(path.read_bytes()) + path.read_bytes().index(b"b.jpg")
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\xaa" * 512
    assert scanned(path, data) == (["a"], [f"the tar is damaged at byte {at}: what follows is lost"])
    data = bytearray(pack(path, [("a.jpg", encoded()), ("empty.txt", b""), ("b.jpg", encoded())]).read_bytes())
    at = data.index(b"empty.txt")
    data[at : at + 512] = b"\xaa" * 512
    lost = f"the tar is damaged at byte {at}: 512 bytes are lost, up to the next whole header"
    assert scanned(path, data) == (["a", "b"], [lost])


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
    assert scanned(tmp_path / "a.tar", data) == (["sa_0", "sa_2", "sa_3"], ["its header has no name"])


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
    plain = tars._whole_members

    def failing(*args):
        yield next(plain(*args))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tars, "_whole_members", failing)
    assert scanned(tmp_path / "a.tar") == (["sa_0"], [f"{tmp_path / 'a.tar'} cannot be read: Input/output error"])


def test_tars_without_images_say_so(tmp_path):
    none = ([], ["the tar holds no images"])
    assert scanned(pack(tmp_path / "a.tar", [])) == none
    assert scanned(pack(tmp_path / "a.tar", [("./sa_1.json", b"{}")])) == ([], ["the tar holds no images, but 1 .json"])


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
    path = pack(tmp_path / "a.tar", [("./sa_xx.jpg", encoded()), ("./sa_yy.jpg", b"")])
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


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html>", "not a tar: it is text, beginning"),
        (b"version https://git-lfs.g", "not a tar: it is a git-lfs pointer"),
        (b"", "not a tar: it is empty"),
        (b"PK\3\4" + bytes(600), "it is compressed with zip: unpack it"),
        (b"\x1f\x8b" + bytes(600), "it is compressed with gzip: unpack it"),
    ],
)
def test_a_page_in_a_tars_place_is_named(tmp_path, data, what):
    (tmp_path / "a.tar").write_bytes(data)
    (one,) = sources.tars(tmp_path / "a.tar")[0].scan().rejected
    assert one.reason.startswith(what)
    (tmp_path / "a.txt").write_text("file_name\tcdn_link\n")
    (one,) = sources.tars(tmp_path / "a.txt")[0].scan().rejected
    assert one.reason.endswith("; give the tars that it lists")


def test_a_folder_is_its_tars_and_other_fields_of_a_sample_are_no_photos(tmp_path):
    data = encoded()
    pack(tmp_path / "a.tar", [("1.jpg", data), ("1.depth.png", data), ("2.rgb.jpg", data), ("2.Mask.png", data)])
    pack(tmp_path / "b.tar", [("3.jpg", data)])
    (tmp_path / "a_stats.json").touch()
    scans = [shard.scan() for shard in sources.tars(tmp_path)]
    assert [entry.key for scan in scans for entry in scan.entries] == ["1", "2_rgb", "3"]
    assert dict(scans[0].skipped) == {".depth.png": 1, ".mask.png": 1}
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none: no .tar in this folder"):
        sources.tars(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r'there are 2 .tar.* give the tars as tars = "FOLDER/\*.tar"'):
        sources.folders(tmp_path)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.tar").read_bytes())
    with pytest.raises(BadImageError, match="a tar archive: unpack it"):
        sources.folders(tmp_path)[0].scan().entries[0].load()


def test_a_folder_of_photos_has_no_other_fields_of_a_sample_either(tmp_path):
    data = encoded()
    for name in ("1.jpg", "1.depth.png", "1.depth.exr"):
        (tmp_path / name).write_bytes(data)
    (scan,) = [shard.scan() for shard in sources.folders(tmp_path)]
    assert [entry.key for entry in scan.entries] == ["1"] and not scan.rejected
    assert dict(scan.skipped) == {".depth.png": 1, ".depth.exr": 1}, "a folder is read as a tar of it"
    found = survey([str(tmp_path)], out=tmp_path / "out")
    assert [job.path.name for job in found.jobs] == ["1.jpg"] and found.skipped[".depth.png"] == 1
    (by_name,) = survey([str(tmp_path / "1.depth.png")], out=tmp_path / "out").jobs
    assert by_name.path.name == "1.depth.png", "whoever names it means it"


@pytest.mark.parametrize("name", ["sa_000000.tar.gz", "sa.tar.aa", "10000000_1_n.tar?_nc_cat=1&oh=00_AB"])
def test_what_a_folder_has_in_place_of_tars_is_said(tmp_path, name):
    """As SA-1B's links download it (facebookresearch/segment-anything#802), packed, split or under the link's name."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"unpack {re.escape(name)}, join its parts into a .tar"):
        sources.tars(tmp_path)


def test_a_tar_of_nothing_but_broken_headers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_MOST_DAMAGED", 20)
    body = b"8 a=bcd\n"
    head = tarfile.TarInfo("p")
    head.type, head.size = tarfile.XHDTYPE, len(body)
    path = tmp_path / "a.tar"
    path.write_bytes((head.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")) * 3000 + bytes(1024))
    found = list(tars.walk_tar(path))
    assert len(found) == 22 and "damaged in more than 20 places" in found[-1][1]
