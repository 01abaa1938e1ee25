"""A ViT's tensors under other people's names: transformers' as facebookresearch's, those as timm's.

Shapes: C channels of the ViT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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


def facebook_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names as facebookresearch's; anything else as it is."""
    if not any(key.endswith("embeddings.cls_token") for key in state):
        return state
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in _TRANSFORMERS:
            key = re.sub(pattern, name, key)
        named[key] = value
    if "pos_embed" not in named and "register_tokens" in named:  # DINOv3: rotary positions
        named["storage_tokens"] = named.pop("register_tokens")
    gated = any(".mlp.gate_proj." in key for key in named)
    ways = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    out: dict[str, Tensor] = {}
    for key, value in named.items():
        for theirs, ours in ways.items():
            key = key.replace(f".mlp.{theirs}.", f".mlp.{ours}.")
        out[key] = value
    for key in [key for key in out if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        query = out.pop(key)
        content = out.pop(key.replace(".q.", ".v."), query[:0])
        absent = torch.zeros_like(query) if key.endswith(".bias") else query[:0]  # a DINOv3 has no key bias
        out[key.replace(".q.", ".qkv.")] = torch.cat([query, out.pop(key.replace(".q.", ".k."), absent), content])
    return out


def timm_keys(state: dict[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """facebookresearch's DINOv2 and DINOv3 names as timm's; names that are timm's already pass through."""
    out: dict[str, Tensor] = {}
    dinov3 = "storage_tokens" in state
    for key, value in state.items():
        if dinov3 and key.endswith("attn.qkv.bias"):
            query, _, content = value.chunk(3)
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
        # timm's table of a DINOv2 with registers has no place for cls, so cls carries its position itself.
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out
