"""A run on its processes and devices; the only place that makes accelerate's objects."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import nn

from distill.core import machine
from distill.training import checkpoints
from distill.training.averages import Averages
from distill.training.loading import PATIENCE
from distill.training.schedule import make_optimizer
from distill.training.settings import TrainSettings
from distill.training.state import Processes, TrainingRun, make_ready
from distill.training.trainlog import ScaleAlarm

OWN = {"workers", "keep_last", "trackers", "alarm_growth", "compile", "gradient_checkpointing"}
"""Settings that a process may have alone: what it reads with and computes its gradients with, which are then averaged,
and what only the main process writes. Not `fused`: every process applies the updates to its own weights. Not
`channels_last`: gradients are exchanged in the weights' order in memory."""


def accelerator_of(
    student: nn.Module, settings: TrainSettings, out: Path, *, device: torch.device | str | None
) -> Accelerator:
    """An Accelerator of the launcher's processes, or of this one, on `device` (None: the launcher's choice).

    Raises ValueError for a tracker that is not installed, and for parallelism other than plain data parallelism.
    """
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    if missing := [name for name in settings.trackers if name not in installed]:
        raise ValueError(f"tracker {', '.join(missing)} is not installed; installed: {', '.join(installed)}")
    # Searching unused parameters costs a walk over the graph in every step. A frozen encoder is unused until it thaws.
    several = machine.from_launcher("WORLD_SIZE", 1) > 1
    idle = several and (settings.freeze_steps > 0 or not every_parameter_learns(student))
    requested = None if device is None else torch.device(device)
    if AcceleratorState._shared_state and AcceleratorState().distributed_type == DistributedType.NO:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the device of this process's first run stays
    accelerator = Accelerator(
        cpu=requested is not None and requested.type == "cpu",
        # Set here, not by the launcher's configuration: the recipe alone decides precision and accumulation.
        mixed_precision="no",
        gradient_accumulation_steps=1,
        log_with=list(settings.trackers) or None,
        project_dir=out / "tensorboard",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=idle),
            InitProcessGroupKwargs(timeout=exchange_timeout(settings)),
        ],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}: students are trained with plain data "
            f"parallelism, so launch with --multi_gpu, or with torchrun on CPUs"
        )
    if requested is not None and requested.index is not None and accelerator.distributed_type == DistributedType.NO:
        _set_device(requested)
    return accelerator


def exchange_timeout(settings: TrainSettings) -> timedelta:
    """How long processes wait for each other: longer than one of them may lawfully wait for a step's micro-batches.

    The default, ten minutes, would end a run of which one process still waits for its labels (loading.PATIENCE).
    """
    return timedelta(seconds=PATIENCE * (settings.accumulate + 1))


def _set_device(device: torch.device) -> None:
    """Makes a numbered GPU the current device: accelerate uses that one, which is otherwise the first."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).set_device(device)


def processes_of(accelerator: Accelerator) -> Processes:
    """The accelerator's processes as a step sees them."""
    return Processes(
        index=accelerator.process_index,
        count=accelerator.num_processes,
        device=accelerator.device,
        add=lambda tensor: accelerator.reduce(tensor, "sum"),
        gather=gather_object,
        share=lambda value: broadcast_object_list([value])[0],
        wait=accelerator.wait_for_everyone,
        without_exchange=accelerator.no_sync,
        track=lambda values, step: accelerator.log(dict(values), step=step),
    )


def new_run(student: nn.Module, accelerator: Accelerator, settings: TrainSettings, **given: Any) -> TrainingRun:
    """A run at its initial weights, with every module on its device and wrapped; given: its other fields."""
    processes = processes_of(accelerator)
    check_alike(processes, settings, given.get("facts", {}))
    for part in (given["objective"], given["reference"]):
        if isinstance(part, nn.Module):
            part.to(processes.device)
    if given["reference"] is not None:
        given["reference"].eval().requires_grad_(False)
    make_ready(student, settings, device=processes.device, processes=processes.count)
    # Before the averaged copy is made: wrapping gives every process the main one's initial weights.
    model = accelerator.prepare_model(torch.compile(student) if settings.compile else student)
    return TrainingRun(
        processes=processes,
        settings=settings,
        student=student,
        model=model,
        optimizer=make_optimizer(student, settings),
        ema=Averages(student, settings.ema) if settings.ema else None,
        alarm=ScaleAlarm(settings.alarm_growth),
        **given,
    )


def check_alike(processes: Processes, settings: TrainSettings, facts: Mapping[str, Any]) -> None:
    """Raises ValueError in all processes where one has other settings or facts (labels, recipe) than the main one.

    Machines with copies of their own of a recipe or of labels would train different students in one run. Settings that
    only matter to a process's own machine (OWN) may differ.
    """
    own = {**settings.as_dict(), **facts}
    mains = processes.share(own)
    differing = [name for name in sorted({*own, *mains} - OWN) if own.get(name) != mains.get(name)]
    found = [f"process {processes.index}: {name} = {own.get(name)!r}, not {mains.get(name)!r}" for name in differing]
    if found := processes.gather(found):
        raise ValueError(f"all processes of a run need the same recipe and labels: {'; '.join(found[:8])}")


def open_trackers(accelerator: Accelerator, settings: TrainSettings, *, name: str, step: int) -> None:
    """Opens the trackers of a run. Drops their points after `step`: a resumed run draws them again."""
    if settings.trackers:
        accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": step + 1}})


def same_checkpoint(processes: Processes, out: Path, step: int) -> None:
    """Copies the main process's checkpoint of `step` to machines where `out` is a local folder without it.

    All processes call it. Raises OSError, and ValueError in all where such a folder has another checkpoint of `step`.
    """
    own = next((saved for saved in checkpoints.find(out) if saved.step == step), None)
    writes = machine.from_launcher("LOCAL_RANK", 0) == 0
    mains = processes.share(own.digest if own is not None and processes.main else "")
    is_other = own is not None and not processes.main and (own.digest != mains or (writes and own.is_damaged))
    if other := processes.gather([f"{own.folder} on {platform.node()}"] if own is not None and is_other else []):
        raise ValueError(
            f"damaged, or of another run than the main process's checkpoint of step {step}: "
            f"{', '.join(dict.fromkeys(other))}; delete it there, and the main process's is copied"
        )
    if not all(processes.gather([own is not None])):
        checkpoints.hand_out(out, step, share=processes.share, main=processes.main, writes=writes)
        processes.wait()


def every_parameter_learns(student: nn.Module) -> bool:
    """Whether the output depends on every trainable parameter; False too where that cannot be determined.

    A pre-trained encoder may have a parameter that no output depends on, and plain data parallelism would wait for its
    gradient forever.
    """
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    side = 4 * int(getattr(getattr(student, "encoder", None), "patch_size", 8))
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    training = student.training
    try:
        with torch.enable_grad():
            out = student.eval()(torch.zeros(1, 3, side, side, device=device))  # eval mode: BatchNorm statistics stay
    except (RuntimeError, ValueError, TypeError):
        return False
    finally:
        student.train(training)
    pending: list[Any] = [out.grad_fn]
    visited: set[Any] = set()  # the nodes, not their ids: a node that nobody holds may leave its id to another
    reached: set[int] = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending.extend(parent for parent, _ in node.next_functions)
    return trainable <= reached


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Raises a one-line OSError where the exchange with another process fails, as when that process has ended."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, which begins with its source file.
        if not isinstance(error, getattr(torch.distributed, "DistError", ())) and "/gloo/" not in str(error):
            raise
        reason = re.sub(r"^\[[^\]]*\] ", "", (str(error).splitlines() or [""])[0]).split(". ")[0]
        raise OSError(
            f"the connection to another process of this run is lost ({reason}); if it ended with an error, its own "
            "message says why. The same command continues from the last checkpoint"
        ) from error


@contextlib.contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """A context in which every run on one GPU gives the same bits; torch raises for operations that cannot."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when its handle is created, at the first matrix product on the GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    filling: Any = torch.utils.deterministic
    filled = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # A launch for every torch.empty, for code that reads memory before it writes it; none of the run's does.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        filling.fill_uninitialized_memory = filled
