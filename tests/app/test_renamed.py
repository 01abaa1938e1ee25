"""Keys that had another name: a recipe is told the new one; what was made with them is still read and learnt from."""

from __future__ import annotations

import json

import pytest

from distill.app import build, recipe, renamed
from distill.app.cli import main
from distill.app.strict import RecipeError
from distill.labelling.manifest import SETTINGS
from distill.shards.shards import MANIFEST, verify
from tests.app.test_repair import RECIPE, flip
from tests.labelling.formula import contents, make_tar


def old_words(table: dict) -> dict:
    """A recipe's table as it was written before the keys got their present names."""
    back = {new: old for old, new in renamed.RENAMED.items()}
    old = {}
    for name, part in table.items():
        parts = [
            {back.get(f"{name}.{key}", f"{name}.{key}").partition(".")[2]: value for key, value in one.items()}
            for one in (part if isinstance(part, list) else [part])
        ]
        old[name] = parts if isinstance(part, list) else parts[0]
    old["labels"] |= {"store": {"as_is": "own"}.get(old["labels"]["store"], old["labels"]["store"])}
    old["labels"] |= {"sky": {"teacher": "own"}.get(old["labels"]["sky"], old["labels"]["sky"])}
    for new in ("betas", "kind", "teacher_shares", "eval_batch_size", "alarm_growth", "random_resized_crop"):
        old["train"].pop(new)
    return old


@pytest.mark.parametrize(("old", "new"), list(renamed.RENAMED.items()))
def test_an_old_key_is_told_its_name(old, new):
    name, _, key = old.partition(".")
    part, path = ([{key: 1}], f"{name}[0]") if name == "images" else ({key: 1}, name)
    with pytest.raises(RecipeError) as caught:
        recipe.parse({"run": {"name": "x"}, name: part})
    assert str(caught.value) == f"recipe: {path}.{key} is renamed to {path}.{new.partition('.')[2]}"


def test_an_old_value_is_told_its_name():
    for key in ("store", "sky"):
        with pytest.raises(RecipeError, match=f"labels.{key} = 'own' is renamed to '(as_is|teacher)'"):
            recipe.parse({"run": {"name": "x"}, "labels": {key: "own"}})


def test_every_new_name_is_a_key_and_no_old_one_is():
    keys = {f"{name}.{key}" for name, part in recipe.as_table(whole()).items() for key in keys_of(part)}
    assert set(renamed.RENAMED.values()) <= keys and not keys & set(renamed.RENAMED)


def whole() -> recipe.Recipe:
    table = {"run": {"name": "x"}, "images": [{"scenes": 1}], "teachers": [{"name": "truth"}]}
    return recipe.parse(table | {"benchmarks": [{"name": "scenes"}]})


def keys_of(part):
    return {key for one in (part if isinstance(part, list) else [part]) for key in one}


@pytest.fixture
def old_labels(tmp_path):
    """A finished labels folder with manifest and settings in the old words, at an address of its own; its recipe."""
    for i in range(2):
        make_tar(tmp_path / f"sa_{i}.tar", first=10 * i)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(out=tmp_path / "run", tars=tmp_path / "sa_{0..1}.tar"))
    assert main(["label", str(path)]) == 0
    folder = build.labels_folder(recipe.load(path)).rename(tmp_path / "of-old")
    manifest, settings = (json.loads((folder / name).read_text()) for name in (MANIFEST, SETTINGS))
    crops = settings["crops"]
    settings |= {"draws": crops.pop("crops_per_image"), "sky": None}
    settings["crops"] = {**crops, "patch_size": crops["patch_size"] or None, "small": crops.pop("on_small")}
    del settings["crops"]["on_small"]
    manifest |= {"settings": settings, "recipe": old_words(manifest["recipe"])}
    assert manifest["recipe"]["crops"]["draws"] == 1 and manifest["recipe"]["labels"]["sky"] == "own"
    for name, value in ((MANIFEST, manifest), (SETTINGS, settings)):
        del value["sha256"]  # tables had no checksum then
        (folder / name).write_text(json.dumps(value))
    return folder, path


def test_old_labels_are_learnt_from_and_mended(old_labels, capsys):
    folder, path = old_labels
    assert verify(folder) == []
    here = [f"labels.root={folder}"]
    assert len(build.training_labels(recipe.load(path, here))) == 14
    with pytest.raises(RecipeError, match="of-old was labelled with other crops, run.seed than this recipe's"):
        build.training_labels(recipe.load(path, [*here, "crops.overlap=0.2", "run.seed=3"]))
    before = {name: data for name, data in contents(folder).items() if name.endswith(".tar")}
    flip(sorted(folder.glob("*.tar"))[1], 3000)
    assert main(["verify", str(folder), "--repair"]) == 0
    assert {name: data for name, data in contents(folder).items() if name.endswith(".tar")} == before
    assert "made again: sa_0-001.tar" in capsys.readouterr().out


def test_a_command_judges_the_tables_that_it_uses(tmp_path, capsys):
    make_tar(tmp_path / "sa_0.tar")
    text = RECIPE.format(out=tmp_path / "run", tars=tmp_path / "sa_0.tar")
    path = tmp_path / "r.toml"
    path.write_text(f'{text}[train]\nsteps = 3\nlr = "fast"\n[[benchmarks]]\nname = "nyuu"\n')
    for verb in ("show", "train"):
        assert main([verb, str(path)]) == 2
        assert "train.lr must be a number, not 'fast'" in capsys.readouterr().err
    assert main(["label", str(path)]) == 0
    told = capsys.readouterr().err
    assert "[train] has faults, which this command ignores" in told and "[benchmarks] has faults" in told
    kept = (tmp_path / "run" / "recipe.toml").read_text()
    assert 'lr = "fast"' in kept and 'name = "nyuu"' in kept  # as it was given, not as the defaults
    assert json.loads((build.labels_folder(recipe.load(path, command="label")) / MANIFEST).read_text())["recipe"][
        "train"
    ] == {"steps": 3, "lr": "fast"}
    for bad, message in (
        ("[trian]\nlr = 1\n", "unknown key trian; did you mean train?"),
        ("[crops]\nsize = 1\n", "crops: size must be at least 14, not 1"),
    ):
        path.write_text(text.replace("[crops]\nsize = 16\n", "") + bad if "[crops]" in bad else text + bad)
        assert main(["label", str(path)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_after_a_command_that_made_nothing_the_mended_one_is_no_other_run(tmp_path, capsys):
    make_tar(tmp_path / "sa_0.tar")
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(out=tmp_path / "run", tars=tmp_path / "none.tar"))
    assert main(["label", str(path)]) == 2
    path.write_text(RECIPE.format(out=tmp_path / "run", tars=tmp_path / "sa_0.tar"))
    assert main(["label", str(path)]) == 0
    assert "other values" not in capsys.readouterr().err


def test_a_command_that_cannot_be_done_leaves_the_runs_recipe(tmp_path, capsys):
    make_tar(tmp_path / "sa_0.tar")
    path, kept = tmp_path / "r.toml", tmp_path / "run" / "recipe.toml"
    path.write_text(RECIPE.format(out=tmp_path / "run", tars=tmp_path / "sa_0.tar"))
    assert main(["label", str(path)]) == 0
    before = kept.read_text()
    assert "other values" not in capsys.readouterr().err
    changed = ["--set", "run.seed=7", "--set", "train.steps=9"]
    assert main(["score", str(path), "--set", "benchmarks=[{name='scenes'}]", *changed]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "train.steps" not in told  # nothing has been trained
    assert (
        "no student yet" in told
        and "--set score.student=false" in told
        and "was made with other values of run.seed" in told
        and "run.name=NAME" in told
    )
    assert kept.read_text() == before
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["label", str(path), "--set", f"run.out={tmp_path / 'moved'}", "--set", "compare.time_at=64"]) == 0
    assert "other values" not in capsys.readouterr().err
