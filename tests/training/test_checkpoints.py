"""What a run keeps: the best and the last weights, a log, and nothing half-written."""

from __future__ import annotations

import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from distill.core.seal import sealed
from distill.training import checkpoints, trainlog
from distill.training import resume as resume_module
from distill.training.settings import CHANGEABLE, TrainSettings
from distill.training.state import Measured
from distill.training.trainlog import StepLog, number, read, read_and_count
from tests.training.toys import Toy, l1, losses_of, newest, run, save, steps_of


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
    run(tmp_path / "a", ema=0.9, val_fraction=0.0)
    card = json.loads((tmp_path / "a/student/student.json").read_text())["card"]["training"]
    assert card["averaged"] and card["chosen"] == "the last step"
    tensors, written = newest(tmp_path / "a"), load_file(tmp_path / "a/student/model.safetensors")
    assert torch.equal(written["decoder.weight"], tensors["ema/module.decoder.weight"])
    assert not torch.equal(written["decoder.weight"], tensors["student/decoder.weight"])
    kept = load_file(checkpoints.find(tmp_path / "a")[-1].folder / "student/model.safetensors")
    assert all(torch.equal(value, tensors[f"ema/module.{name}"]) for name, value in kept.items())

    def stop(done, total, **numbers):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", ema=0.9, val_fraction=0.0, report=stop)
    run(tmp_path / "b", ema=0.9, val_fraction=0.0)
    assert all(torch.equal(newest(tmp_path / "b")[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("damage", ["header", "tensors", "student", "files", "step", "digit", "nul"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    whole = run(tmp_path, keep_last=3, val_fraction=0.0)[1].state_dict()
    last = checkpoints.folder_of(tmp_path, 20)
    path = next((last / "student").glob("*.safetensors")) if damage == "student" else last / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[4 if damage == "header" else -9] ^= 64
    if damage in ("header", "tensors", "student"):
        path.write_bytes(data)
    else:
        state = json.loads((last / "state.json").read_text())
        changed = {"files": {**state, "files": None}, "step": {k: v for k, v in state.items() if k != "step"}}
        changed = {name: {k: v for k, v in table.items() if k != "sha256"} for name, table in changed.items()}
        changed["digit"] = {**state, "loss": state["loss"] + 1.0}
        text = "" if damage == "nul" else json.dumps(changed[damage])
        (last / "state.json").write_text(text or "\0" * 50)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write("\0" * 40 + "\n")
    told = []
    result, student = run(tmp_path, keep_last=3, val_fraction=0.0, tell=told.append)
    assert result.step == 20 and [line["step"] for line in steps_of(tmp_path)] == list(range(1, 21))
    assert all(torch.equal(value, whole[name]) for name, value in student.state_dict().items())
    named = path if damage in ("header", "tensors", "student") else last
    assert str(named) in told[0] and "is skipped" in told[0] and told[1].endswith("damaged lines skipped: 1")


def test_killed_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    real = shutil.rmtree

    def stop(folder, **options):
        if not (file := folder / "training.safetensors").is_file():
            return real(folder, **options)
        file.unlink()
        raise KeyboardInterrupt

    given = {"keep_last": 1, "val_fraction": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **given)
    told = []
    run(tmp_path, tell=told.append, **given)
    assert not told and [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_the_best_checkpoint_that_is_damaged_is_no_longer_the_best(tmp_path):
    def worse_later(pred, labels, features=None, teacher_features=None):
        loss, parts = l1(pred, labels)
        if not pred.requires_grad:
            calls.append(1)
        return loss + (0.0 if pred.requires_grad else float(len(calls))), parts

    def stop(done, total, **numbers):
        if done == 9:
            raise KeyboardInterrupt

    calls: list = []
    given = {"eval_every": 2, "save_every": 2, "keep_last": 1, "steps": 10, "objective": worse_later}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report=stop, **given)
    assert [saved.step for saved in checkpoints.find(tmp_path)] == [2, 8]
    path = checkpoints.folder_of(tmp_path, 2) / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 64
    path.write_bytes(data)
    told: list = []
    result, _ = run(tmp_path, tell=told.append, **given)
    assert result.selected_step == 10 and "the checkpoint of step 2 is skipped" in told[0]


@pytest.mark.parametrize(("before", "given"), [(2, {"accumulate": 2}), (1, {}), (2, {"batchnorm": "frozen"})])
def test_a_resume_on_another_number_of_processes_says_what_batchnorm_makes_of_it(tmp_path, before, given):
    def stop(done, total, **numbers):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, student=Toy(batchnorm=True), save_every=4, report=stop, **given)
    table = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**table, "processes": before}))
    told = []
    run(tmp_path, student=Toy(batchnorm=True), save_every=4, tell=told.append, **given)
    said = "this run had 2 processes before and has 1 now: BatchNorm sees 4 images at once, not 2"
    assert told[0] == "resuming at step 5 of 20"
    assert [line.startswith(said) for line in told[1:]] == ([True] if "accumulate" in given else [])


def test_a_checkpoint_of_a_newer_version_is_not_thrown_away(tmp_path):
    run(tmp_path, val_fraction=0.0)
    path = checkpoints.folder_of(tmp_path, 20) / "state.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "version": 2})))
    with pytest.raises(ValueError, match="written by a newer version"):
        run(tmp_path, val_fraction=0.0)
    assert path.exists()


def test_a_changed_line_of_the_log_is_left_out(tmp_path):
    run(tmp_path, val_fraction=0.0)
    path = tmp_path / "log.jsonl"
    text = path.read_text()
    at = text.index('"loss":') + 9
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert [line["step"] for line in read(path)] == list(range(2, 21)) and read_and_count(path)[1] == 1


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    run(tmp_path, keep_last=3, val_fraction=0.0)
    last = checkpoints.folder_of(tmp_path, 20)
    weights = last / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for name in (".step-00000030.tmp", ".step-00000030.partial", "photos of mine"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [saved.step for saved in checkpoints.find(tmp_path)] == [10]
    result, _ = run(tmp_path, keep_last=3, val_fraction=0.0)
    assert result.step == 20 and [line["step"] for line in steps_of(tmp_path)] == list(range(1, 21))
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert there == ["photos of mine", "step-00000010", "step-00000020"]


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


def test_a_long_log_is_cut_back_without_being_held_in_memory(tmp_path, monkeypatch):
    path, live, most = tmp_path / "log.jsonl", weakref.WeakSet(), []
    path.write_text("".join(f'{{"step":{step}}}\n' for step in range(1, 101)) + "damaged\n")

    class Line(dict):
        __hash__ = object.__hash__

    def parsed(text):
        if (line := real(text)) is None:
            return None
        live.add(kept := Line(line))
        most.append(len(live))
        return kept

    real = trainlog._line
    monkeypatch.setattr(trainlog, "_line", parsed)
    log = StepLog(path, last_step=90)
    log.close()
    assert log.damaged == 1 and len(most) == 100 and max(most) <= 2
    assert [line["step"] for line in read(path)] == [*range(1, 91)]


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, steps=4, eval_every=2, trackers=("tensorboard",))
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("heldout")] == [2, 4]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses_of(tmp_path))
    assert "parts/shared" in events.Tags()["scalars"]


def test_a_run_that_is_over_says_again_what_it_said_and_takes_a_new_limit_for_its_alarm(tmp_path, monkeypatch):
    given = {"steps": 4, "save_every": 2, "val_fraction": 0.0}
    first, _ = run(tmp_path, **given)
    kept = []
    monkeypatch.setattr(resume_module, "check_same", lambda made, saved: kept.append(made))
    again, _ = run(tmp_path, alarm_growth=77.0, **given)
    assert (again.loss, again.step) == (first.loss, 4) and math.isfinite(again.loss)
    state = checkpoints.find(tmp_path)[-1].state["alarm"]
    assert kept[0].alarm.growth == 77.0 and kept[0].alarm.state() == {**state, "growth": 77.0} and state["smoothed"] > 0


def test_a_line_of_the_log_is_there_once_it_is_written(tmp_path, monkeypatch):
    """Whoever is killed next; and on the disk before a checkpoint that goes on from it."""
    log, synced = StepLog(tmp_path / "log.jsonl", last_step=0), []
    log.write({"step": 1, "loss": 2.0})
    assert read(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2.0}]
    monkeypatch.setattr("distill.training.trainlog.os.fsync", synced.append)
    log.sync()
    log.write({"step": 2, "loss": 1.0})
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert len(synced) == 1
    assert number(log.path, "loss", relative=True) == 0.25 and number(log.path, "loss") == 0.5
    StepLog(log.path, last_step=2).close()
    assert [line["step"] for line in read(log.path)] == [1, 2]
    fresh = StepLog(log.path, last_step=0)
    fresh.write({"step": 0, "heldout": 3.0})
    fresh.close()
    StepLog(log.path, last_step=0).close()  # a run without a checkpoint evaluates again before its first step
    assert read(log.path) == []


def test_another_machine_gets_every_byte_of_a_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "main", steps=4, save_every=2, val_fraction=0.0)
    monkeypatch.setattr(checkpoints, "_PIECE", 100)
    sent = []
    checkpoints.hand_out(tmp_path / "main", 4, share=lambda value: sent.append(value) or value, main=True, writes=True)
    arriving = iter(sent)
    checkpoints.hand_out(tmp_path / "other", 4, share=lambda value: next(arriving), main=False, writes=True)
    theirs, ours = (checkpoints.folder_of(tmp_path / name, 4) for name in ("main", "other"))
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file()) and len(names) == 4
    assert all((theirs / name).read_bytes() == (ours / name).read_bytes() for name in names)
    assert checkpoints.find(tmp_path / "other")[0].step == 4 and len(sent) > 20


def test_what_a_checkpoint_will_take_is_the_student_twice_and_two_numbers_for_all_that_learns():
    student = Toy()
    assert checkpoints.bytes_of(student) == 4 * 4 * 27
    student.encoder.requires_grad_(False)
    assert checkpoints.bytes_of(student) == 4 * (2 * 27 + 2 * 19)


def test_the_log_and_all_else_that_was_computed_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(StepLog, "sync", lambda log: done.append("log"))
    real = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *given, **named: done.append("save") or real(*given, **named))

    class Task:
        def __call__(self, module, micro, *, precision):
            pred = module(micro.images)
            return Measured(pred.abs().mean((1, 2)), {}, pred)

        def keep(self):
            done.append("task")

    run(tmp_path, objective=Task(), steps=4, save_every=2, val_fraction=0.0)
    assert done[:6] == ["task", "log", "save"] * 2


def test_a_checkpoint_of_before_a_setting_was_there_had_its_default(tmp_path):
    given = {"steps": 4, "save_every": 4, "val_fraction": 0.0}
    run(tmp_path, **given)
    path = checkpoints.folder_of(tmp_path, 4) / "state.json"
    state = json.loads(path.read_text())
    defaults = TrainSettings().as_dict()
    kept = {k: v for k, v in state["settings"].items() if k in CHANGEABLE or v != defaults[k]}
    assert 10 < len(kept) < len(state["settings"]) - 5
    path.write_text(json.dumps(sealed({**state, "settings": kept})))
    assert run(tmp_path, **given)[0].step == 4
    with pytest.raises(ValueError, match="rotation = 5.0, not 0.0"):
        run(tmp_path, **given, rotation=5.0)
