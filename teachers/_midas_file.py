"""MiDaS v3.1 files as isl-org/MiDaS releases them (dpt_beit_*.pt): tensor names, and sizes from shapes.

The backbone is timm's BEiT, the decoder MiDaS's own; together they equal transformers' DPT on BEiT, which is used here.
Sources: midas/backbones/beit.py, vit.py, utils.py (hooks at every quarter, act_postprocess), midas/blocks.py.

Shapes: D width, L blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.core.weights import thirds
from distill.teachers import WeightsMismatchError, sizing_tensors

_BLOCK = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "attn.proj": "attention.output.dense",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
}
# An index that follows from the grid, and tensors that only a classifier or another pooling uses.
_UNUSED = re.compile(r"pretrained\.model\.(blocks\.\d+\.attn\.relative_position_index|(fc_)?norm\.\w+|head\.\w+)")
_TABLE = "pretrained.model.blocks.0.attn.relative_position_bias_table"


ANCHOR = "pretrained.model.cls_token"
"""A name that every file of the authors has."""


def config_of(state: Mapping[str, Tensor], path: Path) -> Any:
    """The configuration of transformers' DPT on BEiT for the tensors of a file. Raises as `network_sizes` does."""
    from transformers import BeitConfig, DPTConfig

    net = network_sizes(state, path)
    backbone = BeitConfig(
        hidden_size=net["width"],
        num_hidden_layers=net["blocks"],
        num_attention_heads=net["heads"],
        intermediate_size=net["mlp"],
        image_size=net["size"],
        patch_size=net["patch"],
        layer_norm_eps=1e-6,  # timm's
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=[f"stage{net['blocks'] * quarter // 4}" for quarter in range(1, 5)],
    )
    return DPTConfig(
        backbone_config=backbone,
        hidden_size=net["width"],
        neck_hidden_sizes=net["neck"],
        fusion_hidden_size=net["fusion"],
    )


def network_sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The network's sizes in a file: width, blocks, heads, mlp, size (pixels), patch, neck (4 widths), fusion.

    Raises WeightsMismatchError for another MiDaS network, or an incomplete file.
    """
    if _TABLE not in state:
        raise WeightsMismatchError(
            f"{path} lacks {_TABLE}: of MiDaS's own files the v3.1 ones on BEiT are read (dpt_beit_large_512.pt, "
            "dpt_beit_large_384.pt, dpt_beit_base_384.pt), or the same as a transformers folder, "
            "Intel/dpt-beit-large-512"
        )
    dimensions = {_TABLE: 2, "pretrained.model.patch_embed.proj.weight": 4, "pretrained.model.cls_token": 3}
    dimensions |= {"pretrained.model.blocks.0.mlp.fc1.weight": 2}
    dimensions |= {f"pretrained.act_postprocess{i}.3.weight": 4 for i in range(1, 5)} | {"scratch.layer1_rn.weight": 4}
    if missing := next((name for name in dimensions if name not in state), ""):
        raise WeightsMismatchError(f"{path} lacks {missing}: a part of MiDaS v3.1 alone")
    table, patches, token, hidden, *necks, fused = sizing_tensors(state, dimensions, path, what="MiDaS v3.1")
    # (2 n - 1)**2 offsets, plus three for the class token
    side = (math.isqrt(max(0, table.shape[0] - 3)) + 1) // 2
    return {
        "width": token.shape[-1],
        "blocks": len({m[1] for key in state if (m := re.match(r"pretrained\.model\.blocks\.(\d+)\.", key))}),
        "heads": table.shape[1],
        "mlp": hidden.shape[0],
        "size": side * patches.shape[-1],
        "patch": patches.shape[-1],
        "neck": [tensor.shape[0] for tensor in necks],
        "fusion": fused.shape[0],
    }


def to_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names; unknown ones keep their own name."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if _UNUSED.fullmatch(key):
            continue
        if match := re.fullmatch(r"pretrained\.model\.blocks\.(\d+)\.attn\.qkv\.weight", key):
            attention = f"backbone.encoder.layer.{match[1]}.attention.attention"
            for name, part in zip(("query", "key", "value"), thirds(tensor), strict=True):
                out[f"{attention}.{name}.weight"] = part.contiguous()
        else:
            out[_name(key)] = tensor
    return out


def _name(key: str) -> str:
    if match := re.fullmatch(r"pretrained\.model\.blocks\.(\d+)\.(.+)", key):
        inner = next((new + match[2][len(old) :] for old, new in _BLOCK.items() if match[2].startswith(old)), match[2])
        return f"backbone.encoder.layer.{match[1]}.{inner}"
    for pattern, new in _PLACES:
        if match := re.fullmatch(pattern, key):
            first, *others = match.groups() or ("",)
            return new.format(int(first) - 1 if new.startswith("neck") else first, *others)  # its neck counts from 0
    if match := re.fullmatch(
        r"scratch\.refinenet([1-4])\.(out_conv|resConfUnit([12])\.conv([12]))\.(weight|bias)", key
    ):
        layer = f"neck.fusion_stage.layers.{4 - int(match[1])}"  # transformers counts from the coarsest
        inner = "projection" if match[2] == "out_conv" else f"residual_layer{match[3]}.convolution{match[4]}"
        return f"{layer}.{inner}.{match[5]}"
    return key


_PLACES = (
    (r"pretrained\.model\.cls_token", "backbone.embeddings.cls_token"),
    (r"pretrained\.model\.patch_embed\.proj\.(weight|bias)", "backbone.embeddings.patch_embeddings.projection.{}"),
    (r"pretrained\.act_postprocess([1-4])\.0\.project\.0\.(\w+)", "neck.reassemble_stage.readout_projects.{}.0.{}"),
    (r"pretrained\.act_postprocess([1-4])\.3\.(\w+)", "neck.reassemble_stage.layers.{}.projection.{}"),
    (r"pretrained\.act_postprocess([1-4])\.4\.(\w+)", "neck.reassemble_stage.layers.{}.resize.{}"),
    (r"scratch\.layer([1-4])_rn\.(weight)", "neck.convs.{}.{}"),
    (r"scratch\.output_conv\.(0|2|4)\.(weight|bias)", "head.head.{}.{}"),
)
