"""What Depth Anything 3 sees as sky, and what the labels make of it."""

from __future__ import annotations

import json

import pytest
import torch

from distill.app import build, teaching
from distill.app import recipe as recipes
from distill.app.cli import main
from distill.core.depth import DepthMap, Kind
from distill.shards.shards import LabelDataset
from distill.teachers import (
    _sky,
    analytic,
    depth_anything_3,
)
from distill.teachers._sky import apply_sky
from tests import tiny_teachers as tiny
from tests.teachers.asking import load, one_line


class TestSky:
    def test_options(self, made):
        keep, far, invalid = (load(made, "depth_anything_3", resize="none", sky=s) for s in ("keep", "far", "invalid"))
        images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        sky = keep.network(depth_anything_3.normalize(images))[1] >= 0.3
        assert 10 < sky.sum() < sky.numel() - 10, "the tiny network must see some sky"
        raw, filled, cut = (t.predict(images) for t in (keep, far, invalid))
        limit = torch.quantile(raw.values[~sky], 0.99)
        torch.testing.assert_close(filled.values, torch.where(sky, limit, raw.values))
        assert filled.valid.all() and torch.equal(cut.valid, ~sky)
        assert torch.equal(cut.values[cut.valid], raw.values[cut.valid])
        with pytest.raises(ValueError, match="sky must be one of keep, far, invalid"):
            load(made, "depth_anything_3", sky="blue")

    def test_every_pixel_counts(self):
        """Above 100,000 pixels the authors sample at random; torch.quantile itself gives up at 16 million."""
        depth = torch.rand(400, 500, generator=torch.Generator().manual_seed(0))
        sky = torch.zeros(400, 500)
        sky[:100] = 1
        out = depth_anything_3.sky_to_far(depth, sky)
        assert out[0, 0] == torch.quantile(depth[100:], 0.99) and torch.equal(out[100:], depth[100:])

    def test_mixed_pixels_are_invalid_after_resizing(self, made):
        teacher = load(made, "depth_anything_3", sky="invalid", native_size=56)
        images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
        out = teacher.predict(images)
        sized = depth_anything_3.resize_native(images, 56)
        sky = teacher.network(depth_anything_3.normalize(sized))[1] >= 0.3
        bigger = sky.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert not (out.valid & bigger).any() and out.valid.any()


class TestOneSkyPolicy:
    """labels.sky: what one teacher sees as sky holds for everybody's maps."""

    IMAGES = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))

    def both(self, made, policy):
        far_kind = "scale_depth" if policy == "far" else "affine_disparity"
        eye = load(made, "depth_anything_3", resize="none", sky="invalid")
        return _sky.under_policy([("plain", analytic.Teacher.load(kind=far_kind)), ("eye", eye)], policy), eye

    def test_invalid(self, made):
        teachers_, eye = self.both(made, "invalid")
        seen = eye.predict(self.IMAGES)
        assert eye.sees_sky and 10 < (~seen.valid).sum() < seen.valid.numel() - 10
        for _, teacher in teachers_:
            out = teacher.predict(self.IMAGES)
            assert torch.equal(out.valid, seen.valid), "one mask for all"
        plain = analytic.Teacher.load().predict(self.IMAGES)
        assert torch.equal(teachers_[0][1].predict(self.IMAGES).values[seen.valid], plain.values[seen.valid])

    @pytest.mark.parametrize("kind", ["scale_depth", "affine_disparity"])
    def test_far_is_a_full_quantile_of_each_map(self, made, kind):
        eye = load(made, "depth_anything_3", resize="none", sky="invalid")
        plain = analytic.Teacher.load(kind=kind)
        (_, teacher), (_, own) = _sky.under_policy([("plain", plain), ("eye", eye)], "far")
        sky = ~eye.predict(self.IMAGES).valid
        out, raw = teacher.predict(self.IMAGES), plain.predict(self.IMAGES)
        assert out.valid.all() and out.kind == kind
        for i in range(2):
            place = 0.99 if kind == "scale_depth" else 0.01
            expected = torch.quantile(raw.values[i][~sky[i]], place)
            torch.testing.assert_close(out.values[i][sky[i]], expected.expand(int(sky[i].sum())))
            assert torch.equal(out.values[i][~sky[i]], raw.values[i][~sky[i]])
        alone = torch.cat([own.predict(self.IMAGES[i : i + 1]).values for i in range(2)])
        torch.testing.assert_close(own.predict(self.IMAGES).values, alone, atol=2e-5, rtol=2e-5)
        authors = load(made, "depth_anything_3", resize="none", sky="far").predict(self.IMAGES)
        torch.testing.assert_close(own.predict(self.IMAGES).values, authors.values)

    @pytest.mark.parametrize("kind", ["scale_depth", "affine_disparity", "affine_depth"])
    def test_zero_is_disparity_zero(self, made, kind):
        eye = load(made, "depth_anything_3", resize="none", sky="invalid")
        plain = analytic.Teacher.load(kind=kind)
        ((_, teacher), _) = _sky.under_policy([("plain", plain), ("eye", eye)], "zero")
        sky = ~eye.predict(self.IMAGES).valid
        out, raw = teacher.predict(self.IMAGES), plain.predict(self.IMAGES)
        assert out.kind == teacher.card.kind
        if kind == "affine_depth":  # there is no "infinitely far" in it
            assert out.kind == kind and torch.equal(out.valid, raw.valid & ~sky)
            return
        assert out.kind.quantity == "disparity" and out.valid.all() and (out.values[sky] == 0).all()
        expected = 1 / raw.values if kind == "scale_depth" else raw.values
        torch.testing.assert_close(out.values[~sky], expected[~sky])

    def test_a_map_of_nothing_but_sky_is_left_alone(self):
        depth = DepthMap(torch.rand(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), Kind.SCALE_DEPTH)
        everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
        assert torch.equal(_sky.apply_sky(depth, everywhere, "far").values, depth.values)
        assert not _sky.apply_sky(depth, everywhere, "invalid").valid.any()

    @pytest.mark.parametrize(("pixels", "changed"), [(10, 0), (11, 11), (70, 70), (71, 0)])
    def test_a_few_pixels_of_sky_or_of_others_are_left_alone(self, pixels, changed):
        depth, sky = DepthMap(torch.rand(1, 9, 9), torch.ones(1, 9, 9) > 0, Kind.SCALE_DEPTH), torch.zeros(1, 9, 9)
        sky.view(-1)[:pixels] = 1
        after = _sky.apply_sky(depth, sky > 0, "far").values
        assert int((after != depth.values).sum()) == changed

    def test_the_eye_is_asked_once_for_a_batch(self, made, monkeypatch):
        teachers_, eye = self.both(made, "invalid")
        asked = []
        answer = eye.predict(self.IMAGES)
        monkeypatch.setattr(eye, "predict", lambda images: (asked.append(1), answer)[1])
        for _, teacher in teachers_:
            teacher.predict(self.IMAGES.clone())
        assert len(asked) == 1
        teachers_[0][1].predict(self.IMAGES + 0.1)
        assert len(asked) == 2

    def test_somebody_must_know_sky(self, made, tmp_path):
        plain = analytic.Teacher.load()
        with pytest.raises(
            ValueError, match='labels.sky = "far" needs a teacher that knows sky.*none of red does'
        ) as error:
            _sky.under_policy([("red", plain)], "far")
        one_line(error)
        weights, options = tiny.da3(tmp_path, main=True)
        assert not depth_anything_3.Teacher.load(weights, **options).sees_sky
        assert _sky.under_policy([("t", "truth"), ("eye", load(made, "depth_anything_3"))], "far")[0] == ("t", "truth")

    @pytest.mark.parametrize("policy", ["teacher", "keep", "far", "invalid"])
    def test_labels_carry_it(self, made, tmp_path, policy):
        weights, options = made("depth_anything_3")
        rows = [f"{key} = {value}" for key, value in options.items()]
        text = SKY_RECIPE.format(out=tmp_path, weights=weights, options=", ".join(rows))
        (tmp_path / "r.toml").write_text(text)
        assert main(["label", str(tmp_path / "r.toml"), "--set", f"labels.sky={policy}"]) == 0
        (folder,) = (tmp_path / "labels").iterdir()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["settings"]["sky"] == policy
        assert manifest["recipe"]["labels"]["sky"] == policy
        sample = LabelDataset(folder)[0]
        assert sample.record["sky"] == (None if policy == "teacher" else policy)
        plain, eye = (sample.labels[name].shared.valid for name in ("plain", "depth_anything_3"))
        if policy == "invalid":
            assert torch.equal(plain, eye) and not eye.all()
        else:
            assert plain.all() and eye.all()

    def test_a_bridged_assistant_follows_it_too(self, made, tmp_path):
        weights, _ = made("depth_anything_3")
        text = SKY_RECIPE.format(out=tmp_path, weights=weights, options="native_size = 56")
        text = text.replace('name = "analytic"', f'name = "fiffdepth"\nweights = "{made("fiffdepth")[0]}"')
        first, second, last = text.partition("[[teachers]]")[0], *text.split("[[teachers]]")[1:]
        (tmp_path / "r.toml").write_text(f"{first}[[teachers]]{last}[[teachers]]{second}")
        more = ["labels.sky=invalid", "labels.bridge=primary", "labels.bridge_residual=1.0"]
        assert main(["label", str(tmp_path / "r.toml"), *(word for key in more for word in ("--set", key))]) == 0
        (folder,) = (tmp_path / "labels").iterdir()
        sample = LabelDataset(folder)[0]
        eye, bridged = (sample.labels[name].shared for name in ("depth_anything_3", "plain"))
        assert bridged.kind == Kind.AFFINE_DISPARITY and not eye.valid.all()
        assert not (bridged.valid & ~eye.valid).any()

    def test_the_address_changes_with_it_alone(self, tmp_path):
        text = SKY_RECIPE.format(out=tmp_path, weights="w", options="native_size = 56")
        (tmp_path / "r.toml").write_text(text)

        def address(*more):
            return build.labels_folder(recipes.load(tmp_path / "r.toml", more)).name

        found = {policy: address(f"labels.sky={policy}") for policy in ("teacher", "keep", "far", "invalid")}
        assert found["teacher"] == address() and len(set(found.values())) == 4
        told = recipes.load(tmp_path / "r.toml", ["labels.sky=far", "teachers.1.options.sky=keep"])
        with pytest.raises(ValueError, match=r"teachers\[1\].options.sky: labels.sky decides"):
            teaching.check_teachers(told)


SKY_RECIPE = """
[run]
name = "sky"
out = "{out}"
device = "cpu"
[[images]]
bundled_photos = true
limit = 1
[crops]
size = 112
min_side = 112
patches = "none"
[[teachers]]
name = "analytic"
alias = "plain"
[[teachers]]
name = "depth_anything_3"
weights = "{weights}"
options = {{ {options} }}
"""


def test_sky_that_a_teacher_left_out_is_known_and_what_it_does_not_know_sets_no_far_value():
    values = torch.full((1, 8, 8), 5.0)
    values[:, 4:], values[:, 0] = 1.0, 1000.0
    sky, valid = torch.zeros(1, 8, 8, dtype=torch.bool), torch.ones(1, 8, 8, dtype=torch.bool)
    sky[:, 4:] = True
    valid[:, 4:], valid[:, 0] = False, False  # the sky, and a row of nonsense beside it
    far = apply_sky(DepthMap(values, valid, Kind.AFFINE_DEPTH), sky, "far")
    assert (far.values[sky] == 5.0).all() and far.valid[sky].all() and not far.valid[:, 0].any()
    zero = apply_sky(DepthMap(values, valid, Kind.AFFINE_DISPARITY), sky, "zero")
    assert (zero.values[sky] == 0.0).all() and zero.valid[sky].all() and not zero.valid[:, 0].any()


def test_a_map_without_sky_is_not_sorted_and_stays_as_it_is(monkeypatch):
    values = torch.rand(2, 8, 9)
    sky = torch.zeros(2, 8, 9, dtype=torch.bool)
    sky[1, :2] = True
    sorted_maps = []
    monkeypatch.setattr(_sky, "quantile", lambda v, *more: sorted_maps.append(v) or torch.tensor(7.0))
    after = _sky.apply_sky(DepthMap(values, torch.ones_like(sky), Kind.SCALE_DEPTH), sky, "far")
    assert len(sorted_maps) == 1 and sorted_maps[0].equal(values[1])
    assert after.values[0].equal(values[0]) and (after.values[1][sky[1]] == 7).all()
