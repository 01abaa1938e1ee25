"""Students small enough for tests."""

from __future__ import annotations

import torch

from distill import students

SMALL = {
    "sdt": {"fusion_channels": 16},
    "sdt_fast": {"fusion_channels": 16, "widths": [16, 8, 8, 8]},
    "dpt": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
    "dav2": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
    "dual_dpt": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
    "midas": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
}

DINOV3 = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def tiny(decoder, *, patch=16, depth=4, **options):
    encoder_options = {"timm_options": {"depth": depth, "embed_dim": 32, "patch_size": patch}}
    return students.build(
        encoder="test_vit",
        decoder=decoder,
        encoder_options=encoder_options,
        decoder_options=SMALL.get(decoder, {}) | options,
    )


def randomised(module):
    """Random weights large enough that every part has an effect (layer scales and DySample offsets start near 0)."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.02).add_(
                1.0 * name.endswith(("gamma", "norm1.weight"))
            )
    return module
