"""Training of a ViT with a decoder under the whole objective, small."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import students
from distill.losses.objective import Objective
from distill.students import checkpoint
from distill.training.train import train
from tests.speed import training as bench
from tests.training.toys import Toy, Toys, collate, losses_of, newest, settings, steps_of


def real_student():
    torch.manual_seed(0)
    vit = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    return students.build(
        encoder="dinov3_vits16",
        decoder="sdt",
        encoder_options={"timm_options": vit},
        decoder_options={"fusion_channels": 16},
        native_size=32,
    )


class Photos(Toys):
    """Images of 32 x 32, a label each."""

    def __init__(self, count: int) -> None:
        super().__init__(count, teachers=1)

    def __getitem__(self, index: int):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return f"{self.image_keys[index]}-{index}", image, {"primary": image.mean(0)}


def real_run(out: Path, *, student=None, report=None, device="cpu", **given):
    student = student or real_student()
    usual = {
        "steps": 4,
        "warmup_steps": 0,
        "eval_every": 2,
        "save_every": 2,
        "teacher_shares": {},
        "batch_size": 4,
    }
    return train(
        student,
        Photos(8),
        Objective(),
        out=out,
        settings=settings(**(usual | given)),
        collate=collate,
        reference=copy.deepcopy(student.encoder),
        card={"name": "small"},
        report=report,
        device=device,
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("real")
    real_run(out)
    return out


def test_a_student_of_ours_comes_out_as_a_folder(real):
    loaded = checkpoint.load(real / "student")
    weights = load_file(real / "checkpoints/step-00000004/student/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    card = checkpoint.read_card(real / "student")
    assert card["name"] == "small" and card["training"]["step"] == 4
    parts = steps_of(real)[0]["parts"]
    assert {"shared", "gradient", "feature"} <= parts.keys()
    assert not any("without_gradient" in line for line in steps_of(real))


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"channels_last": True}, 1e-4),
        ({"fused": True}, 1e-4),
        ({"precision": "bf16"}, 0.1),
    ],
)
def test_options_change_the_way_and_not_the_result(real, tmp_path, option, tolerance):
    recomputed = []
    student = real_student()
    student.encoder.backbone.blocks[0].register_forward_pre_hook(lambda *a: recomputed.append(1))
    real_run(tmp_path, student=student, steps=2, schedule="constant", **option)
    torch.testing.assert_close(losses_of(tmp_path)[0], losses_of(real)[0], rtol=tolerance, atol=0)
    assert losses_of(tmp_path)[1] != losses_of(tmp_path)[0]
    if "gradient_checkpointing" in option:
        assert len(recomputed) > 6  # 2 steps, forward and again backward, and the evaluation
    if "channels_last" in option:
        assert student.decoder.state_dict() and any(
            p.ndim == 4 and p.shape[2] > 1 and p.is_contiguous(memory_format=torch.channels_last)
            for p in student.parameters()
        )


def test_cutting_changes_nothing_for_the_real_objective(tmp_path):
    # At a rate that fits: at 1e-2 rounding alone (medians, Adam's first steps) grows to a percent within five steps.
    sane = {"lr": 1e-3, "encoder_lr": 1e-3, "batchnorm": "frozen"}
    real_run(tmp_path / "whole", **sane)
    real_run(tmp_path / "parts", accumulate=2, **sane)
    torch.testing.assert_close(losses_of(tmp_path / "parts"), losses_of(tmp_path / "whole"), rtol=1e-5, atol=0)


def test_a_frozen_encoder_may_be_left_to_others(tmp_path):
    student = real_student()
    before = {name: value.clone() for name, value in student.encoder.state_dict().items()}
    real_run(tmp_path, student=student, steps=2, freeze_encoder=True)
    assert student.encoder.frozen and all(torch.equal(before[n], v) for n, v in student.encoder.state_dict().items())
    assert not any(name.startswith("optimizer/encoder") for name in newest(tmp_path))


def test_the_benchmark_of_a_step_has_a_bare_loop_beside_it(monkeypatch):
    monkeypatch.setattr(bench, "student", lambda tiny: Toy())
    steps = bench.bare(bench.Regions(4, 16), settings(batch_size=2), True, torch.device("cpu"))
    for _ in range(3):
        next(steps)


def test_nothing_depends_on_memory_that_was_not_written(tmp_path):
    """So that a deterministic run need not fill it: with NaN in it, as torch can fill it, the bits are the same."""
    real_run(tmp_path / "deterministic", steps=2, deterministic=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        real_run(tmp_path / "filled", steps=2)
    finally:
        torch.use_deterministic_algorithms(False)
    ours, filled = newest(tmp_path / "deterministic"), newest(tmp_path / "filled")
    assert ours.keys() == filled.keys() and all(value.equal(filled[name]) for name, value in ours.items())
