"""Rotary embeddings that are remembered are timm's, and can be learnt through whoever asked first."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import RotaryEmbeddingDinoV3

from distill import students

SMALL = {"timm_options": {"depth": 1, "embed_dim": 32, "num_heads": 2}}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return students.build(encoder="dinov3_vits16", decoder="sdt_fast", encoder_options=SMALL)


def test_they_are_timms_and_computed_once_for_a_grid(student, monkeypatch):
    rope, asked, compute = student.encoder.backbone.rope, [], RotaryEmbeddingDinoV3.get_embed

    def counted(self, shape=None, **how):
        asked.append(tuple(shape))
        return compute(self, shape, **how)

    monkeypatch.setattr(RotaryEmbeddingDinoV3, "get_embed", counted)
    for shape in ([2, 3], [3, 2], [2, 3]):
        assert torch.equal(rope.get_embed(shape), compute(rope, shape))
    assert asked == [(2, 3), (3, 2)]
    rope.periods.mul_(2.0)  # as weights that are loaded would
    assert torch.equal(rope.get_embed([2, 3]), compute(rope, [2, 3])) and len(asked) == 3


def test_inference_first_and_training_after(student):
    """What inference mode made cannot be learnt through."""
    image = torch.rand(1, 3, 32, 48)
    student.eval()
    with torch.inference_mode():
        before = student(image)
    for one in (student, copy.deepcopy(student)):
        after = one(image)
        after.sum().backward()
        torch.testing.assert_close(after, before)


def test_an_embedding_that_is_drawn_is_drawn_anew(student):
    rope = student.encoder.backbone.rope
    rope.shift_coords, rope.aug_active = 0.5, True
    torch.manual_seed(0)
    first, second = rope.train().get_embed([2, 3]), rope.get_embed([2, 3])
    assert not torch.equal(first, second)
    assert torch.equal(rope.eval().get_embed([2, 3]), rope.get_embed([2, 3]))
