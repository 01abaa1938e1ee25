"""Parts of transformer blocks, against their formulas; whole networks of them have golden cases."""

from __future__ import annotations

import pytest
import torch

from distill.core.blocks import Attention, LayerScale, Mlp
from distill.core.positions import patch_positions, rotation_tables

TOKENS = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalized", [True, False])
def test_attention_is_a_mean_of_values_that_knows_places_where_they_are_told(normalized):
    torch.manual_seed(0)
    attention = Attention(16, 2, normalized=normalized).eval()
    query, key, value = attention.qkv(TOKENS).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    if normalized:
        query, key = (x - x.mean(-1, keepdim=True) for x in (query, key))
        query, key = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in (query, key))
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(TOKENS, None), expected)
    rotation = rotation_tables(patch_positions(2, 3, TOKENS.device), 8, torch.float32)
    assert not torch.allclose(attention(TOKENS, rotation), expected)


def test_the_mlp_has_the_exact_gelu_and_a_scale_its_start():
    mlp = Mlp(16, 24)
    hidden = mlp.fc1(TOKENS)
    expected = mlp.fc2(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    torch.testing.assert_close(mlp(TOKENS), expected)
    torch.testing.assert_close(LayerScale(16, 0.01)(TOKENS), 0.01 * TOKENS)
