"""VGGT as an encoder, and its head and Depth Anything 3's as a decoder, against the published code."""

from __future__ import annotations

import pytest
import torch

from distill import students
from distill.students.decoders.dual_dpt import Decoder
from distill.students.encoder import Encoder
from tests.golden import weights_rule

TINY = {"timm_options": {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 70}}
HEAD = {"channels": 16, "post_process_channels": [8, 8, 16, 16]}


def synth(facts):
    shapes = {key: tuple(entry[0]) for key, entry in facts["state_dict"].items()}
    return {k: torch.from_numpy(v) for k, v in weights_rule.synth_state(shapes, facts["seed"], ()).items()}


def test_a_view_is_what_the_authors_aggregator_and_head_make_of_it(golden, tmp_path):
    facts, data = golden("vggt_tiny")
    state = synth(facts)
    torch.save(state, tmp_path / "model.pt")
    student = students.build(
        encoder="vggt",
        decoder="dual_dpt",
        encoder_options=TINY | {"weights": str(tmp_path / "model.pt"), "indices": [0, 1, 2, 3]},
        decoder_options=HEAD | {"rectified_skip": True},
    ).eval()
    student.decoder.load_released(state)
    assert student.encoder.channels == 64 and student.decoder.options["in_channels"] == [64] * 4
    for i, run in enumerate(facts["runs"]):
        images = torch.from_numpy(data[f"image{i}"])
        with torch.no_grad():
            seen, raw = student.encoder(images), student(images)
        for j, (patches, camera) in enumerate(seen):
            want = torch.from_numpy(data[f"tokens{i}_{j}"])
            assert (patches.flatten(2).mT - want[:, 5:]).abs().max() <= run["tolerance"]["tokens"][j]
            assert (camera - want[:, 0]).abs().max() <= run["tolerance"]["tokens"][j]
        assert (raw + torch.from_numpy(data[f"depth{i}"]).log()).abs().max() <= run["tolerance"]["log_depth"]


def test_dual_dpt_is_the_depth_branch_of_the_released_head(golden):
    facts, data = golden("dual_dpt_tiny")
    decoder = Decoder(32, **HEAD).eval()
    decoder.load_released({f"model.head.{key}": value for key, value in synth(facts).items()})
    features = [torch.from_numpy(data[f"feature{i}"]) for i in range(4)]
    with torch.no_grad():
        raw = decoder(features)[:, 0]
    assert (raw + torch.from_numpy(data["depth"]).log()).abs().max() <= facts["tolerance"]["log_depth"]


def test_it_learns_and_is_told_what_it_is_not(tmp_path):
    encoder = Encoder("vggt", timm_options={"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 28})
    sum(patches.sum() + camera.sum() for patches, camera in encoder(torch.rand(1, 3, 30, 40))).backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert not without, without
    torch.save({"aggregator.camera_token": torch.zeros(1, 2, 1, 32)}, tmp_path / "part.pt")
    for options, words in (
        ({"weights": str(tmp_path / "part.pt")}, "part.pt: not the weights of VGGT: it lacks register_token"),
        ({"weights": "pretrained"}, "timm has no weights of VGGT"),
        ({"final_norm": True}, "no final norm"),
    ):
        with pytest.raises(ValueError, match=words):
            Encoder("vggt", **TINY, **options)
