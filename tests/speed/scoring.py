"""Scoring time per map, against a plain implementation of the published evaluation from its description.

    OMP_NUM_THREADS=1 python -m tests.speed.scoring [--repeats 5] [--files 4]

The plain version follows the description step by step: a float32 lstsq over the masked pixels, the aligned map, two
clips, and ten metrics that each pass over the whole map. Both versions start from arrays in memory and run on one
thread; runs are interleaved, and the best processor time of each is kept. Prints a row per map size: seconds plain,
seconds here, the ratio, and the largest relative difference of the ten numbers.

--files N: N ETH3D maps of 24 megapixels as files instead (raw float32 truths, .npy predictions): wall time per map with
reading, plain one after the other against `distill score` on two workers, and the peak memory of each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import eth3d
from distill.eval.fit import measure
from distill.eval.metrics import METRICS, from_sums
from distill.eval.protocol import Protocol
from distill.eval.score import score

PROTOCOL = Protocol(
    benchmark="speed",
    mode="marigold",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-3,
    max_depth=80.0,
    clip="range",
    mask_range=False,
)
# Name, height, width, valid fraction, columns of the fit, and the seconds that the published functions themselves took
# on a machine of this kind (2 cores, 1 thread, depth alignment): the plain version below is a faster baseline.
CASES = [
    ("KITTI 352x1216, 5% valid", 352, 1216, 0.05, None, 0.028),
    ("KITTI 352x1216, 90% valid", 352, 1216, 0.9, None, 0.052),
    ("NYU 480x640", 480, 640, 0.78, None, 0.024),
    ("DIODE 768x1024", 768, 1024, 0.92, None, 0.096),
    ("ETH3D 4032x6048, 1024 columns", 4032, 6048, 0.6, 1024, 5.3),
    ("ETH3D 4032x6048, all columns", 4032, 6048, 0.6, None, 6.6),
]


def least_squares(pred: np.ndarray, target: np.ndarray, mask: np.ndarray, columns: int | None) -> np.ndarray:
    """The aligned map, by lstsq on (pred, 1) in float32."""
    p, t, m = pred, target, mask
    if columns is not None and columns < max(pred.shape):
        factor = columns / max(pred.shape)
        p, t, m = (
            F.interpolate(torch.from_numpy(a.astype(np.float32))[None], scale_factor=factor)[0].numpy()
            for a in (p, t, m)
        )
        m = m > 0.5
    rows = np.stack([p[m], np.ones_like(p[m])], axis=1)
    scale, shift = np.linalg.lstsq(rows, t[m], rcond=None)[0]
    return pred * scale + shift


def plain_metrics(pred: np.ndarray, target: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The ten metrics, each over the whole map with invalid pixels set to zero."""
    p, t, m = torch.from_numpy(pred), torch.from_numpy(target), torch.from_numpy(mask)
    count = m.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[~m] = 0
        return values.sum() / count

    def delta(threshold: float) -> torch.Tensor:
        return mean((torch.maximum(p / t, t / p) < threshold).float())

    def log_difference() -> torch.Tensor:
        return torch.log(p) - torch.log(t)

    values = {
        "abs_rel": mean((p - t).abs() / t),
        "sq_rel": mean((p - t).abs() ** 2 / t),
        "rmse": mean((p - t) ** 2).sqrt(),
        "rmse_log": mean(log_difference() ** 2).sqrt(),
        "log10": mean((torch.log10(p) - torch.log10(t)).abs()),
        "delta1": delta(1.25),
        "delta2": delta(1.25**2),
        "delta3": delta(1.25**3),
        "i_rmse": mean((1.0 / p - 1.0 / t) ** 2).sqrt(),
        "silog": 100 * (mean(log_difference() ** 2) - mean(log_difference()) ** 2).sqrt(),
    }
    return {name: float(value) for name, value in values.items()}


def plain(pred: np.ndarray, truth: np.ndarray, valid: np.ndarray, kind: Kind, columns: int | None) -> dict[str, float]:
    """The published evaluation of one map."""
    if kind == Kind.AFFINE_DISPARITY:
        disparity = np.where(truth > 0, 1.0 / np.where(truth > 0, truth, 1.0), 0.0).astype(np.float32)
        aligned = least_squares(pred, disparity, valid & (truth > 0) & (pred > 0), columns)
        aligned = 1.0 / np.clip(aligned, 1e-3, None)
    else:
        aligned = least_squares(pred, truth, valid, columns)
    aligned = np.clip(np.clip(aligned, PROTOCOL.min_depth, PROTOCOL.max_depth), 1e-6, None).astype(np.float32)
    return plain_metrics(aligned, truth, valid)


def scene(height: int, width: int, fraction: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A smooth ground with noise: truth, valid, and a depth and a disparity prediction."""
    rng = np.random.default_rng(0)
    rows = np.linspace(1.0, 0.04, height, dtype=np.float32)[::-1, None]
    truth = (1.7 / rows * (1 + 0.1 * rng.random((height, width), dtype=np.float32))).astype(np.float32)
    noise = 1 + 0.2 * (rng.random((height, width), dtype=np.float32) - 0.5)
    depth = (truth * noise / 50 + 0.1).astype(np.float32)
    disparity = (0.5 * noise / truth + 0.05).astype(np.float32)
    return truth, rng.random((height, width), dtype=np.float32) < fraction, depth, disparity


def write_files(folder: Path, count: int) -> None:
    """Write a data root, a list and predictions in ETH3D's layout."""
    truth, valid, depth, _ = scene(eth3d.HEIGHT, eth3d.WIDTH, 0.6)
    rows = []
    for i in range(count):
        rgb, stored = f"rgb/s/images/d/{i}.JPG", f"depth/s_dslr_depth/s/ground_truth_depth/d/{i}.JPG"
        for path in (folder / rgb, folder / stored, folder / "pred" / rgb):
            path.parent.mkdir(parents=True, exist_ok=True)
        (folder / rgb).touch()
        np.where(valid, truth * (1 + 0.1 * i), np.inf).astype("<f4").tofile(folder / stored)
        np.save(folder / "pred" / f"rgb/s/images/d/pred_{i}.npy", depth)
        rows.append(f"{rgb} {stored}")
    (folder / "list.txt").write_text("\n".join(rows))


def plain_files(folder: Path) -> list[float]:
    """AbsRel of every image, read and scored sequentially."""
    values = []
    for row in (folder / "list.txt").read_text().splitlines():
        rgb, stored = row.split()
        truth = np.fromfile(folder / stored, "<f4").reshape(eth3d.HEIGHT, eth3d.WIDTH)
        truth = np.where(np.isinf(truth), np.float32(0), truth)
        pred = np.load(folder / "pred" / Path(rgb).with_name(f"pred_{Path(rgb).stem}.npy"))
        valid = (truth > eth3d.PROTOCOL.min_depth) & (truth < PROTOCOL.max_depth)
        values.append(plain(pred.astype(np.float32), truth, valid, Kind.AFFINE_DEPTH, 1024)["abs_rel"])
    return values


def own_files(folder: Path) -> list[float]:
    """AbsRel of every image by distill.eval.score."""
    protocol = replace(eth3d.PROTOCOL, min_depth=PROTOCOL.min_depth, max_depth=PROTOCOL.max_depth, mask_range=True)
    result = score(folder / "pred", "affine_depth", eth3d.samples(folder, folder / "list.txt"), protocol, workers=2)
    return [image.metrics["abs_rel"] for image in result.images if image.metrics]


def alone(work: Callable[[Path], list[float]], folder: Path, answers: multiprocessing.Queue) -> None:
    """Run in a separate process: seconds, processor seconds, MB of memory beyond the imports, values."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    values = work(folder)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    answers.put((seconds, busy, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, values))


def from_files(count: int) -> None:
    context = multiprocessing.get_context("spawn")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), count)
        for work in (plain_files, own_files, plain_files, own_files):  # the first of each also warms the file cache
            answers = context.Queue()
            process = context.Process(target=alone, args=(work, Path(name), answers))
            process.start()
            results[work.__name__] = answers.get()
            process.join()
    (plain_s, plain_cpu, plain_mb, expected), (own_s, own_cpu, own_mb, got) = (
        results["plain_files"],
        results["own_files"],
    )
    worst = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
    print(
        f"{count} ETH3D maps from files, affine depth: plain {plain_s / count:.2f} s a map, {plain_mb:,.0f} MB at most"
    )
    print(
        f"here {own_s / count:.2f} s a map on 2 workers, {own_mb:,.0f} MB at most: {plain_s / own_s:.1f} times as fast"
    )
    print(
        f"processor time a map: plain {plain_cpu / count:.2f} s, here {own_cpu / count:.2f} s, "
        f"{plain_cpu / own_cpu:.1f} times as little"
    )
    print(f"worst relative difference of AbsRel {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=0)
    args = parser.parse_args()
    repeats = args.repeats
    if args.files:
        from_files(args.files)
        return
    torch.set_num_threads(1)
    heads = f"{'plain s':>9s} {'here s':>9s} {'ratio':>6s} {'published s':>12s} {'ratio':>6s}"
    print(f"{'map':32s} {'kind':17s} {heads}  worst difference")
    for name, height, width, fraction, columns, published in CASES:
        truth, valid, depth, disparity = scene(height, width, fraction)
        wrapped = DepthMap(torch.from_numpy(truth)[None], torch.from_numpy(valid)[None], Kind.METRIC_DEPTH)
        for kind, pred in ((Kind.AFFINE_DEPTH, depth), (Kind.AFFINE_DISPARITY, disparity)):
            protocol = replace(PROTOCOL, fit_columns=columns)
            best_plain = best_here = float("inf")
            for _ in range(repeats):
                start = time.process_time()
                expected = plain(pred, truth, valid, kind, columns)
                middle = time.process_time()
                sums = measure(pred, wrapped, kind, protocol).sums
                end = time.process_time()
                best_plain, best_here = min(best_plain, middle - start), min(best_here, end - middle)
            got = {key: float(value) for key, value in from_sums(sums[None]).items()}
            worst = max(abs(got[key] - expected[key]) / abs(expected[key]) for key in METRICS)
            quoted = f"{published:12.3f} {published / best_here:6.1f}" if kind == Kind.AFFINE_DEPTH else f"{'':19s}"
            ratio = best_plain / best_here
            print(
                f"{name:32s} {kind:17s} {best_plain:9.4f} {best_here:9.4f} {ratio:6.1f} {quoted}  {worst:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
