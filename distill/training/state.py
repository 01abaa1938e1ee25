"""The state of a training run: its processes, its network and optimizer, what it learns from, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distill.core.labels import Labels
from distill.shards.features import FeatureStore
from distill.training.batches import MicroBatch
from distill.training.settings import TrainSettings
from distill.training.trainlog import ScaleAlarm, StepLog


class ObjectiveLike(Protocol):
    """losses.objective.Objective, or anything with its signature: the total (B,) and its named parts, each (B,)."""

    def __call__(
        self, pred: Tensor, labels: Labels, features: Tensor | None, teacher_features: Tensor | None, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: (B,H,W) float32; features of the student and of the reference encoder, where there is one."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """The losses of a micro-batch of B images, (B,), and their parts by name: one value per image that a part covers.

    pred: (B,H,W), the prediction; target, valid: (B,H,W), its target; None: the labels' own maps. These three are only
    logged. All float32. taught: (B,) bool, the images whose loss carries information; None: all.
    """

    losses: Tensor
    parts: dict[str, Tensor]
    pred: Tensor
    target: Tensor | None = None
    valid: Tensor | None = None
    taught: Tensor | None = None


class TrainingTask(Protocol):
    """Trains a network that does not map images to depth maps: replaces what `measure` does for other students."""

    def __call__(self, module: nn.Module, micro: MicroBatch, /, *, precision: str) -> Measured:
        """module: the network as called in training, possibly wrapped. Random draws depend on micro.positions alone."""
        ...

    def keep(self) -> None:
        """Writes whatever was computed besides the weights to disk; called before each checkpoint."""
        ...


def is_training_task(objective: ObjectiveLike | TrainingTask) -> TypeGuard[TrainingTask]:
    """Whether the objective calls the network itself."""
    return callable(getattr(objective, "keep", None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The processes of a run, as a step sees them.

    add: sums a tensor over all; gather: concatenates their lists; share: broadcasts the main one's value; wait: a
    barrier. without_exchange: backward passes under it do not exchange gradients. track: sends numbers to the trackers.
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
    """One process's view of a run. `model` is what is called in training, `student` the bare network inside it.

    told_to_stop: whether this process was; stopping: whether any was, as of the last step with a log line.
    """

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
    finite: Tensor | None = None
    told_to_stop: Callable[[], bool] = lambda: False
    stopping: bool = False
    last_reported: tuple[float, float, int] = (0.0, 0.0, 0)

    def since(self, seconds: float, waited: float) -> tuple[float, float, int]:
        """Seconds, seconds spent waiting for data, and steps since the last call; the arguments for a single step."""
        before, self.last_reported = self.last_reported, (self.seconds, self.waited, self.steps_here)
        if self.steps_here - before[2] <= 1:
            return seconds, waited, 1
        return self.seconds - before[0], self.waited - before[1], self.steps_here - before[2]

    @property
    def evaluated_network(self) -> nn.Module:
        """The network whose weights are evaluated and saved: the averaged one if there is one."""
        return self.student if self.ema is None else self.ema.module

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def make_ready(student: nn.Module, settings: TrainSettings, *, device: torch.device, processes: int) -> None:
    """Freezes, converts and moves the student as the settings say; raises ValueError where it cannot."""
    if settings.freeze_encoder:
        encoder = student.encoder
        assert isinstance(encoder, nn.Module)
        encoder.requires_grad_(False)
        if callable(freeze := getattr(encoder, "freeze", None)):
            freeze()  # an Encoder records that it is frozen, so that its weights may be left out of the student folder
    if settings.gradient_checkpointing:
        capable = [m for m in student.modules() if callable(getattr(m, "set_grad_checkpointing", None))]
        if not capable:
            raise ValueError("gradient_checkpointing: no part of this student supports it; set it to false")
        capable[0].set_grad_checkpointing(True)  # type: ignore[operator]
    student.to(device)
    if settings.channels_last:
        student.to(memory_format=torch.channels_last)
    if settings.batchnorm == "sync" and processes > 1:
        if device.type != "cuda":
            raise ValueError('batchnorm = "sync" needs CUDA; use "frozen", or a student without BatchNorm')
        nn.SyncBatchNorm.convert_sync_batchnorm(student)


def set_mode(run: TrainingRun) -> None:
    """Sets training mode, except for frozen parts; called again when those change."""
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
