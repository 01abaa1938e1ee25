"""Weights of teachers: every parameter is claimed, and what is wrong is one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distill import teachers
from distill.core import hub
from distill.core.plugins import find
from distill.teachers import (
    WeightsMismatchError,
    WeightsMissingError,
    depth_anything_v2,
    marigold,
)
from tests.teachers.asking import NETWORKS, one_line


def test_a_revision_is_read_from_the_hubs_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    card = marigold.CARDS[0]
    assert teachers.cached_revision(card.weights) == ""
    commit = "c" * 40
    folder = tmp_path / "models--prs-eth--marigold-depth-v1-1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    assert teachers.cached_revision(card.weights) == "", "named, but not here"
    (folder / "snapshots" / commit).mkdir(parents=True)
    assert teachers.cached_revision(card.weights) == commit


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weights", ["no_such_folder", "nobody/no-such-model", "some/where/model.safetensors"])
def test_missing_weights_are_one_line(name, weights):
    with pytest.raises(OSError, match=re.escape(weights)) as error:
        find("distill.teachers", name).Teacher.load(weights)
    one_line(error)


def weights_files(folder, name):
    """Those that this teacher's own code reads: VAE and text encoder are read for all by what marigold shows."""
    files = sorted(folder.rglob("*.safetensors"))
    shared = () if name == "marigold" else ("vae", "text_encoder")
    return [file for file in files if file.parent.name not in shared]


@pytest.mark.parametrize("name", [*NETWORKS, "genpercept_head"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "short"])
def test_every_parameter_is_claimed(made, copy, name, fault):
    """Silently random weights are the worst failure: each file in turn loses, gains or misshapes one tensor."""
    plugin = find("distill.teachers", name.removesuffix("_head"))
    for file in weights_files(copy(name), name):
        intact = file.read_bytes()
        state = stored(file)
        key = sorted(state)[len(state) // 2]
        if fault == "missing":
            del state[key]
        elif fault == "extra":
            state["left_over.weight"], key = torch.zeros(2, 2), "left_over.weight"
        elif fault == "shape":
            state[key] = torch.zeros(5, 3)
        if fault == "short":
            file.write_bytes(intact[: len(intact) // 2])
        else:
            safetensors.torch.save_file(state, file, metadata={"format": "pt"})
        with pytest.raises((ValueError, OSError)) as error:
            plugin.Teacher.load(str(tiny_root(file, name)))
        text = one_line(error)
        assert file.name in text or file.parent.name in text
        if fault in ("missing", "extra") and name not in ("checkpoint", "midas"):  # transformers renames BEiT's
            assert key.removeprefix("model.").removeprefix("text_model.") in text
        if fault == "shape" and name in ("depth_anything_v2", "depth_pro", "midas"):
            assert "(5, 3), not (" in text
        file.write_bytes(intact)


def tiny_root(file, name):
    parts = {"unet", "vae", "text_encoder", "dpt_head_identity"}
    return file.parent.parent if file.parent.name in parts else file.parent


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("depth_anything_3", "model.backbone.pretrained.pos_embed"),
        ("moge", "encoder.backbone.pos_embed"),
        ("genpercept_head", "neck.convs.0.weight"),
    ],
)
def test_a_tensor_that_gives_a_size_has_its_dimensions(copy, name, key):
    """As converters flatten or squeeze tensors: reading a size from them would be an IndexError."""
    plugin, root = find("distill.teachers", name.removesuffix("_head")), copy(name)
    files = [file for file in sorted(root.rglob("*")) if file.suffix in (".safetensors", ".pt")]
    file = next(file for file in files if key in stored(file))
    for change in (torch.flatten, lambda tensor: tensor.flatten()[0], lambda tensor: tensor[:, :0]):
        state = stored(file)
        odd = change(state[key]).clone()
        if file.suffix == ".pt":
            torch.save(torch.load(file, weights_only=True) | {"model": state | {key: odd}}, file)
        else:
            safetensors.torch.save_file(state | {key: odd}, file)
        with pytest.raises(
            WeightsMismatchError, match=rf"{file.name}.* {re.escape(key.removeprefix('model.'))}"
        ) as error:
            plugin.Teacher.load(str(tiny_root(file, name)))
        assert str(tuple(odd.shape)) in one_line(error) or "empty" in str(error.value)
        if file.suffix == ".pt":
            torch.save(torch.load(file, weights_only=True) | {"model": state}, file)
        else:
            safetensors.torch.save_file(state, file)


def stored(file):
    """The tensors of a file, none of them mapped into memory: the file is written again."""
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True)["model"]
    return safetensors.torch.load(file.read_bytes())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_only_stands_where_weights_should(made, copy, name):
    """A clone without git-lfs, and the page of a login: both are small files under the right name."""
    if name == "checkpoint":
        return  # its folder names the digest of its file
    plugin = find("distill.teachers", name)
    for file in weights_files(copy(name), name):
        intact = file.read_bytes()
        for content, words in (
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "git lfs pull"),
            (b"<!doctype html><html>Access to this model is restricted</html>", "is a web page"),
        ):
            file.write_bytes(content)
            with pytest.raises(teachers.WeightsMismatchError, match=words) as error:
                plugin.Teacher.load(str(tiny_root(file, name)))
            assert file.name in one_line(error)
        file.write_bytes(intact)


def test_half_a_torch_file_and_several_files(tmp_path):
    file = tmp_path / "depth_anything_v2_vits.pth"
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 384), "x": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    for content, fault in (
        (whole[: len(whole) // 2], "is cut short: download or copy it again"),
        (b"", "cannot be read as weights"),
        (b"no weights at all", "cannot be read as weights"),
    ):
        file.write_bytes(content)
        with pytest.raises(teachers.WeightsMismatchError, match=f"vits.pth {fault}") as error:
            depth_anything_v2.Teacher.load(str(tmp_path))
        assert "weights_only" not in one_line(error)
    (tmp_path / "depth_anything_v2_vitl.pth").touch()
    with pytest.raises(
        teachers.WeightsMismatchError, match="holds .*vitl.pth, .*vits.pth: give the path of one"
    ) as error:
        depth_anything_v2.Teacher.load(str(tmp_path))
    one_line(error)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"pretrained.cls_token": Trap()}, tmp_path / "model.pth")
    with pytest.raises(teachers.WeightsMismatchError, match="model.pth") as error:
        depth_anything_v2.Teacher.load(str(tmp_path / "model.pth"))
    one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_gated_weights_say_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        teachers.WeightsMissingError, match="org/model.*gated: accept the licence.*hf auth login"
    ) as error:
        marigold.Teacher.load("org/model")
    one_line(error)


def test_a_hub_id_may_name_a_file_and_a_revision(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "model.safetensors").touch()

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = teachers.resolve("org/name/large/model.safetensors@abc", files=("*.json",))
    assert found == tmp_path / "large" / "model.safetensors"
    assert asked == [("org/name", "abc", "large/model.safetensors")]
    with pytest.raises(teachers.WeightsMissingError, match="org/name has no small/model.safetensors"):
        teachers.resolve("org/name/small/model.safetensors", files=())


@pytest.mark.parametrize("place", ["tree/main/small", "resolve/main/small/model.safetensors?download=true"])
def test_the_address_of_a_page_is_a_hub_id(monkeypatch, tmp_path, place):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/model.safetensors").write_bytes(b"")
    asked = []

    def download(repository, *, files, revision):
        asked.append((repository, revision))
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    found = teachers.resolve(f"https://huggingface.co/org/name/{place}", files=("*",))
    assert found.is_relative_to(tmp_path / "small") and asked == [("org/name", "main")]


def test_a_folder_of_the_hubs_cache_is_its_snapshot_and_a_link_to_nothing_is_said(tmp_path):
    """As PozzettiAndrea/ComfyUI-TRELLIS2#71 and huggingface/huggingface_hub#4550 have them."""
    snapshot = tmp_path / "models--org--name/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    assert teachers.resolve(tmp_path / "models--org--name", files=()) == snapshot
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(WeightsMissingError, match=r"model.safetensors is a link to nothing, .*: download it again"):
        teachers.find_weights(snapshot, ("*.safetensors",))


def test_a_metric_checkpoint_is_known_by_the_errors_that_its_trainer_stored(tmp_path):
    """As Depth Anything V2's metric_depth/train.py writes it: the names and shapes are the relative ones'."""
    best = dict.fromkeys(("d1", "abs_rel", "silog"), 0.1)
    torch.save({"model": {"module.a": torch.zeros(1)}, "epoch": 1, "previous_best": best}, tmp_path / "latest.pth")
    with pytest.raises(ValueError, match=r"latest.pth is a metric checkpoint by .*: give max_depth"):
        depth_anything_v2.Teacher.load(str(tmp_path / "latest.pth"))
    with pytest.raises(WeightsMismatchError, match="is not a Depth Anything V2 checkpoint"):
        depth_anything_v2.Teacher.load(str(tmp_path / "latest.pth"), max_depth=20.0)


def test_the_first_depth_anything_is_known_by_its_folder(tmp_path):
    """As LiheYoung/Depth-Anything#19 lays it: its tensors have V2's names and shapes, and mean others."""
    folder = tmp_path / "checkpoints/depth_anything_vitl14"
    folder.mkdir(parents=True)
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 4)}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsMismatchError, match="pytorch_model.bin is Depth Anything V1 by its name"):
        depth_anything_v2.Teacher.load(str(folder / "pytorch_model.bin"))
    other = folder.rename(tmp_path / "v1")
    (other / "config.json").write_text('{"encoder": "vitl", "features": 256, "out_channels": [256, 512, 1024, 1024]}')
    with pytest.raises(WeightsMismatchError, match="v1 is Depth Anything V1 by its name or config.json"):
        depth_anything_v2.Teacher.load(str(other))


def test_cards_are_recognised_by_name():
    cards = depth_anything_v2.CARDS
    small = "depth-anything/Depth-Anything-V2-Small"
    assert teachers.card_for(cards, small).commercial
    assert teachers.card_for(cards, f"/weights/{small.partition('/')[2]}/a.pth").licence == "Apache-2.0"
    assert teachers.card_for(cards, f"/hub/models--{small.replace('/', '--')}/snapshots/x").licence == "Apache-2.0"
    assert teachers.card_for(cards, f"{small}@abc").weights == f"{small}@abc"
    unknown = teachers.card_for(cards, "/weights/model.safetensors")
    assert unknown.licence == "unknown" and not unknown.commercial


def test_revisions(tmp_path):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.pth").write_bytes(b"1")
    assert teachers.revision_of(snapshot) == teachers.revision_of(snapshot / "a.pth") == "a" * 40
    file = tmp_path / "a.pth"
    file.write_bytes(b"1")
    first = teachers.revision_of(file)
    file.write_bytes(b"2")
    assert first.startswith("sha256:") and teachers.revision_of(file) != first


def test_a_name_that_is_neither_a_file_nor_on_the_hub_says_where_ids_are_listed():
    with pytest.raises(WeightsMissingError, match="'midas_v21_small': .* which `distill list teachers` has"):
        teachers.resolve("midas_v21_small", files=["x"])
