"""No map breaks the promise of its codec."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.core.codes import LAST
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels, Supervision
from distill.shards.codec import (
    CODECS,
    MAX_ERROR,
    collate,
    decode_map,
    decode_sample,
    dump_json,
    encode_map,
    encode_sample,
    read_codes,
)
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


def members_of(sample):
    return {name.removeprefix(f"{sample.key}."): data for name, data in encode_sample(sample)}


def test_codes_are_rounded_once_from_the_exact_place_in_the_range():
    values = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 3 + 100
    data, said = encode_map(values, values > 0, codec="png16")
    exact = values.double()
    unit = (exact - exact.min()) / (exact.max() - exact.min())
    first = CODECS["png16"].first
    assert torch.equal(
        torch.from_numpy(read_codes(data, said, codec="png16", where="").astype(np.int64)),
        (first + unit * (LAST - first)).round().long(),
    )


def test_equal_content_gives_equal_bytes():
    assert dump_json({"b": 1, "a": {"d": 1, "c": 2}}) == b'{"a":{"c":2,"d":1},"b":1}'
    data, _ = encode_map(torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool), codec="float16")
    assert data[:2] == b"\x1f\x8b" and data[4:8] == bytes(4)  # gzip would write the time there


def test_the_stored_region_keeps_the_resolution_of_its_colours():
    sample = make_sample()
    columns = torch.tensor([[255, 0], [0, 255], [0, 0]], dtype=torch.uint8).repeat(1, 8)  # red and green in turn
    stored = Image.open(io.BytesIO(members_of(replace(sample, image=columns[:, None].repeat(1, 16, 1)))["jpg"]))
    assert np.abs(np.array(stored).astype(int) - columns.T.numpy()).max() < 32


@pytest.mark.parametrize("coded", [False, True])
def test_of_a_sample_the_chosen_patches_are_read_with_their_boxes(coded):
    sample = make_sample(patches=3)
    read = decode_sample(members_of(sample), patches=lambda count: [count - 1, 0], coded=coded).answers["one"]
    assert torch.equal(read.boxes, sample.labels["one"].boxes[:, [2, 0]])
    local = sample.labels["one"].local
    same_map((read.decode() if coded else read).local, DepthMap(local.values[[2, 0]], local.valid[[2, 0]], local.kind))


def test_what_was_said_of_a_teacher_tells_truth_from_answers_and_sparse_truth_from_dense():
    shared = DepthMap(torch.rand(1, 16, 16) + 1, torch.zeros(1, 16, 16, dtype=torch.bool), Kind.METRIC_DEPTH)
    for valid, entry, truth, dense in [
        (64, {}, True, True),
        (63, {}, True, False),
        (63, {"card": {"license": "x"}}, False, True),
        (63, {"corruptions": ["x"]}, False, True),
    ]:
        shared.valid.view(-1)[:] = torch.arange(256) < valid
        sample = make_sample(teachers=())
        sample.labels["one"] = Labels(shared, None, torch.zeros(1, 0, 4))
        read = decode_sample(members_of(replace(sample, record={**sample.record, "labels": {"one": entry}})))
        assert entry.items() <= read.record["labels"]["one"].items()
        assert read.labels["one"].supervision == Supervision("one", Kind.METRIC_DEPTH, truth, dense)


def test_a_batch_is_truth_where_all_of_it_is_and_of_one_size():
    first, second = make_sample(teachers=("one",)), make_sample("sa_2", teachers=("one",))
    for truths in ((True, True), (True, False), (False, True)):
        for sample, truth in zip((first, second), truths, strict=True):
            labels = sample.labels["one"]
            sample.labels["one"] = replace(labels, supervision=replace(labels.supervision, truth=truth))
        assert collate([first, second]).labels["one"].supervision.truth is all(truths)
    with pytest.raises(ValueError, match=r"sa_2-0 and sa_1-0 cannot be in one batch"):
        collate([first, replace(second, image=second.image[:, :8])])
