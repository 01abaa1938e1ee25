"""What cannot be a student is named."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from distill import students
from distill.students import checkpoint
from tests.students.tiny import tiny

IMAGES = torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(1))


def test_options_of_the_wrong_kind_are_named():
    for options, message in [
        ({"decoder_options": {"fusion_channels": "32"}}, "decoder_options.fusion_channels must be a whole number"),
        ({"decoder_options": {"fusion_channels": -4}}, "decoder_options .*-4"),
        ({"encoder_options": {"final_norm": "no"}}, "encoder_options.final_norm must be true or false"),
        ({"encoder_options": {"mean": [0.5]}}, "encoder_options .*0.5"),
        ({"encoder_options": {"indices": 3}}, "encoder_options .*3"),
        ({"native_size": -3}, "native_size must be a positive number"),
        ({"max_depth": 0}, "max_depth must be a positive number of metres, not 0"),
        ({"max_depth": float("inf")}, "max_depth must be a positive number of metres, not inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            students.build(encoder="test_vit", decoder="sdt", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": "dinov3_vits61"}, LookupError, "did you mean dinov3_vits16"),
        ({"encoder": "resnet18"}, LookupError, "resnet18 is not a plain ViT"),
        (
            {"decoder": "dpt1"},
            LookupError,
            r"did you mean dpt\?; available: dav2, dpt, dual_dpt, midas, sdt",
        ),
        ({"encoder_options": {"block": [1]}}, ValueError, "unknown key encoder_options.block; did you mean blocks"),
        ({"decoder_options": {"width": 3}}, ValueError, "unknown key decoder_options.width"),
        ({"encoder_options": {"timm_options": {"checkpoint_path": "x"}}}, ValueError, "may not hold checkpoint_path"),
        ({"encoder_options": {"timm_options": {"wings": 2}}}, ValueError, "test_vit does not take these options"),
        ({"encoder": "dinov3_vits16", "encoder_options": {"pos_grid": 8}}, ValueError, "no position table"),
        ({"decoder": "dpt", "decoder_options": {"readout": "add"}}, ValueError, "readout must be"),
        ({"decoder_options": {"in_channels": [64, 64]}}, ValueError, "a positive number or four of them"),
    ],
)
def test_bad_names_and_options(options, error, message):
    with pytest.raises(error, match=message):
        students.build(**({"encoder": "test_vit", "decoder": "sdt"} | options))


def test_bad_images_are_refused():
    student = tiny("sdt")
    for images in (torch.rand(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.rand(3, 32, 32)):
        with pytest.raises(ValueError, match=r"images must be \(B,3,H,W\) float in \[0,1\]"):
            student(images)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_a_wrapped_student_is_saved_as_itself(tmp_path, wrap):
    student = tiny("sdt").eval()
    saved = checkpoint.save(wrap(student), tmp_path / "s")
    for key, value in checkpoint.load(saved).state_dict().items():
        assert torch.equal(value, student.state_dict()[key])


def test_a_compiled_decoder_is_saved_as_itself(tmp_path):
    student = tiny("sdt").eval()
    expected = student(IMAGES)
    student.decoder = torch.compile(student.decoder)
    assert torch.equal(checkpoint.load(checkpoint.save(student, tmp_path / "s"))(IMAGES), expected)


def test_a_student_with_another_decoder_is_saved_with_that(tmp_path):
    student = tiny("dpt").eval()
    student.decoder = tiny("sdt").decoder.eval()
    assert student.spec["decoder"] == "sdt"
    assert torch.equal(checkpoint.load(checkpoint.save(student, tmp_path / "s"))(IMAGES), student(IMAGES))


def test_what_could_not_be_built_again_is_not_saved(tmp_path):
    class Own(torch.nn.Module):
        options: ClassVar = {}

    student = tiny("dpt")
    student.decoder = Own()
    with pytest.raises(ValueError, match=r"decoder is .*Own, not dpt: set its decoder_name"):
        checkpoint.save(student, tmp_path / "s")
    with pytest.raises(TypeError, match="a student is a distill.students.Student, not Own"):
        checkpoint.save(Own(), tmp_path / "s")
    assert not (tmp_path / "s").exists()
