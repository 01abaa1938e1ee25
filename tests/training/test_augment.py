"""Augmentation moves image, maps and patches together, and is cut like everything else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill.core.crops import sample_boxes
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels, Supervision
from distill.training.augment import Draw, _square, augment, draw
from distill.training.batches import draw_of
from distill.training.loading import training_batches
from distill.training.sampling import MicroBatchPositions, make_order
from tests.training.toys import KIND, Toys, assert_same_run, collate, run, settings


def augmented(batch, positions, *, seed=0, hflip=False, **how):
    """The batch, augmented by what is drawn at these positions of the stream."""
    plain = {"color_jitter": 0.0, "random_resized_crop": 1.0, "rotation": 0.0} | how
    return augment(batch, [draw(place, seed=seed, hflip=hflip, **plain) for place in positions], **plain)


@pytest.mark.parametrize(
    "given", [{"hflip": True}, {"random_resized_crop": 0.3}, {"hflip": True, "random_resized_crop": 0.3}]
)
def test_geometry_moves_image_maps_and_patches_together(given):
    size, count = 64, 6
    ys, xs = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    ramp = (3 * xs + ys) / size
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0]]).expand(count, 2, 4)
    maps = ramp.expand(count, size, size)
    patches = torch.cat([maps[:, :32, :32, None], maps[:, 16:48, 32:, None]], 3).permute(0, 3, 1, 2)
    local = DepthMap(patches.reshape(-1, 32, 32), torch.ones(count * 2, 32, 32, dtype=torch.bool), KIND)
    labels = Labels(DepthMap(maps, torch.ones_like(maps, dtype=torch.bool), KIND), local, boxes)
    batch = Batch(tuple("abcdef"), maps[:, None].expand(-1, 3, -1, -1), {"t": labels})
    out = augmented(batch, range(count), **given)
    moved = out.labels["t"]
    assert not torch.equal(moved.shared.values, maps)
    assert torch.equal(batch.images, maps[:, None].expand(-1, 3, -1, -1))  # the input is left alone
    torch.testing.assert_close(out.images[:, 0], moved.shared.values, atol=1e-5, rtol=0)
    seen, inside = sample_boxes(moved.shared.values, moved.boxes, 32)
    usable = inside.reshape(-1, 32, 32) & moved.local.valid
    # A crop brought up to full size repeats its outermost pixels, so a ramp is exact to half a native pixel at its rim.
    torch.testing.assert_close(seen.reshape(-1, 32, 32)[usable], moved.local.values[usable], atol=0.04, rtol=0)
    assert usable.float().mean() > 0.3


def test_a_crop_does_not_spread_what_is_invalid():
    values = torch.ones(1, 16, 16)
    values[:, 4:6, 4:6] = math.nan
    labels = Labels(DepthMap(values, values.isfinite(), KIND), None, torch.zeros(1, 0, 4))
    batch = Batch(("a",), torch.zeros(1, 3, 16, 16), {"t": labels})
    shared = augmented(batch, [0], random_resized_crop=0.5).labels["t"].shared
    assert not shared.valid.all() and torch.equal(shared.values[shared.valid], torch.ones(int(shared.valid.sum())))


def test_colour_changes_the_image_alone_and_by_place_in_the_stream():
    batch = collate([Toys()[0], Toys()[0]])
    out = augmented(batch, [5, 6], color_jitter=0.4)
    assert torch.equal(out.labels["primary"].shared.values, batch.labels["primary"].shared.values)
    assert not torch.equal(out.images[0], out.images[1]) and 0 <= out.images.min() and out.images.max() <= 1
    assert torch.equal(augmented(batch, [6, 5], color_jitter=0.4).images, out.images.flip(0))


def test_augmented_training_is_cut_like_any_other(tmp_path):
    changes = {"hflip": True, "color_jitter": 0.3, "random_resized_crop": 0.5, "steps": 6}
    run(tmp_path / "whole", **changes)
    run(tmp_path / "parts", accumulate=2, workers=1, **changes)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


class Large(Toys):
    """Two regions whose means are of so many pixels that torch shares them among threads."""

    def get(self, index: int, teachers, *, visit=None):
        image = torch.rand(3, 400, 400, generator=torch.Generator().manual_seed(index))
        return str(index), image, {"primary": image[0] * 2, "assistant": image[2] - image[0]}


def test_a_process_that_reads_for_itself_makes_what_a_worker_makes_on_its_one_thread():
    dataset, order = Large(2), make_order(range(2), [0, 0], seed=0, weights=(), temperature=1.0)
    given = settings(batch_size=1, steps=4, workers=0, color_jitter=0.3, strategy="average")
    places = MicroBatchPositions(order=order, batch_size=1, accumulate=1, process=0, processes=1, steps=4)
    made = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        made.append(list(training_batches(dataset, places, collate=collate, settings=given)))
        assert torch.get_num_threads() == threads
    for one, several in zip(*made, strict=True):
        assert torch.equal(one.images, several.images)
        assert torch.equal(one.taught[0].labels.shared.values, several.taught[0].labels.shared.values)


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
def test_a_turn_moves_image_and_map_alike_and_what_comes_from_outside_is_invalid(size):
    height, width = size
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    maps = (3 * xs + ys).expand(4, height, width) / width
    valid = torch.ones_like(maps, dtype=torch.bool)
    valid[:, :6, :6] = False
    labels = Labels(DepthMap(maps, valid, KIND), None, torch.zeros(4, 0, 4))
    images = torch.stack([maps, torch.ones_like(maps), torch.ones_like(maps)], 1)  # two channels say what is covered
    batch = Batch(tuple("abcd"), images, {"t": labels})
    out = augmented(batch, range(4), seed=3, rotation=20.0)
    shared = out.labels["t"].shared
    inside = shared.valid & (out.images[:, 1] > 0.999)
    # Nearest against bilinear: half a pixel of a slope of 3 / width.
    torch.testing.assert_close(shared.values[inside], out.images[:, 0][inside], atol=3.2 / width, rtol=0)
    outside = out.images[:, 1] == 0
    assert outside.any() and not (shared.valid & outside).any() and 0.6 < shared.valid.float().mean() < 0.99
    centre = (height // 2, width // 2)
    assert (shared.values[:, centre[0], centre[1]] - maps[:, centre[0], centre[1]]).abs().max() < 4 / width
    still = augmented(batch, range(4), seed=3, rotation=1e-9).labels["t"].shared
    assert torch.equal(still.values[still.valid], maps[still.valid]) and torch.equal(still.valid, valid)
    with_patches = Labels(labels.shared, labels.shared, torch.zeros(4, 1, 4))
    with pytest.raises(ValueError, match="labels of patches cannot be rotated"):
        augmented(Batch(batch.keys, batch.images, {"t": with_patches}), range(4), rotation=5.0)


@pytest.mark.parametrize("rotation", [0.0, 2.0])
@pytest.mark.parametrize("smallest", [1.0, 0.5])
def test_what_is_said_to_be_mirrored_is(smallest, rotation):
    """Stored features and noise are mirrored by what the draw says, and so is the image."""
    ramp = torch.linspace(0, 1, 32).expand(16, 3, 32, 32).contiguous()  # brighter to the right
    how = {"seed": 3, "hflip": True, "random_resized_crop": smallest, "rotation": rotation}
    turned = augmented(Batch(("k",) * 16, ramp, {}), range(16), **how).images
    darker = [bool(one[:, 8:24, 4:14].mean() > one[:, 8:24, 18:28].mean()) for one in turned]
    assert darker == [draw_of(place, settings(**how)).mirrored for place in range(16)] and 0 < sum(darker) < 16


@pytest.mark.parametrize(
    ("smallest", "rotation", "expected"),
    [(1.0, 0.0, "1110001000111100"), (0.5, 0.0, "1011010100010010"), (0.5, 10.0, "0111011111000011")],
)
def test_what_is_drawn_stays_what_it_was(smallest, rotation, expected):
    """A run that is resumed, or repeated to compare, must see what it saw: a draw that nobody asked for moves all."""
    how = {"seed": 3, "hflip": True, "random_resized_crop": smallest, "rotation": rotation, "color_jitter": 0.2}
    assert "".join("01"[draw(place, **how).mirrored] for place in range(16)) == expected


def whole(values, valid=None, *, local=None, boxes=None, kind=KIND, truth=False):
    """Labels of maps (B,S,S), valid everywhere unless told; local: (B*N,P,P), all valid."""
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    patches = None if local is None else DepthMap(local, torch.ones_like(local, dtype=torch.bool), kind)
    boxes = torch.zeros(len(values), 0, 4) if boxes is None else boxes
    return Labels(DepthMap(values, valid, kind), patches, boxes, supervision=Supervision("t", kind, truth=truth))


def test_a_crop_is_where_and_as_large_as_its_numbers_say():
    """A quarter of the area is half the side; the last place is where the square touches the far edge."""
    assert _square((0.0, 0.99, 0.0), 10, 0.25) == (5, 0, 5)
    assert _square((0.0, 0.0, 0.99), 10, 0.25) == (0, 5, 5)
    assert _square((0.99999, 0.5, 0.5), 10, 0.25) == (0, 0, 10)


def test_a_cropped_pixel_is_valid_only_if_all_that_it_is_mixed_from_is():
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, 3, 6] = False
    labels = whole(torch.full((1, 8, 8), 2.0), valid, truth=True)
    out = augment(
        Batch(("a",), torch.zeros(1, 3, 8, 8), {"t": labels}), [Draw((0.0, 0.3, 0.99))], random_resized_crop=0.25
    )
    expected = torch.ones(8, 8, dtype=torch.bool)  # rows 1 to 4 and columns 4 to 7 of the map, twice as large
    expected[3:7, 3:7] = False
    shared = out.labels["t"].shared
    assert torch.equal(shared.valid[0], expected) and (shared.values[0][expected] == 2.0).all()
    assert out.labels["t"].supervision.truth  # so that the objective of truth stays the objective


def test_a_patch_that_a_crop_cuts_is_valid_where_the_student_sees_it():
    """And brought nearer by the longer lens of its own region, if its metres are those of a canonical camera."""
    boxes = torch.tensor([[[0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 1.0, 1.0]]]).repeat(3, 1, 1)
    local = torch.arange(1.0, 7.0)[:, None, None].expand(6, 4, 4)
    labels = whole(torch.ones(3, 8, 8), local=local, boxes=boxes, kind=Kind.METRIC_DEPTH)
    batch = Batch(("a", "b", "c"), torch.zeros(3, 3, 8, 8), {"t": labels})
    draws = [Draw((0.0, 0.0, 0.99)), Draw((0.99999, 0.0, 0.0)), Draw((0.0, 0.99, 0.0))]
    out = augment(batch, draws, random_resized_crop=0.25, canonical=True).labels["t"]
    assert out.local.values[:, 0, 0].tolist() == [0.5, 1.0, 3.0, 4.0, 2.5, 3.0]
    assert out.shared.values[:, 0, 0].tolist() == [0.5, 1.0, 0.5]
    seen = torch.zeros(6, 4, 4, dtype=torch.bool)
    seen[0, :2, 2:] = True  # the upper right quarter of the region has that of the first patch, and none of the second
    seen[2:4] = True
    seen[4, 2:, :2] = True
    assert torch.equal(out.local.valid, seen)


def test_what_is_invalid_is_mirrored_with_its_map():
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, :, 0] = False
    labels = whole(torch.ones(2, 4, 4), valid, local=torch.ones(2, 4, 4), boxes=torch.rand(2, 1, 4), truth=True)
    labels = replace(labels, local=labels.shared)
    batch = Batch(("a", "b"), torch.zeros(2, 3, 4, 4), {"t": labels})
    out = augment(batch, [Draw(mirrored=True), Draw()]).labels["t"]
    for part in (out.shared, out.local):
        assert torch.equal(part.valid[0], valid[0].flip(-1)) and torch.equal(part.valid[1], valid[1])
    assert out.supervision.truth


@pytest.mark.parametrize(("angle", "turns"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_a_quarter_turn_of_a_rectangle_turns_its_middle(angle, turns):
    """The angle runs from minus to plus `rotation`, and pixels stay square whatever the aspect."""
    values = torch.rand(1, 8, 16)
    batch = Batch(("a",), values[:, None].expand(1, 3, 8, 16), {"t": whole(values)})
    out = augment(batch, [Draw(angle=angle)], rotation=90.0)
    middle = torch.rot90(values[0, :, 4:12], turns)
    torch.testing.assert_close(out.images[0, 0, :, 4:12], middle, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.labels["t"].shared.values[0, :, 4:12], middle, atol=1e-4, rtol=0)


def test_colours_are_multiplied_as_documented():
    """Brightness by 1.4, contrast about the mean grey by 0.7, saturation by 1.2; and never beyond [0,1]."""
    image = torch.tensor([[0.2, 0.6], [0.4, 0.2], [0.6, 0.1]])[None, :, None]
    out = augment(Batch(("a",), image, {}), [Draw(colors=(0.9, 0.2, 0.7))], color_jitter=0.5).images[0, :, 0]
    expected = torch.tensor([[0.305004, 0.786145], [0.540204, 0.315745], [0.775404, 0.198145]])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    bright = augment(Batch(("a",), image, {}), [Draw(colors=(1.0, 0.5, 0.5))], color_jitter=1.0).images
    assert bright.max() == 1.0 and bright.min() >= 0.0
