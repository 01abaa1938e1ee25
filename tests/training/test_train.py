"""Training is exact: cut how you like, kill when you like, the same run. Also what it refuses and what it writes."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from distill import students
from distill.core.crops import sample_boxes
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Batch, Labels
from distill.losses.objective import Objective
from distill.students import checkpoint
from distill.training import checkpoints
from distill.training.augment import augment
from distill.training.sampling import MicroBatchPositions, Order, average_labels, choose_teacher, hold_out
from distill.training.schedule import TrainSettings, factor, make_optimizer, set_rates
from distill.training.train import TrainingStoppedError, train
from distill.training.trainlog import WALL_CLOCK, ScaleAlarm, StepLog, map_statistics, read

SIZE = 8
KIND = Kind.AFFINE_DISPARITY


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are added up in another order
    yield
    torch.set_num_threads(before)


class Toy(nn.Module):
    """A student of 27 parameters."""

    def __init__(self, *, batchnorm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2) if batchnorm else nn.Identity(), nn.Tanh())
        self.decoder = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, images):
        return self.decoder(self.encoder(images))[:, 0]


class Forgetful(Toy):
    """A student with dropout."""

    def forward(self, images):
        return self.decoder(nn.functional.dropout(self.encoder(images), 0.5, self.training))[:, 0]


class Toys:
    """Samples of `per_image` draws of each image; labels by "primary" (a ramp of the image) and "assistant"."""

    def __init__(self, count: int = 24, *, per_image: int = 2, poisoned: int | None = None, teachers: int = 2) -> None:
        self.image_keys = [f"image{i // per_image}" for i in range(count)]
        self.poisoned, self.teachers = poisoned, teachers

    def __len__(self) -> int:
        return len(self.image_keys)

    def __getitem__(self, index: int):
        image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        primary = image[0] + 2 * image[1]
        if index == self.poisoned:
            primary = primary / 0
        maps = {"primary": primary, "assistant": image[2] - image[0]}
        return f"{self.image_keys[index]}-{index}", image, dict(list(maps.items())[: self.teachers])


def collate(samples) -> Batch:
    keys, images, labels = zip(*samples, strict=True)
    boxes = torch.zeros(len(keys), 0, 4)

    def shared(name):
        values = torch.stack([maps[name] for maps in labels])
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), KIND)

    return Batch(keys, torch.stack(images), {name: Labels(shared(name), None, boxes) for name in labels[0]})


def l1(pred, labels, features=None, teacher_features=None):
    shared = labels.shared
    loss = (pred - shared.values).abs().mean((1, 2))
    return loss + 0.1 * pred.square().mean((1, 2)), {"shared": loss}


def save(student, folder, *, card):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone() for k, v in student.state_dict().items()}, folder / "model.safetensors")
    (folder / "student.json").write_text(json.dumps({"card": card}))


def settings(**given) -> TrainSettings:
    usual = {
        "steps": 20,
        "batch_size": 8,
        "lr": 1e-2,
        "encoder_lr": 5e-3,
        "warmup_steps": 3,
        "workers": 0,
        "holdout": 0.2,
        "eval_every": 5,
        "save_every": 10,
        "trackers": (),
        "teachers": {"primary": 0.7, "assistant": 0.3},
        "cpu": True,
    }
    return TrainSettings(**(usual | given))


def run(out: Path, *, student=None, dataset=None, objective=l1, report=None, heldout=None, keep=save, **given):
    student = student or Toy()
    result = train(
        student,
        dataset or Toys(),
        objective,
        out=out,
        settings=settings(**given),
        collate=collate,
        heldout=heldout,
        save=keep,
        report=report,
    )
    return result, student


def steps_of(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read(out / "log.jsonl")]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in steps_of(out) if "loss" in line]


def newest(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.find(out)[-1].folder / "training.safetensors")


# --- one run, however it is cut ---------------------------------------------------------------------------------------


def process(out: Path, environment: dict[str, str], die_at: int | None) -> None:
    """One process of a run; die_at ends it by SIGKILL in that step."""
    os.environ.update(environment)
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()

    def report(done, total, **numbers):
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(out, report=report)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs in processes of their own, at once: two gloo processes x 4 images, and one that is killed in step 13."""
    root = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [{**world, "RANK": r, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": "2"} for r in ("0", "1")]
    # Forked, for importing everything anew takes far longer than the runs.
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=process, args=(root / "two", rank, None)) for rank in ranks]
    started.append(fork.Process(target=process, args=(root / "killed", {}, 13)))
    for one in started:
        one.start()
    for one in started:
        one.join(timeout=60)
    assert [one.exitcode for one in started] == [0, 0, -signal.SIGKILL]
    return root


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that the others are to equal: one process, batches of 8, never killed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight")
    run(out)
    return out


def assert_same_run(out: Path, reference: Path) -> None:
    torch.testing.assert_close(losses_of(out), losses_of(reference), rtol=1e-5, atol=1e-6)
    for name, value in newest(reference).items():
        torch.testing.assert_close(newest(out)[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    held = [[line["heldout"] for line in steps_of(o) if "heldout" in line] for o in (out, reference)]
    torch.testing.assert_close(*held, rtol=1e-5, atol=1e-6)


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


# --- order, rates, teachers -------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_sample_once():
    order = Order(tuple(range(5, 24)), seed=3)
    stream = [place.index for step in range(19) for place in order.batch(step, 8)]
    epochs = [stream[i : i + 19] for i in range(0, len(stream), 19)]
    assert all(sorted(epoch) == list(range(5, 24)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [p.index for p in Order(tuple(range(5, 24)), seed=4).batch(0, 8)] != stream[:8]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_parts_only_cut_the_global_batch(processes, accumulate):
    order = Order(tuple(range(20)), seed=0)
    cut = {"batch_size": 8, "accumulate": accumulate, "processes": processes, "steps": 5}
    parts = [list(MicroBatchPositions(order=order, process=p, **cut)) for p in range(processes)]
    for step in range(5):
        seen = [place for mine in parts for part in mine[step * accumulate : (step + 1) * accumulate] for place in part]
        assert sorted(seen, key=lambda p: p.position) == order.batch(step, 8)


def test_held_out_images_follow_from_their_keys_alone():
    keys = [f"sa_{i // 3}" for i in range(600)]
    kept, held = hold_out(keys, 0.1)
    assert sorted(kept + held) == list(range(600)) and len(held) % 3 == 0
    assert not {keys[i] for i in kept} & {keys[i] for i in held}
    shuffled = list(reversed(keys))
    assert {shuffled[i] for i in hold_out(shuffled, 0.1)[1]} == {keys[i] for i in held}
    assert set(held) < set(hold_out(keys, 0.2)[1])
    assert abs(len(hold_out([str(i) for i in range(20_000)], 0.1)[1]) - 2000) < 200
    assert len(hold_out(["a", "b", "c"], 1e-9)[1]) == 1 and hold_out(["a", "b"], 0.0)[1] == []


def test_teachers_are_chosen_by_share_from_seed_and_step():
    shares = {"primary": 0.7, "assistant": 0.3}
    drawn = [choose_teacher(shares, seed=1, step=step) for step in range(2000)]
    assert drawn == [choose_teacher(shares, seed=1, step=step) for step in range(2000)]
    assert abs(drawn.count("primary") / 2000 - 0.7) < 0.04
    assert choose_teacher({"a": 0.0, "b": 1.0}, seed=0, step=0) == "b"


def test_rates_count_optimizer_steps():
    at = {name: settings(steps=103, schedule=name) for name in ("cosine", "linear", "poly", "constant")}
    assert [factor(t, at["cosine"]) for t in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert [factor(53, s) for s in at.values()] == pytest.approx([0.5, 0.5, 0.5**0.9, 1.0])
    assert 0 < factor(102, at["cosine"]) < 1e-3


def test_averaged_teachers_are_normalized_first():
    ramp = torch.arange(16.0).reshape(1, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    ramp[0, 0, 0] = math.nan
    boxes = torch.zeros(1, 0, 4)
    labels = {"a": Labels(DepthMap(ramp, valid, KIND), None, boxes)}
    labels["b"] = Labels(DepthMap(1000 * ramp + 7, torch.ones_like(valid), KIND), None, boxes)
    mean = average_labels(labels, {"a": 0.5, "b": 0.5}).shared
    assert torch.equal(mean.valid, valid) and mean.values.isfinite().all()
    part = mean.values[valid]
    torch.testing.assert_close(part.median(), torch.tensor(0.0))
    torch.testing.assert_close(part.abs().mean(), torch.tensor(1.0))


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"hflip": True}, {"crop": 0.3}, {"hflip": True, "crop": 0.3}])
def test_geometry_moves_image_maps_and_patches_together(given):
    size, count = 64, 6
    ys, xs = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    ramp = (3 * xs + ys) / size
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0]]).expand(count, 2, 4)
    maps = ramp.expand(count, size, size)
    patches = torch.cat([maps[:, :32, :32, None], maps[:, 16:48, 32:, None]], 3).permute(0, 3, 1, 2)
    local = DepthMap(patches.reshape(-1, 32, 32), torch.ones(count * 2, 32, 32, dtype=torch.bool), KIND)
    labels = Labels(DepthMap(maps, torch.ones_like(maps, dtype=torch.bool), KIND), local, boxes)
    batch = Batch(tuple("abcdef"), maps[:, None].expand(-1, 3, -1, -1), {"t": labels})
    out = augment(batch, range(count), seed=0, **({"hflip": False, "colour": 0.0, "crop": 1.0} | given))
    moved = out.labels["t"]
    assert not torch.equal(moved.shared.values, maps)
    assert torch.equal(batch.images, maps[:, None].expand(-1, 3, -1, -1))  # the input is left alone
    torch.testing.assert_close(out.images[:, 0], moved.shared.values, atol=1e-5, rtol=0)
    seen, inside = sample_boxes(moved.shared.values, moved.boxes, 32)
    usable = inside.reshape(-1, 32, 32) & moved.local.valid
    # A crop brought up to full size repeats its outermost pixels, so a ramp is exact to half a native pixel at its rim.
    torch.testing.assert_close(seen.reshape(-1, 32, 32)[usable], moved.local.values[usable], atol=0.04, rtol=0)
    assert usable.float().mean() > 0.3


def test_a_crop_does_not_spread_what_is_invalid():
    values = torch.ones(1, 16, 16)
    values[:, 4:6, 4:6] = math.nan
    labels = Labels(DepthMap(values, values.isfinite(), KIND), None, torch.zeros(1, 0, 4))
    batch = Batch(("a",), torch.zeros(1, 3, 16, 16), {"t": labels})
    shared = augment(batch, [0], seed=0, hflip=False, colour=0.0, crop=0.5).labels["t"].shared
    assert not shared.valid.all() and torch.equal(shared.values[shared.valid], torch.ones(int(shared.valid.sum())))


def test_colour_changes_the_image_alone_and_by_place_in_the_stream():
    batch = collate([Toys()[0], Toys()[0]])
    draws = {"seed": 0, "hflip": False, "colour": 0.4, "crop": 1.0}
    out = augment(batch, [5, 6], **draws)
    assert torch.equal(out.labels["primary"].shared.values, batch.labels["primary"].shared.values)
    assert not torch.equal(out.images[0], out.images[1]) and 0 <= out.images.min() and out.images.max() <= 1
    assert torch.equal(augment(batch, [6, 5], **draws).images, out.images.flip(0))


def test_augmented_training_is_cut_like_any_other(tmp_path):
    changes = {"hflip": True, "colour": 0.3, "crop": 0.5, "steps": 6}
    run(tmp_path / "whole", **changes)
    run(tmp_path / "parts", accumulate=2, workers=1, **changes)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path):
    def worse_later(pred, labels, features=None, teacher_features=None):
        if not pred.requires_grad:
            calls.append(pred)
        penalty = 0.0 if pred.requires_grad or len(calls) <= 6 else 1.0 * len(calls)
        loss, parts = l1(pred, labels)
        return loss + penalty, parts

    calls: list = []
    result, student = run(tmp_path, objective=worse_later, eval_every=2, save_every=2, keep_last=2, steps=16)
    steps = [saved.step for saved in checkpoints.find(tmp_path)]
    assert result.selected_step not in (14, 16) and steps == [result.selected_step, 14, 16]
    card = json.loads((tmp_path / "student/student.json").read_text())["card"]["training"]
    assert card["chosen"] == "lowest loss on held-out labels" and card["step"] == result.selected_step
    chosen = load_file(checkpoints.folder_of(tmp_path, result.selected_step) / "training.safetensors")
    written = load_file(tmp_path / "student/model.safetensors")
    for name, value in student.state_dict().items():
        assert torch.equal(value, written[name]) and torch.equal(value, chosen[f"student/{name}"])


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    def rising(pred, labels, features=None, teacher_features=None):
        loss, parts = l1(pred, labels)
        if not pred.requires_grad:
            calls.append(1)
            loss = loss + len(calls)
        return loss, parts

    calls: list = []
    result, _ = run(tmp_path, objective=rising, eval_every=2, patience=2)
    assert result.step == 6 and result.selected_step == 2
    assert run(tmp_path, objective=rising, eval_every=2, patience=2)[0].step == 6


def test_averaged_weights_are_evaluated_kept_and_resumed(tmp_path):
    run(tmp_path / "a", ema=0.9, holdout=0.0)
    card = json.loads((tmp_path / "a/student/student.json").read_text())["card"]["training"]
    assert card["averaged"] and card["chosen"] == "the last step"
    tensors, written = newest(tmp_path / "a"), load_file(tmp_path / "a/student/model.safetensors")
    assert torch.equal(written["decoder.weight"], tensors["ema/module.decoder.weight"])
    assert not torch.equal(written["decoder.weight"], tensors["student/decoder.weight"])

    def stop(done, total, **numbers):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", ema=0.9, holdout=0.0, report=stop)
    run(tmp_path / "b", ema=0.9, holdout=0.0)
    assert all(torch.equal(newest(tmp_path / "b")[name], value) for name, value in tensors.items())


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


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    run(tmp_path, keep_last=3, holdout=0.0)
    last = checkpoints.folder_of(tmp_path, 20)
    weights = last / "training.safetensors"
    weights.write_bytes(b"\xff" * 32 + weights.read_bytes()[32:])
    with pytest.raises(ValueError, match=r"step-00000020/training.safetensors is damaged .*: delete .*step"):
        run(tmp_path, keep_last=3, holdout=0.0)
    shutil.rmtree(last)
    assert run(tmp_path, keep_last=3, holdout=0.0)[0].step == 20


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    run(tmp_path, keep_last=3, holdout=0.0)
    last = checkpoints.folder_of(tmp_path, 20)
    weights = last / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoints/.step-00000030.tmp").mkdir()
    assert [saved.step for saved in checkpoints.find(tmp_path)] == [10]
    result, _ = run(tmp_path, keep_last=3, holdout=0.0)
    assert result.step == 20 and [line["step"] for line in steps_of(tmp_path)] == list(range(1, 21))
    assert not (tmp_path / "checkpoints/.step-00000030.tmp").exists()


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    def full(student, folder, *, card):
        if card["training"]["step"] == 10:
            raise OSError(28, "No space left on device")
        save(student, folder, card=card)

    with pytest.raises(OSError, match=r"step-00000010: cannot be written \(.*No space left.*from step 5"):
        run(tmp_path, keep=full)
    assert [saved.step for saved in checkpoints.find(tmp_path)] == [5]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005"]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"step":2,"heldout":1.0}\n{"step":3}\n{"step":4,"lo')
    log = StepLog(path, last_step=2)
    log.write({"step": 3, "loss": math.inf, "parts": {"a": math.nan, "b": 1.0}})
    log.close()
    assert read(path)[2:] == [{"step": 2, "heldout": 1.0}, {"step": 3, "loss": None, "parts": {"a": None, "b": 1.0}}]


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, steps=4, eval_every=2, trackers=("tensorboard",))
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("heldout")] == [2, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses_of(tmp_path))
    assert "parts/shared" in events.Tags()["scalars"]


# --- the real thing, small --------------------------------------------------------------------------------------------


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

    def __getitem__(self, index: int):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return f"{self.image_keys[index]}-{index}", image, {"primary": image.mean(0)}


def real_run(out: Path, *, student=None, report=None, **given):
    student = student or real_student()
    usual = {"steps": 4, "warmup_steps": 0, "eval_every": 2, "save_every": 2, "teachers": {}, "batch_size": 4}
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


# --- alarms and refusals ----------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_stops_before_it_is_applied(tmp_path):
    dataset = Toys(poisoned=3)
    with pytest.raises(TrainingStoppedError, match=r"step (\d+): the loss is .*bad_batch_\1 \(not finite: image1-3\)"):
        run(tmp_path, dataset=dataset, holdout=0.0, save_every=1, teachers={"primary": 1.0})
    stopped = steps_of(tmp_path)[-1]["step"]
    assert checkpoints.find(tmp_path)[-1].step == stopped - 1 or stopped == 1
    assert all(value.isfinite().all() for value in newest(tmp_path).values()) if stopped > 1 else True
    folder = tmp_path / f"bad_batch_{stopped}"
    said = json.loads((folder / "process-0.json").read_text())
    bad = [i for i, image in enumerate(said["images"]) if image["loss"] is None]
    assert [said["images"][i]["key"] for i in bad] == ["image1-3"] and said["teacher"] == "primary"
    tensors = load_file(folder / "process-0.safetensors")
    assert not tensors["0/primary/shared/values"][bad[0]].isfinite().all() and len(tensors["0/images"]) == 8


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
    with pytest.raises(ValueError, match=r"lr = 0.5, not 0.01; other training data \(16 samples, not 20\)"):
        run(tmp_path, steps=4, lr=0.5, dataset=Toys(18), holdout=0.2)
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": Toys(6)}, r"^4 training samples are fewer than one batch of 8"),
        ({"accumulate": 3}, r"batch_size \(8\) must be a multiple of accumulate \(3\)"),
        ({"teachers": {}}, "the labels come from primary, assistant: say how often"),
        ({"teachers": {"primary": 1, "dav2": 1}}, r"image\d+-\d+ has no labels by dav2; the labels hold: primary"),
        ({"trackers": ("mlflaw",)}, "tracker mlflaw is not installed"),
        ({"gradient_checkpointing": True}, "no part of this student can recompute itself"),
    ],
)
def test_refusals(tmp_path, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_settings_report_every_fault_at_once():
    with pytest.raises(ValueError) as caught:
        settings(steps=0, schedule="cosin", holdout=1.5, teachers={"a": -1})
    assert [word in str(caught.value) for word in ("steps", "schedule", "holdout", "teachers", "warmup")] == [True] * 5


def test_a_sample_that_cannot_be_read_says_so_in_one_line(tmp_path):
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

    given = {"settings": settings(steps=4, teachers={}), "save": save}
    with pytest.raises(KindError, match="affine_depth cannot become affine_disparity"):
        train(Toy(), Toys(), l1, out=tmp_path / "a", collate=as_depth(Kind.AFFINE_DEPTH), **given)
    train(Toy(), Toys(), l1, out=tmp_path / "b", collate=as_depth(Kind.METRIC_DEPTH), **given)
    assert steps_of(tmp_path / "b")[0]["label_median"] == pytest.approx(1.6, abs=0.2)


# --- which part learns how fast ---------------------------------------------------------------------------------------


def test_blocks_before_the_last_learn_more_slowly():
    student = students.build(
        encoder="test_vit",
        decoder="sdt",
        encoder_options={"timm_options": {"depth": 3, "embed_dim": 32}},
        decoder_options={"fusion_channels": 16},
    )
    given = settings(layer_decay=0.5, encoder_lr=1e-3, lr=1e-2, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(student, given)
    assert set_rates(optimizer, 5, given) == {"encoder": 1e-3, "decoder": 1e-2}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in student.named_parameters() if p.requires_grad}
    assert len(names) == len(rates), "every parameter once"
    for name, rate in names.items():
        if not name.startswith("encoder."):
            assert rate == 1e-2
        elif ".blocks." in name:
            block = int(name.split(".blocks.")[1].split(".")[0])
            assert rate == pytest.approx(1e-3 * 0.5 ** (2 - block)), name
        elif "embed" in name or "token" in name:
            assert rate == pytest.approx(1e-3 * 0.5**3), name
        else:
            assert rate == 1e-3, name


def test_an_encoder_that_waits_begins_at_its_step_and_resumes_alike(tmp_path):
    first = {k: v.clone() for k, v in Toy().encoder.state_dict().items()}
    run(tmp_path / "early", steps=8, freeze_steps=8, warmup_steps=2, holdout=0.0)
    waited = newest(tmp_path / "early")
    assert all(torch.equal(waited[f"student/encoder.{k}"], v) for k, v in first.items())
    assert not any(name.startswith("optimizer/encoder") for name in waited)
    assert not torch.equal(waited["student/decoder.weight"], Toy().decoder.weight)
    result, student = run(tmp_path / "whole", freeze_steps=8)
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
    """Toys that can be asked for one teacher's labels, and remember what they were asked for."""

    def __init__(self, **given) -> None:
        super().__init__(**given)
        self.teachers, self.asked = ["primary", "assistant"], []

    def __getitem__(self, index: int):
        key, image, maps = Toys()[index]
        return key, image, maps

    def by(self, index: int, teachers):
        self.asked += teachers
        key, image, maps = self[index]
        return key, image, {name: maps[name] for name in teachers}


def test_only_the_labels_that_a_step_learns_from_are_decoded(straight, tmp_path):
    dataset = Choosing()
    run(tmp_path / "chosen", dataset=dataset)
    assert losses_of(tmp_path / "chosen") == losses_of(straight)
    used = [line["teacher"] for line in steps_of(straight) if "teacher" in line]
    assert dataset.asked == [name for name in used for _ in range(8)] and set(used) == {"primary", "assistant"}
    with pytest.raises(LookupError, match="no labels by third; the labels hold: primary, assistant"):
        run(tmp_path / "third", dataset=Choosing(), teachers={"primary": 0.99, "third": 0.01})
