"""Augmentation moves image, maps and patches together, and is cut like everything else."""

from __future__ import annotations

import math

import pytest
import torch

from distill.core.crops import sample_boxes
from distill.core.depth import DepthMap
from distill.core.labels import Batch, Labels
from distill.training.augment import augment, draw
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
