"""Benchmarks with litter, lost files, copies, foreign lists and resized maps: read right, or refused in a line."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from distill.app.cli import main
from distill.eval.benchmarks import _nyu_mat, da2k, diode, ibims, kitti, nyu, scannet, sintel
from distill.eval.completeness import check_benchmark
from distill.eval.score import score
from tests.eval.test_benchmarks import DEPTH, RGB, content, image, npy, put
from tests.eval.test_roots import labelled_mat

IBIMS = {
    f"{folder}/a.png": image(np.full((4, 6), 200, np.uint16 if folder == "depth" else np.uint8))
    for folder in ("depth", "mask_invalid", "mask_transp")
} | {"rgb/a.png": image(np.zeros((4, 6, 3), np.uint8))}


def listed(tmp_path, *lines):
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode())
    return tmp_path / "list.txt"


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_what_a_mac_or_a_disk_station_leaves_behind_is_no_image(tmp_path, form):
    litter = {name.replace("/a", "/._a"): b"\0\5\x16\7" for name in IBIMS}
    litter |= {f"__MACOSX/{name}": b"" for name in IBIMS} | {"rgb/@eaDir/a.png": b"", "rgb/Thumbs.db": b""}
    assert [sample.key for sample in ibims.samples(put(tmp_path, IBIMS | litter, form))] == ["rgb/a.png"]


def test_an_image_that_lacks_a_file_is_not_passed_over(tmp_path):
    root = put(tmp_path, IBIMS | {"rgb/b.png": b"", "depth/b.png": b"", "mask_invalid/b.png": b""}, "folder")
    with pytest.raises(ValueError, match=r"1 of 2 images lack a file, such as mask_transp/b.png; .* with --list"):
        ibims.samples(root)
    assert len(ibims.samples(root, listed(tmp_path, "rgb/a.png"))) == 1
    only = {RGB["scannet"]: content("scannet")[RGB["scannet"]]}
    with pytest.raises(ValueError, match=r"found 0 images .*1 of 1 images lack a file, such as scene0406_02/depth"):
        scannet.samples(put(tmp_path / "photos", only, "folder"))


def test_nyus_own_file_is_not_read_by_the_names_of_another_list(tmp_path):
    """BTS counts from 0, so its number N is the file's image N + 1, and rgb_00000 would be its last."""
    mat = labelled_mat(tmp_path / "nyu_depth_v2_labeled.mat", ["kitchen_0004", "kitchen_0004", "office_0005"])
    for name in ("kitchen/rgb_00000.jpg", "test/kitchen_0004/rgb_0003.png", "test/office_0005/rgb_0004.png"):
        with pytest.raises(ValueError, match=f"has no {name}: its images are called test/SCENE/rgb_N.png, N from 0001"):
            nyu.samples(mat, listed(tmp_path, f"{name} {name.replace('rgb', 'sync_depth')} 518.8579"))
    (sample,) = nyu.samples(mat, listed(tmp_path, "test/office_0005/rgb_0003.png d.png"))
    assert np.array_equal(_nyu_mat.depth(mat, sample.key)[0, :2], np.float32([1.92, 2.0]))


def test_truth_of_another_size_is_not_cropped(tmp_path):
    half = {RGB["nyu"]: b"", DEPTH["nyu"][0]: image(np.full((240, 320), 2000, np.uint16))}
    (sample,) = nyu.samples(put(tmp_path, half, "folder"), listed(tmp_path, f"{RGB['nyu']} {DEPTH['nyu'][0]}"))
    with pytest.raises(OSError, match=r"depth_0001.png is 240 x 320, not 480 x 640: use NYUv2's own size"):
        sample.truth()
    large = {RGB["kitti"]: image(np.zeros((384, 1280, 3), np.uint8)), DEPTH["kitti"][0]: b""}
    root = put(tmp_path / "kitti", large, "folder")
    (sample,) = kitti.samples(root, listed(tmp_path, f"{RGB['kitti']} {DEPTH['kitti'][0]}"))
    with pytest.raises(ValueError, match=r"384 x 1280 is larger than any image of KITTI"):
        sample.image()


def test_of_two_copies_that_differ_none_is_chosen(tmp_path):
    rgb, depth = RGB["scannet"], DEPTH["scannet"][0]
    files = content("scannet")
    both = {f"{folder}/{name}": data for folder in ("a", "b") for name, data in files.items()}
    names = listed(tmp_path, f"{rgb} {depth}")
    assert scannet.samples(put(tmp_path, both, "folder"), names)[0].truth().values.shape == (1, 24, 32)
    both[f"b/{depth}"] = image(np.full((12, 16), 600, np.uint16))
    with pytest.raises(ValueError, match=rf"(a|b)/{depth} and (a|b)/{depth} differ, .*give the folder of one as root"):
        scannet.samples(put(tmp_path, both, "folder"), names)


@pytest.mark.parametrize(
    "line", ["./{} ./{}", "/mnt/bn/scannet/{} /mnt/bn/scannet/{}", "/{} /{}", "{},{}", "{}, {}, 7"]
)
def test_lists_as_others_write_them(tmp_path, line):
    root = put(tmp_path, content("scannet"), "folder")
    line = line.format(RGB["scannet"], DEPTH["scannet"][0])
    for text in (line, line.replace("/", "\\"), "C:" + line if line[0] == "/" else line):
        assert [sample.key for sample in scannet.samples(root, listed(tmp_path, text))] == [RGB["scannet"]]


def test_absolute_paths_of_kitti_have_their_published_names(tmp_path):
    """Depth Anything V2's list of KITTI has the paths of its authors' disk."""
    rgb, depth = RGB["kitti"], DEPTH["kitti"][0]
    root = put(tmp_path, {f"raw/{rgb}": b"", f"data_depth_annotated/val/{depth}": b""}, "folder")
    line = f"/mnt/bn/Kitti/raw_data/{rgb} /mnt/bn/Kitti/data_depth_annotated/val/{depth}"
    assert [sample.key for sample in kitti.samples(root, listed(tmp_path, line))] == [rgb]
    with pytest.raises(ValueError, match=r"line 1 leaves the root \(/x/y.png: its path is absolute\)"):
        kitti.samples(root, listed(tmp_path, "/x/y.png /x/z.png"))
    with pytest.raises(ValueError, match=r"line 1 begins with 2011_09_26/drive, not the path of an image file"):
        kitti.samples(root, listed(tmp_path, "2011_09_26/drive 0000000069 l"))


def test_diode_keeps_its_parts_and_packed_files_are_named(tmp_path):
    root = put(tmp_path, {f"val/{name}": data for name, data in content("diode").items()}, "folder")
    line = " ".join(f"val/{name}" for name in (RGB["diode"], *DEPTH["diode"]))
    assert [sample.group for sample in diode.samples(root, listed(tmp_path, line))] == ["indoors"]
    for name, said in [
        ("val.tar.gz", "val.tar.gz should be unpacked, or given as root itself"),
        ("DIODE.zip", "DIODE.zip should be unpacked"),
        ("data/val-0.parquet", "data/val-0.parquet is not read"),
    ]:
        with pytest.raises(ValueError, match=said):
            diode.samples(put(tmp_path / name, {name: npy(np.zeros(3))}, "folder"))
    (tmp_path / "DA-2K.zip").write_bytes(b"PK\3\4")
    for place in (tmp_path, tmp_path / "DA-2K.zip"):
        with pytest.raises((ValueError, OSError), match=r"DA-2K.zip.*unpack"):
            da2k.samples(place)
    (tmp_path / "DA-2K" / "DA-2K").mkdir(parents=True)
    (tmp_path / "DA-2K" / "DA-2K" / "annotations.json").write_text("{}")
    assert da2k.samples(tmp_path) == []


def scored(tmp_path, module, samples, mode="marigold"):
    """The score of a prediction of 3 m everywhere."""
    (sample,) = samples
    path = tmp_path / "store" / sample.prediction_path
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((24, 32), 3.0, np.float32))
    return score(tmp_path / "store", "metric_depth", samples, module.PROTOCOL, mode=mode)


def test_a_mask_that_counts_pixels_without_depth_is_refused_and_its_nan_is_none(tmp_path):
    files, line = content("diode"), " ".join((RGB["diode"], *DEPTH["diode"]))
    depth = np.full((24, 32), 3.0, np.float32)
    depth[0, :3] = np.nan, 0, np.inf
    files |= {DEPTH["diode"][0]: npy(depth), DEPTH["diode"][1]: npy(np.ones((24, 32)))}
    samples = diode.samples(put(tmp_path, files, "folder"), listed(tmp_path, line))
    marigold, clean = (scored(tmp_path, diode, samples, mode) for mode in ("marigold", "clean"))
    assert marigold.images[0].problem == "3 of the 768 pixels in the truth's mask are 0, negative or not finite"
    assert marigold.images[0].failed and clean.metrics["abs_rel"] == 0.0
    files[DEPTH["diode"][1]] = npy(np.where(depth == 3, 1.0, np.nan))
    samples = diode.samples(put(tmp_path, files, "folder"), listed(tmp_path, line))
    assert int(samples[0].truth().valid.sum()) == 24 * 32 - 3
    assert scored(tmp_path, diode, samples).metrics["abs_rel"] == 0.0


def test_truth_in_another_unit_is_not_cut_away_at_the_range(tmp_path):
    files, line = content("diode"), " ".join((RGB["diode"], *DEPTH["diode"]))
    depth = np.full((24, 32), 3000.0, np.float32)
    depth[0] = 3.0  # what another tool resampled
    samples = diode.samples(put(tmp_path, files | {DEPTH["diode"][0]: npy(depth)}, "folder"), listed(tmp_path, line))
    with pytest.raises(OSError, match=r"_depth.npy: 95 % of its depth is above 3000 m, but diode ends at 350 m: it is"):
        samples[0].truth()
    files = content("scannet") | {DEPTH["scannet"][0]: image(np.full((24, 32), 15000, np.uint16))}
    root = put(tmp_path / "scannet", files, "folder")
    (sample,) = scannet.samples(root, listed(tmp_path, f"{RGB['scannet']} {DEPTH['scannet'][0]}"))
    with pytest.raises(OSError, match=r"000300.png: 95 % of its depth is above 15 m, but scannet ends at 10 m"):
        sample.truth()


def test_kittis_drives_may_be_linked_beside_their_truth(tmp_path):
    """As zzangjinsun/NLSPN_ECCV20 prepares them; a folder is walked once, under the link's name."""
    rgb, depth = RGB["kitti"], DEPTH["kitti"][0]
    drive = depth.partition("/")[0]
    root = put(tmp_path, {f"kitti_raw/{rgb}": b"", f"data_depth_annotated/val/{depth}": b""}, "folder")
    link = root / "data_depth_annotated/val" / drive / "image_02"
    link.symlink_to(root / "kitti_raw/2011_09_26" / drive / "image_02")
    assert [sample.key for sample in kitti.samples(root, listed(tmp_path, f"{rgb} {depth} 721.5"))] == [rgb]


def test_a_tar_cut_between_two_images_is_not_a_smaller_benchmark(tmp_path):
    more = {name.replace("/a", "/b"): data for name, data in IBIMS.items()}
    root = put(tmp_path, IBIMS | more, "tar")
    assert len(ibims.samples(root)) == 2
    with tarfile.open(root) as tar:
        cut = tar.getmembers()[len(IBIMS)].offset
    root.write_bytes(root.read_bytes()[:cut])
    with pytest.raises(OSError, match=r"root.tar: cut short after 1 images: its end is missing; download it again"):
        ibims.samples(root)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    root, scandir = put(tmp_path, IBIMS, "folder"), os.scandir
    for name in ("other", "lost+found"):
        (root / name).mkdir()
    locked = [root / "lost+found"]

    def guarded(path):
        if Path(path) in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(ibims.samples(root)) == 1
    locked.append(root / "other")
    with pytest.raises(OSError, match=r"root/other: this folder cannot be listed \(Permission denied\): allow it"):
        ibims.samples(root)


def test_images_alone_say_which_file_they_lack_and_doctor_what_is_packed(tmp_path):
    folder = "MPI-Sintel-complete/training"
    root = put(tmp_path, {f"{folder}/{kind}/a/frame_0001.png": b"" for kind in ("final", "clean")}, "folder")
    with pytest.raises(ValueError, match=r"no images of sintel; 1 of 1 images lack a file, such as training/depth/a/f"):
        sintel.samples(root)
    findings = check_benchmark("diode", put(tmp_path / "packed", {"val.tar.gz": b"x"}, "folder"))
    assert any(f.remedy.endswith("; val.tar.gz should be unpacked, or given as root itself") for f in findings)


def test_the_result_itself_says_why_an_image_failed(tmp_path, capsys):
    files = content("scannet") | {DEPTH["scannet"][0]: image(np.full((12, 16), 600, np.uint16))}
    samples = scannet.samples(
        put(tmp_path, files, "folder"), names := listed(tmp_path, f"{RGB['scannet']} {DEPTH['scannet'][0]}")
    )
    scored(tmp_path, scannet, samples)  # stores its map
    named = ["--kind", "metric_depth", "--benchmark", "scannet", "--root", str(tmp_path / "root"), "--list", str(names)]
    assert main(["score", "--predictions", str(tmp_path / "store"), *named]) == 1
    assert "; the first: scene0406_02/color/000300.jpg: the truth is (12, 16), but its image" in " ".join(
        capsys.readouterr().out.split()
    )


def test_da2ks_names_may_begin_with_a_dot(tmp_path):
    pair = {"point1": [1, 2], "point2": [3, 4], "closer_point": "point1"}
    (tmp_path / "annotations.json").write_text(json.dumps({"./images/indoor/a.jpg": [pair], "images/b.jpg": [pair]}))
    names = listed(tmp_path, "images/indoor/a.jpg", "./images/b.jpg")
    assert [sample.key for sample in da2k.samples(tmp_path, names)] == ["./images/indoor/a.jpg", "images/b.jpg"]
