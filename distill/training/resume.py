"""The content of a run's checkpoints, and resuming from the newest whole one: the same run, bit for bit, or an error
that says why not. checkpoints.py has their layout on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.core import files, machine
from distill.core.seal import sealed
from distill.core.wording import counted
from distill.training import checkpoints
from distill.training.parallel import same_checkpoint
from distill.training.settings import CHANGEABLE, RENAMED, TrainSettings
from distill.training.state import TrainingRun, is_training_task
from distill.training.trainlog import ScaleAlarm, StepLog


def resume(run: TrainingRun, tell: Callable[[str], object]) -> None:
    """Restores the newest whole checkpoint, if there is one, and opens the log at its step."""
    if run.processes.main:
        for line in checkpoints.clean(run.out) + checkpoints.drop_damaged(run.out):
            tell(line)
    run.processes.wait()
    steps_on_disk = run.processes.share([saved.step for saved in checkpoints.find(run.out)])
    if steps_on_disk:
        same_checkpoint(run.processes, run.out, steps_on_disk[-1])
    saved = next(reversed(checkpoints.find(run.out)), None)
    steps = sorted(set(run.processes.gather([0 if saved is None else saved.step])))
    if len(steps) > 1:
        raise ValueError(
            f"{run.out} is not the same folder on all machines, and the main process's has an older step ({steps}): "
            "start the main process where the newest checkpoint is, or share the folder"
        )
    if saved is not None:
        check_same(run, saved)
        checkpoints.restore(saved, student=run.student, optimizer=run.optimizer, ema=run.ema)
        state = saved.state
        run.step, run.loss, run.best = saved.step, state["loss"], state["best"]
        if run.best and run.best["step"] not in steps_on_disk:
            run.best = None  # damaged, or pruned in favour of a better one that was damaged
        run.evaluations_since_best = state["evaluations_since_best"]
        run.alarm = ScaleAlarm(**{**state["alarm"], "growth": run.settings.alarm_growth})
    if run.processes.main:
        run.log = StepLog(run.out / "log.jsonl", last_step=run.step)
        if run.log.damaged:
            tell(f"{run.log.path}: damaged lines skipped: {run.log.damaged}")
        if saved is not None and run.step < run.settings.steps:
            tell(f"resuming at step {run.step} of {run.settings.steps}")
        if saved is not None and (line := _batchnorm_warning(run)):
            tell(line)
        facts = {"processes": run.processes.count, "device": str(run.processes.device), "torch": torch.__version__}
        facts |= {"software": machine.software(), "machine": machine.device_name(str(run.processes.device))}
        facts |= {"trained_parameters": sum(p.numel() for p in run.parameters), **run.facts}
        facts |= {"settings": run.settings.as_dict(), "card": run.card}
        as_read = json.loads(json.dumps(facts))  # the checksum is computed on what readers parse
        files.write_json(run.out / "run.json", sealed(as_read), allow_nan=True)


def keep(run: TrainingRun) -> None:
    """Writes a checkpoint of this step, with everything that `resume` restores."""
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
        save_student=lambda folder: run.save_student(run.evaluated_network, folder, card=card),
        keep_last=run.settings.keep_last,
    )


def card_of(run: TrainingRun, chosen: str, step: int) -> dict[str, Any]:
    """The student's card with its training facts; chosen: why this step's student was selected."""
    heldout = run.best["heldout"] if run.best is not None and run.best["step"] == step else None
    facts = {"chosen": chosen, "step": step, "heldout_loss": heldout, "averaged": run.ema is not None}
    facts |= {"samples": run.facts["samples"], "settings": run.settings.as_dict()}
    return {**run.card, "training": facts}


def _batchnorm_warning(run: TrainingRun) -> str:
    """A message where BatchNorm sees another number of images at once than before this resume, else ""."""
    try:
        before = int(json.loads((run.out / "run.json").read_bytes())["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    settings, now = run.settings, run.processes.count
    has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in run.student.modules())
    if not has_batchnorm or settings.batchnorm != "batch" or before == now:
        return ""
    seen = [settings.batch_size // (settings.accumulate * count) for count in (before, now)]
    return (
        f"this run had {counted(before, 'process', 'processes')} before and has {now} now: BatchNorm sees "
        f"{counted(seen[1], 'image')} at once, not {seen[0]}, so results will differ; to avoid this, use the same "
        'number of processes, student.norm = "group" or train.batchnorm = "frozen"'
    )


def check_same(run: TrainingRun, saved: checkpoints.Checkpoint) -> None:
    """Raises ValueError where the checkpoint belongs to another run."""
    # A setting that is missing in an older checkpoint had its default then.
    saved_settings = {RENAMED.get(name, name): value for name, value in saved.state["settings"].items()}
    now, then = run.settings.as_dict(), TrainSettings().as_dict() | saved_settings
    changed = [name for name in now if name not in CHANGEABLE and now[name] != then.get(name)]
    differences = [f"{name} = {now[name]!r}, not {then.get(name)!r}" for name in changed]
    if run.facts["data"] != saved.state["data"]:
        differences.append(f"other training data (samples: {run.facts['samples']}, not {saved.state['samples']})")
    if run.facts["identity"] != saved.state["identity"]:
        differences.append("another recipe")
    if differences:
        raise ValueError(
            f"{run.out} holds a run, at step {saved.step}, that this one cannot continue: {'; '.join(differences)}. "
            f"Restore its settings, or choose another output folder; to train its student further there, "
            f"student.init_from = {str(run.out)!r}"
        )
