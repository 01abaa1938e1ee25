"""The published evaluation, end to end: the program's own output on tiny data sets, from the files it read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.fit import MARIGOLD_FLOOR
from eval.score import Score, read_scores, score_predictions
from tests.conftest import golden_folder
from tests.test_metrics import PUBLISHED

KINDS = {"depth": "affine_depth", "disparity": "affine_disparity", "metric": "metric_depth"}
# nyu is in the tree; the others run where DISTILL_GOLDEN names the larger set.
RUNS = [(name, run) for name in ("nyu", "kitti", "scannet", "diode", "eth3d") for run in KINDS]


def stored(folder: Path, expected: dict, out: Path) -> Path:
    """The predictions of a run as .npy; ETH3D's are kept at a 48th of their size."""
    source = folder / "pred_u16" / expected["pred_kind"]
    for png in source.rglob("*.png"):
        pred = np.asarray(Image.open(png)).astype(np.float32) / np.float32(65535)
        if folder.name == "eval_eth3d":
            pred = np.kron(pred, np.ones((48, 48), np.float32))
        if expected["prediction_scale"] != 1:
            pred = pred * np.float32(expected["prediction_scale"])
        path = out / png.relative_to(source).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, pred)
    return out


def root_and_list(folder: Path) -> tuple[Path, Path]:
    return next((folder / "data").glob("*/*")), next((folder / "data_split").rglob("*.txt"))


def agree(got: Score, expected: dict) -> None:
    for image, row in zip(got.images, expected["per_sample"], strict=True):
        assert not image.failed
        for published, name in PUBLISHED.items():
            assert image.metrics[name] == pytest.approx(row[published], rel=1e-5), (image.key, name)
    for published, name in PUBLISHED.items():
        assert got.metrics[name] == pytest.approx(expected["mean"][published], rel=1e-5), name


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_scores_are_the_published_programs(golden, tmp_path, name, run):
    case, _ = golden(f"eval_{name}")
    if run not in case["runs"]:
        pytest.skip("the published program was not run so")
    folder = golden_folder(f"eval_{name}")
    root, list_file = root_and_list(folder)
    expected = case["runs"][run]
    predictions = stored(folder, expected, tmp_path / "predictions")
    out = tmp_path / "score.json"
    got = score_predictions(
        predictions, kind=KINDS[run], benchmark=name, root=root, list_file=list_file, protocol="marigold", out=out
    )
    agree(got, expected)
    assert read_scores(out) == got
    if run == "disparity":
        assert got.floors[f"{MARIGOLD_FLOOR:g}"] == got.metrics
        assert got.floors["1/max truth"]["abs_rel"] <= got.metrics["abs_rel"]
    if name == "diode":
        assert [g["num_images"] for g in got.groups.values()] == [1, 1] and list(got.groups) == ["indoors", "outdoor"]


@pytest.mark.parametrize("name", ["nyu", "kitti", "scannet", "diode"])
def test_images_and_truths_are_what_the_published_loader_gives(golden, name):
    from distill.plugins import find

    case, _ = golden(f"eval_{name}")
    root, list_file = root_and_list(golden_folder(f"eval_{name}"))
    samples = find("eval.benchmarks", name).samples(root, list_file)
    for sample, expected in zip(samples, case["samples"], strict=True):
        assert (sample.key, sample.prediction_path) == (expected["rgb_relative_path"], expected["pred_name"])
        image, truth = sample.image(), sample.truth()
        assert list(image.shape) == expected["rgb_int_shape"]
        assert round(float((image * 255).double().sum())) == expected["rgb_int_sum"]
        assert list(truth.valid.shape) == expected["valid_mask_shape"]
        assert int(truth.valid.sum()) == expected["valid_count"]
        assert float(truth.values.double().sum()) == pytest.approx(expected["depth_sum"], rel=1e-9)
        flat = truth.valid.flatten().nonzero()
        assert [int(flat[0]), int(flat[-1])] == [expected["first_valid_flat"], expected["last_valid_flat"]]


def test_a_root_may_be_the_folder_that_the_archives_lie_in(golden):
    from eval.benchmarks import nyu

    golden("eval_nyu")
    folder = golden_folder("eval_nyu")
    root, list_file = root_and_list(folder)
    assert [s.key for s in nyu.samples(folder / "data", list_file)] == [s.key for s in nyu.samples(root, list_file)]
    with pytest.raises(ValueError, match="found 2 images of nyu.*not the 654.*--list"):
        nyu.samples(root)
