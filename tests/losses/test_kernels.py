"""The Triton kernels: on a CPU by Triton's interpreter, on a card against the CPU's numbers, and who does the work."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from distill.core import launch
from distill.core.crops import sample_boxes
from distill.core.plugins import find
from distill.losses import fused
from distill.losses.losses import compare, gradient_loss, median_and_mean_abs_dev
from tests.losses.test_losses import LEVELS, example


@pytest.mark.slow
def test_the_interpreted_kernels_give_the_numbers_of_the_torch_code():
    pytest.importorskip("triton")
    here = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.losses.interpreted_kernels"]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.split()) == 10


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_and_add_no_floats_in_any_order():
    """With the Triton that is installed, and no card. That they gave the same bits twice was seen on one."""
    pytest.importorskip("triton")
    here = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.losses.compiled_kernels", "90"]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kernels = {line.split()[1].rstrip(":"): line for line in done.stdout.splitlines()}
    assert len(kernels) == 10
    assert "stack 0" in kernels["_edges"]  # others spill a few bytes at most


def test_where_the_kernels_cannot_run_torch_does_their_work_after_one_warning(monkeypatch):
    """Here they cannot: there is no card, or no Triton."""
    pred, target, valid = example(1, dtype=torch.float32)
    expected = compare(pred, target, valid, "hybrid"), gradient_loss(pred, target, valid)
    statistics = median_and_mean_abs_dev(pred, valid)
    monkeypatch.setattr(fused, "has_kernels", lambda values: values.device.type == "cpu")
    monkeypatch.setattr(fused, "_tried", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            ours = compare(pred, target, valid, "hybrid"), gradient_loss(pred, target, valid)
            assert all(torch.equal(a, b) for a, b in zip(median_and_mean_abs_dev(pred, valid), statistics, strict=True))
    assert torch.equal(ours[0].loss, expected[0].loss) and torch.equal(ours[1], expected[1])
    told = [str(w.message) for w in said if "fused loss kernels" in str(w.message)]
    assert len(told) == 1 and "using the slower torch code" in told[0] and "\n" not in told[0]
    monkeypatch.setattr(fused, "raise_faults", True)
    monkeypatch.setattr(fused, "_tried", {})
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        compare(pred, target, valid, "hybrid")


def test_kernels_with_other_numbers_are_not_trusted(monkeypatch):
    monkeypatch.setattr(fused, "_tried", {})
    here = torch.device("cpu")
    right = torch.tensor([1.0, 2.0])
    assert fused._trusted("right", here, lambda _: iter([(right * (1 + 1e-6), right)]))
    with pytest.warns(UserWarning, match="off by"):
        assert not fused._trusted("wrong", here, lambda _: iter([(right * 1.01, right)]))
    assert not fused._trusted("none", here, lambda _: iter([(right * torch.nan, right)]))


class Kernel:
    """What Triton's are like: called for a grid it compiles, and what comes of that is launched without options."""

    arg_names = ("values", "out", "size", "BLOCK", "FLAG")
    function, packed_metadata = "function", "metadata"

    def __init__(self, *, constants_in_signature=True):
        self.calls = []
        self.src = SimpleNamespace(signature=dict.fromkeys(self.arg_names[: 5 if constants_in_signature else 3]))

    def __getitem__(self, grid):
        def first(*args, **constants):
            self.calls.append(("compile", grid, args, constants))
            return self

        return first

    def run(self, *args):
        self.calls.append(("launch", *args))


def test_a_kernel_is_compiled_once_for_a_kind_of_arguments(monkeypatch):
    monkeypatch.setattr(launch, "_stream_of", lambda: lambda device: f"stream of {device}")
    values, out = torch.zeros(64), torch.zeros(64)
    kernel = Kernel()
    run = launch.Launcher(kernel, {"FLAG": True, "BLOCK": 32, "num_warps": 8})
    run((7, 2, 1), (values, out), (64,))
    assert kernel.calls == [("compile", (7, 2, 1), (values, out, 64), {"FLAG": True, "BLOCK": 32, "num_warps": 8})]
    run((7, 2, 1), (out, values), (64,))
    how = ("stream of -1", "function", "metadata", None, None, None)
    assert kernel.calls[1] == ("launch", 7, 2, 1, *how, out.data_ptr(), values.data_ptr(), 64, 32, True)
    # another number; a tensor that is aligned otherwise, and another one
    for tensors, number in (((values, out), 63), ((values[1:], out), 64), ((values, out[1:]), 64)):
        run((7, 2, 1), tensors, (number,))
        assert kernel.calls[-1][0] == "compile"
        run((7, 2, 1), tensors, (number,))
        assert kernel.calls[-1][0] == "launch" and kernel.calls[-1][10] == tensors[0].data_ptr()


def test_a_triton_before_3_3_is_launched_without_the_constants_that_its_signature_leaves_out(monkeypatch):
    monkeypatch.setattr(launch, "_stream_of", lambda: lambda device: "stream")
    kernel, values = Kernel(constants_in_signature=False), torch.zeros(64)
    run = launch.Launcher(kernel, {"FLAG": True, "BLOCK": 32, "num_warps": 8})
    for _ in range(2):
        run((7, 2, 1), (values, values), (64,))
    assert kernel.calls[1][10:] == (values.data_ptr(), values.data_ptr(), 64)


def test_a_compiled_kernel_is_held_because_triton_unloads_one_that_nothing_holds(monkeypatch):
    monkeypatch.setattr(launch, "_stream_of", lambda: lambda device: "stream")
    kernel, left = Kernel(), []

    def forgetful(*args, **constants):
        compiled = Kernel()
        compiled.run = left.append  # a launcher does not hold the kernel that it belongs to
        left.append(weakref.ref(compiled))
        return compiled

    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: forgetful)
    run = launch.Launcher(kernel, {"BLOCK": 32})
    run((1, 1, 1), (torch.zeros(4),), ())
    assert left[0]() is not None


def test_a_kernel_is_tried_both_ways_before_it_is_trusted(monkeypatch):
    """By Triton's own launch, and by the address of what that compiled: its arguments may be others in a new Triton."""
    monkeypatch.setattr(fused, "_tried", {})
    asked, right = [], torch.tensor([1.0])

    def trial(device):
        asked.append(device)
        yield right * len(asked), right

    with pytest.warns(UserWarning, match="off by"):
        assert not fused._trusted("second", torch.device("cpu"), trial)
    assert len(asked) == 2


def test_maps_of_two_devices_are_refused_before_a_kernel_reads_a_wrong_memory():
    pred, target, valid = example(1, dtype=torch.float32)
    elsewhere = target.to("meta")
    for call in (
        lambda: fused._contexts(pred, elsewhere, valid, None, (1,), 0.0, False),
        lambda: fused._contexts(pred, target, valid, elsewhere, (1,), 0.0, False),
        lambda: fused._gradient(pred, target, valid.to("meta"), 4, True, None),
        lambda: fused._deviation(pred, valid.to("meta")),
    ):
        with pytest.raises(ValueError, match="one device, not on cpu and meta"):
            call()


@pytest.mark.parametrize("again", [False, True])
def test_a_second_derivative_is_refused_whether_or_not_it_is_guarded(again):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @launch.differentiable_once
        def backward(ctx, upstream):
            return upstream * 2

    x = torch.ones(2, requires_grad=True)
    (slope,) = torch.autograd.grad(Double.apply(x).square().sum(), x, create_graph=again)
    assert slope.tolist() == [8.0, 8.0] and slope.requires_grad == again
    if again:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


def test_pieces_cover_an_image_and_are_few():
    select = pytest.importorskip("distill.losses.kernels.select")
    for images, pixels in ((1, 1), (8, 560 * 560), (80, 560 * 560), (3, 513), (500, 224 * 224), (1, 12_000 * 9_000)):
        pieces, length = select.pieces_of(images, pixels, 264, select.GRAIN)
        assert (pieces - 1) * length < pixels <= pieces * length and pieces <= select.CHUNK
    pieces, length = select.pieces_of(8, 560 * 560, 264, select.GRAIN)
    assert pieces * 8 == 264 and length * 264 < 1.03 * 8 * 560 * 560


def maps(seed):
    """Two smooth labels with edges and sky, and predictions without ties: which of several medians is meant is free."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.interpolate(torch.rand(2, 1, 9, 9, generator=draw), size=(192, 200), mode="bicubic")
    target = target[:, 0].clamp(min=0.1)
    target[0, :60], target[1, :, 150:] = 0.0, target[1, :, 150:] + 1.0
    pred = target + 0.2 * torch.rand(target.shape, generator=draw)
    return pred, target, torch.rand(target.shape, generator=draw) > 0.1


def differentiated(call, pred):
    x = pred.clone().requires_grad_()
    losses = call(x)
    return losses.detach().cpu(), torch.autograd.grad(losses.sum(), x)[0].cpu()


@pytest.fixture
def loud(monkeypatch):
    monkeypatch.setattr(fused, "raise_faults", True)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"trim_top": 0.1}, {"label_only": True}, {"weight": True}], ids=str)
@pytest.mark.parametrize("name", list(LEVELS))
def test_the_card_gives_the_numbers_of_the_cpu_twice_the_same(name, options, loud):
    here = maps(3)
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(here[0].shape, generator=torch.Generator().manual_seed(0))
    plugin = find("distill.losses.normalize", name)
    on_cpu = differentiated(lambda x: plugin.compare(x, *here[1:], **options).loss, here[0])
    there = [x.cuda() for x in here]
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    runs = [differentiated(lambda x: plugin.compare(x, *there[1:], **options).loss, there[0]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for mine, theirs in zip(runs[0], on_cpu, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert fused._tried and all(fused._tried.values())


@pytest.mark.cuda
def test_the_maps_in_boxes_on_the_card(loud):
    pred, upstream, _ = maps(6)
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.7], [-0.2, 0.5, 0.4, 1.1], [0.0, 0.0, 1.0, 1.0]]]).expand(2, 3, 4)
    values, inside = sample_boxes(pred, boxes, 192)
    weights = upstream[:, None, :, :192]
    on_cpu = differentiated(lambda x: sample_boxes(x, boxes, 192)[0] * weights, pred)

    def on_the_card(x):
        ours, ours_inside = fused.sample_boxes(x, boxes.cuda(), 192, reference=sample_boxes)
        assert torch.equal(ours_inside.cpu(), inside)
        torch.testing.assert_close(ours.detach().cpu(), values, rtol=1e-4, atol=1e-4)
        return ours * weights.cuda()

    runs = [differentiated(on_the_card, pred.cuda()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][1], on_cpu[1], rtol=1e-3, atol=1e-4 * float(on_cpu[1].abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_loss_on_the_card(normalize, loud):
    here = maps(4)
    on_cpu = differentiated(lambda x: gradient_loss(x, *here[1:], normalize=normalize), here[0])
    there = [x.cuda() for x in here]
    whole = compare(*there, "hybrid").whole_image
    for given in (None, whole):
        ways = [
            differentiated(lambda x: gradient_loss(x, *there[1:], normalize=normalize, whole_image=given), there[0])  # noqa: B023
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))
        for mine, theirs in zip(ways[0], on_cpu, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.cuda
def test_medians_of_bins_of_any_width_on_the_card(loud, monkeypatch):
    """Exact, and the same bits whether the programs of one launch meet or each step has its own."""
    from distill.losses.kernels import select
    from tests.losses.interpreted_kernels import wide_bins

    here = wide_bins(50_000)
    values = here.cuda()
    valid = torch.ones(values.shape, dtype=torch.uint8, device="cuda")
    label = torch.arange(values.shape[1], device="cuda").expand(values.shape).float().contiguous()
    medians = here.sort(1).values[:, (values.shape[1] - 1) // 2].cuda()  # a card sorts a negative NaN to the front
    for levels in ((1,), (1, 2, 4)):
        found = []
        for apart in (False, True, False):
            monkeypatch.setattr(select, "SEPARATE_LAUNCHES", apart)
            found.append(select.context_statistics(label, values, valid, select.Cut(levels)).statistics.clone())
            assert torch.equal(found[-1][:, select.MEDIAN, 0], medians)
        written = slice(select.LABEL_MEDIAN, select.BALANCE + 1)
        assert all(torch.equal(x[:, written].view(torch.int32), found[0][:, written].view(torch.int32)) for x in found)


@pytest.mark.cuda
def test_statistics_on_the_card_and_both_losses_in_a_graph(loud):
    pred, target, valid = (x.cuda() for x in maps(5))
    for step in (1, 4):
        thin, counted = pred[:, ::step, ::step], valid[:, ::step, ::step]
        on_cpu = median_and_mean_abs_dev(thin.cpu(), counted.cpu())
        torch.testing.assert_close([x.cpu() for x in median_and_mean_abs_dev(thin, counted)], list(on_cpu))

    def both():
        seen = compare(pred, target, valid, "hybrid")
        loss = seen.loss + gradient_loss(pred, target, valid, whole_image=seen.whole_image)
        return loss, torch.autograd.grad(loss.sum(), pred)[0]

    pred.requires_grad_()
    # Detached: a graph of autograd that lives on keeps the leaf's node on this stream, where nothing can be captured.
    expected = [x.detach().clone() for x in both()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_statistics_of_contexts_serve_the_gradient_only_if_they_are_the_whole_images(monkeypatch):
    """And none but the kernels that were tried, with weights or without, on ranges cut no finer than they count."""
    tried = []
    monkeypatch.setattr(fused, "has_kernels", lambda values: True)
    monkeypatch.setattr(fused, "_trusted", lambda name, device, trial: tried.append(name) or True)
    monkeypatch.setattr(fused, "_contexts", lambda *maps, **how: ("losses", "live", "dead", "statistics"))
    pred, target, valid = example(1, dtype=torch.float32)

    def statistics(levels, label_only=False, weight=None):
        found = fused.context_loss(pred, target, valid, weight, levels, trim_top=0.0, label_only=label_only)
        return found and found[3]

    assert statistics((1, 2, 4)) == "statistics" and statistics((4,)) is None
    assert statistics((1, 2), label_only=True) is None
    assert statistics((1, 16), weight=target) == "statistics" and len({*tried}) == 4
    assert statistics((1, 32)) is None and len(tried) == 4, "finer than the first histogram"
    statistics((1, 16))
    assert len({*tried}) == 5, "with weights it is another kernel"
