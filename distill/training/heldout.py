"""Held-out evaluation: the loss of a run's saved weights on samples it does not train on, and the best step so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.training.batches import Collate, Labelled
from distill.training.loading import heldout_batches
from distill.training.sampling import hold_out
from distill.training.settings import TrainSettings
from distill.training.state import TrainingRun
from distill.training.step import measure


@dataclass(frozen=True, slots=True)
class HeldOutSamples:
    """The held-out samples that select the checkpoint."""

    dataset: Labelled
    indices: Sequence[int]
    collate: Collate


def split(dataset: Labelled, heldout: Labelled | None, settings: TrainSettings) -> tuple[list[int], list[int]]:
    """Indices of the training samples of `dataset`, and of the held-out samples, without sources of weight 0.

    A dataset that replaces images that cannot be labelled is told which are held out.
    """
    if heldout is None:
        train_indices, heldout_indices = hold_out(dataset.image_keys, settings.val_fraction)
        heldout = dataset
        if keep_apart := getattr(dataset, "keep_apart", None):
            keep_apart(heldout_indices)
    else:
        train_indices, heldout_indices = list(range(len(dataset))), list(range(len(heldout)))
    unused_sources = {source for source, weight in enumerate(settings.source_weights) if weight == 0}
    return train_indices, [index for index in heldout_indices if heldout.sources[index] not in unused_sources]


@torch.no_grad()
def evaluate(run: TrainingRun, held: HeldOutSamples) -> dict[str, Any]:
    """The log line of an evaluation of the weights to be saved: the loss and its parts, each a mean over the images it
    covers, NaN where there are none.
    """
    processes = run.processes
    batches = heldout_batches(
        held.dataset,
        held.indices,
        collate=held.collate,
        settings=run.settings,
        process=processes.index,
        processes=processes.count,
        features=run.features,
    )
    _share_statistics(run)
    run.evaluated_network.eval()
    sums: dict[str, Tensor] = {"": torch.zeros(2, dtype=torch.float64, device=processes.device)}
    for batch in batches:
        for weight, micro in batch:
            result = measure(run, run.evaluated_network, micro.to(processes.device))
            # An image without a usable label has loss 0, which carries no information.
            taught = result.losses if result.taught is None else result.losses[result.taught]
            for name, values in {"": taught, **result.parts}.items():
                total = torch.stack([values.double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
                sums[name] = sums.get(name, 0.0) + weight * total
    means: dict[str, float] = {}
    counts: dict[str, float] = {}
    for name in sorted({*processes.gather(sorted(sums))}):
        total, count = processes.add(sums.get(name, torch.zeros_like(sums[""]))).tolist()
        means[name], counts[name] = total / count if count else math.nan, count
    left_out = len(held.indices) - counts.pop("")
    line: dict[str, Any] = {
        "step": run.step,
        "heldout": means.pop(""),
        "samples": len(held.indices),
        "heldout_parts": means,
    }
    return line | ({"left_out": round(left_out, 3)} if left_out > 1e-6 else {})


def _share_statistics(run: TrainingRun) -> None:
    """Gives every process the main one's buffers, which are those that are saved: a process updates BatchNorm's
    statistics with its own images, and data parallelism evens them out only before the next step.
    """
    buffers = list(run.evaluated_network.buffers())
    if run.processes.count == 1 or not buffers:
        return
    saved = run.processes.share([buffer.cpu() for buffer in buffers] if run.processes.main else None)
    if not run.processes.main:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def is_best(run: TrainingRun, line: Mapping[str, Any]) -> bool:
    """Whether an evaluation has the lowest loss so far. Updates the run's best and its count of evaluations since."""
    better = math.isfinite(line["heldout"]) and (run.best is None or line["heldout"] < run.best["heldout"])
    if better:
        run.best = {"step": run.step, "heldout": line["heldout"]}
    run.evaluations_since_best = 0 if better else run.evaluations_since_best + 1
    return better
