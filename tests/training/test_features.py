"""A decoder trained on stored features is the decoder trained beside its frozen encoder, and never runs the encoder."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from distill import students
from distill.app import build, commands, features
from distill.app.recipe import load
from distill.shards.features import DONE, FeatureStore, write_features
from distill.shards.handles import OpenTars
from distill.training.settings import TrainSettings
from distill.training.trainlog import read

RECIPE = """
[run]
name = "cached"
out = "{out}"
[[images]]
scenes = 5
size = 48
[crops]
size = 32
min_side = 40
patches = "none"
[[teachers]]
name = "truth"
options = {{ blur = 1.0, own_range = true }}
[labels]
root = "{root}"
[student]
encoder = "vit_tiny_patch16_224"
encoder_options = {{ timm_options = {{ depth = 2 }} }}
decoder = "dpt"
norm = "group"
[student.decoder_options]
channels = 8
post_process_channels = [8, 8, 8, 8]
[loss]
feature = 0.0
local_global = 0.0
[train]
steps = 4
batch_size = 2
lr = 1e-3
warmup_steps = 1
freeze_encoder = true
cache_features = {cached}
val_fraction = 0.3
workers = 0
trackers = []
"""


def trained(tmp_path, monkeypatch, *, cached: bool):
    path = tmp_path / f"{cached}.toml"
    path.write_text(RECIPE.format(out=tmp_path / str(cached), root=tmp_path / "labels", cached=str(cached).lower()))
    recipe = load(str(path), [])
    if not build.labels_folder(recipe).is_dir():
        commands.run_label(recipe)
    seen = []
    real = students.encoder.Encoder.forward
    monkeypatch.setattr(students.encoder.Encoder, "forward", lambda self, x: (seen.append(len(x)), real(self, x))[1])
    commands.run_train(recipe)
    lines = read(tmp_path / str(cached) / "train" / "log.jsonl")
    monkeypatch.setattr(students.encoder.Encoder, "forward", real)
    losses = torch.tensor([line["loss"] for line in lines if "loss" in line])
    heldout = torch.tensor([line["heldout"] for line in lines if "heldout" in line])
    return losses, heldout, sum(seen)


def test_a_decoder_learns_the_same_from_stored_features(tmp_path, monkeypatch):
    live, held, _ = trained(tmp_path, monkeypatch, cached=False)
    cached, held_cached, seen = trained(tmp_path, monkeypatch, cached=True)
    # Half of the images are mirrored. What float16 rounds off grows from step to step.
    torch.testing.assert_close(cached[:2], live[:2], rtol=2e-3, atol=0)
    torch.testing.assert_close(cached, live, rtol=2e-2, atol=0)
    torch.testing.assert_close(held_cached, held, rtol=2e-2, atol=0)
    assert seen == 10  # five regions and their mirror images, once
    [done] = (tmp_path / "labels").glob(f"features/*/{DONE}")
    store = FeatureStore(done.parent)
    key = next(iter(store.places))
    assert store.get(key)[0][0].shape == (192, 2, 2) and store.get(key)[0][0].dtype == torch.float16
    assert not torch.equal(store.get(key)[3][0], store.get(key, mirrored=True)[3][0])
    with pytest.raises(LookupError, match="has no features of nobody"):
        store.get("nobody")
    tar = next(done.parent.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(OSError, match="missing or damaged; delete its folder"):
        FeatureStore(done.parent)


def test_a_tar_that_is_missing_is_computed_again_and_what_float16_cannot_hold_is_refused(tmp_path):
    told = []

    def write(scale: float = 1.0, token_scale: float = 1.0) -> FeatureStore:
        def encode(images):
            level = (scale * images[:, :, :2, :2], token_scale * images.mean((2, 3)))
            return [level] * 4

        region = torch.full((3, 4, 4), 255, dtype=torch.uint8)
        options = {"mirrored": False, "facts": {}, "report": lambda *at: told.append(at)}
        write_features(tmp_path, ["a", "b"], lambda index: region, encode, **options)
        return FeatureStore(tmp_path)

    for scales in ((1e6, 1.0), (1.0, 1e6)):
        with pytest.raises(ValueError, match="features of a or one beside it do not fit into 16 bits"):
            write(*scales)
    assert not list(tmp_path.glob("*.tar")) and not told
    with pytest.raises(FileNotFoundError, match="has no finished features: train again, which goes on with them"):
        FeatureStore(tmp_path)
    assert sorted(write().places) == ["a", "b"] and told == [(2, 2)], "no mirror images, which nobody asked for"
    for lost in (".tar", ".json"):  # the first as a kill between a json and its tar leaves it
        (tmp_path / "features_00000").with_suffix(lost).unlink()
        assert write().get("b")[0][0].shape == (3, 2, 2)


def test_many_tars_need_few_open_files_and_damage_has_its_own_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.shards.features.PER_TAR", 1)
    monkeypatch.setattr(OpenTars, "most", 2)
    level = torch.ones(1, 2, 2, 2), torch.ones(1, 2)
    region = torch.zeros(3, 4, 4, dtype=torch.uint8)
    keys = ["a", "b", "c", "d"]
    write_features(tmp_path, keys, lambda index: region, lambda images: [level] * 4, mirrored=False, facts={})
    store = FeatureStore(tmp_path)
    assert all(store.get(key)[0][0].shape == (2, 2, 2) for key in keys + keys)
    assert len(store._open_tars._open) == 2
    (tmp_path / "features_00001.tar").write_bytes(b"x" * (tmp_path / "features_00001.tar").stat().st_size)
    with pytest.raises(OSError, match=r"features_00001.tar:b is damaged \(.*\); delete its folder: the next training"):
        FeatureStore(tmp_path).get("b")
    path = tmp_path / "features_00002.tar"
    path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93DUMMY"))
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}:c is damaged"):
        FeatureStore(tmp_path).get("c")


def test_augmentation_that_changes_what_the_encoder_sees_forbids_it():
    for given, line in (
        ({}, "it needs freeze_encoder = true"),
        ({"freeze_encoder": True, "color_jitter": 0.1}, "color_jitter = 0.0"),
        ({"freeze_encoder": True, "random_resized_crop": 0.5}, "random_resized_crop = 1.0"),
    ):
        with pytest.raises(ValueError, match=line):
            TrainSettings(cache_features=True, **given)


def test_the_encoder_is_brought_back_from_where_it_computed(tmp_path, monkeypatch):
    """In the one process that stores features a student in two places would look otherwise than in the others."""
    places = []

    class Encoder(torch.nn.Linear):
        def to(self, place):
            places.append(str(place))
            return self

        def digest(self):
            return ""

    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(out=tmp_path, root=tmp_path, cached="true"))
    monkeypatch.setattr(features, "write_features", lambda *args, **given: None)
    labels = SimpleNamespace(keys=[])
    features._compute(
        load(str(path), []), labels, SimpleNamespace(encoder=Encoder(1, 1)), tmp_path, torch.device("cuda")
    )
    assert places == ["cuda", "cpu"]


def test_features_of_what_the_encoder_sees_otherwise_lie_elsewhere(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(out=tmp_path, root=tmp_path, cached="true"))
    student = SimpleNamespace(encoder=SimpleNamespace(digest=lambda: "", options={}))
    keys = ("train.hflip=true", "train.hflip=false", "train.precision=bf16", "crops.size=64")
    recipes = [load(str(path), [key]) for key in keys]
    folders = {features.features_folder(one, SimpleNamespace(keys=["a"]), student) for one in recipes}
    assert len(folders) == len(keys)
