"""Labels sent to a URL come back as they were: after a stop, after damage, and only when they are whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from distill.app import build
from distill.app.cli import main
from distill.app.recipe import load
from distill.app.strict import RecipeError
from distill.core import seal
from distill.shards import mirror
from distill.shards.shards import write_manifest

pytest.importorskip("fsspec")

RECIPE = """
[run]
name = "mirrored"
out = "{out}"
[[images]]
scenes = 3
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
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe whose labels are made and sent, and where they were sent."""
    here = tmp_path_factory.mktemp("mirror")
    recipe = here / "r.toml"
    recipe.write_text(RECIPE.format(out=here / "run", url=f"file://{here}/far"))
    assert main(["label", str(recipe)]) == 0
    return recipe, here / "far"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_what_is_fetched_is_what_was_sent(made, tmp_path):
    recipe, far = made
    folder = build.labels_folder(load(recipe))
    wanted = contents(folder)
    assert contents(far / folder.name) == wanted and len([n for n in wanted if n.endswith(".tar")]) == 3
    elsewhere = load(recipe, [f"run.out={tmp_path / 'elsewhere'}"])
    dataset = build.training_labels(elsewhere)
    assert len(dataset) == 3
    assert contents(build.labels_folder(elsewhere)) == wanted
    assert mirror.publish(folder, f"file://{far}") == 0  # all of it is there


def test_a_stopped_way_goes_on_and_nothing_whole_is_taken_twice(made, tmp_path, monkeypatch):
    recipe, far = made
    name = build.labels_folder(load(recipe)).name
    folder = tmp_path / name
    taken = []
    system = type(mirror.file_system(f"file://{far}")[0])
    real = system.get_file

    def limited(self, remote, local, **kwargs):
        taken.append(Path(remote).name)
        if len(taken) == 3:
            raise OSError("the line went dead")
        return real(self, remote, local, **kwargs)

    monkeypatch.setattr(system, "get_file", limited)
    with pytest.raises(OSError, match="cannot be read: .*the line went dead"):
        mirror.fetch(f"file://{far}", folder)
    assert not (folder / "manifest.json").exists()
    mirror.fetch(f"file://{far}", folder)
    assert contents(folder) == contents(far / name)
    tars = [one for one in taken if one.endswith(".tar")]
    assert len(tars) == 4 and len(set(tars)) == 3  # the one that broke, again


def test_the_manifest_is_sent_last_and_what_is_cut_there_is_sent_again(made, tmp_path, monkeypatch):
    name = build.labels_folder(load(made[0])).name
    folder, far = tmp_path / "run" / name, tmp_path / "far" / name
    shutil.copytree(made[1] / name, folder)
    (folder / ".unfinished.json").write_text("{}")
    system = type(mirror.file_system(f"file://{far}")[0])
    real, sent, told = system.put_file, [], []
    monkeypatch.setattr(system, "put_file", lambda self, *paths: (sent.append(Path(paths[1]).name), real(self, *paths)))
    for wanted in (sorted(contents(folder)), [tar := min(p.name for p in folder.glob("*.tar"))], ["manifest.json"]):
        sent.clear(), told.clear()
        count = mirror.publish(folder, f"file://{far.parent}/", report=lambda *at: told.append(at))
        assert sorted(sent) == wanted and count == len(wanted) and not (far / ".unfinished.json").exists()
        assert "manifest.json" not in sent[:-1], "a folder with a manifest is whole"
        assert told == [(i + 1, len(contents(folder))) for i in range(len(contents(folder)))]
        if sent[0] == tar and len(sent) == 1:
            (far / "manifest.json").write_text('["damaged"]')
        else:
            (far / tar).write_bytes((far / tar).read_bytes()[:-1])
    told.clear()
    (far / tar).write_bytes((folder / tar).read_bytes())
    mirror.fetch(f"file://{far.parent}/", tmp_path / "back" / name, report=lambda *at: told.append(at))
    assert told == [(i + 1, len(contents(far)) - 1) for i in range(len(contents(far)) - 1)]
    assert not (tmp_path / "back" / name / ".mirror").exists()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system, "put_file", refused)
    with pytest.raises(OSError, match=f"file://{tmp_path}/other/{name} cannot be written: .*call again"):
        mirror.publish(folder, f"file://{tmp_path}/other")


def test_damage_and_absence_are_one_line_each(made, tmp_path):
    recipe, far = made
    name = build.labels_folder(load(recipe)).name
    shutil.copytree(far / name, tmp_path / "bad" / name)
    tar = sorted((tmp_path / "bad" / name).glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=f"{tar.name} is damaged there, its checksum is not the manifest's"):
        mirror.fetch(f"file://{tmp_path}/bad", tmp_path / "run" / name)
    with pytest.raises(FileNotFoundError, match="has no finished labels"):
        mirror.fetch(f"file://{tmp_path}/nothing", tmp_path / "other" / name)
    with pytest.raises(RecipeError, match="must be a URL"):
        load(recipe, ["labels.mirror=/mnt/labels"])


def test_memory_and_the_address_do_not_know_the_mirror(made, tmp_path):
    recipe, _ = made
    folder = build.labels_folder(load(recipe))
    assert build.labels_folder(load(recipe, ["labels.mirror="])).name == folder.name
    assert mirror.publish(folder, "memory://labels") == len(contents(folder))
    mirror.fetch("memory://labels", tmp_path / folder.name)
    assert contents(tmp_path / folder.name) == contents(folder)


def test_a_tar_labelled_again_replaces_one_of_the_same_size(made, tmp_path):
    recipe, far = made
    name = build.labels_folder(load(recipe)).name
    shutil.copytree(far / name, tmp_path / "run" / name)
    shutil.copytree(far / name, tmp_path / "far" / name)
    tar = sorted((tmp_path / "run" / name).glob("*.tar"))[0]
    manifest = json.loads((tmp_path / "run" / name / "manifest.json").read_text())
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    manifest["shards"][0]["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    assert manifest["shards"][0]["name"] == tar.name
    write_manifest(tmp_path / "run" / name, manifest)
    mirror.publish(tmp_path / "run" / name, f"file://{tmp_path}/far")
    mirror.fetch(f"file://{tmp_path}/far", tmp_path / "back" / name)
    assert contents(tmp_path / "back" / name) == contents(tmp_path / "run" / name)


def test_a_manifest_that_climbs_out_is_refused(made, tmp_path):
    recipe, far = made
    name = build.labels_folder(load(recipe)).name
    shutil.copytree(far / name, tmp_path / "far" / name)
    path = tmp_path / "far" / name / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../../stolen.tar"
    manifest.pop(seal.KEY)  # as its writer would have it, or it were only damaged
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'../../stolen.tar'.*refused"):
        mirror.fetch(f"file://{tmp_path}/far", tmp_path / "run" / name)
