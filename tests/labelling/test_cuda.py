"""Labels by a teacher on a card are those of the same teacher on a CPU, and made twice the same."""

from __future__ import annotations

import pytest
import torch

from distill.core.plugins import find
from distill.shards.codec import MAX_ERROR
from distill.shards.shards import LabelDataset, read_manifest, verify
from tests import tiny_teachers
from tests.labelling.formula import contents, run

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ["checkpoint", "depth_anything_v2", "genpercept"])
def test_labels_are_those_of_a_cpu(tars, tmp_path, card, name):
    if name == "genpercept":
        pytest.importorskip("diffusers")
    (tmp_path / "weights").mkdir()
    weights, options = getattr(tiny_teachers, name)(tmp_path / "weights")
    teacher = find("distill.teachers", name).Teacher
    for where in ("cpu", "cuda"):
        loaded, device = teacher.load(weights, device=where, **options), torch.device(where)
        outcome = run(tars, tmp_path / where, loaded, device=device)
        assert outcome.complete and verify(tmp_path / where) == []
    here, there = LabelDataset(tmp_path / "cpu"), LabelDataset(tmp_path / "cuda")
    assert here.keys == there.keys and len(here) == 18
    for a, b in zip(here, there, strict=True):
        for one, other in zip(*([s.labels["formula"].shared, s.labels["formula"].local] for s in (a, b)), strict=True):
            assert torch.equal(one.valid, other.valid) and one.kind == other.kind
            for values, others in zip(one.values, other.values, strict=True):
                span = values.max() - values.min()
                assert (values - others).abs().max() <= (2 * MAX_ERROR + 1e-3) * span
    told = [read_manifest(tmp_path / where)["teachers"]["formula"] for where in ("cpu", "cuda")]
    assert told[0]["weights"] == told[1]["weights"]


def test_labels_made_twice_are_the_same_bytes(tars, tmp_path, card):
    (tmp_path / "weights").mkdir()
    weights, options = tiny_teachers.checkpoint(tmp_path / "weights")
    teacher = find("distill.teachers", "checkpoint").Teacher.load(weights, device=card, **options)
    for folder in ("one", "two"):
        run(tars, tmp_path / folder, teacher, device=card)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
