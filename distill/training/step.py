"""One optimizer step: from the micro-batches of a global batch to updated weights and a log line.

Losses are per image; only this module averages them, over the global batch. The student runs under autocast, the
objective never does. A loss or gradient that is not finite stops the run before anything is applied.
Shapes: B images of a micro-batch, H, W.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from distill.core.crops import generator
from distill.training.batches import MicroBatch
from distill.training.schedule import set_rates
from distill.training.state import Measured, ObjectiveLike, TrainingRun, is_training_task
from distill.training.trainlog import dump_batch, map_statistics

STATISTICS = ("output_median", "output_deviation", "label_median", "label_deviation", "labelled")


class TrainingStoppedError(ValueError):
    """A loss or gradient was not finite; the message names the step and where the batch was written."""


def take_step(run: TrainingRun, micros: Iterator[MicroBatch]) -> dict[str, Any] | None:
    """Makes one optimizer step on the next `accumulate` micro-batches; returns its log line.

    On a GPU a step without a log line does not synchronize and returns None. Raises TrainingStoppedError, before
    anything is applied, where the loss or the gradient is not finite, or was not in a step since the last line.
    """
    s, processes = run.settings, run.processes
    start, waited = time.perf_counter(), 0.0
    rates = set_rates(run.optimizer, run.step, s)
    run.optimizer.zero_grad(set_to_none=True)
    seen: list[tuple[MicroBatch, Tensor]] = []
    sums: dict[str, Tensor] = {}
    log_this_step = _has_line(run)
    for part in range(s.accumulate):
        before = time.perf_counter()
        micro = next(micros)
        waited += time.perf_counter() - before if micro.waited is None else micro.waited
        micro = micro.to(processes.device)
        # Seed after reading the data, which draws from the same generator.
        _seed(int(generator("step", s.seed, run.step, processes.index, part).integers(2**62)), processes.device)
        last = part == s.accumulate - 1
        with contextlib.nullcontext() if last else processes.without_exchange(run.model):
            result = _learn(run, micro)
        losses = result.losses.detach()
        seen.append((micro, losses))
        for name, value in (_measured(run, micro, result) if log_this_step else {}).items():
            sums[name] = sums[name] + value if name in sums else value
    parameters = run.parameters
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    line = None
    if processes.device.type == "cuda":
        _guard(run, norm)
    if log_this_step:
        sums["stop"] = torch.full((), float(run.told_to_stop()), dtype=torch.float64, device=norm.device)
        totals = _reduce(run, sums, norm)
        run.stopping, line = totals["stop"] > 0, _line(run, totals, rates=rates)
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
    # Over all steps since the last line: a step that does not synchronize returns before its work is done.
    seconds, waited, steps = run.since(seconds, waited)
    rate = s.batch_size * steps / seconds
    return line | {"images_per_s": rate, "data_wait": waited / seconds, "seconds": seconds / steps}


def _has_line(run: TrainingRun) -> bool:
    """Whether this step has a log line, and so synchronizes and checks its numbers; always True off a GPU.

    Steps before a checkpoint or an evaluation have one: a run must not go on from there with skipped updates.
    """
    s, number = run.settings, run.step + 1
    intervals = (every for every in (s.log_every, s.save_every, s.eval_every) if every)
    return run.processes.device.type != "cuda" or number == s.steps or any(number % every == 0 for every in intervals)


def _guard(run: TrainingRun, norm: Tensor) -> None:
    """Makes the optimizer's kernel skip all updates from the first non-finite gradient on. In steps without a log line
    nothing else checks it; `norm` becomes NaN, so that the next line reports it.
    """
    finite = norm < torch.inf  # False for NaN too: one kernel, where isfinite takes four
    run.finite = finite if run.finite is None else run.finite & finite
    broken = ~run.finite
    run.optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    norm.masked_fill_(broken, torch.nan)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds dropout. torch.manual_seed would queue a call, with its stack, for every backend that is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def measure(run: TrainingRun, module: nn.Module, micro: MicroBatch) -> Measured:
    """The objective's losses and parts on a micro-batch, and the prediction; all float32.

    The objective is called once per supervision, on its images; a part has one value per image that it covers.
    """
    objective = run.objective
    if is_training_task(objective):
        return objective(module, micro, precision=run.settings.precision)
    images = micro.images
    if run.settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    features = reference_features = None
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
        if micro.features is not None:
            pred = module(images, features=[(patch.float(), cls.float()) for patch, cls in micro.features])
        elif run.reference is None:
            pred = module(images)
        else:
            pred, features = module(images, with_features=True)
            features = features.float()
            with torch.no_grad():
                reference_features = run.reference(images)[-1][0].float()
    pred = pred.float()
    measured, plain, known = [], cast(ObjectiveLike, objective), []
    for taught in micro.taught:
        pair = [None if values is None else taught.of(values) for values in (features, reference_features)]
        losses, parts = plain(taught.of(pred), taught.labels, pair[0], pair[1])
        if losses.shape != taught.of(images).shape[:1]:
            raise ValueError(
                f"the objective must return one loss per image, ({len(taught.of(images))},), not {tuple(losses.shape)}"
            )
        measured.append((losses, parts))
        if not module.training:  # only evaluations use it
            known.append(taught.labels.known | (losses.detach() != 0))  # feature alignment needs no label
    if len(measured) == 1:
        return Measured(*measured[0], pred, taught=known[0] if known else None)
    places = torch.cat([taught.rows for taught in micro.taught if taught.rows is not None]).argsort()
    joined = {name: torch.cat([p[name] for _, p in measured if name in p]) for _, parts in measured for name in parts}
    losses = torch.cat([losses for losses, _ in measured])[places]
    return Measured(losses, joined, pred, taught=torch.cat(known)[places] if known else None)


def _learn(run: TrainingRun, micro: MicroBatch) -> Measured:
    """Runs forward and backward on a micro-batch, accumulating gradients; returns its losses and parts."""
    result = measure(run, run.model, micro)
    # Gradients are averaged over processes, so each contributes its sum over the global batch times their number. They
    # become NaN where the loss is not finite: |x - inf| has a finite gradient, and a GPU checks gradients only.
    total = result.losses.sum()
    total.backward(run.processes.count / run.settings.batch_size + 0.0 * total.detach())
    return result


def _measured(run: TrainingRun, micro: MicroBatch, found: Measured) -> dict[str, Tensor]:
    """Sums of everything that is logged over a micro-batch's images."""
    losses = found.losses.detach()
    measured = {"loss": losses.double().sum()} | _statistics(run, micro, found)

    def count(values: Tensor) -> Tensor:
        return torch.full((), len(values), dtype=torch.float64, device=losses.device)  # new_tensor would synchronize

    for name, value in found.parts.items():
        measured[f"parts/{name}"] = value.detach().double().sum()
        measured[f"images/parts/{name}"] = count(value)
    for taught in micro.taught:
        values = taught.of(losses).double()
        for name, total in ((f"teachers/{taught.teacher}", values.sum()), (f"images/{taught.teacher}", count(values))):
            measured[name] = measured[name] + total if name in measured else total
    return measured


def _statistics(run: TrainingRun, micro: MicroBatch, found: Measured) -> dict[str, Tensor]:
    """Sums of the logged output and label statistics. Labels that know less than the student have another scale."""
    output = map_statistics(found.pred)
    if found.target is not None:
        return dict(zip(STATISTICS, [*output[:2], *map_statistics(found.target, found.valid)], strict=True))
    label = torch.zeros_like(output)
    for taught in micro.taught:
        shared = taught.labels.shared
        if len(micro.taught) == 1 or shared.kind == run.settings.kind:
            label = label + map_statistics(shared.values, shared.valid)
    return dict(zip(STATISTICS, [output[0], output[1], *label], strict=True))


def _reduce(run: TrainingRun, sums: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
    """The sums over all processes, and the gradient's norm, the same on all: the only synchronization of a step."""
    zero = torch.zeros((), dtype=torch.float64, device=norm.device)
    while True:
        new_names = [name for name in sums if name not in run.names]
        vector = torch.stack([zero + len(new_names), *(sums.get(name, zero) for name in run.names)])
        total = torch.cat([run.processes.add(vector), norm.detach().double().reshape(1)]).tolist()
        if total[0] == 0:
            return dict(zip(run.names, total[1:-1], strict=True)) | {"grad_norm": total[-1]}
        # Some process has a name that is not in the list yet (in the first step: all): extend the list and repeat.
        run.names = tuple(sorted({*run.names, *run.processes.gather(new_names)}))


def _line(run: TrainingRun, sums: Mapping[str, float], *, rates: Mapping[str, float]) -> dict[str, Any]:
    images, labelled = run.settings.batch_size, max(1.0, sums["labelled"])
    # Names of earlier steps stay in the sums, with a count of 0.
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
    losses = [taught.of(loss) for micro, loss in seen for taught in micro.taught]
    dump_batch(folder, f"process-{run.processes.index}", batches=batches, losses=losses, facts=line)
    if run.log:
        run.log.write(line)
    keys = [key for batch in batches for key in batch.keys]
    bad = [key for key, finite in zip(keys, torch.cat(losses).isfinite().tolist(), strict=True) if not finite]
    bad = run.processes.gather(bad[:3])  # the one message that is printed is the main process's
    named = f" (not finite: {', '.join(bad[:3])})" if bad else ""
    advice = f"The batch is in {folder}{named}: check its labels, lower lr, or leave out its images"
    if not bad and run.settings.log_every > 1:  # on a GPU steps without a log line are not checked
        advice = (
            f"It may have started in one of the {run.settings.log_every - 1} preceding steps, whose batches are not "
            "kept: run again with train.log_every = 1 to continue from the last checkpoint and stop at the exact step"
        )
    raise TrainingStoppedError(
        f"step {line['step']}: the loss is {line['loss']}, the gradient's norm {line['grad_norm']}; this update was "
        f"not applied. {advice}"
    )
