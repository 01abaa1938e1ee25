"""Batches that leave the workers as they are stored are, once decoded, those that the workers would have made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.core import machine
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels
from distill.shards.shards import LabelDataset, collate
from distill.training.augment import Draw
from distill.training.batches import Group, Item, augmented_batch
from distill.training.label_choice import choose_patches
from distill.training.loading import (
    Readers,
    StreamSamples,
    explain_dead_workers,
    heldout_batches,
    readers_of,
    training_batches,
)
from distill.training.parallel import every_parameter_learns
from distill.training.sampling import MicroBatchPositions, SamplePosition, make_order
from distill.training.settings import TrainSettings
from distill.training.stored import collate_stored, stored_batches
from tests.labelling.formula import Formula, run, two_tars
from tests.training import toys


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    run(two_tars(folder), folder / "out", Formula(kind=Kind.SCALE_DEPTH))
    return LabelDataset(folder / "out")


def both(labels, **changes):
    usual = {
        "steps": 3,
        "batch_size": 4,
        "warmup_steps": 0,
        "workers": 0,
        "val_fraction": 0.0,
        "kind": "scale_disparity",
    }
    settings = TrainSettings(**(usual | changes))
    positions = MicroBatchPositions(
        order=make_order(list(range(len(labels))), labels.sources, seed=3, weights=(), temperature=1.0),
        batch_size=settings.batch_size,
        accumulate=1,
        process=0,
        processes=1,
        steps=settings.steps,
    )
    host = training_batches(labels, positions, collate=collate, settings=settings)
    return list(host), list(stored_batches(labels, positions, settings=settings, device=torch.device("cpu")))


@pytest.mark.parametrize("changes", [{}, {"color_jitter": 0.4, "random_resized_crop": 0.5}, {"patches_per_step": 1}])
def test_the_same_bits(labels, changes):
    host, stored = both(labels, **changes)
    assert len(host) == len(stored) == 3
    for ours, theirs in zip(host, stored, strict=True):
        assert ours.keys == theirs.keys and torch.equal(ours.images, theirs.images)
        for one, other in zip(ours.taught, theirs.taught, strict=True):
            assert (one.teacher, one.labels.supervision) == (other.teacher, other.labels.supervision)
            assert one.labels.shared.kind == other.labels.shared.kind
            assert torch.equal(one.labels.boxes, other.labels.boxes)
            for mine, its in ((one.labels.shared, other.labels.shared), (one.labels.local, other.labels.local)):
                assert (mine is None) == (its is None)
                if mine is not None:
                    assert torch.equal(mine.values, its.values) and torch.equal(mine.valid, its.valid)


def test_stored_features_come_with_their_images(labels):
    settings = TrainSettings(kind="scale_disparity")
    sample = labels.get(0, labels.teachers_of(0), coded=True)
    features = [[(torch.rand(2, 3, 3).half(), torch.rand(2).half())] * 4 for _ in range(2)]
    name = labels.teachers_of(0)[0]
    places = [SamplePosition(row, 0) for row in range(2)]
    items = [Item(at, {name: 1.0}, name, sample, Draw(), own) for at, own in zip(places, features, strict=True)]
    micro = collate_stored(items).ready(settings)
    assert len(micro.features) == 4
    for row, own in enumerate(features):
        for (patch, cls), (one, other) in zip(micro.features, own, strict=True):
            assert torch.equal(patch[row], one) and torch.equal(cls[row], other)


@pytest.mark.parametrize("focal", [0.0, 100.0])
def test_a_crop_brings_metres_nearer_only_for_a_canonical_camera(focal):
    shared = DepthMap(torch.ones(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), Kind.METRIC_DEPTH)
    batch = Batch(("a",), torch.zeros(1, 3, 8, 8), {"t": Labels(shared, None, torch.zeros(1, 0, 4))})
    settings = TrainSettings(kind="metric_depth", random_resized_crop=0.25, canonical_focal=focal)
    group = Group((0,), (0,), (Draw((0.0, 0.5, 0.5)),), "t", {"t": 1.0})
    values = augmented_batch(group, batch, settings).labels["t"].shared.values
    assert (values == (0.5 if focal else 1.0)).all()


def test_a_step_learns_from_some_of_the_patches(labels):
    [first, *_], _ = both(labels, patches_per_step=1)
    [whole, *_], _ = both(labels)
    assert first.taught[0].labels.boxes.shape[1] == 1 < whole.taught[0].labels.boxes.shape[1]
    drawn = [tuple(choose_patches(2, 0, position, 5)) for position in range(40)]
    assert len(set(drawn)) > 5 and all(len(one) == 2 for one in drawn)
    assert choose_patches(2, 0, 7, 5) == list(drawn[7]) and choose_patches(4, 0, 7, 3) == [0, 1, 2]


def test_patches_are_drawn_at_every_visit_anew_and_an_unreadable_sample_is_an_error_in_its_place():
    seen = []

    class Codes:
        stores_codes = True

        def teachers_of(self, index):
            return ["t"]

        def get(self, index, names, *, visit, patches):
            seen.append((visit, patches(9)))
            raise OSError(f"sample {index} is gone")

    samples = StreamSamples(Codes(), toys.settings(patches_per_step=2, teacher_shares={}), training=True)
    found = [samples[SamplePosition(position, 3)] for position in (3, 40)]
    assert [str(error) for error in found] == ["sample 3 is gone"] * 2
    assert seen == [(position, choose_patches(2, samples.settings.seed, position, 9)) for position in (3, 40)]
    assert seen[0][1] != seen[1][1]


def test_what_is_held_out_is_weighed_by_the_teachers_that_a_sample_has():
    class Some(toys.Toys):
        def teachers_of(self, index):
            return self.teachers[: 1 + index % 2]

    settings = toys.settings(teacher_shares={"primary": 0.6, "assistant": 0.2}, strategy="select", eval_batch_size=2)
    options = {"collate": toys.collate, "settings": settings, "process": 0, "processes": 1}
    [weighted] = heldout_batches(Some(), [4, 7], **options)
    assert [(weight, micro.taught[0].teacher, len(micro.keys)) for weight, micro in weighted] == [
        (1.0, "primary", 1), (pytest.approx(0.75), "primary", 1), (pytest.approx(0.25), "assistant", 1)
    ]  # fmt: skip


def test_processes_share_what_is_held_out():
    options = {"collate": toys.collate, "settings": toys.settings(teacher_shares={}, eval_batch_size=2), "processes": 4}
    shares = [heldout_batches(toys.Toys(teachers=1), range(5), process=process, **options) for process in range(4)]
    keys = [[micro.keys for weighted in share for _, micro in weighted] for share in shares]
    assert keys == [[("image0-0", "image0-1")], [("image1-2", "image1-3")], [("image2-4",)], []]


def test_a_batch_is_measured_where_that_is_asked_and_fewer_readers_are_told(monkeypatch, caplog):
    asked: list = []

    def readers(workers, ahead, **batch):
        asked.append((workers, batch))
        return 1, 2, "memory is short"

    monkeypatch.setattr(machine, "is_plentiful", lambda: True)
    monkeypatch.setattr(machine, "readers", readers)
    samples = [torch.zeros(10), torch.ones(6)]
    assert readers_of(samples, [[0, 1]], list, 4) == Readers(4) and not asked and not caplog.text
    assert readers_of(samples, [[0, 1]], list, 4, measured=True) == Readers(1, 2, 64)
    assert asked == [(4, {"size": 64, "tensors": 2})] and "memory is short" in caplog.text
    assert readers_of(samples, [[0, 1]], list, 0, measured=True) == Readers(0)


def test_labels_that_the_settings_do_not_know_are_refused_before_anything_is_read():
    settings = toys.settings(teacher_shares={"someone": 1.0})
    order = make_order([0, 1], [0, 0], seed=3, weights=(), temperature=1.0)
    positions = MicroBatchPositions(order=order, batch_size=2, accumulate=1, process=0, processes=1, steps=1)
    with pytest.raises(LookupError, match="there are no labels by someone; the labels are by: primary, assistant"):
        training_batches(toys.Toys(2), positions, collate=toys.collate, settings=settings)


def test_an_error_that_is_not_of_a_reading_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(machine, "shared_memory", lambda: 64_000_000)
    with pytest.raises(RuntimeError, match="out of memory"), explain_dead_workers():
        raise RuntimeError("CUDA out of memory")
    with (
        pytest.raises(OSError, match=r"64 MB are free.*; lower labels.workers \(0: no such"),
        explain_dead_workers("labels.workers"),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_parameters_that_no_output_depends_on_are_found():
    class Student(nn.Module):
        def __init__(self, idle: bool):
            super().__init__()
            self.encoder, self.decoder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), nn.Conv2d(2, 1, 1)
            self.idle = nn.Linear(2, 2) if idle else None

        def forward(self, images):
            return self.decoder(self.encoder(images))[:, 0]

    assert every_parameter_learns(Student(idle=False)) and not every_parameter_learns(Student(idle=True))
    frozen = Student(idle=True).train(False)
    frozen.idle.requires_grad_(False)
    assert every_parameter_learns(frozen) and not frozen.training, "nobody waits for what is frozen"
    learning = Student(idle=False).train()
    assert every_parameter_learns(learning) and learning.training
    assert (learning.encoder[1].running_mean == 0).all(), "looking leaves the statistics alone"
    learning.decoder = nn.Conv2d(5, 1, 1)
    assert not every_parameter_learns(learning), "what cannot be run is not known"
