"""`distill verify --repair`: only what is bad is labelled again, and the folder ends up as if it had never been bad."""

from __future__ import annotations

import json
import shutil

import pytest

from distill.app import build, repair
from distill.app.cli import main
from distill.app.recipe import load
from distill.core.seal import sealed
from distill.shards.shards import verify
from tests.labelling.formula import contents, make_tar

RECIPE = """
[run]
name = "mend"
out = "{out}"
device = "cpu"
[[images]]
tars = "{tars}"
[crops]
size = 16
min_side = 20
patch_size = 12
[[teachers]]
name = "analytic"
[labels]
samples_per_part = 3
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where two tars, a recipe and its labels lie, and a copy of it all from before anything was spoilt."""
    place = tmp_path_factory.mktemp("mend") / "place"
    place.mkdir()
    for i in range(2):
        make_tar(place / f"sa_{i}.tar", first=10 * i)
    path = place / "recipe.toml"
    path.write_text(RECIPE.format(out=place / "run", tars=place / "sa_{0..1}.tar"))
    assert main(["label", str(path)]) == 0
    return place, shutil.copytree(place, place.with_name("copy"))


@pytest.fixture
def place(made):
    """The same place for every test, as it was."""
    shutil.rmtree(made[0])
    return shutil.copytree(made[1], made[0])


@pytest.fixture
def labels(place):
    """A finished folder of six tars, and what it held."""
    folder = build.labels_folder(load(place / "recipe.toml"))
    return folder, contents(folder)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_only_what_is_bad_is_made_again(labels, capsys):
    folder, before = labels
    tars = sorted(folder.glob("*.tar"))
    assert len(tars) == 6
    flip(tars[1], 3000)
    tars[3].unlink()
    (folder / tars[4].name).with_suffix(".json").write_text("{")
    times = {path.name: path.stat().st_mtime_ns for path in (tars[0], tars[2], tars[4], tars[5])}
    assert main(["verify", str(folder)]) == 1
    assert main(["verify", str(folder), "--repair"]) == 0
    said = capsys.readouterr().out
    named = (tars[1].name, tars[3].name, tars[4].with_suffix(".json").name)
    assert all(name in said for name in named) and tars[0].name not in said and tars[4].name not in said
    assert contents(folder) == before and verify(folder) == []
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert repair.repair(folder, relabel=lambda *_: pytest.fail("nothing is bad")) == []


def test_a_damaged_table_is_made_again_and_no_tar_is(labels, place):
    folder, before = labels
    tars = {tar: tar.stat().st_mtime_ns for tar in folder.glob("*.tar")}

    def is_as_before():
        return contents(folder) == before and {tar: tar.stat().st_mtime_ns for tar in tars} == tars

    for name, bad in (
        ("manifest.json", b"{"),
        ("manifest.json", before["manifest.json"].replace(b"1", b"2")),
        ("settings.json", b"{}"),
        ("sa_0-000.json", b"{"),
        ("sa_0-000.json", None),
    ):
        (folder / name).unlink()
        if bad is not None:
            (folder / name).write_bytes(bad)
        assert main(["verify", str(folder)]) in (1, 2)
        repair.repair(folder)
        assert is_as_before(), name
    for names in (("manifest.json", "settings.json"), ("sa_0-000.json",)):  # labelling alone does it too
        for name in names:
            (folder / name).write_bytes(b"[1]")
        assert main(["label", str(place / "recipe.toml")]) == 0
        assert is_as_before(), names


def test_the_recipe_of_a_damaged_manifest_is_not_run_where_the_runs_own_is_there(labels, place, capsys):
    folder, before = labels
    manifest = folder / "manifest.json"
    manifest.write_bytes(before["manifest.json"].replace(b'"min_side"', b'"min_sidf"'))
    assert repair.repair(folder) == ["manifest.json"] and contents(folder) == before
    manifest.write_bytes(before["manifest.json"].replace(b'"min_side"', b'"min_sidf"'))
    kept = place / "run" / "recipe.toml"
    kept.write_text(kept.read_text().replace("min_side = 20", "min_side = 19"))
    with pytest.raises(ValueError, match="recipe: unknown key crops.min_sidf"):  # the run makes other labels by now
        repair.repair(folder)
    manifest.write_bytes(before["manifest.json"].replace(b'"passed"', b'"passee"'))
    assert main(["verify", str(folder), "--repair"]) == 0 and contents(folder) == before, "its recipe is sound"


def test_what_a_killed_run_left_half_written_is_removed(labels):
    folder, before = labels
    tar = sorted(folder.glob("*.tar"))[1]
    tar.with_name(f"{tar.name}.bad").write_bytes(b"spoilt")  # killed when its replacement was there
    (folder / ".README.md.partial").write_text("# De")
    repair.repair(folder)
    assert contents(folder) == before


def test_an_interrupted_repair_loses_nothing_and_goes_on(labels):
    folder, before = labels
    tar = sorted(folder.glob("*.tar"))[0]
    flip(tar, 2000)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["images"]["count"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair.repair(folder, relabel=killed)
    assert (folder / f"{tar.name}.bad").exists()
    assert repair.repair(folder) and contents(folder) == before


def test_somebody_elses_tar_is_set_aside_and_kept(labels, capsys):
    folder, before = labels
    (folder / "holiday.tar").write_bytes(b"mine")
    assert main(["verify", str(folder), "--repair"]) == 0
    said = capsys.readouterr()
    assert "made again" not in said.out
    assert "holiday.tar is not part of these labels: set aside as holiday.tar.bad" in said.err
    assert contents(folder) == before | {"holiday.tar.bad": b"mine"}


def test_labels_without_a_recipe_or_with_other_images_say_so(labels, place):
    folder, _ = labels
    tar = sorted(folder.glob("*.tar"))[0]
    flip(tar, 2000)
    make_tar(place / "sa_1.tar", count=9, first=20)
    with pytest.raises(ValueError, match="labelled from different images"):
        repair.repair(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, "recipe": {}})))
    with pytest.raises(ValueError, match="manifest.json has no recipe"):
        repair.repair(folder)


def test_a_recipe_that_never_ran_here_is_not_run(labels, capsys, monkeypatch, place, tmp_path):
    folder, before = labels
    flip(sorted(folder.glob("*.tar"))[0], 3000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert main(["verify", str(folder), "--repair"]) == 2
    assert "--trust-recipe" in (said := capsys.readouterr().err) and 'name = "mend"' in said
    assert not list(folder.glob("*.bad"))  # nothing was touched
    assert main(["verify", str(folder), "--repair", "--recipe", str(place / "recipe.toml")]) == 0
    assert contents(folder) == before


def test_wrong_places_are_put_right_from_the_tar_alone(labels, monkeypatch, tmp_path):
    folder, before = labels
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))  # a recipe that never ran here is not needed
    sidecar = sorted(folder.glob("*-*.json"))[0]
    table = json.loads(sidecar.read_text())
    table["samples"][1][1] += 512
    for changed in (table, {key: value for key, value in table.items() if key != "sha256"}):
        sidecar.write_text(json.dumps(changed))
        assert repair.repair(folder) == [sidecar.name]
        assert {**json.loads(sidecar.read_text()), "sha256": ""} == {**json.loads(before[sidecar.name]), "sha256": ""}
    sidecar.write_bytes(before[sidecar.name])
    table["images"][0] = "another"
    sidecar.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="never run here"):
        repair.repair(folder)


def test_a_manifest_that_climbs_out_moves_nothing(labels, capsys):
    folder, _ = labels
    victim = folder.parent / "victim.tar"
    victim.write_bytes(b"somebody's")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../victim.tar", str(victim), "..\\victim.tar", ".claim.tar", "settings.json"):
        changed = {**manifest, "shards": [*manifest["shards"], {**manifest["shards"][0], "name": name}]}
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert main(["verify", str(folder), "--repair", "--trust-recipe"]) == 2
        assert "refused" in capsys.readouterr().err and victim.read_bytes() == b"somebody's"


def test_what_another_process_repaired_meanwhile_is_not_set_aside(labels, monkeypatch):
    folder, before = labels
    tar = sorted(folder.glob("*.tar"))[0]
    flip(tar, 3000)
    plain, other = repair.run_lock, []

    def late(*args, **options):
        if not other:
            other.append(None)
            other.append(repair.repair(folder))
            other.append(tar.stat().st_ino)
        return plain(*args, **options)

    found = repair._repaired_in_place
    monkeypatch.setattr(repair, "_repaired_in_place", lambda *args: found(*args) if other else [])
    monkeypatch.setattr(repair, "run_lock", late)
    with pytest.raises(ValueError, match="another process changed .*; run the same command again"):
        repair.repair(folder, relabel=lambda *_: pytest.fail("it is whole"))
    assert other[1] == [tar.name] and tar.stat().st_ino == other[2] and contents(folder) == before
    assert repair.repair(folder) == []
