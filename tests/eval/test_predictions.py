"""Predicting into a store: resumed, never mixed, mended where damaged. And the baselines."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import score_recipe
from distill.app.cli import main
from distill.app.recipe import parse
from distill.app.scoring import how_used, options_on, prediction_settings
from distill.app.verbs import score as score_verb
from distill.core import files
from distill.core.depth import DepthMap, Kind, KindError
from distill.eval import stored
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.plane import COLUMNS, ROWS, fit_plane
from distill.eval.score import predict, score, score_predictions
from distill.eval.scorefile import require_writable
from distill.eval.settings import BenchmarkSettings
from distill.eval.stored import find_prediction, read_prediction, read_settings
from distill.teachers._settings import TeacherSettings
from tests.eval.known_maps import CLEAN, SIZE, Echo, samples, truth


def test_predictions_are_stored_resumed_and_scored(tmp_path):
    store, teacher, seen = tmp_path / "p", Echo(), []
    assert predict(teacher, samples()[:3], store, settings={"size": 5}, report=lambda d, t: seen.append((d, t))) == 3
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)] and teacher.seen == [None] * 3
    assert predict(teacher, samples(), store, settings={"size": 5}) == 2 and len(teacher.seen) == 5
    stored = np.load(store / "part/pred_04.npy")
    assert stored.dtype == np.float32 and stored.shape == SIZE
    invalid = (truth(4).values[0] / 21 <= 0.06).numpy()
    assert invalid.any() and np.array_equal(np.isnan(stored), invalid)
    got = score(store, None, samples(), CLEAN, allow_failed=True)
    assert got.model == "echo" and got.kind == Kind.SCALE_DEPTH
    with pytest.raises(ValueError, match="holds scale_depth, which cannot be scored as affine_disparity"):
        score(store, "affine_disparity", samples(), CLEAN)
    assert not list(store.rglob("*.partial"))


def test_a_damaged_map_is_predicted_again_and_told(tmp_path):
    store, teacher, told = tmp_path / "p", Echo(), []
    predict(teacher, samples(), store, settings={})
    good = (store / "part/pred_01.npy").read_bytes()
    (store / "part/pred_01.npy").write_bytes(good[: len(good) // 2])
    (store / "part/pred_02.npy").write_bytes(b"")
    np.save(store / "part/pred_03.npy", np.zeros((2, 3, 4)))
    assert predict(teacher, samples(), store, settings={}, tell=told.append) == 3
    assert [re.sub(r".*part/|: not a .*;", "", line) for line in told] == [
        f"pred_0{i}.npy predicted again" for i in (1, 2, 3)
    ]
    assert (store / "part/pred_01.npy").read_bytes() == good
    assert predict(teacher, samples(), store, settings={}) == 0


def test_scoring_a_recipe_mends_maps_and_fails_where_truth_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score_recipe, "Models", lambda _: lambda _: [("bright", Echo())])
    rows = ["name\trgb\tdepth\tscale_to_metres"]
    for i in range(2):
        pixels = np.random.default_rng(i).integers(30, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", truth(i).values[0].numpy())
        rows.append(f"a{i}\t{i}.png\t{i}.npy\t1")
    (tmp_path / "INDEX.tsv").write_text("\n".join(rows))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[run]\nname = "x"\nout = "{tmp_path}/run"\n[score]\nplane_prior = false\n'
        f'[[benchmarks]]\nname = "pairs"\nroot = "{tmp_path}"\n'
    )
    assert main(["score", str(recipe)]) == 0
    before = capsys.readouterr().out
    stored = tmp_path / "run/predictions/bright/pairs/pred_a1.npy"
    stored.write_bytes(stored.read_bytes()[:300])
    assert main(["score", str(recipe)]) == 0
    after = capsys.readouterr()
    assert after.out == before and "pred_a1.npy: not a readable .npy" in after.err
    (tmp_path / "0.npy").write_bytes(b"gone")
    assert main(["score", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "1 of 2 images of pairs could not be scored for bright; no mean" in said
    assert "pred_a0.npy: " in said and "0.npy: not a readable depth map" in said and "score again" in said


def test_an_out_that_cannot_be_written_is_refused_before_scoring(store, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.eval.score.score", lambda *_, **__: pytest.fail("scored"))
    given = {"kind": "affine_depth", "benchmark": "scenes", "root": None}
    (tmp_path / "scores").mkdir()
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in {
        "scores": r"scores is a folder; name a file, such as .*scores/scores\.json",
        "b.json": r"b\.csv is a folder",
        "file/y.json": r"file/y\.json: cannot be written \(.*\); name another file",
        "a.csv": r"a\.csv: scores are written as JSON",
    }.items():
        with pytest.raises((OSError, ValueError), match=message) as caught:
            score_predictions(store, out=tmp_path / out, **given)
        assert "Errno" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_stored_predictions_of_other_settings_are_not_mixed_with(tmp_path, store):
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"size": 5, "steps": 1})
    with pytest.raises(
        ValueError, match=r"p holds predictions made with other settings \(size 5, now 6\); use another folder"
    ):
        predict(Echo(), samples(), tmp_path / "p", settings={"size": 6, "steps": 1})
    with pytest.raises(ValueError, match="kind 'scale_depth', now 'affine_depth'"):
        predict(Echo(Kind.AFFINE_DEPTH), samples(), tmp_path / "p", settings={"size": 5, "steps": 1})
    with pytest.raises(ValueError, match="made by another program"):
        predict(Echo(), samples(), store, settings={})
    assert len(list((tmp_path / "p").rglob("*.npy"))) == 1


def test_a_teachers_options_are_settings_of_its_predictions(tmp_path):
    recipe = parse(
        {
            "run": {"name": "x"},
            "teachers": [
                {"name": "marigold", "alias": "four", "options": {"steps": 4}, "dtype": "bfloat16"},
                {"name": "genpercept"},
            ],
        }
    )
    on = BenchmarkSettings(name="scenes")
    four = prediction_settings(recipe, "four", on)
    assert four == {"options": {"steps": 4}, "dtype": "bfloat16"}
    assert prediction_settings(recipe, "genpercept", on) == prediction_settings(recipe, "student", on) == {}
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"weights": "w", **four})
    with pytest.raises(ValueError, match="other settings .*steps"):
        predict(Echo(), samples()[:1], tmp_path / "p", settings={"weights": "w", "options": {"steps": 10}})


def test_scoring_is_not_labelling():
    """A teacher is scored by its authors' resizing, not by the one for crops; a benchmark may say more."""
    crops = {"resize": "none", "mode": "disparity"}
    teachers = [
        TeacherSettings(name="genpercept", options=crops),
        TeacherSettings(name="depth_anything_v2", options={"native_size": 560}),
        TeacherSettings(name="marigold", options={"steps": 4, "resize": "none"}, score_options={"ensemble": 3}),
        TeacherSettings(name="marigold", alias="none", score_options={"resize": "none"}),
    ]
    plain = [options_on(teacher, BenchmarkSettings(name="nyu")) for teacher in teachers]
    assert plain == [{"mode": "disparity"}, {}, {"steps": 4, "ensemble": 3}, {"resize": "none"}]
    eth3d = BenchmarkSettings(name="eth3d", processing_size=756, steps=50, ensemble=10)
    assert [options_on(teacher, eth3d) for teacher in teachers] == [
        {"mode": "disparity", "native_size": 756},
        {},
        {"steps": 50, "ensemble": 3, "native_size": 756},
        {"resize": "none", "steps": 50, "ensemble": 10},
    ]
    assert teachers[2].content == TeacherSettings(name="marigold", options={"steps": 4, "resize": "none"}).content


def test_how_a_teacher_worked_is_kept_and_refuses_nothing(tmp_path):
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"size": 5})
    assert read_settings(tmp_path / "p")["used"] == {}
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"size": 5}, used={"steps": 4})
    assert read_settings(tmp_path / "p")["used"] == {"steps": 4}


def test_maps_of_another_roots_images_are_told_of(tmp_path):
    on, recipe = BenchmarkSettings(name="pairs", root="/data/a"), parse({"run": {"name": "x"}})
    told: list[str] = []
    for root in ("/data/a", "/data/a", "/data/b", "/data/a"):
        used = how_used(recipe, "student", Echo(), replace(on, root=root))
        predict(Echo(), samples()[:1], tmp_path / "p", settings={"size": 5}, used=used, tell=told.append)
    other = f"{tmp_path / 'p'}: its maps are of the images in /data/a, now in /data/b; if the images differ, delete it"
    assert told == [other]


def test_a_seeded_teacher_is_told_the_image(tmp_path):
    teacher = Echo(seeded=True)
    predict(teacher, samples()[:2], tmp_path / "p", settings={})
    assert teacher.seen == [["part/rgb_00.png"], ["part/rgb_01.png"]]


# --- baselines --------------------------------------------------------------------------------------------------------


def ground(seed: int) -> BenchmarkSample:
    """A road: disparity falls from the bottom row to the horizon, the same way in every image, in units of its own."""
    rows = torch.linspace(0.02, 1.0, 48)[:, None].expand(48, 64)
    values = (1 + seed) / rows
    return BenchmarkSample(
        str(seed),
        f"pred_{seed}.npy",
        lambda: torch.zeros(3, 48, 64),
        lambda: DepthMap(values[None], values[None] < 30 * (1 + seed), Kind.METRIC_DEPTH),
    )


def test_the_plane_baseline_is_what_images_have_in_common(tmp_path):
    corridor = DepthMap(
        1e-3 / torch.linspace(0.02, 1.0, 64).expand(1, 48, 64), torch.ones(1, 48, 64) > 0, Kind.METRIC_DEPTH
    )
    # One image of another shape whose disparities are a thousand times as large: standardised, it is one of five.
    prior = fit_plane([*(ground(i) for i in range(4)), replace(ground(0), truth=lambda: corridor)])
    assert prior.num_images == 5
    results = []
    for which, teacher in enumerate((prior, replace(prior, grid=torch.ones_like(prior.grid)))):
        predict(teacher, [ground(9)], tmp_path / str(which), settings={})
        results.append(score(tmp_path / str(which), None, [ground(9)], CLEAN).metrics["delta1"])
    assert results[0] > 0.8 > 0.5 > results[1]
    assert prior.predict(torch.zeros(2, 3, 30, 50)).values.shape == (2, 30, 50)
    with pytest.raises(KindError):
        fit_plane([replace(ground(0), truth=lambda: truth(kind="affine_depth"))])


def test_a_cell_of_the_plane_is_the_mean_of_the_standardised_truths_that_know_it():
    """In quarters of the plane; the second truth knows half of the upper left one, and nothing of the lower ones."""

    def quarters(table, size=(ROWS, COLUMNS)):
        return torch.tensor(table).repeat_interleave(size[0] // 2, 0).repeat_interleave(size[1] // 2, 1)

    def told(values, valid, half=False):
        values, valid = (quarters(table, (2 * ROWS, 2 * COLUMNS)) for table in (values, valid))
        valid = valid & ~(torch.arange(2 * COLUMNS) < half * COLUMNS) | valid & (torch.arange(2 * COLUMNS) % 2 == 0)
        return replace(ground(0), truth=lambda: DepthMap(1 / values[None], valid[None], Kind.METRIC_DEPTH))

    first = told([[1.0, 3.0], [2.0, 9.0]], [[True, True], [True, False]])
    second = told([[4.0, 2.0], [9.0, 9.0]], [[True, True], [False, False]], half=True)
    nothing = told([[1.0, 1.0], [1.0, 1.0]], [[False, False], [False, False]])
    flat = told([[2.0, 2.0], [2.0, 2.0]], [[True, True], [True, True]])
    prior = fit_plane([first, second, nothing, flat])
    unit, four, two = 1.5**0.5, 2**0.5, -(0.5**0.5)  # of 1, 2 and 3; of one part 4 and two parts 2
    expected = [[(-unit + 0.5 * four) / 1.5, (unit + two) / 2], [0.0, 0.0]]
    assert prior.num_images == 2
    torch.testing.assert_close(prior.grid, quarters(expected), atol=1e-5, rtol=0)
    same, wide = (prior.predict(torch.zeros(1, 3, n * ROWS, n * COLUMNS)).values[0] for n in (1, 2))
    torch.testing.assert_close(same, prior.grid)
    assert wide[0, COLUMNS].item() == pytest.approx(0.25 * expected[0][0] + 0.75 * expected[0][1], abs=1e-5)
    with pytest.raises(ValueError, match="none of the 2 truths has two different valid values"):
        fit_plane([nothing, flat])


def test_the_command_lines_function_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of predictions"):
        score_predictions(tmp_path / "none", kind="affine_depth", benchmark="nyu", root=tmp_path)
    (tmp_path / "maps.tar").touch()
    with pytest.raises(FileNotFoundError, match="not a folder; unpack it and give the folder of maps"):
        score_predictions(tmp_path / "maps.tar", kind="affine_depth", benchmark="nyu", root=tmp_path)
    with pytest.raises(LookupError, match="nyu"):
        score_predictions(tmp_path, kind="affine_depth", benchmark="nyu2", root=tmp_path)
    with pytest.raises(ValueError, match="nyu needs a root"):
        score_predictions(tmp_path, kind="affine_depth", benchmark="nyu", root=None)


def test_of_many_faults_the_first_and_the_last_are_told():
    lines = [f"fault {i}" for i in range(30)]
    assert score_verb._few(lines[:12]) == lines[:12]
    assert score_verb._few(lines) == [*lines[:10], "... and 19 more", lines[29]]


def test_a_map_is_found_by_its_key_with_the_photos_suffix(tmp_path):
    sample = replace(samples()[0], key="a", prediction_path="pred_a.npy", photo="rgb/a.jpg")
    np.save(tmp_path / "a.jpg.npy", np.ones((2, 2), np.float32))
    assert find_prediction(tmp_path, sample) == tmp_path / "a.jpg.npy"


def test_of_two_that_begin_a_store_with_other_settings_the_second_is_refused(tmp_path, monkeypatch):
    def late(plain, number):
        def then(*args):
            found = plain(*args)
            found = found if found is None or isinstance(found, dict) else iter([*found])
            if len(first) == number:
                first.append(None)
                first.append(predict(Echo(), samples()[:2], tmp_path / str(number), settings={"size": 5}))
            return found

        return then

    first: list = []
    for number, (owner, name) in enumerate([(stored, "read_settings"), (Path, "rglob")]):
        (tmp_path / str(2 * number)).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, late(getattr(owner, name), 2 * number))
            with pytest.raises(ValueError, match="made with other settings .size 5, now 6"):
                predict(Echo(), samples(), tmp_path / str(2 * number), settings={"size": 6})
        assert first[-1] == 2 and read_settings(tmp_path / str(2 * number))["settings"] == {"size": 5}


def test_asking_whether_an_out_can_be_written_takes_nothing_away_from_its_writer(tmp_path):
    with files.writing(tmp_path / "a.json") as new:
        new.write_text("{}")
        require_writable(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError, match="cannot be written .*too long"):
        require_writable(tmp_path / f"{'a' * 245}.json")


def test_floats_with_gaps_are_not_integers_whatever_their_values(tmp_path):
    """A plane, or what is so far that its format holds whole metres only."""
    depth = np.array([[10, np.nan], [10, 12]], np.float32)
    Image.fromarray(depth).save(tmp_path / "a.tiff")
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 2\n-1\n" + depth[::-1].tobytes())
    np.savez(tmp_path / "a.npz", depth=depth)
    for name in ("a.tiff", "a.pfm", "a.npz"):
        values, remarks = read_prediction(tmp_path / name, (2, 2), Kind.METRIC_DEPTH)
        np.testing.assert_array_equal(values, depth)
        assert not remarks and type(values) is np.ndarray
