"""The contract of every decoder in students/decoders, and the encoder's weights, padding, blocks and freezing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill import students
from distill.core import plugins
from distill.students.decoders import dpt, make_norm, sdt, sdt_fast
from distill.students.dysample import DySample
from distill.students.encoder import Encoder, default_indices

DECODERS = plugins.names("distill.students.decoders")
SMALL = {
    "sdt": {"fusion_channels": 16},
    "sdt_fast": {"fusion_channels": 16, "widths": [16, 8, 8, 8]},
    "dpt": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
    "dav2": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
}
DINOV3 = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def tiny(decoder, *, patch=16, depth=4, **options):
    encoder_options = {"timm_options": {"depth": depth, "embed_dim": 32, "patch_size": patch}}
    return students.build(
        encoder="test_vit",
        decoder=decoder,
        encoder_options=encoder_options,
        decoder_options=SMALL.get(decoder, {}) | options,
    )


def randomised(module):
    """Weights of a size that makes every part matter (layer scales and DySample offsets start at almost nothing)."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.02).add_(
                1.0 * name.endswith(("gamma", "norm1.weight"))
            )
    return module


def test_there_are_decoders():
    assert {"dpt", "sdt", "sdt_fast"} <= set(DECODERS)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("decoder", DECODERS)
class TestEveryDecoder:
    @pytest.mark.parametrize("size", [(1, 1), (16, 14), (33, 47), (70, 23)])
    def test_output_has_the_images_size(self, decoder, patch, size):
        with torch.no_grad():
            out, features = tiny(decoder, patch=patch).eval().forward_with_features(torch.rand(2, 3, *size))
        assert out.shape == (2, *size) and out.dtype == torch.float32 and out.isfinite().all()
        assert features.shape == (2, 32, -(-size[0] // patch), -(-size[1] // patch))

    def test_a_batch_is_its_images(self, decoder, patch):
        student, images = randomised(tiny(decoder, patch=patch)).eval(), torch.rand(3, 3, 40, 30)
        with torch.no_grad():
            together, apart = student(images), torch.cat([student(image[None]) for image in images])
        assert together.std() > 0
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4 * together.abs().max().item())

    def test_every_parameter_gets_a_gradient(self, decoder, patch):
        student = randomised(tiny(decoder, patch=patch)).train()
        student(torch.rand(2, 3, 40, 40)).square().mean().backward()
        assert not [name for name, p in student.named_parameters() if p.grad is None]
        # q and k biases may have no effect on a softmax; everything else must have one
        still = [name for name, p in student.named_parameters() if not p.grad.any() and "qkv" not in name]
        assert not still

    def test_bfloat16_autocast_is_finite(self, decoder, patch):
        student = tiny(decoder, patch=patch).train()
        with torch.autocast("cpu", torch.bfloat16):
            out = student(torch.rand(2, 3, 40, 40))
        assert out.dtype == torch.float32
        out.mean().backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())

    def test_spec_is_json_and_builds_the_same(self, decoder, patch):
        student = tiny(decoder, patch=patch)
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


@pytest.mark.parametrize("decoder", DECODERS)
def test_exports_as_plain_modules(decoder):
    student, images = tiny(decoder, depth=1).eval(), torch.rand(1, 3, 40, 30)
    program = torch.export.export(student, (images,))
    torch.testing.assert_close(program.module()(images), student(images))


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


def test_options_of_the_wrong_kind_are_named():
    for options, message in [
        ({"decoder_options": {"fusion_channels": "32"}}, "decoder_options.fusion_channels must be a whole number"),
        ({"decoder_options": {"fusion_channels": -4}}, "decoder_options .*-4"),
        ({"encoder_options": {"final_norm": "no"}}, "encoder_options.final_norm must be true or false"),
        ({"encoder_options": {"mean": [0.5]}}, "encoder_options .*0.5"),
        ({"encoder_options": {"indices": 3}}, "encoder_options .*3"),
        ({"native_size": -3}, "native_size must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            students.build(encoder="test_vit", decoder="sdt", **options)


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


def test_padding_is_the_mean_colour_and_is_cut_off():
    student = randomised(tiny("dpt")).eval()
    images = torch.rand(1, 3, 33, 47)
    left, right, top, bottom = student.encoder.padding(33, 47)
    assert (left, right, top, bottom) == (0, 1, 7, 8)
    padded = student.encoder.mean.expand(1, 3, 48, 48).clone()
    padded[:, :, top : top + 33, left : left + 47] = images
    with torch.no_grad():
        torch.testing.assert_close(student(images), student(padded)[:, top : top + 33, left : left + 47])


def test_images_are_normalised_as_imagenet():
    encoder, images = Encoder("test_vit").eval(), torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = encoder.features((images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(encoder(images)[3], expected[3])


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
        with pytest.raises(ValueError, match="lack output_conv.4.bias"):
            decoder.load_released({k: v for k, v in state.items() if k != "output_conv.4.bias"})
        with pytest.raises(ValueError, match="unclaimed output_conv.5.bias"):
            decoder.load_released(state | {"output_conv.5.bias": torch.zeros(1)})
        with pytest.raises(ValueError, match="another shape for output_conv.4.bias"):
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


def test_depths_and_indices():
    assert {d: default_indices(d) for d in (1, 2, 3, 12, 24, 40)} == {
        1: [0, 0, 0, 0],
        2: [0, 0, 1, 1],
        3: [0, 1, 2, 2],
        12: [2, 5, 8, 11],
        24: [4, 11, 17, 23],
        40: [9, 19, 29, 39],
    }
    with pytest.raises(ValueError, match=r"four rising numbers in 0\.\.5"):
        Encoder("test_vit", indices=[0, 1, 2, 6])
    with pytest.raises(ValueError, match=r"has 0\.\.5, not \[0, 6\]"):
        Encoder("test_vit", blocks=[0, 6])


class TestEncoderWeights:
    def write(self, path, encoder, rename=lambda key: key, dtype=torch.float32):
        state = {rename(k): v.clone().to(dtype) for k, v in encoder.backbone.state_dict().items()}
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        return path

    @pytest.fixture
    def whole(self):
        return randomised(Encoder("test_vit", final_norm=True)).eval()

    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    @pytest.mark.parametrize("prefix", ["", "module.", "pretrained."])
    def test_the_same_features(self, tmp_path, whole, suffix, prefix):
        path = self.write(tmp_path / f"w.{suffix}", whole, lambda key: prefix + key)
        images = torch.rand(1, 3, 32, 48)
        for got, expected in zip(
            Encoder("test_vit", weights=path, final_norm=True)(images), whole(images), strict=True
        ):
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    def test_float16(self, tmp_path, whole):
        path = self.write(tmp_path / "w.safetensors", whole, dtype=torch.float16)
        got = Encoder("test_vit", weights=path).backbone.state_dict()
        assert all(torch.equal(v, whole.backbone.state_dict()[k].half().float()) for k, v in got.items())

    def test_chosen_blocks_take_their_own_weights(self, tmp_path, whole):
        path = self.write(tmp_path / "w.safetensors", whole)
        some = Encoder("test_vit", weights=path, blocks=[0, 2, 5])
        assert len(some.backbone.blocks) == 3 and some.indices == [0, 1, 2, 2]
        for got, index in zip(some.backbone.blocks, (0, 2, 5), strict=True):
            expected = whole.backbone.blocks[index].state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in got.state_dict().items())
        images = torch.rand(1, 3, 32, 48)
        first, start = Encoder("test_vit", weights=path, blocks=[0, 1, 2]), Encoder("test_vit", weights=path)
        assert torch.equal(first(images)[1][0], start(images)[0][0])  # both after block 1

    def test_a_smaller_position_table(self, tmp_path, whole):
        path = self.write(tmp_path / "w.safetensors", whole)
        small = Encoder("test_vit", weights=path, pos_grid=(2, 3))
        assert small.backbone.pos_embed.shape == (1, 1 + 6, 64) and whole.backbone.pos_embed.shape[1] == 101
        images = torch.rand(1, 3, 32, 48)
        torch.testing.assert_close(small(images)[3], Encoder("test_vit", weights=path)(images)[3])

    def test_every_parameter_is_claimed(self, tmp_path, whole):
        state = {k: v.clone() for k, v in whole.backbone.state_dict().items()}
        for changed, message in (
            (state | {"blocks.6.norm1.bias": torch.zeros(64)}, r"w\.pth: .* has unclaimed blocks\.6\.norm1\.bias"),
            ({k: v for k, v in state.items() if k != "norm.bias"}, "lacks norm.bias"),
            (state | {"cls_token": torch.zeros(1, 1, 65)}, "another shape for cls_token"),
        ):
            torch.save(changed, tmp_path / "w.pth")
            with pytest.raises(ValueError, match=message):
                Encoder("test_vit", weights=tmp_path / "w.pth")

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.pth: no such weights file"):
            Encoder("test_vit", weights=tmp_path / "none.pth")
        for name in ("w.pth", "w.safetensors"):
            (tmp_path / name).write_bytes(b"not weights at all")
            with pytest.raises(ValueError, match=f"{name}: not a readable"):
                Encoder("test_vit", weights=tmp_path / name)
        torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
        with pytest.raises(ValueError, match="code.pth: not a readable"):
            Encoder("test_vit", weights=tmp_path / "code.pth")

    def test_dinov2_with_registers(self, tmp_path):
        encoder = randomised(Encoder("vit_small_patch14_reg4_dinov2", timm_options=DINOV3, pos_grid=3))
        state = {k: v.clone() for k, v in encoder.backbone.state_dict().items()} | {"norm.weight": torch.ones(24)}
        cls_position = torch.rand(1, 1, 24)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - cls_position
        state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
        torch.save(state | {"norm.bias": torch.zeros(24), "mask_token": torch.zeros(1, 24)}, tmp_path / "w.pth")
        got = Encoder("dinov2_vits14_reg", timm_options=DINOV3, pos_grid=3, weights=tmp_path / "w.pth")
        for key, value in encoder.backbone.state_dict().items():
            torch.testing.assert_close(got.backbone.state_dict()[key], value)

    def dinov3_file(self, encoder, names):
        """`encoder`'s weights in facebookresearch's or transformers' names."""
        width, state = encoder.channels, {}
        for key, value in encoder.backbone.state_dict().items():
            state[re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", key).replace("reg_token", "storage_tokens")] = value.clone()
        for i in range(len(encoder.backbone.blocks)):
            at = f"blocks.{i}.attn"
            query, content = state.pop(f"{at}.q_bias"), state.pop(f"{at}.v_bias")
            state[f"{at}.qkv.bias"] = torch.cat([query, torch.rand(width), content])
            state[f"{at}.qkv.bias_mask"] = torch.ones(3 * width)
        state |= {
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
            "rope_embed.periods": torch.ones(16),
        }
        if names == "facebook":
            return state
        out = {}
        for key, value in state.items():
            for ours, theirs in (
                ("blocks.", "layer."),
                ("storage_tokens", "embeddings.register_tokens"),
                ("cls_token", "embeddings.cls_token"),
                ("patch_embed.proj", "embeddings.patch_embeddings"),
                ("mlp.fc1", "mlp.up_proj"),
                ("mlp.fc2", "mlp.down_proj"),
                ("attn.proj", "attention.o_proj"),
            ):
                key = key.replace(ours, theirs)
            key = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", key)
            if ".attn.qkv." in key and "mask" not in key:
                for part, values in zip("qkv", value.chunk(3), strict=True):
                    if part != "k" or not key.endswith("bias"):
                        out[key.replace("attn.qkv", f"attention.{part}_proj")] = values.clone()
            elif not key.endswith(("periods", "bias_mask")):
                out[key] = value
        return out

    @pytest.mark.parametrize("names", ["facebook", "transformers"])
    def test_dinov3_names(self, tmp_path, names):
        encoder = randomised(Encoder("dinov3_vits16", timm_options=DINOV3))
        state = self.dinov3_file(encoder, names)
        save_file(state, tmp_path / "w.safetensors")
        got = Encoder("dinov3_vits16", timm_options=DINOV3, weights=tmp_path / "w.safetensors")
        assert all(torch.equal(v, got.backbone.state_dict()[k]) for k, v in encoder.backbone.state_dict().items())
        with pytest.raises(ValueError, match="add _qkvb to its name"):
            Encoder("vit_small_patch16_dinov3", timm_options=DINOV3, weights=tmp_path / "w.safetensors")
        del state[next(key for key in state if re.search(r"1\.att.*(qkv|q_proj)\.weight", key))]
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight"):
            Encoder("dinov3_vits16", timm_options=DINOV3, weights=tmp_path / "w.safetensors")

    def test_a_download_without_network_is_one_line(self):
        with pytest.raises(OSError, match="could not fetch weights for test_vit .*weights=") as caught:
            Encoder("test_vit", weights="pretrained")
        assert "\n" not in str(caught.value)


def test_frozen():
    encoder = Encoder("test_vit", frozen=True, timm_options={"drop_path_rate": 0.5})
    student = students.Student(encoder, sdt.Decoder(64, 16)).train()
    assert student.training and not encoder.training and not encoder.backbone.blocks[0].training
    student(torch.rand(1, 3, 32, 32)).mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 32, 32, requires_grad=True))[3][0].requires_grad
    encoder.freeze(False)
    student.train()(torch.rand(1, 3, 32, 32)).mean().backward()
    assert encoder.training and all(p.grad is not None for p in encoder.parameters())
    assert student.spec["encoder_options"]["frozen"] is False


def test_unread_blocks_are_removed():
    encoder = Encoder("test_vit", indices=[0, 0, 1, 3])
    assert len(encoder.backbone.blocks) == 4
    pairs = encoder(torch.rand(1, 3, 32, 32))
    assert torch.equal(pairs[0][0], pairs[1][0]) and not torch.equal(pairs[1][0], pairs[2][0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": "dinov3_vits61"}, LookupError, "did you mean dinov3_vits16"),
        ({"encoder": "resnet18"}, LookupError, "resnet18 is not a plain ViT"),
        ({"decoder": "dpt1"}, LookupError, r"did you mean dpt\?; students/decoders/ has: dav2, dpt, sdt"),
        ({"encoder_options": {"block": [1]}}, ValueError, "unknown key encoder_options.block; did you mean blocks"),
        ({"decoder_options": {"width": 3}}, ValueError, "unknown key decoder_options.width"),
        ({"encoder_options": {"timm_options": {"checkpoint_path": "x"}}}, ValueError, "may not hold checkpoint_path"),
        ({"encoder_options": {"timm_options": {"wings": 2}}}, ValueError, "test_vit does not take these options"),
        ({"encoder": "dinov3_vits16", "encoder_options": {"pos_grid": 8}}, ValueError, "no position table"),
        ({"decoder": "dpt", "decoder_options": {"readout": "add"}}, ValueError, "readout must be"),
        ({"decoder_options": {"in_channels": [64, 64]}}, ValueError, "a positive number or four of them"),
    ],
)
def test_bad_names_and_options(options, error, message):
    with pytest.raises(error, match=message):
        students.build(**({"encoder": "test_vit", "decoder": "sdt"} | options))


def test_bad_images_are_refused():
    student = tiny("sdt")
    for images in (torch.rand(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.rand(3, 32, 32)):
        with pytest.raises(ValueError, match=r"images must be \(B,3,H,W\) float in \[0,1\]"):
            student(images)
