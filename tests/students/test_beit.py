"""A BEiT of any size: on its own grid timm's, elsewhere MiDaS's formula for its table of relative positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill import students
from distill.students import checkpoint, to_transformers
from distill.students.beit import _bias_on, relative_index, resized
from distill.students.encoder import Encoder

TINY = {"timm_options": {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 64}}


def beit(**given) -> Encoder:
    torch.manual_seed(0)
    made = Encoder("beit_large_patch16_512", **TINY, **given)
    for block in made.backbone.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    return made.eval()


def test_on_its_own_grid_it_is_timms():
    encoder = beit()
    attention = encoder.backbone.blocks[0].attn
    assert torch.equal(relative_index(4, 4), attention.relative_position_index)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        mine = encoder(image)
        for block in encoder.backbone.blocks:
            del block.attn._get_rel_pos_bias  # timm's own again
        for ours, theirs in zip(mine, encoder(image), strict=True):
            torch.testing.assert_close(ours[0], theirs[0])


def test_elsewhere_the_table_is_resized_as_midas_does_it():
    encoder = beit()
    seen = encoder(torch.rand(2, 3, 96, 48))
    assert [tuple(patches.shape) for patches, _ in seen] == [(2, 32, 6, 3)] * 4
    attention = encoder.backbone.blocks[1].attn
    table = attention.relative_position_bias_table
    pairs = F.interpolate(table[:49].T.reshape(1, 2, 7, 7), size=(11, 5), mode="bilinear")[0]
    bias = attention._get_rel_pos_bias()[0]
    for first, second in ((0, 17), (5, 4), (16, 2)):
        (y1, x1), (y2, x2) = divmod(first, 3), divmod(second, 3)
        torch.testing.assert_close(bias[:, 1 + first, 1 + second], pairs[:, y1 - y2 + 5, x1 - x2 + 2])
    assert torch.equal(bias[:, 0, 3], table[-3]) and torch.equal(bias[:, 3, 0], table[-2])
    assert torch.equal(bias[:, 0, 0], table[-1]) and resized(table, (4, 4), (4, 4)) is table


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_the_index_is_copied_to_a_device_once():
    table = torch.empty(52, 2, device="meta")
    attention = SimpleNamespace(relative_position_bias_table=table, window_size=(4, 4))
    copies = []
    for _ in range(2):
        with Copies() as mode:
            _bias_on(attention, grid=[4, 4])
        copies.append(mode.count)
    assert copies == [1, 0]


def test_a_grid_that_was_first_seen_in_inference_can_be_learnt_on():
    encoder, image = beit(), torch.rand(1, 3, 80, 48)
    with torch.inference_mode():
        encoder(image)
    encoder(image)[3][0].sum().backward()
    assert encoder.backbone.blocks[0].attn.relative_position_bias_table.grad.isfinite().all()


def test_midas_own_file_gives_the_encoder(tmp_path):
    state = {f"pretrained.model.{key}": value for key, value in beit().backbone.state_dict().items()}
    state["pretrained.model.blocks.0.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    state["pretrained.model.fc_norm.weight"] = state["pretrained.model.head.bias"] = torch.ones(32)
    state["scratch.layer1_rn.weight"] = state["pretrained.act_postprocess1.3.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "dpt_beit_large_512.pt")
    loaded = Encoder("beit_large_patch16_512", weights=tmp_path / "dpt_beit_large_512.pt", **TINY)
    assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in beit().backbone.state_dict().items())


def test_a_student_on_it_learns():
    options = {"channels": 8, "post_process_channels": [8, 8, 8, 8], "norm": "none"}
    student = students.build(
        encoder="beit_large_patch16_512", decoder="dpt", encoder_options=TINY, decoder_options=options
    )
    assert student(torch.rand(1, 3, 40, 72)).shape == (1, 40, 72)
    student(torch.rand(1, 3, 64, 64)).sum().backward()
    without = [n for n, p in student.named_parameters() if p.grad is None]
    assert not without, without
    with pytest.raises(LookupError, match="no encoder 'beit_larg_patch16'"):
        Encoder("beit_larg_patch16")


class Side(int):
    """A side as a tracer has it: whoever compares or hashes it ties the graph to the example's size."""

    def __eq__(self, other):
        raise AssertionError("compared")

    def __hash__(self):
        raise AssertionError("hashed")


def test_a_tracer_keeps_the_sides_free(monkeypatch):
    attention = beit().backbone.blocks[0].attn
    grids = ((2, 7), (4, 4))
    expected = [_bias_on(attention, grid=list(grid)) for grid in grids]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for grid, bias in zip(grids, expected, strict=True):
        torch.testing.assert_close(_bias_on(attention, grid=[Side(n) for n in grid]), bias)


def midas_student() -> students.Student:
    return students.build(
        encoder="beit_large_patch16_512",
        decoder="midas",
        encoder_options=TINY,
        decoder_options={"channels": 8, "post_process_channels": [8, 8, 8, 8]},
    )


def test_its_card_does_not_say_that_timm_alone_opens_it(tmp_path):
    folder = checkpoint.save(midas_student(), tmp_path / "student", card={"name": "a BEiT"})
    assert "timm.create_model" not in (folder / "README.md").read_text()


def test_a_beit_is_refused_where_transformers_would_open_it(tmp_path):
    pytest.importorskip("transformers")
    student = midas_student()
    with pytest.raises(ValueError, match="BEiT alone takes images of one size"):
        to_transformers.write(student, tmp_path)
