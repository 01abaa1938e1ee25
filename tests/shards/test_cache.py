"""Labels at a URL of which only some tars are kept: the same samples, within the limit, a tar by one process."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill.app import build
from distill.app.cli import main
from distill.app.commands import run_train
from distill.app.recipe import load
from distill.app.strict import RecipeError
from distill.core.files import take_lock
from distill.shards import mirror
from distill.shards.cache import TarCache, Traffic
from distill.shards.shards import LabelDataset, read_manifest, verify
from distill.training.trainlog import read
from tests.ranks import ended_as

pytest.importorskip("fsspec")

RECIPE = """
[run]
name = "cached"
out = "{out}"
device = "cpu"
[[images]]
scenes = 8
size = 56
[crops]
size = 28
min_side = 40
patches = "none"
[[teachers]]
name = "truth"
options = {{ own_range = true }}
[labels]
samples_per_part = 1
mirror = "{url}"
[student]
encoder = "test_vit"
encoder_options = {{ timm_options = {{ depth = 1, embed_dim = 32 }}, blocks = [0], pos_grid = 4 }}
decoder = "sdt"
decoder_options = {{ fusion_channels = 8 }}
[loss]
normalization = "global"
[train]
steps = 6
batch_size = 2
val_fraction = 0.3
workers = 2
eval_every = 3
save_every = 0
warmup_steps = 1
precision = "fp32"
freeze_encoder = false
trackers = []
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A recipe whose labels are made and sent, their folder, and where they were sent."""
    here = tmp_path_factory.mktemp("cache")
    recipe = here / "r.toml"
    recipe.write_text(RECIPE.format(out=here / "run", url=f"file://{here}/far"))
    assert main(["label", str(recipe)]) == 0
    return recipe, build.labels_folder(load(recipe)), here / "far"


def tars(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # it made way for another one
            found[path.name] = path.stat().st_size
    return found


def begun(far: Path, folder: Path, kept: float) -> tuple[TarCache, list[str]]:
    """A cache that holds so many of the largest tar, and the names of all tars."""
    mirror.fetch(f"file://{far}", folder, cached=True)
    sizes = {shard["name"]: shard["bytes"] for shard in read_manifest(folder)["shards"]}
    return TarCache(f"file://{far}", folder, int(kept * max(sizes.values()))), sorted(sizes)


def spies(log: Path):
    """TarCache's two ways to the far tars, which also write into `log` what was asked for."""
    real, ranged = TarCache._fetch, TarCache._ranged

    def spied(self, name, new):
        real(self, name, new)
        there = sum(tars(self.folder).values())
        for partial in self._aside.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process's, which is whole by now
                there += partial.stat().st_size
        with log.open("a") as file:
            file.write(f"{name} {there}\n")

    def spied_too(self, name, start, size):
        with log.open("a") as file:
            file.write(f"{name}:{size} 0\n")
        return ranged(self, name, start, size)

    return spied, spied_too


@pytest.fixture
def fetched(monkeypatch, tmp_path, forked):
    """What has been fetched by all processes: (name, bytes of tars then in the folder) each."""
    log = tmp_path / "fetched"
    for name, spy in zip(("_fetch", "_ranged"), spies(log), strict=True):
        monkeypatch.setattr(TarCache, name, spy)
    return lambda: [(n, int(b)) for n, b in map(str.split, log.read_text().splitlines())] if log.exists() else []


def test_training_on_a_cache_smaller_than_the_labels_is_the_same_to_the_bit(made, tmp_path, fetched):
    recipe, folder, _ = made
    straight = run_train(load(recipe))
    limit = int(2.5 * max(tars(folder).values()))
    small = load(recipe, [f"run.out={tmp_path / 'small'}", f"labels.cache_gb={limit / 1e9}"])
    cached = run_train(small)
    told = [
        [{key: line.get(key) for key in ("step", "loss", "heldout")} for line in read(run.log)]
        for run in (straight, cached)
    ]
    assert told[0] == told[1] and len([line for line in told[0] if line["loss"]]) == 6
    ours, theirs = (load_file(run.folder / "model.safetensors") for run in (cached, straight))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    names, bytes_there = zip(*fetched(), strict=True)
    whole = [name for name in names if ":" not in name]
    assert len(whole) == len(set(whole)) >= 2 and max(bytes_there) <= limit, "tars are fetched once, within the limit"
    assert len(whole) < len(names), "the others are read by ranges"
    kept = build.labels_folder(small)
    assert 0 < sum(tars(kept).values()) <= limit < sum(tars(folder).values())
    assert len(list(kept.glob("*-[0-9]*.json"))) == len(tars(folder)) and verify(kept) == []


def read_all(cache_: TarCache, names: list[str], wanted: dict[str, bytes], log: Path) -> None:
    TarCache._fetch, TarCache._ranged = spies(log)
    wrong = [name for name in names if cache_.read(name, 512, 100) != wanted[name]]
    os._exit(len(wrong))


@pytest.mark.parametrize("kept", [100.0, 1.0])
def test_processes_share_what_one_of_them_fetches(made, tmp_path, fetched, kept, processes):
    _, folder, far = made
    shared, names = begun(far, tmp_path / folder.name, kept)
    wanted = {name: (folder / name).read_bytes()[512:612] for name in names}
    orders = (names, names[::-1], names)
    assert ended_as([(read_all, shared, order, wanted, tmp_path / "fetched") for order in orders], processes) == [0] * 3
    whole, parts = ([n for n, _ in fetched() if (":" in n) == ranged] for ranged in (False, True))
    if kept > 1:
        assert sorted(whole) == names and not parts, "each once"
    else:
        assert len(whole) == 1 and {*parts} == {f"{name}:100" for name in names if name not in whole}
    assert max(there for _, there in fetched()) <= shared.limit
    assert not list((shared.folder / ".cached").iterdir()), "neither locks nor halves are left"


def test_what_is_here_stays_and_a_smaller_limit_is_kept_to(made, tmp_path, fetched):
    _, folder, far = made
    kept, names = begun(far, tmp_path / folder.name, 2.0)
    first, second, third, *_ = sorted(names, key=lambda name: tars(folder)[name], reverse=True)
    for name in (first, second, third, first, third):
        assert kept.read(name, 512, 50) == (folder / name).read_bytes()[512:562]
    assert [name for name, _ in fetched()] == [first, second, f"{third}:50", f"{third}:50"]
    (kept.folder / first).write_bytes(bytes(tars(folder)[first] - 1))  # cut; it makes way for itself
    assert kept.read(first, 512, 50) == (folder / first).read_bytes()[512:562] and tars(kept.folder).keys() == {
        first,
        second,
    }
    assert tars(kept.folder)[first] == tars(folder)[first]
    TarCache(f"file://{far}", kept.folder, tars(folder)[first])
    assert len(tars(kept.folder)) == 1
    none = TarCache(f"file://{far}", kept.folder, 1)
    assert not tars(kept.folder) and none.read(first, 512, 50) == (folder / first).read_bytes()[512:562]


def test_what_a_killed_process_was_fetching_gives_its_room_back(made, tmp_path):
    _, folder, far = made
    kept, names = begun(far, tmp_path / folder.name, 2.0)
    dead, ours, live = (kept.folder / f".cached/{name}.12ab.partial" for name in names[:3])
    for left in (dead, ours, live):
        left.touch()
        os.utime(left, (time.time() - 1000,) * 2)
    lock = take_lock(kept.folder / f".cached/{names[2]}.lock")
    assert lock is not None
    assert kept.read(names[1], 0, 5) == kept.read(names[3], 0, 5) == (folder / names[1]).read_bytes()[:5]
    assert live.exists() and not dead.exists() and not ours.exists()
    assert [*tars(kept.folder)] == [names[1]], "there is room for two, and a live process is fetching one"
    lock.release()
    young = kept.folder / f".cached/{names[0]}.34cd.partial"  # of another node, whose lock is not seen here
    young.touch()
    assert kept.read(names[2], 0, 5) == (folder / names[2]).read_bytes()[:5]
    assert [*tars(kept.folder)] == [names[1]] and [*young.parent.iterdir()] == [young]


def test_damage_and_a_full_disk_are_one_line_each(made, tmp_path, monkeypatch):
    _, folder, far = made
    shutil.copytree(far / folder.name, tmp_path / "bad" / folder.name)
    kept, names = begun(tmp_path / "bad", tmp_path / folder.name, 3.0)
    none = TarCache(f"file://{tmp_path / 'bad'}", kept.folder, 1)
    there = tmp_path / "bad" / folder.name / names[0]
    there.write_bytes(there.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=rf"^file://.*{names[0]} is damaged, its checksum is not .* fetched again: "):
        kept.read(names[0], 0, 1)
    there.write_bytes(b"made anew")
    with pytest.raises(
        OSError, match=rf"{names[0]} cannot be read: it has 9 bytes, not the \d+ that manifest.json says"
    ):
        none.read(names[0], 0, 1)
    there.unlink()
    for one in (kept, none):
        with pytest.raises(OSError, match=rf"^file://.*{names[0]} cannot be read: "):
            one.read(names[0], 0, 1)
    taken, system = [], type(mirror.file_system(f"file://{far}")[0])
    real = system.get_file

    def once(self, remote, local, **kwargs):
        taken.append(remote)
        if len(taken) == 1:
            Path(local).write_bytes(b"half")
        elif len(taken) == 2:
            return real(self, remote, local, **kwargs)
        else:
            raise OSError(errno.ENOSPC, "No space left on device", local)
        return None

    monkeypatch.setattr(system, "get_file", once)
    assert kept.read(names[1], 0, 5) == (folder / names[1]).read_bytes()[:5] and len(taken) == 2
    with pytest.raises(OSError, match=rf"cannot write .*/{names[2]}: No space left on device"):
        kept.read(names[2], 0, 1)
    assert len(taken) == 3 and not list((kept.folder / ".cached").iterdir())
    plain, fell = system.cat_file, []

    def reset_once(self, *given, **options):
        if not fell:
            fell.append(OSError(errno.ECONNRESET, "Connection reset"))
            raise fell[0]
        return plain(self, *given, **options)

    monkeypatch.setattr(system, "cat_file", reset_once)
    assert none.read(names[3], 512, 50) == (folder / names[3]).read_bytes()[512:562] and fell
    shard = read_manifest(folder)["shards"][0]
    assert [key for key, _, _ in none.index(shard)]
    with pytest.raises(ValueError, match=r"\.json does not say where the samples of its tar are"):
        none.index(shard | {"sha256": "0" * 64})


def test_a_cache_becomes_whole_and_whole_labels_lose_nothing(made, tmp_path, capsys):
    recipe, folder, _ = made
    bytes_ = max(tars(folder).values())
    some = load(recipe, [f"run.out={tmp_path / 'other'}", f"labels.cache_gb={1.5 * bytes_ / 1e9}"])
    dataset = build.training_labels(some)
    assert dataset.keys == LabelDataset(folder).keys and not tars(dataset.folder)
    assert dataset[0].image.equal(LabelDataset(folder)[0].image) and len(tars(dataset.folder)) == 1
    assert main(["label", str(recipe), "--set", f"run.out={tmp_path / 'other'}"]) == 2
    assert "keeps only some tars of finished labels (labels.cache_gb)" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"is missing, .*the folder caches only some tars"):
        LabelDataset(dataset.folder)
    whole = build.training_labels(load(recipe, [f"run.out={tmp_path / 'other'}"]))
    assert whole.cache is None and tars(whole.folder) == tars(folder) and verify(whole.folder) == []
    assert build.training_labels(some).cache is None and tars(whole.folder) == tars(folder)
    with pytest.raises(RecipeError, match="cache_gb is for labels that are fetched: set labels.mirror"):
        load(recipe, ["labels.mirror=", "labels.cache_gb=1"])


def test_what_a_cache_costs_is_said():
    traffic = Traffic(tars=200, samples=200_000, size=160e9, limit=80.5e9)
    assert traffic.bytes_per_epoch == 80e9
    assert traffic.sentence == (
        "labels: 80.5 GB of 160 GB in 200 tars are kept here; an epoch fetches about 80 GB of the others, in 100,000 "
        "reads"
    )
    assert Traffic(tars=2, samples=9, size=1e9, limit=1e9).sentence.endswith("each tar is fetched once")


def test_a_folder_that_another_process_completes_is_read_on(made, tmp_path, monkeypatch):
    _, folder, far = made
    kept, names = begun(far, tmp_path / folder.name, 2.0)
    plain, completed = TarCache._open_cached, []

    def late(self, name):
        found = plain(self, name)
        if not completed:
            completed.append(mirror.fetch(f"file://{far}", kept.folder))
        return found

    monkeypatch.setattr(TarCache, "_open_cached", late)
    assert kept.read(names[0], 0, 9) == (folder / names[0]).read_bytes()[:9] and completed
