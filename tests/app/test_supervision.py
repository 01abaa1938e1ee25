"""Two recipes end to end on tiny data: truth and pseudo-labels in one run, and a student that predicts metres."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import build
from distill.app.commands import run_label, run_score, run_train
from distill.app.inputs import input_shards
from distill.app.recipe import load, parse
from distill.app.strict import RecipeError
from distill.core.depth import Kind
from distill.inference.predict import load as load_estimator
from distill.shards.shards import LabelDataset, read_manifest, write_manifest
from distill.students import checkpoint
from distill.training.trainlog import read
from tests.labelling.formula import make_tar

ROOT = Path(__file__).parents[2]
STUDENT = {
    "encoder": "test_vit",
    "encoder_options": {"timm_options": {"depth": 3, "embed_dim": 32}, "blocks": [0, 2], "pos_grid": 4},
    "decoder": "sdt",
    "decoder_options": {"fusion_channels": 16},
}
QUICK = {"workers": 0, "trackers": [], "eval_every": 6, "save_every": 0, "warmup_steps": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_pairs(folder: Path, count: int = 4) -> Path:
    """A table of photographs with metric depth: a wall that leans, its colour its depth."""
    rows = ["name\trgb\tdepth\tscale_to_metres\tinvalid"]
    for i in range(count):
        depth = np.linspace(1000 + 300 * i, 4000, 48, dtype=np.uint16)[None].repeat(40, 0)
        Image.fromarray((depth // 16).astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
        Image.fromarray(depth).save(folder / f"{i}_depth.png")
        rows.append(f"pair{i}\t{i}.png\t{i}_depth.png\t0.001\t0")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def small(name: str, tmp_path: Path, **tables) -> object:
    """A shipped recipe at a size for tests: its own words, with fewer and smaller pictures and another network."""
    table = json.loads(json.dumps(build.as_table(load(ROOT / "recipes" / f"{name}.toml"))))
    table["run"] |= {"out": str(tmp_path / "run"), "device": "cpu"}
    table["student"] |= STUDENT | {"weights": "", "encoder_init_from": ""}
    table["train"] |= QUICK | {"precision": "fp32", "freeze_encoder": False, "encoder_lr": 1e-3}
    for key, more in tables.items():
        table[key] = more if isinstance(more, list) else table[key] | more
    return parse(table)


def mixed(tmp_path: Path, **tables):
    make_tar(tmp_path / "sa_0.tar", count=8)
    where = [{"tars": str(tmp_path / "sa_0.tar")}, {"pairs": str(write_pairs(tmp_path)), "names": ""}]
    images = build.as_table(load(ROOT / "recipes" / "mixed_supervision.toml"))["images"]
    images = [one | new for one, new in zip(images, [*where, {"scenes": 4, "size": 40}], strict=True)]
    teachers = [{"name": "analytic", "alias": "dav2"}, {"name": "truth"}]
    tables = {
        "crops": {"size": 28, "min_side": 28, "patch_size": 20},
        "train": QUICK | {"steps": 18, "lr": 5e-3, "val_fraction": 0.2},
    } | tables
    return small("mixed_supervision", tmp_path, images=images, teachers=teachers, **tables)


def test_truth_and_pseudo_labels_teach_one_student(tmp_path):
    recipe = mixed(tmp_path)
    run_label(recipe)
    manifest = read_manifest(build.labels_folder(recipe))
    assert not manifest["quarantine"] and manifest["samples"] == 16
    assert [(tar["image_source"], tar["teachers"]) for tar in manifest["shards"]] == [
        (0, ["dav2"]),
        (1, ["truth"]),
        (2, ["truth"]),
    ]
    result = run_train(recipe)
    lines = [line for line in read(result.log) if "teacher" in line]
    assert "dav2+truth" in {line["teacher"] for line in lines} and len(lines) == 18
    both = [line for line in lines if "teachers" in line]
    assert {name for line in both for name in line["teachers"]} == {"dav2", "truth"}
    seen = sum(line["teachers"]["truth"]["images"] for line in both) / sum(4 for _ in both)
    # (8, 4, 4/2) to the power of 1/2 is 2.83, 2, 1.41: truth has 55 % of the places.
    assert 0.35 < seen < 0.75
    held = [line["heldout"] for line in read(result.log) if "heldout" in line]
    assert min(held[1:]) < held[0] and checkpoint.load(result.folder).kind is Kind.AFFINE_DISPARITY


def test_weights_do_not_move_labels_and_old_folders_are_told_of(tmp_path):
    recipe, other = mixed(tmp_path), mixed(tmp_path, train=QUICK | {"steps": 20, "source_temperature": 1.0})
    assert build.labels_folder(recipe) == build.labels_folder(other)
    run_label(recipe)
    folder = build.labels_folder(recipe)
    manifest = json.loads((folder / "manifest.json").read_text())
    for tar in manifest["shards"]:
        del tar["image_source"]
    write_manifest(folder, manifest)
    with pytest.raises(RecipeError, match=r"does not say which \[\[images\]\] table each label is from.*distill label"):
        build.training_labels(recipe)
    run_label(recipe)
    assert LabelDataset(folder).sources == [0] * 8 + [1] * 4 + [2] * 4


def test_a_source_that_cannot_have_truth_is_spared_it(tmp_path):
    make_tar(tmp_path / "sa_0.tar", count=2)
    base = {"run": {"name": "x"}, "images": [{"tars": str(tmp_path / "sa_0.tar")}, {"scenes": 1, "size": 40}]}
    teachers = [{"name": "analytic"}, {"name": "truth"}]
    shards = input_shards(parse(base | {"teachers": teachers}))
    assert [(shard.source, shard.teachers) for shard in shards] == [(0, ("analytic",)), (1, ())]
    assert [shard.teachers for shard in input_shards(parse(base | {"teachers": teachers[1:]}))] == [(), ()]


def metric(tmp_path: Path, **tables):
    images = [{"scenes": 10, "size": 64}]
    tables = {"crops": {"size": 48, "min_side": 60}, "train": QUICK | {"steps": 30, "lr": 5e-3}} | tables
    benchmarks = [{"name": "scenes", "limit": 2}]
    return small(
        "metric_student", tmp_path, images=images, benchmarks=benchmarks, score={"plane_prior": False}, **tables
    )


def absolute_error(recipe, student) -> float:
    """AbsRel of a student on the recipe's benchmark, as it is: no alignment."""
    found = []
    for sample in build.benchmark(recipe.benchmarks[0])[1]:
        truth = sample.truth()
        depth, valid = truth.values[0], truth.valid[0] & (truth.values[0] < 80)
        pred = student(sample.image()[None].float() / 255)[0].detach()
        found.append(float(((pred - depth).abs() / depth)[valid].mean()))
    return sum(found) / len(found)


def test_a_metric_student_learns_metres_and_is_scored_without_alignment(tmp_path, uncounted):
    recipe = metric(tmp_path)
    run_label(recipe)
    dataset = build.training_labels(recipe)
    labels = dataset[0].labels["truth"]
    assert labels.shared.kind is Kind.METRIC_DEPTH and labels.supervision.metric and labels.supervision.truth
    result = run_train(recipe)
    held = [line["heldout"] for line in read(result.log) if "heldout" in line]
    assert min(held) < 0.8 * held[0] and all(
        line["parts"].keys() == {"silog"} for line in read(result.log) if "parts" in line
    )
    student = checkpoint.load(result.folder)
    assert (student.kind, student.max_depth, student.spec["max_depth"]) == (Kind.METRIC_DEPTH, 80.0, 80.0)
    described = checkpoint.describe(result.folder)
    assert described["output"] == {"kind": "metric_depth", "larger_is": "farther"}
    assert "depth in metres, larger is farther" in (result.folder / "README.md").read_text()
    [score] = run_score(recipe)
    assert score.protocol.alignment == "none" and score.kind is Kind.METRIC_DEPTH
    assert score.metrics["abs_rel"] < 0.8 * absolute_error(recipe, build.make_student(recipe).eval())
    estimator = load_estimator(result.folder, device="cpu")
    depth = estimator.predict(torch.rand(1, 3, 50, 70))
    assert depth.kind is Kind.METRIC_DEPTH and 0 < depth.values.min() and depth.values.max() < 80


def test_truth_beyond_the_reach_of_a_student_is_left_out(tmp_path):
    recipe = metric(tmp_path, student={"max_depth": 3.0})
    run_label(recipe)
    objective = build.make_objective(recipe, build.make_student(recipe))
    sample = build.training_labels(recipe)[0]
    labels = sample.labels["truth"]
    assert labels.shared.values.max() > 3.0
    within = torch.where(labels.shared.values <= 3.0, labels.shared.values, 2.9)
    assert objective(within, labels)[0].item() < 1e-3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"kind": "metric_depth"}}, 'train.kind = "metric_depth" needs student.max_depth'),
        ({"student": {"max_depth": 10.0}}, "student.max_depth = 10.0 makes a metric student"),
        ({"train": {"kind": "scale_depth"}}, "a student predicts affine_disparity, or metric_depth"),
        ({"loss": {"silog": 1.0}}, "loss.silog compares metres"),
        ({"loss": {"truth": {"log_l1": 1.0}}}, "loss.log_l1 compares metres"),
        ({"images": [{"scenes": 1, "teachers": ["dav"]}]}, r"images\[0\].teachers: no teacher dav; did you mean dav2"),
        (
            {"teachers": [], "images": [{"scenes": 1, "teachers": ["dav2"]}]},
            r"images\[0\].teachers: no teacher dav2; the recipe has no \[\[teachers\]\]$",
        ),
        ({"crops": {"redraw": True}}, "crops.redraw needs labels.online = true"),
        ({"images": [{"scenes": 1, "weight": -1.0}]}, "weight must be finite and at least 0, not -1.0"),
    ],
)
def test_what_contradicts_itself_is_told_before_anything_begins(table, message):
    teachers = [{"name": "depth_anything_v2", "alias": "dav2"}]
    with pytest.raises(RecipeError, match=message):
        parse({"run": {"name": "x"}, "teachers": teachers} | table)


def test_a_metric_student_can_begin_as_one_of_affine_disparity(tmp_path):
    student = build.make_student(parse({"run": {"name": "x"}, "student": STUDENT}))
    folder = checkpoint.save(student, tmp_path / "relative")
    table = {"run": {"name": "x"}, "train": {"kind": "metric_depth"}, "student": {"init_from": str(folder)}}
    with pytest.raises(RecipeError, match="the student predicts affine_disparity: set student.max_depth"):
        build.make_student(parse(table))
    other = {**table, "student": table["student"] | {"weights": str(tmp_path / "vit.pth")}}
    (tmp_path / "vit.pth").touch()
    with pytest.raises(RecipeError, match="student.init_from: .* holds its own encoder, and student.weights names"):
        build.make_student(parse(other))
    table["student"]["max_depth"] = 20.0
    begun, images = build.make_student(parse(table)), torch.rand(1, 3, 32, 40)
    begun.eval(), student.eval()
    torch.testing.assert_close(begun(images), 20 * torch.sigmoid(student(images)))
