"""On a card a run learns what it learns on a CPU, and goes on after a kill."""

from __future__ import annotations

import json

import pytest
import torch

from distill.training import checkpoints
from distill.training.stored import stored_batches
from distill.training.trainlog import read
from tests.training.test_handover import CPU, SETTINGS, labels, positions_of, same
from tests.training.test_real_student import real_run
from tests.training.toys import losses_of, newest, run, steps_of

pytestmark = pytest.mark.cuda
__all__ = ["labels"]  # a fixture
# Sums of a card are added up in an order of its own, and Adam's first steps make a step of the least of differences.
NEAR = {"rtol": 2e-3, "atol": 2e-4}


def device_of(out) -> str:
    return json.loads((out / "run.json").read_text())["device"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    run(out, device="cuda")
    torch.backends.cudnn.allow_tf32 = before
    return out


def test_a_run_is_that_of_a_cpu(straight, tmp_path):
    """In one process: the card before and after the CPU, as an ablation or a notebook may have it."""
    run(tmp_path / "cpu")
    assert device_of(straight).startswith("cuda") and device_of(tmp_path / "cpu") == "cpu"
    torch.testing.assert_close(losses_of(straight), losses_of(tmp_path / "cpu"), **NEAR)
    for name, value in newest(tmp_path / "cpu").items():
        if name.startswith("student/"):
            torch.testing.assert_close(newest(straight)[name], value, **NEAR)
    steps = [line for line in read(straight / "log.jsonl") if "loss" in line]
    assert all(line["memory"] > 0 for line in steps)


def test_a_run_goes_on_after_a_kill(straight, tmp_path, card):
    def stop(done, total, **numbers):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, device=card, report=stop)
    assert checkpoints.find(tmp_path)[-1].step == 10
    run(tmp_path, device="cuda:0")
    assert [line["step"] for line in steps_of(tmp_path) if "loss" in line] == list(range(1, 21))
    torch.testing.assert_close(losses_of(tmp_path), losses_of(straight), **NEAR)


def test_a_run_may_go_on_elsewhere(straight, tmp_path, card):
    def stop(done, total, **numbers):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report=stop)
    run(tmp_path, device=card)
    assert device_of(tmp_path).startswith("cuda")
    torch.testing.assert_close(losses_of(tmp_path), losses_of(straight), **NEAR)


def test_cutting_and_workers_change_nothing(straight, tmp_path, card):
    run(tmp_path, device=card, accumulate=2, workers=1)
    torch.testing.assert_close(losses_of(tmp_path), losses_of(straight), **NEAR)


@pytest.mark.parametrize(("option", "tolerance"), [({}, 1e-3), ({"precision": "bf16"}, 0.1), ({"fused": True}, 1e-3)])
def test_a_step_under_the_whole_objective(tmp_path, card, option, tolerance):
    real_run(tmp_path / "cpu", steps=2)
    real_run(tmp_path / "card", steps=2, device=card, **option)
    torch.testing.assert_close(losses_of(tmp_path / "card")[0], losses_of(tmp_path / "cpu")[0], rtol=tolerance, atol=0)
    assert losses_of(tmp_path / "card")[1] != losses_of(tmp_path / "card")[0]
    assert all(value.isfinite().all() for value in newest(tmp_path / "card").values())


def test_batches_handed_to_the_card_have_the_bits_of_a_cpu(labels, card):
    positions = positions_of(labels)
    there = stored_batches(labels, positions, settings=SETTINGS, device=torch.device(card))
    for ours, theirs in zip(there, stored_batches(labels, positions, settings=SETTINGS, device=CPU), strict=True):
        assert ours.images.is_cuda and ours.waited is not None
        same(ours.to(CPU), theirs)
