"""Labels that went to a device and came back as codes have the bytes of those that never left the host."""

from __future__ import annotations

import weakref

import pytest
import torch

from distill.core.codes import CodedMaps
from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.labelling import annotate as module
from distill.labelling.asking import DeviceAsking, HostAsking, TeacherFailedError
from distill.labelling.pools import thread_pools
from distill.shards.codec import CODECS
from tests.labelling.formula import Formula, contents, make_tar, run
from tests.labelling.test_annotate import Sick

CPU = torch.device("cpu")


@pytest.fixture
def by_device(monkeypatch):
    """Every run asks as on a GPU, batches filled up and maps coded there; the list holds what was asked."""
    asked = []

    def make_asker(teachers, labels, device):
        codec = CODECS[labels.codec]
        coding = (labels.codec, codec.first) if codec.first else None
        store = module.partial(module.stored, store=labels.store)
        asked.append(DeviceAsking(CPU, store, coding=coding, pad_to=labels.batch_size))
        return asked[-1]

    def use():
        monkeypatch.setattr(module, "make_asker", make_asker)
        return asked

    return use


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("store", ["disparity", "as_is"])
def test_the_bytes_are_the_same(tmp_path, by_device, codec, store):
    tars = sources.tars(str(make_tar(tmp_path / "sa_0.tar", 5)))
    run(tars, tmp_path / "host", codec=codec, store=store)
    asked = by_device()
    run(tars, tmp_path / "device", codec=codec, store=store)
    assert asked and contents(tmp_path / "host") == contents(tmp_path / "device")


def test_a_teacher_that_fails_on_one_image_costs_that_image_alone(tmp_path, by_device):
    tars = sources.tars(str(make_tar(tmp_path / "sa_0.tar", 5)))
    for how in ("nan", "raise"):
        run(tars, tmp_path / f"host-{how}", Sick(how=how))
    by_device()
    for how in ("nan", "raise"):
        run(tars, tmp_path / f"device-{how}", Sick(how=how))
        assert contents(tmp_path / f"host-{how}") == contents(tmp_path / f"device-{how}")


def test_answers_are_taken_late_and_filled_batches_cut(tmp_path):
    sizes = []

    class Counting(Formula):
        def predict(self, images):
            sizes.append(len(images))
            return super().predict(images)

    ask = DeviceAsking(CPU, lambda depth: depth, coding=("jls", 16), pad_to=4)
    crops = [torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(3)]
    answer = ask("formula", Counting(), crops, ["a", "b", "c"])()
    assert sizes == [4] and len(answer.maps) == len(answer.nan) == 3
    assert all(isinstance(one, CodedMaps) for one in answer.maps)
    direct = HostAsking(lambda depth: depth)("formula", Formula(), crops, ["a", "b", "c"])()
    for coded, whole in zip(answer.maps, direct.maps, strict=True):
        assert torch.allclose(coded.decode().values, whole.values, atol=1e-4)


def test_maps_of_another_size_stop_the_run():
    class Cropping(Formula):
        def predict(self, images):
            return DepthMap(images[:, 0, 1:], torch.ones_like(images[:, 0, 1:]) > 0, Kind.SCALE_DEPTH)

    with pytest.raises(TeacherFailedError, match="returned maps"):
        DeviceAsking(CPU, lambda depth: depth, coding=None)("x", Cropping(), [torch.zeros(3, 8, 8).byte()], ["a"])


class Cramped(Formula):
    """Has memory for two crops, and counts how often it is asked while a batch that was refused is still held."""

    held_on = 0
    refused: tuple[weakref.ref, ...] = ()

    def predict(self, images):
        self.held_on += any(one() is not None for one in self.refused)
        activations = torch.zeros(1)
        if len(images) > 2:
            self.refused += (weakref.ref(activations),)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(images)


@pytest.mark.parametrize("count", [5, 1])
def test_a_batch_that_memory_refuses_is_asked_crop_by_crop_not_filled_up_and_after_it_is_gone(
    tmp_path, by_device, count
):
    tars = sources.tars(str(make_tar(tmp_path / "sa_0.tar", count)))
    run(tars, tmp_path / "host", batch_size=8)
    by_device()
    teacher = Cramped()
    run(tars, tmp_path / "device", teacher, batch_size=8)
    assert contents(tmp_path / "host") == contents(tmp_path / "device")
    assert teacher.refused and teacher.held_on == 0 and set(teacher.sizes) == {1}


@pytest.mark.parametrize(("device", "threads"), [("cpu", 3), ("cuda", 1)])
def test_the_thread_that_asks_a_gpu_computes_on_one_core(device, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with thread_pools(2, torch.device(device)) as pools:
            assert torch.get_num_threads() == threads
            assert pools.workers.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
