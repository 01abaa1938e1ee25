"""Boundary sharpness and point order, against the published functions and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks import prediction_path
from eval.boundary import boundary_f1, boundary_recall, thin
from eval.da2k import read_annotations, score_order


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


# --- point order ------------------------------------------------------------------------------------------------------


def put(tmp_path, arrays: dict[str, np.ndarray]):
    for image, values in arrays.items():
        path = tmp_path / prediction_path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
    return tmp_path


@pytest.mark.parametrize("quantity", ["disparity", "depth"])
def test_da2k_accuracy(golden, tmp_path, quantity):
    from tests.conftest import golden_folder

    case, data = golden("da2k")
    prefix = f"{quantity}."
    store = put(tmp_path, {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)})
    got = score_order(store, f"affine_{quantity}", golden_folder("da2k"))
    assert got.accuracy == pytest.approx(case["accuracy_all_pairs"]) and got.problems == ()
    assert got.by_scene == pytest.approx(case["accuracy_by_scene"])
    assert got.scene_mean == pytest.approx(case["mean_of_scene_accuracies"])
    assert sum(pairs for _, pairs in got.images.values()) == case["pairs"]


def test_order_is_strict_and_failures_take_the_accuracy_away(tmp_path):
    pair = {"point1": [0, 1], "point2": [1, 0], "closer_point": "point1"}
    turned = {**pair, "closer_point": "point2"}
    (tmp_path / "annotations.json").write_text(json.dumps({"images/indoor/a.jpg": [pair, pair], "b.jpg": [turned]}))
    values = np.array([[0.0, 2.0], [1.0, 1.0]])
    put(tmp_path, {"images/indoor/a.jpg": values, "b.jpg": values})
    got = score_order(tmp_path, "scale_disparity", tmp_path)
    assert got.accuracy == pytest.approx(2 / 3) and got.by_scene == {"indoor": 1.0, "": 0.0} and got.scene_mean == 0.5
    assert score_order(tmp_path, "scale_depth", tmp_path).accuracy == pytest.approx(1 / 3)
    put(tmp_path, {"b.jpg": np.ones((2, 2))})
    assert score_order(tmp_path, "scale_depth", tmp_path).images["b.jpg"] == (0, 1), "a tie is wrong"
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpg")
    got = score_order(tmp_path, "scale_disparity", tmp_path)
    assert got.accuracy is None and "b.jpg: has the shape (2, 2), the truth (9, 9)" in got.problems[0]
    assert score_order(tmp_path, "scale_disparity", tmp_path, allow_failed=True).accuracy == 1.0
    (tmp_path / "b.jpg").unlink()
    put(tmp_path, {"b.jpg": np.ones((1, 2))})
    assert score_order(tmp_path, "scale_disparity", tmp_path).images["b.jpg"] is None


def test_annotations_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds annotations\.json"):
        read_annotations(tmp_path)
    (tmp_path / "annotations.json").write_text('{"a.jpg": [{"point1": [0, 0], "point2": [1, 1], "closer_point": "x"}]}')
    with pytest.raises(ValueError, match=r"annotations\.json: not DA-2K's .*'x', neither"):
        read_annotations(tmp_path)
