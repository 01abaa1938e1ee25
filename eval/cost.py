"""What a model costs: parameters, FLOPs, time per image, memory; measured while it predicts, on a named machine.

    cost = Cost()
    teacher = cost.load_and_measure(load)   # or cost.attach(teacher), if it is already loaded
    predict(cost.timed(teacher), ...)
    cost.summary(before)                    # plain values, as JSON takes them

The first call warms up and is left out of the latency; its FLOPs are counted (PyTorch's counter: 2 per multiply-add of
convolutions, matrix products and attention, nothing else). A model that runs elsewhere or without PyTorch has none.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.core import machine
from distill.core.depth import DepthMap
from distill.teachers import Teacher


class Cost:
    """What a model costs: seconds per image after the first call, FLOPs of the first, parameters, peak memory."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds: list[float] = []
        self.first: float | None = None
        self.flops = 0
        self.size = ""
        self.parameters = self.weight_bytes = 0
        self.device = "cpu"
        self.compiled = False
        self.before = _resident("VmRSS")
        self.held = 0

    def load_and_measure(self, load: Callable[[], Teacher]) -> Teacher:
        """Load the model, counting memory from this point."""
        _reset_peak()
        self.before = _resident("VmRSS")
        cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        allocated = [torch.cuda.memory_allocated(card) for card in cards]
        teacher = load()
        self._inspect(teacher)
        if allocated and self.device.startswith("cuda"):
            self.held = allocated[torch.device(self.device).index or 0]
        return teacher

    def attach(self, teacher: Teacher) -> Teacher:
        """The same for a loaded model: counts the memory of its weights and what predicting adds from here."""
        self._inspect(teacher)
        if torch.cuda.is_available() and self.device.startswith("cuda"):
            self.held = torch.cuda.memory_allocated(self.device) - self.weight_bytes
        _reset_peak()
        resident = _resident("VmRSS")
        self.before = None if resident is None else max(0, resident - self.weight_bytes)
        return teacher

    def _inspect(self, teacher: Teacher) -> None:
        modules = [module for part in _attributes(teacher) for module in _modules(part)]
        tensors = {id(p): p for module in modules for p in module.parameters()}
        self.parameters = sum(p.numel() for p in tensors.values())
        self.weight_bytes = sum(p.numel() * p.element_size() for p in tensors.values())
        self.device = next((str(p.device) for p in tensors.values()), "cpu")
        self.compiled = any(
            getattr(m, "_compiled_call_impl", None) is not None for module in modules for m in module.modules()
        )

    def timed(self, teacher: Teacher) -> Teacher:
        """The same teacher with every call measured."""
        return _Timed(teacher, self)

    def summary(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """The numbers as plain JSON values; `before`, an earlier summary, is returned if it covers more images.

        latency_s: the median of single images. memory_bytes: weights and what predicting added, at the peak.
        """
        if before and self.images < before.get("images", 0):
            return dict(before)
        cuda = self.device.startswith("cuda")
        peak, start = _resident("VmHWM"), self.before
        grown = None if peak is None or start is None else max(0, peak - start)
        total = sum(self.seconds)
        return {
            "images": self.images,
            "images_per_s": self.images / total if total else None,
            "latency_s": statistics.median(self.seconds) if self.seconds else None,
            "first_s": self.first,
            "image": self.size,
            "flops": self.flops or None,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "device": machine.device_name(self.device),
            "memory_bytes": torch.cuda.max_memory_allocated(self.device) - self.held if cuda else grown,
        }


class _Timed:
    def __init__(self, teacher: Teacher, cost: Cost) -> None:
        self.teacher, self.cost, self.card = teacher, cost, teacher.card
        self.takes_focal = getattr(teacher, "takes_focal", False)

    def predict(self, images: Tensor, *, keys: Any = None, focal: float | None = None) -> DepthMap:
        """Predict as the teacher does, and record the cost."""
        kwargs: dict[str, Any] = {"keys": keys} if keys is not None else {}
        kwargs |= {"focal": focal} if focal is not None else {}
        cost = self.cost
        start = time.perf_counter()
        if cost.first is None:  # the first call compiles, allocates and warms up
            depth = self._counted(images, kwargs)
            cost.first = time.perf_counter() - start
            cost.size = f"{images.shape[-2]} x {images.shape[-1]}"
            return depth
        depth = self.teacher.predict(images, **kwargs).to("cpu")  # waits for an accelerator to finish
        cost.seconds.append((time.perf_counter() - start) / len(images))
        cost.images += len(images)
        return depth

    def _counted(self, images: Tensor, more: Mapping[str, Any]) -> DepthMap:
        if self.cost.compiled:  # the counter would make every graph compile again
            return self.teacher.predict(images, **more).to("cpu")
        with FlopCounterMode(display=False) as counter:
            depth = self.teacher.predict(images, **more).to("cpu")
        self.cost.flops = counter.get_total_flops() // len(images)
        return depth


def _attributes(holder: Any) -> list[Any]:
    if hasattr(holder, "__dict__"):
        return list(vars(holder).values())
    return [getattr(holder, name) for name in getattr(holder, "__slots__", ()) if hasattr(holder, name)]


def _modules(part: Any) -> list[torch.nn.Module]:
    if isinstance(part, torch.nn.Module):
        return [part]
    inner = getattr(part, "__dataclass_fields__", {})
    return [module for name in inner for module in _modules(getattr(part, name))]


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.init()
        for card in range(torch.cuda.device_count()):  # the model may be on another one than the current
            torch.cuda.reset_peak_memory_stats(card)
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            pass  # not allowed everywhere; the peak is then that of the whole process, an upper bound


def _resident(which: str) -> int | None:
    """Resident bytes of this process, current (VmRSS) or peak (VmHWM); None where the system does not report them."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:")), None)
