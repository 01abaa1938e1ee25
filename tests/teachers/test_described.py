"""Folders of transformers and diffusers are read by the reader of all weights: its tolerance, and its refusals."""

from __future__ import annotations

import argparse
import json
import math
import shutil

import pytest
import safetensors.torch
import torch

from distill.core.plugins import find
from distill.teachers import WeightsMismatchError
from distill.teachers._described import read_described, read_either
from tests.teachers.asking import IMAGES, load

PARTS = {
    "depth_anything_v2": "model.safetensors",
    "midas": "model.safetensors",
    "depth_pro": "model.safetensors",
    "marigold": "unet/diffusion_pytorch_model.safetensors",
    "genpercept": "vae/diffusion_pytorch_model.safetensors",
}


def test_the_weights_that_were_asked_for_are_read_of_a_file_with_several(tmp_path):
    states = {key: {"net.a": torch.full((2,), value)} for key, value in (("model", 1.0), ("ema", 2.0))}
    torch.save(states, tmp_path / "w.pth")
    for asked, value in ((None, 1.0), ("ema", 2.0)):
        _, state, folder = read_either(
            tmp_path / "w.pth", ("*.pth",), anchor="embeddings", authors=("net.a",), weights_key=asked
        )
        assert state["net.a"].tolist() == [value] * 2 and folder is None
        assert read_described(tmp_path / "w.pth", anchors=["net.a"], weights_key=asked)["net.a"].tolist() == [value] * 2


def rewritten(made, folder, name, change):
    """A copy of a teacher's folder, whose weights `change` writes anew: change(tensors, the file that was)."""
    weights = folder / f"{name}-{change.__name__}"
    shutil.copytree(made(name)[0], weights)
    file = weights / PARTS[name]
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    change({key: value.clone() for key, value in tensors.items()}, file)
    return weights


def read(made, name, weights):
    return find("distill.teachers", name).Teacher.load(str(weights), **made(name)[1])


def same(made, name, weights):
    theirs, ours = load(made, name).predict(IMAGES), read(made, name, weights).predict(IMAGES)
    assert ours.kind == theirs.kind
    # The alignment in memory of another file changes the last bits of a diffusion teacher.
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_what_trainers_put_around_a_network_is_taken_off(made, tmp_path, name):
    def lightning(tensors, file):
        safetensors.torch.save_file({f"net.module.{key}": value for key, value in tensors.items()}, file)

    def namespace(tensors, file):
        wrapped = {"state_dict": tensors, "args": argparse.Namespace(lr=1e-4)}
        torch.save(wrapped, file.with_name(file.name.replace("model.safetensors", "model.bin")))

    for change in (lightning, namespace):
        same(made, name, rewritten(made, tmp_path, name, change))


@pytest.mark.parametrize("name", PARTS)
def test_numbers_that_no_map_can_come_from_are_refused(made, tmp_path, name):
    def diverged(tensors, file):
        next(value for key, value in tensors.items() if key.endswith("weight")).view(-1)[0] = math.nan
        safetensors.torch.save_file(tensors, file)

    def eight_bits(tensors, file):
        small = {key: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for key, v in tensors.items()}
        safetensors.torch.save_file(small, file)

    for change, words in ((diverged, "NaN"), (eight_bits, "quantised to eight bits")):
        weights = rewritten(made, tmp_path, name, change)
        with pytest.raises(WeightsMismatchError, match=words) as error:
            read(made, name, weights)
        assert "\n" not in str(error.value) and str(weights) in str(error.value)


@pytest.mark.parametrize("name", ["depth_anything_v2", "midas", "depth_pro"])
def test_one_file_of_transformers_is_read_by_the_config_beside_it(made, copy, name):
    weights = copy(name)
    same(made, name, weights / PARTS[name])
    (weights / "config.json").unlink()
    with pytest.raises(WeightsMismatchError, match=r"no config.json beside it"):
        read(made, name, weights / PARTS[name])


def test_variants_of_a_unet_and_of_a_network(made, tmp_path):
    def bf16(tensors, file):
        safetensors.torch.save_file(tensors, file.with_name(file.name.replace("model.", "model.bf16.")))

    for name in ("depth_anything_v2", "marigold"):
        same(made, name, rewritten(made, tmp_path, name, bf16))


def test_a_quantised_network_and_an_adapter_are_not_read_without_them(made, copy):
    weights = copy("depth_anything_v2")
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeightsMismatchError, match=r"quantised \(gptq\)"):
        read(made, "depth_anything_v2", weights)
    (weights / "config.json").write_text(json.dumps(config))
    (weights / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsMismatchError, match=r"merge it"):
        read(made, "depth_anything_v2", weights)


@pytest.mark.parametrize("name", ["midas", "marigold"])
def test_a_configuration_that_an_editor_stored_anew_is_read(made, copy, name):
    """Notepad puts a mark before UTF-8, or writes UTF-16; the libraries' own readers refuse both as no JSON."""
    folder = copy(name)
    parts = {"config.json", "scheduler_config.json", "model_index.json"}
    for number, file in enumerate(sorted(file for file in folder.rglob("*.json") if file.name in parts)):
        file.write_text(file.read_text(encoding="utf-8"), encoding=("utf-8-sig", "utf-16")[number % 2])
    assert read(made, name, folder).card.kind == load(made, name).card.kind


def test_a_damaged_configuration_or_tokenizer_is_named(made, copy):
    folder = copy("marigold")
    for inside, said in (
        ("tokenizer/vocab.json", r"tokenizer/vocab.json is not readable JSON .*: download it again"),
        ("text_encoder/config.json", r"text_encoder/config.json is not readable JSON .*: download it again"),
        ("scheduler/scheduler_config.json", r"scheduler_config.json is not readable JSON .*: download it again"),
        ("vae/config.json", r"vae/config.json is not readable JSON .*: download it again"),
    ):
        whole = (folder / inside).read_bytes()
        (folder / inside).write_text("<html>")
        with pytest.raises(WeightsMismatchError, match=said) as error:
            read(made, "marigold", folder)
        assert "/tmp" not in str(error.value).replace(str(folder), "")
        (folder / inside).write_bytes(whole)
