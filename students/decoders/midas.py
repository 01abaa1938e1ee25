"""MiDaS v3.1's head on a BEiT or another plain ViT, so that a student can start from MiDaS's encoder and head.

Differences from Depth Anything V2's head, which derives from it: the class token is read (joined to every patch token
and projected back to its width), and the last map is doubled instead of resized to the image. Widths: 256 and
[256, 512, 1024, 1024] (BEiT-L, read at blocks 5, 11, 17, 23) or [96, 192, 384, 768] (BEiT-B, at 2, 5, 8, 11); the
authors resize images so that both sides are multiples of 32.

Source: isl-org/MiDaS midas/dpt_depth.py, midas/blocks.py, midas/backbones/utils.py. The released ReLU at the end is
left to the user of the map, and refinenet4.resConfUnit1, which is stored and never used, is omitted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distill.students.decoders import Features, four_channels, load_released
from distill.students.decoders.dav2 import UNUSED, Fusion, fused
from distill.students.decoders.dpt import Head, Reassemble

# The parts of act_postprocess1 to 4, one for each level: the readout, a projection, and the resizing.
_PARTS = {"0.project.0": "readout_projects.{}.0", "3": "projects.{}.conv", "4": "resize_layers.{}"}


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs to a raw map (B,1,16h,16w).

    in_channels: C, one number or four. channels: the fusion width. post_process_channels: the width of each level.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int = 256,
        post_process_channels: Sequence[int] = (256, 512, 1024, 1024),
    ) -> None:
        super().__init__()
        inputs, levels = four_channels(in_channels), four_channels(post_process_channels, "post_process_channels")
        self.options: dict[str, Any] = {
            "in_channels": inputs,
            "channels": channels,
            "post_process_channels": levels,
        }
        self.reassemble = Reassemble(inputs, levels, readout="project", norm="none")
        scratch: dict[str, nn.Module] = {}
        for i, level in enumerate(levels, start=1):
            scratch[f"layer{i}_rn"] = nn.Conv2d(level, channels, 3, padding=1, bias=False)
            scratch[f"refinenet{i}"] = Fusion(channels, lateral=i < 4)
        scratch["output_conv"] = Head(channels)
        self.scratch = nn.ModuleDict(scratch)

    def forward(self, features: Features) -> Tensor:
        """(B,1,16h,16w), before the final activation."""
        levels = [self.scratch[f"layer{i}_rn"](x) for i, x in enumerate(self.reassemble(features), start=1)]
        return self.scratch["output_conv"](fused(self.scratch, levels))

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from MiDaS's own file (dpt_beit_*.pt), whose encoder is ignored; ValueError names a mismatch."""
        state: dict[str, Any] = {}
        for key, value in state_dict.items():
            match = re.fullmatch(r"pretrained\.act_postprocess([1-4])\.(0\.project\.0|3|4)\.(weight|bias)", key)
            if match:
                state[f"reassemble.{_PARTS[match[2]].format(int(match[1]) - 1)}.{match[3]}"] = value
            elif not key.startswith(("pretrained.", UNUSED)):
                state[key] = value
        load_released(self, state)
        return self
