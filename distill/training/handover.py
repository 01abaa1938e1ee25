"""Passes batches from reading processes to a device, through shared memory that the device can read.

A DataLoader with pin_memory copies a batch twice in the training process, through pages that are mapped for that batch
only: one thread, 25 ms per batch of 43 MB (on an H100's machine), however many processes read. Here a process writes
its batch into a permanent slot; the training process page-locks each slot once and sends its bytes in one copy.

Each process has slots of its own and uses them in turn. Its batches are taken in the order in which it makes them, so
its oldest never waits for a slot held by a later one, as it could with slots shared by all processes.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from distill.core import machine

_log = logging.getLogger(__name__)
SLOTS = 2
"""Slots per process: one is filled while the other waits or is sent."""
SPARE = 1.5
"""A slot's size, as a multiple of the first batch's; a larger batch is passed on by the DataLoader."""
_ALIGNMENT = 64
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """The location of a tensor in a batch's bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor; memory: (n,) uint8, aligned."""
        end = self.start + self.dtype.itemsize * math.prod(self.shape)
        return memory[self.start : end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Handed:
    """A batch whose tensors lie in a slot. content: the batch, packed; pieces: its tensors; used: bytes of the slot."""

    content: bytes
    pieces: tuple[Piece, ...]
    used: int
    reader: int
    slot: int


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if not isinstance(item, Tensor):
            return None
        self.tensors.append(item)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def packed(item: Any) -> tuple[bytes, list[Tensor]]:
    """Any item as bytes without its tensors, and these."""
    packer = _Packer(file := io.BytesIO())
    packer.dump(item)
    return file.getvalue(), packer.tensors


def unpacked(content: bytes, tensors: Sequence[Tensor]) -> Any:
    """The item of `packed`, with these tensors."""
    return _Unpacker(io.BytesIO(content), tensors).load()


class Handover:
    """Shared-memory slots of `size` bytes for `readers` reading processes. Reaches them by fork or pickle."""

    def __init__(self, readers: int, size: int) -> None:
        context = multiprocessing.get_context()
        # One memory for all, each slot on pages of its own: a fork server takes only a few hundred file descriptors.
        self.size = -(-size // _PAGE) * _PAGE
        self.memory = _shared(readers * SLOTS * self.size)
        self.free = [context.Semaphore(SLOTS) for _ in range(readers)]
        self._ended = _shared(1)  # a flag without a lock, which a killed process would never release
        self._batches_given = 0
        self._locked: dict[int, bool] = {}  # by a slot's address: whether the device took it
        self._device: torch.device | None = None

    def slot(self, reader: int, number: int) -> Tensor:
        """The bytes (size,) of a process's slot."""
        start = (reader * SLOTS + number) * self.size
        return self.memory[start : start + self.size]

    def give(self, batch: Any) -> Any:
        """In a reading process: the batch as `Handed`, unchanged where no slot can hold it; an OSError after `end`."""
        reader = get_worker_info()
        if reader is None:
            return batch
        content, tensors = packed(batch)
        pieces, used = [], 0
        for tensor in tensors:
            pieces.append(Piece(used, tensor.dtype, tuple(tensor.shape)))
            used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if used > self.size or not pieces:
            return batch
        if not self._ended:
            self.free[reader.id].acquire()
        if self._ended:
            return OSError("a batch was read after training had stopped taking batches")
        number = self._batches_given % SLOTS
        self._batches_given += 1
        memory = self.slot(reader.id, number)
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.of(memory).copy_(tensor)
        return Handed(content, tuple(pieces), used, reader.id, number)

    def lock(self, device: torch.device, batches: int) -> None:
        """Page-locks the slots of that many batches, tens of milliseconds each, while the first batch is being read.

        Other slots are locked at their first use.
        """
        slots = [(reader, number) for number in range(SLOTS) for reader in range(len(self.free))]
        for reader, number in slots[: batches if device.type == "cuda" else 0]:
            if not self._lock(self.slot(reader, number), device):
                return

    def take(self, handed: Handed, device: torch.device) -> tuple[Any, Tensor]:
        """The batch on a device, and the memory there of which all its tensors are views.

        On CUDA the copy is queued in the current stream.
        """
        memory = self.slot(handed.reader, handed.slot)
        on_device, filled = torch.empty(handed.used, dtype=torch.uint8, device=device), memory[: handed.used]
        if device.type == "cuda" and not self._lock(memory, device):
            filled = filled.pin_memory()  # one more copy, as a copy from pageable memory would block
        on_device.copy_(filled, non_blocking=True)
        return unpacked(handed.content, [piece.of(on_device) for piece in handed.pieces]), on_device

    def release(self, handed: Handed) -> None:
        """Lets the slot be filled again; its bytes must have been copied."""
        self.free[handed.reader].release()

    def end(self) -> None:
        """Stops the reading processes from waiting for slots, so that they can end."""
        self._ended.fill_(1)
        for free in self.free:
            free.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """On exit, ends the waiting for slots and unlocks the page-locked memory."""
        try:
            yield
        finally:
            self.end()
            self._unlock()

    def _lock(self, memory: Tensor, device: torch.device) -> bool:
        """Page-locks the slot at its first use; returns whether the device accepted that."""
        address, self._device = memory.data_ptr(), device
        if address not in self._locked:
            fault = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)
            self._locked[address] = int(fault) == 0
            if not self._locked[address]:
                with suppress(RuntimeError):  # the next kernel, whichever it is, reports the error once more
                    torch.ones(1, device=device)
                if list(self._locked.values()).count(False) == 1:
                    _log.warning("shared memory cannot be page-locked (%s): each batch needs an extra copy", fault)
        return self._locked[address]

    def _unlock(self) -> None:
        """Also on a device that has failed: memory that stays locked would affect later allocations at its address."""
        addresses = [address for address, locked in self._locked.items() if locked]
        if addresses:
            with suppress(RuntimeError):  # the failure was reported, or will be by the next call
                torch.cuda.synchronize(self._device)
        for address in addresses:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._locked.clear()


@dataclass(frozen=True, slots=True)
class Giving:
    """A collate function of the reading processes that hands its batches over."""

    collate: Callable[[Any], Any]
    handover: Handover

    def __call__(self, items: Any) -> Any:
        """The handed-over batch of `collate`, or the Exception that it returns."""
        batch = self.collate(items)
        return batch if isinstance(batch, Exception) else self.handover.give(batch)


def handover_for(readers: int, size: int) -> Handover | None:
    """A Handover for batches of about `size` bytes; None without reading processes, shared memory or descriptors."""
    capacity = int(SPARE * size)
    if not (readers and size and machine.has_shared_memory(2 * readers * SLOTS * capacity)):
        return None
    try:
        return Handover(readers, capacity)
    except (RuntimeError, OSError):  # another run took the memory first, or too many files are open
        return None


def _shared(size: int) -> Tensor:
    """(size,) uint8 in shared memory, allocated in full immediately: RuntimeError where that much is not free."""
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
