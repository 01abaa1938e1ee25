"""Training stops before damage, refuses what cannot work, and says which part is to blame."""

from __future__ import annotations

import itertools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill.core import machine
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Batch, Labels
from distill.training import checkpoints
from distill.training import step as step_module
from distill.training import train as train_module
from distill.training.schedule import make_optimizer
from distill.training.train import TrainingStoppedError, train
from distill.training.trainlog import ScaleAlarm, map_statistics
from tests.training.toys import Toy, Toys, collate, l1, newest, run, save, settings, steps_of


def test_a_number_that_is_not_finite_stops_before_it_is_applied(tmp_path):
    dataset = Toys(poisoned=3)
    with pytest.raises(TrainingStoppedError, match=r"step (\d+): the loss is .*bad_batch_\1 \(not finite: image1-3\)"):
        run(tmp_path, dataset=dataset, val_fraction=0.0, save_every=1, teacher_shares={"primary": 1.0})
    stopped = steps_of(tmp_path)[-1]["step"]
    assert stopped > 1 and checkpoints.find(tmp_path)[-1].step == stopped - 1
    assert all(value.isfinite().all() for value in newest(tmp_path).values())
    folder = tmp_path / f"bad_batch_{stopped}"
    said = json.loads((folder / "process-0.json").read_text())
    bad = [i for i, image in enumerate(said["images"]) if image["loss"] is None]
    assert [said["images"][i]["key"] for i in bad] == ["image1-3"] and said["teacher"] == "primary"
    tensors = load_file(folder / "process-0.safetensors")
    assert not tensors["0/primary/shared/values"][bad[0]].isfinite().all() and len(tensors["0/images"]) == 8


def test_a_batch_without_a_fault_is_not_blamed_for_a_step_that_nobody_looked_at(tmp_path, monkeypatch):
    """As on a GPU, where the line's norm tells what an earlier step met."""
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.nan))
    with pytest.raises(
        TrainingStoppedError, match=r"one of the 4 preceding steps.*train.log_every = 1 to continue from"
    ):
        run(tmp_path / "few", log_every=5)
    with pytest.raises(TrainingStoppedError, match="check its labels"):
        run(tmp_path / "all")


def test_steps_that_nobody_looks_at_change_nothing_after_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """As on a GPU, where the gradient's norm alone is looked at; that of |x - inf| is finite."""
    runs, take, norm = [], train_module.take_step, nn.utils.get_total_norm

    def guarded(gradients):
        found = norm(gradients)
        step_module._guard(runs[-1], found)
        return found

    monkeypatch.setattr(train_module, "take_step", lambda run, micros: (runs.append(run), take(run, micros))[1])
    monkeypatch.setattr(step_module, "_has_line", lambda run: run.step + 1 == run.settings.steps)
    monkeypatch.setattr(nn.utils, "get_total_norm", guarded)
    given = {"val_fraction": 0.0, "save_every": 1, "keep_last": 20, "teacher_shares": {"primary": 1.0}, "log_every": 20}
    with pytest.raises(TrainingStoppedError, match="step 20: .* this update was not applied"):
        run(tmp_path, dataset=Toys(poisoned=3), fused=True, **given)
    weights = [load_file(saved.folder / "student" / "model.safetensors") for saved in checkpoints.find(tmp_path)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert len(weights) == 19 and any(same) and same == sorted(same), "it learns, and then no more"


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_after_a_norm_that_is_not_finite_every_later_one_is_none(norm):
    run_ = SimpleNamespace(finite=None, optimizer=SimpleNamespace())
    for found, skipped in ((3.0, 0.0), (norm, 1.0), (3.0, 1.0)):
        value = torch.tensor(found)
        step_module._guard(run_, value)
        assert run_.optimizer.found_inf.item() == skipped and value.isfinite().item() == (skipped == 0)


def test_on_a_gpu_what_is_kept_has_been_looked_at():
    """Else a checkpoint would be of a step whose numbers were refused, and a resume would leave steps out."""
    asked = settings(log_every=10, save_every=4, eval_every=7, steps=25)
    card, cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    looked_at = [
        i + 1 for i in range(25) if step_module._has_line(SimpleNamespace(settings=asked, processes=card, step=i))
    ]
    assert looked_at == [4, 7, 8, 10, 12, 14, 16, 20, 21, 24, 25]
    assert all(step_module._has_line(SimpleNamespace(settings=asked, processes=cpu, step=i)) for i in range(25))
    none = settings(log_every=10, save_every=0, eval_every=0, steps=25)
    assert not step_module._has_line(SimpleNamespace(settings=none, processes=card, step=0))


def test_the_scale_alarm_warns_once():
    grows, falls, steady, learns = (ScaleAlarm(growth=10.0) for _ in range(4))
    scale = {"label_deviation": 1.0, "warmup_end": 20}
    said = {"grows": [], "falls": [], "steady": []}
    for step in range(1, 200):
        said["grows"].append(grows.watch(step, 1.05**step, **scale))
        said["falls"].append(falls.watch(step, 0.9**step, **scale))
        said["steady"].append(steady.watch(step, 1.0 + 0.5 * (step % 2), **scale))
        assert learns.watch(step, min(1.0, 1e-4 * step), label_deviation=1.0, warmup_end=1) is None
    assert [sum(map(bool, warnings)) for warnings in said.values()] == [1, 1, 0]
    assert "runs away" in next(filter(None, said["grows"])) and "collapsed" in next(filter(None, said["falls"]))
    assert not any(said["grows"][:30])


def test_the_alarm_starts_at_the_first_step_that_it_sees():
    said = []
    for warmup_end in (1, 500):
        alarm = ScaleAlarm(growth=10.0)  # on a GPU with log_every = 500: growing by half is no runaway
        for step in range(500, 50_001, 500):
            deviation = 20.0 if step == 500 else 30.0
            said.append(alarm.watch(step, deviation, label_deviation=1.0, warmup_end=warmup_end))
        assert alarm.baseline == 20.0
    assert not any(said)


def test_a_runaway_output_is_in_the_log_once(tmp_path):
    def lengthen(pred, labels, features=None, teacher_features=None):
        loss = -pred.std((1, 2))
        return loss, {"shared": loss}

    run(tmp_path, objective=lengthen, steps=60, lr=0.3, encoder_lr=0.3, clip_norm=0, schedule="constant")
    alarms = [line for line in steps_of(tmp_path) if "alarm" in line]
    assert len(alarms) == 1 and 3 < alarms[0]["step"] < 60


def test_statistics_ignore_what_is_invalid():
    values = torch.tensor([[[0.0, 1.0], [2.0, math.nan]], [[math.nan] * 2] * 2])
    assert map_statistics(values, values.isfinite()).tolist() == pytest.approx([1.0, 2 / 3, 1.0])


def test_the_loss_is_computed_in_float32_outside_autocast(tmp_path):
    seen = []

    def watched(pred, labels, features=None, teacher_features=None):
        seen.append((pred.dtype, torch.is_autocast_enabled("cpu"), (pred[0] @ pred[0]).dtype))
        return l1(pred, labels)

    run(tmp_path, objective=watched, precision="bf16", steps=2, warmup_steps=0)
    assert set(seen) == {(torch.float32, False, torch.float32)}


def test_an_objective_that_averages_over_images_is_refused(tmp_path):
    def averaged(pred, labels, features=None, teacher_features=None):
        losses, parts = l1(pred, labels)
        return losses.mean(0, keepdim=True), parts

    with pytest.raises(ValueError, match=r"must return one loss per image, \(\d+,\), not \(1,\)"):
        run(tmp_path, objective=averaged)


def test_a_parameter_nobody_would_train_is_refused():
    student = Toy()
    student.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="would leave out scale"):
        make_optimizer(student, settings())
    student.scale.requires_grad_(False)
    groups = {group["name"]: group for group in make_optimizer(student, settings()).param_groups}
    assert groups["encoder"]["lr"] == 5e-3 and groups["decoder"]["lr"] == 1e-2
    assert groups["decoder_no_decay"]["weight_decay"] == 0 and groups["decoder"]["weight_decay"] > 0


def test_a_frozen_encoder_stays(tmp_path):
    student = Toy(batchnorm=True)
    before = {name: value.clone() for name, value in student.encoder.state_dict().items()}
    run(tmp_path, student=student, freeze_encoder=True, steps=4)
    assert all(torch.equal(before[name], value) for name, value in student.encoder.state_dict().items())


def test_a_parameter_without_gradient_is_named(tmp_path):
    student = Toy()
    student.decoder.idle = nn.Parameter(torch.ones(1))
    run(tmp_path, student=student, steps=4)
    assert steps_of(tmp_path)[0] == {"step": 1, "without_gradient": ["decoder.idle"]}


def test_another_run_is_not_continued(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"lr = 0.5, not 0.01; other training data \(samples: 16, not 20\)"):
        run(tmp_path, steps=4, lr=0.5, dataset=Toys(18), val_fraction=0.2)
    state = checkpoints.folder_of(tmp_path, 4) / "state.json"
    table = json.loads(state.read_text())
    del table["sha256"]  # a run of an earlier version, which had other names for two settings
    for old, new in (("colour", "color_jitter"), ("holdout", "val_fraction")):
        table["settings"][old] = table["settings"].pop(new)
    state.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"cannot continue: lr = 0.5, not 0.01. Restore"):
        run(tmp_path, steps=4, lr=0.5)
    run(tmp_path, steps=4, accumulate=2, workers=1, keep_last=5)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with checkpoints.locked(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with checkpoints.locked(tmp_path):
                    os._exit(0)
            except ValueError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with pytest.raises(ValueError, match="another training run writes here"):
            run(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": Toys(6)}, r"^4 training samples are fewer than one batch of 8"),
        ({"accumulate": 3}, r"batch_size \(8\) must be a multiple of accumulate \(3\)"),
        ({"teacher_shares": {}}, "the labels come from primary, assistant: set how often"),
        (
            {"teacher_shares": {"primary": 1, "dav2": 1}},
            "there are no labels by dav2; the labels are by: primary, assistant",
        ),
        ({"trackers": ("mlflaw",)}, "tracker mlflaw is not installed"),
        ({"gradient_checkpointing": True}, "no part of this student supports it"),
    ],
)
def test_refusals(tmp_path, given, message):
    with pytest.raises((ValueError, LookupError), match=message) as caught:
        run(tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_settings_report_every_fault_at_once():
    with pytest.raises(ValueError) as caught:
        settings(steps=0, schedule="cosin", val_fraction=1.5, teacher_shares={"a": -1})
    assert [
        word in str(caught.value) for word in ("steps", "schedule", "val_fraction", "teacher_shares", "warmup")
    ] == [True] * 5
    with pytest.raises(
        ValueError, match=r"^lr must be finite and above 0, not -1\.0; schedule_steps \(3\) must be more"
    ):
        settings(steps=9, warmup_steps=4, schedule_steps=3, lr=-1.0)


def test_a_sample_that_cannot_be_read_says_so_in_one_line(tmp_path, forked):
    class Broken(Toys):
        def __getitem__(self, index):
            raise OSError("labels-000.tar:image3-7 is damaged")

    for workers in (0, 1):
        with pytest.raises(OSError, match=r"^labels-000.tar:image3-7 is damaged$"):
            run(tmp_path, dataset=Broken(), workers=workers)


def test_affine_depth_is_refused_and_metric_depth_converted(tmp_path):
    class Depths(Toys):
        kind = Kind.AFFINE_DEPTH

    def as_depth(kind):
        def collate_depth(samples):
            batch = collate(samples)
            shared = batch.labels["primary"].shared
            depth = DepthMap(1 / (shared.values + 0.1), shared.valid, kind)
            return Batch(batch.keys, batch.images, {"primary": Labels(depth, None, torch.zeros(len(batch), 0, 4))})

        return collate_depth

    given = {"settings": settings(steps=4, teacher_shares={}), "save": save}
    with pytest.raises(KindError, match="affine_depth cannot become affine_disparity"):
        train(Toy(), Toys(teachers=1), l1, out=tmp_path / "a", collate=as_depth(Kind.AFFINE_DEPTH), **given)
    train(Toy(), Toys(teachers=1), l1, out=tmp_path / "b", collate=as_depth(Kind.METRIC_DEPTH), **given)
    assert steps_of(tmp_path / "b")[0]["label_median"] == pytest.approx(1.6, abs=0.2)


def test_a_reading_process_that_dies_ends_the_run_in_a_line(tmp_path, forked):
    class Killed(Toys):
        def get(self, index, teachers, *, visit=None):
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), 9)
            return super().get(index, teachers, visit=visit)

    with pytest.raises(OSError, match=r"a process that reads samples died .*/dev/shm.*lower train.workers") as got:
        run(tmp_path, steps=4, workers=1, dataset=Killed())
    assert "\n" not in str(got.value)


def test_a_reading_process_that_dies_in_the_middle_of_a_step_is_told_of_too(tmp_path):
    def struck(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(OSError, match=r"a process that reads samples died .*pid 7.*lower train.workers"):
        run(tmp_path, steps=4, objective=struck)


def test_where_shared_memory_is_scarce_nobody_else_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "open_files", lambda: None)
    monkeypatch.setattr(machine, "shared_memory", lambda: 64_000_000)
    batch = {"size": 30_000_000, "tensors": 8}
    workers, _, said = machine.readers(2, 4, **batch)
    assert workers == 0 and "64 MB free" in said and "--shm-size" in said
    assert machine.readers(2, 4, size=5_000_000, tensors=8) == (2, 4, "")
    assert machine.readers(4, 4, size=7_000_000, tensors=8)[:2] == (4, 1)
    assert machine.readers(4, 4, size=10_000_000, tensors=8)[:2] == (3, 1)
    monkeypatch.setattr(machine, "open_files", lambda: 256)
    workers, ahead, said = machine.readers(8, 4, size=1, tensors=8)
    assert (workers, ahead) == (8, 1) and "ulimit" in said
    monkeypatch.setattr(machine, "shared_memory", lambda: 1000)

    class Mine(Toys):
        def get(self, index, teachers, *, visit=None):
            assert torch.utils.data.get_worker_info() is None
            return super().get(index, teachers, visit=visit)

    assert run(tmp_path, steps=4, workers=2, dataset=Mine())[0].step == 4
