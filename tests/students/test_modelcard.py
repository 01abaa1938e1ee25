"""The card's paragraph for people without this package does what it says."""

from __future__ import annotations

import re

import pytest
import torch

from distill import students
from distill.core.depth import Kind
from distill.students import checkpoint
from distill.students.modelcard import model_card
from tests.students.tiny import tiny


@pytest.mark.parametrize("cut", [False, True])
def test_the_lines_of_the_card_build_the_encoder_without_us(tmp_path, monkeypatch, cut):
    student = tiny("dpt")
    if cut:
        options = {"blocks": [0, 1, 3], "indices": [0, 1, 1, 2], "pos_grid": 3, "final_norm": True}
        options["timm_options"] = {"depth": 4, "embed_dim": 32, "patch_size": 16}
        decoder = {"channels": 16, "post_process_channels": [8, 8, 16, 16]}
        student = students.build(
            encoder="test_vit", decoder="dpt", encoder_options=options, decoder_options=decoder, native_size=64
        )
    checkpoint.save(student.eval(), tmp_path / "s", card={"name": "x"})
    page = (tmp_path / "s" / "README.md").read_text()
    (code,) = re.findall(r"## Without this package\n\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path / "s")
    scope: dict = {}
    exec(code, scope)
    images = torch.rand(1, 3, 64, 48)
    normal = (images - student.encoder.mean) / student.encoder.std
    blocks = sorted(set(student.encoder.options["indices"]))
    theirs = (
        scope["vit"]
        .eval()
        .forward_intermediates(normal, indices=blocks, norm=student.encoder.final_norm, intermediates_only=True)
    )
    ours = dict(zip(blocks, theirs, strict=True))
    for block, (patches, _) in zip(student.encoder.options["indices"], student.encoder(images), strict=True):
        assert torch.allclose(ours[block], patches, atol=1e-5)


def test_a_card_of_four_bits_says_how_they_are_stored(tmp_path):
    student = tiny("dpt")
    student.encoder.options |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    checkpoint.save(student, tmp_path / "s", card={"name": "x"}, bits=4)
    page = (tmp_path / "s" / "README.md").read_text()
    assert "groups of 64" in page and "load_file" in page
    assert "subtract the mean [0.1, 0.2, 0.3] and divide by [0.4, 0.5, 0.6]" in page
    assert "(dpt; `decoder.*` in the file, by the names of AnyDepth's DPTHead, which is DINOv3's;" in page


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", "license: apache-2.0\ntags:"),
        ("CC-BY-NC-4.0", "license: other\nlicense_name: see-card\ntags:"),
        (None, "license: other\nlicense_name: see-card\ntags:"),
    ],
)
def test_a_hub_is_told_apache_of_nothing_else(licence, said):
    assert f"---\nlibrary_name: depth-distill\npipeline_tag: depth-estimation\n{said}" in model_card(
        "x", {"licence": licence} if licence else {}
    )


def test_a_canonical_students_card_says_what_to_multiply():
    page = model_card("x", {}, kind=Kind.METRIC_DEPTH, canonical_focal=300.0)
    assert "Camera: the network's output is depth in metres for a focal length of 300 pixels" in page
    assert "metres = output * focal / 300," in page and ')("photo.jpg", fov=60).numpy()' in page
    assert "It predicts depth in metres, larger is farther." in page and "Camera:" not in model_card("x", {})


def test_the_tables_of_a_card_are_for_people():
    card = {
        "name": "x",
        "training": {"step": 100, "averaged": False, "settings": {"steps": 100}},
        "made_by": ["a", "b"],
        "teachers": {"t": {"licence": "MIT", "stored": ["affine_disparity"], "fit": {"scale": 2.0}}},
        "recipe": {"train": {"steps": 100}},
    }
    page, _, recipe = model_card("x", card).partition("## Training recipe")
    assert "| training | step: 100; averaged: false |" in page and "| made_by | a, b |" in page
    assert "| t | licence: MIT; stored: affine_disparity; fit: (scale: 2.0) |" in page
    assert '"' not in page.partition("## Lineage")[2] and '"steps": 100' in recipe


def test_numbers_of_a_card_have_six_digits():
    page = model_card("s", {"training": {"heldout_loss": 1.1454723477363586, "step": 1234567}})
    assert "heldout_loss: 1.14547;" in page
    assert "1234567" in page and "1.14547234" not in page
