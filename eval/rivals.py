"""Other projects' protocols by name, applied to the same predictions, to compare with their published numbers.

Only the arithmetic is reproduced: which pixels, which fit, which floor and clip, in which space. Images, crops and the
processing size stay the benchmark's and the prediction's own; a sentence says where a rival's differ. Unpublished
protocols are not here: Depth Anything 3 does not say how its monocular numbers are aligned, nor Ultralytics how its
documented ones are (log least squares, several scales and flips); docs/protocols.md has the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.core.depth import Kind, KindError
from distill.core.plugins import find
from distill.core.progress import Report
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol, ProtocolError
from distill.eval.score import score
from distill.eval.scorefile import Score, require_writable, write_scores

_DISPARITY_KINDS = frozenset({Kind.AFFINE_DISPARITY, Kind.SCALE_DISPARITY, Kind.METRIC_DISPARITY})
_KNOWN_SHIFT_KINDS = frozenset(kind for kind in Kind if kind.unknown != "affine")


@dataclass(frozen=True, slots=True)
class Rival:
    """Another project's protocol.

    make: derives it from a benchmark's own protocol. choice: its alignment, one of eval.protocol.CHOICES. kinds: the
    predictions that it is defined for. differs: how it differs from the benchmark's own, in a sentence. source: where
    it was taken from.
    """

    make: Callable[[Protocol], Protocol]
    choice: str
    kinds: frozenset[Kind]
    differs: str
    source: str


def _zipdepth(own: Protocol) -> Protocol:
    farthest = {"eth3d": 60.0, "diode": 80.0}.get(own.benchmark, own.max_depth)
    nearest = {"kitti": 1e-3}.get(own.benchmark, own.min_depth)
    return replace(
        own,
        fit_columns=None,
        fit_positive=True,
        disparity_floor=1e-3,
        min_depth=nearest,
        max_depth=farthest,
        clip="range",
        mask_range=True,
    )


def _moge(own: Protocol) -> Protocol:
    return replace(
        own,
        fit_columns=None,
        fit_positive=False,
        disparity_floor=None,
        min_depth=0.0,
        max_depth=math.inf,
        clip="range",
        mask_range=False,
    )


def _ultralytics(own: Protocol) -> Protocol:
    farthest = {"nyu": 10.0, "kitti": 80.0}.get(own.benchmark, 100.0)
    return replace(_moge(own), min_depth=1e-3, max_depth=farthest, mask_range=True)


def _depth_anything(own: Protocol) -> Protocol:
    return replace(_moge(own), space="disparity")


RIVALS: Mapping[str, Rival] = {
    "zipdepth": Rival(
        _zipdepth,
        "affine",
        _DISPARITY_KINDS,
        "Marigold's arithmetic, but truth beyond 60 m (ETH3D) or 80 m (DIODE) is left out; fitted on every column",
        "fabiotosi92/ZipDepth, zipdepth/evaluation/ (b41dd20)",
    ),
    "moge_disparity": Rival(
        _moge,
        "affine",
        _DISPARITY_KINDS,
        "fitted in disparity on every pixel, the disparity held above one over the image's farthest truth, no range",
        "microsoft/MoGe, moge/test/metrics.py, disparity_affine_invariant; MoGe re-renders the sets in smaller sizes",
    ),
    "moge_scale": Rival(
        _moge,
        "l1",
        _KNOWN_SHIFT_KINDS,
        "a scale alone, which minimizes the mean of |error| / truth (a weighted median), no range",
        "microsoft/MoGe, moge/test/metrics.py, depth_scale_invariant; MoGe fits on 64 x 64 pixels, here on all",
    ),
    "ultralytics": Rival(
        _ultralytics,
        "median",
        _KNOWN_SHIFT_KINDS,
        "a scale by the ratio of the medians, truth and prediction between 1 mm and 100 m (nyu 10, kitti 80)",
        "ultralytics, utils/metrics.py, DepthMetrics; its documented table is another protocol, unpublished in detail",
    ),
    "depth_anything": Rival(
        _depth_anything,
        "affine",
        _DISPARITY_KINDS,
        "errors are measured in disparity, not in depth, so that 1/d does not magnify errors of far pixels",
        "an author, LiheYoung/Depth-Anything#174; the fit is not stated: least squares on all pixels is our choice",
    ),
}
"""By name. "marigold" and "clean" are the benchmarks' own (eval.protocol)."""

NAMES = ("marigold", "clean", *RIVALS)


def rival_protocol(own: Protocol, name: str, kind: Kind) -> tuple[Protocol, str]:
    """The protocol of this name for a benchmark, and the alignment to request.

    Raises ProtocolError if the benchmark has no such protocol, KindError if it is not defined for this kind.
    """
    if name not in RIVALS:
        return own.in_mode(name), "auto"
    rival = RIVALS[name]
    if own.task != "depth" or own.truth != "metric_depth":
        of_some = " for all of its images" if own.task == "depth" else ""
        raise ProtocolError(f"{name} scores depth in metres, which {own.benchmark} does not have{of_some}")
    if kind not in rival.kinds:
        raise KindError(f"{name} is not defined for {kind}, only for {', '.join(sorted(rival.kinds))}")
    return replace(rival.make(own), mode=name, offset_positive=False), rival.choice


def _with_metric_truth(own: Protocol, samples: Sequence[BenchmarkSample]) -> Protocol:
    """The protocol of a benchmark whose images say their truth's kind, where all of them are depth in metres."""
    kinds = {sample.kind for sample in samples}
    return replace(own, truth="metric_depth") if kinds == {Kind.METRIC_DEPTH} else own


def score_under_all(
    predictions: Path | str,
    *,
    kind: str,
    benchmark: str,
    root: Path | str | None,
    list_file: Path | str | None = None,
    out: Path | None = None,
    model: str = "",
    allow_failed: bool = False,
    names: Sequence[str] = NAMES,
    report: Report | None = None,
) -> dict[str, Score | str]:
    """Score the same predictions under every protocol of `names`: each a score, or why there is none.

    out: FILE.json; each score is written to FILE-NAME.json. Raises what `eval.score.score` raises.
    """
    module = find("distill.eval.benchmarks", benchmark)
    samples = list(module.samples(root, list_file))
    results: dict[str, Score | str] = {}
    for done, name in enumerate(names, 1):
        try:
            own = _with_metric_truth(module.PROTOCOL, samples) if name in RIVALS else module.PROTOCOL
            protocol, choice = rival_protocol(own, name, Kind(kind))
        except (ProtocolError, KindError) as error:
            results[name] = str(error)
            continue
        result = score(
            predictions, kind, samples, protocol, mode=name, alignment=choice, model=model, allow_failed=allow_failed
        )
        if out is not None:
            path = out.with_name(f"{out.stem}-{name}.json")
            require_writable(path)
            write_scores(result, path)
        results[name] = result
        if report:
            report(done, len(names))
    return results


def sentence(name: str) -> str:
    """What a protocol does, in a sentence."""
    own = {
        "marigold": "Marigold's published evaluation: fitted where the prediction is positive, disparity above 0.001",
        "clean": "Marigold's, repaired: fitted on every valid pixel, clipped to the range of the image's own truth",
    }
    return own.get(name) or RIVALS[name].differs
