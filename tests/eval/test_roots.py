"""Roots of benchmarks as people have them: a folder too high, or as the data's own host ships them."""

from __future__ import annotations

import pytest

from distill.eval.benchmarks import diode, kitti, nyu


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


def test_kitti_as_it_is_shipped(tmp_path):
    (tmp_path / "list.txt").write_text(f"{RGB} {DEPTH} 721.5\n")
    touch(tmp_path / "root", f"kitti_raw/{RGB}", f"data_depth_annotated/val/{DEPTH}")
    (sample,) = kitti.samples(tmp_path / "root", tmp_path / "list.txt")
    assert sample.key == RGB
    with pytest.raises(OSError, match="empty file"):
        sample.image()


def test_what_is_not_found_is_said_with_what_was_looked_for(tmp_path):
    touch(tmp_path, "nyu_depth_v2_labeled.mat")
    with pytest.raises(ValueError, match=r"test/SCENE/rgb_N\.png.*looked here and.*below.*\.mat is not read"):
        nyu.samples(tmp_path)
