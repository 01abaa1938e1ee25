"""Comparing teachers: the stores, the numbers, the page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.app import build, comparison, teaching
from distill.app import recipe as recipes
from distill.app.cli import main
from distill.app.strict import RecipeError
from distill.core.depth import DepthMap, Kind
from distill.data.corruptions import Corruptions
from distill.data.photos import Photo
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import CARD, Entrant, compare, predict_missing, write_comparison
from distill.eval.reports.compare_page import MEASURES, additions_table, matrices, sentences, write_page
from distill.eval.stored import BadPredictionError
from distill.eval.timing import RunTime
from distill.teachers import analytic
from tests import tiny_teachers
from tests.eval.test_agreement import blurred


def scene(seed):
    """An image whose disparity is known: steps, and a smooth part."""
    rng = torch.Generator().manual_seed(seed)
    blocks = F.interpolate(torch.rand(1, 1, 6, 8, generator=rng), (48, 64), mode="nearest")[0]
    disparity = 0.2 + blocks + torch.linspace(0, 0.5, 48)[:, None]
    image = (disparity / 2).clamp(0, 1).expand(3, -1, -1)
    return image, DepthMap(1 / disparity, torch.ones(1, 48, 64, dtype=torch.bool), Kind.METRIC_DEPTH)


def samples(count=4, truths=4):
    found = []
    for i in range(count):
        image, truth = scene(i)
        if i >= truths:
            truth = DepthMap(truth.values, torch.zeros_like(truth.valid), truth.kind)
        found.append(BenchmarkSample(f"s{i}", f"a/s{i}.npy", lambda image=image: image, lambda truth=truth: truth))
    return found


class FromTruth:
    """A model that knows the truth, spoilt by a function of (disparity, key)."""

    def __init__(self, spoil, calls=None):
        self.card = replace(analytic.CARDS[0], name="analytic", seeded=True, revision="7")
        self.spoil, self.calls = spoil, [] if calls is None else calls

    def predict(self, images, *, keys=None):
        self.calls.append(keys[0])
        disparity = 1 / scene(int(keys[0][1:]))[1].values
        return DepthMap(self.spoil(disparity), torch.ones_like(disparity, dtype=torch.bool), self.card.kind)


def entrant(name, spoil, calls=None, **settings):
    return Entrant(name, lambda: FromTruth(spoil, calls), {"side": 64, **settings})


def left_wrong(disparity):
    wrong = disparity.clone()
    wrong[..., :32] += 0.2 * torch.cos(torch.arange(32) * 0.7)
    return 3 * wrong - 1


def right_wrong(disparity):
    wrong = disparity.clone()
    wrong[..., 32:] += 0.2 * torch.cos(torch.arange(32) * 0.7)
    return 0.1 * wrong


@pytest.fixture
def three(tmp_path):
    """Two models that are wrong in one half each, and one that is blurred."""
    made = [entrant("left", left_wrong), entrant("right", right_wrong), entrant("soft", lambda d: blurred(d, 7))]
    for one in made:
        assert predict_missing(one, samples(), tmp_path) == 4
    return tmp_path


def test_predictions_are_kept_and_never_mixed(tmp_path):
    calls = []
    first = entrant("m", left_wrong, calls)
    assert predict_missing(first, samples(2), tmp_path) == 2 and calls == ["s0", "s1"]
    said = json.loads((tmp_path / "m" / CARD).read_text())
    assert said["card"]["licence"] and said["cost"]["images"] == 1 and said["cost"]["images_per_s"] > 0
    assert predict_missing(first, samples(4), tmp_path) == 2 and calls == ["s0", "s1", "s2", "s3"]
    (tmp_path / "m" / "a" / "s2.npy").unlink()
    assert predict_missing(first, samples(4), tmp_path) == 1 and calls[-1] == "s2"
    assert json.loads((tmp_path / "m" / CARD).read_text())["cost"]["images"] == 1, "the fuller measurement stays"

    def gone():
        raise AssertionError("the model is not needed")

    assert predict_missing(Entrant("m", gone, {"side": 64}), samples(4), tmp_path) == 0
    with pytest.raises(ValueError, match="predictions made with other settings .side 64, now 32."):
        predict_missing(Entrant("m", first.load, {"side": 32}), samples(4), tmp_path)
    (tmp_path / "m" / "a" / "s2.npy").unlink()

    def other():
        model = FromTruth(left_wrong)
        model.card = replace(model.card, revision="8")
        return model

    with pytest.raises(ValueError, match="other weights .revision 7, now 8.; delete"):
        predict_missing(Entrant("m", other, {"side": 64}), samples(4), tmp_path)


def test_maps_made_without_the_focal_length_are_not_taken_for_those_made_with_it(tmp_path):
    loads = []

    class Lens(FromTruth):
        takes_focal = True

        def predict(self, images, *, keys, focal=100.0):
            return DepthMap(torch.full((1, *images.shape[-2:]), focal), torch.ones(1, 48, 64) > 0, self.card.kind)

    def run(name, kind, known):
        model = Entrant(name, lambda: loads.append(name) or kind(left_wrong), {"side": 64})
        return predict_missing(model, [replace(s, focal=known) for s in samples(2)], tmp_path)

    for kind in (Lens, FromTruth):
        name = kind.__name__.lower()
        assert run(name, kind, lambda: 500.0) == 2 and run(name, kind, lambda: 500.0) == 0
    assert loads == ["lens", "fromtruth"], "complete maps need no model"
    assert np.load(tmp_path / "lens" / "a" / "s0.npy").min() == 500.0
    assert run("fromtruth", FromTruth, None) == 0, "no difference to a model that takes none"
    assert run("again", Lens, None) == 2
    with pytest.raises(ValueError, match="predictions made with other settings .focal None, now "):
        run("again", Lens, lambda: 500.0)


def test_a_model_that_fails_keeps_what_it_did(tmp_path):
    def spoil(disparity):
        if len(calls) > 2:
            raise RuntimeError("out of something")
        return disparity

    calls: list[str] = []
    with pytest.raises(RuntimeError):
        predict_missing(entrant("m", spoil, calls), samples(), tmp_path)
    assert sorted(p.name for p in (tmp_path / "m" / "a").iterdir()) == ["s0.npy", "s1.npy"]
    assert predict_missing(entrant("m", left_wrong), samples(), tmp_path) == 2


def test_numbers_of_known_models(three):
    result = compare(["left", "right", "soft"], samples(), three)
    pairs = {(row["a"], row["b"]): row for row in result.pairs}
    assert set(pairs) == {(a, b) for a, b in [("left", "right"), ("left", "soft"), ("right", "soft")]} | {
        (a, "truth") for a in ("left", "right", "soft")
    }
    assert all(0 <= row["error"] <= 1 and row["images"]["error"] == 4 for row in result.pairs)
    assert pairs["soft", "truth"]["edges"] < 0.7 < pairs["right", "truth"]["edges"]
    assert pairs["left", "truth"]["sky"] is None, "a truth without a value may be a hole"
    numbers = {model["name"]: model["numbers"] for model in result.models}
    assert numbers["soft"]["sharpness"] < numbers["left"]["sharpness"]
    assert 0 < numbers["left"]["abs_rel"] < 0.3 and numbers["left"]["valid"] == 1
    added = {(row["a"], row["b"]): row for row in result.additions}
    assert added["left", "right"]["mixing"] > 0.3 and 0.3 < added["left", "right"]["share"] < 0.7
    assert added["soft", "left"]["news"] > added["left", "soft"]["news"]
    assert [image["key"] for image in result.images] == ["s0", "s1", "s2", "s3"]
    text = " ".join(sentences(result))
    assert "right adds the most to left" in text and "4 images with truth" in text
    for measure, (title, *_) in MEASURES.items():
        grid = next(part for part in matrices(result).split('<div class="chart">') if part.startswith(f"<b>{title}"))
        shown = [row[measure] for row in result.pairs if row[measure] is not None]
        assert sorted(re.findall(r">(\d\.\d\d)</span>", grid)) == sorted(f"{value:.2f}" for value in shown)
    assert "it would replace it" not in text
    for row in result.additions:
        row["share"] = 0.9
    assert "right is better than left in 90% of the regions: it would replace it" in " ".join(sentences(result))


def test_without_truth_edges_speak(three):
    result = compare(["left", "soft"], samples(4, truths=0), three)
    assert {row["b"] for row in result.pairs} == {"soft"}
    assert all("abs_rel" not in model["numbers"] for model in result.models)
    text = " ".join(sentences(result))
    assert "Judged by edges (there is no truth), left adds the most to soft" in text and "with truth" not in text
    error, added = result.pairs[0]["error"], next(row for row in result.additions if row["a"] == "soft")
    assert f"new edges {added['news']:.0%}, error {error:.2f}, complement {added['complement']:.2f}" in text
    few = compare(["left", "soft"], samples(4, truths=2), three)
    marked = additions_table(few)
    assert "Judged by edges" in " ".join(sentences(few)) and marked.count('class="best"') >= 1
    assert all(row.rsplit("<td>", 1)[1].startswith("<span") for row in marked.split("<tr>") if 'class="best"' in row)
    alone = compare(["left"], samples(2, truths=0), three)
    assert sentences(alone) == ["Only left is there: a comparison needs two models."]


def test_kinds_that_do_not_convert_are_compared(three):
    def load():
        model = FromTruth(lambda d: (1 / d - 0.5) * 0.3)
        model.card = replace(model.card, kind=Kind.AFFINE_DEPTH)
        return model

    predict_missing(Entrant("far", load, {"side": 64}), samples(), three)
    result = compare(["far", "left"], samples(), three)
    pairs = {(row["a"], row["b"]): row for row in result.pairs}
    assert pairs["far", "truth"]["error"] < 0.1 and pairs["far", "truth"]["order"] > 0.99
    without = compare(["far", "left"], samples(4, truths=0), three)
    assert without.pairs[0]["error"] < 0.7 and without.pairs[0]["order"] > 0.8


def test_the_page_is_one_file(three, tmp_path):
    result = compare(["left", "right", "soft"], samples(), three)
    write_comparison(result, tmp_path / "c.json", more={"side": 64})
    assert json.loads((tmp_path / "c.json").read_text())["side"] == 64
    out = write_page(result, samples(), three, tmp_path / "c.html", title="a <b>", remarks=["left out x: cut"])
    html = out.read_text()
    for word in (
        "a &lt;b&gt;",
        "right adds the most to left",
        "Who adds what",
        "left out x: cut",
        "commercial",
        "AbsRel",
    ):
        assert word in html, word
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert html.count('class="tile"') == 4 * 2 * (1 + 1 + 3 + 1)  # image, truth, models, disagreement; whole and zoom


def test_damaged_or_missing_maps_are_named(three):
    (three / "soft" / "a" / "s1.npy").write_bytes(b"no map")
    with pytest.raises(BadPredictionError, match="s1: not a readable .npy .*compare again"):
        compare(["left", "soft"], samples(), three)
    (three / "soft" / CARD).write_text("{}")
    with pytest.raises(ValueError, match="model.json is not readable"):
        predict_missing(entrant("soft", left_wrong), samples(5), three)


RECIPE = """
[run]
name = "c"
out = "{out}"
device = "cpu"
[[images]]
pairs = "{pairs}"
[[images]]
photos = "{photos}"
[[teachers]]
name = "analytic"
[[teachers]]
name = "analytic"
alias = "red"
options = {{ rgb = [1.0, 0.0, 0.0] }}
[[teachers]]
name = "truth"
[[teachers]]
name = "truth"
alias = "blurry"
options = {{ blur = 2.0, own_range = true }}
[compare]
limit = {limit}
side = 48
"""


def written(tmp_path, **changes):
    from PIL import Image

    photos = tmp_path / "photos"
    if not photos.exists():
        photos.mkdir()
        rng = np.random.default_rng(0)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(photos / f"p{i}.png")
        (photos / "p9.png").write_bytes(b"broken")
        rows = ["name\trgb\tdepth\tscale_to_metres\tinvalid"]
        for i in range(5):
            image, truth = scene(i)
            Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / f"s{i}.png")
            np.save(tmp_path / f"s{i}.npy", truth.values[0].numpy())
            rows.append(f"s{i}\ts{i}.png\ts{i}.npy\t1\tnone")
        (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    path = tmp_path / "c.toml"
    path.write_text(
        RECIPE.format(
            **{"out": tmp_path / "run", "photos": photos, "pairs": tmp_path / "pairs.tsv", "limit": 0, **changes}
        )
    )
    return path


def test_the_verb(tmp_path, capsys, monkeypatch):
    path = written(tmp_path)
    assert main(["compare", str(path)]) == 0
    said = capsys.readouterr()
    assert "compare.html" in said.out and "left out" in said.err and "red" in said.out
    table = json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())
    assert [model["name"] for model in table["models"]] == ["analytic", "red", "blurry"]
    assert len(table["images"]) == 7 and sum(image["truth"] for image in table["images"]) == 5
    assert "photos/p9.png" in table["left_out"][0]
    assert {m["name"]: m["images"] for m in table["models"]} == {"analytic": 7, "red": 7, "blurry": 5}
    # Again from what is stored: no model is loaded.
    monkeypatch.setattr(teaching, "load_teacher", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(Corruptions, "apply", lambda *a, **k: pytest.fail("a model was asked"))
    (tmp_path / "run" / "compare.html").unlink()
    assert main(["compare", str(path)]) == 0 and (tmp_path / "run" / "compare.html").is_file()
    assert main(["compare", str(written(tmp_path, limit=3))]) == 0, "fewer images need no model either"
    assert len(json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())["images"]) == 2, (
        "and a broken one"
    )


def test_the_student_joins_once_it_is_trained(tmp_path):
    path = written(tmp_path)
    folder, _ = tiny_teachers.checkpoint(tmp_path)
    (tmp_path / "run" / "train").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "run" / "train" / "student")
    # Its encoder began from a file, and lies in the student's folder all the same.
    recipe = recipes.load(path, ["compare.limit=2", "student.weights=pretrained"])
    chosen, rejected = comparison.chosen_samples(recipe)
    *_, student = comparison.entrants(recipe, chosen)
    assert student.name.startswith("student-") and len(rejected) == 1
    assert predict_missing(student, chosen, tmp_path / "run" / "compare") == len(chosen)
    said = json.loads((tmp_path / "run" / "compare" / student.name / CARD).read_text())
    assert said["cost"]["parameters"] > 1000 and said["card"]["licence"] == "Apache-2.0"
    given = [f'images=[{{photos="{tmp_path}/photos", limit=1}}]', "run.seed=7", "compare.side=40"]
    depends = comparison.entrants(recipes.load(path, given), chosen)[0].settings
    (images,) = depends["images"]
    assert depends["seed"] == 7 and depends["side"] == 40 and images["photos"].endswith("photos")
    assert "limit" not in images, "fewer images are no other maps"
    without = recipes.load(path, ["compare.student=false"])
    assert [e.name for e in comparison.entrants(without, chosen)] == ["analytic", "red", "blurry"]


def test_every_model_is_timed_where_that_is_asked(monkeypatch, capsys):
    asked, card = [], SimpleNamespace(name="x")
    monkeypatch.setattr(
        comparison, "run_time", lambda *given: asked.append(given) or RunTime(512, 0.5, 0.25, 2.0, 20, "CPU")
    )
    monkeypatch.setattr(comparison.build, "device", lambda recipe: "cpu")

    class Student(comparison.CheckpointTeacher):
        takes_focal = True

        def __init__(self):
            self.card = card

    student = Student()
    plain, truth = (SimpleNamespace(card=SimpleNamespace(name=n), predict=len) for n in ("plain", "truth"))
    models = [Entrant(name, lambda m=m: m, {}) for name, m in (("a", plain), ("b", truth), ("c", student))]
    timed = comparison._run_times(SimpleNamespace(compare=SimpleNamespace(time_at=512)), models)
    assert list(timed) == ["a", "c"] and asked[0] == (len, 512, "cpu") and asked[1][0].keywords == {"focal": 512.0}
    assert comparison._run_times(SimpleNamespace(compare=SimpleNamespace(time_at=0)), models) == {}
    comparison._print_run_times(timed)
    said = capsys.readouterr().out
    assert (
        f"{comparison.digits(0.25)} to {comparison.digits(2.0)}" in said and "512 x 512" in said and "FiffDepth" in said
    )
    small = {"a": replace(timed["a"], size=64)}
    comparison._print_run_times(small)
    assert "FiffDepth" not in capsys.readouterr().out, "the paper timed another size"


class Entry:
    """A photo of 60 x 90 with truth in its right half, seen by a lens of 80 pixels."""

    def __init__(self, key, focal=80.0):
        self.key, self.origin, self.focal = key, key, focal
        self.values = torch.arange(5400.0).reshape(1, 60, 90)

    def load(self):
        valid = (torch.arange(90) >= 45).expand(1, 60, 90)
        truth = DepthMap(self.values, valid, Kind.METRIC_DEPTH)
        return Photo(self.key, torch.full((3, 60, 90), 51, dtype=torch.uint8), truth, self.origin, self.focal)


@pytest.mark.parametrize(("side", "size", "focal"), [(45, (30, 45), 40), (90, (60, 90), 80), (500, (60, 90), 80)])
def test_a_large_photo_is_seen_smaller_with_its_truth_and_its_lens(monkeypatch, side, size, focal):
    entries = [Entry("a"), Entry("b", focal=0.0)]
    shards = [SimpleNamespace(stem=stem, scan=lambda: SimpleNamespace(entries=entries, rejected=[])) for stem in "xy"]
    monkeypatch.setattr(comparison, "input_shards", lambda recipe: shards)
    recipe = SimpleNamespace(compare=SimpleNamespace(side=side, limit=3))
    chosen, _ = comparison.chosen_samples(recipe)
    assert [one.key for one in chosen] == ["x/a", "y/a", "y/b"], "two photos of one key are two"
    first, last = chosen[0], chosen[-1]
    assert first.focal() == focal and last.focal is None
    assert first.image().shape == (3, *size) and first.image().unique().tolist() == pytest.approx([0.2])
    truth = first.truth()
    step = 60 // size[0]
    assert torch.equal(truth.values, entries[0].values[:, step // 2 :: step, step // 2 :: step]), "no new depths"
    assert torch.equal(truth.valid[0], (torch.arange(90) >= 45)[step // 2 :: step].expand(*size))
    shards.pop()
    assert [one.key for one in comparison.chosen_samples(recipe)[0]] == ["a", "b"]


def test_no_image_at_all_says_why(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"not a tar")
    for limit in (0, 3):
        images = f'images=[{{tars="{tmp_path}/cut.tar", limit={limit}}}]'
        with pytest.raises(RecipeError, match=r"none of the recipe's 1 images can be used \(the first: cut.tar: "):
            comparison.chosen_samples(recipes.load(written(tmp_path), [images]))


def test_more_than_two_teachers_compare_but_do_not_label(tmp_path):
    recipe = recipes.load(written(tmp_path))
    for refuse in (build.labels_folder, build.training_labels, build.identity):
        with pytest.raises(RecipeError, match="at most two teachers, a primary and an assistant, not 3"):
            refuse(recipe)
    online = recipes.load(written(tmp_path), ["labels.online=true"])
    with pytest.raises(RecipeError, match="at most two"):
        build.training_labels(online)
    with pytest.raises(RecipeError, match="limit must be at least 0, not -1"):
        recipes.load(written(tmp_path), ["compare.limit=-1"])
