"""Normalization within contexts of the label's depth range, shared by `global`, `hybrid` and `local`.

The label's range is cut into S equal parts for each S in `levels`; the pixels whose label lies in one part are a
context. In each context u, student and label are both centred on their median and divided by their mean
absolute deviation over the context's pixels; a pixel's loss is the mean of |N_u(student) - N_u(label)| over the
contexts it is in (Distill-Any-Depth, Sec. 3.1, equations for N_glo and L_Dis; contexts as in HDN, depth-range variant).

Loss and gradient are computed together in the forward pass, in closed form: on the CPU image by image, in as many
threads as torch may use (`_per_image`); on CUDA by kernels (`distill.losses.fused`); elsewhere, and where those cannot
run, for the whole batch without device synchronization (`_batched`).

Choices where the paper is silent (ours): the maximum belongs to the last part; a context with fewer than MIN_PIXELS
pixels, or whose label is constant, is dead: it is left out and counted; the median is the lower one, as in torch.
`_hdn` has the choices of HDN's released code.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from distill.losses import fused
from distill.losses.normalize import Comparison, single_or_double
from distill.losses.normalize._batched import batch_loss
from distill.losses.normalize._per_image import Workspace, image_loss

# Below this many values a thread costs more than it saves.
_WORTH_THREADS = 1 << 16


def _image_by_image(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    *,
    levels: tuple[int, ...],
    trim_top: float,
    label_only: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`batch_loss`, computed by `image_loss` in threads."""
    gradient = torch.zeros_like(pred) if want_gradient else None
    p, t, v = pred.numpy(), target.numpy(), valid.numpy()
    w, g = (None if x is None else x.numpy() for x in (weight, gradient))

    threads = min(len(pred), torch.get_num_threads()) if pred.numel() >= _WORTH_THREADS else 1

    def loss_of(b: int, space: Workspace) -> tuple[float, int]:
        rows = p[b], t[b], v[b], None if w is None else w[b], None if g is None else g[b]
        return image_loss(*rows, levels=levels, trim_top=trim_top, label_only=label_only, workspace=space)

    def losses_of(images: range) -> list[tuple[float, int]]:
        space = Workspace(pred.shape[1], p.dtype)
        return [loss_of(b, space) for b in images]

    per_image: list[tuple[float, int]] = [(0.0, 0)] * len(pred)
    images_per_thread = [range(i, len(pred), threads) for i in range(threads)]
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            per_thread = list(pool.map(losses_of, images_per_thread))
    else:
        per_thread = [losses_of(images_per_thread[0])]
    for images, results in zip(images_per_thread, per_thread, strict=True):
        per_image[images.start :: threads] = results
    losses, live = torch.tensor([f[0] for f in per_image], dtype=pred.dtype), torch.tensor([f[1] for f in per_image])
    return losses, gradient, live.long()


class _ContextLoss(torch.autograd.Function):
    """Per-image loss whose gradient is computed in the forward pass; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, weight, levels, trim_top, label_only):  # type: ignore[no-untyped-def]  # noqa: ANN001
        flat = [None if x is None else x.detach().flatten(1).contiguous() for x in (pred, target, valid, weight)]
        compute = _image_by_image if pred.device.type == "cpu" else batch_loss
        needs_grad = ctx.needs_input_grad[0]
        losses, gradient, live = compute(
            *flat, levels=levels, trim_top=trim_top, label_only=label_only, want_gradient=needs_grad
        )
        if gradient is not None:
            ctx.save_for_backward(gradient.reshape(pred.shape))
        ctx.mark_non_differentiable(live)
        return losses, live

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _live):  # type: ignore[no-untyped-def]  # noqa: ANN001
        (gradient,) = ctx.saved_tensors
        return upstream[:, None, None] * gradient, None, None, None, None, None, None


def compare_in_contexts(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    levels: tuple[int, ...],
    *,
    trim_top: float,
    label_only: bool,
    weight: Tensor | None = None,
) -> Comparison:
    """The comparison for these `levels`, each a divisor of the largest. Half precision is converted to float32."""
    pred = single_or_double(pred)
    fused_result = fused.context_loss(pred, target, valid, weight, levels, trim_top=trim_top, label_only=label_only)
    if fused_result is not None:
        return Comparison(*fused_result)
    target = target.detach().to(pred.dtype)
    usable = valid & torch.isfinite(target)
    weight = None if weight is None else weight.detach().to(pred.dtype)
    loss, live = _ContextLoss.apply(pred, target, usable, weight, levels, trim_top, label_only)
    return Comparison(loss, live, sum(levels) - live)


class _Compare(Protocol):
    def __call__(
        self,
        pred: Tensor,
        target: Tensor,
        valid: Tensor,
        *,
        trim_top: float = 0.0,
        label_only: bool = False,
        weight: Tensor | None = None,
    ) -> Comparison: ...


def comparison(levels: tuple[int, ...]) -> _Compare:
    """The `compare` of a plug-in (see distill.losses.normalize) that consists of its levels only."""

    def compare(
        pred: Tensor,
        target: Tensor,
        valid: Tensor,
        *,
        trim_top: float = 0.0,
        label_only: bool = False,
        weight: Tensor | None = None,
    ) -> Comparison:
        """See distill.losses.normalize: the loss (B,) and the contexts that carried it."""
        return compare_in_contexts(pred, target, valid, levels, trim_top=trim_top, label_only=label_only, weight=weight)

    return compare
