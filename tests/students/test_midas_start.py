"""A student that begins as MiDaS: the authors' file is its encoder and its head, and it runs as their code does."""

from __future__ import annotations

import pytest
import torch

from distill import students
from distill.core.weights import read_state
from distill.students.decoders.midas import Decoder
from tests.teachers.test_midas_file import FUSION, NECK, WIDTH, authors_file, decoded

HALF = [0.5, 0.5, 0.5]
SHAPE = {"depth": 4, "embed_dim": WIDTH, "num_heads": 2, "img_size": 64, "mlp_ratio": 2}


@torch.no_grad()
def test_it_begins_where_midas_ended(tmp_path):
    file = tmp_path / "dpt_beit_tiny.pt"
    beit, state = authors_file(file)
    student = students.build(
        encoder="beit_large_patch16_512",
        decoder="midas",
        encoder_options={
            "weights": str(file),
            "indices": [0, 1, 2, 3],
            "mean": HALF,
            "std": HALF,
            "timm_options": SHAPE,
        },
        decoder_options={"channels": FUSION, "post_process_channels": list(NECK)},
    ).eval()
    student.decoder.load_released(read_state(file))
    images = torch.rand(2, 3, 64, 64)
    x = beit.patch_embed((images - 0.5) / 0.5)
    x, tokens = torch.cat([beit.cls_token.expand(2, -1, -1), x], 1), []
    for block in beit.blocks:
        tokens.append(x := block(x))
    want = decoded(state, tokens, (4, 4))
    raw = student(images)
    assert want.std() > 1 and torch.allclose(raw.relu(), want, rtol=1e-4, atol=1e-3)
    assert raw.min() < 0, "the authors' last ReLU is left to the reader of the map"
    assert student(images[:, :, :, :50]).shape == (2, 64, 50)


def test_a_file_of_another_network_is_told(tmp_path):
    _, state = authors_file(tmp_path / "x.pt")
    decoder = Decoder(WIDTH, FUSION, NECK)
    without = {key: value for key, value in state.items() if "act_postprocess2.3" not in key}
    with pytest.raises(ValueError, match=r"lacks reassemble.projects.1.conv.weight"):
        decoder.load_released(without)
    with pytest.raises(ValueError, match="has unknown scratch.stem_transpose"):
        decoder.load_released(state | {"scratch.stem_transpose.weight": torch.ones(1)})
