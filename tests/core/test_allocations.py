"""Weights that ask for memory by a number are refused before any is taken; what libraries write is read."""

from __future__ import annotations

import json
import pickle
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from distill.core.weights import WeightsMismatchError, read_state, shards


class Call:
    """Pickles as a call of something with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_file(path, value):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("a/version", "3\n")
    return path


ARRAY = np.empty(0).__reduce__()[0]
ONE = (2**30,)  # a tuple that the memo holds


@pytest.mark.parametrize(
    "value",
    [
        {"a": Call(bytearray, 6_000_000_000)},
        {str(i): Call(bytearray, 10**9) for i in range(20)},
        {"x": ONE, "a": Call(np.ndarray, (2**33,))},
        {"a": Call(ARRAY, np.ndarray, (2**33,), b"b")},
        {"a": Call(torch.Tensor, 2**33)},
        {"a": [Call(bytearray, TEXT, "latin-1") for TEXT in ["x" * 100_000] for _ in range(5000)]},
    ],
)
def test_memory_by_a_number_is_not_given(tmp_path, value):
    path = torch_file(tmp_path / "a.pth", value)
    tracemalloc.start()
    with pytest.raises(WeightsMismatchError, match=r"a.pth asks for (the )?memory .*not opened; save its state_dict"):
        read_state(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("legacy", [False, True])
def test_what_libraries_store_beside_weights_is_read(tmp_path, legacy):
    beside = {
        "rng": [np.random.get_state(), torch.get_rng_state(), random.getstate()],
        "bytes": [bytearray(b"abc"), bytearray(b"abc"), b"z\0\xff", 2**60],
        "numpy": [np.float64(3), np.arange(5), np.ones((2, 3)), np.array(["a"])],
        "torch": [torch.nn.Parameter(torch.ones(2)), torch.Size([3, 4]), torch.Tensor([1, 2])],
    }
    beside |= {
        "losses": [np.float32(i) for i in range(10_000)],
        "recipe": "x" * 60_000,
    }  # one text is long
    state = {"a.weight": torch.ones(4, 4), "b": torch.nn.Parameter(torch.ones(2)), "n": np.ones(3)}
    torch.save({"model": state, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert len(read_state(tmp_path / "a.pth")) == 3


def test_headers_and_indices_of_strangers_cost_a_line(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    many = "{" + ",".join(f'"t{i}":{entry}' for i in range(100_001)) + "}"
    for header, size, told in (
        (b'{"a":' * 100_000, None, "recursion limit"),
        (b'{"a":1}', 2**60, "header too large"),
        (many.encode(), None, "lists 100001 tensors, more than 100000"),
    ):
        path.write_bytes(struct.pack("<Q", size or len(header)) + header)
        with pytest.raises(WeightsMismatchError, match=told):
            read_state(path)
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        '{"weight_map":' + "[" * 200_000,
        *(json.dumps({"weight_map": {"a": x}}) for x in ("../b", "/b", ".")),
    ):
        index.write_text(text)
        with pytest.raises(WeightsMismatchError, match=r"is not an index of weights|names files of other folders"):
            shards(index)
