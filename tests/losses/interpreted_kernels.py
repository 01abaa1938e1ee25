"""Runs the losses' kernels in Triton's interpreter on a CPU against the torch code: run by test_kernels.py.

The interpreter must be selected before Triton is imported, hence a separate process: TRITON_INTERPRET=1, then
`python -m tests.losses.interpreted_kernels`. Each check prints its name after it has passed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from distill.core.crops import sample_boxes
from distill.losses import fused
from distill.losses.kernels import boxes, contexts, gradient, select, small
from distill.losses.losses import _gradient_loss, _median_and_mean_abs_dev, compare, gradient_loss
from distill.losses.normalize._batched import batch_loss
from distill.losses.normalize._per_image import FLAT, FLOOR, MIN_PIXELS

CHOICES = {"flat": FLAT, "floor": FLOOR, "min_pixels": MIN_PIXELS}


def example(images: int, height: int = 12, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(images)
    pred, target, chance = torch.rand((3, images, height, width), generator=draw)
    return pred, target, chance > 0.25


def agree(pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None, levels: tuple[int, ...], **how) -> None:
    """Checks losses, live contexts and gradients against the torch code; upstream gradients differ by image."""
    how = {"trim_top": 0.0, "label_only": False} | how
    rows = [None if x is None else x.flatten(1) for x in (pred, target, valid & target.isfinite(), weight)]
    x = rows[0].clone().requires_grad_()
    losses, live, dead, _ = contexts.context_loss(
        x, rows[1], valid.flatten(1).view(torch.uint8), rows[3], levels, **how, **CHOICES
    )
    upstream = torch.linspace(-1.0, 2.0, len(pred))
    ours = torch.autograd.grad((losses * upstream).sum(), x, retain_graph=True)[0]
    same_upstream(losses, x)
    expected, slopes, alive = batch_loss(*rows, levels=levels, **how, want_gradient=True)
    assert live.dtype == alive.dtype and live.tolist() == alive.tolist()
    assert dead.tolist() == (sum(levels) - alive).tolist()
    torch.testing.assert_close(losses.detach(), expected, rtol=2e-6, atol=1e-7)
    for our_slope, their_slope, factor in zip(ours, slopes, upstream, strict=True):
        torch.testing.assert_close(
            our_slope, their_slope * factor, rtol=2e-5, atol=2e-6 * float(their_slope.abs().max()) + 1e-9
        )


def same_upstream(losses: Tensor, x: Tensor) -> None:
    """Checks that one number for all images, as of a sum, gives the gradient of that number for each."""
    one = torch.tensor([5.0, 0.7])[1]
    both = [torch.autograd.grad(losses, x, g, retain_graph=True)[0] for g in (one.expand(len(x)), one.repeat(len(x)))]
    assert torch.equal(both[0].view(torch.int32), both[1].view(torch.int32))


def edge_cases() -> tuple[Tensor, Tensor, Tensor]:
    """The degenerate cases of test_losses.py, one image each."""
    pred, target, valid = example(10)
    target[0] = 5.0
    valid[1] = False
    pred[2] = 2.0
    target[3, :6] = 0.0
    target[4] = (target[4] * 4).floor()
    pred[5], target[5] = (pred[5] * 3).floor() - 1.0, target[5] * -1.0
    target[6] = 0.2 * target[6]
    target[6, 0, 0], valid[6, 0, 0] = 1.0, True
    pred[7], target[7] = pred[7] * 1e6, target[7] * 1e-6
    target[8, 3, :4], valid[8, 3, :4] = torch.tensor([torch.inf, torch.nan, 0.3, -torch.inf]), True
    # Only the whole range has enough pixels, not its halves.
    valid[9] = False
    valid[9, 5, 2:7], target[9, 5, 2:7] = True, torch.tensor([0.0, 0.3, 0.31, 0.6, 1.0])
    pred[~valid] = torch.nan
    return pred, target, valid


def check_boxes() -> None:
    """Boxes inside the map, beyond its corner, of the whole map, between two pixels; more columns and more samples than
    a block has; samples on the first and the last pixels' centres, which are inside; gradients that are not contiguous.
    """
    boxes.WIDE, boxes.BLOCK = 16, 32
    regions = torch.tensor([[0.1, 0.2, 0.55, 0.65], [-0.2, 0.5, 0.4, 1.1], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.4, 0.45]])
    both = torch.stack([regions, regions.flip(0)])
    for (height, width), size in (((7, 6), 9), ((4, 20), 6), ((6, 6), 6)):
        pred = torch.rand(2, height, width, generator=torch.Generator().manual_seed(size))
        upstream = torch.rand(2, 4, size, size, generator=torch.Generator().manual_seed(1))
        results = []
        for sample in (boxes.sample_boxes, sample_boxes):
            x = pred.clone().requires_grad_()
            values, inside = sample(x, both, size)
            results.append((values.detach(), inside, torch.autograd.grad((values.mT * upstream).sum(), x)[0]))
        (values, inside, slopes), (expected, expected_inside, expected_slopes) = results
        assert torch.equal(inside, expected_inside) and 0 < int(inside.sum()) < inside.numel()
        torch.testing.assert_close(values, expected, rtol=0, atol=3e-6 * max(height, width))
        torch.testing.assert_close(slopes, expected_slopes, rtol=2e-4, atol=1e-3)
    assert boxes.sample_boxes(pred, both[:, :0], 5)[0].shape == (2, 0, 5, 5)


def check_hybrid_in_several_blocks() -> None:
    agree(*example(1, 20, 25), None, (1, 2, 4))


def check_edge_cases() -> None:
    pred, target, valid = edge_cases()
    agree(pred, target, valid, None, (1, 2))


def check_options() -> None:
    pred, target, valid = example(1)
    weight = torch.rand_like(pred)
    weight[0, :6] = 0.0
    agree(pred, target, valid, weight, (2,), trim_top=0.1)
    agree(pred, target, valid, weight, (1, 2), label_only=True)
    agree(pred, target, valid, None, (1,), trim_top=0.25, label_only=True)
    agree(pred, target, valid, torch.zeros_like(weight), (1,))


def check_statistics() -> None:
    """All statistics: medians exactly, whatever their digits; deviations up to rounding."""
    pred, target, valid = edge_cases()
    keep = [3, 4, 5, 7]
    pred, target, valid = (x[keep].flatten(1).contiguous() for x in (pred, target, valid))
    pred[0] = torch.where(valid[0], 10.0 ** (60 * torch.rand_like(pred[0]) - 30) * pred[0].sub(0.5).sign(), pred[0])
    rows = select.context_statistics(target, pred, valid.view(torch.uint8), select.Cut((1,))).statistics[:, :, 0]
    for b, row in enumerate(rows):
        for first, values in ((select.LABEL_MEDIAN, target[b][valid[b]]), (select.MEDIAN, pred[b][valid[b]])):
            median = values.median()
            assert row[first] == median
            torch.testing.assert_close(row[first + 1], (values - median).abs().mean(), rtol=2e-6, atol=0)
        above, below = (values > median).sum(), (values < median).sum()
        assert row[select.COUNT] == len(values) and row[select.BALANCE] == above - below


def wide_bins(number: int = 192) -> Tensor:
    """Rows in which a bin of equal width has more keys than two digits distinguish, or most values are equal."""
    draw = torch.Generator().manual_seed(1)
    values, sign = torch.rand(number, generator=draw), torch.rand(number, generator=draw).sub(0.5).sign()
    tiny = (values * 1000).round() * 1e-45
    least = torch.tensor(0x3F800001, dtype=torch.int32).view(
        torch.float32
    )  # the least key of its bin after the second digit
    rows = [
        values * sign, values.exp2() * sign * 1e-3, sign * 10.0 ** (40 * values - 38), tiny, tiny * sign, tiny + sign,
        values * 0.0, values * 0.0 - 3.0, sign * values * 3e38, (values * 4).floor() * sign,
        torch.where(values < 0.6, least, least + (values - 0.6) * 0.1), (values * 1e-30).clamp(min=5e-31),
    ]  # fmt: skip
    changed = []
    for row in rows:
        for outlier in (1e30, -1e30):
            changed.append(row.clone())
            changed[-1][number // 3] = outlier
    for few in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        changed.append(values * sign)
        changed[-1][number // 3 : number // 3 + 9] = few
    return torch.stack(rows + changed)


def check_bins_of_any_width() -> None:
    """Medians of values and of a prediction, exactly; some are only determined by the last digit."""
    launch, left = select.Launcher.__call__, []

    def spy(self, grid, tensors, numbers):
        launch(self, grid, tensors, numbers)
        if self.constants.get("START") == 5:
            left.append(int(tensors[3][1]))

    select.Launcher.__call__ = spy
    values = wide_bins()
    valid = torch.rand(values.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    valid[:, len(values[0]) // 3] = True
    for pred in (None, values):
        target = values if pred is None else torch.arange(values.shape[1]).expand(values.shape).float().contiguous()
        result = select.context_statistics(target, pred, valid.view(torch.uint8), select.WHOLE, label=pred is not None)
        first = select.LABEL_MEDIAN if pred is None else select.MEDIAN
        for row, each, counted in zip(result.statistics[:, :, 0], values, valid, strict=True):
            numbers = each[counted]
            median = numbers.sort().values[(len(numbers) - 1) // 2]  # NaN is the greatest
            assert row[first] == median
            distance = (numbers.double() - median.double()).abs()
            if not distance.sum().isfinite():
                assert not row[first + 1].isfinite()
            elif distance.sum() < 3e38:
                torch.testing.assert_close(row[first + 1], distance.mean().float(), rtol=2e-6, atol=2e-45)
            if pred is not None:
                assert row[select.BALANCE] == (~(numbers <= median)).sum() - (numbers < median).sum()
    select.Launcher.__call__ = launch
    assert min(left) > 5


def check_levels_of_wide_bins() -> None:
    """A prediction with an outlier and a sky of noise around zero: each context has a different bin."""
    _, target, valid = example(2)
    target = target.clamp(min=0.3)
    pred = wide_bins()[[2, 26]].reshape(target.shape)
    agree(pred, target, valid, None, (1, 2, 4))


def check_gradient_loss() -> None:
    pred, target, valid = edge_cases()
    keep = [0, 1, 3, 5, 8]
    pred, target, valid = pred[keep], target[keep], valid[keep]
    upstream = torch.linspace(-1.0, 2.0, len(pred))
    for normalize in (True, False):
        slopes = []
        for function in (fused._gradient, _gradient_loss):
            x = pred.clone().requires_grad_()
            losses = function(x, target, valid, 4, normalize, *(None,) * (function is fused._gradient))
            slopes.append((losses.detach(), torch.autograd.grad((losses * upstream).sum(), x, retain_graph=True)[0]))
            same_upstream(losses, x)
        torch.testing.assert_close(slopes[0][0], slopes[1][0])
        # Of several pixels that equal the median, one gets its gradient; torch's nanmedian shares it among all.
        tied = keep.index(5) if normalize else None
        for b, (mine, theirs) in enumerate(zip(slopes[0][1], slopes[1][1], strict=True)):
            if b == tied:
                mine, theirs = mine[theirs == 0], theirs[theirs == 0]
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()) + 1e-9)


def check_statistics_of_the_log() -> None:
    pred, _, valid = example(3, 20, 24)
    valid[1] = False
    pred[2] = (pred[2] * 3).floor() - 1.0
    thin, counted = pred[:, ::3, ::2], valid[:, ::3, ::2]
    expected = _median_and_mean_abs_dev(thin, counted)
    for largest in (small.LARGEST, 0):
        small.LARGEST = largest
        torch.testing.assert_close(fused._deviation(thin, counted), expected)
    x, y = pred.clone().requires_grad_(), pred.double().requires_grad_()
    spreads = [fused._deviation(x, valid)[1].sum(), _median_and_mean_abs_dev(y, valid)[1].sum()]
    ours, theirs = (torch.autograd.grad(s, z)[0] for s, z in zip(spreads, (x, y), strict=True))
    torch.testing.assert_close(ours[:2], theirs[:2].float())


def check_the_losses_take_them() -> None:
    """The public losses use the kernels (not for float64), also with shared statistics; NaN predictions propagate."""
    pred, target, valid = example(2)
    expected = compare(pred, target, valid, "global"), gradient_loss(pred, target, valid)
    fused.has_kernels, fused.raise_faults = lambda values: values.dtype == torch.float32, True
    comparison = compare(pred, target, valid, "global")
    assert comparison.whole_image is not None and expected[0].whole_image is None
    torch.testing.assert_close(comparison[:3], expected[0][:3])
    torch.testing.assert_close(gradient_loss(pred, target, valid, whole_image=comparison.whole_image), expected[1])
    assert ("contexts", (1,), 0.0, False, True) in {name for name, _ in fused._tried}
    assert compare(pred.double(), target, valid, "global").whole_image is None
    places = torch.tensor([[[0.1, 0.2, 0.6, 0.7]]]).expand(2, 1, 4)
    seen, inside = fused.sample_boxes(pred, places, 5, reference=sample_boxes)
    torch.testing.assert_close(seen, sample_boxes(pred, places, 5)[0])
    assert inside.all() and fused._tried["boxes", pred.device]
    assert fused.sample_boxes(pred.double(), places, 5, reference=sample_boxes) is None
    pred[0, valid[0]] = torch.nan
    broken = compare(pred, target, valid, "global")
    assert broken.loss.isnan().tolist() == [True, False]
    assert gradient_loss(pred, target, valid).isnan().tolist() == [True, False]


def mend_the_interpreter() -> None:
    """Patches the interpreter. It replaces Triton's functions at every call of a device function, although once is
    enough; it builds a table of all types to look one up; it checks every integer sum for overflow, whose result is
    unused without the debug option. These take half of its time. And Triton 3.6's converts an array of one element to a
    number, which numpy 2.4 no longer supports.
    """
    replaced, patch = set(), interpreter._patch_lang_tensor
    dtypes, look_up = {}, interpreter._get_np_dtype

    def np_dtype(of):
        if (name := str(of)) not in dtypes:  # a pointer's type cannot be hashed
            dtypes[name] = look_up(of)
        return dtypes[name]

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if "core" in names and id(names) not in replaced:
            replaced.add(id(names))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = np_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, *operands: None
    interpreter._patch_lang_tensor = patch_tensor


def main() -> None:
    mend_the_interpreter()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about numbers that the kernels mask
    select.SEPARATE_LAUNCHES, select.BLOCK, select.GRAIN, gradient.BLOCK = True, 256, 256, 256
    gradient.TALL, gradient.WIDE, gradient.LINES = 16, 8, 8
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name.removeprefix("check_"), flush=True)  # noqa: T201  the test reads this


if __name__ == "__main__":
    main()
