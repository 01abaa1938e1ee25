"""A metric student of a canonical camera: what the labels become, what the prediction is times, and what is said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distill import load
from distill.app import build
from distill.app.commands import run_label, run_score
from distill.app.comparison import chosen_samples
from distill.app.local_gain import _ask
from distill.app.recipe import parse
from distill.app.strict import RecipeError
from distill.core.crop_settings import CropSettings
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels
from distill.data import sources
from distill.labelling.annotate import label_photo
from distill.labelling.jobs import TRUTH
from distill.labelling.settings import LabelSettings
from distill.shards.codec import decode_sample, encode_sample
from distill.students import checkpoint
from distill.students.modelcard import canonical_rule
from distill.teachers import depth_anything_3
from distill.training.augment import Draw, augment
from distill.training.canonical import canonical
from distill.training.loading import StreamSamples
from distill.training.sampling import SamplePosition
from tests.app.test_supervision import metric, write_pairs


def pair_photo(tmp_path, focal: str):
    """The one photo of a table with a column focal, 48 x 40."""
    lines = write_pairs(tmp_path, 1).read_text().splitlines()
    (tmp_path / "pairs.tsv").write_text("\n".join([lines[0] + "\tfocal", lines[1] + f"\t{focal}"]) + "\n")
    return sources.pairs(tmp_path / "pairs.tsv")[0].scan().entries[0].load()


@pytest.mark.parametrize(
    ("region", "expected"), [("random", 50 * 20 / 40), ("whole", 50 * (40 / 48 + 1) / 2 * 20 / 40)]
)
def test_a_sample_has_the_focal_length_of_its_own_pixels(tmp_path, region, expected):
    photo = pair_photo(tmp_path, "50")
    crops = CropSettings(size=20, min_side=40, patches="none", region=region)
    sample = label_photo(photo, [("truth", TRUTH)], crops=crops, labels=LabelSettings(store="as_is"))
    assert sample.record["crop"]["focal"] == pytest.approx(expected)
    before = sample.labels["truth"].shared
    after = canonical(sample, 100.0).labels["truth"].shared
    torch.testing.assert_close(after.values, before.values * (100 / expected))
    members = {name.partition(".")[2]: data for name, data in encode_sample(sample)}
    after = canonical(decode_sample(members), 100.0).labels["truth"].shared
    there = canonical(decode_sample(members, coded=True), 100.0).coded["truth"].decode().shared
    torch.testing.assert_close(there.values, after.values)


def test_who_does_not_say_the_camera_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="focal must be a number of pixels above 0, or empty, not '-3'"):
        pair_photo(tmp_path, "-3")
    photo, crops = pair_photo(tmp_path, ""), CropSettings(size=20, min_side=40, patches="none")
    sample = label_photo(photo, [("truth", TRUTH)], crops=crops)
    with pytest.raises(
        ValueError, match=r"pair0-0: student.canonical_focal needs a focal length, but this sample has none: .*column"
    ):
        canonical(sample, 300.0)
    table = {"run": {"name": "x"}, "student": {"canonical_focal": 300.0}}
    with pytest.raises(RecipeError, match="canonical_focal needs a student that predicts metres"):
        parse(table)
    table["student"]["max_depth"], table["train"] = 80.0, {"kind": "metric_depth"}
    assert parse(table).student.canonical_focal == 300.0


def test_a_teacher_of_its_own_camera_needs_no_other(tmp_path):
    class Metric(depth_anything_3.Teacher):
        def __init__(self):
            self.card = replace(depth_anything_3.CARDS[0], kind=Kind.METRIC_DEPTH)
            self.resize, self.native_size, self.focal = "native", 504, None

        def predict(self, images, *, focal=None):
            there = torch.ones(len(images), *images.shape[-2:])
            return DepthMap(2 * there, there > 0, Kind.METRIC_DEPTH)

    crops = CropSettings(size=20, min_side=40, patches="none")
    sample = label_photo(
        pair_photo(tmp_path, ""), [("da3", Metric())], crops=crops, labels=LabelSettings(store="as_is")
    )
    # 300 pixels at 504 are 300 * 20 / 504 at the crop's 20.
    assert sample.record["labels"]["da3"]["focal"] == pytest.approx(300 * 20 / 504)
    learnt = canonical(sample, 300.0).labels["da3"].shared.values
    torch.testing.assert_close(learnt, torch.full_like(learnt, 2 * 504 / 20))


def test_a_crop_is_a_longer_lens():
    ones = torch.ones(2, 16, 16)
    labels = Labels(DepthMap(6 * ones, ones > 0, Kind.METRIC_DEPTH), None, torch.zeros(2, 0, 4))
    batch = Batch(("a", "b"), torch.rand(2, 3, 16, 16), {"t": labels})
    draws = [Draw(square=(0.1, 0.4, 0.6)), Draw(square=(0.2, 0.0, 0.9))]
    plain, learnt = (
        augment(batch, draws, canonical=on, random_resized_crop=0.3).labels["t"].shared for on in (False, True)
    )
    assert (plain.values == 6).all() and (learnt.values < 6).all() and (learnt.values > 6 * 0.3**0.5 - 0.3).all()


def test_predictions_are_metres_of_the_camera_that_is_said(tmp_path):
    recipe = metric(tmp_path, student={"canonical_focal": 50.0}, crops={"size": 48, "min_side": 40})
    pair_photo(tmp_path, "36")
    first = replace(recipe.images[0], scenes=0, pairs=str(tmp_path / "pairs.tsv"))
    benchmark = replace(recipe.benchmarks[0], name="pairs", root=str(tmp_path / "pairs.tsv"))
    recipe = replace(recipe, images=(first,), benchmarks=(benchmark,))
    run_label(recipe)
    dataset, settings = build.training_labels(recipe), build.train_settings(recipe)
    record = dataset[0].record
    assert record["crop"]["focal"] == pytest.approx(36 * 48 / 40)
    item = StreamSamples(dataset, settings, training=True)[SamplePosition(0, 0)]
    metres, learnt = (one.labels["truth"].shared.values for one in (dataset[0], item.sample))
    torch.testing.assert_close(learnt, metres * (50.0 / record["crop"]["focal"]))

    student = build.make_student(recipe).eval()
    folder = checkpoint.save(student, recipe.run.folder / "train" / "student", card={"name": "tiny"})
    assert checkpoint.describe(folder)["output"]["camera"] == canonical_rule(50.0)
    page = (folder / "README.md").read_text()
    assert "metres = output * focal / 50" in page and '("photo.jpg", fov=60)' in page
    model, image = load(folder, device="cpu"), Image.fromarray(np.full((48, 48, 3), 90, np.uint8))
    with pytest.raises(ValueError, match="gives metres only with the camera's focal length: give fov=DEGREES"):
        model(image)
    wide = model(image, fov=90)  # a focal length of 24 pixels
    told = model(image, intrinsics=[[48, 0, 24], [0, 48, 24], [0, 0, 1]])
    torch.testing.assert_close(told.values, 2 * wide.values)
    raw = checkpoint.load(folder)(torch.full((1, 3, 48, 48), 90 / 255))[0].detach()
    size = checkpoint.load(folder).native_size
    assert size == 48
    torch.testing.assert_close(wide.values, raw * 24 / 50, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="fov: the map of .*pocket does not depend on the camera"):
        load("pocket", device="cpu")(image, fov=60)

    [score] = run_score(recipe)
    errors = []
    for sample in build.benchmark(recipe.benchmarks[0])[1]:
        truth = sample.truth()
        assert sample.focal() == 36
        told = model(sample.image(), intrinsics=[[36, 0, 24], [0, 36, 20], [0, 0, 1]]).values[None]
        errors.append(abs(float(np.median((told / truth.values)[truth.valid])) - 1))
    assert score.scale_error == pytest.approx(np.mean(errors), rel=1e-4) and score.protocol.alignment == "none"


class Asking:
    """A model of canonical depth or of stored maps, which notes what it is told."""

    def __init__(self, name: str):
        self.card, self.takes_focal, self.told = SimpleNamespace(name=name, seeded=False), True, []

    def predict(self, images, *, focal):
        self.told.append((tuple(images.shape[-2:]), focal))
        return DepthMap(1.0 + torch.rand(images.shape[:1] + images.shape[2:]), images[:, 0] >= 0, Kind.METRIC_DEPTH)


def test_a_comparison_tells_each_photo_s_focal_length(tmp_path):
    pair_photo(tmp_path, "36")
    given = {"images": [{"pairs": str(tmp_path / "pairs.tsv")}], "compare": {"side": 36}}
    [sample], _ = chosen_samples(parse({"run": {"name": "x", "out": str(tmp_path)}, **given}))
    assert sample.image().shape == (3, 30, 36) and sample.focal() == 27
    model = Asking("checkpoint")
    assert np.isfinite(_ask(model, sample).patch)
    assert model.told == [((30, 36), 27), ((15, 18), 27)]
    stored = Asking("stored")
    assert np.isnan(_ask(stored, sample).patch) and len(stored.told) == 1  # it has no map of a part
