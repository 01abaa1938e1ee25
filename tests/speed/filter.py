"""Samples per second that the data filter scores, from memory: 512 x 512 maps, one process per core.

python tests/speed/filter.py [SAMPLES] [PROCESSES]
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2
import numpy as np

from distill.data.quality import depth_scores, image_scores


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
    held = [made(seed) for seed in range(8)]
    start, cpu = time.perf_counter(), time.process_time()
    for number in range(samples):
        image, depth, valid = held[number % 8]
        depth_scores(depth, valid)
        if with_image:
            image_scores(image, depth, valid, larger_is_nearer=False)
    answers.put((time.perf_counter() - start, time.process_time() - cpu))


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    for with_image in (False, True):
        answers: multiprocessing.Queue = multiprocessing.Queue()
        crew = [multiprocessing.Process(target=work, args=(samples, with_image, answers)) for _ in range(processes)]
        for one in crew:
            one.start()
        told = [answers.get() for _ in crew]
        wall, cpu = max(w for w, _ in told), sum(c for _, c in told)
        print(
            f"{'every score' if with_image else 's_dist and s_grad'}: {processes * samples / wall:.0f} samples/s with "
            f"{processes} processes, {1e3 * cpu / samples / processes:.2f} ms of CPU each"
        )
