"""Ground truth that was spoilt to stand for a network is labelled, stored and read as an opinion."""

from __future__ import annotations

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.data.corruptions import Corruptions
from distill.data.photos import Photo
from distill.labelling.annotate import label_photo
from distill.labelling.settings import LabelSettings
from distill.shards.codec import decode_sample, encode_sample
from tests.labelling.formula import CROPS


@pytest.mark.parametrize("coded", [False, True])
def test_spoilt_truth_is_no_truth(coded):
    values = torch.linspace(1.0, 9.0, 96 * 128).reshape(1, 96, 128)
    truth = DepthMap(values, values > 0, Kind.METRIC_DEPTH)
    photo = Photo("p", torch.zeros(3, 96, 128, dtype=torch.uint8), truth, "p")
    made = label_photo(photo, [("truth", "truth"), ("soft", Corruptions(blur=2.0))], crops=CROPS)
    assert made.record["labels"]["soft"]["corruptions"] == {"blur": 2.0}
    members = {name.split(".", 1)[1]: data for name, data in encode_sample(made)}
    read = decode_sample(members, coded=coded).answers
    for labels in (made.labels, read):
        assert labels["truth"].supervision.truth and not labels["soft"].supervision.truth


@pytest.mark.parametrize("store", ["disparity", "as_is"])
def test_truth_is_stored_as_the_kind_that_is_asked_for(store):
    values = torch.linspace(1.0, 9.0, 96 * 128).reshape(1, 96, 128)
    photo = Photo("p", torch.zeros(3, 96, 128, dtype=torch.uint8), DepthMap(values, values > 2, Kind.METRIC_DEPTH), "p")
    made = label_photo(photo, [("truth", "truth")], crops=CROPS, labels=LabelSettings(store=store))
    labels, metric = made.labels["truth"], "metric_disparity" if store == "disparity" else "metric_depth"
    assert made.record["labels"]["truth"]["predicted"] == "metric_depth"
    for depth in (labels.shared, labels.local):
        assert depth.kind == metric
        metres = 1 / depth.values if store == "disparity" else depth.values
        assert depth.valid.any() and ((metres > 2) & (metres <= 9))[depth.valid].all()
