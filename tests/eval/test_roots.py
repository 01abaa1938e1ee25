"""Roots of benchmarks as people have them: a folder too high, or as the data's own host ships them."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from distill.eval.benchmarks import _nyu_mat, da2k, diode, eth3d, kitti, nyu, sintel
from distill.eval.completeness import check_benchmark


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


DIODE = ("indoors/s/x.png", "indoors/s/x_depth.npy", "indoors/s/x_depth_mask.npy")
DRIVE = "2011_09_26_drive_0002_sync"
RGB = f"2011_09_26/{DRIVE}/image_02/data/0000000069.png"
DEPTH = f"{DRIVE}/proj_depth/groundtruth/image_02/0000000069.png"


@pytest.mark.parametrize("above", ["", "val/", "diode/val/"])
def test_a_folder_above_will_do(tmp_path, above):
    (tmp_path / "list.txt").write_text(" ".join(DIODE) + "\n")
    touch(tmp_path / "root", *(above + name for name in DIODE))
    (sample,) = diode.samples(tmp_path / "root", tmp_path / "list.txt")
    assert sample.key == DIODE[0]


def test_doctor_looks_where_scoring_does_and_says_how_files_should_lie(tmp_path):
    """Sintel's archives unpacked apart, as jiah-cloud/Align3R#27 has them; a root of something else."""
    touch(tmp_path / "root", "MPI-Sintel-complete/training/final/alley_1/frame_0001.png")
    touch(tmp_path / "root", "MPI-Sintel-depth/training/depth/alley_1/frame_0001.dpt")
    assert [sample.key for sample in sintel.samples(tmp_path / "root")] == ["training/final/alley_1/frame_0001.png"]
    said = check_benchmark("sintel", tmp_path / "root")
    assert any(finding.level == "ok" and finding.what.startswith("1 image") for finding in said)
    touch(tmp_path / "other", "a.txt")
    (bad,) = (finding for finding in check_benchmark("nyu", tmp_path / "other") if finding.level == "bad")
    assert bad.what.startswith("0 images") and bad.remedy == "expected layout: test/SCENE/rgb_N.png with depth_N.png"


def test_kitti_as_it_is_shipped(tmp_path):
    (tmp_path / "list.txt").write_text(f"{RGB} {DEPTH} 721.5\n")
    touch(tmp_path / "root", f"kitti_raw/{RGB}", f"data_depth_annotated/val/{DEPTH}")
    (sample,) = kitti.samples(tmp_path / "root", tmp_path / "list.txt")
    assert sample.key == RGB
    with pytest.raises(OSError, match="empty file"):
        sample.image()


@pytest.mark.parametrize("jpgs", ["multi_view_training_dslr_jpg", "."])
def test_eth3d_as_it_is_shipped(tmp_path, jpgs):
    rgb, depth = ("courtyard/images/dslr_images/X.JPG", "courtyard/ground_truth_depth/dslr_images/X.JPG")
    (tmp_path / "list.txt").write_text(f"rgb/{rgb} depth/courtyard_dslr_depth/{depth}\n")
    touch(tmp_path / "root", f"{jpgs}/{rgb}", depth)
    (sample,) = eth3d.samples(tmp_path / "root", tmp_path / "list.txt")
    assert sample.key == f"rgb/{rgb}"


def labelled_mat(path, scenes, first=0):
    """A file such as the authors', with as many images as there are names, of 8 x 12 pixels."""
    with h5py.File(path, "w") as file:
        count = len(scenes)
        images = np.arange(count * 3 * 12 * 8, dtype=np.uint64).reshape(count, 3, 12, 8) % 251
        file["images"] = images.astype(np.uint8)
        file["rawDepths"] = np.arange(count * 12 * 8, dtype=np.float32).reshape(count, 12, 8) / 100
        refs = file.create_dataset("scenes", (1, count), h5py.ref_dtype)
        for i, scene in enumerate(scenes):
            refs[0, i] = file.create_dataset(f"#refs#/{i}", data=np.array([[ord(c)] for c in scene], np.uint16)).ref
    return path


def test_nyu_as_it_is_shipped(tmp_path, monkeypatch):
    (tmp_path / "nyu").mkdir()
    mat = labelled_mat(tmp_path / "nyu" / "nyu_depth_v2_labeled.mat", ["kitchen_0004", "kitchen_0004", "office_0005"])
    monkeypatch.setattr(_nyu_mat, "_TEST", "1 3")
    for root in (mat, tmp_path / "nyu", tmp_path):
        first, last = nyu.samples(root)
    assert (first.key, last.key) == ("test/kitchen_0004/rgb_0001.png", "test/office_0005/rgb_0003.png")
    with h5py.File(mat) as file:
        images, depths = file["images"][2], file["rawDepths"][2]
    assert last.image().shape == (3, 8, 12) and last.image()[1, 5, 7] == images[1, 7, 5] / np.float32(255)
    assert np.array_equal(_nyu_mat.depth(mat, last.key), depths.T)
    (tmp_path / "list.txt").write_text("test/office_0005/rgb_0003.png test/office_0005/depth_0003.png\n")
    assert [sample.key for sample in nyu.samples(mat, tmp_path / "list.txt")] == [last.key]
    found = check_benchmark("nyu", mat)
    assert found[0].level == "bad" and "2 images, not the 654" in found[0].what
    (tmp_path / "other.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(OSError, match=r"other.mat is not a readable .mat"):
        nyu.samples(tmp_path / "other.mat")


def test_the_test_split_of_nyu_has_its_654_images():
    numbers = _nyu_mat._test()
    assert len(numbers) == len(set(numbers)) == 654 and (numbers[0], numbers[-1]) == (1, 1449)


def test_what_is_not_found_is_said_with_what_was_looked_for(tmp_path):
    touch(tmp_path, "labeled.mat")
    with pytest.raises(
        ValueError, match=r"test/SCENE/rgb_N\.png.*searched here and.*below.*only .mat read is NYU's nyu_depth_v2"
    ):
        nyu.samples(tmp_path)


def test_an_annotated_image_that_is_not_there_says_how_many_are_not(tmp_path):
    pair = [{"point1": [1, 2], "point2": [3, 4], "closer_point": "point1"}]
    touch(tmp_path, "images/indoor/a.jpg")
    (tmp_path / "annotations.json").write_text(json.dumps({f"images/indoor/{name}.jpg": pair for name in "abc"}))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images are missing, such as images/indoor/b.jpg"):
        da2k.samples(tmp_path)[1].image()
