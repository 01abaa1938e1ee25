"""Renaming of a ViT's tensors: transformers' and OpenMMLab's names to facebookresearch's, and those to timm's.

Shapes: C channels of the ViT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.core.weights import thirds

# transformers' DINOv2 and DINOv3 names as facebookresearch's; q, k and v are joined afterwards.
_TRANSFORMERS = [
    (r"^(model\.|dinov2\.)", ""),
    (r"^encoder\.layer\.|^(model\.)?layer\.", "blocks."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]

# mmpretrain's and mmsegmentation's names of a ViT, as their converters write them.
_OPENMMLAB = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.(attn\.gamma1|ffn\.gamma2)\.weight$", lambda match: f".ls{match[1][-1]}.gamma"),
    (r"\.ffn\.(w12|w3)\.", r".mlp.\1."),
]


ANCHORS = ("embeddings.cls_token", "patch_embed.proj.weight", "patch_embed.projection.weight")
"""Names of which every ViT has one, in any naming scheme."""


def facebook_keys(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """transformers' and OpenMMLab's names as facebookresearch's; other states are returned unchanged.

    ValueError, naming the source, for a DINOv3 whose keys have a bias, as transformers' key_bias = true makes it.
    """
    if "patch_embed.projection.weight" in state:
        return {_renamed(key, _OPENMMLAB): value for key, value in state.items()}
    if not any(key.endswith("embeddings.cls_token") for key in state):
        return state
    named = {_renamed(key, _TRANSFORMERS): value for key, value in state.items()}
    if "pos_embed" not in named and "register_tokens" in named:  # DINOv3: rotary positions
        named["storage_tokens"] = named.pop("register_tokens")
    gated = any(".mlp.gate_proj." in key for key in named)
    mlp_names = (
        {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    )
    out: dict[str, Tensor] = {}
    for key, value in named.items():
        for theirs, ours in mlp_names.items():
            key = key.replace(f".mlp.{theirs}.", f".mlp.{ours}.")
        out[key] = value
    for key in [key for key in out if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        query = out.pop(key)
        nothing = query.new_empty(0, *query.shape[1:])
        content = out.pop(key.replace(".q.", ".v."), nothing)
        # A DINOv3 has no key bias; anything else that is missing is an error of shapes.
        absent = torch.zeros_like(query) if key.endswith(".bias") and "storage_tokens" in out else nothing
        keys = out.pop(key.replace(".q.", ".k."), absent)
        if not query.ndim == keys.ndim == content.ndim > 0 or {query.shape[1:]} != {keys.shape[1:], content.shape[1:]}:
            shapes = ", ".join(str(tuple(part.shape)) for part in (query, keys, content))
            raise ValueError(f"{source}: {key} and those of its keys and values have the shapes {shapes}: damaged")
        if "storage_tokens" in out and key.endswith(".bias") and keys.any():
            raise ValueError(
                f"{source}: {key.replace('.q.', '.k.')} is not zero, and a DINOv3's keys have no bias here"
            )
        out[key.replace(".q.", ".qkv.")] = torch.cat([query, keys, content])
    return out


def _renamed(key: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def timm_keys(state: dict[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """facebookresearch's DINOv2 and DINOv3 names as timm's; names that are timm's already pass through."""
    out: dict[str, Tensor] = {}
    dinov3 = "storage_tokens" in state
    for key, value in state.items():
        if dinov3 and key.endswith("attn.qkv.bias"):
            query, _, content = thirds(value)  # facebookresearch's network multiplies the keys' bias by 0
            q_bias, v_bias = (key.replace("qkv.bias", part) for part in ("q_bias", "v_bias"))
            if q_bias in wanted:
                out[q_bias], out[v_bias] = query, content
            elif query.any() or content.any():
                raise ValueError(
                    f"{source}: {key} is not zero, so it needs the encoder with that bias: add _qkvb to its name"
                )
            continue
        key = re.sub(r"^(storage|register)_tokens$", "reg_token", key)
        if dinov3:
            key = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)
        for gated, plain in (("mlp.w12.", "mlp.fc1."), ("mlp.w1.", "mlp.fc1_g."), ("mlp.w2.", "mlp.fc1_x.")):
            key = key.replace(gated, plain)
        out[key.replace("mlp.w3.", "mlp.fc2.")] = value
    if "register_tokens" in state and "pos_embed" in out and "cls_token" in out:
        # timm's table of a DINOv2 with registers has no row for cls, so cls includes its position.
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out
