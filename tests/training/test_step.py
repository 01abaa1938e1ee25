"""What one step draws, averages, holds still and says in its line."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.training import parallel, state, step
from distill.training.averages import Averages
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.schedule import make_optimizer
from distill.training.trainlog import ScaleAlarm
from tests.training.toys import KIND, SIZE, Toy, settings


def some_run(out, *, student=None, objective=None, **given) -> state.TrainingRun:
    """A run of this process alone, before its first step."""
    student, asked = student or Toy(), settings(val_fraction=0.0, **given)
    processes = state.Processes(
        index=0,
        count=1,
        device=torch.device("cpu"),
        add=lambda values: values,
        gather=lambda names: names,
        share=lambda value: value,
        wait=lambda: None,
        without_exchange=lambda model: nullcontext(),
        track=lambda numbers, number: None,
    )
    run = state.TrainingRun(
        processes=processes,
        settings=asked,
        out=out,
        student=student,
        model=student,
        optimizer=make_optimizer(student, asked),
        ema=None,
        reference=None,
        objective=objective or plain,
        alarm=ScaleAlarm(growth=10.0),
        save_student=lambda *given: None,
    )
    state.set_mode(run)
    return run


def plain(pred, labels, features=None, teacher_features=None):
    """A loss of the prediction alone; those that learn from KIND have one more part."""
    loss = pred.abs().mean((1, 2))
    more = {"more": 3 * loss} if labels.shared.kind is KIND else {}
    return loss, {"shared": loss, **more}


def flat(values, kind=KIND) -> Labels:
    """Labels of one value per image; None: nothing is valid."""
    known = torch.tensor([value is not None for value in values])[:, None, None].expand(-1, SIZE, SIZE)
    maps = torch.tensor([value or 0.0 for value in values])[:, None, None].expand(-1, SIZE, SIZE)
    return Labels(DepthMap(maps, known, kind), None, torch.zeros(len(values), 0, 4))


def mixed() -> MicroBatch:
    """Four images of one value each, 5, 1, 2 and 0: two learn from metric depth, two from KIND."""
    images = torch.tensor([5.0, 1.0, 2.0, 0.0])[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    taught = (
        TaughtRows(torch.tensor([1, 3]), flat([None, None], Kind.METRIC_DEPTH), "metres"),
        TaughtRows(torch.tensor([0, 2]), flat([7.0, None]), "shape"),
    )
    return MicroBatch(("a", "b", "c", "d"), images, taught, (0, 1, 2, 3))


def noise(number: int, count: int = 8) -> MicroBatch:
    images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(number))
    taught = TaughtRows(None, flat([1.0] * count), "shape")
    return MicroBatch(tuple(map(str, range(count))), images, (taught,), tuple(range(count)))


class Same(Toy):
    """A student that gives its image back, times a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 1, 1, bias=False), nn.Identity()
        nn.init.ones_(self.encoder.weight)

    def forward(self, images):
        return self.encoder(images[:, :1])[:, 0]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_losses_stand_in_the_order_of_the_images_and_say_which_of_them_learn(tmp_path):
    run = some_run(tmp_path, student=Same())
    found = step.measure(run, run.student.eval(), mixed())
    assert found.losses.tolist() == [5.0, 1.0, 2.0, 0.0]
    # "b" and "c" have no label and yet a loss, as of features; "d" has neither.
    assert found.taught.tolist() == [True, True, True, False]
    alone = MicroBatch(("a",), mixed().images[3:], (TaughtRows(None, flat([7.0]), "shape"),), (0,))
    assert step.measure(run, run.student, alone).taught.tolist() == [True], "a loss of zero that labels gave"


def test_a_line_averages_each_number_over_the_images_that_have_it(tmp_path):
    run = some_run(tmp_path, student=Same(), batch_size=4)
    line = step.take_step(run, iter([mixed()]))
    assert line["loss"] == 2.0 and line["parts"] == {"shared": 2.0, "more": pytest.approx(3 * 3.5)}
    assert line["teachers"] == {"metres": {"loss": 0.5, "images": 2}, "shape": {"loss": 3.5, "images": 2}}
    assert (line["output_median"], line["output_deviation"]) == (2.0, 0.0)
    assert (line["label_median"], line["label_deviation"]) == (7.0, 0.0), "of the one image with labels"


def test_labels_of_another_kind_than_the_students_are_not_in_the_lines_statistics(tmp_path):
    micro = mixed()
    metres = TaughtRows(micro.taught[0].rows, flat([90.0, 90.0], Kind.METRIC_DEPTH), "metres")
    batch = MicroBatch(micro.keys, micro.images, (metres, micro.taught[1]), micro.positions)
    run = some_run(tmp_path, student=Same(), batch_size=4, kind=str(KIND))
    assert step.take_step(run, iter([batch]))["label_median"] == 7.0


def test_the_rate_is_of_all_steps_since_the_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_has_line", lambda run: run.step % 3 == 2)
    run, before = some_run(tmp_path), 0.0
    for run.step in range(6):
        line = step.take_step(run, iter([noise(run.step)]))
        assert (line is None) is (run.step not in (2, 5))
        if line is not None:
            assert line["images_per_s"] * line["seconds"] == pytest.approx(8)
            assert line["seconds"] == pytest.approx((run.seconds - before) / 3)
            before = run.seconds
    run.seconds, run.waited, run.steps_here = run.seconds + 3.0, run.waited + 2.0, run.steps_here + 2
    assert run.since(1.0, 0.5) == pytest.approx((3.0, 2.0, 2)) and run.since(1.0, 0.5) == (1.0, 0.5, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_only_the_student_runs_in_the_precision_that_is_asked_for(tmp_path, precision):
    seen = []

    class Telling(Toy):
        def forward(self, images):
            seen.append(self.encoder(images).dtype)
            return super().forward(images)

    def objective(pred, labels, features=None, teacher_features=None):
        seen.extend([pred.dtype, (pred.flatten(1) @ pred.flatten(1).T).dtype])
        return plain(pred, labels)

    run = some_run(tmp_path, student=Telling(), objective=objective, precision=precision)
    step.measure(run, run.student, noise(0))
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32, torch.float32, torch.float32]


# --- what is drawn and applied ----------------------------------------------------------------------------------------


def test_the_seed_is_of_the_run_the_step_the_process_and_the_part(tmp_path, monkeypatch):
    seeds: list[int] = []
    monkeypatch.setattr(step, "_seed", lambda seed, device: seeds.append(seed))
    run = some_run(tmp_path, accumulate=2, seed=5)
    for run.step in range(2):
        step.take_step(run, iter([noise(0, 4), noise(1, 4)]))
    wanted = [int(generator("step", 5, at, 0, part).integers(2**62)) for at in range(2) for part in range(2)]
    assert seeds == wanted and len({*wanted}) == 4


def test_the_gradient_is_cut_to_the_norm_that_is_asked_for_and_the_line_has_the_whole(tmp_path):
    norms = []
    for clip in (1e-3, 0.0):
        run = some_run(tmp_path, clip_norm=clip)
        line = step.take_step(run, iter([noise(0)]))
        norms.append((line["grad_norm"], nn.utils.get_total_norm([p.grad for p in run.parameters]).item()))
    (whole, cut), (plain_norm, uncut) = norms
    assert whole == plain_norm == pytest.approx(uncut) and uncut > 0.01 and cut == pytest.approx(1e-3, rel=1e-3)


def test_averages_follow_every_step(tmp_path):
    run = some_run(tmp_path)
    run.ema = Averages(run.student, 0.5)
    for run.step in range(2):
        step.take_step(run, iter([noise(run.step)]))
        if run.step == 0:
            first = run.student.decoder.weight.detach().clone()
            assert torch.equal(run.ema.module.decoder.weight, first)
    assert run.evaluated_network is run.ema.module
    assert int(run.ema.n_averaged) == 2 and not torch.equal(run.ema.module.decoder.weight, first)


def test_what_does_not_learn_holds_still(tmp_path):
    run = some_run(tmp_path, student=Toy(batchnorm=True), freeze_steps=2)
    for run.step, learns in enumerate([False, False, True]):
        state.set_mode(run)
        encoder = run.student.encoder
        assert encoder.training is encoder[1].training is learns and run.student.decoder.training
        assert all(p.requires_grad is learns for p in encoder.parameters())
        assert all(p.requires_grad for p in run.student.decoder.parameters())
    run = some_run(tmp_path, student=Toy(batchnorm=True), batchnorm="frozen")
    assert run.student.encoder.training and not run.student.encoder[1].training
    run = some_run(tmp_path, student=Toy(batchnorm=True), freeze_encoder=True)
    assert not run.student.encoder.training and run.student.decoder.training


def test_a_student_is_made_ready_as_the_settings_say():
    def ready(student=None, *, processes=1, **given):
        student = student or Toy(batchnorm=True)
        state.make_ready(student, settings(**given), device=torch.device("cpu"), processes=processes)
        return student

    frozen = ready(freeze_encoder=True)
    assert not any(p.requires_grad for p in frozen.encoder.parameters()) and frozen.decoder.weight.requires_grad
    for wanted in (False, True):
        weight = ready(channels_last=wanted).decoder.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is wanted
    with pytest.raises(ValueError, match="gradient_checkpointing: no part of this student supports it"):
        ready(gradient_checkpointing=True)
    assert type(ready(batchnorm="sync").encoder[1]) is nn.BatchNorm2d, "one process has nobody to share with"
    with pytest.raises(ValueError, match='batchnorm = "sync" needs CUDA'):
        ready(batchnorm="sync", processes=2)


def test_a_reference_holds_still_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    asked, reference = settings(ema=0.7), nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout())
    accelerator = parallel.accelerator_of(Toy(), asked, tmp_path, device="cpu")
    assert accelerator.mixed_precision == "no", "the recipe decides, not the launcher's configuration"
    given = {"objective": plain, "reference": reference, "out": tmp_path, "save_student": lambda *given: None}
    run = parallel.new_run(Toy(), accelerator, asked, **given)
    assert run.reference is reference and not any(part.training for part in reference.modules())
    assert not reference[0].weight.requires_grad and run.student.decoder.weight.requires_grad
    assert run.ema.decay == 0.7


@pytest.mark.parametrize("wanted", [False, True])
def test_operations_are_the_same_to_the_bit_only_where_that_is_asked(monkeypatch, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is gone again after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with parallel.reproducible(wanted):
        assert torch.are_deterministic_algorithms_enabled() is wanted is not torch.backends.cudnn.benchmark
        assert torch.utils.deterministic.fill_uninitialized_memory is not wanted
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is wanted
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_resumed_run_draws_later_points_again_and_keeps_those_before():
    got = []
    accelerator = SimpleNamespace(init_trackers=lambda name, init_kwargs: got.append((name, init_kwargs)))
    parallel.open_trackers(accelerator, settings(trackers=("tensorboard",)), name="a", step=7)
    parallel.open_trackers(accelerator, settings(), name="a", step=7)
    assert got == [("a", {"tensorboard": {"purge_step": 8}})]
