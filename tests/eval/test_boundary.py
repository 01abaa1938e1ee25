"""Boundary sharpness and point order: against the published functions, by hand, and through the files of benchmarks."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import commands, score_recipe
from distill.app.cli import main
from distill.app.recipe import parse
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.plugins import find
from distill.eval.benchmarks import prediction_path
from distill.eval.boundary import boundary_f1, boundary_recall, thin
from distill.eval.completeness import check_benchmark
from distill.eval.da2k import read_annotations
from distill.eval.protocol import Protocol
from distill.eval.reports.report import write_report
from distill.eval.score import Score, _group_mean, read_scores, score_predictions
from distill.eval.tasks import TASKS
from tests.conftest import golden_folder
from tests.eval.known_maps import Echo


def test_boundary_scores_are_the_published_ones(golden):
    case, data = golden("boundary")
    for item in case["items"]:
        name = item["map"]

        def array(what: str, name=name) -> torch.Tensor:
            return torch.from_numpy(data[f"{name}.{what}"])[None]

        pred, alpha = array(f"pred.{item['pred']}"), array("alpha")
        got = {
            "SI_boundary_F1": boundary_f1(pred, array("gt")),
            "SI_boundary_F1_custom_t(1.02,1.5,5)": boundary_f1(pred, array("gt"), lowest=1.02, highest=1.5, count=5),
            "SI_boundary_Recall_alpha": boundary_recall(pred, alpha),
            "SI_boundary_Recall_alpha_thr0.5": boundary_recall(pred, alpha, foreground=0.5),
            "SI_boundary_Recall_hard": boundary_recall(pred, array("mask_hard").float()),
            "SI_boundary_Recall_bool": boundary_recall(pred, alpha > 0.1),
            "SI_boundary_Recall_u8_not_divided": boundary_recall(pred, array("mask_u8")),
        }
        for key, value in got.items():
            assert float(value) == pytest.approx(item[key], abs=1e-6), (name, item["pred"], key)


def test_edges_are_thinned_as_published(golden):
    _, data = golden("boundary")
    for name in (0, 1):
        near = torch.from_numpy(1 / np.maximum(data[f"{name}.pred.blur1"], 1e-6))[None]
        across, down = near[..., 1:] / near[..., :-1], near[..., 1:, :] / near[..., :-1, :]
        assert np.array_equal(thin(across, 1.1)[0], data[f"{name}.nms_h_blur1_t1.1"])
        assert np.array_equal(thin(down.mT, 1.1).mT[0], data[f"{name}.nms_v_blur1_t1.1"])


def test_a_run_ends_with_its_row_and_the_first_of_equals_stays():
    ratio = torch.tensor([[[1.0, 2.0, 3.0, 3.0], [2.0, 1.0, 2.0, 2.5]], [[1.0] * 4, [5.0] * 4]])
    expected = [[[0, 0, 1, 0], [1, 0, 0, 1]], [[0] * 4, [1, 0, 0, 0]]]
    assert thin(ratio, 1.5).int().tolist() == expected
    assert not thin(ratio, 9.0).any()


def test_boundaries_know_no_scale_and_images_do_not_mix():
    depth = 1 + torch.rand(3, 20, 30).round() + 0.1 * torch.rand(3, 20, 30)
    other = depth + 0.3 * torch.rand(3, 20, 30)
    together = boundary_f1(other, depth)
    assert torch.allclose(together, boundary_f1(8 * other, depth)) and torch.allclose(
        boundary_f1(depth, depth), torch.ones(3)
    )
    alone = torch.cat([boundary_f1(other[i : i + 1], depth[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    masks = depth > 1.5
    recalls = torch.cat([boundary_recall(other[i : i + 1], masks[i : i + 1]) for i in range(3)])
    assert torch.equal(boundary_recall(other, masks), recalls)
    assert boundary_f1(torch.ones(1, 5, 5), depth[:1, :5, :5]).tolist() == [0.0]


def test_holes_in_a_truth_are_no_edges():
    depth = torch.full((1, 12, 12), 3.0)
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, 4:6, 4:6] = False
    holed = torch.where(valid, depth, 0.0)
    assert boundary_f1(depth, holed).item() == 0.0, "as published, the hole's rim is an edge that nobody finds"
    step = torch.where(torch.arange(12) < 6, 1.0, 2.0).expand(1, 12, 12)
    assert boundary_f1(step, torch.where(valid, step, 0.0), valid).item() == pytest.approx(0.25)
    assert torch.equal(boundary_f1(step, depth, torch.ones_like(valid)), boundary_f1(step, depth))


# --- through files ----------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def dpt(depth: np.ndarray) -> bytes:
    size = np.array([depth.shape[1], depth.shape[0]], "<i4")
    return np.float32(202021.25).tobytes() + size.tobytes() + depth.astype("<f4").tobytes()


def store(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    for image, values in arrays.items():
        path = folder / prediction_path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
    return folder


def scored(tmp_path: Path, benchmark: str, kind: str, pred: dict[str, np.ndarray], root: Path, **options) -> Score:
    return score_predictions(
        store(tmp_path / "pred", pred), kind=kind, benchmark=benchmark, root=root, out=tmp_path / "s.json", **options
    )


def step(seed: int = 0, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A wall with something in front of it."""
    rng = np.random.default_rng(seed)
    depth = 8.0 + 0.05 * rng.random(size, dtype=np.float32)
    depth[10:30, 20:40] = 3.0 + 0.02 * rng.random((20, 20), dtype=np.float32)
    return depth.astype(np.float32)


FRAME = "training/final/alley_1/frame_0001.png"


def sintel(tmp_path: Path, depth: np.ndarray, name: str = FRAME) -> Path:
    root = tmp_path / "sintel"
    write(root / name, png(np.zeros((*depth.shape, 3), np.uint8)))
    write(root / name.replace("final", "depth").replace(".png", ".dpt"), dpt(depth))
    return root


def test_published_f1_through_sintels_files(golden, tmp_path):
    case, data = golden("boundary")
    for item in case["items"]:
        name, pred = item["map"], data[f"{item['map']}.pred.{item['pred']}"]
        root = sintel(tmp_path, data[f"{name}.gt"])
        for kind, values in (
            ("metric_depth", pred),
            ("scale_depth", pred),
            ("scale_disparity", 1 / np.maximum(pred, 1e-6)),
        ):
            got = scored(tmp_path, "sintel", kind, {FRAME: values}, root)
            # 1/(1/d) is not d to the last bit, which moves a pixel that lies on a threshold.
            off = 1e-6 if kind.endswith("depth") else 0.01
            assert got.metrics["boundary_f1"] == pytest.approx(item["SI_boundary_F1"], abs=off), (item["pred"], kind)
            assert got.protocol.alignment == "none" and got.pooled == got.metrics


def test_published_recall_through_mattes(golden, tmp_path):
    case, data = golden("boundary")
    for item in case["items"]:
        name, pred = item["map"], data[f"{item['map']}.pred.{item['pred']}"]
        rgb = png(np.zeros((*pred.shape, 3), np.uint8))
        files = {
            "am2k": ("validation/original/m_1.jpg", "validation/mask/m_1.png"),
            "p3m10k": ("validation/P3M-500-NP/original_image/p_1.jpg", "validation/P3M-500-NP/mask/p_1.png"),
            "dis5k": ("DIS-TE1/im/2#A b#5#Kite#1_o.jpg", "DIS-TE1/gt/2#A b#5#Kite#1_o.png"),
        }
        for benchmark, (image, matte) in files.items():
            root = tmp_path / benchmark
            write(root / image, rgb)
            write(root / matte, png(data[f"{name}.mask_hard"].astype(np.uint8) * 255))
            got = scored(tmp_path / benchmark, benchmark, "metric_depth", {image: pred}, root)
            assert got.metrics["boundary_recall"] == pytest.approx(item["SI_boundary_Recall_hard"], abs=1e-6)
        write(root / matte, png(data[f"{name}.mask_u8"]))
        got = scored(tmp_path / benchmark, benchmark, "metric_depth", {image: pred}, root)
        alpha = torch.from_numpy(data[f"{name}.mask_u8"])[None].float() / 255
        expected = float(boundary_recall(torch.from_numpy(pred)[None], alpha))
        assert got.metrics["boundary_recall"] == pytest.approx(expected, abs=1e-6)
        assert expected == pytest.approx(item["SI_boundary_Recall_alpha"], abs=0.02), "eight bits are nearly the matte"


def test_an_unknown_shift_is_fitted_before_edges_are_compared(tmp_path):
    depth = step()
    root = sintel(tmp_path, depth)
    for kind, pred in (("affine_depth", 0.1 * depth + 4), ("affine_disparity", 0.3 / depth + 2)):
        got = scored(tmp_path, "sintel", kind, {FRAME: pred.astype(np.float32)}, root)
        assert got.metrics["boundary_f1"] > 0.99 and got.protocol.alignment.startswith("scale and shift")
        as_it_is = "scale" + kind.removeprefix("affine")
        assert scored(tmp_path, "sintel", as_it_is, {FRAME: pred.astype(np.float32)}, root).metrics["boundary_f1"] < 0.9
    depth[0, :5] = np.nan, np.inf, -1.0, 0.0, 1e9
    root = sintel(tmp_path, depth)
    pred = 0.3 / np.where(depth > 0, depth, 1.0) + 2
    pred[0, :2] = np.nan
    got = scored(tmp_path, "sintel", "affine_disparity", {FRAME: pred.astype(np.float32)}, root)
    assert got.metrics["boundary_f1"] > 0.9 and got.num_failed == 0
    with pytest.raises(ValueError, match="sintel takes no other alignment"):
        scored(tmp_path, "sintel", "affine_disparity", {FRAME: pred}, root, alignment="median")


@pytest.mark.parametrize("kind", [*Kind])
def test_a_disparity_or_a_scale_is_a_truth_of_edges_and_an_unknown_shift_is_none(kind):
    depth = torch.full((1, 12, 12), 400.0)
    depth[:, 4:8, 4:8] = 100.0

    def map_of(one: Kind) -> torch.Tensor:
        return depth if one.quantity == "depth" else 1 / depth

    truth = DepthMap(map_of(kind), torch.ones_like(depth, dtype=torch.bool), kind)
    # A range in metres is of a truth in metres.
    protocol = Protocol(benchmark="pairs", max_depth=1000.0 if kind.unknown == "metric" else 80.0).of_edges()
    for predicted in Kind:
        given = (map_of(predicted)[0].numpy(), truth, predicted, protocol.with_kind(predicted))
        if kind.unknown == "affine":
            with pytest.raises(KindError, match="gives no ratios of depths"):
                TASKS["boundary_f1"].measure(*given)
        else:
            assert float(TASKS["boundary_f1"].measure(*given).sums[1]) == 1.0, predicted


def test_a_cut_depth_file_is_a_line(tmp_path):
    root = sintel(tmp_path, step())
    path = root / FRAME.replace("final", "depth").replace(".png", ".dpt")
    path.write_bytes(path.read_bytes()[:-4])
    got = scored(tmp_path, "sintel", "metric_depth", {FRAME: step()}, root)
    assert got.num_failed == 1 and "frame_0001.dpt: not a whole .dpt" in got.problems()[0]


def test_ibims_leaves_its_masks_out(tmp_path):
    depth, valid = step(), np.ones((40, 56), bool)
    valid[:, :6] = False
    for folder, array in {
        "rgb": np.zeros((40, 56, 3), np.uint8),
        "depth": (np.where(valid, depth, 0.0) * 65535 / 50).round().astype(np.uint16),
        "mask_invalid": valid.astype(np.uint8) * 255,
        "mask_transp": np.ones((40, 56), np.uint8),
    }.items():
        write(tmp_path / f"ibims1_core_raw/{folder}/corridor_01.png", png(array))
    got = scored(tmp_path, "ibims", "metric_depth", {"rgb/corridor_01.png": depth}, tmp_path)
    assert got.metrics["boundary_f1"] == pytest.approx(1.0)
    (sample,) = find("distill.eval.benchmarks", "ibims").samples(tmp_path)
    assert float(sample.truth().values[0, 20, 30]) == pytest.approx(3.0, abs=0.03)
    assert int(sample.truth().valid.sum()) == valid.sum()


def test_springs_disparity_has_twice_the_size_and_a_sky(tmp_path, monkeypatch):
    disparity = np.kron(1000 * 0.065 / step(), np.array([[1, 2], [3, 4]], np.float32))
    disparity[:4], disparity[-2:] = 0.0, np.nan
    buffer = io.BytesIO()
    with pytest.importorskip("h5py").File(buffer, "w") as file:
        file.create_dataset("disparity", data=disparity.astype(np.float32), compression="gzip")
    rgb = "train/0001/frame_left/frame_left_0002.png"
    write(tmp_path / "spring" / rgb, png(np.zeros((40, 56, 3), np.uint8)))
    write(tmp_path / "spring/train/0001/disp1_left/disp1_left_0002.dsp5", buffer.getvalue())
    write(tmp_path / "spring/train/0001/cam_data/intrinsics.txt", b"500 500 0 0\n1000 1000 0 0\n")
    (sample,) = find("distill.eval.benchmarks", "spring").samples(tmp_path)
    truth = sample.truth()
    assert truth.values.shape == (1, 40, 56) and float(truth.values[0, 0, 0]) == pytest.approx(1e6)
    assert not truth.valid[0, -1].any() and truth.valid[0, :-1].all() and sample.group == "0001"
    assert float(truth.values[0, 20, 30]) == pytest.approx(step()[20, 30], rel=1e-5)
    pred = np.where(np.arange(40)[:, None] < 2, 100.0, step()).astype(np.float32)
    got = scored(tmp_path, "spring", "metric_depth", {rgb: pred}, tmp_path)
    assert got.metrics["boundary_f1"] == pytest.approx(1.0)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install" in scored(tmp_path, "spring", "metric_depth", {rgb: pred}, tmp_path).problems()[0]


def test_lists_of_images_may_have_spaces_and_the_archives_name(tmp_path):
    for name in ("2#A b#5#Kite#1_o", "3#C#1#X_o"):
        write(tmp_path / f"DIS5K/DIS-VD/im/{name}.jpg", png(np.zeros((8, 8, 3), np.uint8)))
        write(tmp_path / f"DIS5K/DIS-VD/gt/{name}.png", png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "list.txt").write_text("DIS5K/DIS-VD/im/2#A b#5#Kite#1_o.jpg\n")
    module = find("distill.eval.benchmarks", "dis5k")
    (sample,) = module.samples(tmp_path, tmp_path / "list.txt")
    assert sample.key == "DIS-VD/im/2#A b#5#Kite#1_o.jpg" and sample.group == "DIS-VD"
    with pytest.raises(ValueError, match=r"no images of dis5k; dis5k\.py has the expected layout"):
        module.samples(tmp_path)
    (tmp_path / "list.txt").write_text("DIS-VD/gt/x.png")
    with pytest.raises(ValueError, match="line 1 names no image"):
        module.samples(tmp_path, tmp_path / "list.txt")
    found = check_benchmark("dis5k", tmp_path)
    assert [f.level for f in found] == ["ok"] * 3 and "2 images; there is no published list" in found[1].what


# --- point order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["disparity", "depth"])
def test_da2k_accuracy(golden, tmp_path, quantity):
    case, data = golden("da2k")
    prefix = f"{quantity}."
    folder = store(tmp_path, {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)})
    out = tmp_path / "s.json"
    arguments = f"--predictions {folder} --kind affine_{quantity} --benchmark da2k --root {golden_folder('da2k')}"
    assert main(["score", *arguments.split(), "--out", str(out)]) == 0
    got = read_scores(out)
    assert got.metrics["accuracy"] == pytest.approx(case["accuracy_all_pairs"]) and got.problems() == []
    by_scene = {name: group["metrics"]["accuracy"] for name, group in got.groups.items()}
    assert by_scene == pytest.approx(case["accuracy_by_scene"])
    assert got.metrics["scene_mean"] == pytest.approx(case["mean_of_scene_accuracies"])
    assert got.pooled["accuracy"] == got.metrics["accuracy"] and got.protocol.pooling == "over all pairs of all images"
    rows = out.with_suffix(".csv").read_text().splitlines()
    assert rows[0] == "key,group,accuracy,scale,shift,failed,problem" and len(rows) == 1 + got.num_images


def test_order_is_strict_and_failures_take_the_accuracy_away(tmp_path):
    pair = {"point1": [0, 1], "point2": [1, 0], "closer_point": "point1"}
    turned = {**pair, "closer_point": "point2"}
    (tmp_path / "annotations.json").write_text(json.dumps({"images/indoor/a.jpg": [pair, pair], "b.jpg": [turned]}))
    values = np.array([[0.0, 2.0], [1.0, 1.0]], np.float32)

    def got(kind: str = "scale_disparity", b: np.ndarray = values, **options) -> Score:
        return scored(tmp_path, "da2k", kind, {"images/indoor/a.jpg": values, "b.jpg": b}, tmp_path, **options)

    first = got()
    assert first.metrics["accuracy"] == pytest.approx(2 / 3)
    assert first.groups["indoor"]["metrics"]["accuracy"] == 1.0 == first.metrics["scene_mean"]
    assert got("scale_depth").metrics["accuracy"] == pytest.approx(1 / 3)
    assert got("scale_depth", np.ones((2, 2))).images[1].metrics["accuracy"] == 0.0, "a tie is wrong"
    assert got("scale_depth", np.full((2, 2), np.nan)).images[1].metrics["accuracy"] == 0.0
    assert "lies outside of the prediction" in got(b=np.ones((1, 2))).problems()[0]
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpg")
    failed = got()
    assert set(failed.metrics.values()) == {None} and failed.num_failed == 1
    assert "b.jpg: the map is (2, 2), but the truth is (9, 9)" in failed.problems()[0]
    assert got(allow_failed=True).metrics["accuracy"] == 1.0
    (tmp_path / "list.txt").write_text("images/indoor/a.jpg\n")
    assert got(list_file=tmp_path / "list.txt").num_images == 1
    for content, message in (
        (b"images/indoor/a.jpg\nc.jpg\n", "c.jpg is not in annotations.json"),
        (b"\n", "empty"),
        (b"caf\xe9\n", r"bad\.txt: not UTF-8"),
    ):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            got(list_file=tmp_path / "bad.txt")
    assert [f.level for f in check_benchmark("da2k", tmp_path)][0] == "ok"


def test_the_mean_over_scenes_is_of_all_scenes_or_none():
    groups = {name: {"num_images": 1, "metrics": {"accuracy": value}} for name, value in (("a", 1.0), ("b", None))}
    assert _group_mean(TASKS["order"], groups) is None
    assert _group_mean(TASKS["order"], {"a": groups["a"]}) == 1.0


@pytest.mark.parametrize("name", ["da2k", "sintel", "am2k"])
def test_a_recipe_predicts_scores_and_reports_them_like_the_others(tmp_path, monkeypatch, name):
    """Through distill.app.commands, with a teacher that sees brightness as nearness."""
    rgb = png(np.repeat(((9.0 - step()) * 40).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
    if name == "da2k":
        write(tmp_path / "images/indoor/a.png", rgb)
        pair = {"point1": [20, 30], "point2": [2, 2], "closer_point": "point1"}
        write(tmp_path / "annotations.json", json.dumps({"images/indoor/a.png": [pair]}).encode())
    elif name == "sintel":
        write(tmp_path / FRAME, rgb)
        write(tmp_path / FRAME.replace("final", "depth").replace(".png", ".dpt"), dpt(step()))
    else:
        write(tmp_path / "validation/original/m.jpg", rgb)
        write(tmp_path / "validation/mask/m.png", png((step() < 5).astype(np.uint8) * 255))
    recipe = parse(
        {
            "run": {"name": "x", "out": str(tmp_path / "run")},
            "score": {"plane_prior": False},
            "benchmarks": [{"name": name, "root": str(tmp_path)}],
        }
    )

    monkeypatch.setattr(score_recipe, "Models", lambda _: lambda _: [("bright", Echo(Kind.SCALE_DISPARITY))])
    (result,) = commands.run_score(recipe)
    assert result.metrics[result.task.main] > 0.9 and result.num_failed == 0
    (again,) = commands.run_score(recipe)
    assert again.metrics == result.metrics
    html = write_report(tmp_path / "run").read_text()
    assert result.task.main in html and result.protocol.id in html
    told = {"da2k": "has point pairs and no depth", "am2k": "has a matte and no depth", "sintel": "boundary F1 1.000"}
    assert told[name] in html


def test_annotations_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds annotations\.json"):
        read_annotations(tmp_path)
    (tmp_path / "annotations.json").write_text('{"a.jpg": [{"point1": [0, 0], "point2": [1, 1], "closer_point": "x"}]}')
    with pytest.raises(ValueError, match=r"annotations\.json: not DA-2K's .*'x', neither"):
        read_annotations(tmp_path)


def test_what_a_matte_has_to_exceed_to_be_foreground():
    """A tenth itself is background; so is all of a matte of a tenth, which has no edge to find."""
    depth = torch.tensor([[[1.0, 1.0, 2.0, 2.0]]])
    matte = torch.tensor([[[0.5, 0.5, 0.1, 0.1]]])
    assert boundary_recall(depth, matte) > 0 and boundary_recall(depth, matte * 0.2) == 0
    assert boundary_recall(depth, torch.tensor([[[0.5, 0.5, 0.11, 0.11]]])) == 0


def test_a_depth_of_zero_is_nearer_than_all_and_no_division_by_it():
    depth = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    assert boundary_f1(depth, depth) == boundary_f1(depth + 0.5, depth + 0.5) > 0
