"""Images at another path: their labels are found, and may be used, as long as the files are the same."""

from __future__ import annotations

import shutil

import pytest

from distill.app import build, recipe
from distill.app.cli import main
from distill.app.filter_sources import open_sources
from distill.app.strict import RecipeError
from distill.shards.shards import MANIFEST, read_manifest, write_manifest
from tests.inference.fake import grey

RECIPE = """
[run]
name = "moved"
out = "{folder}/run"
device = "cpu"
[[images]]
photos = "{folder}/one/pics"
[crops]
size = 32
min_side = 32
patches = "none"
[[teachers]]
name = "analytic"
[labels]
samples_per_part = 2
"""


@pytest.fixture
def path(tmp_path, capsys):
    for i in range(5):
        grey(tmp_path / "one" / "pics" / f"{i}.png", 9 * i, size=(40, 36 + i))
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    assert main(["label", str(path)]) == 0 and "path was different" not in capsys.readouterr().err
    (tmp_path / "one").rename(tmp_path / "two")
    return path


def test_labels_of_images_that_moved_are_told_of_and_used(path, tmp_path, capsys):
    old = build.labels_folder(recipe.load(path))
    there = f"images.0.photos={tmp_path}/two/pics"
    assert main(["label", str(path), "--set", there]) == 0
    assert f"add --set labels.root={old}" in capsys.readouterr().err.replace("\n", " ")
    assert main(["label", str(path), "--set", there]) == 0, "begun before: nothing is told again"
    assert "path was different" not in capsys.readouterr().err
    use = [there, f"labels.root={old}"]
    before = {file.name: file.stat().st_mtime_ns for file in old.iterdir()}
    assert main(["label", str(path), *(word for one in use for word in ("--set", one))]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in old.iterdir()} == before
    assert len(build.training_labels(recipe.load(path, use))) == 5
    with pytest.raises(RecipeError, match="labelled with other crops than"):
        build.training_labels(recipe.load(path, [*use, "crops.overlap=0.2"]))


@pytest.mark.parametrize("change", ["another file", "one less", "one more", "gone", "another name"])
def test_other_files_are_not_taken_for_them(path, tmp_path, change):
    old, pics = build.labels_folder(recipe.load(path)), tmp_path / "two" / "pics"
    if change == "another file":
        grey(pics / "4.png", 200, size=(40, 40))
    elif change == "one less":
        (pics / "4.png").unlink()
    elif change == "one more":
        grey(pics / "5.png", 1, size=(40, 40))
    elif change == "gone":
        shutil.rmtree(pics)
    else:
        pics = pics.rename(tmp_path / "two" / "photos")
    with pytest.raises(RecipeError, match="labelled with other images than"):
        build.training_labels(recipe.load(path, [f"images.0.photos={pics}", f"labels.root={old}"]))


def test_a_folder_of_another_name_is_told_to_be_renamed_and_never_labelled_among_the_others(path, tmp_path, capsys):
    old = build.labels_folder(recipe.load(path))
    (tmp_path / "two" / "pics").rename(tmp_path / "photos")
    there = ["label", str(path), "--set", f"images.0.photos={tmp_path}/photos"]
    assert main(there) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"stop this command, rename photos back to pics, and add --set labels.root={old}" in said
    before = {file.name: file.stat().st_mtime_ns for file in old.iterdir()}
    assert main([*there, "--set", f"labels.root={old}"]) == 2
    assert "has finished labels of other images (pics_000000-000.tar" in " ".join(capsys.readouterr().err.split())
    assert {file.name: file.stat().st_mtime_ns for file in old.iterdir()} == before


def test_labels_folders_of_one_name_are_told_apart_by_what_is_in_them(path, tmp_path):
    first = build.labels_folder(recipe.load(path))
    here, there = tmp_path / "a" / "labels", tmp_path / "b" / "labels"
    for copy in (here, there):
        shutil.copytree(first, copy)

    def run(root):
        return build.identity(recipe.load(path, [f"labels.root={root}"]))

    assert run(here) == run(there), "the same labels at two places are one run"
    manifest = read_manifest(there)
    manifest["shards"][0]["sha256"] = "0" * 64
    write_manifest(there, manifest)
    assert run(here) != run(there), "a run would go on with other labels, and read their cached latents"
    what = [open_sources([str(folder)])[0].what for folder in (here, there, first)]
    assert len({*what}) == 3 and what[2] == f"{first}, analytic", "scores of replaced labels are not gone on with"
    write_manifest(first, manifest)
    assert run(first) == build.identity(recipe.load(path)), "named by their hash, as runs begun before know them"
    (there / MANIFEST).unlink()
    assert build.labels_address(recipe.load(path, [f"labels.root={there}"])) == first.name, "to be labelled there"


def test_another_runs_labels_are_told_of_and_used(tmp_path, capsys):
    path = tmp_path / "r.toml"
    for i in range(2):
        grey(tmp_path / "one" / "pics" / f"{i}.png", 9 * i, size=(40, 40))
    path.write_text(RECIPE.format(folder=tmp_path).replace("/run", "/runs/a"))
    second = ["--set", f"run.out={tmp_path}/runs/b"]
    with pytest.raises(FileNotFoundError, match="with this recipe first$"):
        build.training_labels(recipe.load(path))
    assert main(["label", str(path)]) == 0
    old = build.labels_folder(recipe.load(path))
    assert build.labels_of_another_run(recipe.load(path)) is None, "its own"
    with pytest.raises(FileNotFoundError, match=f"or use those of another run: --set labels.root={old}"):
        build.training_labels(recipe.load(path, [second[1]]))
    assert f"add --set labels.root={old}" not in capsys.readouterr().err.replace("\n", " ")
    assert main(["label", str(path), *second]) == 0
    assert f"add --set labels.root={old}" in capsys.readouterr().err.replace("\n", " ")
    assert main(["label", str(path), *second]) == 0, "begun before: nothing is told again"
    assert "labels.root" not in capsys.readouterr().err
    assert len(build.training_labels(recipe.load(path, [second[1], f"labels.root={old}"]))) == 2
