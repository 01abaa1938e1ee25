"""Teachers that ask no network of others: stored maps, and a student of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distill.core import crops
from distill.core.depth import Kind
from distill.students import checkpoint as checkpoints
from distill.teachers import (
    checkpoint,
    stored,
)
from tests.teachers.asking import IMAGES, load
from tests.tiny_teachers import KEYS, SIZE


class TestCheckpoint:
    def test_is_the_student(self, made):
        teacher = load(made, "checkpoint", resize="none")
        student = checkpoints.load(made("checkpoint")[0])
        with torch.no_grad():
            torch.testing.assert_close(teacher.predict(IMAGES).values, student(IMAGES))
            sized = crops.resize(IMAGES, 48, 64)  # short side 37 to 48, 53 to 68.8: nearest multiple of 16
            expected = crops.resize(student(sized)[:, None], *SIZE)[:, 0]
        torch.testing.assert_close(load(made, "checkpoint").predict(IMAGES).values, expected)
        assert teacher.card.licence == "Apache-2.0" and teacher.card.commercial and teacher.card.multiple == 16

    def test_missing(self, tmp_path):
        with pytest.raises(OSError, match="no such folder"):
            checkpoint.Teacher.load(str(tmp_path / "nothing"))


class TestStored:
    def test_marigold_names_and_settings(self, tmp_path):
        (tmp_path / "a").mkdir()
        values = np.random.default_rng(0).random((1, *SIZE)).astype(np.float32)
        values[0, 0, 0] = np.nan
        np.save(tmp_path / "a" / "pred_0001.npy", values)
        (tmp_path / "settings.json").write_text(json.dumps({"kind": "metric_depth", "model": "m", "settings": {}}))
        teacher = stored.Teacher.load(str(tmp_path))
        out = teacher.predict(IMAGES[:1], keys=["a/rgb_0001.png"])
        assert out.kind == Kind.METRIC_DEPTH and not out.valid[0, 0, 0] and out.valid.sum() == values.size - 1
        np.testing.assert_array_equal(out.values[0].numpy(), values[0])
        with pytest.raises(ValueError, match="metric_depth, not scale_depth"):
            stored.Teacher.load(str(tmp_path), kind="scale_depth")

    def test_errors(self, made, tmp_path):
        teacher = load(made, "stored")
        with pytest.raises(LookupError, match="no stored map for c.png: looked for .*c.npy"):
            teacher.predict(IMAGES[:1], keys=["c.png"])
        with pytest.raises(LookupError, match="must be a path inside"):
            teacher.predict(IMAGES[:1], keys=["../scene/a.png"])
        with pytest.raises(ValueError, match=r"is \(37, 53\), the image \(40, 53\)"):
            teacher.predict(torch.rand(1, 3, 40, 53), keys=KEYS[:1])
        with pytest.raises(ValueError, match="give keys="):
            teacher.predict(IMAGES)
        with pytest.raises(ValueError, match="give kind"):
            stored.Teacher.load(made("stored")[0])
        with pytest.raises(OSError, match="no such folder"):
            stored.Teacher.load(str(tmp_path / "nothing"))
        (tmp_path / "a.npy").write_bytes(b"no map")
        with pytest.raises(ValueError, match="a.npy is not a readable"):
            stored.Teacher.load(str(tmp_path), kind="scale_depth").predict(IMAGES[:1], keys=["a.png"])

    def test_label_shards(self, tmp_path):
        from tests.shards.samples import PATCH, SIZE, make_sample, write

        sample = make_sample("sa_1", 1)
        folder = write(tmp_path / "labels", [make_sample("sa_1"), sample])
        with pytest.raises(ValueError, match="labels by one, two: give teacher"):
            stored.Teacher.load(str(folder))
        teacher = stored.Teacher.load(str(folder), teacher="two")
        shared = teacher.predict(torch.rand(2, 3, SIZE, SIZE), keys=["sa_1-1", "sa_1-1.shared"])
        expected = sample.labels["two"].shared
        assert shared.kind == expected.kind and torch.equal(shared.valid[0], expected.valid[0])
        assert torch.equal(shared.values[0], shared.values[1])
        assert (shared.values[0] - expected.values[0])[expected.valid[0]].abs().max() < 1e-3
        local = teacher.predict(torch.rand(1, 3, PATCH, PATCH), keys=["sa_1-1.local2"])
        truth = sample.labels["two"].local
        assert (local.values - truth.values[2:3])[local.valid].abs().max() < 1e-3
        for key in ("sa_1-1.local3", "sa_9-0", "sa_1-1.left"):
            with pytest.raises(LookupError, match="has no"):
                teacher.predict(torch.rand(1, 3, PATCH, PATCH), keys=[key])


def test_a_sample_of_shards_is_decoded_once_for_all_its_maps(tmp_path, monkeypatch):
    from tests.shards.samples import PATCH, make_sample, write

    teacher = stored.Teacher.load(str(write(tmp_path / "labels", [make_sample("sa_1")])), teacher="two")
    decoded, plain = [], stored.LabelDataset.__getitem__

    def spy(self, row):
        decoded.append(row)
        return plain(self, row)

    monkeypatch.setattr(stored.LabelDataset, "__getitem__", spy)
    for number in range(3):
        teacher.predict(torch.rand(1, 3, PATCH, PATCH), keys=[f"sa_1-0.local{number}"])
    assert decoded == [0]


def test_a_kind_that_settings_do_not_know_names_its_file(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"kind": ["affine_depth"]}))
    with pytest.raises(ValueError, match=r"settings.json: kind = \['affine_depth'\] is not one of metric_depth"):
        stored.Teacher.load(str(tmp_path))
    (tmp_path / "settings.json").write_text(json.dumps({"kind": "depth"}))
    with pytest.raises(ValueError, match=r"settings.json: kind = 'depth' is not one of metric_depth"):
        stored.Teacher.load(str(tmp_path))
