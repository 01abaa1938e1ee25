"""OpenCV's cubic resizing, which Depth Anything V2 and MiDaS were trained and published with."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor


def resize_cubic(images: Tensor, height: int, width: int) -> Tensor:
    """(B,3,H,W) resized on float64 without antialias, as the authors do; values may leave [0,1].

    torch's bicubic has the same kernel but rounds coordinates differently: results differ by 1e-4 on noise.
    """
    if images.shape[-2:] == (height, width):
        return images
    arrays = images.detach().permute(0, 2, 3, 1).cpu().double().numpy()
    out = [cv2.resize(a, (width, height), interpolation=cv2.INTER_CUBIC) for a in arrays]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float().to(images.device)
