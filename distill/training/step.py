"""One optimizer step: from the micro-batches of a global batch to changed weights and a line of the log.

Losses are per image and are averaged here alone, over the global batch. The student runs under autocast, the objective
never does. A loss or gradient that is not finite stops the run before anything is applied.
Shapes: B images of a micro-batch, H, W.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distill.core.crops import generator
from distill.core.labels import Labels
from distill.shards.features import FeatureStore
from distill.training.batches import MicroBatch
from distill.training.schedule import set_rates
from distill.training.settings import TrainSettings
from distill.training.trainlog import ScaleAlarm, StepLog, dump_batch, map_statistics

STATISTICS = ("output_median", "output_deviation", "label_median", "label_deviation", "labelled")


class TrainingStoppedError(ValueError):
    """A loss or gradient was not finite; the message names the step and where the batch was written."""


class ObjectiveLike(Protocol):
    """losses.objective.Objective, or anything with its signature: the total (B,) and its named parts, each (B,)."""

    def __call__(
        self, pred: Tensor, labels: Labels, features: Tensor | None, teacher_features: Tensor | None, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: (B,H,W) float32; features of the student and of the reference encoder, where there is one."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What a micro-batch of B images says. losses: (B,). parts: by name, as many values as images that it speaks of.

    pred: (B,H,W), what is predicted; target, valid: (B,H,W), what it should be; None: the labels' own maps. For the log
    alone. All float32. taught: (B,) bool, the images whose loss says anything; None: all.
    """

    losses: Tensor
    parts: dict[str, Tensor]
    pred: Tensor
    target: Tensor | None = None
    valid: Tensor | None = None
    taught: Tensor | None = None


class TrainingTask(Protocol):
    """How a network of another kind than images to maps is trained: what `measure` does, in its own way."""

    def __call__(self, module: nn.Module, micro: MicroBatch, /, *, precision: str) -> Measured:
        """module: the network as it is called in training, wrapped perhaps. Draws are functions of micro.positions."""
        ...

    def keep(self) -> None:
        """Brings to the disk whatever was computed beside the weights; called before each checkpoint."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The processes of a run as a step sees them.

    add: sums a tensor over all; gather: joins their lists; share: gives all the main one's value; wait: for all.
    without_exchange: a backward pass under it keeps its gradient to itself. track: hands numbers to the trackers.
    """

    index: int
    count: int
    device: torch.device
    add: Callable[[Tensor], Tensor]
    gather: Callable[[list[Any]], list[Any]]
    share: Callable[[Any], Any]
    wait: Callable[[], None]
    without_exchange: Callable[[nn.Module], AbstractContextManager[Any]]
    track: Callable[[Mapping[str, float], int], None]

    @property
    def main(self) -> bool:
        """True in the one process that writes."""
        return self.index == 0


@dataclass(slots=True, kw_only=True)
class TrainingRun:
    """One process's view of a run. `model` is what is called in training, `student` the bare network inside it."""

    processes: Processes
    settings: TrainSettings
    out: Path
    student: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    reference: nn.Module | None
    objective: ObjectiveLike | TrainingTask
    alarm: ScaleAlarm
    save_student: Callable[..., object]
    features: FeatureStore | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    log: StepLog | None = None
    step: int = 0
    loss: float = math.nan
    best: dict[str, Any] | None = None
    evaluations_since_best: int = 0
    names: tuple[str, ...] = ()
    seconds: float = 0.0
    waited: float = 0.0
    steps_here: int = 0
    broken: Tensor | None = None
    told: tuple[float, float, int] = (0.0, 0.0, 0)

    def since(self, seconds: float, waited: float) -> tuple[float, float, int]:
        """Seconds, those of waiting for data, and steps since this was last asked; of this step where it is alone."""
        before, self.told = self.told, (self.seconds, self.waited, self.steps_here)
        if self.steps_here - before[2] <= 1:
            return seconds, waited, 1
        return self.seconds - before[0], self.waited - before[1], self.steps_here - before[2]

    @property
    def kept(self) -> nn.Module:
        """The weights that are evaluated and kept."""
        return self.student if self.ema is None else self.ema.module

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def make_ready(student: nn.Module, settings: TrainSettings, *, device: torch.device, processes: int) -> None:
    """Freezes, converts and moves the student as the settings say; ValueError where it cannot be done."""
    if settings.freeze_encoder:
        encoder = student.encoder
        assert isinstance(encoder, nn.Module)
        encoder.requires_grad_(False)
        if callable(freeze := getattr(encoder, "freeze", None)):
            freeze()  # an Encoder records that it is frozen, so that its folder may leave it out
    if settings.gradient_checkpointing:
        able = [m for m in student.modules() if callable(getattr(m, "set_grad_checkpointing", None))]
        if not able:
            raise ValueError("gradient_checkpointing: no part of this student can recompute itself; switch it off")
        able[0].set_grad_checkpointing(True)  # type: ignore[operator]
    student.to(device)
    if settings.channels_last:
        student.to(memory_format=torch.channels_last)
    if settings.batchnorm == "sync" and processes > 1:
        if device.type != "cuda":
            raise ValueError('batchnorm = "sync" needs CUDA; take "frozen", or a student without BatchNorm')
        nn.SyncBatchNorm.convert_sync_batchnorm(student)


def set_mode(run: TrainingRun) -> None:
    """Training mode, except for what is frozen; called again where that changes."""
    run.student.train()
    early = run.step < run.settings.freeze_steps
    if run.settings.freeze_steps:
        for group in run.optimizer.param_groups:
            if group["name"].startswith("encoder"):
                for p in group["params"]:
                    p.requires_grad_(not early)
    if run.settings.freeze_encoder or early:
        encoder = run.student.encoder
        assert isinstance(encoder, nn.Module)
        encoder.eval()
    if run.settings.batchnorm == "frozen":
        for module in run.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def take_step(run: TrainingRun, micros: Iterator[MicroBatch]) -> dict[str, Any] | None:
    """One optimizer step on the next `accumulate` micro-batches: its line of the log.

    On a GPU a step without a line waits for nothing and gives None. Raises TrainingStoppedError, before anything is
    applied, where the loss or the gradient is not finite; after steps without a line, where one of theirs was not.
    """
    s, processes = run.settings, run.processes
    start, waited = time.perf_counter(), 0.0
    rates = set_rates(run.optimizer, run.step, s)
    run.optimizer.zero_grad(set_to_none=True)
    seen: list[tuple[MicroBatch, Tensor]] = []
    sums: dict[str, Tensor] = {}
    told = _has_line(run)
    for part in range(s.accumulate):
        before = time.perf_counter()
        micro = next(micros)
        waited += time.perf_counter() - before if micro.waited is None else micro.waited
        micro = micro.to(processes.device)
        # After the data: reading draws from the same generator.
        _seed(int(generator("step", s.seed, run.step, processes.index, part).integers(2**62)), processes.device)
        last = part == s.accumulate - 1
        with contextlib.nullcontext() if last else processes.without_exchange(run.model):
            found = _learn(run, micro)
        losses = found.losses.detach()
        seen.append((micro, losses))
        for name, value in (_measured(run, micro, found) if told else {}).items():
            sums[name] = sums[name] + value if name in sums else value
    parameters = run.parameters
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    line = None
    if processes.device.type == "cuda":
        _guard(run, norm)
    if told:
        line = _line(run, _reduce(run, sums, norm), rates=rates)
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            _stop(run, line, seen)
    if s.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, s.clip_norm, norm)
    run.optimizer.step()
    if run.ema is not None:
        run.ema.update_parameters(run.student)
    if run.step == 0 and run.log:
        idle = [name for name, p in run.student.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            run.log.write({"step": 1, "without_gradient": idle})
    seconds = time.perf_counter() - start
    run.seconds, run.waited, run.steps_here = run.seconds + seconds, run.waited + waited, run.steps_here + 1
    if line is None:
        return None
    if processes.device.type == "cuda":
        line["memory"] = torch.cuda.max_memory_allocated(processes.device) / 2**30
    # Of the steps since the last line, for one that waits for nothing is over before its work is.
    seconds, waited, steps = run.since(seconds, waited)
    rate = s.batch_size * steps / seconds
    return line | {"images_per_s": rate, "data_wait": waited / seconds, "seconds": seconds / steps}


def _has_line(run: TrainingRun) -> bool:
    """Whether this step has a line, and so waits for the device and looks at its numbers itself; off a GPU all have.

    So has one that a checkpoint or an evaluation follows: a run that goes on there must not have left out steps.
    """
    s, number = run.settings, run.step + 1
    looked_at = (every for every in (s.log_every, s.save_every, s.eval_every) if every)
    return run.processes.device.type != "cuda" or number == s.steps or any(number % every == 0 for every in looked_at)


def _guard(run: TrainingRun, norm: Tensor) -> None:
    """Lets the optimizer's kernel change nothing from the first gradient on that is not finite; of steps without a
    line nobody else looks at it, and the norm of the next line then tells.
    """
    broken = (~torch.isfinite(norm)).float()
    run.broken = broken if run.broken is None else torch.maximum(run.broken, broken)
    run.optimizer.found_inf = run.broken  # type: ignore[attr-defined]
    norm.copy_(torch.where(run.broken > 0, torch.nan, norm))


def _seed(seed: int, device: torch.device) -> None:
    """Seeds dropout. torch.manual_seed would queue a call, with its stack, for every backend that is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def is_training_task(objective: ObjectiveLike | TrainingTask) -> TypeGuard[TrainingTask]:
    """Whether the objective calls the network itself."""
    return callable(getattr(objective, "keep", None))


def measure(run: TrainingRun, module: nn.Module, micro: MicroBatch) -> Measured:
    """The objective's losses and parts on a micro-batch, and the prediction; all float32.

    Each supervision's images are measured by themselves; a part has as many values as images that it says anything of.
    """
    objective = run.objective
    if is_training_task(objective):
        return objective(module, micro, precision=run.settings.precision)
    images = micro.images
    if run.settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    features = wanted = None
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
        if micro.features is not None:
            pred = module(images, features=[(patch.float(), cls.float()) for patch, cls in micro.features])
        elif run.reference is None:
            pred = module(images)
        else:
            pred, features = module(images, with_features=True)
            features = features.float()
            with torch.no_grad():
                wanted = run.reference(images)[-1][0].float()
    pred = pred.float()
    measured, plain, known = [], cast(ObjectiveLike, objective), []
    for one in micro.taught:
        mine = [None if values is None else one.of(values) for values in (features, wanted)]
        losses, parts = plain(one.of(pred), one.labels, mine[0], mine[1])
        if losses.shape != one.of(images).shape[:1]:
            raise ValueError(
                f"the objective must return one loss per image, ({len(one.of(images))},), not {tuple(losses.shape)}"
            )
        measured.append((losses, parts))
        if not module.training:  # what nobody asks of a step costs it nothing
            known.append(one.labels.known | (losses.detach() != 0))  # features teach without a label
    if len(measured) == 1:
        return Measured(*measured[0], pred, taught=known[0] if known else None)
    places = torch.cat([one.rows for one in micro.taught if one.rows is not None]).argsort()
    joined = {name: torch.cat([p[name] for _, p in measured if name in p]) for _, parts in measured for name in parts}
    losses = torch.cat([losses for losses, _ in measured])[places]
    return Measured(losses, joined, pred, taught=torch.cat(known)[places] if known else None)


def _learn(run: TrainingRun, micro: MicroBatch) -> Measured:
    """Adds a micro-batch's gradient; returns what was measured on it."""
    found = measure(run, run.model, micro)
    # Gradients are averaged over processes, so each contributes its sum over the global batch times their number; no
    # number at all where the loss is not finite: |x - inf| has a finite gradient, and a GPU looks at nothing else.
    total = found.losses.sum()
    (total * (run.processes.count / run.settings.batch_size + 0.0 * total.detach())).backward()
    return found


def _measured(run: TrainingRun, micro: MicroBatch, found: Measured) -> dict[str, Tensor]:
    """The sums over a micro-batch's images of all that is logged."""
    losses = found.losses.detach()
    measured = {"loss": losses.double().sum()} | _statistics(run, micro, found)

    def count(values: Tensor) -> Tensor:
        return torch.full((), len(values), dtype=torch.float64, device=losses.device)  # new_tensor would wait

    for name, value in found.parts.items():
        measured[f"parts/{name}"] = value.detach().double().sum()
        measured[f"images/parts/{name}"] = count(value)
    for one in micro.taught:
        mine = one.of(losses).double()
        for name, total in ((f"teachers/{one.teacher}", mine.sum()), (f"images/{one.teacher}", count(mine))):
            measured[name] = measured[name] + total if name in measured else total
    return measured


def _statistics(run: TrainingRun, micro: MicroBatch, found: Measured) -> dict[str, Tensor]:
    """The sums of what the log says of outputs and labels; labels that know less than the student have another size."""
    output = map_statistics(found.pred)
    if found.target is not None:
        return dict(zip(STATISTICS, [*output[:2], *map_statistics(found.target, found.valid)], strict=True))
    label = torch.zeros_like(output)
    for one in micro.taught:
        shared = one.labels.shared
        if len(micro.taught) == 1 or shared.kind == run.settings.kind:
            label = label + map_statistics(shared.values, shared.valid)
    return dict(zip(STATISTICS, [output[0], output[1], *label], strict=True))


def _reduce(run: TrainingRun, sums: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
    """The sums over all processes, and the gradient's norm, which they share: the one wait for the device in a step."""
    zero = torch.zeros((), dtype=torch.float64, device=norm.device)
    while True:
        fresh = [name for name in sums if name not in run.names]
        vector = torch.stack([zero + len(fresh), *(sums.get(name, zero) for name in run.names)])
        total = torch.cat([run.processes.add(vector), norm.detach().double().reshape(1)]).tolist()
        if total[0] == 0:
            return dict(zip(run.names, total[1:-1], strict=True)) | {"grad_norm": total[-1]}
        # A name that some process has not met yet (in the first step: all). All agree on the list and go again.
        run.names = tuple(sorted({*run.names, *run.processes.gather(fresh)}))


def _line(run: TrainingRun, sums: Mapping[str, float], *, rates: Mapping[str, float]) -> dict[str, Any]:
    images, labelled = run.settings.batch_size, max(1.0, sums["labelled"])
    # A name that an earlier step met stays in the sums.
    taught = {n.removeprefix("teachers/"): v for n, v in sums.items() if n.startswith("teachers/")}
    taught = {name: loss / sums[f"images/{name}"] for name, loss in taught.items() if sums[f"images/{name}"]}
    parts = {n.removeprefix("parts/"): v for n, v in sums.items() if n.startswith("parts/")}
    counts = {name: sums[f"images/parts/{name}"] for name in parts}
    by_teacher = {"teachers": {n: {"loss": loss, "images": int(sums[f"images/{n}"])} for n, loss in taught.items()}}
    return {
        "step": run.step + 1,
        "loss": sums["loss"] / images,
        "lr": rates["decoder"],  # and of a UNet
        "encoder_lr": rates["encoder"],
        "parts": {name: value / counts[name] for name, value in parts.items() if counts[name]},
        "teacher": "+".join(taught),
        **(by_teacher if len(taught) > 1 else {}),
        "output_median": sums["output_median"] / images,
        "output_deviation": sums["output_deviation"] / images,
        "label_median": sums["label_median"] / labelled,
        "label_deviation": sums["label_deviation"] / labelled,
        "grad_norm": sums["grad_norm"],
    }


def _stop(run: TrainingRun, line: dict[str, Any], seen: Sequence[tuple[MicroBatch, Tensor]]) -> NoReturn:
    folder = run.out / f"bad_batch_{line['step']}"
    batches = [batch for micro, _ in seen for batch in micro.batches()]
    losses = [one.of(loss) for micro, loss in seen for one in micro.taught]
    dump_batch(folder, f"process-{run.processes.index}", batches=batches, losses=losses, facts=line)
    if run.log:
        run.log.write(line)
    keys = [key for batch in batches for key in batch.keys]
    bad = [key for key, finite in zip(keys, torch.cat(losses).isfinite().tolist(), strict=True) if not finite]
    named = f" (not finite: {', '.join(bad[:3])})" if bad else ""
    advice = f"The batch is in {folder}{named}: look at its labels, lower lr, or leave its images out"
    if not bad and run.settings.log_every > 1:  # on a GPU the steps without a line are not looked at
        advice = (
            f"It may have begun in one of the {run.settings.log_every - 1} steps before, whose batches are not kept: "
            "the same command with train.log_every = 1 goes on from the last checkpoint and stops at the very step"
        )
    raise TrainingStoppedError(
        f"step {line['step']}: the loss is {line['loss']}, the gradient's norm {line['grad_norm']}; nothing of it was "
        f"applied. {advice}"
    )
