"""Samples per second that the data filter scores, from memory: 512 x 512 maps, one process per core.

python tests/speed/filter.py [SAMPLES] [PROCESSES] [SOURCE]

First all scores together, in wall and processor time. Then each score, as the minimum of its times on each map, which a
busy machine affects least; their sum is the time of a core without other load. With a SOURCE of `distill filter` also
the end-to-end cost of its samples: read and decoded, then scored, at their own sizes.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2
import numpy as np

from distill.data import quality
from distill.data.quality import depth_scores, image_scores

MAPS = 8


def made(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:512, :512]
    depth = (
        2 + 0.01 * x + 0.005 * y + 0.3 * np.sin(x / (10 + seed)) + (x > 300) * 2 + 0.01 * rng.standard_normal(x.shape)
    )
    valid = np.ones(x.shape, bool)
    if seed % 2:
        valid[: 20 * seed] = False
    image = cv2.GaussianBlur(rng.integers(0, 255, (512, 512, 3), dtype=np.uint8), (0, 0), 3)
    return image, depth.astype(np.float32), valid


def work(samples: int, with_image: bool, answers: multiprocessing.Queue) -> None:
    cv2.setNumThreads(1)
    examples = [made(seed) for seed in range(MAPS)]
    start, cpu = time.perf_counter(), time.process_time()
    for number in range(samples):
        image, depth, valid = examples[number % MAPS]
        depth_scores(depth, valid)
        if with_image:
            image_scores(image, depth, valid, larger_is_nearer=False)
    answers.put((time.perf_counter() - start, time.process_time() - cpu))


def whole(samples: int, processes: int, with_image: bool) -> str:
    answers: multiprocessing.Queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=work, args=(samples, with_image, answers)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    times = [answers.get() for _ in workers]
    wall, cpu = max(w for w, _ in times), sum(c for _, c in times)
    return (
        f"{'every score' if with_image else 's_dist and s_grad'}: {processes * samples / wall:.0f} samples/s with "
        f"{processes} processes, {1e3 * cpu / samples / processes:.2f} ms of CPU each"
    )


class Watch:
    """The minimum time of each step on each map, in ms."""

    def __init__(self) -> None:
        self.least: dict[str, dict[int, float]] = {}
        self.map = 0

    def __call__(self, name: str, step: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = step(*args)
        spent = 1e3 * (time.perf_counter() - start)
        times = self.least.setdefault(name, {})
        times[self.map] = min(times.get(self.map, spent), spent)
        return result


def by_score(rounds: int) -> str:
    """Every step of the two functions, in their order, so that the processor's caches are as in real use."""
    cv2.setNumThreads(1)
    examples, watch = [made(seed) for seed in range(MAPS)], Watch()
    for _ in range(rounds):
        for watch.map, (image, depth, valid) in enumerate(examples):
            count = watch("valid", lambda valid=valid: int(np.count_nonzero(valid)))
            watch("s_dist", quality.distribution, depth, valid, count)
            slopes = watch("gradients", quality._slopes, depth, valid, count)
            watch("roughness", quality._roughness, depth, slopes)
            watch("s_grad", quality._continuity, slopes)
            grey = watch("grey", cv2.cvtColor, image, cv2.COLOR_RGB2GRAY)
            nearness = watch("1 / depth", quality._inverse, depth, valid)
            watch("edges", quality.misalignment, grey, nearness, valid)
            watch("sky", quality.sky_share, nearness, valid)
            watch("sharpness", lambda grey=grey: quality._moments(cv2.Laplacian(grey, cv2.CV_16S)))
    means = {name: sum(times.values()) / MAPS for name, times in watch.least.items()}
    each = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    return f"least ms: {each}; in all {sum(means.values()):.2f}, {1e3 / sum(means.values()):.0f} samples/s a core"


def end_to_end(word: str, samples: int) -> str:
    """The cost of reading and of scoring a sample of a source in this process."""
    from distill.app.filter_sources import open_sources  # noqa: PLC0415 - the other parts need no torch

    cv2.setNumThreads(1)
    [source] = open_sources([word], limit=samples)
    read = scored = 0.0
    pixels = []
    for number in range(len(source.names)):
        start = time.process_time()
        sample = source.load(number)
        loaded = time.process_time()
        depth_scores(sample.depth, sample.valid)
        image_scores(sample.image, sample.depth, sample.valid, larger_is_nearer=sample.nearer)
        read, scored = read + loaded - start, scored + time.process_time() - loaded
        pixels.append(sample.depth.size)
    count = len(source.names)
    return (
        f"{source.name}: {count} samples of {np.mean(pixels) / 1e6:.2f} Mpx, {1e3 * read / count:.1f} ms of CPU to "
        f"read and decode, {1e3 * scored / count:.1f} to score, {count / (read + scored):.0f} samples/s a core"
    )


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    print(whole(samples, processes, False))
    print(whole(samples, processes, True))
    print(by_score(max(1, samples // 10)))
    if len(sys.argv) > 3:
        print(end_to_end(sys.argv[3], samples))
