"""Published data sets: layouts, units, what means nothing, the index, and what bad files say."""

from __future__ import annotations

import argparse
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image

from distill.app.cli import main
from distill.core.depth import Kind
from distill.core.plugins import find
from distill.data import published
from distill.data.datasets import FOLDER, _index
from distill.data.photos import BadImageError
from tests.data.layouts import (
    WRITERS,
    hypersim,
    hypersim_prepared,
    tartanair,
    tartanair_v2,
    virtual_kitti,
    virtual_kitti2,
)

# Rounded as each format rounds: float16, centimetres, millimetres.
OFF = {"hypersim": 2e-3, "virtual_kitti2": 6e-3, "virtual_kitti": 6e-3}


def frames(count=2, height=24, width=32):
    """Images that differ, and slanted depth of 1 to 9 m with a hole at the top left: nothing is symmetrical."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        y, x = np.mgrid[:height, :width]
        depth = (1.0 + number + 0.1 * x + 0.2 * y).astype(np.float32)
        depth[:4, :6] = 0
        made.append((rng.integers(0, 255, (height, width, 3), dtype=np.uint8), depth))
    return made


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_data_set_in_its_authors_layout_is_read_in_its_units(name, tmp_path):
    made = frames()
    WRITERS[name](tmp_path, made)
    done = _index.write(name, tmp_path)
    assert (done.rows, done.groups, done.alone, done.spare, done.resumed) == (2, 1, 0, 0, 0)
    [shard] = published.dataset(name, tmp_path)
    facts = find(FOLDER, name).FACTS
    for (_, depth), row, entry in zip(made, _index.read(name, tmp_path), shard.scan().entries, strict=True):
        photo = entry.load()
        truth = photo.truth
        assert truth is not None and truth.kind == facts.kind
        assert np.array_equal(truth.valid[0].numpy(), depth > 0)
        off = np.abs(truth.values[0].numpy() - depth)[depth > 0]
        assert off.max() <= OFF.get(name, 1e-5) * depth.max()
        assert row.focal == pytest.approx(facts.focal or 575.5)


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_lacks_its_image_or_its_depth_is_counted(name, tmp_path, capsys):
    WRITERS[name](tmp_path, frames(4))
    _index.write(name, tmp_path)
    first, second, third, _ = _index.read(name, tmp_path)
    for path in (first.rgb, second.depth, third.depth):
        (tmp_path / path).unlink()
    index = find("distill.app.verbs", "index")
    index.run(argparse.Namespace(dataset=name, root=tmp_path, out=None))
    said = capsys.readouterr()
    assert "1 image with depth in 1 group (left out: 2 images without depth, 1 depth file without" in said.out
    assert first.depth in said.err and second.rgb in said.err


def test_hypersim_of_the_prepared_layout_and_its_splits(tmp_path):
    made = frames(1)
    hypersim_prepared(tmp_path / "a", made)
    _index.write("hypersim", tmp_path / "a")
    [row] = _index.read("hypersim", tmp_path / "a")
    values, valid = find(FOLDER, "hypersim").read(tmp_path / "a", row)
    assert np.abs(values - made[0][1])[valid].max() < 6e-4 and row.split == "train"

    hypersim(tmp_path / "b", frames(3))
    head = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\n"
    lines = "ai_001_001,cam_00,0,True,,train\nai_001_001,cam_00,1,False,bad,\nai_001_001,cam_00,2,True,,val\n"
    (tmp_path / "b" / "metadata_images_split_scene_v1.csv").write_text(head + lines)
    _index.write("hypersim", tmp_path / "b")
    assert [row.split for row in _index.read("hypersim", tmp_path / "b")] == ["train", "val"]


def test_a_killed_walk_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    for world in ("ocean", "hospital", "soulcity"):
        tartanair(tmp_path, frames(1), world)
    whole = _index.write("tartanair", tmp_path).path.read_bytes()
    plugin = find(FOLDER, "tartanair")
    asked, rows = [], plugin.rows

    def killed(root, group):
        asked.append(group)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rows(root, group)

    monkeypatch.setattr(plugin, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        _index.write("tartanair", tmp_path, tmp_path / "again.tsv")
    aside = tmp_path / ".again.tsv.partial"
    aside.write_text(aside.read_text() + "half a li")
    done = _index.write("tartanair", tmp_path, tmp_path / "again.tsv")
    assert done.resumed == 2 and len(asked) == 4 and done.path.read_bytes() == whole
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_lists_name_images_by_the_index_or_as_published_lists_do(tmp_path):
    WRITERS["irs"](tmp_path, frames(3))
    _index.write("irs", tmp_path)
    line = "IRSDataset/Home/ArchVizInterior03/l_3.png IRSDataset/Home/ArchVizInterior03/r_3.png"
    chosen = _index.read("irs", tmp_path, names=[line, "IRSDataset/Home/ArchVizInterior03/1"])
    assert [row.rgb[-7:] for row in chosen] == ["l_3.png", "l_1.png"]
    with pytest.raises(ValueError, match=r"has no l_9.png \(1 names unknown, 3 known\)"):
        _index.read("irs", tmp_path, names=["l_9.png"])


def test_metres_are_cut_at_the_far_plane_and_unknown_scales_are_not(tmp_path):
    for name, left in (("tartanair", 0.5), ("blendedmvs", 1.0)):
        WRITERS[name](tmp_path / name, frames(1))
        _index.write(name, tmp_path / name)
        [shard] = published.dataset(name, tmp_path / name)
        every = shard.scan().entries[0].load().truth
        [near] = published.within([shard], float(np.median(every.values[every.valid])))
        share = near.scan().entries[0].load().truth.valid.sum() / every.valid.sum()
        assert float(share) == pytest.approx(left, abs=0.05)
    assert find(FOLDER, "blendedmvs").FACTS.kind == Kind.SCALE_DEPTH


def test_bad_files_end_in_one_line_that_names_them(tmp_path):
    hypersim(tmp_path, frames(5))
    depths = tmp_path / "ai_001_001/images/scene_cam_00_geometry_hdf5"
    _index.write("hypersim", tmp_path)
    cut = depths / "frame.0000.depth_meters.hdf5"
    cut.write_bytes(cut.read_bytes()[:900])
    (depths / "frame.0001.depth_meters.hdf5").unlink()
    (depths / "frame.0002.depth_meters.hdf5").write_bytes(b"<html>404</html>")
    small = frames(1, 12, 32)
    hypersim(tmp_path / "other", small)
    odd = tmp_path / "other/ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    (depths / "frame.0003.depth_meters.hdf5").write_bytes(odd.read_bytes())
    with h5py.File(depths / "frame.0004.depth_meters.hdf5", "r+") as file:
        file["dataset"][...] = file["dataset"][()] * 3000
    said = []
    for entry in published.dataset("hypersim", tmp_path)[0].scan().entries:
        with pytest.raises(BadImageError) as error:
            entry.load()
        said.append(str(error.value))
    for number, words in enumerate(
        ("truncated", "no such file", "not a readable .hdf5", "32 x 12, but the image is 32 x 24", "another unit")
    ):
        assert f"frame.{number:04d}.depth_meters.hdf5" in said[number] and words in said[number]
        assert "\n" not in said[number]


def test_a_root_or_an_index_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="`distill index irs .*` writes it"):
        _index.read("irs", tmp_path)
    with pytest.raises(FileNotFoundError, match="no files of IRS found there; its layout is: .*l_N.png"):
        _index.write("irs", tmp_path)
    (tmp_path / "INDEX.irs.tsv").write_text("name\trgb\tdepth\tfocal\tsplit\na\t../../x.png\td\t\t\n")
    with pytest.raises(ValueError, match="line 2 is damaged .its path climbs out"):
        _index.read("irs", tmp_path)


def test_a_root_above_below_or_still_packed_is_said(tmp_path):
    """As SeasonDepth/SeasonDepth#5 has it of DIODE, and DepthAnything/Depth-Anything-V2#138 of Virtual KITTI 2."""
    virtual_kitti2(tmp_path / "data/vkitti2", frames(1, 12, 32))
    for root, words in (
        ("data", "it is in .*/data/vkitti2: give that folder"),
        ("data/vkitti2/Scene01", "it is a part of the data in .*/data/vkitti2: give that folder"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            _index.write("virtual_kitti2", tmp_path / root)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/vkitti_2.0.3_rgb.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"vkitti_2.0.3_rgb.tar should be unpacked; its layout is: SceneXX/"):
        _index.write("virtual_kitti2", tmp_path / "packed")


def test_anydepths_list_of_virtual_kitti2_chooses_its_left_camera(tmp_path):
    """Lines as AIGeeksGroup/AnyDepth (8603751) has them in datasets/vkitti/train.txt: 12,643, all of Camera_0."""
    virtual_kitti2(tmp_path, frames(2, 12, 32))
    _index.write("virtual_kitti2", tmp_path)
    at = "/data/vkitti2/Scene01/clone/frames"
    line = f"{at}/rgb/Camera_0/rgb_00001.jpg {at}/depth/Camera_0/depth_00001.png"
    for text in (line, "D:" + line.replace("/", "\\")):
        [row] = _index.read("virtual_kitti2", tmp_path, names=[text])
        assert row.name == "Scene01/clone/Camera_0/00001"
    facts = find(FOLDER, "virtual_kitti2").FACTS
    assert facts.kept == 12_643 and "Camera_0 alone" in facts.note


def test_an_index_of_images_without_any_depth_is_not_written(tmp_path):
    virtual_kitti2(tmp_path, frames(1, 12, 32))
    depth = tmp_path / "Scene01/clone/frames/depth"
    depth.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"without images .such as .*rgb_00000.jpg., but no pairs: unpack the other"):
        _index.write("virtual_kitti2", tmp_path)
    assert not list(tmp_path.glob("*INDEX*"))
    (tmp_path / "aside").rename(depth)
    assert _index.write("virtual_kitti2", tmp_path).rows == 1


def test_tartanair_whose_archives_lie_each_in_a_folder_of_its_own(tmp_path):
    """As princeton-vl/DROID-SLAM#124 has it."""
    tartanair(tmp_path / "plain", frames(2, 12, 32))
    top, flight = tmp_path / "root/abandonedfactory/Easy", "abandonedfactory/Easy/P000"
    for sort in ("image_left", "depth_left"):
        (top / sort / flight).mkdir(parents=True)
        (tmp_path / "plain" / flight / sort).rename(top / sort / flight / sort)
    assert _index.write("tartanair", tmp_path / "root").rows == 2
    row = _index.read("tartanair", tmp_path / "root")[1]
    assert row.name == "abandonedfactory/Easy/image_left/abandonedfactory/Easy/P000/000001"
    assert (tmp_path / "root" / row.depth).is_file()


def test_a_folder_above_whose_names_look_right_is_told_from_a_missing_archive(tmp_path):
    (tmp_path / "inner" / "ai_001_001" / "images" / "scene_cam_00_final_preview").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no files of Hypersim found there; its layout is.* \.\.\.$"):
        _index.write("hypersim", tmp_path)
    hypersim(tmp_path / "inner", [(np.zeros((4, 6, 3), np.uint8), np.ones((4, 6), np.float32))])
    with pytest.raises(ValueError, match=f"no files of Hypersim found there; it is in {tmp_path}/inner: give that"):
        _index.write("hypersim", tmp_path)
    (tmp_path / "h.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="h.zip: a file, not a folder; unpack it; it should hold Hypersim"):
        _index.write("hypersim", tmp_path / "h.zip")


def test_depth_that_a_tool_reduced_to_eight_bits_is_refused(tmp_path):
    virtual_kitti2(tmp_path, frames(1, 12, 32))
    _index.write("virtual_kitti2", tmp_path)
    (row,) = _index.read("virtual_kitti2", tmp_path)
    Image.fromarray(np.full((12, 32), 200, np.uint8)).save(tmp_path / row.depth)
    with pytest.raises(OSError, match="depth_00000.png: has 8 bits per pixel, but its depth has 16: a tool reduced it"):
        find(FOLDER, "virtual_kitti2").read(tmp_path, row)


def test_an_index_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    tartanair(tmp_path, frames(4))
    whole = _index.write("tartanair", tmp_path).path.read_bytes()
    plain, other = _index._lines, []

    def lines(group, found):
        if not other:
            with pytest.raises(OSError, match="another process writes it: wait for it"):
                other.append(None)
                _index.write("tartanair", tmp_path)
        return plain(group, found)

    monkeypatch.setattr(_index, "_lines", lines)
    assert _index.write("tartanair", tmp_path).path.read_bytes() == whole and other
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_virtual_kitti_cuts_the_far_plane_where_its_authors_put_the_sky(tmp_path):
    """Their README: "a fixed far plane of 655.35 meters, i.e. ... sky pixels are clipped to a depth of 655.3m"."""
    depth = np.array([[655.35, 655.3, 655.29, 0.5]], np.float32)
    virtual_kitti(tmp_path, [(np.zeros((1, 4, 3), np.uint8), depth)])
    _index.write("virtual_kitti", tmp_path)
    [row] = _index.read("virtual_kitti", tmp_path)
    values, valid = find(FOLDER, "virtual_kitti").read(tmp_path, row)
    assert row.name == "0001/clone/00000" and row.focal == 725.0
    assert valid.tolist() == [[False, False, True, True]] and np.abs(values - depth)[valid].max() < 1e-4


@pytest.mark.parametrize("left_out", ["vkitti_1.3.1_rgb", "vkitti_1.3.1_depthgt"])
def test_virtual_kitti_with_one_archive_or_from_within_says_so(left_out, tmp_path):
    virtual_kitti(tmp_path / "root", frames(1, 12, 32))
    inside = tmp_path / "root/vkitti_1.3.1_rgb"
    with pytest.raises(FileNotFoundError, match="it is a part of the data in .*/root: give that folder"):
        _index.write("virtual_kitti", inside)
    (tmp_path / "root" / left_out).rename(tmp_path / "aside")
    with pytest.raises(
        ValueError, match=r"such as vkitti_1.3.1_\w+/0001/clone/00000.png.*unpack the other archive too"
    ):
        _index.write("virtual_kitti", tmp_path / "root")


def test_tartanair_v2_keeps_its_cameras_apart_and_leaves_out_what_is_not_pinhole(tmp_path):
    for camera in ("lcam_front", "rcam_top", "lcam_fish", "lcam_equirect"):
        tartanair_v2(tmp_path, frames(1, 12, 12), camera)
    done = _index.write("tartanair_v2", tmp_path)
    assert (done.rows, done.groups) == (2, 2)
    rows = _index.read("tartanair_v2", tmp_path)
    assert [row.name for row in rows] == [
        f"CarWelding/Data_easy/P000/{camera}/000000" for camera in ("lcam_front", "rcam_top")
    ]
    assert rows[1].depth == "CarWelding/Data_easy/P000/depth_rcam_top/000000_rcam_top_depth.png"
    (tmp_path / "CarWelding/Data_easy/P000/depth_rcam_top").rename(tmp_path / "aside")
    done = _index.write("tartanair_v2", tmp_path)
    assert (done.rows, done.alone) == (1, 1) and "image_rcam_top" in done.examples[0]


def test_tartanair_v2_with_depth_alone_or_changed_depth_says_so(tmp_path):
    tartanair_v2(tmp_path, frames(1, 12, 32))
    _index.write("tartanair_v2", tmp_path)
    [row] = _index.read("tartanair_v2", tmp_path)
    with Image.open(tmp_path / row.depth) as image:
        image.convert("RGB").save(tmp_path / row.depth)
    with pytest.raises(
        OSError, match="000000_lcam_front_depth.png: has 3 channels, but not in four bytes the float32 of"
    ):
        find(FOLDER, "tartanair_v2").read(tmp_path, row)
    (tmp_path / row.rgb).unlink()
    with pytest.raises(ValueError, match="TartanAir V2 without depth, or depth without images .*unpack the other"):
        _index.write("tartanair_v2", tmp_path)


@pytest.mark.parametrize(("lies", "asked"), [("tartanair_v2", "tartanair"), ("virtual_kitti", "virtual_kitti2")])
def test_the_other_version_of_a_data_set_is_recognised(lies, asked, tmp_path):
    for there, wanted in ((lies, asked), (asked, lies)):
        root = tmp_path / there
        WRITERS[there](root, frames(1, 12, 32))
        title = find(FOLDER, there).FACTS.title
        with pytest.raises(FileNotFoundError, match=f"it is {title}: `distill index {there} {root}`"):
            _index.write(wanted, root)


def test_images_that_the_authors_table_leaves_out_are_counted(tmp_path, capsys):
    """Excel writes the table with a byte order mark."""
    hypersim(tmp_path, frames(2, 4, 6))
    head = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\r\n"
    table = tmp_path / "metadata_images_split_scene_v1.csv"
    table.write_text(f"{head}ai_001_001,cam_00,0,True,,val\r\nai_001_001,cam_00,1,False,,\r\n", encoding="utf-8-sig")
    assert main(["index", "hypersim", str(tmp_path)]) == 0
    assert "1 image with depth in 1 group (left out: 1 image not in the authors' table)" in capsys.readouterr().out
    find(FOLDER, "hypersim")._splits.cache_clear()
    table.write_text(head)
    with pytest.raises(ValueError, match="the authors' table of released images leaves out all 2 that are here"):
        _index.write("hypersim", tmp_path)


@pytest.mark.parametrize("name", ["hypersim", "virtual_kitti2", "blendedmvs", "tartanair"])
def test_depth_whose_images_are_not_unpacked_is_named(name, tmp_path):
    WRITERS[name](tmp_path, frames(1, 12, 32))
    images = {"hypersim": "scene_cam_00_final_preview", "virtual_kitti2": "rgb", "blendedmvs": "blended_images"}
    shutil.rmtree(next(tmp_path.rglob(images.get(name, "image_left"))))
    with pytest.raises(ValueError, match=r"or depth without images \(such as .*depth.*\), but no pairs: unpack the"):
        _index.write(name, tmp_path)


def test_archives_lying_where_they_are_unpacked_are_seen(tmp_path):
    """As TartanAir's download tool leaves them."""
    (tmp_path / "abandonedfactory/Easy").mkdir(parents=True)
    for name in ("depth_left.zip", "image_left.zip"):
        (tmp_path / "abandonedfactory/Easy" / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"abandonedfactory/Easy/depth_left.zip and 1 more should be unpacked"):
        _index.write("tartanair", tmp_path)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("blendedmvs", "low_res", "full_res"),
        ("irs", "IRSDataset/Home", "Home"),
        ("tartanair", "abandonedfactory/Easy", "abandonedfactory/abandonedfactory/Easy"),
    ],
)
def test_a_scene_that_lies_there_twice_is_not_counted_twice(name, first, second, tmp_path):
    WRITERS[name](tmp_path / ("low_res" if name == "blendedmvs" else ""), frames(1, 12, 32))
    assert _index.write(name, tmp_path).rows == 1
    shutil.copytree(tmp_path / first, tmp_path / second)
    with pytest.raises(ValueError, match=r"(low|full)_res/5a3.* and|Home/.* and IRSDataset/Home/|Easy/P000 and aband"):
        _index.write(name, tmp_path)
