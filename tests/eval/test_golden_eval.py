"""The published evaluation, end to end: the program's own output on tiny data sets, from the files it read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.app.cli import main
from distill.eval.fit import MARIGOLD_FLOOR
from distill.eval.score import Score, read_scores, score_predictions
from tests.conftest import golden_folder
from tests.eval.test_metrics import PUBLISHED

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
    from distill.core.plugins import find

    case, _ = golden(f"eval_{name}")
    root, list_file = root_and_list(golden_folder(f"eval_{name}"))
    samples = find("distill.eval.benchmarks", name).samples(root, list_file)
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
    from distill.eval.benchmarks import nyu

    golden("eval_nyu")
    folder = golden_folder("eval_nyu")
    root, list_file = root_and_list(folder)
    assert [s.key for s in nyu.samples(folder / "data", list_file)] == [s.key for s in nyu.samples(root, list_file)]
    with pytest.raises(ValueError, match="found 2 images of nyu.*not the 654.*--list"):
        nyu.samples(root)


# --- what strangers hand in, through the command line -----------------------------------------------------------------


def nyu_store(golden, tmp_path: Path) -> tuple[Path, list[str]]:
    """The golden depth predictions of NYU, and the arguments that score them."""
    case, _ = golden("eval_nyu")
    folder = golden_folder("eval_nyu")
    root, list_file = root_and_list(folder)
    store = stored(folder, case["runs"]["depth"], tmp_path / "predictions")
    arguments = f"score --predictions {store} --kind affine_depth --benchmark nyu --root {root} --list {list_file}"
    return store, [*arguments.split(), "--protocol", "marigold", "--out", str(tmp_path / "s.json")]


STRANGE = {
    "missing": (1, r"missing: no .*pred_0009\.npy"),
    "size": (1, r"the map is \(240, 320\), but the truth is \(480, 640\): resize"),
    "nan": (1, r"NaN or infinity in \d+ of the \d+ scored pixels"),
    "all invalid": (1, r"NaN or infinity in (\d+) of the \1 scored pixels"),
    "text": (1, "not a readable .npy"),
    "constant": (0, "constant prediction"),
    "negative": (0, "fitted scale is negative"),
    "uint8": (0, "stored as uint8"),
    "uint16": (0, "stored as uint16"),
    "float16": (0, "stored as float16"),
    "extra": (0, "1 .npy file belongs to no image of the list"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strangers_predictions_each_get_a_line(golden, tmp_path, capsys, what):
    store, arguments = nyu_store(golden, tmp_path)
    path = next(store.rglob("pred_0009.npy"))
    pred = np.load(path)
    if what == "missing":
        path.unlink()
    elif what == "extra":
        np.save(path.with_name("pred_9999.npy"), pred)
    elif what == "text":
        path.write_text("depth")
    else:
        changed = {
            "size": pred[::2, ::2],
            "nan": np.where(np.arange(640) < 300, np.nan, pred),
            "all invalid": np.full_like(pred, np.nan),
            "constant": np.full_like(pred, 0.5),
            "negative": -pred,
            "uint8": (pred * 255).astype(np.uint8),
            "uint16": (pred * 65535).astype(np.uint16),
            "float16": pred.astype(np.float16),
        }
        np.save(path, changed[what])
    code, said = STRANGE[what]
    assert main(arguments) == code
    got = read_scores(tmp_path / "s.json")
    assert len(got.problems()) == 1 and re.search(said, got.problems()[0]), got.problems()
    assert (got.num_failed, got.metrics["abs_rel"] is None) == (code, bool(code))
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(said.replace(" ", r"\s+"), err) and "Traceback" not in err
    assert main([*arguments, "--allow-failed"]) == 0
    assert read_scores(tmp_path / "s.json").metrics["abs_rel"] > 0 and read_scores(tmp_path / "s.json").partial == bool(
        code
    )


def test_means_over_images_and_over_pixels_are_both_there_and_named(golden, tmp_path):
    _, arguments = nyu_store(golden, tmp_path)
    assert main(arguments) == 0
    got = read_scores(tmp_path / "s.json")
    assert got.protocol.pooling == "mean over images" and got.pooled.keys() == got.metrics.keys()
    assert got.pooled["silog"] != got.metrics["silog"]
    assert got.metrics["abs_rel"] == pytest.approx(np.mean([image.metrics["abs_rel"] for image in got.images]))


def test_the_median_alignment_is_in_the_protocols_id(golden, tmp_path):
    _, arguments = nyu_store(golden, tmp_path)
    main(arguments)
    usual = read_scores(tmp_path / "s.json")
    main([*arguments, "--alignment", "median"])
    median = read_scores(tmp_path / "s.json")
    assert median.protocol.alignment == "scale by medians in depth" and median.protocol.id != usual.protocol.id
    assert median.metrics["abs_rel"] > usual.metrics["abs_rel"] and all(image.shift == 0 for image in median.images)
