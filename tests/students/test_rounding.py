"""Four bits rounded for a layer's inputs: what it gives changes less than by rounding each weight to its nearest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill import students
from distill.app import export
from distill.students import checkpoint, rounding
from distill.students.quantize import GROUP, dequantize, fitted, quantize, rounded


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_inputs_that_say_nothing_of_each_other_leave_every_weight_at_its_nearest():
    weight = drawn(5, 2 * GROUP)
    ours, nearest = rounding.compensated(weight, torch.eye(2 * GROUP)), quantize(weight)
    assert all(torch.equal(ours[part], nearest[part]) for part in nearest)


def test_with_inputs_that_go_together_the_outputs_lose_less():
    weight = drawn(16, 2 * GROUP)
    inputs = drawn(1000, 8) @ drawn(8, 2 * GROUP) + 0.1 * drawn(1000, 2 * GROUP)
    inputs[:, 3] = 0.0
    ours, nearest = rounding.compensated(weight, inputs.T @ inputs / 1000), quantize(weight)
    losses = [(inputs @ (dequantize(parts, weight.shape) - weight).T).square().mean() for parts in (ours, nearest)]
    assert losses[0] < 0.2 * losses[1]


def test_the_codes_are_those_of_the_inverse_eliminated_column_by_column():
    """Optimal brain quantization in one order, which GPTQ's Cholesky factor is a faster way to."""
    weight, inputs = drawn(3, GROUP), drawn(500, 40) @ drawn(40, GROUP)
    moments = inputs.T @ inputs / 500
    left = weight.double()
    inverse = torch.linalg.inv(moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(GROUP))
    _, low, step = fitted(weight, bits=4)
    codes = torch.zeros_like(weight)
    for k in range(GROUP):
        codes[:, k : k + 1] = code = rounded(left[:, k : k + 1], low, step, bits=4)
        error = (left[:, k : k + 1] - (code * step + low)) / inverse[k, k]
        left = left - error * inverse[k]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k] / inverse[k, k]
    ours = rounding.compensated(weight, moments)
    assert torch.equal(dequantize(ours, weight.shape), codes * step + low)


def test_a_convolution_sees_its_kernel_of_places_in_the_order_of_its_weights():
    layer = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    image, moments = drawn(1, 2, 9, 11), torch.zeros(18, 18)
    with torch.no_grad(), rounding._Counting({id(layer.weight): moments}):
        outputs = layer(image)
    flat = layer.weight.detach().flatten(1)
    torch.testing.assert_close((flat @ moments @ flat.T).diagonal(), outputs.square().mean((0, 2, 3)))


def test_of_many_positions_some_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(rounding, "_ROWS", 10)
    x = drawn(1, 25, 6)
    found = rounding._second_moments(F.linear, {"input": x, "weight": drawn(9, 6)})
    torch.testing.assert_close(found, x[0, ::3].T @ x[0, ::3] / 9)


def test_photos_of_eight_bits_are_shown_as_the_student_knows_them():
    class Seeing(torch.nn.Linear):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    seen: list[torch.Tensor] = []
    photo = torch.randint(0, 256, (3, 4, 64), dtype=torch.uint8)
    rounding.calibrated(Seeing(64, 80), [photo, photo.float() / 255])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], photo[None] / 255)


def test_attention_that_hands_its_weight_to_the_function_is_calibrated_too():
    layer, moments = torch.nn.Linear(6, 9), torch.zeros(6, 6)
    inputs = drawn(4, 7, 6)
    with torch.no_grad(), rounding._Counting({id(layer.weight): moments}):
        F.linear(inputs, weight=layer.weight, bias=None)  # timm's qkv of DINOv3 and BEiT: no hook sees it
        F.linear(2 * inputs, weight=layer.weight)
    rows = inputs.reshape(-1, 6)
    torch.testing.assert_close(moments, 5 * rows.T @ rows / len(rows))


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"dilation": 2}, {"stride": (1, 2), "padding": 2}])
def test_a_convolution_is_calibrated_where_it_looks(options):
    x, weight = drawn(2, 3, 9, 11), drawn(5, 3, 2, 3)
    places = torch.eye(18).reshape(18, 3, 2, 3)  # each output is one of the kernel's places
    rows = F.conv2d(x, places, **options).permute(0, 2, 3, 1).reshape(-1, 18)
    found = rounding._second_moments(F.conv2d, {"input": x, "weight": weight, **options})
    torch.testing.assert_close(found, rows.T @ rows / len(rows))
    with pytest.raises(ValueError, match="a convolution with padding same is not calibrated: give it in pixels"):
        rounding._second_moments(F.conv2d, {"input": x, "weight": weight, "padding": "same"})


@pytest.mark.parametrize(
    ("layer", "calibrates"),
    [
        (torch.nn.Linear(64, 65), True),
        (torch.nn.Linear(64, 64), False),  # small
        (torch.nn.Linear(65, 64), False),  # no whole groups
        (torch.nn.Conv2d(64, 2, 8), True),
        (torch.nn.Conv2d(64, 2, 8, groups=2), False),
        (torch.nn.BatchNorm2d(8000), False),
    ],
)
def test_which_layers_are_calibrated(layer, calibrates):
    assert rounding._calibrates("layer.weight", layer) is calibrates
    if calibrates:
        assert not rounding._calibrates("patch_embed.proj.weight", layer)
        with torch.no_grad():
            layer.weight[0, 0] = 1e6
        assert not rounding._calibrates("layer.weight", layer), "float16 holds no such step"


def test_inputs_that_are_always_zero_are_no_fault():
    weight = drawn(3, GROUP)
    found, plain = rounding.compensated(weight, torch.zeros(GROUP, GROUP)), quantize(weight)
    assert all(torch.equal(found[part], plain[part]) for part in plain)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return students.build(
        encoder="vit_tiny_patch16_224",
        decoder="dpt",
        encoder_options={"blocks": [0, 1]},
        decoder_options={"channels": 64, "post_process_channels": [16, 16, 16, 64], "readout": "ignore"},
    ).eval()


def test_a_calibrated_student_is_as_small_and_closer(student, tmp_path, monkeypatch):
    blurred = F.interpolate(drawn(8, 3, 8, 10).sigmoid(), (64, 80), mode="bicubic").clamp(0, 1)
    photos = list((blurred * 255).to(torch.uint8))
    monkeypatch.setattr(export, "calibration", lambda labels: photos)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    checkpoint.save(student, tmp_path / "whole")
    for name, labels in (("nearest", ""), ("calibrated", "LABELS")):
        export.run_export(tmp_path / "whole", tmp_path / name, options=export.ExportOptions(bits=4, calibrate=labels))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("nearest", "calibrated")]
    assert sizes[0] == sizes[1]
    images, maps = torch.stack(photos).float() / 255, {}
    for name in ("whole", "nearest", "calibrated"):
        with torch.no_grad():
            found = checkpoint.load(tmp_path / name)(images)
        maps[name] = found - found.mean((1, 2), keepdim=True)  # a shift means nothing
    off = {name: float((found - maps["whole"]).square().mean()) for name, found in maps.items()}
    assert 0 < off["calibrated"] < 0.7 * off["nearest"]
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_what_is_kept_at_more_bits_or_fills_no_groups_is_left_alone(student):
    modules = {f"{name}.weight": module for name, module in student.named_modules()}
    keys = {key for key, module in modules.items() if rounding._calibrates(key, module)}
    assert (
        "encoder.backbone.blocks.0.attn.qkv.weight" in keys and "encoder.backbone.patch_embed.proj.weight" not in keys
    )
    assert not any(modules[key].weight[0].numel() % GROUP for key in keys)
