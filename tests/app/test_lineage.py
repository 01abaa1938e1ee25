"""What a student's card says of its origins: nothing is allowed that one of them forbids or nobody knows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from distill.app import build
from distill.app.lineage import lineage, teachers_of
from distill.app.recipe import parse
from distill.app.strict import RecipeError
from distill.students.encoder import licence_of

FREE = {"weights": "org/free", "revision": "1", "licence": "Apache-2.0", "commercial": True}


def said(teachers=None, *, images="CC0", **student):
    table = {"run": {"name": "x"}, "labels": {"licence": images}, "student": student}
    return lineage(parse(table), {"teacher": FREE} if teachers is None else teachers)


@pytest.mark.parametrize("images", ["CC0", "CC BY 4.0, scenes: Apache-2.0", "our own photos", "public domain"])
def test_images_that_may_be_used(images):
    assert said(images=images)[1] is True


def test_everything_free_is_free():
    found, commercial = said()
    assert commercial and found["images"]["licence"] == "CC0"
    assert found["teacher teacher"] == {key: FREE[key] for key in ("weights", "licence", "commercial")}


@pytest.mark.parametrize(
    "case",
    [
        {"teachers": {"a": FREE, "b": FREE | {"commercial": False, "licence": "CC-BY-NC-4.0"}}},
        {"images": "SA-1B Dataset Research License"},
        {"images": "unknown"},
        {"images": ""},
        {"images": "CC BY-NC 4.0"},
        {"images": "CC-BY-NC-SA-4.0"},
        {"images": "not for commercial use"},
        {"images": "all rights reserved"},
        {"images": "CC0; some CC BY-NC"},
        {"encoder_init_from": "pocket"},
        {"init_from": "pocket"},
        {"weights": "weights/dinov2.pth"},
        {"decoder_weights": "weights/depth_anything_v2_vits.pth"},
    ],
)
def test_one_that_forbids_or_is_unknown_is_enough(case):
    assert said(**case)[1] is False


def test_pretrained_weights_have_the_licence_that_timm_states():
    assert licence_of("dinov2_vits14") == "apache-2.0" and licence_of("dinov3_vits16") == "dinov3-license"
    found, commercial = said(weights="pretrained", encoder="dinov2_vits14")
    assert commercial and found["encoder"]["licence"] == "apache-2.0"


def test_teachers_at_hand_and_teachers_of_shards_say_the_same():
    card = SimpleNamespace(**FREE)
    online = SimpleNamespace(networks=[("teacher", SimpleNamespace(card=card)), ("truth", "truth")])
    assert teachers_of(online) == {"teacher": FREE}
    assert teachers_of(SimpleNamespace(manifest={"teachers": {"teacher": FREE}})) == {"teacher": FREE}


def test_labels_that_may_not_be_sold_are_refused_in_training_too(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    teachers = {"nc": FREE | {"commercial": False, "licence": "CC-BY-NC-4.0"}}
    monkeypatch.setattr(build, "labels_folder", lambda recipe: tmp_path)
    monkeypatch.setattr(build, "LabelDataset", lambda folder, **_: SimpleNamespace(manifest={"teachers": teachers}))
    table = {"run": {"name": "x"}, "labels": {"commercial_only": True}}
    with pytest.raises(RecipeError, match="commercial_only = true refuses the labels in .*nc made them with org/free"):
        build.training_labels(parse(table))
    assert build.training_labels(parse(table | {"labels": {}})).manifest["teachers"] == teachers
