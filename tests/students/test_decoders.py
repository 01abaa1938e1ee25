"""The contract of every decoder in students/decoders, and each one's own."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill import students
from distill.core import plugins
from distill.students.decoders import dpt, make_norm, sdt, sdt_fast
from distill.students.dysample import DySample
from tests.students.tiny import SMALL, randomised, tiny

DECODERS = plugins.names("distill.students.decoders")


def test_there_are_decoders():
    assert {"dpt", "sdt", "sdt_fast"} <= set(DECODERS)


@pytest.mark.parametrize("decoder", DECODERS)
class TestEveryDecoder:
    @pytest.mark.parametrize("patch", [14, 16])
    def test_output_has_the_images_size(self, decoder, patch):
        student = tiny(decoder, patch=patch).eval()
        for size in [(1, 1), (16, 14), (33, 47), (70, 23)]:
            with torch.no_grad():
                out, features = student(torch.rand(2, 3, *size), with_features=True)
            assert out.shape == (2, *size) and out.dtype == torch.float32 and out.isfinite().all(), size
            assert features.shape == (2, 32, -(-size[0] // patch), -(-size[1] // patch))

    def test_a_batch_is_its_images(self, decoder):
        student, images = randomised(tiny(decoder, patch=14)).eval(), torch.rand(3, 3, 40, 30)
        with torch.no_grad():
            together, apart = student(images), torch.cat([student(image[None]) for image in images])
        assert together.std() > 0
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4 * together.abs().max().item())

    def test_every_parameter_gets_a_gradient(self, decoder):
        student = randomised(tiny(decoder, patch=14)).train()
        student(torch.rand(2, 3, 40, 40)).square().mean().backward()
        assert not [name for name, p in student.named_parameters() if p.grad is None]
        # q and k biases may have no effect on a softmax; everything else must have one
        still = [name for name, p in student.named_parameters() if not p.grad.any() and "qkv" not in name]
        assert not still

    def test_bfloat16_autocast_is_finite(self, decoder):
        student = tiny(decoder, patch=14).train()
        with torch.autocast("cpu", torch.bfloat16):
            out = student(torch.rand(2, 3, 40, 40))
        assert out.dtype == torch.float32
        out.mean().backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())

    def test_spec_is_json_and_builds_the_same(self, decoder):
        student = tiny(decoder, patch=14)
        again = students.build(**json.loads(json.dumps(student.spec)))
        assert again.spec == student.spec
        again.load_state_dict(student.state_dict())
        images = torch.rand(1, 3, 20, 20)
        assert torch.equal(again.eval()(images), student.eval()(images))


@pytest.mark.parametrize("decoder", DECODERS)
def test_learns_one_picture(decoder):
    student = tiny(decoder).train()
    image = torch.rand(1, 3, 32, 32)
    target = torch.linspace(0, 1, 32).expand(1, 32, 32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = F.l1_loss(student(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_exports_as_plain_modules(decoder):
    """Alone: an encoder, and sizes that are not the example's, are for test_export.py."""
    student = tiny(decoder, depth=1).eval()
    features = student.encoder.features(torch.rand(1, 3, 48, 32))
    program = torch.export.export(student.decoder, (features,))
    torch.testing.assert_close(program.module()(features), student.decoder(features))


def test_sdt_fast_is_a_twentieth_of_sdt():
    def flops(decoder):
        features = [(torch.zeros(1, 384, 32, 32, device="meta"), torch.zeros(1, 384, device="meta"))] * 4
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder.to("meta")(features)
        return counter.get_total_flops()

    def params(decoder):
        return sum(p.numel() for p in decoder.parameters())

    assert flops(sdt_fast.Decoder(384)) < flops(sdt.Decoder(384)) / 20
    assert params(sdt_fast.Decoder(384)) < 0.51 * params(sdt.Decoder(384))


def test_dysample_that_has_diverged_gives_nan_and_lives_through_the_gradient():
    sampler, x = DySample(4, groups=1, scope=True), torch.rand(1, 4, 3, 5, requires_grad=True)
    with torch.no_grad():
        sampler.offset.weight.fill_(torch.nan)
    out = sampler(x)
    assert out.shape == (1, 4, 6, 10) and out.isnan().all()
    out.sum().backward()
    assert x.grad.isnan().all()


def test_group_norm_is_of_several_channels():
    assert [make_norm("group", c).num_groups for c in (4, 32, 37, 128, 256)] == [1, 4, 1, 16, 32]
    assert torch.isfinite(sdt.Decoder(8, fusion_channels=32, norm="group").eval()([torch.rand(1, 8, 1, 1)] * 4)).all()


def test_dav2_takes_the_encoders_patch():
    assert tiny("dav2", depth=1).decoder.patch_size == 16


def test_sdt_fast_takes_sdts_fusion_as_it_is():
    """Its names and layers, so that a trained SDT can start one."""
    torch.manual_seed(0)
    ours, theirs = sdt_fast.Decoder(24, fusion_channels=16), sdt.Decoder(24, fusion_channels=16)
    ours.weighted_fusion.load_state_dict(theirs.weighted_fusion.state_dict())
    features = [(torch.randn(2, 24, 3, 4), torch.randn(2, 24)) for _ in range(4)]
    torch.testing.assert_close(ours.weighted_fusion(features), theirs.weighted_fusion(features), atol=0, rtol=0)


def test_sdt_fast_places_detail_inside_the_patch():
    """A pixel shuffle lays channels out row by row: a wrong order would mirror or transpose every patch."""
    detail = sdt_fast.Detail(1, 1, 2, norm="batch").eval()
    with torch.no_grad():
        detail.spread.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1))
        detail.spread.bias.zero_()
        detail.conv.weight.zero_()[0, 0, 1, 1] = 1.0
        found = detail(torch.tensor([[[[1.0, 10.0]]]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([[1.0, 2, 10, 20], [3, 4, 30, 40]]), rtol=1e-4, atol=0)


def test_sdt_fast_refuses_widths_that_dysample_cannot_group():
    with pytest.raises(ValueError, match="multiples of 4, not 256, \\[64, 32, 6, 8\\]"):
        sdt_fast.Decoder(384, widths=[64, 32, 6, 8])
    with pytest.raises(ValueError, match="four widths"):
        sdt_fast.Decoder(384, widths=[64, 32])


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@pytest.mark.parametrize("decoder", ["sdt", "sdt_fast", "dpt"])
def test_norms(decoder, norm):
    student = tiny(decoder, norm=norm).train()
    images = torch.rand(2, 3, 32, 32)
    before = {key: value.clone() for key, value in student.named_buffers()}
    with torch.no_grad():
        together, alone = student(images), student(images[:1])
    moved = [key for key, value in student.named_buffers() if not torch.equal(value, before[key])]
    mixes = not torch.allclose(together[:1], alone, atol=1e-5)
    assert bool(moved) == (norm == "batch") and mixes == (norm == "batch")


def test_frozen_norm_is_batch_norm_in_evaluation():
    batch, frozen = make_norm("batch", 8), make_norm("frozen", 8)
    batch(torch.randn(4, 8, 3, 3) * 3 + 1)
    frozen.load_state_dict(batch.state_dict())
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(frozen.train()(x), batch.eval()(x))


def test_unknown_norm_is_named():
    with pytest.raises(ValueError, match="norm must be one of batch, frozen, group, not 'layer'"):
        tiny("sdt", norm="layer")


class TestReleasedHeads:
    @pytest.mark.parametrize("prefix", ["", "decoder.", "0.decoder.", "module.", "module.0.decoder."])
    @pytest.mark.parametrize("module", [sdt, dpt])
    def test_prefixes(self, module, prefix):
        theirs, ours = (module.Decoder(16, **SMALL[module.__name__.rpartition(".")[2]]) for _ in range(2))
        state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
        if "decoder" in prefix:
            state[prefix.replace("decoder", "encoder") + "backbone.cls_token"] = torch.zeros(1)
        ours.load_released(state)
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())

    def test_every_misfit_is_named(self):
        decoder = sdt.Decoder(16, 16)
        state = dict(decoder.state_dict())
        with pytest.raises(ValueError, match="lacks output_conv.4.bias"):
            decoder.load_released({k: v for k, v in state.items() if k != "output_conv.4.bias"})
        with pytest.raises(ValueError, match="has unknown output_conv.5.bias"):
            decoder.load_released(state | {"output_conv.5.bias": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"another shape for output_conv.4.bias \(\(2,\), not \(1,\)\)"):
            decoder.load_released(state | {"output_conv.4.bias": torch.zeros(2)})

    def test_counters_may_be_missing(self):
        decoder = sdt.Decoder(16, 16)
        state = {k: v for k, v in decoder.state_dict().items() if not k.endswith(("init_pos", "tracked"))}
        assert decoder.load_released(state) is decoder


def test_dpt_without_cls_says_what_to_do():
    maps = [torch.rand(1, 16, 2, 3)] * 4
    with pytest.raises(ValueError, match='readout="ignore"'):
        dpt.Decoder(16, **SMALL["dpt"])(maps)
    assert dpt.Decoder(16, **SMALL["dpt"], readout="ignore", norm="none")(maps).shape == (1, 1, 32, 64)


@pytest.mark.parametrize(("detail", "upsample"), [(False, "bilinear"), (True, "bilinear"), (False, "dysample")])
def test_sdts_switches_leave_the_rest_as_it_is_and_released_weights_loadable(detail, upsample):
    whole, maps = sdt.Decoder(16, 16), [(torch.rand(1, 16, 2, 3), torch.rand(1, 16))] * 4
    assert set(whole.options) == {
        "in_channels",
        "fusion_channels",
        "use_cls_token",
        "norm",
    }  # stored students are these
    for name, parameter in whole.named_parameters():
        if "dysample" in name and name.endswith("offset.weight") and upsample == "bilinear":
            torch.nn.init.zeros_(parameter)
        elif "detail_enhancer.norm" in name and not detail:
            torch.nn.init.zeros_(parameter)
    less = sdt.Decoder(16, 16, detail=detail, upsample=upsample).load_released(whole.state_dict())
    left = set(dict(whole.named_parameters())) - set(dict(less.named_parameters()))
    assert {name.partition(".")[0] for name in left if "dysample" not in name} == (
        set() if detail else {"detail_enhancer"}
    )
    assert any("dysample" in name for name in left) is (upsample == "bilinear")
    if detail:  # without it, the ReLU is gone too
        torch.testing.assert_close(less.eval()(maps), whole.eval()(maps))
    assert less(maps).shape == (1, 1, 32, 48)
    with pytest.raises(ValueError, match="upsample must be one of dysample, bilinear"):
        sdt.Decoder(16, 16, upsample="nearest")


def test_dysample_without_offsets_is_bilinear():
    module = DySample(8, scope=True)
    torch.nn.init.zeros_(module.offset.weight)
    x = torch.rand(2, 8, 5, 7)
    torch.testing.assert_close(module(x), F.interpolate(x, scale_factor=2, mode="bilinear"))


def test_dysample_keeps_its_positions_in_bfloat16():
    """Neighbours differ by 1 and bfloat16 cannot tell 300 from 301: computed in it, points land on other pixels."""
    module = DySample(4).bfloat16()
    torch.nn.init.zeros_(module.offset.weight)
    x = torch.rand(1, 4, 1, 600).bfloat16()
    expected = F.interpolate(x.float(), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(module(x).float(), expected, atol=0.01, rtol=0)
