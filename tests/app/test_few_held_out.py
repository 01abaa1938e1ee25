"""`distill doctor` warns where a handful of held-out images would select the best checkpoint."""

from __future__ import annotations

import pytest

from distill.app.image_survey import Images
from distill.app.recipe import parse
from distill.app.sample_checks import sample_findings

TABLE = {
    "run": {"name": "few"},
    "images": [{"scenes": 4}],
    "teachers": [{"name": "analytic"}],
    "student": {"encoder": "test_vit", "decoder": "sdt"},
}


def warned(count, fraction, *, scanned=True):
    recipe = parse({**TABLE, "train": {"val_fraction": fraction, "batch_size": 1}}, where="few.toml")
    images = Images(count=count, learnt=count, idle=False, scanned=scanned, parts=1, photos=[], bad=[], rejected=[])
    return [(found.what, found.remedy) for found in sample_findings(recipe, images) if found.level == "warn"]


def test_a_single_held_out_image_is_told_with_a_fraction_that_holds_out_more():
    [(what, remedy)] = warned(40, 0.02)
    assert "train.val_fraction = 0.02 of at most 40 images: only one image will be held out" in what
    assert "set train.val_fraction = 0.5 or give more images" in remedy
    [(what, remedy)] = warned(400, 0.02, scanned=False)
    assert "of about 400 images: only about 8 images will be held out" in what and "= 0.05 or" in remedy


@pytest.mark.parametrize(("count", "fraction"), [(500, 0.02), (40, 0.0), (1, 0.02), (40, 0.25), (10**6, 0.02)])
def test_enough_images_none_or_no_choice_are_not_told(count, fraction):
    assert warned(count, fraction) == []
