"""The label shard format: what is written comes back, the same bytes every time, and in batches."""

from __future__ import annotations

import gc
import json
import os
import pickle
import tarfile
import warnings
from collections import OrderedDict

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from distill.core import machine
from distill.core.depth import Kind, KindError
from distill.shards.codec import decode_sample, encode_sample
from distill.shards.handles import OpenTars
from distill.shards.shards import (
    LabelDataset,
    ShardWriter,
    collate,
    read_shard,
    write_manifest,
)
from tests.shards.samples import PATCH, SIZE, make_sample, same_map, write


def test_sample_comes_back(folder):
    sample, back = make_sample("sa_1", seed=1), next(read_shard(folder / "sa_0-000.tar"))
    assert (back.key, back.image_key) == ("sa_1-0", "sa_1") and list(back.labels) == ["one", "two"]
    assert back.image.dtype == torch.uint8 and (back.image.int() - sample.image.int()).abs().max() < 12
    for name, labels in sample.labels.items():
        same_map(back.labels[name].shared, labels.shared)
        same_map(back.labels[name].local, labels.local)
        assert torch.equal(back.labels[name].boxes, labels.boxes)
    assert back.record["crop"] == sample.record["crop"] and back.record["codec"] == "jls"


def test_equal_content_gives_equal_bytes_with_nothing_of_this_machine(tmp_path):
    samples = [make_sample("sa_1"), make_sample("a" * 118, 1)]
    first, second = write(tmp_path / "a", samples), write(tmp_path / "b", samples)
    assert (first / "sa_0-000.tar").read_bytes() == (second / "sa_0-000.tar").read_bytes()
    with tarfile.open(first / "sa_0-000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_member_order_is_fixed(folder):
    with tarfile.open(folder / "sa_0-000.tar") as tar:
        assert tar.getnames()[:10] == [
            *("sa_1-0.jpg", "sa_1-0.one.shared.jls", "sa_1-0.one.local0.jls", "sa_1-0.one.local1.jls"),
            *("sa_1-0.one.local2.jls", "sa_1-0.two.shared.jls", "sa_1-0.two.local0.jls", "sa_1-0.two.local1.jls"),
            *("sa_1-0.two.local2.jls", "sa_1-0.json"),
        ]


def test_plain_webdataset_reads_it(folder):
    stream = webdataset.WebDataset([str(folder / "sa_0-000.tar")], shardshuffle=False)
    items = list(stream)
    assert [item["__key__"] for item in items] == ["sa_1-0", "sa_1-1", "sa_2-0"]
    assert json.loads(items[0]["json"])["labels"]["two"]["kind"] == "affine_disparity"
    assert items[0]["one.local2.jls"].startswith(b"\xff\xd8\xff")


def test_decode_sample_is_a_step_of_a_webdataset_pipeline(folder):
    tar = next(folder.glob("*.tar"))
    stream = webdataset.WebDataset([f"file:{tar}"], shardshuffle=False).map(decode_sample)
    for found, expected in zip(stream, read_shard(tar), strict=True):
        assert found.key == expected.key and torch.equal(found.image, expected.image)
        for name, labels in expected.answers.items():
            assert torch.equal(found.answers[name].shared.values, labels.shared.values)


def test_dataset_agrees_with_the_stream_with_and_without_an_index(folder):
    streamed = list(read_shard(folder / "sa_0-000.tar"))
    indexed = LabelDataset(folder)
    (folder / "sa_0-000.json").unlink()
    walked = LabelDataset(folder)
    assert indexed.keys == walked.keys == [s.key for s in streamed] == ["sa_1-0", "sa_1-1", "sa_2-0"]
    assert indexed.image_keys == ["sa_1", "sa_1", "sa_2"] and len(indexed) == 3
    for i in (2, 0, 1):
        for dataset in (indexed, walked, pickle.loads(pickle.dumps(indexed))):
            sample = dataset[i]
            assert torch.equal(sample.image, streamed[i].image) and sample.record == streamed[i].record
            assert torch.equal(sample.labels["two"].local.values, streamed[i].labels["two"].local.values)


def test_long_keys_survive_the_index(tmp_path):
    folder = write(tmp_path / "l", [make_sample("k" * 119 + str(i)) for i in range(3)], sidecar=False)
    assert [LabelDataset(folder)[i].image_key[-1] for i in range(3)] == ["0", "1", "2"]


def test_teachers_and_keys_can_be_chosen(folder):
    assert list(LabelDataset(folder, teachers=["two"])[0].labels) == ["two"]
    assert LabelDataset(folder, keys=["sa_1", "sa_77"]).keys == ["sa_1-0", "sa_1-1"]
    assert LabelDataset(folder, keys={"sa_1-1"}).keys == ["sa_1-1"]
    with pytest.raises(LookupError, match="no labels by three; it has one, two"):
        LabelDataset(folder, teachers=["three"])
    with pytest.raises(ValueError, match="no samples with the keys"):
        LabelDataset(folder, keys=["sa_9"])


def test_the_manifest_says_of_each_tar_whose_labels_and_which_images_it_holds(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert LabelDataset(folder).sources == [0, 0, 0] and LabelDataset(folder).teachers_of(0) == ["one", "two"]
    manifest["shards"][0] |= {"image_source": 3, "teachers": ["two", "one"]}
    write_manifest(folder, manifest)
    assert LabelDataset(folder).sources == [3, 3, 3] and LabelDataset(folder).teachers_of(0) == ["one", "two"]
    manifest["shards"][0]["teachers"] = ["two"]
    write_manifest(folder, manifest)
    assert LabelDataset(folder).teachers_of(2) == ["two"] and list(LabelDataset(folder)[2].labels) == ["two"]
    assert LabelDataset(folder, teachers=["one"]).teachers_of(2) == []
    for bad in ({"image_source": "../../x"}, {"image_source": -1}, {"teachers": "two"}, {"teachers": [["two"]]}):
        write_manifest(folder, {**manifest, "shards": [{**manifest["shards"][0], **bad}]})
        with pytest.raises(ValueError, match="manifest.json is damaged: what it says of a tar"):
            LabelDataset(folder)


def test_a_key_in_two_tars_is_read_once(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "sa_1-000.tar").write_bytes((folder / "sa_0-000.tar").read_bytes())
    manifest["shards"].append({**manifest["shards"][0], "name": "sa_1-000.tar"})
    write_manifest(folder, manifest)
    dataset = LabelDataset(folder)
    assert len(dataset) == 3 and dataset.duplicates == 3


def test_many_tars_need_few_handles(folder, monkeypatch):
    manifest = json.loads((folder / "manifest.json").read_text())
    for i in range(1, 5):
        with ShardWriter(folder / f"sa_{i}-000.tar") as writer:
            sample = make_sample(f"sb_{i}")
            writer.add(sample.key, encode_sample(sample))
            manifest["shards"].append(writer.close())
            writer.publish()
    write_manifest(folder, manifest)
    monkeypatch.setattr(OpenTars, "most", 2)
    dataset = LabelDataset(folder)
    assert [dataset[i].key for i in (6, 0, 5, 1, 4, 3, 6)] == [dataset.keys[i] for i in (6, 0, 5, 1, 4, 3, 6)]
    assert len(dataset._open_tars._open) == 2


def test_workers_give_the_same_batches(folder):
    dataset = LabelDataset(folder)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate))
    assert [batch.keys for batch in batches] == [("sa_1-0", "sa_1-1"), ("sa_2-0",)]
    want = collate([dataset[2]])
    assert torch.equal(batches[1].images, want.images)
    assert torch.equal(batches[1].labels["one"].local.values, want.labels["one"].local.values)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collate_pads_patches_with_a_box_that_is_nowhere_valid():
    batch = collate([make_sample("a", patches=3), make_sample("b", patches=1), make_sample("c", patches=0)])
    labels = batch.labels["one"]
    assert batch.images.shape == (3, 3, SIZE, SIZE) and batch.images.dtype == torch.float32 and batch.images.max() <= 1
    assert labels.shared.values.shape == (3, SIZE, SIZE) and labels.boxes.shape == (3, 3, 4)
    valid = labels.local.valid.reshape(3, 3, PATCH, PATCH).flatten(2).any(-1)
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert torch.equal(labels.boxes[1, 1], labels.boxes[1, 0]) and labels.boxes[2, 0].tolist() == [0, 0, 1, 1]
    assert collate([make_sample(patches=0)]).labels["one"].local is None


def test_collate_forgets_what_is_not_known_of_all_but_never_mixes_quantities():
    metric, scale = make_sample("a", kind=Kind.METRIC_DISPARITY), make_sample("b", kind=Kind.SCALE_DISPARITY)
    batch = collate([metric, scale])
    assert batch.labels["one"].shared.kind == batch.labels["one"].local.kind == Kind.SCALE_DISPARITY
    with pytest.raises(KindError, match="affine_depth"):
        collate([metric, make_sample("c", kind=Kind.AFFINE_DEPTH)])
    with pytest.raises(ValueError, match="b-0 and a-0 cannot be in one batch"):
        collate([make_sample("a"), make_sample("b", teachers=("one",))])


class Changing(OrderedDict):
    """Another thread opens a tar while we look for the one to drop."""

    def __iter__(self):
        raise RuntimeError("dictionary changed size during iteration")


def test_few_tars_stay_open_and_one_that_is_dropped_can_be_read_to_its_end(tmp_path, monkeypatch):
    """Another thread may be reading from it: the first to come is the first to go, but nobody closes it."""
    for number in range(66):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number, 7]))
    tars = OpenTars(tmp_path)
    with monkeypatch.context() as few:
        few.setattr(machine, "open_files", lambda: 8)  # of which they may take a quarter
        assert [tars.read(f"{number}.tar", 0, 9) for number in (0, 1)] == [b"\0\7", b"\1\7"]
        held = tars._open["0.tar"]
        assert tars.read("2.tar", 1, 1) == b"\7" and [*tars._open] == ["1.tar", "2.tar"]
        assert os.pread(held.fileno(), 1, 1) == b"\7"
        tars._open = Changing(tars._open)
        assert tars.read("0.tar", 0, 1) == b"\0" and [tars.read("2.tar", 1, 1), len(tars._open)] == [b"\7", 2]
        tars._open = OrderedDict()
    monkeypatch.setattr(machine, "open_files", lambda: None)
    assert [tars.read(f"{number}.tar", 0, 1)[0] for number in range(66)] == [*range(66)] and len(tars._open) == 64
    assert pickle.loads(pickle.dumps(tars)).read("3.tar", 0, 1) == b"\3"


def test_one_name_is_no_list_of_letters_and_a_slice_no_index(folder):
    for option in ({"teachers": "one"}, {"keys": "sa_1"}):
        with pytest.raises(TypeError, match="must be a list of names, not one name"):
            LabelDataset(folder, **option)
    dataset = LabelDataset(folder, keys=["sa_1"])
    for index in (slice(0, 1), [0], "sa_1-0"):
        with pytest.raises(TypeError, match=r"whole number, not (slice|list|str): torch.utils.data.Subset"):
            dataset[index]


def test_a_dataset_closes_its_files_without_a_warning(folder):
    dataset = LabelDataset(folder)
    assert dataset[torch.tensor(1)].key == dataset.keys[1]
    (descriptor,) = (file.fileno() for file in dataset._open_tars._open.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        del dataset
        gc.collect()
    assert not [w for w in caught if folder.name in str(w.message)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
