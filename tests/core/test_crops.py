"""Plans are deterministic, cover what they promise, and invert; resampling is exact on linear ramps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.core import crops
from distill.core.crop_settings import CropSettings


def planned(height: int, width: int, *, key: str, seed: int = 0, draw: int = 0, **given) -> crops.Plan:
    return crops.plan(height, width, CropSettings(**given), key=key, seed=seed, draw=draw)


def ramp(height: int, width: int) -> torch.Tensor:
    """(1,H,W), linear in half-pixel coordinates."""
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return (0.3 * rows[:, None] / height + 0.7 * columns[None] / width)[None]


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 300), st.integers(30, 300), st.integers(0, 50), st.sampled_from(["grid", "random", "none"]))
def test_regions_and_patches_lie_inside(height, width, draw, patches):
    plan = planned(
        height, width, key="sa_1", draw=draw, size=28, min_side=40, patches=patches, patch_size=32, on_small="use"
    )
    r = plan.region
    assert 0 <= r.top and r.top + r.side <= height and 0 <= r.left and r.left + r.side <= width
    assert min(40, height, width) <= r.side <= min(height, width)
    for p in plan.patches:
        assert 0 <= p.top and p.top + p.side <= r.side and 0 <= p.left and p.left + p.side <= r.side
    if patches == "grid":
        seen = torch.zeros(r.side, r.side, dtype=torch.bool)
        for p in plan.patches:
            seen[p.top : p.top + p.side, p.left : p.left + p.side] = True
        assert seen.all()
    assert plan.boxes().shape == (len(plan.patches), 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 300), st.integers(30, 300), st.sampled_from([28, 56, 14]))
def test_regions_that_are_no_squares_have_the_shape_asked_for(height, width, across):
    how = {"size": 28, "width": across, "min_side": 20, "patches": "none", "on_small": "use"}
    plan = crops.plan(height, width, CropSettings(**how), key="a")
    r = plan.region
    assert r.top + r.side <= height and r.left + r.columns <= width and plan.shape == (28, across)
    assert abs(r.columns / r.side - across / 28) <= 0.5 / r.side + 1e-9
    assert crops.cut_region(torch.rand(3, height, width), plan).shape == (3, 28, across)
    square = crops.plan(height, width, CropSettings(**how | {"width": 0}), key="a")
    assert set(square.region.record) == {"top", "left", "side"} and square.shape == (28, 28)


@pytest.mark.parametrize("side", [560, 644, 700, 1100, 1500])
def test_grid_patches_cover_the_region_and_overlap_by_an_eighth(side):
    corners = crops._grid(side, 560, 0.125)
    starts = sorted({top for top, _ in corners})
    assert starts[0] == 0 and starts[-1] == side - 560
    assert all(560 - (b - a) >= 560 // 8 for a, b in zip(starts, starts[1:], strict=False))
    assert len(starts) >= (2 if side >= 644 else 1)


def test_plans_do_not_depend_on_order_or_process(elsewhere):
    def plans(keys):
        return {k: planned(900, 1200, key=k, seed=3, patches="random", num_patches=2) for k in keys}

    keys = [f"sa_{i}" for i in range(20)]
    assert plans(keys) == plans(reversed(keys))
    how = CropSettings(patches="random", num_patches=2)
    assert elsewhere(crops.plan, 900, 1200, how, key="sa_7", seed=3) == plans(["sa_7"])["sa_7"]
    assert len({p.region for p in plans(keys).values()}) > 15
    draws = {planned(900, 1200, key="sa_7", seed=3, draw=d).region for d in range(8)}
    assert len(draws) == 8


def test_sides_are_uniform_between_the_smallest_and_the_whole():
    sides = torch.tensor([planned(1500, 2250, key=str(i)).region.side for i in range(1000)]).float()
    assert sides.min() < 660 and sides.max() > 1485
    assert abs(sides.mean() - (644 + 1500) / 2) < 15


def test_every_square_that_fits_is_drawn_those_at_the_far_edges_too():
    how = {"size": 14, "min_side": 20, "patches": "random", "num_patches": 1, "patch_size": 19}
    plans = [planned(21, 22, key=str(i), **how) for i in range(300)]
    assert {(p.region.side, p.region.top, p.region.left) for p in plans} == {
        (side, top, left) for side in (20, 21) for top in range(22 - side) for left in range(23 - side)
    }
    corners = {(p.region.side, q.top, q.left) for p in plans for q in p.patches}
    assert corners == {(s, top, left) for s in (20, 21) for top in range(s - 18) for left in range(s - 18)}


def test_small_images_are_refused_by_name_or_used_whole():
    with pytest.raises(crops.ImageTooSmallError, match="400x300 is smaller than the smallest crop, 644x644"):
        planned(300, 400, key="a")
    plan = planned(300, 400, key="a", on_small="use")
    assert plan.region.side == 300
    assert all(p.side == 300 for p in plan.patches) and plan.patch_size == 560


@pytest.mark.parametrize("size", [56, 97, 140])
def test_a_cut_put_back_is_the_region(size):
    image = ramp(200, 260)
    plan = planned(200, 260, key="k", size=size, min_side=100, patches="none")
    cut = crops.cut_region(image, plan)
    assert cut.shape == (1, size, size)
    r = plan.region
    placed = crops.resize(cut, r.side, r.side)[0]
    region = image[0, r.top : r.top + r.side, r.left : r.left + r.side]
    # Antialiasing bends a ramp in the outermost two cut pixels.
    border = 3 * r.side // size + 1
    inner = (slice(border, r.side - border), slice(border, r.side - border))
    # A tent filter sampled at a fractional step is a fraction of a native pixel off: the ramp rises .0027 a pixel.
    torch.testing.assert_close(placed[inner], region[inner], atol=0.2 * 0.7 / 260, rtol=0)


def test_a_ramp_seen_through_a_patch_equals_the_ramp_of_the_region():
    """The geometry of local-global: student on the whole region, teacher on native patches, zero difference."""
    image = ramp(300, 280)
    plan = planned(300, 280, key="k", size=84, min_side=200, patches="random", num_patches=5, patch_size=96)
    region, patches = crops.cut_region(image, plan), crops.cut_patches(image, plan)
    seen, inside = crops.sample_boxes(region, plan.boxes()[None], 96)
    # Antialiased shrinking bends a ramp in the outermost pixel; two region pixels in from the border it is exact.
    rows = plan.boxes()[:, 0, None] + (plan.boxes()[:, 2] - plan.boxes()[:, 0])[:, None] * (torch.arange(96) + 0.5) / 96
    columns = (
        plan.boxes()[:, 1, None] + (plan.boxes()[:, 3] - plan.boxes()[:, 1])[:, None] * (torch.arange(96) + 0.5) / 96
    )
    away = 3 / 84
    deep = ((rows > away) & (rows < 1 - away))[:, :, None] & ((columns > away) & (columns < 1 - away))[:, None, :]
    assert inside[0][deep].all() and deep.float().mean() > 0.8
    assert (seen[0] - patches[:, 0])[deep].abs().max() < 0.1 * 0.7 / 280
    # Exact where nothing was filtered: the ramp evaluated at the region's pixel centres.
    r, grid = plan.region, (torch.arange(84) + 0.5) / 84 * plan.region.side
    exact = 0.3 * (r.top + grid)[:, None] / 300 + 0.7 * (r.left + grid)[None] / 280
    seen, inside = crops.sample_boxes(exact[None], plan.boxes()[None], 96)
    assert (seen[0] - patches[:, 0])[inside[0]].abs().max() < 1e-5


def test_sampling_matches_a_brute_force_bilinear_resampler():
    torch.manual_seed(1)
    maps, boxes = torch.rand(1, 6, 9), torch.tensor([[[0.2, 0.1, 0.9, 0.7]]])
    values, inside = crops.sample_boxes(maps, boxes, 5)
    for i in range(5):
        for j in range(5):
            y = (0.2 + 0.7 * (i + 0.5) / 5) * 6 - 0.5
            x = (0.1 + 0.6 * (j + 0.5) / 5) * 9 - 0.5
            assert inside[0, 0, i, j] == (0 <= y <= 5 and 0 <= x <= 8)
            if not inside[0, 0, i, j]:
                continue
            y0, x0 = min(int(y), 4), min(int(x), 7)
            fy, fx = y - y0, x - x0
            m = maps[0]
            top = m[y0, x0] * (1 - fx) + m[y0, x0 + 1] * fx
            bottom = m[y0 + 1, x0] * (1 - fx) + m[y0 + 1, x0 + 1] * fx
            assert abs(values[0, 0, i, j] - (top * (1 - fy) + bottom * fy)) < 1e-5


def test_sampling_the_whole_box_at_the_same_size_is_the_identity():
    maps = torch.rand(2, 7, 7)
    values, inside = crops.sample_boxes(maps, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(2, 1, 4), 7)
    torch.testing.assert_close(values[:, 0], maps)
    assert inside.all()


def test_a_centre_beyond_the_outermost_centres_is_outside():
    """Of six centres across four pixels the first lies a sixth of a pixel beyond the first pixel's."""
    _, inside = crops.sample_boxes(torch.rand(1, 4, 4), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), 6)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:-1, 1:-1] = True
    assert torch.equal(inside[0, 0], expected)


def brute_force(image, size):
    """Resampling by its definition: at each output centre, a tent of input pixels as wide as the shrinking."""
    out = image
    for axis in (0, 1):
        length = image.shape[axis]
        scale = length / size
        width = max(1.0, scale)
        weights = torch.zeros(size, length, dtype=image.dtype)
        for i in range(size):
            centre = (i + 0.5) * scale
            for j in range(length):
                weights[i, j] = max(0.0, 1.0 - abs(j + 0.5 - centre) / width)
            # Enlarging repeats the border; shrinking leaves out what lies beyond it.
            weights[i] /= weights[i].sum()
        out = torch.tensordot(weights, out, dims=([1], [axis])).movedim(0, axis)
    return out


@pytest.mark.parametrize("size", [5, 9, 17, 30])
def test_resizing_matches_a_brute_force_resampler(size):
    torch.manual_seed(2)
    image = torch.rand(17, 17, dtype=torch.float64)
    torch.testing.assert_close(crops.resize(image[None], size, size)[0], brute_force(image, size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [31, 64, 560])
def test_blocks_hold_every_student_pixel_of_a_patch(size):
    torch.manual_seed(3)
    corner, side = torch.rand(3, 4, 2) * 0.5, 0.2 + 0.3 * torch.rand(3, 4, 1)
    boxes = torch.cat([corner, corner + side], -1)
    boxes[0, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    blocks, within, number = crops.student_blocks(boxes, size)
    assert number == size
    blocks, within, number = crops.student_blocks(boxes[1:], size)
    assert number < size
    pixels = blocks * size
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    for b, n in ((b, n) for b in range(2) for n in range(4)):
        for axis in (0, 1):
            low, high = boxes[1 + b, n, axis].item() * size, boxes[1 + b, n, axis + 2].item() * size
            centres = [i for i in range(size) if low <= i + 0.5 <= high]
            first = round(pixels[b, n, axis].item())
            assert first <= centres[0] and centres[-1] < first + number
            # The same pixel, named by the patch: a fraction of the patch, linear in the region's.
            start = (first - low) / (high - low)
            assert within[b, n, axis].item() == pytest.approx(start, abs=1e-3)


def test_no_boxes_give_no_blocks():
    blocks, within, number = crops.student_blocks(torch.zeros(2, 0, 4), 64)
    assert blocks.shape == within.shape == (2, 0, 4) and number == 0


@pytest.mark.parametrize(("side", "rows"), [(559, 1), (560, 1), (561, 2), (1050, 2), (1051, 3)])
def test_a_grid_has_no_more_patches_than_its_overlap_needs(side, rows):
    assert len(crops._grid(side, 560, 0.125)) == rows**2


def test_an_image_of_just_the_smallest_region_is_used_whole():
    region = planned(644, 900, key="k", size=560, min_side=644).region
    assert (region.top, region.side) == (0, 644)
    with pytest.raises(crops.ImageTooSmallError, match="900x643 is smaller than the smallest crop, 644x644"):
        planned(643, 900, key="k", size=560, min_side=644)


def test_draws_are_the_same_in_every_version_and_of_their_parts_apart():
    """Labels, orders and augmentations of old runs are made of these."""
    assert crops.generator("crop", 0, "sa_1", 2).random() == 0.7041855916421046
    assert crops.generator("a", 1, "23").random() != crops.generator("a", 12, "3").random()


def test_the_short_side_is_native_and_a_strip_is_squashed():
    assert crops.native_shape(100, 200, 50, 10) == (50, 100) == crops.native_shape(200, 100, 50, 10)[::-1]
    assert crops.native_shape(1, 1000, 8, 4) == (8, 64), "eight to one at most"


def test_a_region_that_is_no_square_is_cut_with_all_its_columns():
    image = torch.arange(3 * 10 * 12).reshape(3, 10, 12)
    plan = crops.Plan(crops.Square(1, 2, 4, 6), (), 4, 4, 6)
    assert torch.equal(crops.cut_region(image, plan), image[:, 1:5, 2:8])
