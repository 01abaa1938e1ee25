"""Each fault does what its name says, to known maps, and nothing else."""

from __future__ import annotations

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.data.corruptions import Corruptions
from distill.losses.losses import median_and_mean_abs_dev


@pytest.fixture
def truth() -> DepthMap:
    """Depth from 1 to 5 across, a step in the middle, with an invalid corner."""
    depth = torch.linspace(1, 3, 64).expand(1, 64, 64).clone()
    depth[..., 32:] += 2
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, :8, :8] = False
    return DepthMap(depth, valid, Kind.METRIC_DEPTH)


def test_no_fault_is_the_truth_as_disparity(truth):
    out = Corruptions().apply(truth, "k")
    assert out.kind is Kind.METRIC_DISPARITY
    torch.testing.assert_close(out.values[out.valid], 1 / truth.values[truth.valid])
    assert torch.equal(out.valid, truth.valid)


def test_own_range_is_an_affine_map_and_patches_disagree_by_it(truth):
    faults = Corruptions(own_range=True)
    region = faults.apply(truth, "k")
    assert region.kind is Kind.AFFINE_DISPARITY
    clean = 1 / truth.values[truth.valid]
    got = region.values[truth.valid]
    slope = (got[-1] - got[0]) / (clean[-1] - clean[0])
    torch.testing.assert_close(got, got[0] + slope * (clean - clean[0]), rtol=1e-4, atol=1e-5)
    assert got.quantile(0.02).abs() < 1e-5 and (got.quantile(0.98) - 1).abs() < 1e-5
    patch = DepthMap(truth.values[..., :32], truth.valid[..., :32], truth.kind)
    labels = faults.labels(Labels(truth, patch, torch.tensor([[[0.0, 0.0, 1.0, 0.5]]])), "k")
    assert not torch.allclose(labels.local.values[0, 20:], labels.shared.values[0, 20:, :32], atol=0.05)


def test_far_noise_leaves_the_near_half_alone(truth):
    clean, noisy = Corruptions().apply(truth, "k"), Corruptions(far_noise=0.3).apply(truth, "k")
    difference = (noisy.values / clean.values.clamp(min=1e-9)).log().abs()[0, 16:]
    assert difference[:, :30].max() < 1e-5 and difference[:, -8:].mean() > 0.1


def test_blur_softens_the_step_and_ignores_what_is_invalid(truth):
    poisoned = DepthMap(torch.where(truth.valid, truth.values, 1e-6), truth.valid, truth.kind)
    clean, soft = Corruptions().apply(truth, "k"), Corruptions(blur=2.0).apply(poisoned, "k")
    step = lambda m: (m.values[0, 40, 31] - m.values[0, 40, 32]).item()  # noqa: E731
    assert step(soft) < 0.4 * step(clean)
    assert torch.isfinite(soft.values).all() and soft.values[soft.valid].max() <= clean.values.max() + 1e-5


def test_warp_is_smooth_and_large_scale(truth):
    ratio = (
        Corruptions(warp=0.3).apply(truth, "k").values / Corruptions().apply(truth, "k").values.clamp(min=1e-9)
    ).log()[0, 16:]
    assert ratio.std() > 0.05 and (ratio[:, 1:] - ratio[:, :-1]).abs().max() < 0.1


def test_everything_is_drawn_from_the_key(truth):
    faults = Corruptions(blur=1.0, far_noise=0.2, warp=0.2, own_range=True, drift=0.2)
    assert torch.equal(faults.apply(truth, "k").values, faults.apply(truth, "k").values)
    other = faults.apply(truth, "other")
    assert not torch.allclose(
        median_and_mean_abs_dev(other.values, other.valid)[0], median_and_mean_abs_dev(*_map(faults, truth))[0]
    )


def _map(faults, truth):
    out = faults.apply(truth, "k")
    return out.values, out.valid


def test_a_map_without_a_valid_pixel_stays_so_and_senseless_settings_are_refused(truth):
    empty = DepthMap(truth.values, torch.zeros_like(truth.valid), truth.kind)
    assert not Corruptions(blur=2.0, own_range=True).apply(empty, "k").valid.any()
    with pytest.raises(ValueError, match="needs own_range"):
        Corruptions(drift=0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        Corruptions(blur=-1.0)


def test_a_layout_is_one_error_for_all_maps_and_common_ones_correlate(truth):
    def error(key, **given):
        made = Corruptions(warp=0.2, **given).apply(truth, key)
        return (made.values[truth.valid] * truth.values[truth.valid]).log()

    assert torch.equal(error("a", layout=1), error("b", layout=1))
    assert not torch.equal(error("a"), error("b"))
    one, other = error("a", layout=1, common=1.0), error("b", layout=2, common=1.0)
    torch.testing.assert_close(one, other)
    apart = torch.corrcoef(torch.stack([error("a", layout=1, common=1.0), error("a", layout=2)]))[0, 1]
    near = torch.corrcoef(torch.stack([error("a", layout=1, common=1.0), error("a", layout=2, common=0.9)]))[0, 1]
    assert near > 0.85 and near > apart
    with pytest.raises(ValueError, match="it needs layout"):
        Corruptions(warp=0.1, common=0.5)
