"""Point pairs on rendered views: their order is the truth's, and only the order counts."""

from __future__ import annotations

import numpy as np

from distill.eval.benchmarks import scene_order
from distill.eval.da2k import num_right


def test_the_truth_has_every_pair_right_and_a_bend_changes_nothing():
    assert scene_order.PROTOCOL.num_images == len(scene_order.samples())
    sample = scene_order.samples()[3]  # a wide one
    points = sample.mark()
    depth = scene_order.scenes.samples()[3].truth().values[0].numpy()
    assert points.size == depth.shape and len(points.pairs) == scene_order.PAIRS == len(set(points.pairs))
    apart = [depth[pair.far] / depth[pair.near] for pair in points.pairs]
    assert min(apart) >= 1.1 and max(depth[pair.far] for pair in points.pairs) < 80
    assert num_right(1 / np.maximum(depth, 0.01) ** 0.3, points.pairs, "affine_disparity") == len(points.pairs)
    assert num_right(depth, points.pairs, "affine_disparity") == 0
    wrong = num_right(np.random.default_rng(0).random(depth.shape), points.pairs, "affine_depth")
    assert 0.3 < wrong / len(points.pairs) < 0.7
    assert sample.mark().pairs == points.pairs, "every run asks the same ones"
