"""Kinds convert where that is lawful, and say why where it is not; alignment matches numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.core.align import apply_affine, fit_affine
from distill.core.depth import DepthMap, Kind, KindError, cat, least_known


def some_map(kind: str) -> DepthMap:
    values = torch.rand(2, 5, 7) + 0.5
    values[0, 0, 0] = -1.0
    values[0, 0, 1] = torch.nan
    values[0, 0, 2:4] = torch.tensor([0.0, torch.inf])
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    valid[1, 0] = False
    return DepthMap(values, valid, Kind(kind))


@pytest.mark.parametrize("unknown", ["metric", "scale"])
def test_depth_and_disparity_invert_exactly_and_drop_what_is_not_positive(unknown):
    depth = some_map(f"{unknown}_depth")
    disparity = depth.convert(f"{unknown}_disparity")
    assert disparity.kind == f"{unknown}_disparity"
    assert not disparity.valid[0, 0, :4].any() and not disparity.valid[1, 0].any()
    ok = disparity.valid
    torch.testing.assert_close(disparity.values[ok], 1.0 / depth.values[ok])
    assert torch.isfinite(disparity.values).all()
    back = disparity.convert(f"{unknown}_depth")
    torch.testing.assert_close(back.values[ok], depth.values[ok])


@pytest.mark.parametrize("frm", list(Kind))
@pytest.mark.parametrize("to", list(Kind))
def test_every_pair_of_kinds_is_either_lawful_or_refused_with_both_names(frm, to):
    order = ["metric", "scale", "affine"]
    lawful = frm == to or (
        order.index(to.unknown) >= order.index(frm.unknown) and (frm.quantity == to.quantity or frm.unknown != "affine")
    )
    assert frm.can_become(to) == lawful
    if lawful:
        assert some_map(frm).convert(to).kind == to
    else:
        with pytest.raises(KindError) as caught:
            some_map(frm).convert(to)
        assert str(frm) in str(caught.value) and str(to) in str(caught.value)


def test_kinds_are_members_by_the_names_that_files_use():
    assert all(getattr(Kind, str(kind)) is kind for kind in Kind)


def test_of_several_kinds_the_least_known_is_what_all_can_become():
    metric, scale, affine = (Kind(f"{unknown}_disparity") for unknown in ("metric", "scale", "affine"))
    assert least_known([metric, affine, scale]) is affine and least_known([scale, metric]) is scale
    assert all(kind.can_become(affine) for kind in (metric, scale, affine)) and not affine.can_become(scale)


def test_maps_of_two_kinds_do_not_join():
    with pytest.raises(KindError, match="affine_depth and scale_depth"):
        cat([some_map("affine_depth"), some_map("scale_depth")])
    assert len(cat([some_map("scale_depth"), some_map("scale_depth")])) == 4


def test_a_map_needs_a_mask_of_its_shape():
    with pytest.raises(ValueError, match="must both be"):
        DepthMap(torch.zeros(1, 4, 4), torch.ones(1, 4, 5, dtype=torch.bool), Kind.SCALE_DEPTH)
    with pytest.raises(ValueError, match="must be bool"):
        DepthMap(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), Kind.SCALE_DEPTH)


@settings(max_examples=30, deadline=None)
@given(st.floats(-50, 50), st.floats(-1000, 1000), st.integers(0, 10_000))
def test_fit_recovers_a_known_affine_map_whatever_lies_outside_the_mask(scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    pred = torch.rand(2, 9, 11, generator=g)
    valid = torch.rand(2, 9, 11, generator=g) > 0.4
    target = pred.double().mul(scale).add(shift).float()
    poisoned_pred = torch.where(valid, pred, torch.nan)
    poisoned = torch.where(valid, target, torch.nan)
    fit = fit_affine(poisoned_pred, poisoned, valid)
    aligned = apply_affine(pred, *fit)
    assert (aligned - target)[valid].abs().max() <= 1e-5 * max(1.0, abs(scale) + abs(shift))


def test_fit_is_numpys_least_squares_for_every_image_alone():
    pred, target = torch.randn(3, 8, 8), torch.randn(3, 8, 8)
    valid = torch.rand(3, 8, 8) > 0.3
    scale, shift = fit_affine(pred, target, valid)
    for b in range(3):
        p, t = pred[b][valid[b]].numpy(), target[b][valid[b]].numpy()
        expected = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
        np.testing.assert_allclose([scale[b], shift[b]], expected, atol=1e-5)


def test_a_fit_of_nearly_one_value_far_from_zero_keeps_its_digits():
    pred = (2**23 + torch.arange(16.0)).reshape(1, 4, 4)  # their sum is no float32, their spread 3e-13 of their square
    scale, shift = fit_affine(pred, 3 * (pred - 2**23), torch.ones(1, 4, 4, dtype=torch.bool))
    assert (scale.item(), shift.item()) == (3.0, -3.0 * 2**23)


def test_degenerate_fits_are_numpys_minimum_norm_solution():
    pred = torch.full((1, 4, 4), 2.0)
    target = torch.full((1, 4, 4), 3.0)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    expected = np.linalg.lstsq(np.stack([np.full(16, 2.0), np.ones(16)], 1), np.full(16, 3.0), rcond=None)[0]
    np.testing.assert_allclose([float(v) for v in fit_affine(pred, target, valid)], expected, rtol=1e-6)
    scale, shift = fit_affine(pred, target, ~valid)
    assert scale.item() == 0.0 and shift.item() == 0.0
