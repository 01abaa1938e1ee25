"""What a checkpoint of a run holds, and going on from the newest whole one: the same run, bit for bit, or a refusal
that says why not. How it lies on disk, checkpoints.py knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.core import files, machine
from distill.core.seal import sealed
from distill.training import checkpoints
from distill.training.parallel import same_checkpoint
from distill.training.settings import CHANGEABLE, RENAMED, TrainSettings
from distill.training.step import TrainingRun, is_training_task
from distill.training.trainlog import ScaleAlarm, StepLog


def resume(run: TrainingRun, tell: Callable[[str], object]) -> None:
    """Goes on from the newest whole checkpoint, if there is one, and opens the log there."""
    if run.processes.main:
        for line in checkpoints.clean(run.out) + checkpoints.drop_damaged(run.out):
            tell(line)
    run.processes.wait()
    there = run.processes.share([saved.step for saved in checkpoints.find(run.out)])
    if there:
        same_checkpoint(run.processes, run.out, there[-1])
    saved = next(reversed(checkpoints.find(run.out)), None)
    steps = sorted(set(run.processes.gather([0 if saved is None else saved.step])))
    if len(steps) > 1:
        raise ValueError(
            f"{run.out} is another folder for other machines, and the one of the main process is older: steps {steps}; "
            "start the main process where the newest checkpoint is, or share the folder"
        )
    if saved is not None:
        check_same(run, saved)
        checkpoints.restore(saved, student=run.student, optimizer=run.optimizer, ema=run.ema)
        state = saved.state
        run.step, run.loss, run.best = saved.step, state["loss"], state["best"]
        if run.best and run.best["step"] not in there:
            run.best = None  # damaged, or it made way for one that was
        run.evaluations_since_best = state["evaluations_since_best"]
        run.alarm = ScaleAlarm(**{**state["alarm"], "growth": run.settings.alarm_growth})
    if run.processes.main:
        run.log = StepLog(run.out / "log.jsonl", last_step=run.step)
        if run.log.damaged:
            tell(f"{run.log.path}: damaged lines left out: {run.log.damaged}")
        if saved is not None and (line := _other_statistics(run)):
            tell(line)
        facts = {"processes": run.processes.count, "device": str(run.processes.device), "torch": torch.__version__}
        facts |= {"software": machine.software(), "machine": machine.device_name(str(run.processes.device))}
        facts |= {"trained_parameters": sum(p.numel() for p in run.parameters), **run.facts}
        facts |= {"settings": run.settings.as_dict(), "card": run.card}
        plain = json.loads(json.dumps(facts))  # as it will be read: the checksum is of that
        files.write_json(run.out / "run.json", sealed(plain), allow_nan=True)


def keep(run: TrainingRun) -> None:
    """Writes a checkpoint of this step: all that `resume` gives back."""
    if is_training_task(run.objective):
        run.objective.keep()
    if not run.processes.main:
        return
    assert run.log is not None
    run.log.sync()
    card = card_of(run, "a checkpoint on the way", run.step)
    checkpoints.save(
        run.out,
        state={
            "step": run.step,
            "loss": run.loss,
            "best": run.best,
            "evaluations_since_best": run.evaluations_since_best,
            "alarm": run.alarm.state(),
            **run.facts,
            "settings": run.settings.as_dict(),
        },
        student=run.student,
        optimizer=run.optimizer,
        ema=run.ema,
        save_student=lambda folder: run.save_student(run.kept, folder, card=card),
        keep_last=run.settings.keep_last,
    )


def card_of(run: TrainingRun, chosen: str, step: int) -> dict[str, Any]:
    """The student's card with how it was trained; chosen: why it is the student of this step."""
    heldout = run.best["heldout"] if run.best is not None and run.best["step"] == step else None
    facts = {"chosen": chosen, "step": step, "heldout_loss": heldout, "averaged": run.ema is not None}
    facts |= {"samples": run.facts["samples"], "settings": run.settings.as_dict()}
    return {**run.card, "training": facts}


def _other_statistics(run: TrainingRun) -> str:
    """What to know where BatchNorm sees another number of images at once than it did before this resume, or nothing."""
    try:
        before = int(json.loads((run.out / "run.json").read_bytes())["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    settings, now = run.settings, run.processes.count
    learns = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in run.student.modules())
    if not learns or settings.batchnorm != "batch" or before == now:
        return ""
    seen = [settings.batch_size // (settings.accumulate * count) for count in (before, now)]
    return (
        f"this run had {before} processes before and has {now} now: BatchNorm sees {seen[1]} images at once where it "
        f"saw {seen[0]}, and the student becomes another one than it would have; the same number of processes, "
        'student.norm = "group" or train.batchnorm = "frozen" keeps it'
    )


def check_same(run: TrainingRun, saved: checkpoints.Checkpoint) -> None:
    """ValueError where the checkpoint belongs to another run."""
    # A setting that an older checkpoint does not know had its default then.
    before = {RENAMED.get(name, name): value for name, value in saved.state["settings"].items()}
    now, then = run.settings.as_dict(), TrainSettings().as_dict() | before
    changed = [name for name in now if name not in CHANGEABLE and now[name] != then.get(name)]
    differences = [f"{name} = {now[name]!r}, not {then.get(name)!r}" for name in changed]
    if run.facts["data"] != saved.state["data"]:
        differences.append(f"other training data ({run.facts['samples']} samples, not {saved.state['samples']})")
    if run.facts["identity"] != saved.state["identity"]:
        differences.append("another recipe")
    if differences:
        raise ValueError(
            f"{run.out} holds a run of step {saved.step} that this one cannot continue: {'; '.join(differences)}. "
            f"Give it back its settings, or choose another output folder"
        )
