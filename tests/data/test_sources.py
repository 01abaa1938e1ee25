"""Folders, pairs, scenes and wheels: every image ends as a photo or as a reason."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.core.depth import DepthMap, Kind
from distill.data import published, sources
from distill.data.photos import BadImageError, Photo
from distill.data.settings import ImageSettings
from tests.data.pictures import encoded, pack, picture


def test_a_tar_is_opened_once_to_identify_its_images(tmp_path, monkeypatch):
    """For each image, a resumed run would open a tar 11,000 times on a network disk."""
    opened, data = [], [encoded(picture(8, 8, seed=seed)) for seed in range(5)]
    for name in ("a", "b"):
        pack(tmp_path / f"{name}.tar", [(f"{name}{i}.png", image) for i, image in enumerate(data)])
    entries = [entry for shard in sources.tars(tmp_path / "*.tar") for entry in shard.scan().entries]
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *given, **more: opened.append(path) or real(path, *given, **more))
    found = sources.identity(entries)
    assert opened == [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert found == {
        "sizes": hashlib.sha256("".join(f"{len(image)} " for image in data * 2).encode()).hexdigest(),
        "samples": hashlib.sha256(b"".join(data * 2)).hexdigest(),
    }


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
    with pytest.raises(FileNotFoundError, match="only tars are read from URLs: download it"):
        sources.folders("https://a.org/b.jpg")


def test_what_icloud_did_not_download_is_not_called_the_systems(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / ".b.HEIC.icloud").touch()
    (one,) = sources.folders(tmp_path)[0].scan().skipped
    assert one == (".icloud (photos that were not downloaded from it)", 1)


@pytest.mark.parametrize("pattern", ["*/images", "*/images/*.png"])
def test_folders_of_one_name_are_told_apart_by_the_folders_above(tmp_path, pattern):
    for scene, side in (("a", 8), ("b", 9)):
        (tmp_path / scene / "images").mkdir(parents=True)
        (tmp_path / scene / "images" / "0.png").write_bytes(encoded(picture(side, side)))
    [shard] = sources.folders([str(tmp_path / pattern), str(tmp_path / "a" / "images" / "0.png")])
    entries = shard.scan().entries
    assert [entry.key for entry in entries] == ["a_images_0", "b_images_0"]
    assert [entry.load().rgb.shape[-1] for entry in entries] == [8, 9]


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
    def render(seed, *, size, kind, variety):  # the real one draws its textures first, for seconds
        depth = torch.full(size, float(seed))
        return SimpleNamespace(
            image=torch.full((3, *size), 0.75 if variety else 0.5), depth=depth, valid=depth > 0, kind=kind, focal=30.0
        )

    monkeypatch.setattr(sources.procedural, "render", render)
    shards = sources.scenes(3, size=(24, 32), seed=5, per_shard=2)
    entries = [e for s in shards for e in s.scan().entries]
    assert [e.key for e in entries] == ["scene_000005", "scene_000006", "scene_000007"] and len(shards) == 2
    assert len(sources.combine(shards, sources.scenes(3, seed=8), sources.scenes(3, seed=5, kind="street"))) == 4
    photo = entries[1].load()
    assert photo.rgb.dtype == torch.uint8 and photo.rgb.shape == (3, 24, 32) and photo.rgb[0, 0, 0] == 128
    assert photo.truth.kind == Kind.METRIC_DEPTH and (photo.truth.values == 6).all() and photo.truth.valid.all()
    assert [e.key for e in sources.scenes(1, kind="street")[0].scan().entries] == ["scene_street_000000"]
    varied = sources.scenes(1, size=(24, 32), seed=5, variety=True)[0].scan().entries[0]
    assert varied.key == "scene_varied_000005" and varied.load().rgb[0, 0, 0] == 191
    plain, asked = (ImageSettings(scenes=3, variety=variety).content for variety in (False, True))
    assert "variety" not in plain and asked == plain | {"variety": True}  # old labels keep their address
    with pytest.raises(ValueError, match="variety needs scenes"):
        ImageSettings(pairs="a.tsv", variety=True)


def test_wheels_have_seven_photos_and_one_truth():
    if not all(importlib.util.find_spec(name) for name in ("skimage", "sklearn")):
        pytest.skip("the demo extra is not installed")
    photos = {e.key: e.load() for e in sources.bundled_photos()[0].scan().entries}
    assert sorted(photos) == ["astronaut", "chelsea", "china", "coffee", "flower", "motorcycle_left", "rocket"]
    truth = photos["motorcycle_left"].truth
    depth = truth.values[truth.valid]
    assert truth.values.shape[1:] == photos["motorcycle_left"].rgb.shape[1:]
    assert 2.0 < depth.min() < depth.max() < 5.5 and 0.9 < truth.valid.float().mean() < 1.0
    assert all(photo.truth is None for key, photo in photos.items() if key != "motorcycle_left")


def test_absent_wheels_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "depth-distill\[demo\]"'):
        sources.bundled_photos()


def test_everything_goes_to_worker_processes(tmp_path):
    make_pairs(tmp_path / "rgbd")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tar = pack(tmp_path / "a.tar", [("./sa_1.jpg", encoded())])
    shards = sources.combine(sources.tars(tar), sources.folders(tmp_path / "a.png"), sources.pairs(tmp_path / "rgbd"))
    for shard in pickle.loads(pickle.dumps(shards)):
        assert pickle.loads(pickle.dumps(shard.scan().entries[0])).load().rgb.dtype == torch.uint8


def test_a_bound_of_metres_holds_for_disparity_too():
    values = torch.tensor([[[0.01, 0.02, 0.5, 0.0]]])
    for kind, known in ((Kind.METRIC_DISPARITY, [0, 1, 1, 0]), (Kind.SCALE_DISPARITY, [1, 1, 1, 1])):
        photo = Photo("a", torch.zeros(3, 1, 4, dtype=torch.uint8), DepthMap(values, values >= 0, kind), "a")
        shard = sources.in_shards("a", "a", [sources.Entry("a", "a", lambda photo=photo: photo)], 1)
        [near] = published.within(shard, 50.0)
        assert near.scan().entries[0].load().truth.valid.flatten().int().tolist() == known


def test_tars_in_an_inner_folder_are_pointed_to(tmp_path):
    (tmp_path / "part_1").mkdir()
    (tmp_path / "part_1" / "a.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no .tar in this folder, but part_1/a.tar below it: give .*/\*\*/\*"):
        sources.tars(tmp_path)
    assert [shard.stem for shard in sources.tars(f"{tmp_path}/**/*.tar")] == ["a"]
