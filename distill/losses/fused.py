"""The losses by the fused kernels, for float32 on CUDA. Each loss here returns None where torch has to compute it.

Before their first use in a process the kernels are compared with the torch code on a small example. Any failure there
(no Triton, no C compiler for its launchers, a card unknown to it, different numbers) gives one warning, and torch
computes the losses.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from distill.core.trial import DifferentResultError, failure
from distill.losses.normalize._batched import batch_loss
from distill.losses.normalize._per_image import FLAT, FLOOR, MIN_PIXELS

Pairs = Iterator[tuple[Tensor, Tensor]]

# More parts than this would leave each context too few bins in the first histogram.
FINEST = 16
# True: a failure raises. Tests and speed scripts set it, so that they never measure the torch code by mistake.
raise_faults = False
_tried: dict[tuple[Hashable, torch.device], bool] = {}


def has_kernels(values: Tensor) -> bool:
    """Whether there are kernels for this tensor's device and dtype."""
    return values.is_cuda and values.dtype == torch.float32


def context_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    levels: tuple[int, ...],
    *,
    trim_top: float,
    label_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Any] | None:
    """As `normalize._contexts`: losses (B,), live and dead contexts (B,), the statistics of the whole image or None.

    pred, target, weight: (B,H,W); valid: (B,H,W) bool. The statistics are the `whole_image` of `gradient_loss`.
    """
    if not (has_kernels(pred) and pred.numel() and max(levels) <= FINEST):
        return None
    how = (levels, trim_top, label_only)
    if not _trusted(
        ("contexts", *how, weight is None), pred.device, lambda device: _try_contexts(device, weight is not None, how)
    ):
        return None
    losses, live, dead, statistics = _contexts(pred, target, valid, weight, *how)
    return losses, live, dead, statistics if levels[0] == 1 and not label_only else None


def gradient_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    scales: int,
    normalize: bool,
    *,
    whole_image: Any,
    reference: Callable[..., Tensor],
) -> Tensor | None:
    """As `losses.gradient_loss`, (B,). reference: its torch code, which takes the arguments up to `normalize`."""
    if not (has_kernels(pred) and pred.numel()):
        return None
    how = (scales, normalize)
    if not _trusted(("gradient", *how), pred.device, lambda device: _try_gradient(device, how, reference)):
        return None
    return _gradient(pred, target, valid, *how, whole_image)


def median_and_mean_abs_dev(
    values: Tensor, valid: Tensor, reference: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """As `losses.median_and_mean_abs_dev`, (B,) each. reference: its torch code."""
    if not (has_kernels(values) and values.numel()):
        return None
    if not _trusted("deviation", values.device, lambda device: _try_deviation(device, reference)):
        return None
    return _deviation(values, valid)


def sample_boxes(
    maps: Tensor, boxes: Tensor, size: int, *, reference: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """As `crops.sample_boxes`, values and inside (B,N,size,size). reference: its torch code."""
    if not (has_kernels(maps) and maps.numel() and boxes.numel()):
        return None
    if not _trusted("boxes", maps.device, lambda device: _try_boxes(device, reference)):
        return None
    return _boxes(maps, boxes, size)


def _trusted(name: Hashable, device: torch.device, trial: Callable[[torch.device], Pairs]) -> bool:
    """Whether the kernels of this name work on the device.

    trial: runs them on an example and yields pairs of their results and the torch code's.
    """
    key = (name, device)
    if key not in _tried:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a trial synchronizes with the device, which a graph capture does not allow
        works = _works(trial, device)
        _tried[key] = works
    return _tried[key]


def _works(trial: Callable[[torch.device], Pairs], device: torch.device) -> bool:
    def compare() -> None:
        # Twice: a kernel that was launched before is launched another way (core.launch).
        for ours, reference in itertools.chain(trial(device), trial(device)):
            error = float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-6))
            if not error < 1e-3:
                raise DifferentResultError(f"they are off by {error:.2g}")

    if raise_faults:
        compare()
        return True
    reason = failure(compare)
    if reason and device.type == "cuda" and not failure(_launch_apart):
        reason = failure(compare)
    if reason and all(_tried.values()):
        warnings.warn(f"the fused loss kernels fail here ({reason}): using the slower torch code", stacklevel=5)
    return not reason


def _launch_apart() -> None:
    """Switch to one launch per step, for the cooperative launch fails on a shared card; RuntimeError if that was so."""
    from distill.losses.kernels import select

    if select.SEPARATE_LAUNCHES:
        raise RuntimeError("launches are separate already")
    select.SEPARATE_LAUNCHES = True


def _example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, label, valid and weight, (2,16,32), from a separate generator: the global one is not advanced."""
    generator = torch.Generator().manual_seed(0)
    pred, target, chance, weight = torch.rand((4, 2, 16, 32), generator=generator)
    target[1] = (target[1] * 12).floor()
    return pred.to(device), target.to(device), (chance > 0.2).to(device), weight.to(device)


def _differentiated(pred: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        pred = pred.detach().requires_grad_()
        losses = call(pred)
        return losses.detach(), torch.autograd.grad(losses.sum(), pred)[0]


def _try_contexts(device: torch.device, weighted: bool, how: tuple[tuple[int, ...], float, bool]) -> Pairs:
    pred, target, valid, drawn = _example(device)
    weight = drawn if weighted else None
    ours = _differentiated(pred, lambda x: _contexts(x, target, valid, weight, *how)[0])
    rows = (pred.flatten(1), target.flatten(1), valid.flatten(1), None if weight is None else weight.flatten(1))
    losses, gradient, _ = batch_loss(*rows, levels=how[0], trim_top=how[1], label_only=how[2], want_gradient=True)
    assert gradient is not None
    yield from zip(ours, (losses, gradient.reshape(pred.shape)), strict=True)


def _try_gradient(device: torch.device, how: tuple[int, bool], reference: Callable[..., Tensor]) -> Pairs:
    pred, target, valid, _ = _example(device)
    ours = _differentiated(pred, lambda x: _gradient(x, target, valid, *how, None))
    yield from zip(ours, _differentiated(pred, lambda x: reference(x, target, valid, *how)), strict=True)


def _try_deviation(device: torch.device, reference: Callable[..., tuple[Tensor, Tensor]]) -> Pairs:
    from distill.losses.kernels.small import LARGEST

    pred, _, valid, _ = _example(device)
    times = -(-(LARGEST + 1) // pred[0].numel())
    for values, counted in ((pred, valid), (pred.repeat(1, times, 1), valid.repeat(1, times, 1))):
        yield from zip(_deviation(values, counted), reference(values, counted), strict=True)


def _try_boxes(device: torch.device, reference: Callable[..., tuple[Tensor, Tensor]]) -> Pairs:
    pred, upstream, _, _ = _example(device)
    places = torch.tensor([[[0.1, 0.2, 0.6, 0.7], [-0.2, 0.5, 0.4, 1.1]]], device=device).expand(2, 2, 4)
    ours, expected = _boxes(pred, places, 16), reference(pred, places, 16)
    yield from zip((ours[0], ours[1].float()), (expected[0], expected[1].float()), strict=True)
    weights = upstream[:, None, :, :16]

    def sampled(sample: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return _differentiated(pred, lambda x: sample(x, places, 16)[0] * weights)

    yield from zip(sampled(_boxes), sampled(reference), strict=True)


def _bytes(valid: Tensor) -> Tensor:
    return valid.contiguous().view(torch.uint8)


def _constant(values: Tensor) -> Tensor:
    return (values.detach() if values.requires_grad else values).float().contiguous()


@functools.cache
def _kernels(name: str) -> Any:
    """A module of `distill.losses.kernels`, which needs Triton; an import statement looks it up at each call."""
    return importlib.import_module(f"distill.losses.kernels.{name}")


def _check_devices(pred: Tensor, *others: Tensor | None) -> None:
    """ValueError for maps of several devices, which a kernel would read at an address of another memory."""
    device = pred.device
    for each in others:
        if each is not None and each.device != device:
            raise ValueError(f"all maps must be on one device, not on {device} and {each.device}")


def _contexts(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    levels: tuple[int, ...],
    trim_top: float,
    label_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    _check_devices(pred, target, valid, weight)
    with torch.cuda.device_of(pred):
        rows = (
            pred.contiguous(), _constant(target), _bytes(valid), None if weight is None else _constant(weight)
        )  # fmt: skip
        found: tuple[Tensor, Tensor, Tensor, Any] = _kernels("contexts").context_loss(
            *rows, levels, trim_top=trim_top, label_only=label_only, flat=FLAT, floor=FLOOR, min_pixels=MIN_PIXELS
        )
        return found


def _gradient(pred: Tensor, target: Tensor, valid: Tensor, scales: int, normalize: bool, whole_image: Any) -> Tensor:
    _check_devices(pred, target, valid, None if whole_image is None else whole_image.statistics)
    with torch.cuda.device_of(pred):
        losses: Tensor = _kernels("gradient").gradient_loss(
            pred.contiguous(), _constant(target), _bytes(valid),
            scales=scales, normalize=normalize, flat=FLAT, floor=FLOOR, found=whole_image,
        )  # fmt: skip
        return losses


def _boxes(maps: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(maps):
        places = (boxes.detach() if boxes.requires_grad else boxes).to(maps).contiguous()
        found: tuple[Tensor, Tensor] = _kernels("boxes").sample_boxes(maps.contiguous(), places, size)
        return found


def _deviation(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    _check_devices(values, valid)
    select, small = _kernels("select"), _kernels("small")
    with torch.no_grad(), torch.cuda.device_of(values):
        if values[0].numel() <= small.LARGEST:
            median, deviation = small.small_mean_deviation(values.detach(), valid.view(torch.uint8))
        else:
            median, deviation = select.median_and_mean_abs_dev(values.detach().contiguous(), _bytes(valid))
    if not (values.requires_grad and torch.is_grad_enabled()):
        return median, deviation
    # Of several pixels that equal the median, the first gets its gradient.
    rows, counted = values.flatten(1), valid.flatten(1)
    first = (counted & (rows == median[:, None])).to(torch.uint8).argmax(1, keepdim=True)
    median = torch.where(counted.any(1), rows.gather(1, first)[:, 0], 0.0)
    spread = torch.where(counted, (rows - median[:, None]).abs(), 0.0).sum(1)
    return median, spread / counted.sum(1).clamp(min=1)
