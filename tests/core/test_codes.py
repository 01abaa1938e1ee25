"""Codes on a device: the bits that the codec of the shards gives on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.core.codes import CodedMaps, encode_linear
from distill.core.depth import Kind
from distill.shards.codec import CODECS, decode_map, encode_map

LINEAR = [name for name, codec in CODECS.items() if codec.first]


def maps() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    values, valid = (
        torch.randn(3, 40, 50) * torch.tensor([0.01, 1.0, 1e4])[:, None, None] + 5,
        torch.rand(3, 40, 50) > 0.2,
    )
    broken = values.clone()
    broken[:, :3], broken[:, 4] = torch.nan, torch.inf
    return {
        "usual": (values, valid),
        "all valid": (values, torch.ones_like(valid)),
        "constant": (torch.full_like(values, 3.25), valid),
        "nothing valid": (values, torch.zeros_like(valid)),
        "not finite": (broken, valid),
    }


@pytest.mark.parametrize("case", list(maps()))
@pytest.mark.parametrize("codec", LINEAR)
def test_a_batch_has_the_codes_of_the_codec(codec, case):
    values, valid = maps()[case]
    codes, low, high, count = encode_linear(values, valid, CODECS[codec].first)
    for i in range(len(values)):
        data, span = encode_map(values[i], valid[i], codec=codec)
        assert CODECS[codec].write(codes[i].numpy()) == data
        assert span == {"low": float(low[i]), "high": float(high[i]), "valid": int(count[i])}


@pytest.mark.parametrize("case", list(maps()))
@pytest.mark.parametrize("codec", list(CODECS))
def test_decoding_a_batch_has_the_bits_of_the_codec(codec, case):
    values, valid = maps()[case]
    encoded = [encode_map(v, m, codec=codec) for v, m in zip(values, valid, strict=True)]
    coded = CodedMaps(
        torch.from_numpy(np.stack([CODECS[codec].read(data) for data, _ in encoded])),
        *(torch.tensor([span[key] for _, span in encoded], dtype=torch.float64) for key in ("low", "high")),
        torch.tensor([span["valid"] for _, span in encoded]),
        codec,
        Kind.AFFINE_DISPARITY,
    )
    depth = coded.decode()
    for i, (data, span) in enumerate(encoded):
        expected, known = decode_map(data, span, codec=codec)
        assert torch.equal(depth.values[i], expected) and torch.equal(depth.valid[i], known)
