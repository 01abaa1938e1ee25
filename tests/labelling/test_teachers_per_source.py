"""Every source has the teachers that it names: on disk, and where labels are made during training."""

from __future__ import annotations

import errno
import tracemalloc
from dataclasses import replace

import pytest
import torch

from distill.core.depth import Kind
from distill.data import patience, sources
from distill.labelling.bridge import Bridged
from distill.labelling.online import OnlineDataset
from distill.labelling.run import TRUTH, LabelSettings, label
from distill.shards.shards import LabelDataset, read_manifest, verify
from distill.training.label_choice import convert_labels
from tests.labelling.formula import CROPS, Formula, make_tar


@pytest.fixture
def mixed(tmp_path):
    """Four photos for the network, two views for the truth, two for both."""
    make_tar(tmp_path / "sa_0.tar", count=4)
    photos = sources.tars(str(tmp_path / "sa_0.tar"))
    views = [sources.scenes(2, size=(24, 24), seed=seed) for seed in (0, 9)]
    named = [(photos, ("net",)), (views[0], ("truth",)), (views[1], ())]
    return [replace(shard, source=i, teachers=who) for i, (shards, who) in enumerate(named) for shard in shards]


def teachers():
    return [("net", Formula()), ("truth", TRUTH)]


def test_a_folder_knows_who_labelled_what_and_where_it_came_from(mixed, tmp_path):
    outcome = label(mixed, teachers(), out=tmp_path / "out", crops=CROPS)
    manifest = read_manifest(tmp_path / "out")
    assert outcome.samples == 8 and not manifest["quarantine"] and verify(tmp_path / "out") == []
    assert [(tar["image_source"], tar.get("teachers")) for tar in manifest["shards"]] == [
        (0, ["net"]),
        (1, ["truth"]),
        (2, None),
    ]
    dataset = LabelDataset(tmp_path / "out")
    assert dataset.sources == [0] * 4 + [1] * 2 + [2] * 2
    for i, expected in enumerate([["net"]] * 4 + [["truth"]] * 2 + [["net", "truth"]] * 2):
        sample = dataset[i]
        assert dataset.teachers_of(i) == list(sample.labels) == expected
        for name, labels in sample.labels.items():
            said = labels.supervision
            assert (said.teacher, said.truth, said.dense) == (name, name == "truth", True)
            assert said.metric is (name == "truth") and said.kind is labels.shared.kind
    assert list(dataset.get(6, ["truth"]).labels) == ["truth"]
    assert LabelDataset(tmp_path / "out", teachers=["net"]).teachers_of(7) == ["net"]


def test_labels_of_one_source_and_all_teachers_are_described_as_ever(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    label(sources.tars(str(tmp_path / "sa_0.tar")), [("net", Formula())], out=tmp_path / "out", crops=CROPS)
    assert set(read_manifest(tmp_path / "out")["shards"][0]) == {"name", "sha256", "bytes", "samples"}


def test_a_folder_that_does_not_know_its_sources_learns_them_without_relabelling(mixed, tmp_path):
    label([replace(shard, source=0) for shard in mixed], teachers(), out=tmp_path / "out", crops=CROPS)
    assert LabelDataset(tmp_path / "out").sources == [0] * 8
    again = label(mixed, teachers(), out=tmp_path / "out", crops=CROPS)
    assert again.parts == 0 and LabelDataset(tmp_path / "out").sources == [0] * 4 + [1] * 2 + [2] * 2


def test_a_photo_without_the_truth_that_its_source_names_is_quarantined(mixed, tmp_path):
    asked = [replace(mixed[0], teachers=("net", "truth"))]
    label(asked, teachers(), out=tmp_path / "out", crops=CROPS)
    assert {line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"]} == {
        "no ground truth, which truth needs"
    }


def test_other_teachers_than_a_part_was_labelled_by_are_refused(mixed, tmp_path):
    label(mixed[:1], teachers(), out=tmp_path / "out", crops=CROPS)
    with pytest.raises(ValueError, match="was labelled by net, but .* is now to be labelled by net, truth"):
        label([replace(mixed[0], teachers=())], teachers(), out=tmp_path / "out", crops=CROPS)
    for bad, message in (
        (("nett",), "no teacher is named nett; the teachers are net, truth"),
        (("b",), "is bridged to net"),
    ):
        bridge = ("b", Bridged(Formula(Kind.AFFINE_DEPTH), "net", 0.3))
        with pytest.raises(ValueError, match=message):
            label(
                [replace(mixed[0], teachers=bad)],
                [*teachers(), bridge][: 2 + (bad == ("b",))],
                out=tmp_path / "x",
                crops=CROPS,
            )


def test_online_asks_the_teacher_that_is_learnt_from_alone(mixed):
    one, other = Formula(), Formula(Kind.METRIC_DEPTH)
    online = OnlineDataset(
        [replace(shard, teachers=()) for shard in mixed[:1]], [("one", one), ("other", other)], crops=CROPS
    )
    both = online[1]
    asked = len(other.sizes)
    alone = online.get(1, ["one"], visit=5)
    assert list(alone.labels) == ["one"] and len(other.sizes) == asked
    assert torch.equal(alone.labels["one"].shared.values, both.labels["one"].shared.values)
    bridged = OnlineDataset(
        mixed[2:] and [replace(mixed[0], teachers=())],
        [("one", one), ("b", Bridged(Formula(Kind.AFFINE_DEPTH), "one", 1.0))],
        crops=CROPS,
    )
    assert list(bridged.get(0, ["b"]).labels) == ["b"]


def test_online_knows_the_sources_and_replaces_by_an_image_of_the_same_teachers(mixed):
    online = OnlineDataset(mixed, teachers(), crops=CROPS)
    assert online.sources == [0] * 4 + [1] * 2 + [2] * 2 and online.teachers_of(0) == ("net",)
    broken = replace(online.entries[3][0], load=lambda: online.entries[0][0].load() and _bad())
    online.entries[3] = (broken, 0)
    assert online.get(3, ["net"]).image_key.startswith("scene"), "the next that has the network's labels"
    assert online.get(3, ["net"]).key == "scene_000009-0" and len(online.quarantine) == 1


def test_online_reads_one_image_of_a_million_and_again_where_its_disk_did_not_answer(mixed, monkeypatch):
    monkeypatch.setattr(patience, "WAITS_S", (0.0,))
    online = OnlineDataset(mixed[:1], teachers(), crops=CROPS)
    first, _ = online.entries[0]
    failures = [OSError(errno.EIO, "Input/output error")]
    entry = replace(first, load=lambda: _raise(failures.pop()) if failures else first.load())
    before, online.entries = online[0], [(entry, 0)] * 10**6
    tracemalloc.start()
    try:
        after = online.get(0, ["net"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    assert torch.equal(after.image, before.image) and not failures and not online.quarantine


def _raise(error):
    raise error


def _bad():
    raise sources.BadImageError("it is broken")


def test_crops_are_redrawn_at_every_visit_and_follow_from_it_alone(mixed):
    crops = replace(CROPS, redraw=True)
    online, again = (OnlineDataset(mixed[:1], teachers(), crops=crops, seed=4) for _ in range(2))
    first = online.get(2, ["net"], visit=100)
    places = [tuple(online.get(2, ["net"], visit=visit).record["crop"].values()) for visit in range(100, 106)]
    assert len({*places}) > 3 and len({online.get(2, ["net"]).key for _ in range(2)}) == 1
    same = again.get(2, ["net"], visit=100)
    assert same.key == first.key == "sa_2-100" and torch.equal(same.image, first.image)
    fixed = OnlineDataset(mixed[:1], teachers(), crops=CROPS, seed=4)
    assert torch.equal(fixed.get(2, ["net"], visit=7).image, fixed[2].image)
    with pytest.raises(ValueError, match="redraw = true draws a region at every visit"):
        replace(CROPS, redraw=True, crops_per_image=2)


def test_truth_stored_as_it_is_and_as_disparity_teaches_the_same(mixed):
    for store in ("as_is", "disparity"):
        sample = OnlineDataset(mixed[1:2], teachers(), crops=CROPS, labels=LabelSettings(store=store))[0]
        labels = convert_labels(sample.labels["truth"], "affine_disparity")
        assert labels.shared.kind is Kind.AFFINE_DISPARITY and labels.supervision.metric
