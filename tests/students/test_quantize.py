"""Four bits: small error, exact shapes, and a student that survives them."""

from __future__ import annotations

import pytest
import torch

from distill import students
from distill.students import checkpoint
from distill.students.quantize import GROUP, dequantize, pack, quantize, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1,), (7, 19), (64, 128), (3, 5, 3, 3), (GROUP * 2,)])
def test_every_shape_comes_back_within_half_a_step(shape, bits):
    values = torch.randn(shape) * 3 + 1
    parts = quantize(values, bits=bits)
    back = dequantize(parts, values.shape)
    assert back.shape == values.shape and back.dtype == torch.float32
    # The chosen range may cut the extremes by a fifth; what is inside is half a step off at most.
    error = (back - values).abs()
    assert error.square().mean() < (0.35 * parts["step"].float().max()) ** 2 + 1e-5
    assert parts["codes"].numel() * 8 // bits == -(-values.numel() // GROUP) * GROUP


def test_the_fitted_range_loses_less_than_the_whole_range():
    rows = torch.randn(400, GROUP, generator=torch.Generator().manual_seed(0))
    low, step = rows.amin(1, keepdim=True), (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 15
    plain = ((rows - low) / step).round() * step + low
    assert (dequantize(quantize(rows), rows.shape) - rows).square().mean() < 0.9 * (plain - rows).square().mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_128_as_older_files_have_are_read(bits, monkeypatch):
    values = torch.randn(33, 130)
    monkeypatch.setattr("distill.students.quantize.GROUP", 128)
    old = quantize(values, bits=bits)
    monkeypatch.undo()
    assert len(old["low"]) == -(-values.numel() // 128)
    assert (dequantize(old, values.shape) - values).abs().mean() < {4: 0.2, 8: 0.01}[bits]


def test_constants_and_zeros_are_kept():
    for constant in (0.0, 0.5, -2.0):
        values = torch.full((2, GROUP), constant)
        torch.testing.assert_close(dequantize(quantize(values), values.shape), values, atol=1e-6, rtol=1e-3)


def test_what_fills_up_the_last_group_does_not_widen_its_range():
    values = torch.tensor([5.0, 5.01]).repeat(GROUP // 2 + 1)
    assert (dequantize(quantize(values), values.shape) - values).abs().max() < 3e-3


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match="NaN, infinite or above 65504"):
        quantize(torch.tensor([0.0, value]))


def test_weights_far_below_one_keep_their_steps():
    values = 1e-3 * torch.randn(8, GROUP, generator=torch.Generator().manual_seed(0))
    assert (dequantize(quantize(values), values.shape) - values).abs().max() < 4e-4


def test_large_matrices_alone_are_packed_and_damaged_parts_are_named():
    shapes = {"small.weight": (64, 64), "large.weight": (65, 64), "long.bias": (9000,), "wild.weight": (65, 64)}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    tensors["wild.weight"][0, 0] = 1e9
    stored = pack(tensors, {key: value.shape for key, value in tensors.items()})
    parts = [f"large.weight:{part}" for part in ("codes", "low", "step")]
    assert sorted(stored) == sorted(["small.weight", "long.bias", "wild.weight", *parts])
    assert sorted(unpack(stored, tensors, "file")) == sorted(tensors)
    for changed, said in (
        ({parts[1]: None}, "file: has an unknown or incomplete quantized tensor, large.weight"),
        ({"odd.weight:codes": stored[parts[0]]}, "file: has an unknown or incomplete quantized tensor, odd.weight"),
        ({parts[2]: stored[parts[2]][:-1]}, "file: large.weight: .* are not a tensor of"),
        ({parts[0]: stored[parts[0]][:-1]}, "file: large.weight: .* are not a tensor of"),
    ):
        with pytest.raises(ValueError, match=said):
            unpack({k: v for k, v in (stored | changed).items() if v is not None}, tensors, "file")


def test_parts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="are not a tensor of"):
        dequantize(quantize(torch.randn(3, GROUP)), torch.Size([2, GROUP]))


def test_a_student_in_four_bits_is_small_and_close(tmp_path):
    student = students.build(
        encoder="vit_tiny_patch16_224",
        decoder="dpt",
        encoder_options={"blocks": [0, 1]},
        decoder_options={"channels": 32, "post_process_channels": [16, 16, 16, 16], "readout": "ignore"},
    ).eval()
    whole = checkpoint.save(student, tmp_path / "whole")
    small = checkpoint.save(student, tmp_path / "small", dtype=torch.float16, bits=4)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, small)]
    assert sizes[1] < 0.25 * sizes[0]
    images = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        one, other = student(images), checkpoint.load(small)(images)
        torch.testing.assert_close(checkpoint.load(whole)(images), one)
    assert (one - other).abs().mean() < 0.6 * one.std()
    with pytest.raises(ValueError, match="4 bits or not at all"):
        checkpoint.save(student, tmp_path / "odd", bits=3)


def test_four_bits_are_of_groups_of_64_and_an_encoders_first_layer_keeps_eight():
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(64, 128, generator=draw) for name in ("a.weight", "e.patch_embed.proj.weight")}
    tensors["large.weight"] = tensors["a.weight"] * 1e6  # float16 has no such number
    out = pack(tensors, {name: value.shape for name, value in tensors.items()})
    assert len(out["a.weight:codes"]) == 64 * 128 // 2 and len(out["a.weight:step"]) == 64 * 128 // 64
    assert len(out["e.patch_embed.proj.weight:codes"]) == 64 * 128
    assert torch.equal(out["large.weight"], tensors["large.weight"])


def test_codes_fit_the_numbers_that_are_read_back_and_rare_extremes_do_not_set_the_step():
    values = 1000 + torch.linspace(0, 3, 64)  # among float16's numbers are 1000, 1000.5, 1001
    back = dequantize(quantize(values), values.shape)
    assert (back - values).abs().max() < 0.2
    tailed = torch.randn(64 * 256, generator=torch.Generator().manual_seed(0))
    rows = tailed.reshape(-1, 64)
    low, step = rows.amin(1, keepdim=True), (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 15
    plain = ((rows - low) / step).round() * step + low
    error = (dequantize(quantize(tailed), tailed.shape) - tailed).square().mean()
    assert error < 0.88 * (plain - rows).square().mean(), "0.90 without the cuts"
