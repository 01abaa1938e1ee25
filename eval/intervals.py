"""Bootstrap intervals of means over images, and which model is best as far as the images can tell.

Images are resampled with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13: the
percentile interval). Two models are compared on the same draws of the same images, which is much sharper than two
intervals side by side: an image that is hard for both cancels out. The number of draws and the rule for a mark are
ours. An interval covers other images of the same kind, not another training run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.eval.scorefile import Score

DRAWS = 2000
FEWEST = 5
"""No interval is given for fewer images: the bootstrap of so few is too narrow."""
LEVEL = 0.95
MANY = 2000
"""For more images the normal interval is used: equal to the bootstrap to three digits, a thousand times cheaper."""
_NORMAL = 1.959964


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the mean of one value per image; None for fewer than FEWEST, or if one is not finite."""
    per_image = np.asarray(values, dtype=np.float64)
    if len(per_image) < FEWEST or not np.isfinite(per_image).all():
        return None
    if len(per_image) > MANY:
        half = _NORMAL * per_image.std(ddof=1) / len(per_image) ** 0.5
        return float(per_image.mean() - half), float(per_image.mean() + half)
    rng = np.random.default_rng(seed)
    means = per_image[rng.integers(len(per_image), size=(DRAWS, len(per_image)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(score: Score, metric: str) -> tuple[float, float] | None:
    """The interval of a score's mean; None if the headline is not a mean over images or has no value."""
    if score.task.over_all or score.metrics.get(metric) is None:
        return None
    return interval(list(_by_image(score, metric).values()))


def distinguishable(first: Score, second: Score, metric: str) -> bool:
    """Whether the images scored by both tell the two means apart: the interval of the difference excludes 0."""
    if first.task.over_all:
        return False
    first_values, second_values = _by_image(first, metric), _by_image(second, metric)
    bounds = interval([value - second_values[key] for key, value in first_values.items() if key in second_values])
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]


def rank_marks(scores: Sequence[Score | None], metric: str, *, lower_is_better: bool) -> list[int]:
    """A mark per score of one column: 1 for a leading score that the images tell apart from every other; else 2 for the
    leading score and those not told apart from it; 0 for all others, and where there is no interval.
    """
    values = [None if score is None else score.metrics.get(metric) for score in scores]
    known = [i for i, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return [0] * len(scores)
    sign = 1.0 if lower_is_better else -1.0
    leader = min(known, key=lambda i: sign * float(values[i] or 0.0))
    leading = scores[leader]
    assert leading is not None
    if mean_interval(leading, metric) is None:
        return [0] * len(scores)
    tied = [i for i in known if i != leader and (other := scores[i]) and not distinguishable(leading, other, metric)]
    marks = [0] * len(scores)
    for i in tied:
        marks[i] = 2
    marks[leader] = 2 if tied else 1
    return marks


def _by_image(score: Score, metric: str) -> dict[str, float]:
    return {
        image.key: float("nan") if image.metrics.get(metric) is None else float(image.metrics[metric])
        for image in score.images
        if image.metrics is not None and metric in image.metrics
    }
