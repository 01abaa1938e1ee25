"""Teachers that fail, and what the labels lose by it; samples without shards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.data.sources import BadImageError, Photo
from distill.labelling import annotate
from distill.labelling.run import TRUTH, OnlineDataset, label, label_photo
from distill.shards.codec import MAX_ERROR
from distill.shards.shards import LabelDataset, collate, read_manifest
from tests.labelling.formula import CROPS, Broken, Formula, run


def test_crops_of_many_images_share_batches(tars, tmp_path):
    teacher = Formula()
    run(tars, tmp_path / "out", teacher, batch_size=8, samples_per_part=100, crops=replace(CROPS, patch_size=16))
    assert teacher.sizes.count(8) >= len(teacher.sizes) - 2 and sum(teacher.sizes) > 60


@dataclass
class Sick(Formula):
    """Fails on pictures of one colour."""

    how: str = "raise"

    def predict(self, images):
        depth = super().predict(images)
        # picture(seed=3) is the one whose blue is 160.
        sick = ((images[:, 2].mean((1, 2)) * 255).round() - 160).abs() < 5
        if self.how == "raise" and sick.any():
            raise RuntimeError("kernel\nfault at 0x7f0011223344")
        values, valid = depth.values.clone(), depth.valid.clone()
        values[sick, 3, 3] = torch.nan if self.how == "nan" else values[sick, 3, 3]
        valid[sick] = valid[sick] & (self.how != "invalid")
        return DepthMap(values, valid, depth.kind)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "formula failed on patch 0: kernel"),
        ("nan", "returned NaN on 1 pixels"),
        ("invalid", "no valid pixel"),
    ],
)
def test_a_teacher_that_fails_on_one_image_costs_that_image_alone(tars, tmp_path, how, reason):
    run(tars, tmp_path / "well")
    run(tars, tmp_path / "sick", Sick(how=how))
    well, sick = LabelDataset(tmp_path / "well"), LabelDataset(tmp_path / "sick")
    lost = {"sa_3", "sa_8"}
    assert set(sick.image_keys) == set(well.image_keys) - lost
    lines = [line for line in read_manifest(tmp_path / "sick")["quarantine"] if line["key"] != "sa_2"]
    assert [line["key"] for line in lines] == ["sa_3-0", "sa_3-1", "sa_8-0", "sa_8-1"]
    assert all(reason in line["reason"] and "\n" not in line["reason"] for line in lines)
    for i, key in enumerate(sick.keys):
        other = well[well.keys.index(key)]
        assert torch.equal(sick[i].labels["formula"].shared.values, other.labels["formula"].shared.values)


def test_a_teacher_that_fails_on_everything_stops_the_run(tars, tmp_path):
    for samples_per_part in (4, 100):
        with pytest.raises(annotate.TeacherFailedError, match="samples failed.*no kernel image"):
            run(tars, tmp_path / str(samples_per_part), Broken(), samples_per_part=samples_per_part)
        assert not list((tmp_path / str(samples_per_part)).glob("*.tar"))


def test_failures_that_are_not_in_a_row_do_not_stop_a_run():
    queue = annotate.BatchQueue([], annotate.DEFAULTS, None)
    for _ in range(annotate.FAILURES_IN_A_ROW):
        for problem in (*["odd"] * (annotate.FAILURES_IN_A_ROW - 1), ""):
            queue._count(problem)
    queue.check_all_failed()
    with pytest.raises(annotate.TeacherFailedError, match="20 samples in a row failed"):
        for _ in range(annotate.FAILURES_IN_A_ROW):
            queue._count("odd")


def test_contract_breaches_and_lack_of_memory_stop_the_run(tars, tmp_path):
    with pytest.raises(annotate.TeacherFailedError, match="not have enough memory for one crop"):
        run(tars, tmp_path / "a", Broken(error=torch.OutOfMemoryError("12 GiB")))
    small = Formula()
    small.predict = lambda images: DepthMap(images[:, 0, ::2], images[:, 0, ::2] > 0, Kind.SCALE_DEPTH)
    with pytest.raises(annotate.TeacherFailedError, match="returned maps"):
        run(tars, tmp_path / "b", small)
    with pytest.raises(TypeError):
        run(tars, tmp_path / "c", Broken(error=TypeError("a bug")))


def test_noise_belongs_to_the_crop(tars, tmp_path):
    asked = []
    teacher = Formula(seeded=True)
    plain = teacher.predict
    teacher.predict = lambda images, keys: (asked.extend(keys), plain(images))[1]
    run(tars[1:], tmp_path / "out", teacher, crops_per_image=1)
    assert {"sa_7-0.shared", "sa_7-0.local0", "sa_9-0.shared"} < set(asked) and len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", ["Big", "a.b", "a/b", ""])
def test_teacher_names_that_spoil_file_names_are_refused(tars, tmp_path, name):
    with pytest.raises(ValueError, match="teacher name"):
        label(tars, [(name, Formula())], out=tmp_path / "out", crops=CROPS)


# --- without shards ---------------------------------------------------------------------------------------------------


def test_online_samples_are_the_stored_ones_before_quantization(tars, tmp_path):
    run(tars, tmp_path / "out")
    stored = LabelDataset(tmp_path / "out")
    online = OnlineDataset(tars, [("formula", Formula())], crops=replace(CROPS, crops_per_image=2))
    keys = [key for key in online.keys if not key.startswith("sa_2-")]
    assert keys == stored.keys and online.image_keys[0] == "sa_0" and online.teachers == ["formula"]
    for i in range(0, len(keys), 4):
        got, want = (sample.labels["formula"] for sample in (online[online.keys.index(keys[i])], stored[i]))
        for a, b in ((got.shared, want.shared), (got.local, want.local)):
            assert torch.equal(a.valid, b.valid) and (a.values - b.values)[a.valid].abs().max() < MAX_ERROR + 1e-6
    assert collate([online[0], online[1]]).images.shape == (2, 3, 16, 16)


def test_online_names_a_bad_image_once_however_often_it_is_drawn(tars):
    online = OnlineDataset(tars, [("formula", Formula())], crops=replace(CROPS, redraw=True))
    assert {online.get(2, ["formula"], visit=visit).image_key for visit in range(40)} == {"sa_3"}
    assert [line.key for line in online.quarantine] == ["sa_2-0"], "a run of days has many visits"


def test_online_replaces_a_bad_image_by_the_next_and_says_so(tars):
    online = OnlineDataset(tars, [("formula", Formula())], crops=CROPS)
    assert online[2].key == online[2].key == "sa_3-0" and [q.key for q in online.quarantine] == ["sa_2-0"]
    assert [sample.key for sample in online].count("sa_3-0") == 2, "iteration ends"
    online.keep_apart([3])
    assert online[2].key == "sa_4-0", "a training image is not replaced by one that is held out"
    online.keep_apart([1, 2])
    assert online[2].key == online[2 - len(online)].key == "sa_1-0", "nor the reverse"
    with pytest.raises(ValueError, match="none of 10 images can be labelled; the last failed with: no ground truth"):
        OnlineDataset(tars, [(TRUTH, TRUTH)], crops=CROPS)[0]
    with pytest.raises(BadImageError, match="smaller than"):
        label_photo(Photo("a", torch.zeros(3, 9, 9, dtype=torch.uint8), None, "a"), [], crops=CROPS)
