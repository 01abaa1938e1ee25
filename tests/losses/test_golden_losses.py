"""HDN's released loss, value by value and gradient by gradient (golden numbers of icoz69/HDN, demo.py)."""

from __future__ import annotations

import re

import pytest
import torch

from distill.app import build, recipe
from distill.app.strict import RecipeError
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.losses.losses import compare, distillation_loss, hdn_loss

CASES = ("hdn_losses_small", "hdn_losses")


def ours(name: str, pred, target, valid):
    """The case's value by its name: "dr3", "dp2_finest", "ssimae"."""
    if name == "ssimae":
        return hdn_loss(pred, target, valid, level=0)
    contexts, level, finest = re.fullmatch(r"(d[rps])(\d)(_finest)?", name).groups()
    return hdn_loss(pred, target, valid, contexts=contexts, level=int(level), finest_only=bool(finest))


def runs(golden, case):
    facts, data = golden(case)
    for run in facts["runs"]:
        i = run["index"]
        yield run, data, tuple(torch.from_numpy(data[f"{n}{i}"][:, 0]) for n in ("pred", "gt", "mask"))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(golden, case):
    seen = gradients = 0
    for run, data, (pred, target, valid) in runs(golden, case):
        for name, said in run["values"].items():
            where = f"run {run['index']} {name}"
            x = pred.clone().requires_grad_()
            loss = ours(name, x, target, valid).mean()
            assert loss.item() == pytest.approx(said["loss"], rel=2e-5), where
            if said.get("loss_float64"):
                exact = ours(name, pred.double(), target.double(), valid).mean()
                assert exact.item() == pytest.approx(said["loss_float64"], rel=1e-5), where
            seen += 1
            key = f"grad{run['index']}_{name}"
            if run["pred_has_ties_among_valid"] or key not in data:
                continue
            want = torch.from_numpy(data[key][:, 0])
            got = torch.autograd.grad(loss, x)[0]
            assert (got - want).abs().max() <= 2e-5 * want.abs().max(), where
            gradients += 1
    assert seen >= 14 and gradients >= 7


@pytest.mark.parametrize("case", CASES)
def test_the_option_is_the_released_loss(golden, case):
    for _, _, (pred, target, valid) in runs(golden, case):
        for name, normalization, contexts in (
            ("dr3", "hybrid", "dr"),
            ("dp3", "hybrid", "dp"),
            ("ds3", "hybrid", "ds"),
            ("dr3_finest", "local", "dr"),
            ("ssimae", "global", "dr"),
        ):
            got = distillation_loss(pred, target, valid, normalization, reference_hdn=True, contexts=contexts)
            assert torch.equal(got, ours(name, pred, target, valid)), (normalization, contexts)
            assert got.shape == (len(pred),)


def test_the_default_is_near_it_but_right_where_it_is_odd(golden):
    """Per image, the maximum counted, the mean by n: a few per cent from the released value, not equal to it."""
    for run, _, (pred, target, valid) in runs(golden, "hdn_losses_small"):
        if run["spec"].get("edit") or run["pred_has_ties_among_valid"]:
            continue
        loss = distillation_loss(pred, target, valid, "hybrid").mean().item()
        assert loss == pytest.approx(run["values"]["dr3"]["loss"], rel=0.1)
        assert loss != pytest.approx(run["values"]["dr3"]["loss"], rel=1e-4)


def maps(size=12):
    draw = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 2, size, size, generator=draw, dtype=torch.float64)
    return pred, target, torch.rand(2, size, size, generator=draw) > 0.2


@pytest.mark.parametrize("contexts", ["dr", "dp"])
def test_the_oddities(contexts):
    pred, target, valid = maps()
    top = torch.where(valid, target, -1.0).flatten(1).argmax(1)
    pred.requires_grad_()
    grad = torch.autograd.grad(hdn_loss(pred, target, valid, contexts=contexts).sum(), pred)[0].flatten(1)
    assert (grad.gather(1, top[:, None]) == 0).all(), "the maximum belongs to no context"
    grad = torch.autograd.grad(distillation_loss(pred, target, valid, "hybrid").sum(), pred)[0].flatten(1)
    assert (grad.gather(1, top[:, None]) != 0).all(), "ours counts it"
    flat = torch.full_like(target, 3.0)
    assert hdn_loss(pred, flat, valid, contexts=contexts).tolist() == [0.0, 0.0]
    if contexts == "dr":
        assert (hdn_loss(pred.float(), 0 * flat.float(), valid) > 0.1).all(), "a zero label has contexts"


@pytest.mark.parametrize("contexts", ["dr", "dp", "ds"])
def test_gradcheck_and_half_precision_and_nothing_valid(contexts):
    pred, target, valid = maps(5)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hdn_loss(x, target, valid, contexts=contexts), (pred,), fast_mode=True)
    nothing = hdn_loss(pred, target, valid & ~valid, contexts=contexts)
    assert nothing.tolist() == [0.0, 0.0]
    assert torch.equal(torch.autograd.grad(nothing.sum(), pred)[0], torch.zeros_like(pred))
    half = hdn_loss(pred.half(), target.half(), valid, contexts=contexts)
    assert half.dtype == torch.float32 and half.isfinite().all()
    poison = torch.where(valid, target, torch.nan)
    torch.testing.assert_close(
        hdn_loss(pred, poison, valid, contexts=contexts), hdn_loss(pred, target, valid, contexts=contexts)
    )


def test_float64_keeps_its_digits():
    pred, target, valid = maps(7)
    total = 0.0
    for p, t, v in zip(pred, target, valid, strict=True):
        centred = [x[v] - x[v].median() for x in (p, t)]
        one, other = (c / (c.abs().sum() / (len(c) + 1) + 1e-6) for c in centred)
        total += float((one - other).abs().sum())
    assert hdn_loss(pred, target, valid, level=0).mean().item() == pytest.approx(total / int(valid.sum()), rel=1e-14)


def test_what_the_released_loss_cannot_do_is_refused():
    pred, target, valid = maps()
    with pytest.raises(ValueError, match="no trim_top, label_only or weights"):
        compare(pred, target, valid, "hybrid", reference_hdn=True, trim_top=0.1)
    with pytest.raises(ValueError, match="square maps, not 12 x 8"):
        hdn_loss(pred[..., :8], target[..., :8], valid[..., :8], contexts="ds")
    with pytest.raises(ValueError, match="contexts must be"):
        hdn_loss(pred, target, valid, contexts="range")
    with pytest.raises(ValueError, match="needs reference_hdn"):
        compare(pred, target, valid, "hybrid", contexts="dp")


def test_the_recipe_reaches_it_and_a_run_without_it_keeps_its_identity():
    def given(**loss):
        table = {"run": {"name": "x"}, "images": [{"scenes": 2}], "teachers": [{"name": "analytic"}], "loss": loss}
        return recipe.parse(table)

    objective = build.make_objective(given(reference_hdn=True, contexts="dp", patch_resolution="student"))
    assert (objective.settings.reference_hdn, objective.settings.contexts, objective.settings.patch_resolution) == (
        True,
        "dp",
        "student",
    )
    pred, target, valid = maps()
    labels = Labels(DepthMap(target, valid, Kind.AFFINE_DISPARITY), None, torch.zeros(2, 0, 4))
    part = objective(pred, labels)[1]["shared"]
    torch.testing.assert_close(part, hdn_loss(pred, target.float(), valid, contexts="dp"), rtol=1e-5, atol=1e-6)
    names = {build.identity(given(**loss)) for loss in ({}, {"reference_hdn": False}, {"patch_resolution": "patch"})}
    assert len(names) == 1
    others = {build.identity(given(**loss)) for loss in ({"reference_hdn": True}, {"patch_resolution": "student"})}
    assert len(others | names) == 3
    for loss, message in (
        ({"reference_hdn": True, "trim_top": 0.1}, "knows no trim_top"),
        ({"contexts": "ds"}, "set reference_hdn = true"),
        ({"patch_resolution": "region"}, "patch_resolution must be"),
    ):
        with pytest.raises(RecipeError, match=message):
            given(**loss)
