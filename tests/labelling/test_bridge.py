"""The bridge from affine depth to a primary's disparity: exact where it can be, dropped where it cannot, counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import build, recipe, teaching
from distill.app.strict import RecipeError
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.data import sources
from distill.data.sources import Photo
from distill.labelling.bridge import Bridged, bridge_map, fit_reciprocal
from distill.labelling.run import TRUTH, CropSettings, LabelSettings, OnlineDataset, label, label_photo
from distill.shards.shards import LabelDataset, collate, read_manifest
from distill.teachers import Card
from distill.training.label_choice import average_labels, choose_teacher, learnt_labels

CROPS = CropSettings(size=28, min_side=28, patches="random", num_patches=2, patch_size=20)


@pytest.fixture(scope="module")
def scenes():
    """Depth (B,H,W) of a floor, a wall and boxes before it, but for a corner; and as an affine teacher says it."""
    draw, rows = torch.Generator().manual_seed(0), torch.arange(72)[:, None] / 72
    depth = (1 / (0.05 + (rows - 0.4).clamp(min=0.04) * torch.tensor([0.5, 1.0, 2.0])[:, None, None])).repeat(1, 1, 72)
    for b in range(3):
        for _ in range(6):
            top, left = (int(x) for x in torch.randint(0, 50, (2,), generator=draw))
            near = float(1 + 8 * torch.rand((), generator=draw))
            depth[b, top : top + 20, left : left + 16] = near + 0.02 * torch.arange(16)
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, :5, :9] = False
    depth = torch.where(valid, depth, 1.0)
    low, high = (torch.where(valid, depth, x).flatten(1) for x in (torch.inf, -torch.inf))
    low, high = low.amin(1)[:, None, None], high.amax(1)[:, None, None]
    return depth, valid, (depth - low) / (high - low), low, high


def test_an_affine_depth_is_found_exactly(scenes):
    depth, valid, said, low, high = scenes
    a, b, residual = fit_reciprocal(said, 3.0 / depth, valid)
    torch.testing.assert_close(a, ((high - low) / 3).flatten().double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(b, (low / 3).flatten().double(), rtol=1e-4, atol=0)
    assert residual.max() < 1e-5


def test_outliers_and_a_small_shift_do_not_carry_the_fit_away(scenes):
    depth, valid, said, low, high = scenes
    said = torch.where(torch.rand(said.shape) < 0.1, torch.rand(said.shape), said)
    a, b, residual = fit_reciprocal(said[::2], 3.0 / depth[::2], valid[::2])
    torch.testing.assert_close(a, ((high - low) / 3).flatten().double()[::2], rtol=0.1, atol=0)
    assert residual.max() < 0.3


@pytest.mark.parametrize("wrong", ["another scene", "reversed", "random", "constant", "primary constant", "few"])
def test_what_does_not_fit_is_dropped(scenes, wrong):
    depth, valid, said, *_ = scenes
    disparity = 1 / depth
    said, disparity, valid = {
        "another scene": (said.roll(1, 0).flip(2), disparity, valid),
        "reversed": (1 - said, disparity, valid),
        "random": (torch.rand(said.shape), disparity, valid),
        "constant": (torch.full_like(said, 0.4), disparity, valid),
        "primary constant": (said, torch.full_like(said, 0.4), valid),
        "few": (said, disparity, valid & (torch.arange(valid[0].numel()).reshape(valid[0].shape) < 9)),
    }[wrong]
    primary = DepthMap(disparity, valid, Kind.AFFINE_DISPARITY)
    most = LabelSettings().bridge_residual
    got, fits = bridge_map(DepthMap(said, valid, Kind.AFFINE_DEPTH), primary, max_residual=most)
    assert not got.valid.any() and all(fit["dropped"] and fit["residual"] > most for fit in fits)
    assert got.values.isfinite().all()
    json.dumps(fits, allow_nan=False)


def test_the_label_is_positive_finite_and_blind_to_what_is_invalid(scenes):
    depth, valid, said, *_ = scenes
    hole = torch.zeros_like(valid)
    hole[:, 10:20, 30:50] = True
    primary = DepthMap(torch.where(hole, torch.nan, 1 / depth), valid & ~hole, Kind.SCALE_DISPARITY)
    own = DepthMap(torch.where(~valid, torch.nan, said), valid, Kind.AFFINE_DEPTH)
    got, fits = bridge_map(own, primary, max_residual=0.3)
    assert got.kind is Kind.AFFINE_DISPARITY and not any(fit["dropped"] for fit in fits)
    # Where the primary knows nothing the assistant still does, by the same fit.
    assert torch.equal(got.valid, valid)
    torch.testing.assert_close(got.values[valid], (1 / depth)[valid], rtol=1e-3, atol=1e-4)
    assert (got.values[valid] > 0).all() and got.values.isfinite().all()
    with pytest.raises(
        KindError, match="affine_depth can only be bridged to disparity, but the primary teacher's labels"
    ):
        bridge_map(own, replace(primary, kind=Kind.SCALE_DEPTH), max_residual=0.3)


# --- in labels --------------------------------------------------------------------------------------------------------


def card(name: str, kind: Kind) -> Card:
    return Card(name=name, weights="none", kind=kind, licence="MIT", code_licence="MIT", commercial=True)


class Assistant:
    """Affine depth that any network could say: right, or nonsense on dark crops."""

    card = card("assistant", Kind.AFFINE_DEPTH)

    def __init__(self, nonsense: float = 0.0):
        self.nonsense = nonsense

    def predict(self, images):
        depth = 1 / (0.2 + images.mean(1))
        wrong = images.flatten(1).mean(1) < self.nonsense
        return DepthMap(torch.where(wrong[:, None, None], -depth, 0.2 * depth - 0.1), depth > 0, Kind.AFFINE_DEPTH)


class Primary:
    card = card("primary", Kind.AFFINE_DISPARITY)

    def predict(self, images):
        return DepthMap(2 * (0.2 + images.mean(1)), images[:, 0] >= 0, Kind.AFFINE_DISPARITY)


def pair(nonsense=0.0):
    return [("primary", Primary()), ("assistant", Bridged(Assistant(nonsense), "primary", 0.3))]


@pytest.fixture
def images(tmp_path):
    """Four pictures, in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"p{i}.png")
    return sources.folders(str(folder))


def test_regions_and_patches_have_their_own_fit_and_it_is_written_down(images, tmp_path):
    tmp_path = tmp_path / "out"
    label(images, pair(), out=tmp_path, crops=replace(CROPS, crops_per_image=2))
    dataset = LabelDataset(tmp_path)
    for sample in (dataset[i] for i in range(len(dataset))):
        bridge = sample.record["labels"]["assistant"]["bridge"]
        assert bridge["primary"] == "primary" and len(bridge["local"]) == 2
        for fit in (bridge["shared"], *bridge["local"]):
            # d = 0.2 z - 0.1 and q = 2 / z: 1 / q = 2.5 d + 0.25.
            assert fit["residual"] < 1e-4 and not fit["dropped"]
            assert (fit["a"], fit["b"]) == (pytest.approx(2.5, rel=1e-2), pytest.approx(0.25, rel=1e-2))
        one, other = sample.labels["primary"], sample.labels["assistant"]
        assert other.shared.kind is Kind.AFFINE_DISPARITY
        torch.testing.assert_close(other.shared.values, one.shared.values, atol=2e-3, rtol=0)
        torch.testing.assert_close(other.local.values, one.local.values, atol=2e-3, rtol=0)
    card = read_manifest(tmp_path)["teachers"]["assistant"]
    assert card["kind"] == "affine_depth" and card["stored"] == ["affine_disparity"]
    assert card["bridge"] == {"primary": "primary", "most": 0.3, "dropped": {"regions": 0, "patches": 0}}
    with pytest.raises(ValueError, match="different settings: teachers"):
        label(
            images,
            [pair()[0], ("assistant", Bridged(Assistant(), "primary", 0.2))],
            out=tmp_path,
            crops=replace(CROPS, crops_per_image=2),
        )


def test_dropped_labels_are_counted_and_cost_no_sample(images, tmp_path):
    tmp_path = tmp_path / "out"
    outcome = label(images, pair(nonsense=2.0), out=tmp_path, crops=CROPS)
    assert (outcome.samples, outcome.quarantined) == (4, 0)
    card = read_manifest(tmp_path)["teachers"]["assistant"]
    assert card["bridge"]["dropped"] == {"regions": 4, "patches": 8}
    dataset = LabelDataset(tmp_path)
    batch = collate([dataset[i] for i in range(4)])
    assert not batch.labels["assistant"].shared.valid.any() and batch.labels["primary"].shared.valid.all()
    # Training copes: a step of the assistant's has nothing to learn, and says so with a zero.
    from distill.losses.objective import Objective

    for name in ("assistant", "average"):
        labels = learnt_labels(
            batch.labels, teachers={"primary": 0.7, "assistant": 0.3}, name=name, kind="affine_disparity"
        )
        pred = torch.rand(4, 28, 28, requires_grad=True)
        total, _ = Objective()(pred, labels)
        assert total.tolist() == [0.0] * 4
        assert torch.equal(torch.autograd.grad(total.sum(), pred)[0], torch.zeros_like(pred))


def test_teachers_at_hand_are_bridged_like_stored_ones(images):
    sample = OnlineDataset(images, pair(), crops=CROPS)[0]
    torch.testing.assert_close(
        sample.labels["assistant"].shared.values, sample.labels["primary"].shared.values, atol=1e-4, rtol=0
    )
    truth = DepthMap(torch.rand(1, 64, 64) + 1, torch.ones(1, 64, 64, dtype=torch.bool), Kind.METRIC_DEPTH)
    rgb = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    photo = Photo(key="a", rgb=rgb, truth=truth, origin="a.jpg")
    sample = label_photo(photo, [("truth", TRUTH), ("assistant", Bridged(Assistant(), "truth", 1.0))], crops=CROPS)
    assert sample.labels["assistant"].shared.kind is Kind.AFFINE_DISPARITY


# --- in recipes -------------------------------------------------------------------------------------------------------


def given(**labels):
    return recipe.parse(
        {
            "run": {"name": "x"},
            "images": [{"scenes": 2}],
            "teachers": [{"name": "analytic"}, {"name": "marigold", "weights": "w"}],
            "labels": labels,
        }
    )


def test_without_a_bridge_the_refusal_names_it(monkeypatch):
    found = {"analytic": Primary(), "marigold": Assistant()}
    monkeypatch.setattr(teaching, "load_teacher", lambda spec, **_: found[spec.name])
    with pytest.raises(RecipeError, match='affine_depth.*disparity checkpoint.*labels.bridge = "primary"'):
        teaching.load_teachers(given(), on=torch.device("cpu"))
    loaded = teaching.load_teachers(given(bridge="primary", bridge_residual=0.2), on=torch.device("cpu"))
    assert loaded[1] == ("marigold", Bridged(found["marigold"], "analytic", 0.2))
    first = replace(given(bridge="primary"), teachers=given().teachers[::-1])
    with pytest.raises(RecipeError, match="put a disparity teacher before it"):
        teaching.load_teachers(first, on=torch.device("cpu"))
    skies = []
    monkeypatch.setattr(teaching, "load_teacher", lambda spec, *, sky, **_: skies.append(sky) or found[spec.name])
    teaching.load_teachers(given(bridge="primary", sky="keep"), on=torch.device("cpu"))
    assert skies == ["keep", "keep"]


def test_labels_have_another_address_with_a_bridge_and_only_then():
    plain, other = given(), given(bridge_residual=0.2)
    bridged = [given(bridge="primary"), given(bridge="primary", bridge_residual=0.2)]
    names = [build.labels_folder(r).name for r in (plain, other, *bridged)]
    assert names[0] == names[1] and len(set(names)) == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"bridge": "assistant"}, "labels.bridge must be"),
        ({"bridge": "primary", "store": "as_is"}, 'needs store = "disparity"'),
        ({"bridge": "primary", "bridge_residual": 0.0}, r"bridge_residual must be in \(0, 1\]"),
    ],
)
def test_faults_of_the_recipe(labels, message):
    with pytest.raises(RecipeError, match=message):
        given(**labels)


# --- averages ---------------------------------------------------------------------------------------------------------


def test_an_average_weighs_pixels_by_the_teachers_agreement():
    one = torch.rand(1, 16, 16)
    two = one.clone()
    two[0, :4] = one[0, :4].flip(1)
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    maps = {n: DepthMap(v, valid, Kind.AFFINE_DISPARITY) for n, v in (("a", one), ("b", 5 * two + 2))}
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    labels = {name: Labels(m, m, boxes) for name, m in maps.items()}
    mean = average_labels(labels, {"a": 0.7, "b": 0.3})
    weight = mean.shared_weight
    assert weight.shape == mean.shared.values.shape and torch.equal(mean.local_weight, weight)
    assert weight[0, 4:].min() > 0.999 > 0.9 > weight[0, :4].mean() and weight.min() > 0

    def normal(x):
        return (x - x.median()) / (x - x.median()).abs().mean()

    torch.testing.assert_close(weight, 1 / (1 + (normal(one) - normal(two)).abs()))
    torch.testing.assert_close(mean.shared.values, 0.7 * normal(one) + 0.3 * normal(two))
    moved = mean.to("cpu")
    assert torch.equal(moved.shared_weight, weight) and torch.equal(moved.local_weight, weight)


def test_an_average_trains_with_its_weights_and_whatever_the_cut(tmp_path):
    """Augmentation comes before the averaging, so that maps and weights turn together; cutting changes nothing."""
    from tests.training.toys import Toys, run

    seen = []

    def objective(pred, labels, *_):
        w = labels.shared_weight
        assert w is not None and (w > 0).all()
        seen.append(w)
        loss = (w * (pred - labels.shared.values).abs()).sum((-2, -1)) / w.sum((-2, -1))
        return loss, {}

    logs = []
    for name, given in (("whole", {}), ("parts", {"accumulate": 2}), ("workers", {"workers": 1})):
        out = tmp_path / name
        run(out, dataset=Toys(), objective=objective, steps=6, save_every=6, eval_every=0, strategy="average", **given)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert {line["teacher"] for line in lines if "teacher" in line} == {"average"}
        logs.append([line["loss"] for line in lines if "loss" in line])
    assert len(logs[0]) == 6 and len({float(w.mean()) for w in seen}) > 3
    assert logs[1] == pytest.approx(logs[0], rel=1e-5) and logs[2] == logs[0]


def test_every_process_draws_the_same_teacher(elsewhere):
    """In another process, with other hashes, from any step on."""
    here = [choose_teacher({"p": 0.7, "a": 0.3}, seed=5, step=step) for step in range(80)]
    assert [elsewhere(choose_teacher, {"p": 0.7, "a": 0.3}, seed=5, step=t) for t in range(40, 80)] == here[40:]
    assert {"p", "a"} == set(here) and here != [
        choose_teacher({"p": 0.7, "a": 0.3}, seed=6, step=step) for step in range(80)
    ]


def test_what_the_primary_does_not_know_is_no_part_of_the_fit(scenes):
    """And a few wild pixels pull it as little as Huber lets them."""
    depth, valid, said, low, high = scenes
    valid = valid.clone()
    truth = 3.0 / depth
    primary = valid.clone()
    primary[:, 15:50] = False
    wild = torch.where(primary, truth, 50.0)
    wild[:, 60, :8] = 30 * truth[:, 60, :8]
    said = said.clone()
    said[:, 20, 30] = -100.0  # so near that no distance is left
    affine, disparity = (DepthMap(maps, mask, kind) for maps, mask, kind in (
        (said, valid, Kind.AFFINE_DEPTH), (wild, primary, Kind.AFFINE_DISPARITY)
    ))  # fmt: skip
    out, fits = bridge_map(affine, disparity, max_residual=1.0)
    expected = ((high - low) / 3).flatten().tolist()
    assert [fit["a"] for fit in fits] == pytest.approx(expected, rel=0.02)
    valid[:, 20, 30] = False
    assert torch.equal(out.valid, valid), "but labelled by the assistant alone"
    holes = torch.where(primary, truth, torch.nan)
    a, _, residual = fit_reciprocal(said, holes, valid)
    assert a.tolist() == pytest.approx(expected, rel=1e-4) and (residual < 1e-3).all()
