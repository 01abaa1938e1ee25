"""Labelling: right labels, every good image, and the same bytes however often it is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import tarfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.core import crops
from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.data.sources import BadImageError, Photo
from distill.labelling import annotate
from distill.labelling.lock import RunLockedError, run_lock
from distill.labelling.run import TRUTH, CropSettings, OnlineDataset, label, label_photo, labels_hash
from distill.shards import shards
from distill.shards.codec import MAX_ERROR
from distill.shards.shards import LabelDataset, collate, read_manifest, verify
from distill.teachers import Card
from tests.data.test_sources import encoded, pack, picture

CROPS = CropSettings(size=16, min_side=20, patch_size=12)


@dataclass
class Formula:
    """A teacher whose answer is known: depth = 1 + red + green, invalid where blue is above 0.9."""

    kind: Kind = Kind.SCALE_DEPTH
    wait: float = 0.0
    seeded: bool = False
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.card = Card(
            name="formula",
            weights="none",
            kind=self.kind,
            licence="MIT",
            code_licence="MIT",
            commercial=True,
            seeded=self.seeded,
        )

    def predict(self, images):
        self.sizes.append(len(images))
        time.sleep(self.wait)
        return DepthMap(1 + images[:, 0] + images[:, 1], images[:, 2] < 0.9, self.kind)


def make_tar(path: Path, count=7, first=0, *, bad=()) -> Path:
    members = [("./readme.txt", b"1")] if bad else []
    for i in range(first, first + count):
        data = b"<html>" if i in bad else encoded(picture(30 + i % 3, 40, seed=i), quality=95)
        members += [(f"./sa_{i}.jpg", data), (f"./sa_{i}.json", b"{}")]
    return pack(path, members)


@pytest.fixture
def tars(tmp_path):
    make_tar(tmp_path / "sa_0.tar", bad=(2,))
    make_tar(tmp_path / "sa_1.tar", count=3, first=7)
    return sources.tars(str(tmp_path / "sa_{0..1}.tar"))


def run(sources_, out, teacher=None, **options):
    options = {"crops": CROPS, "draws": 2, "samples_per_part": 4, **options}
    return label(sources_, [("formula", teacher or Formula())], out=out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what is written --------------------------------------------------------------------------------------------------


def test_labels_are_the_teachers_answer_on_the_same_pixels(tars, tmp_path):
    outcome = run(tars, tmp_path / "out")
    assert outcome.complete and (outcome.images, outcome.samples, outcome.quarantined) == (10, 18, 2)
    assert verify(tmp_path / "out") == []
    dataset = LabelDataset(tmp_path / "out")
    photos = {e.key: e for shard in tars for e in shard.scan().entries}
    assert len(dataset) == 18
    for sample in (dataset[i] for i in range(0, 18, 5)):
        photo = photos[sample.image_key].load()
        plan = CROPS.plan(photo, seed=0, draw=int(sample.key[-1]))
        labels = sample.labels["formula"]
        assert labels.shared.kind == Kind.SCALE_DISPARITY and torch.equal(labels.boxes[0], plan.boxes())
        for got, cut in (
            (labels.shared, crops.cut_region(photo.rgb, plan)[None]),
            (labels.local, crops.cut_patches(photo.rgb, plan)),
        ):
            want = Formula().predict(cut.float() / 255)
            assert torch.equal(got.valid, want.valid)
            # Disparities of this teacher span less than 1.
            assert ((got.values - 1 / want.values)[want.valid].abs() < MAX_ERROR + 1e-6).all()


def test_manifest_tells_everything(tars, tmp_path):
    run(tars, tmp_path / "out", recipe={"crops": {"size": 16}}, images_licence="SA-1B research", sky="far")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["teachers"]["formula"]["licence"] == "MIT" and manifest["recipe"] == {"crops": {"size": 16}}
    assert manifest["teachers"]["formula"]["stored"] == ["scale_disparity"]
    assert manifest["images"]["count"] == 9 and "sa_2" not in manifest["images"]["keys"]
    assert [shard["name"] for shard in manifest["shards"]] == [
        *(f"sa_0-00{i}.tar" for i in range(4)),
        *(f"sa_1-00{i}.tar" for i in range(2)),
    ]
    foreign, line = manifest["quarantine"]
    assert (foreign["key"], foreign["reason"]) == ("readme", "not an image file")
    assert (line["key"], line["origin"]) == ("sa_2", "sa_0.tar:sa_2.jpg") and "text" in line["reason"]
    assert manifest["licence"]["images"] == "SA-1B research" and manifest["settings"]["sky"] == "far"
    record = LabelDataset(tmp_path / "out")[0].record
    assert record["labels"]["formula"]["predicted"] == "scale_depth" and record["sky"] == "far"
    assert str(tmp_path) not in str(contents(tmp_path / "out")), "labels do not say where they were made"


@pytest.mark.parametrize(
    ("kind", "store", "stored"),
    [
        (Kind.METRIC_DEPTH, "disparity", Kind.METRIC_DISPARITY),
        (Kind.SCALE_DEPTH, "as_is", Kind.SCALE_DEPTH),
        (Kind.AFFINE_DEPTH, "disparity", Kind.AFFINE_DEPTH),
        (Kind.AFFINE_DISPARITY, "disparity", Kind.AFFINE_DISPARITY),
    ],
)
def test_kinds_are_stored_as_lawful(kind, store, stored):
    rgb = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    sample = label_photo(Photo("a", rgb, None, "a"), [("t", Formula(kind))], crops=CROPS, store=store)
    assert sample.labels["t"].shared.kind == sample.labels["t"].local.kind == stored


def test_infinite_depth_is_no_value():
    teacher = Formula()
    teacher.predict = lambda images: DepthMap(1 / (images[:, 0] > 0.3), images[:, 0] >= 0, Kind.SCALE_DEPTH)
    photo = Photo("a", torch.from_numpy(np.array(picture())).permute(2, 0, 1), None, "a")
    for store in ("as_is", "disparity"):
        shared = label_photo(photo, [("t", teacher)], crops=CROPS, store=store).labels["t"].shared
        assert torch.isfinite(shared.values[shared.valid]).all() and 0 < shared.valid.sum() < shared.valid.numel()


def test_truth_is_cut_to_the_pixel_and_nothing_invalid_leaks():
    depth = torch.arange(1.0, 1 + 40 * 50).reshape(1, 40, 50)
    valid = torch.rand(1, 40, 50) > 0.3
    truth = DepthMap(torch.where(valid, depth, torch.nan), valid, Kind.METRIC_DEPTH)
    photo = Photo("a", torch.zeros(3, 40, 50, dtype=torch.uint8), truth, "a")
    for size in (16, 31, 50):
        settings = replace(CROPS, size=size, patch_size=10)
        labels = label_photo(photo, [(TRUTH, TRUTH)], crops=settings).labels[TRUTH]
        plan = settings.plan(photo, seed=0, draw=0)
        assert labels.shared.kind == Kind.METRIC_DISPARITY and torch.isfinite(labels.shared.values).all()
        got = 1 / labels.shared.values[0]
        centres = ((torch.arange(size) + 0.5) * plan.region.side / size).floor().long()
        rows, columns = plan.region.top + centres[:, None], plan.region.left + centres[None, :]
        assert torch.equal(labels.shared.valid[0], valid[0, rows, columns])
        assert torch.allclose(got[labels.shared.valid[0]], depth[0, rows, columns][labels.shared.valid[0]])
        first = plan.patches[0]
        rows, columns = (
            plan.region.top + first.top + torch.arange(10),
            plan.region.left + first.left + torch.arange(10),
        )
        assert torch.equal(labels.local.valid[0], valid[0][rows][:, columns])


def test_images_without_truth_are_quarantined_for_it(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    shards_ = sources.tars(tmp_path / "sa_0.tar")
    outcome = label(shards_, [(TRUTH, TRUTH)], out=tmp_path / "out", crops=CROPS)
    assert outcome.complete and outcome.samples == 0 and not list((tmp_path / "out").glob("*.tar"))
    assert all("no ground truth" in line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"])
    assert label(shards_, [(TRUTH, TRUTH)], out=tmp_path / "out", crops=CROPS).skipped == 1


def test_a_key_of_two_tars_is_kept_once_by_readers(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    make_tar(tmp_path / "sa_1.tar", count=2, first=1)
    run(sources.tars(str(tmp_path / "*.tar")), tmp_path / "out", draws=1)
    assert LabelDataset(tmp_path / "out").image_keys == ["sa_0", "sa_1", "sa_2"]
    [line] = read_manifest(tmp_path / "out")["quarantine"]
    assert line["key"] == "sa_1" and "sa_0-000.tar has it too" in line["reason"]


def test_images_smaller_than_the_crop_are_quarantined_or_used(tmp_path):
    pack(tmp_path / "sa_0.tar", [("a.jpg", encoded(picture(12, 40))), ("b.jpg", encoded(picture(30, 40)))])
    tar = sources.tars(tmp_path / "sa_0.tar")
    run(tar, tmp_path / "out")
    [line] = read_manifest(tmp_path / "out")["quarantine"]
    assert line["key"] == "a" and "smaller than the smallest crop" in line["reason"]
    run(tar, tmp_path / "small", crops=replace(CROPS, small="use"))
    assert len(LabelDataset(tmp_path / "small")) == 4


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_crops_of_many_images_share_batches(tars, tmp_path):
    teacher = Formula()
    run(tars, tmp_path / "out", teacher, batch_size=8, samples_per_part=100, crops=replace(CROPS, patch_size=16))
    assert teacher.sizes.count(8) >= len(teacher.sizes) - 2 and sum(teacher.sizes) > 60


@dataclass
class Sick(Formula):
    """Fails on pictures of one colour."""

    how: str = "raise"

    def predict(self, images):
        depth = super().predict(images)
        # picture(seed=3) is the one whose blue is 160.
        sick = ((images[:, 2].mean((1, 2)) * 255).round() - 160).abs() < 5
        if self.how == "raise" and sick.any():
            raise RuntimeError("kernel\nfault at 0x7f0011223344")
        values, valid = depth.values.clone(), depth.valid.clone()
        values[sick, 3, 3] = torch.nan if self.how == "nan" else values[sick, 3, 3]
        valid[sick] = valid[sick] & (self.how != "invalid")
        return DepthMap(values, valid, depth.kind)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "formula failed on patch 0: kernel"),
        ("nan", "returned NaN on 1 pixels"),
        ("invalid", "no valid pixel"),
    ],
)
def test_a_teacher_that_fails_on_one_image_costs_that_image_alone(tars, tmp_path, how, reason):
    run(tars, tmp_path / "well")
    run(tars, tmp_path / "sick", Sick(how=how))
    well, sick = LabelDataset(tmp_path / "well"), LabelDataset(tmp_path / "sick")
    lost = {"sa_3", "sa_8"}
    assert set(sick.image_keys) == set(well.image_keys) - lost
    lines = [line for line in read_manifest(tmp_path / "sick")["quarantine"] if line["key"] not in ("sa_2", "readme")]
    assert [line["key"] for line in lines] == ["sa_3-0", "sa_3-1", "sa_8-0", "sa_8-1"]
    assert all(reason in line["reason"] and "\n" not in line["reason"] for line in lines)
    for i, key in enumerate(sick.keys):
        other = well[well.keys.index(key)]
        assert torch.equal(sick[i].labels["formula"].shared.values, other.labels["formula"].shared.values)


@dataclass
class Broken(Formula):
    error: Exception = field(default_factory=lambda: RuntimeError("no kernel image"))

    def predict(self, images):
        raise self.error


def test_a_teacher_that_fails_on_everything_stops_the_run(tars, tmp_path):
    for samples_per_part in (4, 100):
        with pytest.raises(annotate.TeacherFailedError, match="samples failed.*no kernel image"):
            run(tars, tmp_path / str(samples_per_part), Broken(), samples_per_part=samples_per_part)
        assert not list((tmp_path / str(samples_per_part)).glob("*.tar"))


def test_contract_breaches_and_lack_of_memory_stop_the_run(tars, tmp_path):
    with pytest.raises(annotate.TeacherFailedError, match="not enough memory for one crop"):
        run(tars, tmp_path / "a", Broken(error=torch.OutOfMemoryError("12 GiB")))
    small = Formula()
    small.predict = lambda images: DepthMap(images[:, 0, ::2], images[:, 0, ::2] > 0, Kind.SCALE_DEPTH)
    with pytest.raises(annotate.TeacherFailedError, match="gave maps"):
        run(tars, tmp_path / "b", small)
    with pytest.raises(TypeError):
        run(tars, tmp_path / "c", Broken(error=TypeError("a bug")))


def test_noise_belongs_to_the_crop(tars, tmp_path):
    asked = []
    teacher = Formula(seeded=True)
    plain = teacher.predict
    teacher.predict = lambda images, keys: (asked.extend(keys), plain(images))[1]
    run(tars[1:], tmp_path / "out", teacher, draws=1)
    assert {"sa_7-0.shared", "sa_7-0.local0", "sa_9-0.shared"} < set(asked) and len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", ["Big", "a.b", "a/b", ""])
def test_teacher_names_that_spoil_file_names_are_refused(tars, tmp_path, name):
    with pytest.raises(ValueError, match="teacher name"):
        label(tars, [(name, Formula())], out=tmp_path / "out", crops=CROPS)


# --- killed, resumed, in parallel -------------------------------------------------------------------------------------


def test_any_number_of_processes_gives_the_same_bytes(tars, tmp_path):
    run(tars, tmp_path / "one")
    for world in (2, 3, 7):
        out = tmp_path / f"of{world}"
        done = [run(tars, out, rank=rank, world=world, threads=1 + rank).complete for rank in reversed(range(world))]
        assert done == [False] * (world - 1) + [True]
        assert contents(out) == contents(tmp_path / "one")


def work(root: str, out: str, rank: int, world: int, wait: float):
    torch.set_num_threads(1)
    tars = sources.tars(str(Path(root) / "sa_{0..1}.tar"))
    run(tars, out, Formula(wait=wait), rank=rank, world=world, threads=2)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.labelling.run", "tests.labelling.test_label"])
    return context


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(tars, tmp_path, processes):
    run(tars, tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    rng = random.Random(3)
    killed = 0
    for attempt in range(9):
        world = 1 + attempt % 3
        begun = [processes.Process(target=work, args=(tmp_path, out, r, world, 0.05)) for r in range(world)]
        for process in begun:
            process.start()
        time.sleep(rng.uniform(0.02, 0.25))
        for process in begun:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        if out.is_dir():
            seen = {name: data for name, data in contents(out).items() if not name.startswith(".")}
            assert all(whole[name] == data for name, data in seen.items()), "what can be seen is complete"
    assert killed >= 3
    assert run(tars, out).complete
    assert contents(out) == whole


def test_two_live_processes_finish_with_one_manifest(tars, tmp_path, processes):
    run(tars, tmp_path / "whole")
    begun = [processes.Process(target=work, args=(tmp_path, tmp_path / "out", r, 2, 0.0)) for r in range(2)]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    assert [process.exitcode for process in begun] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone_and_a_lost_part_is_made_again(tars, tmp_path):
    run(tars, tmp_path / "out", recipe={"a": 1})
    before = contents(tmp_path / "out")
    outcome = run(tars, tmp_path / "out", Broken(), recipe={"a": 2})
    assert outcome.complete and (outcome.parts, outcome.skipped) == (0, 6)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "sa_0-001.tar").write_bytes(before["sa_0-001.tar"][:999])
    assert run(tars, tmp_path / "out", recipe={"a": 1}).parts == 1
    assert contents(tmp_path / "out") == before


def test_a_described_tar_that_is_not_there_yet_is_not_finished(tars, tmp_path):
    out = tmp_path / "out"
    done = [run(tars, out, rank=rank, world=2).complete for rank in range(2)]
    (out / "manifest.json").unlink()
    (out / "sa_0-000.tar").unlink()  # as if its writer, process 0, were between its json and its name
    assert done == [False, True] and not run(tars, out, rank=1, world=2).complete
    assert not (out / "manifest.json").exists()


def test_two_runs_on_one_folder_are_refused_and_a_dead_one_is_not(tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with run_lock(out, rank=0, world=1):
        with pytest.raises(RunLockedError, match=f"is being labelled by process {os.getpid()} on"):
            run(tars, out)
        with pytest.raises(RunLockedError, match="wait for it, stop it"):
            run(tars, out, rank=1, world=2)
    with run_lock(out, rank=0, world=2):
        assert not run(tars, out, rank=1, world=2).complete
    (out / ".claim-0-of-1").write_text("process 99999 on a machine that lost power")
    (out / ".claim-5-of-8").write_text("")
    assert run(tars, out).complete
    assert not [name for name in contents(out) if name.startswith(".")]


def test_other_settings_or_images_are_refused(tars, tmp_path):
    run(tars, tmp_path / "out")
    with pytest.raises(ValueError, match="made with another crops, seed"):
        run(tars, tmp_path / "out", seed=1, crops=replace(CROPS, size=14))
    make_tar(tmp_path / "sa_1.tar", count=2, first=7)
    with pytest.raises(ValueError, match=r"sa_1-000.tar was labelled from other images than .*\(2 then, 2 now\)"):
        run(tars, tmp_path / "out")


def test_a_tar_that_was_cut_and_is_whole_now_is_labelled_again(tars, tmp_path):
    whole = (tmp_path / "sa_1.tar").read_bytes()
    run(tars, tmp_path / "fresh")
    for left in (b"no tar at all", whole[:2500]):
        (tmp_path / "sa_1.tar").write_bytes(left)
        run(tars, tmp_path / "out")
        assert contents(tmp_path / "out") != contents(tmp_path / "fresh")
    (tmp_path / "sa_1.tar").write_bytes(whole)
    assert run(tars, tmp_path / "out").parts == 2  # of two images each; the other tar is left alone
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    verify(tmp_path / "out")


def test_a_tar_with_a_hole_that_is_mended_is_labelled_again(tars, tmp_path):
    path = tmp_path / "sa_0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmember("./sa_1.jpg").offset
    run(tars, tmp_path / "fresh")
    path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
    run(tars, tmp_path / "out")
    assert "sa_1" not in LabelDataset(tmp_path / "out").image_keys
    lines = [line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"]]
    assert any(f"damaged at byte {at}" in line for line in lines)
    path.write_bytes(whole)
    assert run(tars, tmp_path / "out").parts == 4  # the images behind the hole are in later parts now
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_is_to_be_deleted_is_named_to_the_file(tars, tmp_path):
    out = tmp_path / "out"
    run(tars, out)
    (out / "sa_1-x-000.tar").write_bytes(b"of another tar, sa_1-x.tar")
    (tmp_path / "sa_1.tar").unlink()
    (tmp_path / "sa_1.tar").mkdir()
    with pytest.raises(ValueError, match=r"\(2 then, 0 now: .*sa_1.tar: a folder, not a file\)") as error:
        run(tars, out)
    pattern = re.search(r"delete (\S+) there", str(error.value))[1]
    assert sorted(path.name for path in out.glob(pattern)) == [
        f"sa_1-00{i}.{s}" for i in (0, 1) for s in ("json", "tar")
    ]


def test_one_tar_that_cannot_be_read_does_not_stop_the_others(tars, tmp_path):
    (tmp_path / "sa_1.tar").unlink()
    (tmp_path / "sa_1.tar").symlink_to(tmp_path / "absent.tar")
    outcome = run(sources.tars(str(tmp_path / "sa_*.tar")), tmp_path / "out")
    assert outcome.complete and outcome.samples == 12
    assert any("a link to nothing" in line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"])


def test_a_full_disk_loses_nothing_finished(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    plain, left = shards._Hashing.write, [len(whole["sa_0-000.tar"]) + 5000]

    def write(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards._Hashing, "write", write)
        with pytest.raises(OSError, match=r"cannot write .*sa_0-001.tar: No space left on device"):
            run(tars, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["sa_0-000.json", "sa_0-000.tar", "settings.json"]
    run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_tar_whose_tail_goes_bad_costs_its_tail_alone(tars, tmp_path):
    run(tars, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "sa_1.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\0") + b"\0" * 512 + b"\xff" * 700)  # a download that went on with noise
    assert run(tars, tmp_path / "out").parts == 0 and contents(tmp_path / "out") == before
    run(tars, tmp_path / "again")
    again = contents(tmp_path / "again")
    assert {k: v for k, v in again.items() if k.endswith("tar")} == {
        k: v for k, v in before.items() if k.endswith("tar")
    }
    assert any("sa_1.tar" in line["origin"] for line in read_manifest(tmp_path / "again")["quarantine"])
    path.write_bytes(whole[: len(whole) // 2])  # and one that was cut: other images than before, and nothing is lost
    with pytest.raises(ValueError, match="labelled from other images than"):
        run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_that_cannot_be_written_to_is_named_and_keeps_what_it_has(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(tars[:1], out)
    before = contents(out)
    plain = Path.open

    def refuse(self, mode="r", *args, **options):
        if out in self.parents and set(mode) & set("wa"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match="cannot write in the labels folder .*out: Permission denied"):
            run(tars, out)
    assert contents(out) == before
    assert run(tars, out).complete


def test_a_folder_that_cannot_be_made_is_named(tars, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the labels folder .*file"):
        run(tars, tmp_path / "file" / "out")


def test_progress_tells_time_and_disk(tars, tmp_path):
    told = []
    outcome = run(tars, tmp_path / "out", report=lambda done, total, **numbers: told.append((done, total, numbers)))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told) and told[-1][:2] == (10, 10)
    last = told[-1][2]
    assert set(last) == {"images_per_s", "bytes_per_image", "quarantined", "eta_s", "disk_bytes"}
    assert last["eta_s"] == 0 and last["disk_bytes"] == outcome.bytes and last["quarantined"] == 2


def test_labels_have_an_address_that_depends_on_what_made_them():
    teachers = [{"name": "a", "weights": "x"}]
    address = labels_hash({"tars": "a", "n": 1}, CROPS, teachers)
    assert len(address) == 16 and address == labels_hash({"n": 1, "tars": "a"}, CROPS, teachers)
    assert address != labels_hash({"tars": "b", "n": 1}, CROPS, teachers)
    assert address != labels_hash({"tars": "a", "n": 1}, replace(CROPS, size=14), teachers)


# --- without shards ---------------------------------------------------------------------------------------------------


def test_online_samples_are_the_stored_ones_before_quantization(tars, tmp_path):
    run(tars, tmp_path / "out")
    stored = LabelDataset(tmp_path / "out")
    online = OnlineDataset(tars, [("formula", Formula())], crops=CROPS, draws=2)
    keys = [key for key in online.keys if not key.startswith("sa_2-")]
    assert keys == stored.keys and online.image_keys[0] == "sa_0" and online.teachers == ["formula"]
    for i in range(0, len(keys), 4):
        got, want = (sample.labels["formula"] for sample in (online[online.keys.index(keys[i])], stored[i]))
        for a, b in ((got.shared, want.shared), (got.local, want.local)):
            assert torch.equal(a.valid, b.valid) and (a.values - b.values)[a.valid].abs().max() < MAX_ERROR + 1e-6
    assert collate([online[0], online[1]]).images.shape == (2, 3, 16, 16)


def test_online_replaces_a_bad_image_by_the_next_and_says_so(tars):
    online = OnlineDataset(tars, [("formula", Formula())], crops=CROPS)
    assert online[2].key == online[2].key == "sa_3-0" and [q.key for q in online.quarantine] == ["readme", "sa_2-0"]
    assert [sample.key for sample in online].count("sa_3-0") == 2, "iteration ends"
    with pytest.raises(ValueError, match="none of 10 images can be labelled; the last: no ground truth"):
        OnlineDataset(tars, [(TRUTH, TRUTH)], crops=CROPS)[0]
    with pytest.raises(BadImageError, match="smaller than"):
        label_photo(Photo("a", torch.zeros(3, 9, 9, dtype=torch.uint8), None, "a"), [], crops=CROPS)
