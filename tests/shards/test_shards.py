"""The label shard format: exact to half a code, the same bytes every time, and loud when damaged."""

from __future__ import annotations

import errno
import json
import pickle
import tarfile
import zlib

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.shards import shards
from distill.shards.codec import CODECS, MAX_ERROR, decode_map, dump_json, encode_map, encode_sample
from distill.shards.shards import (
    LabelDataset,
    Sample,
    ShardWriter,
    collate,
    hash_keys,
    read_shard,
    verify,
    write_manifest,
)

SIZE, PATCH = 16, 8


def depth_map(count, size, kind, seed) -> DepthMap:
    rng = torch.Generator().manual_seed(seed)
    valid = torch.rand(count, size, size, generator=rng) > 0.2
    values = torch.rand(count, size, size, generator=rng) * 3
    return DepthMap(torch.where(valid, values, torch.nan), valid, kind)


def make_sample(
    key="sa_1", draw=0, *, patches=3, teachers=("one", "two"), kind=Kind.AFFINE_DISPARITY, seed=0
) -> Sample:
    squares = [[2 * i, i, PATCH] for i in range(patches)]
    boxes = torch.tensor([[t, left, t + s, left + s] for t, left, s in squares]).float().reshape(1, -1, 4) / 20
    image = (torch.arange(3 * SIZE * SIZE).reshape(3, SIZE, SIZE) // 4).to(torch.uint8)
    labels = {}
    for number, name in enumerate(teachers):
        local = depth_map(patches, PATCH, kind, seed + 10 * number + 1) if patches else None
        labels[name] = Labels(depth_map(1, SIZE, kind, seed + 10 * number), local, boxes)
    record = {
        "image": {"key": key, "origin": f"a.tar:{key}.jpg", "height": 40, "width": 50},
        "crop": {"top": 1, "left": 2, "side": 20, "size": SIZE, "patch_size": PATCH, "draw": draw},
        "patches": squares,
        "seed": 0,
        "sky": None,
    }
    return Sample(f"{key}-{draw}", key, image, labels, record)


def write(folder, samples, *, name="sa_0-000.tar", sidecar=True, codec="jls"):
    """A finished labels folder with one tar."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / name) as writer:
        for sample in samples:
            writer.add(sample.key, encode_sample(sample, codec=codec))
        said = writer.close()
        if sidecar:
            table = {"version": 1, "tar": said, "samples": writer.index, "part": 0, "of": 1}
            table |= {"images": [sample.image_key for sample in samples], "quarantine": [], "kinds": {}}
            (folder / name).with_suffix(".json").write_bytes(dump_json(table))
        writer.publish()
    keys = list(dict.fromkeys(s.image_key for s in samples))
    manifest = {
        "teachers": {name: {} for name in samples[0].labels},
        "shards": [said],
        "images": {"keys": keys, "count": len(keys), "sha256": hash_keys(keys)},
        "quarantine": [],
    }
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path / "labels", [make_sample("sa_1", seed=1), make_sample("sa_1", 1), make_sample("sa_2", seed=2)]
    )


def same_map(stored: DepthMap, wanted: DepthMap):
    usable = wanted.valid & torch.isfinite(wanted.values)
    assert torch.equal(stored.valid, usable) and stored.kind == wanted.kind
    for got, want, where in zip(stored.values, wanted.values, usable, strict=True):
        span = (want[where].max() - want[where].min()).item() if where.any() else 0.0
        assert (got - want)[where].abs().max().item() <= span * MAX_ERROR + 1e-6
        assert (got[~where] == 0).all()


# --- codec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(CODECS))
@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e6, 1e6, width=32),
    span=st.floats(2**-10, 1e6, width=32),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    picture=st.sampled_from(["noise", "two values", "board", "ramp", "spike", "steps"]),
    holes=st.sampled_from([0.0, 0.3, 0.97]),
    seed=st.integers(0, 99),
)
def test_no_map_breaks_the_promise_of_its_codec(codec, low, span, shape, picture, holes, seed):
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    unit = {
        "noise": rng.random(shape),
        "two values": rng.integers(0, 2, shape),
        "board": (rows + columns) % 2,
        "ramp": (rows * shape[1] + columns) / max(1, shape[0] * shape[1] - 1),
        "spike": (rows == shape[0] // 2) & (columns == shape[1] // 2),
        "steps": (rows + columns) % 17 / 16 + rng.integers(-1, 2, shape) / 65535,
    }[picture]
    values = torch.from_numpy((low + span * unit.astype(np.float64)).astype(np.float32))
    valid = torch.from_numpy(rng.random(shape) >= holes)
    data, said = encode_map(values, valid, codec=codec)
    got, got_valid = decode_map(data, json.loads(json.dumps(said)), codec=codec)
    assert torch.equal(got_valid, valid) and said["valid"] == int(valid.sum())
    assert (got[~valid] == 0).all() and CODECS[codec].bound <= MAX_ERROR
    if valid.any():
        rounding = 2**-23 * float(values[valid].abs().max())  # the answer is float32 again
        bound = (said["high"] - said["low"]) * CODECS[codec].bound + rounding
        assert (got.double() - values.double())[valid].abs().max() <= bound


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_picture_of_real_size_keeps_the_promise(codec):
    rows, columns = torch.meshgrid(torch.linspace(0, 9, 560), torch.linspace(0, 7, 560), indexing="ij")
    values = torch.sin(rows * columns) + 5 * (rows > columns) + 0.01 * torch.rand(560, 560)
    valid = (rows - 4) ** 2 + (columns - 4) ** 2 > 3
    data, said = encode_map(values, valid, codec=codec)
    got, got_valid = decode_map(data, said, codec=codec)
    assert torch.equal(got_valid, valid)
    assert (got - values)[valid].abs().max() <= (said["high"] - said["low"]) * MAX_ERROR + 1e-6


@pytest.mark.parametrize("codec", list(CODECS))
def test_constants_and_single_pixels_are_exact(codec):
    for values in (torch.full((3, 4), -7.25), torch.tensor([[torch.nan, 3.3]])):
        got, valid = decode_map(*encode_map(values, torch.isfinite(values), codec=codec), codec=codec)
        assert torch.equal(got[valid], values[torch.isfinite(values)]) and valid.sum() == torch.isfinite(values).sum()


@pytest.mark.parametrize("codec", list(CODECS))
def test_nothing_valid_and_nothing_finite(codec):
    bad = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 1.0]])
    data, said = encode_map(bad, torch.tensor([[True, True], [True, False]]), codec=codec)
    assert said == {"low": 0.0, "high": 0.0, "valid": 0}
    assert not decode_map(data, said, codec=codec)[1].any()


def test_infinity_does_not_stretch_the_range():
    _, said = encode_map(torch.tensor([[1.0, torch.inf, 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert said == {"low": 1.0, "high": 2.0, "valid": 2}


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("data", [b"", b"nonsense"])
def test_a_map_that_does_not_decode_is_named(data, codec):
    with pytest.raises(OSError, match="sa_1 one.shared is damaged"):
        decode_map(data, {"low": 0, "high": 1}, codec=codec, where="sa_1 one.shared")


def test_a_damaged_map_never_reaches_its_decoder(monkeypatch):
    values = torch.arange(64.0).reshape(8, 8)
    data, span = encode_map(values, values >= 0)
    said = {**span, "crc32": zlib.crc32(data)}
    assert decode_map(data, said)[1].all()
    monkeypatch.setattr("imagecodecs.jpegls_decode", lambda data: pytest.fail("it did"))
    for i in range(len(data)):
        with pytest.raises(OSError, match="its checksum is wrong; run `distill verify --repair`"):
            decode_map(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], said)


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_codec_makes_a_folder_that_reads_back(tmp_path, codec):
    samples = [make_sample("sa_1", seed=1), make_sample("sa_2", seed=2)]
    folder = write(tmp_path / codec, samples, codec=codec)
    assert verify(folder) == []
    for got, want in zip(LabelDataset(folder), samples, strict=True):
        assert got.record["codec"] == codec
        same_map(got.labels["one"].local, want.labels["one"].local)


# --- writing and reading ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(LabelDataset, "_MAX_OPEN", 2)
    dataset = LabelDataset(folder)
    assert [dataset[i].key for i in (6, 0, 5, 1, 4, 3, 6)] == [dataset.keys[i] for i in (6, 0, 5, 1, 4, 3, 6)]
    assert len(dataset._open) == 2


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
    with pytest.raises(ValueError, match="b-0 and a-0 do not go into one batch"):
        collate([make_sample("a"), make_sample("b", teachers=("one",))])


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_nothing_can_be_seen_of_a_tar_that_was_not_finished(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a-000.tar") as writer:
        writer.add("k-0", [("k-0.jpg", b"1")])
        raise RuntimeError
    with ShardWriter(tmp_path / "b-000.tar") as writer:
        writer.close()
        assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_tar_and_the_way_on(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards._Hashing, "write", full)
    with (
        pytest.raises(
            OSError, match=r"cannot write .*a-000.tar: No space left on device. What was finished is kept"
        ) as e,
        ShardWriter(tmp_path / "a-000.tar") as writer,
    ):
        writer.add("k-0", [("k-0.jpg", b"1")])
    assert e.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_folder_without_manifest_says_that_labelling_has_not_finished(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing: labelling has not finished"):
        LabelDataset(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        LabelDataset(tmp_path / "nowhere")


def test_a_newer_format_and_a_foreign_file_are_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for table, reason in (
        ({**manifest, "version": 2}, "reads up to 1: upgrade"),
        ([1], "not a JSON table"),
        ({}, "no version"),
    ):
        (folder / "manifest.json").write_text(json.dumps(table))
        with pytest.raises(ValueError, match=reason):
            LabelDataset(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        LabelDataset(folder)


@pytest.mark.parametrize(("field", "value", "reason"), [("codec", "exr", "codec 'exr'"), ("version", 9, "version 9")])
def test_an_unknown_codec_or_version_of_a_sample_is_named(tmp_path, field, value, reason):
    members = [
        (name, data if not name.endswith("json") else dump_json({**json.loads(data), field: value}))
        for name, data in encode_sample(make_sample())
    ]
    with ShardWriter(tmp_path / "a-000.tar") as writer:
        writer.add("sa_1-0", members)
        writer.close()
        writer.publish()
    with pytest.raises(ValueError, match=rf"a-000.tar:sa_1-0 .*{reason}"):
        next(read_shard(tmp_path / "a-000.tar"))


def test_absent_and_shortened_tars_are_named_at_the_start(folder):
    tar = folder / "sa_0-000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 3])
    with pytest.raises(OSError, match=r"sa_0-000.tar is damaged: \d+ bytes, not the \d+"):
        LabelDataset(folder)
    for read in (lambda: list(read_shard(tar)), lambda: shards.shard_index(tar)):
        with pytest.raises(OSError, match=r"sa_0-000.tar"):
            read()
    tar.unlink()
    with pytest.raises(FileNotFoundError, match="sa_0-000.tar is missing"):
        LabelDataset(folder)


def test_verify_is_silent_on_good_labels_and_names_what_is_wrong(folder):
    assert verify(folder) == []
    tar, sidecar = folder / "sa_0-000.tar", folder / "sa_0-000.json"
    good = tar.read_bytes()
    (folder / "stray-000.tar").write_bytes(good)
    assert verify(folder) == [f"{folder / 'stray-000.tar'} is not in manifest.json"]
    (folder / "stray-000.tar").unlink()
    table = json.loads(sidecar.read_text())
    sidecar.write_bytes(dump_json({**table, "samples": table["samples"][:2]}))
    assert any("does not list the samples" in line for line in verify(folder))
    sidecar.write_bytes(dump_json(table))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {**manifest, "images": {**manifest["images"], "keys": ["sa_1"]}})
    lines = verify(folder)
    assert any("image list" in line for line in lines) and any("sa_2-0: its image is not" in line for line in lines)


def test_verify_finds_any_flipped_byte(folder):
    tar = folder / "sa_0-000.tar"
    good = tar.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(good), size=25):
        data = bytearray(good)
        data[place] ^= 0x55
        tar.write_bytes(data)
        assert any("sa_0-000.tar" in line for line in verify(folder)), place


def test_a_json_without_its_keys_is_named(folder):
    sidecar, manifest = folder / "sa_0-000.json", folder / "manifest.json"
    good, table = sidecar.read_bytes(), json.loads(manifest.read_text())
    for bad, what in (({"version": 1}, "it has no part, of, images"), ({"tar": {}}, "a tar in it has no name, sha256")):
        sidecar.write_bytes(dump_json({**(json.loads(good) if "tar" in bad else {}), **bad}))
        with pytest.raises(ValueError, match=rf"sa_0-000.json is damaged: {what}.*delete it and run distill label"):
            shards.shard_index(folder / "sa_0-000.tar")
    for bad in ({"shards": [{}]}, {"shards": 3}, {"shards": [None]}, {"images": []}):
        manifest.write_text(json.dumps(table | bad))
        with pytest.raises(ValueError, match=r"manifest.json is damaged: (a tar in it|images) has no "):
            LabelDataset(folder)


def test_a_damaged_jpg_names_the_sample_and_the_way_out(folder):
    tar = folder / "sa_0-000.tar"
    good, (_, start, _) = tar.read_bytes(), shards.shard_index(tar)[1]
    message = r"sa_0-000.tar:sa_1-1 jpg is damaged: its checksum is wrong; run `distill verify --repair`"
    last = start + 512 + len(encode_sample(make_sample("sa_1", 1))[0][1]) - 4
    for place, flip in ((start + 512, 0xFF), (last, 1)):  # no jpg any more; one that still decodes
        data = bytearray(good)
        data[place] ^= flip
        tar.write_bytes(data)
        for read in (lambda: LabelDataset(folder)[1], lambda: list(read_shard(tar))):
            with pytest.raises(OSError, match=message):
                read()
        assert any("sa_1-1 jpg is damaged" in line for line in verify(folder))


def test_labels_without_a_checksum_of_the_jpg_are_read(tmp_path):
    def members(jpg=None):
        for name, data in encode_sample(make_sample()):
            said = {k: v for k, v in json.loads(data).items() if k != "jpg"} if name.endswith("json") else None
            yield name, dump_json(said) if said else jpg if jpg and name.endswith("jpg") else data

    for stem, jpg in (("old", None), ("bad", b"nonsense")):
        with ShardWriter(tmp_path / f"{stem}.tar") as writer:
            writer.add("sa_1-0", list(members(jpg)))
            writer.close()
            writer.publish()
    assert next(read_shard(tmp_path / "old.tar")).key == "sa_1-0"
    with pytest.raises(OSError, match="bad.tar:sa_1-0 jpg is damaged: it does not decode; run") as caught:
        next(read_shard(tmp_path / "bad.tar"))
    assert "BytesIO" not in str(caught.value)


def test_a_cut_tar_is_told_without_objects(folder):
    tar = folder / "sa_0-000.tar"
    data = tar.read_bytes()
    for length in (len(data) // 3, len(data) // 2, 700):
        tar.write_bytes(data[:length])
        with pytest.raises(OSError, match=r"sa_0-000.tar(:\S+)? is damaged.*; run `distill verify --repair`") as caught:
            list(read_shard(tar))
        assert "object" not in str(caught.value) and "<" not in str(caught.value)


def test_verify_checks_what_the_maps_say(tmp_path):
    sample = make_sample(kind=Kind.SCALE_DISPARITY)
    sample.labels["one"].shared.values.sub_(5)
    sample.record["patches"][0] = [15, 0, PATCH]
    lines = verify(write(tmp_path / "l", [sample]))
    assert any("has negative values" in line for line in lines) and any("outside the region" in line for line in lines)
