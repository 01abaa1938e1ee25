"""The authors' own MiDaS files: read by their names, and run as timm's BEiT and MiDaS's decoder run them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from distill.teachers import WeightsMismatchError, midas

WIDTH, NECK, FUSION = 32, (8, 8, 16, 16), 16


def authors_file(path):
    """A tiny file under the authors' names, its backbone and its tensors."""
    torch.manual_seed(0)
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "num_classes": 0}
    beit = Beit(img_size=64, patch_size=16, depth=4, embed_dim=WIDTH, num_heads=2, mlp_ratio=2, **options).eval()
    shapes = {}
    for i, width in enumerate(NECK, 1):
        post, unit = f"pretrained.act_postprocess{i}", f"scratch.refinenet{i}"
        shapes |= {f"{post}.0.project.0.weight": (WIDTH, 2 * WIDTH), f"{post}.0.project.0.bias": (WIDTH,)}
        shapes |= {f"{post}.3.weight": (width, WIDTH, 1, 1), f"{post}.3.bias": (width,)}
        if side := {1: 4, 2: 2, 4: 3}.get(i):
            shapes |= {f"{post}.4.weight": (width, width, side, side), f"{post}.4.bias": (width,)}
        shapes |= {f"scratch.layer{i}_rn.weight": (FUSION, width, 3, 3), f"{unit}.out_conv.bias": (FUSION,)}
        shapes |= {f"{unit}.out_conv.weight": (FUSION, FUSION, 1, 1)}
        for conv in ("resConfUnit1.conv1", "resConfUnit1.conv2", "resConfUnit2.conv1", "resConfUnit2.conv2"):
            shapes |= {f"{unit}.{conv}.weight": (FUSION, FUSION, 3, 3), f"{unit}.{conv}.bias": (FUSION,)}
    for i, (out, into, side) in {0: (8, 16, 3), 2: (32, 8, 3), 4: (1, 32, 1)}.items():
        shapes |= {f"scratch.output_conv.{i}.weight": (out, into, side, side), f"scratch.output_conv.{i}.bias": (out,)}
    for parameter in beit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"pretrained.model.{key}": value for key, value in beit.state_dict().items()}
    state["pretrained.model.blocks.0.attn.relative_position_index"] = torch.zeros(17, 17)  # older files carry it
    state |= {key: 0.2 * torch.randn(shape) for key, shape in shapes.items()}
    torch.save({"optimizer": {}, "model": state}, path)
    return beit, state


def decoded(state, tokens, grid):
    """MiDaS's decoder on the tokens of its four hooks, each (B,1+N,D), written down from midas/blocks.py and vit.py."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def unit(x, name):
        return conv(conv(x.relu(), f"{name}.conv1", padding=1).relu(), f"{name}.conv2", padding=1) + x

    def larger(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    levels = []
    for i, one in enumerate(tokens, 1):
        post = f"pretrained.act_postprocess{i}"
        joined = torch.cat([one[:, 1:], one[:, :1].expand_as(one[:, 1:])], -1)
        read = F.gelu(F.linear(joined, state[f"{post}.0.project.0.weight"], state[f"{post}.0.project.0.bias"]))
        x = conv(read.transpose(1, 2).unflatten(2, grid), f"{post}.3")
        if i < 3:
            x = F.conv_transpose2d(x, state[f"{post}.4.weight"], state[f"{post}.4.bias"], stride=8 // 2**i)
        elif i == 4:
            x = conv(x, f"{post}.4", stride=2, padding=1)
        levels.append(conv(x, f"scratch.layer{i}_rn", padding=1))
    path = None
    for i in (4, 3, 2, 1):
        name, level = f"scratch.refinenet{i}", levels[i - 1]
        path = level if path is None else path + unit(level, f"{name}.resConfUnit1")
        size = levels[i - 2].shape[-2:] if i > 1 else [2 * side for side in level.shape[-2:]]
        path = conv(larger(unit(path, f"{name}.resConfUnit2"), size), f"{name}.out_conv")
    x = conv(path, "scratch.output_conv.0", padding=1)
    x = conv(larger(x, [2 * side for side in x.shape[-2:]]), "scratch.output_conv.2", padding=1).relu()
    return conv(x, "scratch.output_conv.4").relu()[:, 0]


@torch.no_grad()
def test_an_authors_file_is_the_network_that_they_run(tmp_path):
    beit, state = authors_file(tmp_path / "dpt_beit_tiny.pt")
    teacher = midas.Teacher.load(str(tmp_path / "dpt_beit_tiny.pt"), resize="none")
    assert teacher.card.native_size == 64
    images = torch.rand(2, 3, 64, 64)
    x = beit.patch_embed((images - 0.5) / 0.5)
    x, tokens = torch.cat([beit.cls_token.expand(2, -1, -1), x], 1), []
    for block in beit.blocks:
        tokens.append(x := block(x))
    want = decoded(state, tokens, (4, 4))
    got = teacher.predict(images)
    assert want.std() > 1 and torch.allclose(got.values, want, rtol=1e-4, atol=1e-3)


def test_what_is_no_beit_of_midas_is_told(tmp_path):
    _, state = authors_file(tmp_path / "whole.pt")
    for name, kept in (("hybrid", "scratch"), ("part", "pretrained.model")):
        path = tmp_path / f"{name}.pt"
        torch.save({key: value for key, value in state.items() if key.startswith(kept)}, path)
        with pytest.raises(WeightsMismatchError, match=rf"{name}.pt lacks pretrained.*MiDaS"):
            midas.Teacher.load(str(path))


def test_an_authors_file_in_a_folder_and_inside_a_trainers_file(tmp_path):
    _, state = authors_file(tmp_path / "dpt_beit_tiny.pt")
    whole = midas.Teacher.load(str(tmp_path / "dpt_beit_tiny.pt"))
    assert midas.Teacher.load(str(tmp_path)).card.revision == whole.card.revision
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "epoch.ckpt")
    wrapped = midas.Teacher.load(str(tmp_path / "epoch.ckpt"))
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(whole.predict(image).values, wrapped.predict(image).values)


@pytest.mark.parametrize(
    "key", ["pretrained.model.blocks.0.attn.qkv.weight", "pretrained.model.cls_token", "scratch.layer1_rn.weight"]
)
def test_a_tensor_of_other_dimensions_is_refused_by_name(tmp_path, key):
    _, state = authors_file(tmp_path / "dpt_beit_large_512.pt")
    for odd in (state[key].flatten()[0].clone(), state[key][None].clone(), state[key][:1].flatten().clone()):
        torch.save(state | {key: odd}, tmp_path / "dpt_beit_large_512.pt")
        with pytest.raises(WeightsMismatchError, match=r"dpt_beit_large_512.pt.* another shape for "):
            midas.Teacher.load(str(tmp_path / "dpt_beit_large_512.pt"))
