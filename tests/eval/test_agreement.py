"""How far two maps agree: the measures on maps with known answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.core.depth import DepthMap, Kind
from distill.eval import agreement

RNG = torch.Generator().manual_seed(0)
SIZE = (64, 80)


def steps(height=64, width=80):
    """Blocks of constant disparity: every edge is a jump, the values are irregular."""
    small = torch.rand(1, 8, 10, generator=torch.Generator().manual_seed(1))
    return F.interpolate(small[None], (height, width), mode="nearest")[0] + 0.5


def smooth():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 80), indexing="ij")
    return (1.0 + rows + 0.3 * columns)[None]


def noise():
    return torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(5))


def blurred(maps, width=9):
    kernel = torch.ones(1, 1, width, width) / width**2
    return F.conv2d(F.pad(maps[:, None], [width // 2] * 4, mode="replicate"), kernel)[:, 0]


ALL = torch.ones(1, *SIZE, dtype=torch.bool)


def affine_disparity(values, valid=ALL):
    return DepthMap(values, valid, Kind.AFFINE_DISPARITY)


# --- measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [steps, smooth])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (40.0, -3.0), (0.1, 50.0)])
def test_an_affine_copy_agrees_perfectly(make, scale, shift):
    a = make()
    b = a * scale + shift
    assert agreement.alignment_error(a, b, ALL).item() < 5e-3
    assert agreement.ordinal_agreement(a, b, ALL).item() > 0.999
    if make is steps:
        assert agreement.edge_agreement(a, b, ALL).item() > 0.999
    assert agreement.sky_disagreement(affine_disparity(a), affine_disparity(b)).item() < 1e-3
    assert agreement.residual(b, a, ALL).abs().max() < 2e-2


def test_error_is_what_least_squares_leaves_and_symmetric():
    a, b = steps(), steps() + 0.3 * noise()
    design = torch.stack([a.flatten(), torch.ones(a.numel())], 1).double()
    solved = torch.linalg.lstsq(design, b.flatten()[:, None].double()).solution
    left = (design @ solved)[:, 0] - b.flatten().double()
    expected = left.square().mean().sqrt() / b.double().std(correction=0)
    assert agreement.alignment_error(a, b, ALL).item() == pytest.approx(expected.item(), rel=1e-4)
    assert agreement.alignment_error(b, a, ALL).item() == pytest.approx(expected.item(), rel=1e-4)
    assert agreement.residual(a, b, ALL).square().mean().sqrt().item() == pytest.approx(expected.item(), rel=1e-4)
    assert agreement.alignment_error(a, -b, ALL).item() == 1.0, "a negative scale is no alignment"


def test_constant_and_empty_maps():
    flat = torch.full((1, *SIZE), 3.0)
    assert agreement.alignment_error(flat, flat + 1, ALL).item() == 0
    assert agreement.alignment_error(flat, steps(), ALL).item() == 1
    assert agreement.alignment_error(steps(), steps(), ~ALL).isnan().all()
    assert agreement.ordinal_agreement(steps(), steps(), ~ALL).isnan().all()
    assert agreement.edge_agreement(flat, flat, ALL).isnan().all()
    assert agreement.sharpness(flat, ALL).item() == 0


def test_random_orders_agree_half_the_time():
    a, b = noise(), torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(9))
    assert agreement.ordinal_agreement(a, b, ALL, pairs=20_000).item() == pytest.approx(0.5, abs=0.02)
    assert agreement.ordinal_agreement(a, -a, ALL).item() == 0
    assert agreement.ordinal_agreement(a, torch.ones_like(a), ALL).item() == pytest.approx(0.5, abs=1e-6)


def test_a_blurred_copy_loses_edges_and_little_else():
    a = steps()
    b = blurred(a)
    assert agreement.edge_agreement(a, b, ALL).item() < 0.5
    assert agreement.sharpness(b, ALL).item() < 0.5 * agreement.sharpness(a, ALL).item()
    assert agreement.ordinal_agreement(a, b, ALL).item() > 0.8
    step = (torch.arange(80) >= 40).float().expand(1, 64, 80)
    assert agreement.sharpness(step, ALL).item() == pytest.approx(1.0)
    assert agreement.sharpness(blurred(step, 5), ALL).item() == pytest.approx(0.2, rel=1e-3)
    assert agreement.alignment_error(a, b, ALL).item() < 0.7
    moved = a.roll(1, -1)
    assert agreement.edge_agreement(a, moved, ALL).item() > 0.9, "one pixel is tolerated"
    assert agreement.edge_agreement(a, a.roll(3, -1), ALL).item() < 0.8


def test_invalid_pixels_are_not_looked_at():
    a = steps()
    valid = ALL.clone()
    valid[:, :, :20] = False
    spoilt = torch.where(valid, a, torch.nan)
    assert agreement.alignment_error(a, spoilt, valid).item() < 1e-3
    assert agreement.ordinal_agreement(a, spoilt, valid).item() == 1
    assert agreement.edge_agreement(a, spoilt, valid).item() == 1
    assert torch.isfinite(agreement.sharpness(spoilt, valid)).all()


def test_sky():
    a = steps()
    a[:, :32] = 0.0
    b = a.clone()
    b[:, :16] = 1.0
    disagreement = agreement.sky_disagreement(affine_disparity(a), affine_disparity(b)).item()
    assert disagreement == pytest.approx(0.25, abs=0.01)
    cut = ALL.clone()
    cut[:, :32] = False
    a2 = torch.where(cut, a, 7.0)
    assert agreement.sky_disagreement(affine_disparity(a), affine_disparity(a2, cut)).item() < 0.05, "invalid is sky"


def test_kinds_meet_in_disparity():
    disparity = steps()
    reference = affine_disparity(disparity)
    scale_depth = DepthMap(5.0 / disparity, ALL, Kind.SCALE_DEPTH)
    turned = agreement.to_disparity(scale_depth)
    assert turned.kind == Kind.AFFINE_DISPARITY
    assert agreement.alignment_error(turned.values, disparity, ALL).item() < 2e-3
    hidden = DepthMap(0.2 + 0.3 / disparity, ALL, Kind.AFFINE_DEPTH)  # the shift is lost
    fitted = agreement.to_disparity(hidden, reference)
    assert agreement.alignment_error(fitted.values, disparity, ALL).item() < 0.05
    holed, seen = disparity.clone(), ALL.clone()
    holed[:, :20], seen[:, :20] = 1e4, False
    beside = agreement.to_disparity(hidden, affine_disparity(holed, seen))
    assert torch.equal(beside.values, fitted.values), "the reference's invalid pixels are not looked at"
    negated = agreement.to_disparity(hidden)
    assert agreement.ordinal_agreement(negated.values, disparity, ALL).item() > 0.99
    assert agreement.alignment_error(negated.values, disparity, ALL).item() > 0.05


def test_gain_of_an_oracle():
    """Each of two maps is right in one half: choosing well takes the whole error away, and a copy takes nothing."""
    truth = smooth()
    left, right = truth.clone(), truth.clone()
    # Wrong by a pattern that no scale or shift takes up, in one half each.
    pattern = 0.05 * torch.cos(torch.arange(80) * 3.14159265).expand(1, 64, 80)
    left[..., :40] += pattern[..., :40]
    right[..., 40:] += pattern[..., 40:]
    errors = [agreement.region_errors(m, truth, ALL) for m in (left, right)]
    gain, mixing, share = agreement.oracle_gain(*errors)
    assert gain.item() > 0.8 and mixing.item() > 0.8 and share.item() == pytest.approx(0.5, abs=0.05)
    assert [value.item() for value in agreement.oracle_gain(errors[0], errors[0])] == [0, 0, 0]
    gain, mixing, share = agreement.oracle_gain(errors[0] + 1, errors[0])
    assert gain.item() > 0.5 and mixing.item() == 0 and share.item() == 1, "what is better everywhere replaces"
    assert agreement.oracle_gain(errors[0], errors[0] + 1)[0].item() == 0
    empty = agreement.region_errors(left, truth, ~ALL)
    assert empty.isnan().all() and agreement.oracle_gain(empty, empty)[0].isnan().all()


def test_regions_are_means():
    truth = smooth()
    errors = agreement.region_errors(noise(), truth, ALL, cells=4)
    left = agreement.residual(noise(), truth, ALL).abs()
    assert errors.shape == (1, 16)
    assert errors[0, 5].item() == pytest.approx(left[0, 16:32, 20:40].mean().item(), rel=1e-4)


def test_new_edges():
    sharp = steps()
    photo = sharp.expand(3, -1, -1)[None] - 0.5
    image = agreement.image_edges(photo)
    assert agreement.edges_on_image(sharp, ALL, image).item() > 0.9
    assert agreement.edges_on_image(noise(), ALL, image).item() < 0.6
    soft = blurred(sharp, 21)
    found = agreement.new_edges(soft, sharp, ALL, image)
    assert found.item() > 0.3, "the sharp map shows edges of the picture that the blurred one lacks"
    assert agreement.new_edges(sharp, soft, ALL, image).nan_to_num(0).item() < 0.05
    assert agreement.new_edges(sharp, sharp, ALL, image).item() == 0
    rough = blurred(sharp, 21) + 0.3 * noise()
    assert agreement.new_edges(soft, rough, ALL, image).item() < 0.1, "noise has edges everywhere, and adds none"
    spot = torch.zeros_like(sharp)
    spot[:, 30, 40:] = 1.0  # one edge of its own beside a primary that has them all
    assert agreement.new_edges(sharp, spot, ALL, torch.ones_like(image)).item() < 0.2
