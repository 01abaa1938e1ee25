"""Batches handed from the processes that read to a device, through memory that they share and that the device can read.

A DataLoader that pins copies a batch twice in the training process, through pages that are mapped for that batch alone:
one thread, which makes 25 ms of a batch of 43 MB (an H100's machine) however many processes read. Here a process writes
its batch into a slot that stays; the training process page-locks each slot once and sends its bytes in one copy.

Each process has slots of its own and uses them in turn. Its batches are taken in the order in which it makes them, so
its oldest never waits for a slot that a later one has, as it could if the slots were everybody's.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distill.core import machine

_log = logging.getLogger(__name__)
SLOTS = 2
"""Of each process: one is filled while the other waits or is sent."""
SPARE = 1.5
"""A slot's size, in batches of the size of the first; a larger batch goes the DataLoader's way."""
_ALIGNMENT = 64
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Where among a batch's bytes a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor; memory: (n,) uint8, aligned."""
        end = self.start + self.dtype.itemsize * math.prod(self.shape)
        return memory[self.start : end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Handed:
    """A batch whose tensors lie in a slot. content: the batch with a Piece for each; used: bytes of the slot."""

    content: Any
    used: int
    reader: int
    slot: int


def mapped(item: Any, leaf: type, change: Callable[[Any], Any]) -> Any:
    """The same dataclasses, mappings, lists and tuples with each `leaf` changed; what holds none stays as it is."""
    if isinstance(item, leaf):
        return change(item)
    if is_dataclass(item) and not isinstance(item, type):
        parts = {one.name: getattr(item, one.name) for one in fields(item)}
        made = {name: mapped(part, leaf, change) for name, part in parts.items()}
        new = {name: part for name, part in made.items() if part is not parts[name]}
        return replace(item, **new) if new else item
    if isinstance(item, Mapping):
        made = {name: mapped(part, leaf, change) for name, part in item.items()}
        return item if all(made[name] is part for name, part in item.items()) else made
    if isinstance(item, tuple | list):
        found = [mapped(part, leaf, change) for part in item]
        return item if all(a is b for a, b in zip(found, item, strict=True)) else type(item)(found)
    return item


def tensors_of(item: Any) -> list[Tensor]:
    """Every tensor in it."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(item, Tensor, note)
    return found


class Handover:
    """Slots of shared memory for so many reading processes; `size`: bytes of each. Goes to them by fork or pickle."""

    def __init__(self, readers: int, size: int) -> None:
        context = multiprocessing.get_context()
        # One memory for all, each slot on pages of its own: a server that forks takes a few hundred descriptors.
        self.size = -(-size // _PAGE) * _PAGE
        self.memory = _shared(readers * SLOTS * self.size)
        self.free = [context.Semaphore(SLOTS) for _ in range(readers)]
        self._over = _shared(1)  # a flag without a lock, which a process that is killed would take along
        self._given = 0
        self._locked: dict[int, bool] = {}  # by a slot's address: whether the device took it
        self._device: torch.device | None = None

    def slot(self, reader: int, number: int) -> Tensor:
        """The bytes (size,) of a process's slot."""
        start = (reader * SLOTS + number) * self.size
        return self.memory[start : start + self.size]

    def give(self, batch: Any) -> Any:
        """In a reading process: the batch as `Handed`, or as it is where no slot can hold it; OSError after `end`."""
        reader, pieces, used = get_worker_info(), [], 0
        if reader is None:
            return batch

        def place(tensor: Tensor) -> Piece:
            nonlocal used
            piece = Piece(used, tensor.dtype, tuple(tensor.shape))
            pieces.append((piece, tensor))
            used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            return piece

        content = mapped(batch, Tensor, place)
        if used > self.size or not pieces:
            return batch
        if not self._is_over():
            self.free[reader.id].acquire()
        if self._is_over():
            return OSError("a batch that nobody takes any more")
        number = self._given % SLOTS
        self._given += 1
        memory = self.slot(reader.id, number)
        for piece, tensor in pieces:
            piece.of(memory).copy_(tensor)
        return Handed(content, used, reader.id, number)

    def take(self, handed: Handed, device: torch.device) -> Any:
        """The batch on a device; on CUDA the copy is queued in the current stream, and `release` waits for it."""
        memory = self.slot(handed.reader, handed.slot)
        here, filled = torch.empty(handed.used, dtype=torch.uint8, device=device), memory[: handed.used]
        if device.type == "cuda" and not self._lock(memory, device):
            filled = filled.pin_memory()  # one copy more, where the way to the device would stand still for all of it
        here.copy_(filled, non_blocking=True)
        return mapped(handed.content, Piece, lambda piece: piece.of(here))

    def release(self, handed: Handed) -> None:
        """Lets the slot be filled again; its bytes must have been copied."""
        self.free[handed.reader].release()

    def end(self) -> None:
        """Lets the reading processes wait for no slot any more, so that they can end."""
        self._over.fill_(1)
        for free in self.free:
            free.release()

    def _is_over(self) -> bool:
        return bool(self._over)

    @contextmanager
    def held(self) -> Iterator[None]:
        """After the block no process waits for a slot, and no memory is page-locked."""
        try:
            yield
        finally:
            self.end()
            self._unlock()

    def _lock(self, memory: Tensor, device: torch.device) -> bool:
        """Whether the slot is page-locked, as it is at its first use where the device takes it."""
        address, self._device = memory.data_ptr(), device
        if address not in self._locked:
            fault = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)
            self._locked[address] = int(fault) == 0
            if not self._locked[address]:
                with suppress(RuntimeError):  # the next kernel, whosever it is, reports it once more
                    torch.ones(1, device=device)
                if list(self._locked.values()).count(False) == 1:
                    _log.warning("memory cannot be page-locked (%s): each batch is copied once more", fault)
        return self._locked[address]

    def _unlock(self) -> None:
        """Also on a device that has failed: memory that stays locked is taken for what comes to lie there later."""
        taken = [address for address, locked in self._locked.items() if locked]
        if taken:
            with suppress(RuntimeError):  # what has failed was reported, or is by the next call
                torch.cuda.synchronize(self._device)
        for address in taken:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._locked.clear()


@dataclass(frozen=True, slots=True)
class Giving:
    """A collate function of the reading processes, whose batches are handed over."""

    collate: Callable[[Any], Any]
    handover: Handover

    def __call__(self, items: Any) -> Any:
        """What `collate` makes of them, or the Exception that it gives."""
        made = self.collate(items)
        return made if isinstance(made, Exception) else self.handover.give(made)


def handover_for(readers: int, size: int) -> Handover | None:
    """For batches of about `size` bytes; None where none reads beside this one, or memory or files run out."""
    capacity = int(SPARE * size)
    if not (readers and size and machine.has_shared_memory(2 * readers * SLOTS * capacity)):
        return None
    try:
        return Handover(readers, capacity)
    except (RuntimeError, OSError):  # another run was quicker, or no file more may be open
        return None


def _shared(size: int) -> Tensor:
    """(size,) uint8 in shared memory, all of it taken here and now: RuntimeError where that much is not free."""
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
