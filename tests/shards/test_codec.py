"""No map breaks the promise of its codec."""

from __future__ import annotations

import json
import zlib

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.shards.codec import CODECS, MAX_ERROR, decode_map, encode_map
from distill.shards.shards import (
    LabelDataset,
    verify,
)
from tests.shards.samples import make_sample, same_map, write


@pytest.mark.parametrize("codec", list(CODECS))
@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e6, 1e6, width=32),
    span=st.floats(2**-10, 1e6, width=32),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    picture=st.sampled_from(["noise", "two values", "board", "ramp", "spike", "steps"]),
    holes=st.sampled_from([0.0, 0.3, 0.97]),
    seed=st.integers(0, 99),
)
def test_no_map_breaks_the_promise_of_its_codec(codec, low, span, shape, picture, holes, seed):
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    unit = {
        "noise": rng.random(shape),
        "two values": rng.integers(0, 2, shape),
        "board": (rows + columns) % 2,
        "ramp": (rows * shape[1] + columns) / max(1, shape[0] * shape[1] - 1),
        "spike": (rows == shape[0] // 2) & (columns == shape[1] // 2),
        "steps": (rows + columns) % 17 / 16 + rng.integers(-1, 2, shape) / 65535,
    }[picture]
    values = torch.from_numpy((low + span * unit.astype(np.float64)).astype(np.float32))
    valid = torch.from_numpy(rng.random(shape) >= holes)
    data, said = encode_map(values, valid, codec=codec)
    got, got_valid = decode_map(data, json.loads(json.dumps(said)), codec=codec)
    assert torch.equal(got_valid, valid) and said["valid"] == int(valid.sum())
    assert (got[~valid] == 0).all() and CODECS[codec].bound <= MAX_ERROR
    if valid.any():
        rounding = 2**-23 * float(values[valid].abs().max())  # the answer is float32 again
        bound = (said["high"] - said["low"]) * CODECS[codec].bound + rounding
        assert (got.double() - values.double())[valid].abs().max() <= bound


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_picture_of_real_size_keeps_the_promise(codec):
    rows, columns = torch.meshgrid(torch.linspace(0, 9, 560), torch.linspace(0, 7, 560), indexing="ij")
    values = torch.sin(rows * columns) + 5 * (rows > columns) + 0.01 * torch.rand(560, 560)
    valid = (rows - 4) ** 2 + (columns - 4) ** 2 > 3
    data, said = encode_map(values, valid, codec=codec)
    got, got_valid = decode_map(data, said, codec=codec)
    assert torch.equal(got_valid, valid)
    assert (got - values)[valid].abs().max() <= (said["high"] - said["low"]) * MAX_ERROR + 1e-6


@pytest.mark.parametrize("codec", list(CODECS))
def test_constants_and_single_pixels_are_exact(codec):
    for values in (torch.full((3, 4), -7.25), torch.tensor([[torch.nan, 3.3]])):
        got, valid = decode_map(*encode_map(values, torch.isfinite(values), codec=codec), codec=codec)
        assert torch.equal(got[valid], values[torch.isfinite(values)]) and valid.sum() == torch.isfinite(values).sum()


@pytest.mark.parametrize("codec", list(CODECS))
def test_nothing_valid_and_nothing_finite(codec):
    bad = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 1.0]])
    data, said = encode_map(bad, torch.tensor([[True, True], [True, False]]), codec=codec)
    assert said == {"low": 0.0, "high": 0.0, "valid": 0}
    assert not decode_map(data, said, codec=codec)[1].any()


def test_infinity_does_not_stretch_the_range():
    _, said = encode_map(torch.tensor([[1.0, torch.inf, 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert said == {"low": 1.0, "high": 2.0, "valid": 2}


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("data", [b"", b"nonsense"])
def test_a_map_that_does_not_decode_is_named(data, codec):
    with pytest.raises(OSError, match="sa_1 one.shared is damaged"):
        decode_map(data, {"low": 0, "high": 1}, codec=codec, where="sa_1 one.shared")


@pytest.mark.parametrize("plain", [b"", b"\0" * 8, b"\2\0\0\0\2\0\0\0short", b"\2\0\0\0\1\0\0\0too long"])
def test_zstandard_that_holds_no_map_is_named(plain):
    with pytest.raises(OSError, match="x is damaged: not a map in zst; "):
        decode_map(bytes(imagecodecs.zstd_encode(plain)), {"low": 0, "high": 1}, codec="zst", where="x")


def test_a_damaged_map_never_reaches_its_decoder(monkeypatch):
    values = torch.arange(64.0).reshape(8, 8)
    data, span = encode_map(values, values >= 0)
    said = {**span, "crc32": zlib.crc32(data)}
    assert decode_map(data, said)[1].all()
    monkeypatch.setattr("imagecodecs.jpegls_decode", lambda data: pytest.fail("it did"))
    for i in range(len(data)):
        with pytest.raises(OSError, match="its checksum is wrong; run `distill verify --repair`"):
            decode_map(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], said)


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_codec_makes_a_folder_that_reads_back(tmp_path, codec):
    samples = [make_sample("sa_1", seed=1), make_sample("sa_2", seed=2)]
    folder = write(tmp_path / codec, samples, codec=codec)
    assert verify(folder) == []
    for got, want in zip(LabelDataset(folder), samples, strict=True):
        assert got.record["codec"] == codec
        same_map(got.labels["one"].local, want.labels["one"].local)
