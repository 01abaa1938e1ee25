"""The training loop; only this module and `parallel` import accelerate.

One step learns from one global batch, however many processes and micro-batches share it: losses are per image and
averaged over the global batch, so 1 x 8 = 2 x 4 = 1 x 4 accumulated twice. Order, teacher, rate, augmentation and
dropout seed are pure functions of (seed, step), so a resumed run equals an uninterrupted one, bit for bit on a CPU with
the same number of threads. Only batch statistics and dropout depend on how a batch was split: see `batchnorm`.

It uses accelerate for processes, devices, gradient exchange and trackers. It prepares neither the loader (ours is
already split by process) nor a scheduler (it would step once per process); autocast covers the student, never the loss.

<out>/ holds log.jsonl (training.trainlog), checkpoints/ (training.checkpoints), run.json, tensorboard/ and, at the end,
student/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from distill.core.progress import Report
from distill.shards import shards
from distill.shards.features import FeatureStore
from distill.students import checkpoint
from distill.training import checkpoints
from distill.training.batches import Collate, Labelled, MicroBatch, check_teachers
from distill.training.heldout import HeldOutSamples, evaluate, is_best, split
from distill.training.loading import explain_dead_workers, training_batches
from distill.training.parallel import (
    accelerator_of,
    explain_lost_process,
    new_run,
    open_trackers,
    reproducible,
    same_checkpoint,
)
from distill.training.resume import card_of, keep, resume
from distill.training.sampling import MicroBatchPositions, Order, fingerprint, make_order
from distill.training.schedule import in_steps
from distill.training.settings import TrainSettings
from distill.training.state import ObjectiveLike, TrainingRun, TrainingTask, set_mode
from distill.training.step import TrainingStoppedError, take_step
from distill.training.stopping import StopNotice, Stopped
from distill.training.stored import stored_batches

__all__ = ["TrainResult", "TrainSettings", "TrainingStoppedError", "train"]

REPORTED = ("loss", "lr", "grad_norm", "output_median", "output_deviation", "images_per_s", "data_wait")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. folder: the student of `selected_step`: the best by held-out loss, or the last.

    loss: of the last step; heldout: the lowest held-out loss, None without held-out samples. images_per_s and data_wait
    (the fraction of the time spent waiting for data) are means over the steps done by this call, 0 if there was none.
    """

    step: int
    selected_step: int
    loss: float
    heldout: float | None
    folder: Path
    log: Path
    images_per_s: float
    data_wait: float


def train(
    student: nn.Module,
    dataset: Labelled,
    objective: ObjectiveLike | TrainingTask,
    *,
    out: Path,
    settings: TrainSettings,
    collate: Collate = shards.collate,
    heldout: Labelled | None = None,
    reference: nn.Module | None = None,
    card: Mapping[str, Any] | None = None,
    identity: str = "",
    save: Callable[..., object] = checkpoint.save,
    report: Report | None = None,
    tell: Callable[[str], object] | None = None,
    device: torch.device | str | None = None,
    features: FeatureStore | None = None,
) -> TrainResult:
    """Trains `student` on the labels of `dataset`, resuming from the newest whole checkpoint under `out`.

    student: as students.Student: images (B,3,H,W) in [0,1] to (B,H,W); parameters under .encoder and .decoder. It ends
    up holding the weights in out/student.
    objective: computes losses from its maps; or a TrainingTask, which calls a network of another kind itself.
    heldout: labels that select the checkpoint; None: `settings.val_fraction` of the dataset's images, from all sources
    that are trained on.
    reference: a frozen encoder for feature alignment; then student(images, with_features=True) must return (pred,
    features), and the objective also gets reference(images)[-1][0].
    card: plain values about where the student comes from; "training" is added. identity: a hash of whatever else
    defines the run (recipe, labels): resuming with another one is refused.
    save: called as save(student, folder, card=...). report(step, steps, **numbers), tell(a message for the user):
    called by the main process only. device: where to train ("cpu", "cuda:1"); None: the launcher's choice, or a GPU.
    features: the encoder's stored features, where settings.cache_features.

    Raises ValueError for settings, data or a folder that do not fit, TrainingStoppedError for a number that is not
    finite, OSError for a failed read or write; earlier checkpoints stay. Ctrl-C and SIGTERM wait for the end of a step
    and a checkpoint (training.stopping).
    """
    out = Path(out)
    _check(objective, settings, features, reference)
    accelerator = accelerator_of(student, settings, out, device=device)
    used, validation = split(dataset, heldout, settings)
    order = _order(dataset, used, settings)
    settings = in_steps(settings, len(order.indices))
    batches = _positions(accelerator, order, settings)
    lock = checkpoints.locked(out) if accelerator.is_main_process else contextlib.nullcontext()
    facts = {"identity": identity, "samples": len(used), "data": fingerprint(dataset.image_keys, used)}
    with reproducible(settings.deterministic), lock, explain_dead_workers(), explain_lost_process():
        parts = {"objective": objective, "reference": reference, "features": features, "facts": facts}
        run = new_run(student, accelerator, settings, out=out, save_student=save, card=dict(card or {}), **parts)
        try:
            resume(run, tell or (lambda line: None))
            open_trackers(accelerator, settings, name=out.name, step=run.step)
            micros = _micros(run, dataset, batches.after(run.step), collate)
            # Closed here, because a stored traceback would otherwise keep it and its worker processes alive.
            with contextlib.closing(micros), StopNotice(tell if run.processes.main else None) as notice:
                run.told_to_stop = lambda: notice.given
                _loop(run, micros, HeldOutSamples(dataset if heldout is None else heldout, validation, collate), report)
                _obey(run, tell)
            return _finish(run)
        finally:
            if run.log:
                run.log.close()
            # Not accelerator.end_training(): it ends the process group too, and an ablation's next run needs it.
            for tracker in accelerator.trackers:
                tracker.finish()


def _check(
    objective: object, settings: TrainSettings, features: FeatureStore | None, reference: nn.Module | None
) -> None:
    if isinstance(objective, nn.Module) and any(p.requires_grad for p in objective.parameters()):
        raise ValueError("the objective has trainable parameters, which no optimizer would update; freeze them")
    if settings.cache_features != (features is not None) or (features is not None and reference is not None):
        raise ValueError("cache_features = true needs stored features (and the reverse), without a reference encoder")


def _positions(accelerator: Accelerator, order: Order, settings: TrainSettings) -> MicroBatchPositions:
    """This process's share of the stream."""
    return MicroBatchPositions(
        order=order,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        steps=settings.steps,
    )


def _order(dataset: Labelled, kept: Sequence[int], settings: TrainSettings) -> Order:
    weights, temperature = settings.source_weights, settings.source_temperature
    even = settings.batch_size if settings.even_batches else 0
    return make_order(kept, dataset.sources, seed=settings.seed, weights=weights, temperature=temperature, even=even)


def _micros(
    run: TrainingRun, dataset: Labelled, positions: MicroBatchPositions, collate: Collate
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches, decoded on the GPU if it has one and the dataset stores codes, else on the host."""
    s, device, features = run.settings, run.processes.device, run.features
    if device.type == "cuda" and collate is shards.collate and getattr(dataset, "stores_codes", False):
        check_teachers(dataset, positions.order.indices, s)
        return stored_batches(dataset, positions, settings=s, device=device, features=features)
    return training_batches(dataset, positions, collate=collate, settings=s, features=features)


# --- the loop ---------------------------------------------------------------------------------------------------------


def _loop(run: TrainingRun, micros: Iterator[MicroBatch], held: HeldOutSamples, report: Report | None) -> None:
    s = run.settings
    if run.step == 0 and s.eval_start and held.indices:
        _write(run, evaluate(run, held))
    set_mode(run)
    while not _is_over(run) and not run.stopping:
        if run.step == s.freeze_steps:
            set_mode(run)
        line = take_step(run, micros)
        run.step += 1
        last = run.step == s.steps
        if line is not None:
            run.loss = line["loss"]
            _log_step(run, line, last=last)
        better = False
        if held.indices and (last or (s.eval_every and run.step % s.eval_every == 0)):
            evaluation = evaluate(run, held)
            better = is_best(run, evaluation)
            _write(run, evaluation)
            set_mode(run)
        due = s.save_every and run.step % s.save_every == 0
        if better or last or due or run.stopping or _out_of_patience(run):
            keep(run)
        if report and run.processes.main and line is not None:
            report(run.step, s.steps, **_reported(run, line))


def _reported(run: TrainingRun, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step that are shown while it trains."""
    shown = {name: line[name] for name in REPORTED} | ({} if run.best is None else {"heldout": run.best["heldout"]})
    shown |= {f"parts/{name}": value for name, value in line["parts"].items()}
    return shown | ({"memory_bytes": line["memory"] * 2**30} if "memory" in line else {})


def _log_step(run: TrainingRun, line: Mapping[str, Any], *, last: bool) -> None:
    """Writes a step's line to the log if it is due, and passes it to the alarm."""
    if run.step % run.settings.log_every == 0 or last:
        _write(run, line)
    output, labels = line["output_deviation"], line["label_deviation"]
    warmup_end = max(1, run.settings.warmup_steps)
    alarm = run.alarm.watch(run.step, output, label_deviation=labels, warmup_end=warmup_end)
    if alarm and run.log:
        run.log.write({"step": run.step, "alarm": alarm})


def _out_of_patience(run: TrainingRun) -> bool:
    return 0 < run.settings.patience <= run.evaluations_since_best


def _is_over(run: TrainingRun) -> bool:
    return run.step == run.settings.steps or _out_of_patience(run)


def _obey(run: TrainingRun, tell: Callable[[str], object] | None) -> None:
    """Ends a run that was told to stop, in its last step too, where others would wait for a process that was told."""
    if not _is_over(run):
        run.processes.wait()
        if tell and run.processes.main:
            tell(f"a checkpoint of step {run.step} is written")
    elif run.processes.count == 1 or not any(run.processes.gather([run.told_to_stop()])):
        return
    raise Stopped


def _write(run: TrainingRun, line: Mapping[str, Any]) -> None:
    if run.log:
        run.log.write(line)
    if run.settings.trackers:
        flat = {name: value for name, value in line.items() if isinstance(value, float)}
        flat |= {f"parts/{name}": value for name, value in line.get("parts", {}).items()}
        run.processes.track(flat, line["step"])


def _finish(run: TrainingRun) -> TrainResult:
    """Writes out/student from the selected checkpoint, and leaves its weights in the student."""
    run.processes.wait()
    step = run.step if run.best is None else int(run.best["step"])
    chosen = "the last step" if run.best is None else "lowest loss on held-out labels"
    same_checkpoint(run.processes, run.out, step)
    saved = next(candidate for candidate in checkpoints.find(run.out) if candidate.step == step)
    checkpoints.load_weights(saved, run.student, averaged=run.ema is not None)
    run.student.eval()
    folder = run.out / "student"
    if run.processes.main:
        run.save_student(run.student, folder, card=card_of(run, chosen, step))
    run.processes.wait()
    return TrainResult(
        step=run.step,
        selected_step=step,
        loss=run.loss,
        heldout=None if run.best is None else run.best["heldout"],
        folder=folder,
        log=run.out / "log.jsonl",
        images_per_s=run.steps_here * run.settings.batch_size / run.seconds if run.seconds else 0.0,
        data_wait=run.waited / run.seconds if run.seconds else 0.0,
    )
