"""Weight files as trainers write them: what is around the tensors comes off, and nothing pickled runs."""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.core.records import _modern
from distill.core.weights import (
    WeightsMismatchError,
    WeightsMissingError,
    below_prefix,
    find_weights,
    mentions,
    read_state,
    thirds,
    unchunked,
)

RAW = {"a.weight": torch.ones(2), "b.bias": torch.zeros(3)}
AVERAGED = {"a.weight": torch.full((2,), 2.0), "b.bias": torch.zeros(3)}


def prefixed(prefix, state=RAW):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "plain": RAW,
    "model": {"model": RAW, "args": argparse.Namespace(lr=1e-4), "epoch": np.float64(3), "best": np.int64(1)},
    "lightning": {"state_dict": RAW, "hyper_parameters": {"lr": 1}, "callbacks": {"x": {"y": torch.ones(1)}}},
    "ema": {"ema": RAW, "step": 1},
    "model_ema": {"model_ema": RAW},
    "ema.module": {"ema": {"module": RAW}},
    "ddp": {"model": prefixed("module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}},
    "compiled": prefixed("_orig_mod.module."),
    "ema-pytorch": RAW | {"initted": torch.tensor(True), "step": torch.tensor([7])},
    "counted": {"model": RAW, "step": torch.tensor(3)},
    "path": {"state_dict": RAW, "config": {"out": Path("x")}},
    "numpy": {"model": {key: value.numpy() for key, value in RAW.items()}, "rng_state": {"keys": np.arange(4)}},
    "numpy among tensors": {"model": {"a.weight": RAW["a.weight"], "b.bias": np.zeros(3, ">f4")}, "best": np.zeros(9)},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_come_off(tmp_path, name, zipped):
    torch.save(WRAPPED[name], tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    state = read_state(tmp_path / "w.ckpt")
    assert state.keys() == RAW.keys() and all(torch.equal(state[key], RAW[key]) for key in RAW)


def test_a_path_pickled_by_any_python_is_passed_over(tmp_path, monkeypatch):
    """Python 3.13 names its class pathlib._local.PosixPath, which others do not have."""
    module = types.ModuleType("pathlib._local")
    module.PosixPath = type("PosixPath", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": RAW, "out": module.PosixPath()}, tmp_path / "w.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert read_state(tmp_path / "w.ckpt").keys() == RAW.keys()


def test_of_two_tables_the_raw_one_is_taken_aloud_or_the_one_asked_for(tmp_path, caplog):
    path = tmp_path / "w.pth"
    torch.save({"model_ema": {"module": AVERAGED}, "model": RAW}, path)
    with caplog.at_level(logging.WARNING):
        assert read_state(path)["a.weight"][0] == 1
    assert 'took "model"; weights_key takes another of: model_ema.module' in caplog.text
    assert read_state(path, weights_key="model_ema")["a.weight"][0] == 2
    torch.save({"state_dict": prefixed("net.") | prefixed("net_ema.", AVERAGED)}, path)
    assert read_state(path, weights_key="net_ema.")["a.weight"][0] == 2
    assert below_prefix(read_state(path), ("a.weight",))["a.weight"][0] == 1
    with pytest.raises(WeightsMismatchError, match="no weights_key 'other'"):
        read_state(path, weights_key="other")
    torch.save(prefixed("module.one.") | prefixed("module.two.", AVERAGED) | {"n_averaged": torch.tensor(3)}, path)
    with pytest.raises(WeightsMismatchError, match="holds one., two.: give one as weights_key"):
        below_prefix(read_state(path), ("a.weight",), path)
    assert read_state(path, weights_key="two")["a.weight"][0] == 2
    torch.save({"left": RAW, "right": AVERAGED}, path)
    with pytest.raises(WeightsMismatchError, match="holds left, right: give one as weights_key"):
        read_state(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil-was-run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_pickled_runs(tmp_path, zipped):
    torch.save({"model": RAW, "args": Evil()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsMismatchError, match="w.pth cannot be read as weights") as error:
        read_state(tmp_path / "w.pth")
    assert not Path("/tmp/evil-was-run").exists() and "weights_only" not in str(error.value)


def test_what_a_prefix_hides_is_found_and_what_lies_beside_is_refused(caplog):
    teacher = prefixed("teacher.backbone.") | {"teacher.dino_head.x": torch.ones(1)} | prefixed("student.backbone.")
    assert below_prefix(teacher, ("a.weight",)).keys() == RAW.keys()
    stray = prefixed("model.") | {"more.weight": torch.ones(1)}
    assert "more.weight" in below_prefix(stray, ("a.weight",)), "for the caller to refuse"
    with caplog.at_level(logging.WARNING):
        assert below_prefix(stray, ("a.weight",), is_part=True).keys() == RAW.keys()
    assert "left out more.weight" in caplog.text


@pytest.mark.parametrize("outer", ["", "model."])
def test_a_copy_inside_the_network_is_left_out(outer, caplog):
    state = prefixed(outer) | prefixed(f"{outer}ema.", AVERAGED)
    taken = below_prefix(state, ("a.weight",))
    assert taken.keys() == RAW.keys() and taken["a.weight"][0] == 1
    assert f'took "{outer}"; weights_key takes another of: {outer}ema.' in caplog.text
    part = prefixed("") | prefixed("branch.")
    assert below_prefix(part, ("a.weight",)).keys() == part.keys(), "of the network itself, not of its trainer"


def test_chunks_of_blocks_are_joined():
    chunked = {f"blocks.{c}.{i}.x": torch.ones(1) for c, i in ((0, 1), (1, 2))}
    assert list(unchunked(chunked)) == ["blocks.1.x", "blocks.2.x"]
    anew = {f"blocks.{c}.{i}.x": torch.ones(1) for c in range(2) for i in range(2)}
    assert list(unchunked(anew)) == [f"blocks.{i}.x" for i in range(4)]


def test_shards_are_read_through_their_index(tmp_path):
    for i, key in enumerate(RAW):
        safetensors.torch.save_file({key: RAW[key]}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    with pytest.raises(WeightsMissingError, match="without their index"):
        find_weights(tmp_path, ["model.safetensors", "*.safetensors"])
    names = {key: f"model-0000{i + 1}-of-00002.safetensors" for i, key in enumerate(RAW)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8-sig")  # as Windows' editors save it
    assert find_weights(tmp_path, ["model.safetensors"]) == find_weights(tmp_path, ["*.safetensors"]) == index
    for path in (index, tmp_path / names["a.weight"]):
        assert read_state(path).keys() == RAW.keys()
    (tmp_path / names["b.bias"]).unlink()
    with pytest.raises(WeightsMissingError, match="lacks model-00002-of-00002.safetensors"):
        find_weights(tmp_path, ["model.safetensors"])
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(WeightsMismatchError, match="other folders"):
        read_state(index)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b'{"error": "denied"}', "is JSON"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (bytes(600), "begins with zeros"),
        (b"", "it is empty"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"Entry not found", "it is text, beginning 'Entry not found'"),
        (b"\x80\4\x95" + bytes(9), "is a plain Python pickle"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_stands_in_the_place_of_weights_is_named(tmp_path, name, start, reason):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(WeightsMismatchError, match=f"{name} .*{reason}"):
        read_state(tmp_path / name)


def test_the_first_bytes_tell_whatever_the_suffix_says(tmp_path):
    torch.save(RAW, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors").keys() == RAW.keys()
    header = {"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode().ljust(0x3C20)  # whose length reads " <"
    (tmp_path / "w.pth").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert find_weights(tmp_path, ["*.pth"]) and read_state(tmp_path / "w.pth").keys() == {"a.weight"}


def test_a_hole_in_a_download_is_no_weights(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(4096), "b": torch.ones(9)}, path)
    data = path.read_bytes()
    at = data.index(torch.ones(99).numpy().tobytes())
    path.write_bytes(data[:at] + bytes(4096) + data[at + 4096 :])
    with pytest.raises(WeightsMismatchError, match="is damaged: 1 of its .* checksum"):
        read_state(path)


def test_zeros_where_most_of_a_network_should_be_are_a_hole(tmp_path):
    state = {f"{i}.weight": torch.full((3, 3), float(i > 2)) for i in range(8)} | {"0.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsMismatchError, match="holds 0.weight and 2 of the 7 others as zeros alone, as an unfin"):
        read_state(tmp_path / "w.safetensors")
    state["2.weight"][1, 1] = 1e-9  # two layers that were never used
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors").keys() == state.keys()


def test_a_zip_of_something_else_is_named(tmp_path):
    for member, reason in (("a.safetensors", r"a zip archive \(a.safetensors\)"), ("x/constants.pkl", "TorchScript")):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr(member, b"1")
        with pytest.raises(WeightsMismatchError, match=reason):
            read_state(tmp_path / "w.pt")


def test_what_systems_and_trainers_put_beside_weights_is_passed_over(tmp_path):
    torch.save(RAW, tmp_path / "pytorch_model.bin")
    for name in ("._pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        (tmp_path / name).write_bytes(b"1")
    assert find_weights(tmp_path, ["*.safetensors", "*.bin"]).name == "pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("x.lora_A.default.weight", torch.ones(1, 2), "an adapter .LoRA.: merge it"),
        ("x.SCB", torch.ones(2), "quantised by bitsandbytes: give the weights that it was made from"),
        ("x.weight_scale", torch.ones(1), ""),
        ("x.weight", torch.empty(2, device="meta"), "without its numbers"),
        ("x.weight", torch.eye(2).to_sparse(), "as sparse_coo: save plain"),
        ("x.weight", torch.ones(2).to(torch.float8_e5m2), "as float8_e5m2: quantised to eight bits"),
        ("x.weight", torch.ones(2, dtype=torch.int8), "as int8: quantised to eight bits"),
        ("x.weight", torch.empty(0), "empty, as DeepSpeed's ZeRO leaves it: run the zero_to_fp32.py"),
        ("x.bias", torch.tensor([1, torch.nan]), "that are NaN: its training has diverged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_that_are_no_weights_as_they_stand(tmp_path, name, tensor, said):
    torch.save(RAW | {name: tensor}, tmp_path / "w.pth")
    if not said:
        assert name in read_state(tmp_path / "w.pth"), "a name alone is no evidence"
        torch.save(RAW | {name: tensor, "x.weight": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatchError, match=f"w.pth holds {name}.*{said}"):
        read_state(tmp_path / "w.pth")


def test_a_folder_without_weights_says_what_there_is(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    for name in ("best.pth.tar", "checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsMissingError, match=r"; there is best.pth.tar, checkpoint-500/model.safetensors$"):
        find_weights(tmp_path, ["*.safetensors", "*.pth"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"), ("__0_0.distcp", "dcp_to_torch")],
)
def test_shards_of_a_trainer_say_how_they_are_joined(tmp_path, name, said):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save({"module": {}, "optimizer_state_dict": {}}, tmp_path / name)
    with pytest.raises(WeightsMissingError, match=said):
        find_weights(tmp_path, ["*.safetensors"])
    with pytest.raises(WeightsMismatchError, match=said):
        read_state(tmp_path / name)


def test_a_cut_file_says_that_it_is_cut(tmp_path):
    torch.save(RAW, tmp_path / "w.pth")
    safetensors.torch.save_file(RAW, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(WeightsMismatchError, match="is cut short: download or copy it again"):
            read_state(tmp_path / name)


def test_an_exported_program_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/data/weights/weight_0", bytes(8))
    with pytest.raises(WeightsMismatchError, match=r"is a torch\.export program"):
        read_state(tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w / 0, "infinite numbers, as of a copy in float16"),
        (lambda w: w.to(torch.complex64), "as complex64: save plain floating-point tensors"),
        (lambda w: w.to(torch.int32), "as int32: save plain floating-point tensors"),
        (lambda w: w.to(torch.float8_e4m3fnuz), "quantised to eight bits"),
    ],
)
def test_numbers_that_no_network_has_are_said(tmp_path, change, said):
    torch.save({"a.weight": change(torch.ones(3))}, tmp_path / "a.pth")
    with pytest.raises(WeightsMismatchError, match=f"a.pth holds a.weight .*{said}"):
        read_state(tmp_path / "a.pth")


def test_more_bytes_than_a_header_tells_are_not_fewer(tmp_path):
    safetensors.torch.save_file({"a.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for data, said in ((whole + bytes(24), "has 24 bytes after its tensors"), (whole[:-4], "is cut short")):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(WeightsMismatchError, match=said):
            read_state(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.replace(b"\n", b"\r\n"), "is damaged: bytes were lost or added before its end"),
        (lambda data: data[:100] + data[-400:], "is damaged: bytes were lost or added before its end"),
        (lambda data: data[400:], "cannot be read as weights"),
    ],
)
def test_a_zip_with_bytes_lost_or_added_in_its_middle_is_damaged(tmp_path, change, said):
    torch.save(RAW | {"lines": torch.full((64,), 10, dtype=torch.uint8)}, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(change((tmp_path / "a.pth").read_bytes()))
    assert not mentions(tmp_path / "a.pth", "weight")
    with pytest.raises(WeightsMismatchError, match=f"a.pth {said}"):
        read_state(tmp_path / "a.pth")


def kind_of(module: str, name: str, base: type, monkeypatch) -> type:
    """A class as of another package, which the reader must not need."""
    monkeypatch.setitem(sys.modules, module, made := types.ModuleType(module))
    made.__dict__[name] = type(name, (base,), {"__module__": module})
    return made.__dict__[name]


def test_dicts_and_lists_of_other_kinds_may_lie_beside_weights_or_hold_them(tmp_path, monkeypatch):
    class_names = [("easydict", "EasyDict"), ("yacs_config", "CfgNode"), ("mmengine_config", "ConfigDict")]
    kinds = [kind_of(module, name, dict, monkeypatch) for module, name in class_names]
    filled = [kind(lr=0.1, inner=kind(steps=[1, 2])) for kind in kinds]
    for record in filled:
        record.__dict__["frozen"] = True
    history = collections.defaultdict(list, loss=[1.0])
    beside = [*filled, history, collections.deque([1, 2], maxlen=9), {"type": int, "of": [str, dict]}]
    for zipped in (True, False):
        for record in beside:
            stored = {"model": RAW, "epoch": record}
            torch.save(stored, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
            assert read_state(tmp_path / "a.pth").keys() == RAW.keys(), record
    torch.save(collections.defaultdict(None, RAW), tmp_path / "a.pth")
    assert torch.equal(read_state(tmp_path / "a.pth")["a.weight"], RAW["a.weight"])


def test_a_shard_alone_is_told_from_a_wrong_network(tmp_path):
    safetensors.torch.save_file(RAW, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsMismatchError, match="is one of several shards, whose index .* is missing: download all"):
        read_state(tmp_path / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file(RAW, tmp_path / "model-00001-of-00001.safetensors")
    assert read_state(tmp_path / "model-00001-of-00001.safetensors").keys() == RAW.keys()


def test_names_of_python_2_are_those_that_torch_compares():
    named = {"copy_reg._reconstructor": "copyreg._reconstructor", "__builtin__.long": "builtins.int"}
    named |= {"__builtin__.set": "builtins.set", "collections.deque": "collections.deque"}
    assert {name: _modern(name) for name in named} == named


def test_a_joint_tensor_has_three_parts_or_is_left_for_the_comparison_of_shapes():
    queries, keys, values = thirds(torch.arange(6.0).reshape(6, 1))
    assert [part.flatten().tolist() for part in (queries, keys, values)] == [[0, 1], [2, 3], [4, 5]]
    for odd in (torch.tensor(1.0), torch.zeros(4, 2)):
        assert [part.shape for part in thirds(odd)] == [odd.shape] * 3


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_zip_that_unpacks_to_far_more_than_its_size_is_refused_before_it_does(tmp_path, part, monkeypatch):
    torch.save({"a.weight": torch.rand(64, 64)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for info in whole.infolist():
            bomb.writestr(info.filename, whole.read(info) + bytes(1 << 23) * info.filename.endswith(part))
    monkeypatch.setattr("distill.core.standins._UNSUSPECTED", 1 << 20)
    assert read_state(tmp_path / "w.pth")["a.weight"].shape == (64, 64)
    with pytest.raises(WeightsMismatchError, match=r"b.pth has \d+ bytes that unpack to \d+, .* a decompression bomb"):
        read_state(tmp_path / "b.pth")
    assert not mentions(tmp_path / "b.pth", "a")


def test_a_tensor_that_repeats_one_number_is_refused_before_it_is_copied(tmp_path):
    torch.save({"a.weight": torch.ones(1).expand(1 << 17, 1 << 17)}, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatchError, match=r"holds a.weight \(131072, 131072\), which repeats few stored"):
        read_state(tmp_path / "w.pth")
    torch.save({"a.weight": torch.ones(1).expand(8, 8)}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth")["a.weight"].shape == (8, 8)
