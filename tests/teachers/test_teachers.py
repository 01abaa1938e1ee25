"""What every file in teachers/ keeps: the contract on tiny random models, strict weights, clear errors."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distill import teachers
from distill.app import build
from distill.app import recipe as recipes
from distill.app.cli import main
from distill.core import crops
from distill.core.depth import DepthMap, Kind
from distill.core.plugins import find, names
from distill.shards.shards import LabelDataset
from distill.students import checkpoint as checkpoints
from distill.teachers import (
    _sky,
    analytic,
    checkpoint,
    depth_anything_3,
    depth_anything_v2,
    fiffdepth,
    genpercept,
    marigold,
    midas,
    stored,
)
from tests import tiny_teachers as tiny
from tests.tiny_teachers import KEYS, SIZE

NAMES = names("distill.teachers")
RESIZING = [name for name in NAMES if name not in ("analytic", "stored")]
IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(name)` -> (weights, options) of a tiny checkpoint, written once."""
    written: dict[str, tuple] = {}

    def make(name):
        if name not in written:
            written[name] = getattr(tiny, name)(tmp_path_factory.mktemp(name))
        return written[name]

    return make


@pytest.fixture
def copy(made, tmp_path):
    """`copy(name)` -> a folder of a tiny checkpoint that may be spoilt."""

    def make(name):
        shutil.copytree(made(name)[0], tmp_path / name)
        return tmp_path / name

    return make


_LOADED: dict[str, object] = {}


def load(made, name, **options):
    """A tiny teacher; the same options give the same object, since no test may change one."""
    asked = f"{name} {sorted(options.items(), key=str)}"
    if asked not in _LOADED:
        weights, usual = made(name)
        if options.get("resize") == "none":
            usual = {key: value for key, value in usual.items() if key != "native_size"}
        _LOADED[asked] = find("distill.teachers", name).Teacher.load(weights, **(usual | options))
    return _LOADED[asked]


def predict(teacher, images, keys=KEYS):
    return teacher.predict(images, keys=list(keys)) if teacher.card.seeded else teacher.predict(images)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# --- the contract -----------------------------------------------------------------------------------------------------


def test_there_are_teachers():
    assert {"analytic", "checkpoint", "depth_anything_v2", "depth_anything_3", "marigold", "genpercept"} <= set(NAMES)
    for name in NAMES:
        assert hasattr(tiny, name), f"tests/tiny_teachers.py has no {name}(folder): the contract cannot be tested"


@pytest.mark.parametrize("name", NAMES)
def test_cards_and_signature(name):
    module = find("distill.teachers", name)
    assert module.CARDS and all(card.name == name for card in module.CARDS)
    assert len({card.weights for card in module.CARDS}) == len(module.CARDS)
    for card in module.CARDS:
        assert isinstance(card.kind, Kind) and card.licence and card.code_licence and card.source
        assert not (card.commercial and "NC" in card.licence)
    parameters = inspect.signature(module.Teacher.load).parameters
    assert list(parameters)[:3] == ["weights", "device", "dtype"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])
    seeded = "keys" in inspect.signature(module.Teacher.predict).parameters
    assert all(card.seeded == seeded for card in module.CARDS)


def test_the_list_of_teachers(capsys):
    """Kind, direction, size, licences, commercial use, revision: readable at 100 columns."""
    assert main(["list", "teachers"]) == 0
    said = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100
    for name in NAMES:
        for card in find("distill.teachers", name).CARDS:
            assert card.weights in said and card.licence in said and card.code_licence in said
    for words in (
        "depth_anything_v2: affine_disparity, larger is nearer; native size 518, sides multiples of 14",
        "depth_anything_3: metric_depth, larger is farther; native size 504, sides multiples of 14",
        "licence of weights and code: MIT",
    ):
        assert words in said
    row = next(line for line in said.splitlines() if line.startswith("pocket"))
    assert row.split()[1] == "no" and len(row.split()[2]) == 10


def test_a_revision_is_read_from_the_hubs_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    card = marigold.CARDS[0]
    assert teachers.revision_here(card) == ""
    commit = "c" * 40
    folder = tmp_path / "models--prs-eth--marigold-depth-v1-1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    assert teachers.revision_here(card) == "", "named, but not here"
    (folder / "snapshots" / commit).mkdir(parents=True)
    assert teachers.revision_here(card) == commit
    assert teachers.revision_here(analytic.CARDS[0]) == "1"


def test_importing_every_teacher_is_cheap():
    code = (
        "import sys; from distill.core.plugins import find, names\n"
        "for name in names('teachers'): find('teachers', name)\n"
        "print([m for m in ('transformers', 'diffusers', 'scipy', 'huggingface_hub.hf_api') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_contract(made, name):
    teacher = load(made, name)
    before = IMAGES.clone()
    both = predict(teacher, IMAGES)
    assert torch.equal(IMAGES, before)
    assert isinstance(both, DepthMap) and both.kind == teacher.card.kind and teacher.card.name == name
    assert both.values.shape == (2, *SIZE) and both.values.dtype == torch.float32 and not both.values.requires_grad
    assert both.valid.all() and torch.isfinite(both.values).all()
    for i, key in enumerate(KEYS):
        one = predict(teacher, IMAGES[i : i + 1], [key])
        torch.testing.assert_close(one.values, both.values[i : i + 1], atol=2e-5, rtol=2e-5)
    assert torch.equal(predict(teacher, IMAGES).values, both.values), "the same question has the same answer"
    assert (both.values[0] - both.values[1]).abs().max() > 1e-4, "it looks at the image"
    assert both.values[0].std() > 1e-4


@pytest.mark.parametrize("name", RESIZING)
def test_sizes(made, name):
    none = load(made, name, resize="none")
    for height, width in ((40, 31), (64, 32)):
        images = torch.rand(1, 3, height, width)
        assert predict(none, images, KEYS[:1]).values.shape == (1, height, width)
    with pytest.raises(ValueError, match="native_size has no meaning"):
        find("distill.teachers", name).Teacher.load(made(name)[0], resize="none", native_size=64)
    with pytest.raises(ValueError, match="resize must be"):
        find("distill.teachers", name).Teacher.load(made(name)[0], resize="squash")
    smaller = load(made, name, native_size=32)
    assert smaller.card.native_size == 32
    out = predict(smaller, IMAGES)
    assert out.values.shape == (2, *SIZE)
    assert (out.values - predict(none, IMAGES).values).abs().max() > 1e-4, "native_size changes what the network sees"


@pytest.mark.parametrize("name", NAMES)
def test_values_outside_the_range_are_seen(made, name):
    if name == "stored":
        return
    teacher = load(made, name, **({"resize": "none"} if name in RESIZING else {}))
    inside, outside = (predict(teacher, IMAGES * factor).values for factor in (1.0, 1.2))
    clamped = predict(teacher, (IMAGES * 1.2).clamp(0, 1)).values
    assert torch.isfinite(outside).all()
    assert (outside - inside).abs().max() > 1e-4 and (outside - clamped).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_images_at_the_door(made, name):
    teacher = load(made, name)
    for bad in (IMAGES[0], IMAGES[:, :2], (IMAGES * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match="images must be") as error:
            predict(teacher, bad)
        one_line(error)


@pytest.mark.parametrize("name", RESIZING)
def test_half_precision_stays_near(made, name):
    full = predict(load(made, name), IMAGES).values
    half = predict(load(made, name, dtype=torch.bfloat16), IMAGES)
    assert half.values.dtype == torch.float32 and torch.isfinite(half.values).all()
    assert np.corrcoef(full.flatten(), half.values.flatten())[0, 1] > 0.9


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESIZING)
@pytest.mark.parametrize("weights", ["no_such_folder", "nobody/no-such-model", "some/where/model.safetensors"])
def test_missing_weights_are_one_line(name, weights):
    with pytest.raises(OSError, match=re.escape(weights)) as error:
        find("distill.teachers", name).Teacher.load(weights)
    one_line(error)


def weights_files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", [*RESIZING, "genpercept_head"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "short"])
def test_every_parameter_is_claimed(made, copy, name, fault):
    """Silently random weights are the worst failure: each file in turn loses, gains or misshapes one tensor."""
    plugin = find("distill.teachers", name.removesuffix("_head"))
    for file in weights_files(copy(name)):
        intact = file.read_bytes()
        state = safetensors.torch.load_file(file)
        key = sorted(state)[len(state) // 2]
        if fault == "missing":
            del state[key]
        elif fault == "extra":
            state["left_over.weight"], key = torch.zeros(2, 2), "left_over.weight"
        elif fault == "shape":
            state[key] = torch.zeros(5, 3)
        if fault == "short":
            file.write_bytes(intact[: len(intact) // 2])
        else:
            safetensors.torch.save_file(state, file, metadata={"format": "pt"})
        with pytest.raises((ValueError, OSError)) as error:
            plugin.Teacher.load(str(tiny_root(file, name)))
        text = one_line(error)
        assert file.name in text or file.parent.name in text
        if fault in ("missing", "extra") and name not in ("checkpoint", "midas"):  # transformers renames BEiT's
            assert key.removeprefix("model.").removeprefix("text_model.") in text
        file.write_bytes(intact)


def tiny_root(file, name):
    parts = {"unet", "vae", "text_encoder", "dpt_head_identity"}
    return file.parent.parent if file.parent.name in parts else file.parent


@pytest.mark.parametrize("name", RESIZING)
def test_what_only_stands_where_weights_should(made, copy, name):
    """A clone without git-lfs, and the page of a login: both are small files under the right name."""
    if name == "checkpoint":
        return  # its folder names the digest of its file
    plugin = find("distill.teachers", name)
    for file in weights_files(copy(name)):
        intact = file.read_bytes()
        for content, words in (
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "git lfs pull"),
            (b"<!doctype html><html>Access to this model is restricted</html>", "is a web page"),
        ):
            file.write_bytes(content)
            with pytest.raises(teachers.WeightsMismatchError, match=words) as error:
                plugin.Teacher.load(str(tiny_root(file, name)))
            assert file.name in one_line(error)
        file.write_bytes(intact)


def test_half_a_torch_file_and_several_files(tmp_path):
    file = tmp_path / "depth_anything_v2_vits.pth"
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 384), "x": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        file.write_bytes(content)
        with pytest.raises(teachers.WeightsMismatchError, match="vits.pth cannot be read as weights") as error:
            depth_anything_v2.Teacher.load(str(tmp_path))
        assert "weights_only" not in one_line(error)
    (tmp_path / "depth_anything_v2_vitl.pth").touch()
    with pytest.raises(
        teachers.WeightsMismatchError, match="holds .*vitl.pth, .*vits.pth: give the path of one"
    ) as error:
        depth_anything_v2.Teacher.load(str(tmp_path))
    one_line(error)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"pretrained.cls_token": Trap()}, tmp_path / "model.pth")
    with pytest.raises(teachers.WeightsMismatchError, match="model.pth") as error:
        depth_anything_v2.Teacher.load(str(tmp_path / "model.pth"))
    one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_gated_weights_say_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        teachers.WeightsMissingError, match="org/model.*gated: accept the licence.*hf auth login"
    ) as error:
        marigold.Teacher.load("org/model")
    one_line(error)


def test_a_hub_id_may_name_a_file_and_a_revision(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "model.safetensors").touch()

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = teachers.resolve("org/name/large/model.safetensors@abc", files=("*.json",))
    assert found == tmp_path / "large" / "model.safetensors"
    assert asked == [("org/name", "abc", "large/model.safetensors")]
    with pytest.raises(teachers.WeightsMissingError, match="org/name has no small/model.safetensors"):
        teachers.resolve("org/name/small/model.safetensors", files=())


def test_cards_are_recognised_by_name():
    cards = depth_anything_v2.CARDS
    small = "depth-anything/Depth-Anything-V2-Small"
    assert teachers.card_for(cards, small).commercial
    assert teachers.card_for(cards, f"/weights/{small.partition('/')[2]}/a.pth").licence == "Apache-2.0"
    assert teachers.card_for(cards, f"/hub/models--{small.replace('/', '--')}/snapshots/x").licence == "Apache-2.0"
    assert teachers.card_for(cards, f"{small}@abc").weights == f"{small}@abc"
    unknown = teachers.card_for(cards, "/weights/model.safetensors")
    assert unknown.licence == "unknown" and not unknown.commercial


def test_revisions(tmp_path):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.pth").write_bytes(b"1")
    assert teachers.revision_of(snapshot) == teachers.revision_of(snapshot / "a.pth") == "a" * 40
    file = tmp_path / "a.pth"
    file.write_bytes(b"1")
    first = teachers.revision_of(file)
    file.write_bytes(b"2")
    assert first.startswith("sha256:") and teachers.revision_of(file) != first


# --- one by one -------------------------------------------------------------------------------------------------------


def test_analytic_is_its_formula():
    teacher = analytic.Teacher.load("none", rgb=[1.0, -2.0, 0.5], offset=3.0, kind="scale_depth")
    out = teacher.predict(IMAGES)
    expected = 3 + IMAGES[:, 0] - 2 * IMAGES[:, 1] + 0.5 * IMAGES[:, 2]
    torch.testing.assert_close(out.values, expected)
    assert out.kind == Kind.SCALE_DEPTH and teacher.card.revision == "rgb=1,-2,0.5 offset=3"
    with pytest.raises(OSError, match="no weights"):
        analytic.Teacher.load("model.pth")


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [(480, 640, 518, (518, 686)), (375, 1242, 518, (518, 1722)), (1000, 700, 518, (742, 518)), (60, 80, 98, (98, 126))],
)
def test_depth_anything_v2_rule(height, width, size, shape):
    assert depth_anything_v2.native_shape(height, width, size) == shape


@pytest.mark.parametrize(("height", "width", "size", "side"), [(60, 80, 70, 70), (480, 640, 700, 700), (9, 90, 60, 70)])
def test_distill_any_depth_squashes(height, width, size, side):
    assert depth_anything_v2.native_shape(height, width, size, square=True) == (side, side)


def test_distill_any_depth_is_known_by_its_path_or_its_names():
    known = depth_anything_v2._is_distilled
    assert known("xingyang1/Distill-Any-Depth/small/model.safetensors", {"pretrained.cls_token": torch.zeros(1)})
    assert known("model.safetensors", {"module.backbone.cls_token": torch.zeros(1)})
    assert not known("depth_anything_v2_vits.pth", {"pretrained.cls_token": torch.zeros(1)})


@pytest.mark.parametrize("name", ["genpercept", "fiffdepth"])
def test_one_step_teachers_take_the_diffusion_teachers_options(made, name):
    images = torch.rand(1, 3, 32, 40)
    teacher = load(made, name, steps=1, ensemble=1)
    assert torch.equal(teacher.predict(images, noise=torch.rand(1, 4, 4, 5)).values, teacher.predict(images).values)
    with pytest.raises(ValueError, match="steps and ensemble must be 1"):
        load(made, name, ensemble=5)


def test_depth_anything_v2_metric(made, tmp_path):
    metric = load(made, "depth_anything_v2", max_depth=20.0)
    out = metric.predict(IMAGES)
    assert out.kind == Kind.METRIC_DEPTH and 0 < out.values.min() and out.values.max() < 20
    (tmp_path / "depth_anything_v2_metric_hypersim_vits.pth").touch()
    with pytest.raises(ValueError, match="give max_depth"):
        depth_anything_v2.Teacher.load(str(tmp_path / "depth_anything_v2_metric_hypersim_vits.pth"))
    (tmp_path / "depth_anything_vits14.pth").touch()
    with pytest.raises(ValueError, match="Depth Anything V1"):
        depth_anything_v2.Teacher.load(str(tmp_path / "depth_anything_vits14.pth"))


def test_depth_anything_v2_refuses_other_networks(made, copy, tmp_path):
    for name in ("depth_anything_3", "midas"):
        with pytest.raises(ValueError, match="not depth_anything") as error:
            depth_anything_v2.Teacher.load(str(copy(name)))
        one_line(error)
    safetensors.torch.save_file({"pretrained.cls_token": torch.zeros(1, 1, 384)}, tmp_path / "a.safetensors")
    with pytest.raises(teachers.WeightsMismatchError, match="is missing backbone.embeddings.position_embeddings"):
        depth_anything_v2.Teacher.load(str(tmp_path / "a.safetensors"))


def test_position_table_uses_the_offset():
    table = torch.randn(1, 26, 4, generator=torch.Generator().manual_seed(0))
    from distill.teachers._dino import position_table

    assert position_table(table, 5, 5) is table
    ours = position_table(table, 7, 4)
    grid = table[:, 1:].reshape(1, 5, 5, 4).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(grid, size=(7, 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert ours.shape == (1, 29, 4) and 1e-3 < (ours[:, 1:] - plain).abs().max() < 1


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

    @pytest.mark.parametrize("policy", ["own", "keep", "far", "invalid"])
    def test_labels_carry_it(self, made, tmp_path, policy):
        weights, options = made("depth_anything_3")
        rows = [f"{key} = {value}" for key, value in options.items()]
        text = SKY_RECIPE.format(out=tmp_path, weights=weights, options=", ".join(rows))
        (tmp_path / "r.toml").write_text(text)
        assert main(["label", str(tmp_path / "r.toml"), "--set", f"labels.sky={policy}"]) == 0
        (folder,) = (tmp_path / "labels").iterdir()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["settings"]["sky"] == (None if policy == "own" else policy)
        assert manifest["recipe"]["labels"]["sky"] == policy
        sample = LabelDataset(folder)[0]
        assert sample.record["sky"] == manifest["settings"]["sky"]
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

        found = {policy: address(f"labels.sky={policy}") for policy in ("own", "keep", "far", "invalid")}
        assert found["own"] == address() and len(set(found.values())) == 4
        told = recipes.load(tmp_path / "r.toml", ["labels.sky=far", "teachers.1.options.sky=keep"])
        with pytest.raises(ValueError, match=r"teachers\[1\].options.sky: labels.sky decides"):
            build.check_teachers(told)


SKY_RECIPE = """
[run]
name = "sky"
out = "{out}"
device = "cpu"
[[images]]
wheels = true
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


def test_depth_anything_3_main_series(tmp_path):
    weights, options = tiny.da3(tmp_path, main=True)
    state = safetensors.torch.load_file(f"{weights}/model.safetensors")
    extra = {"cam_dec.fc_t.weight": (3, 4), "cam_enc.trunk.0.norm1.bias": (4,)}
    extra |= {"head.scratch.refinenet1_aux.out_conv.bias": (4,), "head.scratch.output_conv2_aux.0.2.weight": (4,)}
    state |= {f"model.{key}": torch.zeros(shape) for key, shape in extra.items()}
    safetensors.torch.save_file(state, f"{weights}/model.safetensors")
    teacher = depth_anything_3.Teacher.load(weights, **options)
    out = teacher.predict(IMAGES)
    assert out.kind == Kind.SCALE_DEPTH and (out.values > 0).all()
    moved = teacher.predict(IMAGES.flip(-1)).values.flip(-1)
    assert (moved - out.values).abs().max() > 1e-3, "positions matter"


def test_depth_anything_3_metric(tmp_path):
    weights, options = tiny.da3(tmp_path, name="da3metric-large")
    plain = depth_anything_3.Teacher.load(weights, **options)
    assert plain.card.kind == Kind.METRIC_DEPTH and "focal" in plain.card.note
    images = torch.rand(1, 3, 112, 112)
    focal = depth_anything_3.Teacher.load(weights, native_size=56, focal=600.0)
    torch.testing.assert_close(focal.predict(images).values, plain.predict(images).values)  # 600 px at 112 is 300 at 56
    (tmp_path / "mono").mkdir()
    mono, _ = tiny.da3(tmp_path / "mono")
    with pytest.raises(ValueError, match="focal is for the metric checkpoint"):
        depth_anything_3.Teacher.load(mono, focal=500.0)


def test_depth_anything_3_refuses_what_it_cannot_read(copy):
    folder = copy("depth_anything_3")
    table = json.loads((folder / "config.json").read_text())
    table["config"]["net"]["qknorm_start"] = 2
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(teachers.WeightsMismatchError, match="do not fit"):
        depth_anything_3.Teacher.load(str(folder))
    safetensors.torch.save_file({"model.da3.a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(teachers.WeightsMismatchError, match="nested"):
        depth_anything_3.Teacher.load(str(folder))


@pytest.mark.parametrize(
    ("height", "width", "shapes"),
    [
        (480, 640, ((378, 504), (378, 504))),
        (1500, 2250, ((336, 504), (336, 504))),
        (504, 301, ((504, 301), (504, 308))),  # 301 is 21.5 patches: ties go up
        (2, 3000, ((1, 504), (14, 504))),
    ],
)
def test_depth_anything_3_rule(height, width, shapes):
    assert depth_anything_3.native_shapes(height, width, 504) == shapes


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(480, 640, (512, 672)), (375, 1242, (512, 1696)), (1500, 2250, (512, 768))]
)
def test_midas_rule(height, width, shape):
    assert midas.native_shape(height, width, 512) == shape


def test_midas_refuses_other_backbones(made):
    with pytest.raises(teachers.WeightsMismatchError, match="dpt on beit"):
        midas.Teacher.load(made("depth_anything_v2")[0])


class TestMarigold:
    def test_noise_belongs_to_the_key(self, made):
        teacher = load(made, "marigold")
        a = teacher.predict(IMAGES[[0, 0]], keys=["a", "b"]).values
        b = teacher.predict(IMAGES[[0, 0]], keys=["b", "a"]).values
        torch.testing.assert_close(a, b.flip(0), atol=2e-5, rtol=2e-5)
        assert (a[0] - a[1]).abs().max() > 1e-3
        plain = teacher.predict(IMAGES[[0, 0]]).values
        torch.testing.assert_close(plain[0], plain[1], atol=2e-5, rtol=2e-5)  # one seed for every image
        other = load(made, "marigold", seed=1).predict(IMAGES[[0]], keys=["a"]).values
        assert (a[0] - other[0]).abs().max() > 1e-3

    def test_given_noise(self, made):
        teacher = load(made, "marigold", resize="none", ensemble=2, steps=1)
        noise = torch.randn(4, 4, 10, 14)  # 37 x 53 padded to 40 x 56, four pixels to a latent
        out = teacher.predict(IMAGES, noise=noise).values
        swapped = teacher.predict(IMAGES.flip(0), noise=noise[[2, 3, 0, 1]]).values
        assert torch.equal(out, swapped.flip(0)), "an image's members lie next to one another, and see it alone"
        with pytest.raises(ValueError, match=r"noise must be .* \(4, 4, 10, 14\)"):
            teacher.predict(IMAGES, noise=noise[:2])
        with pytest.raises(ValueError, match="1 keys for 2 images"):
            teacher.predict(IMAGES, keys=["a"])

    def test_ensemble_is_independent_of_the_batch(self, made):
        teacher = load(made, "marigold", ensemble=3, steps=1)
        both = teacher.predict(IMAGES, keys=KEYS).values
        for i, key in enumerate(KEYS):
            torch.testing.assert_close(teacher.predict(IMAGES[[i]], keys=[key]).values[0], both[i], atol=1e-3, rtol=0)
        assert both.min() >= 0 and both.max() <= 1

    def test_steps(self, made):
        assert load(made, "marigold").steps == 2
        one, four = (load(made, "marigold", steps=n).predict(IMAGES).values for n in (1, 4))
        assert (one - four).abs().max() > 1e-3
        for bad in ({"steps": 0}, {"ensemble": 0}):
            with pytest.raises(ValueError, match="at least 1"):
                load(made, "marigold", **bad)

    def test_consistency_scheduler(self, made, copy):
        import diffusers

        folder = copy("marigold")
        config = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config
        diffusers.LCMScheduler.from_config(config, timestep_spacing="leading").save_pretrained(folder / "scheduler")
        teacher = marigold.Teacher.load(str(folder), steps=3)
        out = teacher.predict(IMAGES, keys=KEYS)
        again = teacher.predict(IMAGES.flip(0), keys=KEYS[::-1]).values.flip(0)
        torch.testing.assert_close(again, out.values, atol=2e-5, rtol=2e-5)  # noise between steps is the image's own
        two = marigold.Teacher.load(str(folder), steps=2, ensemble=2, resize="none")
        noise = torch.randn(2, 4, 10, 14)
        one, other = (two.predict(IMAGES[:1], noise=noise, keys=[key]).values for key in KEYS)
        assert (one - other).abs().max() > 1e-3, "given noise is the first noise only"
        with pytest.raises(ValueError, match="steps must be 1 to 4"):
            marigold.Teacher.load(str(folder), steps=5)

    def test_refuses_another_scheduler_or_family(self, copy, made):
        folder = copy("marigold")
        table = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(table | {"_class_name": "PNDM"}))
        with pytest.raises(teachers.WeightsMismatchError, match="not PNDM"):
            marigold.Teacher.load(str(folder))
        with pytest.raises(teachers.WeightsMismatchError, match="takes 8 channels, FiffDepth takes 4"):
            fiffdepth.Teacher.load(made("marigold")[0])

    def test_long_side_rule(self):
        """The authors' floats: 1226 wide at 768 gives 767, and the values are rounded to 8 bits again."""
        from distill.teachers._latent import resize_long_side

        sized = resize_long_side(torch.rand(1, 3, 370, 1226), 768)
        assert sized.shape[-2:] == (231, 767)
        torch.testing.assert_close(sized * 255, (sized * 255).round())


class TestOldLayouts:
    """Published files differ from what today's libraries write; the maps must not."""

    def rewrite(self, file, change):
        state = {new: value for key, value in safetensors.torch.load_file(file).items() for new in [change(key)]}
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})
        return state

    def test_text_encoder_prefix_and_position_ids(self, copy, made):
        expected = load(made, "fiffdepth").predict(IMAGES).values
        folder = copy("fiffdepth")
        file = folder / "text_encoder" / "model.safetensors"
        for prefix in ("text_model.", ""):
            state = self.rewrite(file, lambda key, p=prefix: p + key.removeprefix("text_model."))
            state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
            safetensors.torch.save_file(state, file)
            assert torch.equal(fiffdepth.Teacher.load(str(folder)).predict(IMAGES).values, expected)
            self.rewrite(file, lambda key: key)

    def test_vae_attention_names(self, copy, made):
        expected = load(made, "fiffdepth").predict(IMAGES).values
        folder = copy("fiffdepth")
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

        def rename(key):
            for new, name in old.items():
                key = key.replace(new, name)
            return key

        state = self.rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", rename)
        assert any(".query." in key for key in state)
        assert torch.equal(fiffdepth.Teacher.load(str(folder)).predict(IMAGES).values, expected)


class TestGenPercept:
    def test_mode_is_the_kind(self, made, tmp_path):
        maps = {mode: load(made, "genpercept", mode=mode).predict(IMAGES) for mode in ("depth", "disparity")}
        assert maps["depth"].kind == Kind.AFFINE_DEPTH and maps["disparity"].kind == Kind.AFFINE_DISPARITY
        assert torch.equal(maps["depth"].values, maps["disparity"].values)
        shutil.copytree(made("genpercept")[0], tmp_path / "genpercept-disparity")
        assert genpercept.Teacher.load(str(tmp_path / "genpercept-disparity")).card.kind == Kind.AFFINE_DISPARITY
        with pytest.raises(ValueError, match='mode must be "depth" or "disparity"'):
            load(made, "genpercept", mode="normal")

    def test_sign(self, made, tmp_path):
        """GenPercept's latent is minus the UNet's output, FiffDepth's is plus it, at t = 0."""
        folder = Path(made("genpercept")[0])
        same = fiffdepth.Teacher.load(str(folder), native_size=48)
        other = genpercept.Teacher.load(str(folder), native_size=48, timestep=0)
        for part in (same.parts.vae.decoder.conv_out, other.parts.vae.decoder.conv_out):
            part.bias.data.zero_()
        assert (same.predict(IMAGES).values - other.predict(IMAGES).values).abs().max() > 1e-3

    @pytest.mark.parametrize("own_config", [True, False])
    def test_lone_unet(self, made, tmp_path, own_config):
        whole = made("genpercept")[0]
        lone = tmp_path / "unet_disparity_v2"
        shutil.copytree(Path(whole) / "unet", lone)
        if not own_config:
            (lone / "config.json").unlink()
        teacher = genpercept.Teacher.load(str(lone), base=whole, native_size=48)
        assert teacher.card.kind == Kind.AFFINE_DISPARITY
        assert torch.equal(teacher.predict(IMAGES).values, load(made, "genpercept").predict(IMAGES).values)
        with pytest.raises(OSError, match="stable-diffusion-2-1"):
            genpercept.Teacher.load(str(lone))

    def test_head(self, made, tmp_path):
        teacher = genpercept.Teacher.load(made("genpercept_head")[0], native_size=48)
        out = teacher.predict(IMAGES)
        assert out.values.shape == (2, *SIZE) and teacher.head is not None
        one = teacher.predict(IMAGES[1:])
        torch.testing.assert_close(one.values, out.values[1:], atol=2e-5, rtol=2e-5)  # min and max are per image
        lone = tmp_path / "unet_disparity_dpt_head_v2"
        shutil.copytree(Path(made("genpercept_head")[0]) / "unet", lone)
        with pytest.raises(OSError, match="give head="):
            genpercept.Teacher.load(str(lone), base=made("genpercept_head")[0])
        head = Path(made("genpercept_head")[0]) / "dpt_head_identity"
        again = genpercept.Teacher.load(str(lone), base=made("genpercept_head")[0], head=str(head), native_size=48)
        assert torch.equal(again.predict(IMAGES).values, out.values)

    def test_headless_unet(self, copy):
        """Released UNets for the head may lack the last convolution, which it does not use."""
        folder = copy("genpercept_head")
        expected = genpercept.Teacher.load(str(folder), native_size=48).predict(IMAGES).values
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = safetensors.torch.load_file(file)
        kept = {key: value for key, value in state.items() if not key.startswith(("conv_out", "conv_norm_out"))}
        assert len(kept) == len(state) - 4
        safetensors.torch.save_file(kept, file)
        assert torch.equal(genpercept.Teacher.load(str(folder), native_size=48).predict(IMAGES).values, expected)


class TestCheckpoint:
    def test_is_the_student(self, made):
        teacher = load(made, "checkpoint", resize="none")
        student = checkpoints.load(made("checkpoint")[0])
        with torch.no_grad():
            torch.testing.assert_close(teacher.predict(IMAGES).values, student(IMAGES))
            sized = crops.resize(IMAGES, 48, 64)  # short side 37 to 48, 53 to 68.8: nearest multiple of 16
            expected = crops.resize(student(sized)[:, None], *SIZE)[:, 0]
        torch.testing.assert_close(load(made, "checkpoint").predict(IMAGES).values, expected)
        assert teacher.card.licence == "Apache-2.0" and teacher.card.commercial and teacher.card.multiple == 16

    def test_missing(self, tmp_path):
        with pytest.raises(OSError, match="no such folder"):
            checkpoint.Teacher.load(str(tmp_path / "nothing"))


class TestStored:
    def test_marigold_names_and_settings(self, tmp_path):
        (tmp_path / "a").mkdir()
        values = np.random.default_rng(0).random((1, *SIZE)).astype(np.float32)
        values[0, 0, 0] = np.nan
        np.save(tmp_path / "a" / "pred_0001.npy", values)
        (tmp_path / "settings.json").write_text(json.dumps({"kind": "metric_depth", "model": "m", "settings": {}}))
        teacher = stored.Teacher.load(str(tmp_path))
        out = teacher.predict(IMAGES[:1], keys=["a/rgb_0001.png"])
        assert out.kind == Kind.METRIC_DEPTH and not out.valid[0, 0, 0] and out.valid.sum() == values.size - 1
        np.testing.assert_array_equal(out.values[0].numpy(), values[0])
        with pytest.raises(ValueError, match="metric_depth, not scale_depth"):
            stored.Teacher.load(str(tmp_path), kind="scale_depth")

    def test_errors(self, made, tmp_path):
        teacher = load(made, "stored")
        with pytest.raises(LookupError, match="no stored map for c.png: looked for .*c.npy"):
            teacher.predict(IMAGES[:1], keys=["c.png"])
        with pytest.raises(LookupError, match="must be a path inside"):
            teacher.predict(IMAGES[:1], keys=["../scene/a.png"])
        with pytest.raises(ValueError, match=r"is \(37, 53\), the image \(40, 53\)"):
            teacher.predict(torch.rand(1, 3, 40, 53), keys=KEYS[:1])
        with pytest.raises(ValueError, match="give keys="):
            teacher.predict(IMAGES)
        with pytest.raises(ValueError, match="give kind"):
            stored.Teacher.load(made("stored")[0])
        with pytest.raises(OSError, match="no such folder"):
            stored.Teacher.load(str(tmp_path / "nothing"))
        (tmp_path / "a.npy").write_bytes(b"no map")
        with pytest.raises(ValueError, match="a.npy is not a readable"):
            stored.Teacher.load(str(tmp_path), kind="scale_depth").predict(IMAGES[:1], keys=["a.png"])

    def test_label_shards(self, tmp_path):
        from tests.shards.test_shards import PATCH, SIZE, make_sample, write

        sample = make_sample("sa_1", 1)
        folder = write(tmp_path / "labels", [make_sample("sa_1"), sample])
        with pytest.raises(ValueError, match="labels by one, two: give teacher"):
            stored.Teacher.load(str(folder))
        teacher = stored.Teacher.load(str(folder), teacher="two")
        shared = teacher.predict(torch.rand(2, 3, SIZE, SIZE), keys=["sa_1-1", "sa_1-1.shared"])
        expected = sample.labels["two"].shared
        assert shared.kind == expected.kind and torch.equal(shared.valid[0], expected.valid[0])
        assert torch.equal(shared.values[0], shared.values[1])
        assert (shared.values[0] - expected.values[0])[expected.valid[0]].abs().max() < 1e-3
        local = teacher.predict(torch.rand(1, 3, PATCH, PATCH), keys=["sa_1-1.local2"])
        truth = sample.labels["two"].local
        assert (local.values - truth.values[2:3])[local.valid].abs().max() < 1e-3
        for key in ("sa_1-1.local3", "sa_9-0", "sa_1-1.left"):
            with pytest.raises(LookupError, match="has no"):
                teacher.predict(torch.rand(1, 3, PATCH, PATCH), keys=[key])
