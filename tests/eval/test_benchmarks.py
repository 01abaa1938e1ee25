"""The published benchmarks from folders and tars: found by rule, proven by hash, or named by a list."""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from distill.core.plugins import find
from distill.eval.benchmarks import eth3d
from distill.eval.benchmarks._files import Files
from distill.eval.protocol import list_hash
from distill.eval.score import score

RGB = {
    "nyu": "test/kitchen_0004/rgb_0001.png",
    "kitti": "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png",
    "eth3d": "rgb/office/images/dslr_images/DSC_0219.JPG",
    "scannet": "scene0406_02/color/000300.jpg",
    "diode": "indoors/scene_00021/scan_00189/00021_00189_indoors_200_010.png",
}
DEPTH = {
    "nyu": ["test/kitchen_0004/depth_0001.png"],
    "kitti": ["2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png"],
    "eth3d": ["depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"],
    "scannet": ["scene0406_02/depth/000300.png"],
    "diode": [f"{RGB['diode'][:-4]}_depth.npy", f"{RGB['diode'][:-4]}_depth_mask.npy"],
}
SIZE = {"nyu": (480, 640), "kitti": (375, 1242), "eth3d": (12, 18), "scannet": (24, 32), "diode": (24, 32)}
NAMES = list(RGB)


def image(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def content(name: str) -> dict[str, bytes]:
    """One image of a benchmark and its truth, 3 metres but for a hole and something far away."""
    depth = np.full(SIZE[name], 3.0, np.float32)
    depth[200 if name in ("nyu", "kitti") else 1, 100 if name in ("nyu", "kitti") else 1] = 0.0
    depth[201 if name in ("nyu", "kitti") else 2, 100 if name in ("nyu", "kitti") else 1] = 200.0
    files = {RGB[name]: image(np.zeros((*SIZE[name], 3), np.uint8), "JPEG" if name in ("scannet", "eth3d") else "PNG")}
    if name == "diode":
        arrays = [npy(depth[..., None]), npy((depth > 0).astype(np.float64))]
    elif name == "eth3d":
        arrays = [np.where(depth == 0, np.inf, depth).astype("<f4").tobytes()]
    else:
        arrays = [image((np.minimum(depth, 100) * (256 if name == "kitti" else 600)).astype(np.uint16))]
    return files | dict(zip(DEPTH[name], arrays, strict=True))


def put(tmp_path, files: dict[str, bytes], form: str):
    if form == "folder":
        for name, data in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "root"
    root = tmp_path / f"root.{form}"
    with tarfile.open(root, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}[form]) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}" if form == "tar" else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture
def small_eth3d(monkeypatch):
    monkeypatch.setattr(eth3d, "HEIGHT", SIZE["eth3d"][0])
    monkeypatch.setattr(eth3d, "WIDTH", SIZE["eth3d"][1])


def listed(tmp_path, name: str, *more: str):
    path = tmp_path / "list.txt"
    path.write_text("\n".join([" ".join([RGB[name], *DEPTH[name], "721.5"]), *more]))
    return path


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_list_and_a_root_make_samples(tmp_path, small_eth3d, name, form):
    if form in ("tar.xz", "tar.bz2") and name != "scannet":
        pytest.skip("packing is the same for all")
    module = find("distill.eval.benchmarks", name)
    (sample,) = module.samples(put(tmp_path, content(name), form), listed(tmp_path, name))
    assert sample.key == RGB[name]
    height, width = (352, 1216) if name == "kitti" else SIZE[name]
    truth, picture = sample.truth(), sample.image()
    assert picture.shape == (3, height, width) and picture.is_contiguous() and float(picture.max()) == 0
    assert truth.values.shape == (1, height, width) and truth.kind == "metric_depth"
    expected = {
        "nyu": 426 * 560 - 2,
        "kitti": 204 * 1129 - 2,
        "eth3d": 12 * 18 - 1,
        "scannet": 24 * 32 - 2,
        "diode": 24 * 32 - 1,
    }
    assert int(truth.valid.sum()) == expected[name]
    metres = 3.0 * 600 / 1000 if name in ("nyu", "scannet") else 3.0
    assert float(truth.values[truth.valid].median()) == pytest.approx(metres)
    assert sample.group == ("indoors" if name == "diode" else "")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_list_the_root_must_hold_the_published_one(tmp_path, monkeypatch, name):
    module = find("distill.eval.benchmarks", name)
    root = put(tmp_path, content(name) | {"readme.txt": b""}, "tar")
    published = module.PROTOCOL
    with pytest.raises(ValueError, match=rf"found 1 images of {name}.*not the {published.num_images} .*--list"):
        module.samples(root)
    monkeypatch.setattr(module, "PROTOCOL", replace(published, num_images=1, list_sha256=list_hash([RGB[name]])))
    assert [s.key for s in module.samples(root)] == [RGB[name]]
    monkeypatch.setattr(module, "PROTOCOL", replace(published, num_images=1))
    with pytest.raises(ValueError, match="not the 1 of the published list"):
        module.samples(root)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_missing_files_are_counted_and_named(tmp_path, form):
    files = content("scannet")
    del files[DEPTH["scannet"][0]]
    root = put(tmp_path, files, form)
    more = ["scene1/color/1.jpg scene1/depth/1.png"]
    with pytest.raises(
        FileNotFoundError, match=r"root.*3 of the 4 files listed are missing: scene0406_02/depth/000300\.png, "
    ):
        find("distill.eval.benchmarks", "scannet").samples(root, listed(tmp_path, "scannet", *more))


def test_rows_without_truth_are_left_out(tmp_path):
    more = ["2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000075.png None 721.5377", ""]
    root = put(tmp_path, content("kitti"), "folder")
    assert len(find("distill.eval.benchmarks", "kitti").samples(root, listed(tmp_path, "kitti", *more))) == 1


def test_faults_of_a_list_are_reported_at_once(tmp_path):
    root = put(tmp_path, content("scannet"), "folder")
    module = find("distill.eval.benchmarks", "scannet")
    path = listed(tmp_path, "scannet", "alone", f"{RGB['scannet']} x", "../a b")
    with pytest.raises(
        ValueError, match=r"list\.txt: line 2 has 1 of 2 columns; line 3 repeats .*; line 4 leaves the root"
    ):
        module.samples(root, path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="the list is empty"):
        module.samples(root, path)
    with pytest.raises(FileNotFoundError, match="no such list"):
        module.samples(root, tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; it should be scannet/scannet_val_sampled"):
        module.samples(tmp_path / "none", path)


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_a_damaged_archive_is_one_line(tmp_path, form):
    root = put(tmp_path, content("scannet"), form)
    data = root.read_bytes()
    for kept in (700, 2100) if form == "tar" else (100, len(data) // 2):
        root.write_bytes(data[:kept])
        with pytest.raises(OSError, match=rf"{re.escape(str(root))}: .*(cut|unpacked|readable)"):
            find("distill.eval.benchmarks", "scannet").samples(root, listed(tmp_path, "scannet"))
    root.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(OSError, match="not a readable tar"):
        find("distill.eval.benchmarks", "scannet").samples(root, listed(tmp_path, "scannet"))


def test_damaged_files_name_the_root_and_themselves(tmp_path, small_eth3d):
    for name, bad, message in [
        ("nyu", b"\x89PNG", "depth_0001.png: truncated: its end is missing"),
        ("nyu", b"", "depth_0001.png: not a readable .png"),
        ("nyu", image(np.full((480, 640, 3), (1, 2, 3), np.uint8)), "has 3 channels"),
        ("eth3d", b"1234", "has 4 bytes; raw float32 of 12 x 18 has 864"),
        ("diode", b"1234", "_depth.npy: not a readable .npy"),
        ("diode", npy(np.zeros((4, 4))), "and its mask have the shapes"),
    ]:
        root = put(tmp_path, content(name) | {DEPTH[name][0]: bad}, "tar")
        (sample,) = find("distill.eval.benchmarks", name).samples(root, listed(tmp_path, name))
        with pytest.raises(OSError, match=re.escape(message)) as error:
            sample.truth()
        assert str(root) in str(error.value)
    small = content("kitti") | {RGB["kitti"]: image(np.zeros((300, 1242, 3), np.uint8))}
    (sample,) = find("distill.eval.benchmarks", "kitti").samples(put(tmp_path, small, "tar"), listed(tmp_path, "kitti"))
    with pytest.raises(ValueError, match="smaller than KITTI's benchmark crop"):
        sample.image()


def test_kitti_is_cropped_to_the_middle_columns_of_the_bottom_rows(tmp_path):
    root = put(tmp_path, content("kitti"), "folder")
    (sample,) = find("distill.eval.benchmarks", "kitti").samples(root, listed(tmp_path, "kitti"))
    truth = sample.truth()
    assert float(truth.values[0, 200 - 23, 100 - 13]) == 0.0 and float(truth.values[0, 201 - 23, 100 - 13]) == 100.0
    rows, columns = truth.valid[0].any(1).nonzero(), truth.valid[0].any(0).nonzero()
    assert [int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])] == [117, 320, 43, 1171]


def test_diodes_mask_decides_alone_for_marigold_and_with_the_range_for_clean(tmp_path):
    module = find("distill.eval.benchmarks", "diode")
    depth = np.full(SIZE["diode"], 3.0, np.float32)
    depth[:, 5], depth[:, 6] = 0.2, 400.0
    files = content("diode") | {DEPTH["diode"][0]: npy(depth), DEPTH["diode"][1]: npy(np.ones(SIZE["diode"]))}
    some = module.samples(put(tmp_path, files, "tar"), listed(tmp_path, "diode"))
    (tmp_path / some[0].prediction_path).parent.mkdir(parents=True)
    np.save(tmp_path / some[0].prediction_path, np.full(SIZE["diode"], 3.0, np.float32))
    marigold, clean = (score(tmp_path, "metric_depth", some, module.PROTOCOL, mode=m) for m in ("marigold", "clean"))
    assert clean.metrics["abs_rel"] == 0.0
    assert marigold.metrics["abs_rel"] == pytest.approx((2.8 / 0.2 + 397 / 400) / 32, rel=1e-5)
    assert marigold.groups["indoors"]["metrics"] == marigold.metrics


def test_a_sparse_member_is_refused_and_a_second_name_of_a_file_is_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        first = tarfile.TarInfo("./a.bin")
        first.size = 16
        tar.addfile(first, io.BytesIO(np.arange(4, dtype="<f4").tobytes()))
        link = tarfile.TarInfo("b.bin")
        link.type, link.linkname = tarfile.LNKTYPE, "./a.bin"
        tar.addfile(link)
    whole = Files(tmp_path / "a.tar")
    assert whole.floats("b.bin", (4,)).tolist() == [0, 1, 2, 3]
    os.truncate(tmp_path / "a.tar", 512 + 9)
    with pytest.raises(OSError, match="a.tar: cut short inside b.bin; download it again"):
        whole.read("b.bin")
    hole = tarfile.TarInfo("hole.bin")
    hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2048"}
    body = b"1\n1024\n1024\n".ljust(512, b"\0") + b"x" * 1024
    hole.size = len(body)
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(hole, io.BytesIO(body))
    with pytest.raises(OSError, match="s.tar: hole.bin is stored sparse: pack it without --sparse"):
        Files(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\3\4" + bytes(600), "a zip archive: unpack it"),
        (b"<!DOCTYPE html>", "text, beginning '<!DOCTYPE html>'; download it again"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 600, "compressed with zstd: unpack it"),
        (bytes(20480), "begins with zeros: an unfinished download; download it again"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path, data, said):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(OSError, match=said):
        Files(tmp_path / "a.tar")


def test_depth_that_a_tool_reduced_to_eight_bits_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(image(np.full((4, 6), 200, np.uint8)))
    with pytest.raises(OSError, match="a.png has 8 bits per pixel, but its depth has 16: a tool reduced it"):
        Files(tmp_path).codes("a.png")
    (tmp_path / "a.png").write_bytes(image(np.full((4, 6), 200, np.uint16)))
    assert (Files(tmp_path).codes("a.png") == 200).all()


def test_a_compressed_tar_is_read_to_its_last_byte(tmp_path):
    """Its last 2 kB, after two pieces of a megabyte, are fewer than Python writes to a file at once."""
    content = bytes(2 << 20) + bytes(range(256)) * 2
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        member = tarfile.TarInfo("a.bin")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    assert Files(tmp_path / "a.tar.gz").read("a.bin") == content


def test_a_packed_tar_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.eval.benchmarks._files._LEAST", 1 << 20)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("a.bin")
        info.size = 1 << 25
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(OSError, match=r"a.tar.gz: could not be unpacked \(it unpacks to more than 200 times its size"):
        Files(tmp_path / "a.tar.gz")
