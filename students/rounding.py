"""Four-bit codes calibrated on images: they preserve a layer's outputs rather than its weights.

GPTQ (Frantar et al., ICLR 2023, Algorithm 1): the columns of a matrix are rounded one after the other, and the
remaining columns compensate each one's error, by least squares over the layer's inputs. The inputs are those of the
float32 student, and lowest value and step of a group of columns are `quantize.fitted`'s (ours); 1 % of the mean second
moment is added to the diagonal, as in the paper.

Shapes: O outputs, K inputs of a layer (for a convolution: channels times the kernel's positions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.students.quantize import EIGHT_BITS, GROUP, QUANTIZED_FROM, fits, fitted, packed, rounded

_ROWS = 4096
"""The most positions of an image at which a layer's inputs are sampled, evenly spread."""
_DAMPING = 0.01


def calibrated(student: nn.Module, images: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Four-bit parts as of `quantize.quantize`, for the student's linear and convolutional weights, by key.

    images: (3,H,W) uint8 or float in [0,1]; any size that the student takes. Weights whose rows are no multiple of a
    group, and those stored with more bits, are left out.
    """
    layers = {name: module for name, module in student.named_modules() if _calibrates(f"{name}.weight", module)}
    moments = {id(module.weight): torch.zeros(2 * [module.weight[0].numel()]) for module in layers.values()}
    device = next(student.parameters()).device
    with torch.inference_mode(), _Counting(moments):
        for image in images:
            unit = image.float() / 255.0 if image.dtype == torch.uint8 else image
            student(unit[None].to(device))
    return {
        f"{name}.weight": compensated(module.weight.detach().cpu().float().flatten(1), moments[id(module.weight)])
        for name, module in layers.items()
    }


def _calibrates(key: str, module: nn.Module) -> bool:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        return False
    weight = module.weight
    whole = weight[0].numel() % GROUP == 0 and weight.numel() > QUANTIZED_FROM and not key.endswith(EIGHT_BITS)
    return whole and fits(weight)


class _Counting(TorchFunctionMode):
    """Adds the second moments (K,K) of each weight's inputs to `into`, by the weight's id.

    Functions are intercepted, not modules: timm's attention of DINOv3 and BEiT passes its qkv weight to F.linear.
    """

    def __init__(self, into: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.into = into

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in (F.linear, F.conv2d):
            names = ("input", "weight", "bias", "stride", "padding", "dilation")
            arguments = dict(zip(names, args, strict=False)) | keywords
            if (moments := self.into.get(id(arguments["weight"]))) is not None:
                moments += _second_moments(func, arguments)
        return func(*args, **keywords)


def _second_moments(func: Any, said: Mapping[str, Any]) -> Tensor:
    x = said["input"].detach().float()
    if func is F.conv2d:
        padding = said.get("padding", 0)
        if isinstance(padding, str):
            raise ValueError(f"a convolution with padding {padding} is not calibrated: give it in pixels")
        kernel = said["weight"].shape[2:]
        x = F.unfold(x, kernel, said.get("dilation", 1), padding, said.get("stride", 1)).transpose(1, 2)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[:: -(-len(rows) // _ROWS)]
    return (rows.T @ rows / len(rows)).cpu()


def compensated(weight: Tensor, moments: Tensor) -> dict[str, Tensor]:
    """Four-bit parts of a weight (O,K) whose inputs have the second moments (K,K); K is a multiple of GROUP."""
    remaining = weight.clone()
    moments = moments.double()
    idle = moments.diagonal() == 0  # inputs that are always 0: any code will do
    moments = moments + torch.diag(idle + _DAMPING * moments.diagonal().mean())
    # Row k of the factor says how the error of column k is distributed over later columns.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()
    codes, lows, steps = torch.zeros_like(remaining), [], []
    for first in range(0, remaining.shape[1], GROUP):
        group = slice(first, first + GROUP)
        columns, block = remaining[:, group].clone(), factor[group, group]
        _, low, step = fitted(columns, bits=4)
        errors = torch.zeros_like(columns)
        for k in range(GROUP):
            code = rounded(columns[:, k : k + 1], low, step, bits=4)
            codes[:, first + k] = code[:, 0]
            errors[:, k] = (columns[:, k] - (code * step + low)[:, 0]) / block[k, k]
            columns[:, k:] -= errors[:, k : k + 1] * block[k, k:]
        remaining[:, first + GROUP :] -= errors @ factor[group, first + GROUP :]
        lows.append(low)
        steps.append(step)
    groups = codes.reshape(-1, GROUP)
    return packed(groups, torch.cat(lows, 1).reshape(-1, 1), torch.cat(steps, 1).reshape(-1, 1), bits=4)
