"""The objective is chosen by the supervision: its settings, its terms, and where labels meet the prediction."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import DENSE, Labels, Supervision
from distill.losses.losses import distillation_loss
from distill.losses.objective import Objective
from distill.losses.settings import LossSettings
from distill.losses.terms._log import log_difference

G = torch.Generator().manual_seed(0)
DEPTH = 1.0 + 4 * torch.rand(2, 24, 24, generator=G)
VALID = torch.rand(2, 24, 24, generator=G) > 0.2
PRED = 1.0 + 4 * torch.rand(2, 24, 24, generator=G)
OFF = dict.fromkeys(("shared", "local_global", "feature", "gradient"), 0.0)


def labels(values=DEPTH, valid=VALID, *, kind=Kind.METRIC_DEPTH, truth=True, dense=True) -> Labels:
    supervision = Supervision("t", kind, truth, dense)
    return Labels(DepthMap(values, valid, kind), None, torch.zeros(len(values), 0, 4), supervision=supervision)


@pytest.mark.parametrize("focus", [0.0, 0.5, 1.0])
def test_silog_is_the_root_of_the_variance_that_is_left(focus):
    objective = Objective(LossSettings(**OFF, silog=1.0, silog_variance_focus=focus), Kind.METRIC_DEPTH)
    g = [(p.log() - d.log())[v].double() for p, d, v in zip(PRED, DEPTH, VALID, strict=True)]
    expected = torch.stack([((one**2).mean() - focus * one.mean() ** 2).sqrt() for one in g]).float()
    torch.testing.assert_close(objective(PRED, labels())[0], expected)
    assert LossSettings(silog=1.0).options("silog") == {"variance_focus": 0.5}
    scaled = objective(3 * PRED, labels())[0]
    assert torch.allclose(scaled, expected, atol=1e-5) is (focus == 1.0)
    perfect = DEPTH.clone().requires_grad_()
    loss = objective(perfect, labels())[0]
    loss.sum().backward()
    assert (loss < 1e-5).all() and perfect.grad.isfinite().all()


def test_log_l1_is_the_relative_error_where_it_is_small():
    objective = Objective(LossSettings(**OFF, log_l1=1.0), Kind.METRIC_DEPTH)
    torch.testing.assert_close(objective(DEPTH * 1.01, labels())[0], torch.full((2,), 0.00995), rtol=1e-3, atol=0)
    g, usable = log_difference(PRED, labels(torch.where(VALID, DEPTH, -1.0), torch.ones_like(VALID)).shared)
    assert torch.equal(usable, VALID) and not g[~VALID].any()


def test_squared_is_the_square_of_what_global_normalization_leaves():
    """Where two answers take turns, its least value lies between them, that of the absolute difference at one."""
    objective = Objective(LossSettings(**OFF, squared=1.0))
    random = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 6, 7, generator=random), torch.rand(2, 6, 7, generator=random)
    valid = torch.ones_like(pred, dtype=torch.bool)
    valid[0, 0], target[0, 0] = False, torch.nan
    valid[1] = False
    shared = DepthMap(target, valid, Kind.AFFINE_DISPARITY)
    total, _ = objective(pred, Labels(shared, None, torch.zeros(2, 0, 4)))
    p, t = pred[0, 1:].flatten(), target[0, 1:].flatten()
    normal = [(x - x.median()) / (x - x.median()).abs().mean() for x in (p, t)]
    torch.testing.assert_close(total, torch.stack([(normal[0] - normal[1]).square().mean(), torch.tensor(0.0)]))


def test_truth_has_settings_of_its_own():
    settings = LossSettings(
        **{**OFF, "shared": 2.0}, normalization="none", truth={"normalization": "global", "shared": 1.0}
    )
    objective = Objective(settings)
    one = labels(kind=Kind.AFFINE_DISPARITY)
    expected = distillation_loss(PRED, DEPTH, VALID, "global")
    torch.testing.assert_close(objective(PRED, one)[0], expected)
    pseudo = replace(one, supervision=replace(one.supervision, truth=False))
    torch.testing.assert_close(objective(PRED, pseudo)[0], 2 * distillation_loss(PRED, DEPTH, VALID, "none"))


def test_labels_in_unit_range_change_what_sees_a_scale_and_nothing_else():
    plain = {**OFF, "shared": 1.0, "gradient": 2.0}
    spread = labels(torch.where(VALID, 7 * DEPTH + 3, 1e9), kind=Kind.AFFINE_DISPARITY)
    same = [
        Objective(LossSettings(**plain, normalization="global", label_range=r))(PRED, spread)[0]
        for r in ("unit", "as_is")
    ]
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-5)
    low, high = (torch.stack([f(d[v]) for d, v in zip(DEPTH, VALID, strict=True)]) for f in (torch.min, torch.max))
    unit = (DEPTH - low[:, None, None]) / (high - low)[:, None, None]
    objective = Objective(LossSettings(**plain, normalization="none", label_range="unit"))
    expected = Objective(LossSettings(**plain, normalization="none"))(PRED, labels(unit, kind=Kind.AFFINE_DISPARITY))
    torch.testing.assert_close(objective(PRED, spread)[0], expected[0], rtol=1e-4, atol=1e-5)
    flat = labels(torch.ones_like(DEPTH), kind=Kind.AFFINE_DISPARITY)
    assert objective(PRED, flat)[0].isfinite().all()
    with pytest.raises(ValueError, match="silog compares metres"):
        LossSettings(silog=1.0, label_range="unit")


def test_sparse_truth_may_be_spared_the_gradient():
    sparse = labels(kind=Kind.AFFINE_DISPARITY, dense=False)
    assert "gradient" in Objective()(PRED, sparse)[1]
    objective = Objective(LossSettings(gradient_on_sparse=False))
    assert "gradient" not in objective(PRED, sparse)[1]
    assert "gradient" in objective(PRED, labels(kind=Kind.AFFINE_DISPARITY))[1]
    few = DepthMap(DEPTH[:1], torch.rand(1, 24, 24, generator=G) < DENSE / 2, Kind.METRIC_DEPTH)
    assert not Supervision.of(few, teacher="t", truth=True).dense
    assert Supervision.of(few, teacher="t", truth=False).dense, "what a network says is dense, though it be sky"


def test_a_metric_prediction_meets_labels_that_know_less_as_disparity():
    near = labels(7 / DEPTH + 3, kind=Kind.AFFINE_DISPARITY, truth=False)
    objective = Objective(LossSettings(normalization="global", gradient=0.0, silog=1.0), Kind.METRIC_DEPTH)
    total, parts = objective(DEPTH, near)
    assert (total < 1e-5).all() and "silog" not in parts
    assert (objective(PRED, near)[0] > 0.1).all()
    with pytest.raises(KindError, match="the student learns affine_disparity, and a label of kind metric_depth"):
        Objective()(PRED, labels())


def test_labels_that_teach_nothing_are_told_of():
    objective = Objective(LossSettings(**OFF, silog=1.0), Kind.METRIC_DEPTH)
    near = labels(kind=Kind.AFFINE_DISPARITY, truth=False)
    with pytest.raises(
        ValueError, match=r"labels by t \(affine_disparity\) have no applicable .loss. term: silog needs metric"
    ):
        objective(PRED, near)
    with pytest.raises(ValueError, match=r"every weight of \[loss\] is 0"):
        Objective(LossSettings(**OFF))(PRED, near)


def test_what_a_student_cannot_see_is_left_out():
    objective = Objective(LossSettings(**OFF, log_l1=1.0), Kind.METRIC_DEPTH, max_depth=3.0)
    within = torch.where(DEPTH <= 3.0, DEPTH, 2.0)
    assert (objective(within, labels())[0] < 1e-6).all()
    everything = Objective(LossSettings(**OFF, log_l1=1.0), Kind.METRIC_DEPTH)
    assert (everything(within, labels())[0] > 0.1).all()
    objective = Objective(
        LossSettings(**{**OFF, "shared": 1.0}, normalization="none"), Kind.METRIC_DEPTH, max_depth=3.0
    )
    inverse = labels(1 / DEPTH, kind=Kind.METRIC_DISPARITY)
    assert (objective(within, inverse)[0] < 1e-6).all(), "labels of disparity have the same bound"


def test_a_prediction_in_the_camera_is_held_a_millimetre_away():
    """Its disparity would be infinite otherwise, and one pixel the whole loss."""
    objective = Objective(LossSettings(**{**OFF, "shared": 1.0}, normalization="none"), Kind.METRIC_DEPTH)
    near = labels(torch.full_like(DEPTH, 1000.0), kind=Kind.METRIC_DISPARITY)
    assert (objective(torch.zeros_like(DEPTH), near)[0] < 0.1).all()


def test_patches_are_brought_to_the_unit_range_of_their_own_region():
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 24, 24, generator=random) + torch.tensor([0.0, 9.0])[:, None, None]
    valid, box = torch.ones_like(maps, dtype=torch.bool), torch.tensor([0.0, 0.0, 1.0, 1.0])
    both = DepthMap(maps.repeat_interleave(2, 0), valid.repeat_interleave(2, 0), Kind.AFFINE_DISPARITY)
    one = Labels(DepthMap(maps, valid, Kind.AFFINE_DISPARITY), both, box.expand(2, 2, 4))
    low, high = (getattr(maps.flatten(1), end)(1)[:, None, None] for end in ("amin", "amax"))
    objective = Objective(LossSettings(**{**OFF, "local_global": 1.0}, normalization="none", label_range="unit"))
    assert (objective((maps - low) / (high - low), one)[0] < 1e-5).all()


def test_the_losses_are_had_from_the_package():
    import distill.losses

    assert distill.losses.distillation_loss is distillation_loss
    with pytest.raises(AttributeError, match="no attribute 'distilation_loss'"):
        distill.losses.distilation_loss  # noqa: B018


TERM = '''"""Weight of the mean of the prediction, for the sake of an example.

power: What it is raised to.
"""
WEIGHT = 0.0
NEEDS = frozenset()
def term(inputs, *, power=2.0):
    return inputs.pred.pow(power).mean((-2, -1))
'''


def learnt_elsewhere(folder: str) -> tuple[list[float], str]:
    """What a process that finds an installed package in `folder` makes of its term: parts of a loss, and its words."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "distill"]:
        del sys.modules[name]  # this process comes with a distill that has looked around already
    sys.path.insert(0, folder)
    explain, parse = import_module("distill.app.explain"), import_module("distill.app.recipe").parse
    loss = parse({"run": {"name": "x"}, "loss": {"mine": 0.5, "mine_power": 3.0}}).loss
    depth, maps = import_module("distill.core.depth"), import_module("distill.core.labels")
    shared = depth.DepthMap(torch.rand(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), "affine_disparity")
    objective = import_module("distill.losses.objective").Objective(loss)
    parts = objective(torch.full((2, 8, 8), 2.0), maps.Labels(shared, None, torch.zeros(2, 0, 4)))[1]
    return parts["mine"].tolist(), explain.explain_key("loss.mine_power")


def test_a_term_of_an_installed_package_is_a_key_a_part_and_explained(tmp_path, elsewhere):
    """Nothing here but its file: that is all there is to a term. One that breaks its contract is no key."""
    info = tmp_path / "their_terms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-terms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distill.terms]\nmine = their_mine\nbroken = their_broken\n")
    (tmp_path / "their_mine.py").write_text(TERM)
    (tmp_path / "their_broken.py").write_text("WEIGHT = 1.0\n")
    part, words = elsewhere(learnt_elsewhere, str(tmp_path))
    assert part == [8.0, 8.0] and words.startswith("loss.mine_power: number, default 2.0")
    assert "What it is raised to." in words


def test_labels_are_known_by_their_patches_too_and_dense_from_a_quarter_on():
    valid = torch.zeros(3, 4, 4, dtype=torch.bool)
    valid[0, 1, 1] = True
    of_patches = torch.zeros(6, 4, 4, dtype=torch.bool)
    of_patches[3, 0, 0] = True  # the second patch of the second region
    shared, local = (DepthMap(torch.ones(v.shape), v, Kind.METRIC_DEPTH) for v in (valid, of_patches))
    assert Labels(shared, local, torch.zeros(3, 2, 4)).known.tolist() == [True, True, False]
    assert Labels(shared, None, torch.zeros(3, 0, 4)).known.tolist() == [True, False, False]
    for count, dense in ((4, True), (3, False)):
        few = DepthMap(torch.ones(1, 4, 4), torch.arange(16).reshape(1, 4, 4) < count, Kind.METRIC_DEPTH)
        assert Supervision.of(few, teacher="t", truth=True).dense is dense
        assert Supervision.of(few, teacher="t", truth=False).dense
