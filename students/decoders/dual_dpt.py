"""The depth branch of Depth Anything 3's Dual-DPT, which is VGGT's DPT head too; both released heads load.

Differences from Depth Anything V2's head: one LayerNorm for the features of all four levels, and a sinusoidal position
embedding of each pixel, added after each projection and before the last two convolutions. Dual-DPT's other branch,
rays, and both heads' confidence need more than depth to learn from: they are left out. Widths: 256 and
[256, 512, 1024, 1024] (DA3-LARGE, VGGT-1B), 128 and [96, 192, 384, 768] (BASE), 64 and [48, 96, 192, 384] (SMALL).

The released heads predict the logarithm of depth. `load_released` negates it, so that larger is nearer as for every
student; exp(-raw) is then their depth. VGGT's ReLUs work in place, so that its residual units add ReLU(x) where Depth
Anything 3's add x: `rectified_skip`.

Sources: ByteDance-Seed/Depth-Anything-3 src/depth_anything_3/model/dualdpt.py; facebookresearch/vggt
vggt/heads/dpt_head.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distill.core.positions import uv_embedding
from distill.core.resample import resize_bilinear
from distill.students.decoders import Features, four_channels, load_released, split
from distill.students.decoders.dav2 import fused, trunk

_OTHER_BRANCH = re.compile(r"scratch\.(refinenet\d|output_conv\d)_aux\.")
_LAST = "scratch.output_conv2.2."


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs, or plain maps, to a raw map (B,1,patch*h,patch*w).

    in_channels: C, the same of all four. channels: the fusion width, a multiple of 8. post_process_channels: the width
    of each level, multiples of 4. patch_size: the encoder's, pixels of output per token. rectified_skip: as VGGT's head
    computes, not Depth Anything 3's. The class token is not read.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int = 256,
        post_process_channels: Sequence[int] = (256, 512, 1024, 1024),
        *,
        patch_size: int = 14,
        rectified_skip: bool = False,
    ) -> None:
        super().__init__()
        inputs, levels = four_channels(in_channels), four_channels(post_process_channels, "post_process_channels")
        if len(set(inputs)) > 1:
            raise ValueError(f"in_channels must be alike, for one norm serves all four levels, not {inputs}")
        if channels % 8 or any(level % 4 for level in levels):
            raise ValueError(
                f"channels must be a multiple of 8 and post_process_channels of 4, not {channels} and {levels}"
            )
        self.options: dict[str, Any] = {
            "in_channels": inputs,
            "channels": channels,
            "post_process_channels": levels,
            "patch_size": patch_size,
            "rectified_skip": rectified_skip,
        }
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(inputs[0])
        self.projects, self.resize_layers, self.scratch = trunk(inputs, levels, channels, rectified_skip=rectified_skip)

    def forward(self, features: Features) -> Tensor:
        """(B,1,patch*h,patch*w), larger is nearer."""
        maps = [split(feature)[0] for feature in features]
        height, width = (side * self.patch_size for side in maps[0].shape[-2:])
        levels = []
        for i, x in enumerate(maps):
            x = self.projects[i](self.norm(x.movedim(1, -1)).movedim(-1, 1))
            levels.append(self.scratch[f"layer{i + 1}_rn"](self.resize_layers[i](x + uv_embedding(x, height, width))))
        x = self.scratch["output_conv1"](fused(self.scratch, levels))
        x = resize_bilinear(x, (height, width), align_corners=True)
        return self.scratch["output_conv2"](x + uv_embedding(x, height, width))

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from a released file of Depth Anything 3's main series or of VGGT, negated: the raw map is -log depth.

        All of a whole model but the head (`head.`, `depth_head.`) is ignored. ValueError names a mismatch.
        """
        state = {re.sub(r"^(module\.|model\.)+", "", key): value for key, value in state_dict.items()}
        for inside in ("depth_head.", "head."):
            if any(key.startswith(inside) for key in state):
                state = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
                break
        state = {key: value for key, value in state.items() if not _OTHER_BRANCH.match(key)}
        for key in (f"{_LAST}weight", f"{_LAST}bias"):
            if key in state:
                state[key] = -state[key][:1]  # the other channel is the confidence
        load_released(self, state)
        return self
