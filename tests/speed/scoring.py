"""Scoring time per map, against the published evaluation written plainly from its description.

    OMP_NUM_THREADS=1 python tests/speed/scoring.py [--repeats 5]

The plain version does what the description says in the order in which it says it: a float32 lstsq over the masked
pixels, the aligned map, two clips, and ten metrics that each walk the whole map. Both versions start from arrays in
memory and run on one thread; runs are interleaved, and the best processor time of each is kept. Prints a row per map
size: seconds plain, seconds here, the ratio, and the largest relative difference of the ten numbers.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from distill.depth import DepthMap, Kind
from eval.fit import measure
from eval.metrics import METRICS, from_sums
from eval.protocol import Protocol

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
# on a machine of this kind (2 cores, 1 thread, depth alignment): the plain version below is a faster opponent.
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
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
