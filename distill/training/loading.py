"""Micro-batches prefetched by worker processes, and the error where a worker dies.

A sample that cannot be read raises a one-line error in the training process, not a worker's traceback.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from distill.core import machine
from distill.core.threads import one_thread
from distill.core.wording import first_line
from distill.shards.codec import Sample
from distill.shards.features import FeatureStore, stacked
from distill.training.batches import (
    Collate,
    Item,
    Labelled,
    MicroBatch,
    TaughtRows,
    augmented_batch,
    check_teachers,
    collated,
    draw_of,
    groups_of,
    join_groups,
    labels_to_learn,
    shares_among,
)
from distill.training.canonical import canonical
from distill.training.handover import packed
from distill.training.label_choice import choose_patches, choose_teacher, convert_labels
from distill.training.sampling import MicroBatchPositions, SamplePosition
from distill.training.settings import TrainSettings
from distill.training.stopping import SIGNALS

_log = logging.getLogger(__name__)
PREFETCH = 4  # micro-batches per worker that are ready
PATIENCE = 1800
"""Seconds to wait for one micro-batch: labelling online by a large teacher on a CPU takes minutes. Processes wait
longer for each other (parallel.exchange_timeout)."""


def _training_batch(read: list[Item], *, collate: Collate, settings: TrainSettings) -> MicroBatch:
    """A micro-batch of training: augmented, with the labels to learn from."""
    groups = groups_of(read)
    batches = [collate([read[row].sample for row in group.rows]) for group in groups]
    with one_thread():  # as in workers: the mean of a map differs in its last bits on more threads
        augmented = [augmented_batch(g, batch, settings) for g, batch in zip(groups, batches, strict=True)]
    return replace(join_groups(groups, augmented), features=stacked([item.features for item in read]))


def _heldout_batch(read: list[Item], *, collate: Collate, settings: TrainSettings) -> list[tuple[float, MicroBatch]]:
    """A batch of evaluation: the weight and the labels of every teacher in use, not augmented."""
    s, weighted = settings, []
    for group in groups_of(read):
        batch = collate([read[row].sample for row in group.rows])
        features = stacked([read[row].features for row in group.rows])
        places = tuple(-1 - read[row].place.index for row in group.rows)
        weights = group.among if s.strategy == "select" else {s.strategy: 1.0}
        for name, weight in weights.items():
            with one_thread():
                labels = labels_to_learn(batch, s, teacher=name, among=group.among).labels[name]
            taught = (TaughtRows(None, labels, name),)
            micro = MicroBatch(batch.keys, batch.images, taught, places, (False,) * len(places), features)
            weighted.append((weight / sum(weights.values()), micro))
    return weighted


class StreamSamples(Dataset[Any]):
    """The samples at stream positions; for a sample that cannot be read, the error that says why.

    training: with the labels of the chosen teacher only, and with new draws at every visit; else with all labels.
    coded: with maps as undecoded codes, from a dataset that stores codes.
    """

    def __init__(
        self,
        dataset: Labelled,
        settings: TrainSettings,
        *,
        training: bool,
        coded: bool = False,
        features: FeatureStore | None = None,
    ) -> None:
        self.dataset, self.settings, self.training, self.features = dataset, settings, training, features
        self.options: dict[str, Any] = {"coded": True} if coded else {}

    def __getitem__(self, place: SamplePosition) -> Item | Exception:
        try:
            return self._item(place)
        except (ValueError, LookupError, OSError) as error:
            return error

    def _item(self, place: SamplePosition) -> Item:
        s, position = self.settings, place.position
        among = shares_among(self.dataset.teachers_of(place.index), s)
        teacher, to_read, visit, draw, options = "", list(among), None, None, dict(self.options)
        if self.training:
            teacher, visit, draw = s.strategy, position, draw_of(position, s)
            if s.strategy == "select":
                teacher = choose_teacher(among, seed=s.seed, step=position // s.batch_size)
                to_read = [teacher]
            if s.patches_per_step and getattr(self.dataset, "stores_codes", False):
                options["patches"] = partial(choose_patches, s.patches_per_step, s.seed, position)
        get: Callable[..., Any] = self.dataset.get
        sample = get(place.index, to_read, visit=visit, **options)
        if isinstance(sample, Sample):
            sample = canonical(sample, s.canonical_focal) if s.canonical_focal else sample
            # Before collating, so that measured depth and rendered disparity become one kind of truth.
            labels = {name: convert_labels(part, s.kind, s.keep_unmet) for name, part in sample.labels.items()}
            sample = replace(sample, labels=labels)
        features = None
        if self.features is not None:
            features = self.features.get(sample.key, mirrored=draw is not None and draw.mirrored)
        return Item(place, among, teacher, sample, draw, features)


def end_with_parent(_worker: int = 0) -> None:
    """A DataLoader's worker_init_fn: ends this process when the process that reads from it ends, for any reason.

    PyTorch only watches for a changed parent, but under "forkserver" (Python 3.14's default) the parent is the server,
    which lives as long as any process that it started. And a process forked later keeps this one's end of the pipe to
    the parent open, so that workers would end one after another, each after seconds.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _init_worker(_worker: int) -> None:
    end_with_parent()
    for number in SIGNALS:  # the training process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    # The parent's objects are hidden from the collector: a collection would copy every page of them.
    gc.freeze()
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Readers:
    """Number of reading processes, batches that each may have ready, and bytes of a batch, 0 where not measured."""

    processes: int
    ahead: int = PREFETCH
    size: int = 0


def readers_of(samples: Any, batches: Any, collate: Any, workers: int, *, measured: bool = False) -> Readers:
    """`workers` readers, or fewer, with a logged warning, where memory or file descriptors are short.

    measured: reads one batch in this process to measure it even where nothing is short.
    """
    if not workers or (machine.is_plentiful() and not measured):
        return Readers(workers)
    size, tensors = _measure(collate([samples[place] for place in next(iter(batches), [])]))
    few, ahead, warning = machine.readers(workers, PREFETCH, size=size, tensors=tensors)
    if warning:
        _log.warning("%s", warning)
    return Readers(few, ahead, size)


def loader_of(
    samples: Any,
    batches: Any,
    collate: Any,
    readers: Readers,
    *,
    pinned: bool = False,
    started: Callable[[], None] | None = None,
    end: Callable[[], None] | None = None,
) -> Generator[Any, None, None]:
    """Yields the collated batches, prefetched by `readers`; raises a result that is an Exception.

    started: called once the processes are reading, before waiting for a batch. end: called when no more batches are
    taken, before waiting for the processes.
    """
    workers = readers.processes
    if workers and multiprocessing.get_start_method() == "forkserver":  # each process would import torch, for seconds
        multiprocessing.set_forkserver_preload(["__main__", __name__])
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=readers.ahead if workers else None,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=_init_worker,
        pin_memory=pinned,
    )
    (items, kill), over = _start(loader), object()
    try:
        if started is not None:
            started()
        while True:
            with explain_dead_workers():
                item = next(items, over)
            if item is over:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        if end is not None:
            end()
        # Without this a frame held by its own error would leave it to the collector, which waits 5 s per process.
        del items
        kill()  # one that hangs in a read ignores the loader's SIGTERM


def _start(loader: DataLoader[Any]) -> tuple[Iterator[Any], Callable[[], object]]:
    """The loader's batches, and what kills its processes.

    Also called when this process ends with batches left, as a stored traceback leaves them: multiprocessing then sends
    SIGTERM, which they ignore, and waits for them.
    """
    others = set(multiprocessing.active_children())
    try:
        items = iter(loader)
    finally:
        processes = set(multiprocessing.active_children()) - others
        kill = Finalize(None, _kill, (processes,), exitpriority=0)
    return items, kill


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()


@contextlib.contextmanager
def explain_dead_workers(option: str = "train.workers") -> Iterator[None]:
    """Raises a one-line OSError where a reading process died; option: the setting of their number.

    PyTorch reports it through a signal, so its RuntimeError is raised by whatever line is running: not only in the
    loader, but in the middle of a step.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise OSError(_dead_worker_message(first_line(error), option)) from error


def _measure(item: Any) -> tuple[int, int]:
    """Bytes and number of the tensors in a data worker's result."""
    _, tensors = packed(item)
    return sum(tensor.nbytes for tensor in tensors), len(tensors)


def _dead_worker_message(reason: str, option: str) -> str:
    """The message for reading processes that died or do not answer."""
    free = machine.shared_memory()
    memory = "" if free is None else f", of which {free / 1e6:.0f} MB are free (docker run --shm-size=8g)"
    return (
        f"a process that reads samples died or does not answer ({reason}): it lacked memory, or shared memory at "
        f"{machine.SHARED_MEMORY_DIR}{memory}; lower {option} (0: no such processes). The same command "
        "continues from what was saved"
    )


def training_batches(
    dataset: Labelled,
    micro_batches: MicroBatchPositions,
    *,
    collate: Collate,
    settings: TrainSettings,
    features: FeatureStore | None = None,
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches, in order, prefetched by `settings.workers` processes.

    Raises what `check_teachers` raises, before anything is read.
    """
    check_teachers(dataset, micro_batches.order.indices, settings)
    samples = StreamSamples(dataset, settings, training=True, features=features)
    make = partial(collated, partial(_training_batch, collate=collate, settings=settings))
    return loader_of(samples, micro_batches, make, readers_of(samples, micro_batches, make, settings.workers))


def heldout_batches(
    dataset: Labelled,
    indices: Sequence[int],
    *,
    collate: Collate,
    settings: TrainSettings,
    process: int,
    processes: int,
    features: FeatureStore | None = None,
) -> Iterator[list[tuple[float, MicroBatch]]]:
    """This process's share of the held-out samples: for each batch, every teacher's weight and labels."""
    size = settings.eval_batch_size
    places = [[SamplePosition(i, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
    own = places[process::processes]
    if not own:
        return iter(())
    samples = StreamSamples(dataset, settings, training=False, features=features)
    make = partial(collated, partial(_heldout_batch, collate=collate, settings=settings))
    return loader_of(samples, own, make, readers_of(samples, own, make, min(settings.workers, len(own))))
