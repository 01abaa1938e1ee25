"""Whatever is damaged, missing or foreign is named, with the way out."""

from __future__ import annotations

import errno
import json
import os
import re

import numpy as np
import pytest

from distill.core import files
from distill.core.depth import Kind
from distill.core.seal import is_broken, sealed
from distill.shards import shards
from distill.shards.codec import dump_json, encode_sample
from distill.shards.shards import (
    LabelDataset,
    ShardWriter,
    read_shard,
    verify,
    write_manifest,
)
from tests.shards.samples import PATCH, make_sample, write


def test_nothing_can_be_seen_of_a_tar_that_was_not_finished(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a-000.tar") as writer:
        writer.add("k-0", [("k-0.jpg", b"1")])
        raise RuntimeError
    with ShardWriter(tmp_path / "b-000.tar") as writer:
        writer.close()
        assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.iterdir())


def test_a_tar_is_not_written_through_a_link_of_a_stranger_s_folder(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".a-000.tar.partial").symlink_to(tmp_path / "mine")
    with ShardWriter(tmp_path / "a-000.tar") as writer:
        writer.close()
        writer.publish()
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "a-000.tar").is_symlink()


def test_a_tar_goes_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    """Each byte once, and in order, so that the sync at its end has little left to do."""
    sent = []
    monkeypatch.setattr(shards, "WRITEBACK", 1000)
    monkeypatch.setattr(files.os, "posix_fadvise", lambda number, start, length, advice: sent.append((start, length)))
    with ShardWriter(tmp_path / "a-000.tar") as writer:
        for i in range(5):
            writer.add(f"k-{i}", [(f"k-{i}.jpg", bytes(700))])
        assert writer.aside.stat().st_size == sum(length for _, length in sent)
        size = writer.close()["bytes"]
    starts = [start for start, _ in sent]
    assert len(sent) > 2 and starts == [sum(length for _, length in sent[:i]) for i in range(len(sent))]
    assert size - 11_000 < starts[-1] + sent[-1][1] <= size


def test_a_tar_is_synced_once_all_of_it_is_in_the_file(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(shards.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with ShardWriter(tmp_path / "a-000.tar") as writer:
        writer.add("k-0", [("k-0.jpg", bytes(7000))])  # so that its end is still in the file's buffer
        assert synced == [] and writer.close()["bytes"] == 10240 and synced == [10240]


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
    (folder / "a-000.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"a-000.tar is a file; give the folder"):
        LabelDataset(folder / "a-000.tar")


def test_a_run_names_its_labels_and_a_pointer_is_named(folder, tmp_path):
    (tmp_path / "run" / "labels").mkdir(parents=True)
    (tmp_path / "run" / "labels" / "0123").symlink_to(folder)
    with pytest.raises(FileNotFoundError, match=r"the labels lie in .*run/labels/0123; give that folder"):
        verify(tmp_path / "run")
    (folder / "._sa_0-000.tar").write_bytes(b"x")
    (folder / "sa_0-000.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    said = f"{folder / 'sa_0-000.tar'} is a git-lfs pointer: run `git lfs pull`"
    assert verify(folder) == [said]
    with pytest.raises(OSError, match="is a git-lfs pointer"):
        LabelDataset(folder)


def test_a_newer_format_and_a_foreign_file_are_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for table, reason in (
        (sealed({**manifest, "version": 2}), "reads up to 1: upgrade"),
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


@pytest.mark.parametrize("keys", [None, 1.5, True, {"sa_1": 0}, "sa_1", [["sa_1"], "sa_2"], [None]])
def test_verify_names_an_image_list_that_is_none(folder, keys):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "images": {**manifest["images"], "keys": keys}}))
    lines = verify(folder)
    assert any("image list does not agree" in line or "its own checksum" in line for line in lines)
    assert any("its image is not in manifest.json" in line for line in lines)


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
        sidecar.write_bytes(dump_json(sealed({**(json.loads(good) if "tar" in bad else {}), **bad})))
        with pytest.raises(ValueError, match=rf"sa_0-000.json is damaged: {what}.*run `distill verify --repair`"):
            shards.shard_index(folder / "sa_0-000.tar")
    for bad in ({"shards": [{}]}, {"shards": 3}, {"shards": [None]}, {"images": []}):
        manifest.write_text(json.dumps(sealed(table | bad)))
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


def test_a_flipped_digit_of_a_samples_json_is_not_learnt_from(folder):
    tar = folder / "sa_0-000.tar"
    good = tar.read_bytes()
    for place in (re.search(rb'"low":-?(\d)', good).start(1), good.index(b'"patches":[[') + 12):
        data = bytearray(good)
        data[place] = ord("7") if data[place] != ord("7") else ord("8")
        tar.write_bytes(data)
        for read in (lambda: [LabelDataset(folder)[i] for i in range(3)], lambda: list(read_shard(tar))):
            with pytest.raises(OSError, match=r"sa_0-000.tar:\S+ json is damaged: its checksum is wrong; run"):
                read()


def test_labels_without_a_checksum_of_the_jpg_are_read(tmp_path):
    def members(jpg=None):
        for name, data in encode_sample(make_sample()):
            said = (
                {k: v for k, v in json.loads(data).items() if k not in ("jpg", "crc32")}
                if name.endswith("json")
                else None
            )
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


def test_verify_reads_through_the_offsets_of_a_json(folder):
    """Of earlier versions too, whose tables have no checksum."""
    sidecar = folder / "sa_0-000.json"
    table = json.loads(sidecar.read_text())
    table["samples"][1][1] += 512
    sidecar.write_bytes(dump_json(table))
    assert verify(folder) == [f"{sidecar} gives the wrong position in its tar for sa_1-1"]
    table["samples"][1][1] = 1 << 40
    sidecar.write_bytes(dump_json(table))
    assert "do not lie in their tar" in verify(folder)[0]


def test_a_table_that_was_changed_is_seen(folder):
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    assert not is_broken(table) and is_broken({**table, "version": 2})
    assert table["sha256"] == sealed(shards.read_manifest(folder))["sha256"]
    path.write_text(path.read_text().replace('"one"', '"ome"'))
    with pytest.raises(ValueError, match="manifest.json is damaged: it does not agree with its own checksum; run"):
        LabelDataset(folder)
    assert any("its own checksum" in line for line in verify(folder))
    path.write_text(json.dumps({key: value for key, value in table.items() if key != "sha256"}))
    assert len(LabelDataset(folder)) == 3


def test_a_tar_that_is_cut_while_it_is_open_and_a_key_that_occurs_twice_are_named(folder, tmp_path):
    dataset, tar = LabelDataset(folder), folder / "sa_0-000.tar"
    os.truncate(tar, dataset._places[2][1] + 512)
    with pytest.raises(OSError, match="sa_0-000.tar:sa_2-0 is damaged: the tar ends too early"):
        dataset[2]
    twice = write(tmp_path / "twice", [make_sample(), make_sample("sa_2"), make_sample(seed=1)])
    assert verify(twice) == [f"{twice / 'sa_0-000.tar'}: a key occurs twice", *verify(twice)[1:]]
    twice = write(tmp_path / "in a row", [make_sample(), make_sample(seed=1)])
    assert f"{twice / 'sa_0-000.tar'} is damaged (sa_1-0.jpg occurs twice)" in verify(twice)[0]


def test_a_manifest_is_not_believed_in_what_its_checksum_denies_nor_in_names_that_lead_elsewhere(folder):
    """What it says of its version is no reason to ask for an upgrade, while `verify` reads what else is damaged."""
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "version": 2}))
    with pytest.raises(shards.DamagedTableError, match="does not agree with its own checksum"):
        shards.read_manifest(folder, whole=False)
    for name in (".claim.tar", "../a.tar", "a/b.tar", "a\\b.tar", "a.txt"):
        path.write_text(json.dumps(sealed({**good, "shards": [{**good["shards"][0], "name": name}]})))
        with pytest.raises(ValueError, match="which is no .tar of its own folder: refused"):
            shards.read_manifest(folder)


def test_labels_that_were_published_without_photographs_say_so(folder):
    (folder / "regions.jsonl").touch()
    for read in (LabelDataset, verify):
        with pytest.raises(ValueError, match="published without its photographs"):
            read(folder)
