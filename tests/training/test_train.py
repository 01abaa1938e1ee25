"""Training is exact: cut how you like, kill when you like, the same run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from distill.training import checkpoints, step
from tests.ranks import ended_as, ranks_of_two
from tests.training.toys import Forgetful, Toy, Toys, assert_same_run, losses_of, newest, run, steps_of


def process(out: Path, environment: dict[str, str], die_at: int | None) -> None:
    """One process of a run; die_at ends it by SIGKILL in that step."""
    os.environ.update(environment)

    def report(done, total, **numbers):
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(out, report=report)


def two_runs(root: Path, environment: dict[str, str]) -> None:
    """One of two processes, which make a run, and then one whose encoder waits."""
    process(root / "two", environment, None)
    run(root / "two_wait", freeze_steps=8, accumulate=2)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, processes):
    """Runs in processes of their own, at once: two gloo processes x 4 images, and one that is killed in step 13."""
    root = tmp_path_factory.mktemp("runs")
    runs = [(two_runs, root, rank) for rank in ranks_of_two()]
    ended = ended_as([*runs, (process, root / "killed", {}, 13)], processes)
    assert ended == [0, 0, -signal.SIGKILL]
    return root


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that the others are to equal: one process, batches of 8, never killed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight")
    run(out)
    return out


def test_accumulating_changes_nothing(straight, tmp_path):
    run(tmp_path, accumulate=2)
    assert_same_run(tmp_path, straight)


def test_two_processes_change_nothing(straight, elsewhere):
    assert_same_run(elsewhere / "two", straight)
    assert [line["lr"] for line in steps_of(straight) if "lr" in line] == [
        line["lr"] for line in steps_of(elsewhere / "two") if "lr" in line
    ]


def test_workers_change_not_a_bit(straight, tmp_path):
    run(tmp_path, workers=2)
    assert steps_of(tmp_path) == steps_of(straight)


def test_killed_and_resumed_is_the_same_to_the_last_bit(straight, elsewhere):
    out = elsewhere / "killed"
    assert steps_of(out)[-1]["step"] == 13 and checkpoints.find(out)[-1].step == 10
    run(out)
    assert steps_of(out) == steps_of(straight)
    ours, theirs = newest(out), newest(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "student/model.safetensors").read_bytes() == (straight / "student/model.safetensors").read_bytes()


def test_two_machines_without_a_common_folder_go_on_from_what_one_process_left(straight, tmp_path, processes):
    def stop(done, total, **numbers):
        if done == 13:
            raise KeyboardInterrupt

    main, other = tmp_path / "main", tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        run(main, report=stop)
    ranks = ranks_of_two(machines=2)
    assert ended_as([(process, main, ranks[0], None), (process, other, ranks[1], None)], processes) == [0, 0]
    assert_same_run(main, straight)
    chosen = [saved.folder.name for saved in checkpoints.find(other)]
    assert "step-00000010" in chosen and not (other / "student").exists()
    folders = [out / "checkpoints/step-00000020" for out in (main, other)]
    one, same = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert one == same and len(one) == 4


def test_training_learns(straight):
    steps = [line for line in steps_of(straight) if "teacher" in line]
    for teacher in ("primary", "assistant"):
        losses = [line["loss"] for line in steps if line["teacher"] == teacher]
        assert len(losses) > 2 and (teacher == "assistant" or losses[-1] < 0.85 * losses[0])


def test_a_finished_run_does_nothing_again(straight):
    before = newest(straight)
    result, _ = run(straight, report=lambda *a, **k: pytest.fail("it trained again"))
    assert result.step == 20 and result.images_per_s == 0
    assert all(torch.equal(newest(straight)[name], value) for name, value in before.items())


def test_frozen_batchnorm_does_not_know_how_the_batch_was_cut(tmp_path):
    for name, given in (("whole", {}), ("parts", {"accumulate": 4})):
        for mode in ("frozen", "batch"):
            run(tmp_path / mode / name, student=Toy(batchnorm=True), steps=6, batchnorm=mode, **given)
    assert_same_run(tmp_path / "frozen/parts", tmp_path / "frozen/whole")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "batch/parts", tmp_path / "batch/whole")


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_dropout_is_drawn_from_the_step(tmp_path):
    def stop(done, total, **numbers):
        if done == 13:
            raise KeyboardInterrupt

    run(tmp_path / "a", student=Forgetful())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", student=Forgetful(), report=stop)
    torch.rand(7)
    run(tmp_path / "b", student=Forgetful())
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")


# --- which part learns how fast ---------------------------------------------------------------------------------------


def test_an_encoder_that_waits_begins_at_its_step_and_resumes_alike(tmp_path, elsewhere):
    first = {k: v.clone() for k, v in Toy().encoder.state_dict().items()}
    run(tmp_path / "early", steps=8, freeze_steps=8, warmup_steps=2, val_fraction=0.0)
    waited = newest(tmp_path / "early")
    assert all(torch.equal(waited[f"student/encoder.{k}"], v) for k, v in first.items())
    assert not any(name.startswith("optimizer/encoder") for name in waited)
    assert not torch.equal(waited["student/decoder.weight"], Toy().decoder.weight)
    _, begun = run(tmp_path / "begun", steps=9, freeze_steps=8, warmup_steps=2, val_fraction=0.0)
    assert not torch.equal(begun.encoder[0].weight, first["0.weight"]), "whether or not it is evaluated there"
    result, student = run(tmp_path / "whole", freeze_steps=8)
    assert_same_run(elsewhere / "two_wait", tmp_path / "whole")
    assert not torch.equal(student.encoder[0].weight, first["0.weight"])
    assert all(p.requires_grad for p in student.parameters())

    class Stop(Exception):
        pass

    def report(done, total, **numbers):
        if done == 13:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "cut", freeze_steps=8, save_every=5, report=report)
    run(tmp_path / "cut", freeze_steps=8, save_every=5)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    for name, value in newest(tmp_path / "whole").items():
        assert torch.equal(newest(tmp_path / "cut")[name], value), name


class Choosing(Toys):
    """Toys that remember whose labels they were asked for in training."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def get(self, index: int, teachers, *, visit=None):
        self.asked += [] if visit is None else teachers
        return super().get(index, teachers)


def test_only_the_labels_that_a_step_learns_from_are_decoded(straight, tmp_path):
    dataset = Choosing()
    run(tmp_path / "chosen", dataset=dataset)
    assert losses_of(tmp_path / "chosen") == losses_of(straight)
    used = [line["teacher"] for line in steps_of(straight) if "teacher" in line]
    assert dataset.asked == [name for name in used for _ in range(8)] and set(used) == {"primary", "assistant"}
    with pytest.raises(LookupError, match="no labels by third; the labels are by: primary, assistant"):
        run(tmp_path / "third", dataset=Choosing(), teacher_shares={"primary": 0.99, "third": 0.01})


def test_a_step_without_a_line_learns_what_one_with_a_line_does(tmp_path, monkeypatch):
    """As on a GPU, where a step between the log's lines measures nothing; off it every step has one."""
    run(tmp_path / "all", steps=10)
    monkeypatch.setattr(step, "_has_line", lambda now: (now.step + 1) % 5 == 0)
    asked: list[int] = []
    measured = step._measured
    monkeypatch.setattr(step, "_measured", lambda now, *rest: asked.append(now.step) or measured(now, *rest))
    run(tmp_path / "few", steps=10)
    assert asked == [4, 9]
    for name, value in newest(tmp_path / "all").items():
        assert torch.equal(newest(tmp_path / "few")[name], value), name
    every, few = ([line for line in steps_of(tmp_path / way) if "loss" in line] for way in ("all", "few"))
    assert few == [every[4], every[9]]
