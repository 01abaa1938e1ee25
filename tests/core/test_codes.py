"""Codes on a device: the bits that the codec of the shards gives on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from distill.core import codes
from distill.core.codes import CodedMaps, decode_values, encode_linear
from distill.core.depth import Kind
from distill.core.labels import stack_boxes
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


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_kernel_for_gpus(interpret):
    """Interpreted: the bits of the torch code. Compiled: nothing in it is rounded otherwise than there."""
    pytest.importorskip("triton")
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here |= {"CUDA_VISIBLE_DEVICES": ""} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run([sys.executable, "-m", "tests.core.codes_kernel"], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_where_the_kernel_cannot_run_torch_decodes_after_one_warning():
    """Here it cannot: there is no GPU, or no Triton."""
    codes._fused_decode.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [codes._fused_decode(torch.device("cpu")) for _ in range(2)] == [None, None]
    codes._fused_decode.cache_clear()
    (message,) = [str(one.message) for one in said if "decodes labels" in str(one.message)]
    assert "using the slower torch code" in message and "\n" not in message


def test_the_kernel_is_tried_both_ways_before_it_is_trusted(monkeypatch):
    """Once compiled, it is launched another way."""
    kernel, asked = pytest.importorskip("distill.core.codes_kernel", exc_type=ImportError), []

    def decode(*given):
        asked.append(given)
        values, valid = decode_values(*given)
        return values + (len(asked) == 2), valid

    monkeypatch.setattr(kernel, "decode_values", decode)
    codes._fused_decode.cache_clear()
    with pytest.warns(UserWarning, match="decodes labels fails here .*other bits"):
        assert codes._fused_decode(torch.device("cpu")) is None
    codes._fused_decode.cache_clear()
    assert len(asked) == 2


def test_boxes_are_padded_by_their_first_one_and_by_the_whole_region():
    boxes = [torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]]), torch.zeros(1, 0, 4), torch.rand(1, 1, 4)]
    stacked = stack_boxes(boxes, 2)
    assert torch.equal(stacked[0], boxes[0][0]) and torch.equal(stacked[2], boxes[2][0].expand(2, 4))
    assert stacked[1].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2


def test_small_and_large_maps_are_decoded_alike():
    """Directly, or by a table of all values."""
    every = torch.arange(65536 + 16).remainder(65536).to(torch.uint16)[None, None]
    low, high = torch.tensor([-1.7], dtype=torch.float64), torch.tensor([3.1], dtype=torch.float64)
    units = codes.units_of("zst", torch.device("cpu"))
    values, valid = decode_values(every, low, high, units)
    parts = [decode_values(part, low, high, units) for part in every.split(1000, dim=2)]
    assert torch.equal(values, torch.cat([part[0] for part in parts], 2))
    assert torch.equal(valid, torch.cat([part[1] for part in parts], 2)) and not valid[0, 0, 0]


@pytest.mark.cuda
def test_a_card_decodes_with_the_kernel_and_the_bits_of_a_cpu(card):
    from distill.core.codes_kernel import example

    given = example()
    assert (fused := codes._fused_decode(torch.device(card))) is not None
    for ours, theirs in zip(fused(*(x.to(card) for x in given)), decode_values(*given), strict=True):
        assert torch.equal(ours.cpu(), theirs)
