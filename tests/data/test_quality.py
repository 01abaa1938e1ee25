"""The data filter's scores: their formulas by another road, their edges, and what each is to find."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from distill.data.quality import SCORES, _quantiles, _sample, depth_scores, distribution, image_scores

YES = np.ones((40, 60), bool)
GOLDEN = {
    (40, 61): {
        "valid": 0.774590164,
        "s_dist": 0.446974305,
        "s_grad": 0.834619921,
        "total": 0.640797113,
        "chi2": 0.199504166,
        "concentration": 0.824074074,
        "range": 0.5,
        "roughness": 1.92952778,
        "sky": 0.156557377,
        "sharpness": 1755.18067,
        "sky if nearer": 0.160245902,
    },
    (260, 300): {
        "valid": 0.806102564,
        "s_dist": 0.857307742,
        "s_grad": 0.834461034,
        "total": 0.845884388,
        "chi2": 0.714615485,
        "concentration": 1.0,
        "range": 1.0,
        "roughness": 1.92952778,
        "sky": 0.129076923,
        "sharpness": 3071.54458,
        "sky if nearer": 0.129371795,
    },
}
"""By the code of 2872e8d, which had not been made fast."""


def plainly(depth, valid):
    """s_dist and s_grad by loops over bins and pixels, as the paper writes them."""
    values = depth[valid].astype(np.float64)
    count, k = len(values), 20
    numbers = np.histogram(values, k, (values.min(), values.max()))[0]
    even = count / k
    chi2 = sum((n - even) ** 2 / even for n in numbers)
    peak = max(numbers) / count
    concentration = 1 if peak <= 2 / k else 1 - min(1, (peak - 2 / k) / (0.5 - 2 / k))
    s_dist = 0.5 * math.exp(-chi2 / count) + 0.3 * concentration + 0.2 * (numbers > 0).sum() / k
    lengths = []
    for y in range(1, depth.shape[0] - 1):
        for x in range(1, depth.shape[1] - 1):
            if valid[y, x] and valid[y - 1, x] and valid[y + 1, x] and valid[y, x - 1] and valid[y, x + 1]:
                across, down = (depth[y, x + 1] - depth[y, x - 1]) / 2, (depth[y + 1, x] - depth[y - 1, x]) / 2
                lengths.append(math.hypot(across, down))
    inner = sorted(lengths)[: len(lengths) - len(lengths) // 10]
    return s_dist, 1 / (1 + np.std(inner) / np.mean(inner))


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_the_scores_are_the_papers_formulas(holes):
    rng = np.random.default_rng(1)
    depth = np.exp(rng.normal(1, 0.5, (40, 60))).astype(np.float32)
    depth = cv2.GaussianBlur(depth, (0, 0), 2)
    valid = rng.random(depth.shape) >= holes
    depth[~valid] = np.nan
    found = depth_scores(np.where(valid, depth, -5), valid)
    s_dist, s_grad = plainly(depth, valid)
    assert found["s_dist"] == pytest.approx(s_dist, abs=2e-3) and found["s_grad"] == pytest.approx(s_grad, abs=1e-4)
    assert found["total"] == pytest.approx((found["s_dist"] + found["s_grad"]) / 2)
    assert found["valid"] == pytest.approx(valid.mean())


def test_the_ends_of_the_scores():
    slope = np.linspace(1, 5, 60, dtype=np.float32)[None].repeat(40, 0)
    even = depth_scores(slope, YES)
    assert even["s_dist"] == pytest.approx(1.0, abs=1e-3) and even["s_grad"] == pytest.approx(1.0, abs=1e-3)
    constant = depth_scores(np.full((40, 60), 3, np.float32), YES)
    assert constant["s_dist"] == pytest.approx(0.5 * math.exp(-19) + 0.2 / 20) and constant["s_grad"] == 0
    two = depth_scores(np.where(np.arange(60) < 30, 1, 9)[None].repeat(40, 0).astype(np.float32), YES)
    assert two["concentration"] == pytest.approx(0.0) and two["range"] == 0.1
    nothing = depth_scores(slope, np.zeros_like(YES))
    assert nothing["valid"] == 0 and math.isnan(nothing["s_dist"]) and math.isnan(nothing["s_grad"])
    few = ~YES
    few[5, ::2] = True  # no pixel has its four neighbours
    assert math.isnan(depth_scores(slope, few)["s_grad"])


def test_steps_at_the_largest_tenth_do_not_count_and_noise_does():
    y, x = np.mgrid[:40, :60]
    depth = (1 + 0.05 * x).astype(np.float32)
    stepped = depth + 3 * (x > 30)
    noisy = depth + np.random.default_rng(0).normal(0, 0.2, depth.shape).astype(np.float32)
    of = [depth_scores(d.astype(np.float32), YES)["s_grad"] for d in (depth, stepped, noisy)]
    assert of[0] > 0.99 and of[1] > 0.99 and of[2] < 0.75


def test_noise_that_s_grad_likes_is_rough():
    y, x = np.mgrid[:80, :120]
    room = np.minimum(2 + 0.01 * x + 0.03 * np.abs(y - 40), 3 + 0.001 * y).astype(np.float32)  # planes of other slopes
    yes = np.ones(room.shape, bool)
    noisy = room * np.exp(np.random.default_rng(0).normal(0, 0.3, room.shape)).astype(np.float32)
    clean, spoilt = (depth_scores(depth, yes) for depth in (room, noisy))
    assert spoilt["s_grad"] > clean["s_grad"], "so the score keeps what is noise"
    assert clean["roughness"] < 0.01 and spoilt["roughness"] > 3
    half = yes.copy()
    half[:, ::2] = False
    assert math.isnan(depth_scores(room, half)["roughness"])
    assert depth_scores(7 * noisy + 3, yes)["roughness"] == pytest.approx(spoilt["roughness"], rel=1e-3)


def test_the_scores_of_white_noise_are_those_that_are_quoted():
    noise = np.random.default_rng(0).normal(5.0, 0.5, (480, 640)).astype(np.float32)
    scores = depth_scores(noise, np.ones(noise.shape, bool))
    assert scores["s_grad"] == pytest.approx(0.69, abs=0.005), "CV 0.46"
    assert scores["roughness"] == pytest.approx(3.6, abs=0.2)


def test_depth_edges_without_image_edges_sky_and_blur_are_seen():
    y, x = np.mgrid[:80, :120]
    near = (x > 40) & (x < 80) & (y > 30)
    depth = np.where(near, 2.0, 8.0).astype(np.float32)
    valid = y > 10  # above: sky
    image = np.where(near[..., None], 200, 60).astype(np.uint8).repeat(3, -1)
    shifted = np.roll(image, 20, axis=1)
    right, wrong = (image_scores(i, depth, valid, larger_is_nearer=False) for i in (image, shifted))
    assert right["edges"] < 0.15 < 0.4 < wrong["edges"]
    flat = image_scores(np.full_like(image, 90), depth, valid, larger_is_nearer=False)
    assert flat["edges"] == pytest.approx(0.5)
    blurred = image_scores(cv2.GaussianBlur(image, (0, 0), 4), depth, valid, larger_is_nearer=False)
    assert blurred["sharpness"] < 0.1 * right["sharpness"]
    far = image_scores(image, np.where(near, 2.0, 5.0).astype(np.float32) + y / 30, valid, larger_is_nearer=False)
    assert far["sky"] == pytest.approx(11 / 80, abs=0.02)
    assert math.isnan(image_scores(image, np.ones_like(depth), valid, larger_is_nearer=True)["edges"])
    assert {"edges", "sky", "sharpness"} <= set(SCORES)


def odd_map(height, width):
    """A map by whole numbers alone, with holes of NaN, and an image that knows its one step."""
    y, x = np.mgrid[:height, :width]
    depth = 2 + x / 64 + y / 128 + 2 * (x > width // 2) + ((7 * x + 13 * y) % 11) / 256
    valid = (y > height // 8) & ((x // 8 + 3 * (y // 8)) % 13 != 0)
    image = np.stack([(3 * x + y) % 256, (2 * x * (x > width // 2) + 5 * y) % 256, x * y % 256], -1)
    return image.astype(np.uint8), np.where(valid, depth, np.nan).astype(np.float32), valid


@pytest.mark.parametrize(("size", "known"), GOLDEN.items())
def test_the_scores_are_what_they_were(size, known):
    image, depth, valid = odd_map(*size)
    kept = depth.copy()
    found = depth_scores(depth, valid) | image_scores(image, depth, valid, larger_is_nearer=False)
    found["sky if nearer"] = image_scores(image, depth, valid, larger_is_nearer=True)["sky"]
    del found["edges"]  # measured in another way since; it has a test of its own
    assert found == pytest.approx(known, rel=1e-6)
    assert np.array_equal(depth, kept, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("unknown", [math.nan, math.inf, -7.0, 1e9])
def test_what_stands_where_nothing_is_known_changes_no_score(unknown):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    # A step too weak to be an edge by itself ends in the hole: a strong edge in there would make it one.
    depth = np.full((96, 128), 0.3, np.float32)
    depth[48:, :80], depth[:, 100:] = 0.8, 10.0
    valid = np.ones(depth.shape, bool)
    valid[40:56, 40:60] = False
    scores = [
        depth_scores(d, valid) | image_scores(image, d, valid, larger_is_nearer=nearer)
        for nearer in (False, True)
        for d in (np.where(valid, depth, np.float32(0)), np.where(valid, depth, np.float32(unknown)))
    ]
    for empty, filled in (scores[:2], scores[2:]):
        assert filled == pytest.approx(empty, abs=1e-8, nan_ok=True) and 0 < empty["edges"] < 1


@pytest.mark.parametrize("holes", [False, True])
def test_the_edges_score_is_the_share_of_pixels_with_more_contrast_than_a_depth_edge(holes):
    image, depth, valid = odd_map(40, 61)
    if not holes:
        depth, valid = np.nan_to_num(depth, nan=3.0), np.ones_like(valid)
    nearness = np.where(valid, 1 / depth, 0)
    low, high = np.quantile(nearness[valid], (0.02, 0.98))
    found = cv2.Canny(np.round(np.clip((nearness - low) / (high - low), 0, 1) * 255).astype(np.uint8), 50, 100) > 0
    grey = np.pad(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float), 2, constant_values=np.nan)
    around = sliding_window_view(grey, (5, 5))
    contrast = np.nanmax(around, axis=(2, 3)) - np.nanmin(around, axis=(2, 3))
    inside = sliding_window_view(np.pad(valid, 2, constant_values=True), (5, 5)).all(axis=(2, 3))
    edge, every = contrast[found & inside, None], contrast[inside]
    above = (every > edge).mean() + (every == edge).mean() / 2
    assert image_scores(image, depth, valid, larger_is_nearer=False)["edges"] == pytest.approx(above, abs=1e-9)


def test_a_sample_keeps_to_no_few_columns():
    columns = np.broadcast_to(np.arange(512, dtype=np.float32), (512, 512)).copy()
    every, right = np.ones(columns.shape, bool), columns >= 256
    for where in (every, right):
        taken = _sample(columns, where)
        assert 3500 < len(taken) < 4500 and set(taken) == set(columns[where])


def test_quantiles_are_numpys():
    rng = np.random.default_rng(0)
    for size in (16, 17, 50, 51, 4096, 5000):
        values = np.exp(rng.normal(0, 2, size)).astype(np.float32)
        assert _quantiles(values, 0.02, 0.98) == [*np.quantile(values, (0.02, 0.98))]


@pytest.mark.parametrize("shape", [(7, 9), (5, 5), (1, 17), (4, 8)])
@pytest.mark.parametrize("holes", [False, True])
def test_every_pixel_is_counted_whatever_the_number_of_them(shape, holes):
    depth = np.ones(shape, np.float32)
    depth.ravel()[0], depth.ravel()[-1] = 0.5, 9.0  # the last pixel alone is in its bin
    valid = np.ones(shape, bool)
    valid.ravel()[1] = not holes
    counts, _ = np.histogram(depth[valid], bins=20)
    shares = counts / valid.sum()
    found = distribution(depth, valid, int(valid.sum()))
    assert found["chi2"] == pytest.approx(math.exp(-20 * np.square(shares - 0.05).sum()))
    assert found["range"] == np.count_nonzero(counts) / 20


def test_the_filter_knows_which_end_of_a_score_is_bad():
    bad_if_high = {name for name, meaning in SCORES.items() if not meaning.high_is_good}
    assert bad_if_high == {"edges", "roughness", "sky", "disagreement", "bridge", "align"}
