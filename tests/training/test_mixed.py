"""Samples of several supervisions in one batch: one forward pass, and each by its own objective."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels, Supervision
from distill.losses.objective import Objective
from distill.losses.settings import LossSettings
from distill.shards.codec import Sample
from distill.shards.codec import collate as collate_samples
from distill.training.batches import Item, check_teachers, draw_of, groups_of
from distill.training.loading import training_batches
from distill.training.sampling import MicroBatchPositions, SamplePosition, make_order
from distill.training.train import train
from tests.training.toys import SIZE, Toy, assert_same_run, newest, save, settings, steps_of

BY = {"photos": ("net",), "pairs": ("truth",), "scenes": ("net", "truth")}
SHARES = {"net": 0.5, "truth": 0.5}


@dataclass
class Mixed:
    """Eight samples of each source of BY. The truth of "pairs" is metric depth, of "scenes" metric disparity."""

    per_source: int = 8
    asked: list[tuple[int, tuple[str, ...], int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image_keys = [f"{name}{i}" for name in BY for i in range(self.per_source)]
        self.sources = [i // self.per_source for i in range(len(self.image_keys))]

    def __len__(self) -> int:
        return len(self.image_keys)

    def teachers_of(self, index: int):
        return list(BY.values())[self.sources[index]]

    def get(self, index: int, teachers, *, visit=None) -> Sample:
        self.asked.append((index, tuple(teachers), visit))
        image = torch.randint(0, 256, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(index))
        near = (1.0 + (image[0] + 2 * image[1]).float() / 256)[None]
        labels = {}
        for name in teachers:
            pairs = name == "truth" and self.image_keys[index].startswith("pairs")
            kind = Kind.METRIC_DEPTH if pairs else Kind.METRIC_DISPARITY if name == "truth" else Kind.AFFINE_DISPARITY
            values = 1 / near if pairs else 7 * near + 3 if name == "net" else near
            shared = DepthMap(values, torch.ones_like(values, dtype=torch.bool), kind)
            supervision = Supervision.of(shared, teacher=name, truth=name == "truth")
            labels[name] = Labels(shared, None, torch.zeros(1, 0, 4), supervision=supervision)
        return Sample(f"{self.image_keys[index]}-0", self.image_keys[index], image.to(torch.uint8), labels)


def learn(out, *, loss=None, kind=Kind.AFFINE_DISPARITY, dataset=None, student=None, **given):
    usual = {"teacher_shares": SHARES, "steps": 8, "save_every": 4, "kind": str(kind)}
    objective = Objective(loss or LossSettings(normalization="global", feature=0.0, gradient=0.5), kind)
    return train(
        student or Toy(),
        dataset or Mixed(),
        objective,
        out=out,
        settings=settings(**(usual | given)),
        save=save,
        device="cpu",
    )


def micros(dataset, **given):
    s = settings(**({"teacher_shares": SHARES} | given))
    order = make_order(range(len(dataset)), dataset.sources, seed=0, weights=(), temperature=1.0)
    cut = MicroBatchPositions(order=order, batch_size=8, accumulate=1, process=0, processes=1, steps=s.steps)
    return list(training_batches(dataset, cut, collate=collate_samples, settings=s))


def test_each_sample_learns_from_a_teacher_that_it_has_and_no_other_is_asked():
    dataset = Mixed()
    found = micros(dataset)
    assert len(dataset.asked) == 20 * 8 and all(len(teachers) == 1 for _, teachers, _ in dataset.asked)
    assert [visit for *_, visit in dataset.asked] == list(range(160))
    for step, micro in enumerate(found):
        asked = {dataset.image_keys[i] + "-0": name for i, (name,), _ in dataset.asked[8 * step : 8 * step + 8]}
        rows = [row for one in micro.taught for row in (one.rows.tolist() if one.rows is not None else range(8))]
        assert sorted(rows) == list(range(8)) and list(asked) == list(micro.keys)
        for batch, one in zip(micro.batches(), micro.taught, strict=True):
            assert {asked[key] for key in batch.keys} == {one.teacher} == {one.labels.supervision.teacher}
            assert one.labels.supervision.truth is (one.teacher == "truth")
            assert one.labels.shared.kind is Kind.AFFINE_DISPARITY
        both = {asked[key] for key in micro.keys if key.startswith("scenes")}
        assert len(both) <= 1, "a step has one teacher where there is a choice"
        assert micro.positions == tuple(range(8 * step, 8 * step + 8)), (
            "the seeds of what is drawn, in the images' order"
        )
        for row, key in enumerate(micro.keys):
            image = dataset.get(dataset.image_keys.index(key[:-2]), ["net"] if "pairs" not in key else ["truth"]).image
            assert torch.equal(micro.images[row], image.float() / 255)
    chosen = [name for index, (name,), _ in dataset.asked[:160] if dataset.sources[index] == 2]
    assert {*chosen} == {"net", "truth"}


def test_what_is_said_to_be_mirrored_stands_beside_its_image():
    dataset = Mixed()
    for step, micro in enumerate(micros(dataset, hflip=True, steps=4)):
        drawn = [draw_of(place, settings(hflip=True)).mirrored for place in range(8 * step, 8 * step + 8)]
        assert list(micro.mirrored) == drawn and len(micro.taught) == 2
        for key, image, mirrored in zip(micro.keys, micro.images, drawn, strict=True):
            plain = dataset.get(dataset.image_keys.index(key[:-2]), []).image.float() / 255
            assert torch.equal(image, plain.flip(-1) if mirrored else plain)


def test_only_labels_that_the_objective_cannot_tell_apart_are_in_one_group():
    """Metres beside a map up to a scale would lose them, a lidar's points beside dense truth be taken for dense."""
    read = []
    for row, (kind, truth, dense) in enumerate(
        [
            (Kind.METRIC_DEPTH, True, True),
            (Kind.SCALE_DEPTH, True, True),
            (Kind.METRIC_DEPTH, True, False),
            (Kind.METRIC_DEPTH, False, True),
            (Kind.METRIC_DEPTH, True, True),
        ]
    ):
        shared = DepthMap(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), kind)
        labels = Labels(shared, None, torch.zeros(1, 0, 4), supervision=Supervision("truth", kind, truth, dense))
        sample = Sample(f"{row}-0", str(row), torch.zeros(3, 2, 2, dtype=torch.uint8), {"truth": labels})
        read.append(Item(SamplePosition(10 + row, row), {"truth": 1.0}, "truth", sample))
    groups = groups_of(read)
    assert [group.rows for group in groups] == [(0, 4), (1,), (2,), (3,)]
    assert [group.positions for group in groups] == [(10, 14), (11,), (12,), (13,)]


def test_a_teacher_of_no_share_may_be_missing_and_makes_no_image_usable():
    given = {"teacher_shares": {"net": 1.0, "truth": 1.0, "gone": 0.0}}
    check_teachers(Mixed(), range(24), settings(**given))
    with pytest.raises(
        ValueError, match="images labelled only by truth cannot be used: teacher_shares gives a share only to net$"
    ):
        check_teachers(Mixed(), range(24), settings(teacher_shares={"net": 1.0, "truth": 0.0}))


def test_truth_and_pseudo_labels_in_one_run_however_it_is_cut(tmp_path):
    # Not an invariant loss: it has no gradient in a bias but rounding, of which Adam makes steps.
    loss = LossSettings(normalization="none", feature=0.0)
    learn(tmp_path / "whole", loss=loss)
    learn(tmp_path / "parts", loss=loss, accumulate=4, workers=1)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    lines = [line for line in steps_of(tmp_path / "whole") if "loss" in line]
    mixed = [line for line in lines if line["teacher"] == "net+truth"]
    assert len(mixed) >= 6
    for line in mixed:
        by = line["teachers"].values()
        assert sum(one["images"] for one in by) == 8
        assert sum(one["images"] * one["loss"] for one in by) == pytest.approx(8 * line["loss"])


def test_the_objective_is_the_one_for_the_supervision(tmp_path):
    """Where truth is not asked for anything but its anchor, its images say nothing of the other terms."""
    loss = LossSettings(feature=0.0, truth={"shared": 0.0, "gradient": 0.0, "anchor": 1.0})
    learn(tmp_path, loss=loss, steps=4)
    line = next(line for line in steps_of(tmp_path) if line.get("teacher") == "net+truth")
    assert {"shared", "gradient", "anchor"} <= {*line["parts"]}
    by = line["teachers"]
    assert by["truth"]["loss"] == pytest.approx(line["parts"]["anchor"])
    assert by["net"]["loss"] == pytest.approx(line["parts"]["shared"] + 2 * line["parts"]["gradient"], rel=1e-5)


def test_one_forward_pass_sees_all(tmp_path):
    class Counting(Toy):
        sizes: list[int] = []

        def forward(self, images):
            self.sizes.append(len(images))
            return super().forward(images)

    learn(tmp_path, student=Counting(), steps=4, val_fraction=0.0)
    assert Counting.sizes == [8] * 4


def test_images_that_nobody_learns_from_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(
        ValueError, match="images labelled only by net cannot be used: teacher_shares gives a share only to"
    ):
        learn(tmp_path, teacher_shares={"truth": 1.0})
    with pytest.raises(ValueError, match="the labels come from net, truth: set how often"):
        learn(tmp_path, teacher_shares={})


class Metres(Toy):
    """A toy whose output is a depth in (0, 10)."""

    def forward(self, images):
        return 10 * torch.sigmoid(super().forward(images))


def test_a_metric_student_learns_metres_from_truth_and_shape_from_pseudo_labels(tmp_path):
    loss = LossSettings(normalization="global", feature=0.0, gradient=0.0)
    for micro in micros(Mixed(), kind="metric_depth", steps=2, warmup_steps=0):
        for one in micro.taught:
            expected = Kind.METRIC_DEPTH if one.teacher == "truth" else Kind.AFFINE_DISPARITY
            assert one.labels.shared.kind is expected
    learn(tmp_path, loss=loss, kind=Kind.METRIC_DEPTH, student=Metres(), steps=4)
    assert all(value.isfinite().all() for value in newest(tmp_path).values())


def test_labels_that_meet_a_student_nowhere_are_refused(tmp_path):
    with pytest.raises(KindError, match="affine_disparity cannot become affine_depth"):
        learn(tmp_path, kind=Kind.AFFINE_DEPTH)


def test_averaging_takes_the_teachers_that_a_sample_has(tmp_path):
    learn(tmp_path, strategy="average", steps=4)
    assert {line["teacher"] for line in steps_of(tmp_path) if "teacher" in line} == {"average"}
