"""Labels are the teacher's answer on the same pixels, for every good image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from threading import Event

import numpy as np
import pytest
import torch

from distill.core import crops
from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.data.sources import Entry, InputShard, Photo, Rejected, Scan
from distill.labelling.finishing import stored
from distill.labelling.jobs import plan_photo
from distill.labelling.parts import Contents, describe, line_of, parts_of
from distill.labelling.run import (
    TRUTH,
    LabelSettings,
    PartSettings,
    _own_parts,
    label,
    label_photo,
    labels_hash,
    part_sizes,
)
from distill.shards.codec import MAX_ERROR
from distill.shards.shards import LabelDataset, read_manifest, verify
from distill.shards.tables import read_json
from tests.data.pictures import encoded, pack, picture
from tests.labelling.formula import CROPS, Formula, contents, make_tar, run, work


def test_a_parts_description_does_not_depend_on_the_order_of_a_set(tars, tmp_path):
    part, kinds = parts_of(tars[0], 4)[0], Contents(kinds={"truth": {str(kind) for kind in Kind}})
    describe(tmp_path, part, kinds, tar={}, samples=[], quarantine=[])
    assert read_json((tmp_path / part.name).with_suffix(".json"))["kinds"] == {"truth": sorted(Kind)}


def test_labels_are_the_teachers_answer_on_the_same_pixels(tars, tmp_path):
    outcome = run(tars, tmp_path / "out")
    assert outcome.complete and (outcome.images, outcome.samples, outcome.quarantined) == (10, 18, 1)
    assert verify(tmp_path / "out") == []
    dataset = LabelDataset(tmp_path / "out")
    photos = {e.key: e for shard in tars for e in shard.scan().entries}
    assert len(dataset) == 18
    for sample in (dataset[i] for i in range(0, 18, 5)):
        photo = photos[sample.image_key].load()
        plan = plan_photo(photo, CROPS, draw=int(sample.key[-1]))
        labels = sample.labels["formula"]
        assert labels.shared.kind == Kind.SCALE_DISPARITY and torch.equal(labels.boxes[0], plan.boxes())
        for got, cut in (
            (labels.shared, crops.cut_region(photo.rgb, plan)[None]),
            (labels.local, crops.cut_patches(photo.rgb, plan)),
        ):
            want = Formula().predict(cut.float() / 255)
            assert torch.equal(got.valid, want.valid)
            # Disparities of this teacher span less than 1.
            assert ((got.values - 1 / want.values)[want.valid].abs() < MAX_ERROR + 1e-6).all()


def test_manifest_tells_everything(tars, tmp_path):
    run(tars, tmp_path / "out", recipe={"crops": {"size": 16}}, licence="SA-1B research", sky="far")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["teachers"]["formula"]["licence"] == "MIT" and manifest["recipe"] == {"crops": {"size": 16}}
    assert manifest["teachers"]["formula"]["stored"] == ["scale_disparity"]
    assert manifest["images"]["count"] == 9 and "sa_2" not in manifest["images"]["keys"]
    assert [shard["name"] for shard in manifest["shards"]] == [
        *(f"sa_0-00{i}.tar" for i in range(4)),
        *(f"sa_1-00{i}.tar" for i in range(2)),
    ]
    (line,) = manifest["quarantine"]
    assert manifest["passed"][".txt"] == 1
    assert (line["key"], line["origin"]) == ("sa_2", "sa_0.tar:sa_2.jpg") and "text" in line["reason"]
    assert manifest["licence"]["images"] == "SA-1B research" and manifest["settings"]["sky"] == "far"
    assert manifest["format"]["invalid_below"] == 8 and manifest["format"]["codec"] == "jls"
    page = (tmp_path / "out" / "README.md").read_text()  # its first lines are what datasets.load_dataset reads
    assert page.startswith('---\nconfigs:\n- config_name: default\n  data_files: "*.tar"\n---\n')
    assert "squares of 9 images" in page and "| formula | none | scale_disparity | MIT |" in page
    record = LabelDataset(tmp_path / "out")[0].record
    assert record["labels"]["formula"]["predicted"] == "scale_depth" and record["sky"] == "far"
    assert str(tmp_path) not in str(contents(tmp_path / "out")), "labels do not say where they were made"


@pytest.mark.parametrize(
    ("kind", "store", "kept"),
    [
        (Kind.METRIC_DEPTH, "disparity", Kind.METRIC_DISPARITY),
        (Kind.SCALE_DEPTH, "as_is", Kind.SCALE_DEPTH),
        (Kind.AFFINE_DEPTH, "disparity", Kind.AFFINE_DEPTH),
        (Kind.AFFINE_DISPARITY, "disparity", Kind.AFFINE_DISPARITY),
    ],
)
def test_kinds_are_stored_as_lawful(kind, store, kept):
    rgb = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    sample = label_photo(
        Photo("a", rgb, None, "a"), [("t", Formula(kind))], crops=CROPS, labels=LabelSettings(store=store)
    )
    assert sample.labels["t"].shared.kind == sample.labels["t"].local.kind == kept


def test_the_seed_of_a_run_draws_its_crops(tars):
    (entry, *_), asked = tars[1].scan().entries, replace(CROPS, crops_per_image=2)
    settings = PartSettings([("t", Formula())], asked, LabelSettings(), 5, torch.device("cpu"), (), Event())
    jobs = settings.jobs(entry)
    plans = [plan_photo(entry.load(), asked, seed=5, draw=draw) for draw in (0, 1)]
    assert [job.record["seed"] for job in jobs] == [5, 5] and len(jobs) == 2
    for job, plan in zip(jobs, plans, strict=True):
        assert {name: job.record["crop"][name] for name in plan.region.record} == plan.region.record
    assert plans[0].region != plan_photo(entry.load(), asked, seed=0, draw=0).region


def test_each_image_belongs_to_one_process_and_with_many_shards_the_others_are_not_scanned():
    for count in range(1, 10):
        for world in (1, 2, 3):
            whole, per_rank = [], []
            for rank in range(world):
                scanned = []

                def scan(i, scanned=scanned):
                    scanned.append(i)
                    entries = tuple(Entry(f"{i}.{n}", f"{i}.{n}", lambda: None) for n in range(3))
                    return Scan(entries, (), ())

                shards = [InputShard(f"s{i}", f"s{i}", partial(scan, i)) for i in range(count)]
                whole += [
                    (part.name, [e.key for e in part.entries]) for part in _own_parts(shards, [2] * count, rank, world)
                ]
                per_rank.append(len(scanned))
            assert sorted(whole) == [
                (f"s{i}-00{n}.tar", [f"{i}.{e}" for e in range(2 * n, min(3, 2 * n + 2))])
                for i in range(count)
                for n in (0, 1)
            ]
            assert sum(per_rank) == (count if count >= 4 * world else count * world)


def test_about_one_shard_in_twenty_has_finer_parts():
    fine = LabelSettings(samples_per_part=8, fine_tail=4)
    crops_ = replace(CROPS, crops_per_image=2)
    for count, ends in ((1, 1), (20, 1), (21, 2), (40, 2), (41, 3)):
        assert part_sizes([None] * count, crops_, fine) == [4] * (count - ends) + [1] * ends
    assert part_sizes([None] * 40, crops_, replace(fine, fine_tail=1)) == [4] * 40


def test_infinite_depth_is_no_value():
    depth = DepthMap(
        torch.tensor([[[1.0, torch.inf, torch.nan, 2.0]]]), (torch.arange(4) < 3)[None, None], Kind.AFFINE_DISPARITY
    )
    for store in ("as_is", "disparity"):
        assert stored(depth, store).valid.tolist() == [[[True, False, False, False]]]
    teacher = Formula()
    teacher.predict = lambda images: DepthMap(1 / (images[:, 0] > 0.3), images[:, 0] >= 0, Kind.SCALE_DEPTH)
    photo = Photo("a", torch.from_numpy(np.array(picture())).permute(2, 0, 1), None, "a")
    for store in ("as_is", "disparity"):
        shared = label_photo(photo, [("t", teacher)], crops=CROPS, labels=LabelSettings(store=store)).labels["t"].shared
        assert torch.isfinite(shared.values[shared.valid]).all() and 0 < shared.valid.sum() < shared.valid.numel()


def test_a_whole_image_is_squashed_and_nothing_is_left_out():
    """The baseline without a random crop; a folder's address knows it, and that of other recipes stays what it was."""
    ramp = torch.arange(80.0).expand(40, 80)[None]
    truth = DepthMap(1 + ramp, torch.ones(1, 40, 80, dtype=torch.bool), Kind.METRIC_DEPTH)
    photo = Photo("a", ramp.expand(3, -1, -1).to(torch.uint8), truth, "a")
    settings = replace(CROPS, size=40, min_side=16, patch_size=0, patches="none", region="whole")
    for draw in (0, 1):
        sample = label_photo(photo, [(TRUTH, TRUTH)], crops=settings, draw=draw)
        assert sample.record["crop"] | {"draw": 0} == {
            "top": 0, "left": 0, "side": 40, "size": 40, "patch_size": 40, "draw": 0, "squashed": True,
        }  # fmt: skip
        assert sample.record["image"]["width"] == 80
        depth = 1 / sample.labels[TRUTH].shared.values[0, 0]
        assert depth[0] <= 2 and depth[-1] >= 79 and torch.allclose(depth.diff(), torch.tensor(2.0), atol=1e-3)
    assert "region" not in CROPS.content and settings.content["region"] == "whole"


def test_truth_is_cut_to_the_pixel_and_nothing_invalid_leaks():
    depth = torch.arange(1.0, 1 + 40 * 50).reshape(1, 40, 50)
    valid = torch.rand(1, 40, 50) > 0.3
    truth = DepthMap(torch.where(valid, depth, torch.nan), valid, Kind.METRIC_DEPTH)
    photo = Photo("a", torch.zeros(3, 40, 50, dtype=torch.uint8), truth, "a")
    for size in (16, 31, 50):
        settings = replace(CROPS, size=size, patch_size=10)
        labels = label_photo(photo, [(TRUTH, TRUTH)], crops=settings).labels[TRUTH]
        plan = plan_photo(photo, settings)
        assert labels.shared.kind == Kind.METRIC_DISPARITY and torch.isfinite(labels.shared.values).all()
        got = 1 / labels.shared.values[0]
        centres = ((torch.arange(size) + 0.5) * plan.region.side / size).floor().long()
        rows, columns = plan.region.top + centres[:, None], plan.region.left + centres[None, :]
        assert torch.equal(labels.shared.valid[0], valid[0, rows, columns])
        assert torch.allclose(got[labels.shared.valid[0]], depth[0, rows, columns][labels.shared.valid[0]])
        first = plan.patches[0]
        rows, columns = (
            plan.region.top + first.top + torch.arange(10),
            plan.region.left + first.left + torch.arange(10),
        )
        assert torch.equal(labels.local.valid[0], valid[0][rows][:, columns])


def test_images_without_truth_are_quarantined_for_it(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    shards_ = sources.tars(tmp_path / "sa_0.tar")
    outcome = label(shards_, [(TRUTH, TRUTH)], out=tmp_path / "out", crops=CROPS)
    assert outcome.complete and outcome.samples == 0 and not list((tmp_path / "out").glob("*.tar"))
    assert all("no ground truth" in line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"])
    assert label(shards_, [(TRUTH, TRUTH)], out=tmp_path / "out", crops=CROPS).skipped == 1


def test_a_key_of_two_tars_is_kept_once_by_readers(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    make_tar(tmp_path / "sa_1.tar", count=2, first=1)
    run(sources.tars(str(tmp_path / "*.tar")), tmp_path / "out", crops_per_image=1)
    assert LabelDataset(tmp_path / "out").image_keys == ["sa_0", "sa_1", "sa_2"]
    [line] = read_manifest(tmp_path / "out")["quarantine"]
    assert line["key"] == "sa_1" and "sa_0-000.tar has it too" in line["reason"]


def test_images_smaller_than_the_crop_are_quarantined_or_used(tmp_path):
    pack(tmp_path / "sa_0.tar", [("a.jpg", encoded(picture(12, 40))), ("b.jpg", encoded(picture(30, 40)))])
    tar = sources.tars(tmp_path / "sa_0.tar")
    run(tar, tmp_path / "out")
    [line] = read_manifest(tmp_path / "out")["quarantine"]
    assert line["key"] == "a" and "smaller than the smallest crop" in line["reason"]
    run(tar, tmp_path / "small", crops=replace(CROPS, on_small="use"))
    assert len(LabelDataset(tmp_path / "small")) == 4


# --- killed, resumed, in parallel -------------------------------------------------------------------------------------


def test_progress_tells_time_and_disk(tars, tmp_path):
    told = []
    outcome = run(tars, tmp_path / "out", report=lambda done, total, **numbers: told.append((done, total, numbers)))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told) and told[-1][:2] == (10, 10)
    last = told[-1][2]
    assert set(last) == {"images_per_s", "bytes_per_image", "quarantined", "eta_s", "disk_bytes"}
    assert last["eta_s"] == 0 and last["disk_bytes"] == outcome.bytes and last["quarantined"] == 1


def test_labels_have_an_address_that_depends_on_what_made_them():
    teachers = [{"name": "a", "weights": "x"}]
    address = labels_hash({"tars": "a", "n": 1}, CROPS, teachers)
    assert len(address) == 16 and address == labels_hash({"n": 1, "tars": "a"}, CROPS, teachers)
    assert address != labels_hash({"tars": "b", "n": 1}, CROPS, teachers)
    assert address != labels_hash({"tars": "a", "n": 1}, replace(CROPS, size=14), teachers)


def test_a_licence_that_is_said_later_is_written_down_and_none_is_taken_away(tars, tmp_path):
    def licence(make, **options):
        assert make(tars, tmp_path / "out", **options).complete
        return read_manifest(tmp_path / "out")["licence"]["images"]

    assert licence(run) == "unknown"
    assert licence(run, licence="CC BY 4.0") == "CC BY 4.0" == licence(run)
    assert licence(work, licence="CC0") == "CC0" == licence(work)


def test_a_reason_has_no_address_in_memory():
    reason = "<object at 0x7f00Ab223344> and 0x12"
    assert line_of(Rejected("o", "k", reason)) == {"origin": "o", "key": "k", "reason": "<object at 0x...> and 0x12"}
