"""Maps of other shapes are refused where torch would broadcast them, or compare flattened ones at wrong pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.core.align import fit_affine
from distill.core.crop_settings import CropSettings
from distill.core.crops import cut_patches, cut_region, plan
from distill.core.shapes import check_maps

MAPS = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
VALID = torch.ones(2, 5, 6, dtype=torch.bool)


def test_equal_maps_pass_and_none_is_skipped():
    check_maps(pred=MAPS, target=MAPS, valid=VALID, weight=None)
    check_maps(pred=MAPS, target=MAPS, valid=None)
    check_maps(pred=MAPS.flatten(1), target=MAPS.flatten(1), valid=VALID.flatten(1), any_rank=True)


@pytest.mark.parametrize(
    ("pred", "target", "valid", "reason"),
    [
        (MAPS[:, None], MAPS, VALID, r"pred \(2, 1, 5, 6\), target \(2, 5, 6\), valid \(2, 5, 6\): squeeze\(1\)"),
        (MAPS[:, None], MAPS[:, None], VALID[:, None], r"\(B,H,W\), all of one shape.*squeeze"),
        (MAPS[0], MAPS[0], VALID[0], r"\(B,H,W\), all of one shape"),
        (MAPS, MAPS[:1], VALID, "of one shape"),
        (MAPS, MAPS.mT, VALID, "of one shape"),
        (MAPS, MAPS, VALID[:1], "of one shape"),
        (MAPS, MAPS, VALID.float(), r"valid must be bool, not torch.float32: valid > 0"),
        (MAPS, MAPS, VALID.to(torch.uint8), "valid must be bool"),
    ],
)
def test_what_would_be_broadcast_is_refused(pred, target, valid, reason):
    with pytest.raises(ValueError, match=reason):
        check_maps(pred=pred, target=target, valid=valid)


def test_what_is_no_tensor_is_told():
    with pytest.raises(TypeError, match="target must be a tensor, not ndarray"):
        check_maps(pred=MAPS, target=np.zeros((2, 5, 6)), valid=VALID)


def test_alignment_refuses_a_truth_that_it_would_repeat():
    with pytest.raises(ValueError, match="of one shape"):
        fit_affine(MAPS, MAPS[:1], VALID)


def test_a_plan_of_a_larger_image_cuts_nothing():
    crop = plan(100, 140, CropSettings(size=56, min_side=60), key="a")
    image = torch.rand(3, 100, 140)
    assert cut_region(image, crop).shape == (3, 56, 56)
    for cut in (cut_region, cut_patches):
        for other in (image[:, :50, :60], image.permute(1, 2, 0), image[None]):
            with pytest.raises(ValueError, match=r"the plan is of another image: it needs \(C,H,W\) of \d+ rows"):
                cut(other, crop)
