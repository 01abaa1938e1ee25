"""The encoder: its weights, padding, blocks and freezing."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from distill import students
from distill.students import encoder
from distill.students.decoders import sdt
from distill.students.encoder import Encoder, default_indices, statistics
from tests.students.tiny import DINOV3, randomised, tiny


def test_padding_is_the_mean_colour_and_is_cut_off():
    student = randomised(tiny("dpt")).eval()
    images = torch.rand(1, 3, 33, 47)
    left, right, top, bottom = student.encoder.padding(33, 47)
    assert (left, right, top, bottom) == (0, 1, 7, 8)
    padded = student.encoder.mean.expand(1, 3, 48, 48).clone()
    padded[:, :, top : top + 33, left : left + 47] = images
    with torch.no_grad():
        torch.testing.assert_close(student(images), student(padded)[:, top : top + 33, left : left + 47])


def test_images_are_normalised_as_the_weights_were_trained():
    encoder, images = Encoder("test_vit").eval(), torch.rand(1, 3, 32, 32)
    expected = encoder.features((images - 0.5) / 0.5)  # as timm states of this name
    torch.testing.assert_close(encoder(images)[3], expected[3])


def test_statistics_belong_to_the_weights(tmp_path):
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics("dinov3_vits16") == statistics("dinov2_vitb14") == imagenet
    satellite = statistics("vit_large_patch16_dinov3.sat493m")
    assert satellite[0] == (0.43, 0.411, 0.296)
    assert statistics("dinov3_vitl16", tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth") == satellite
    assert statistics("dinov3_vitl16", tmp_path / "model.safetensors") == imagenet
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    assert statistics("dinov3_vitl16", tmp_path / "model.safetensors") == ((0.1, 0.2, 0.3), (1, 1, 1))


def test_statistics_of_a_name_with_several_weights(tmp_path, caplog):
    halves, imagenet = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for file in ("mae_pretrain_vit_base.pth", "dino_vitbase16_pretrain.pth"):
        assert statistics("vit_base_patch16_224", tmp_path / file) == imagenet
    assert statistics("vit_base_patch16_224") == halves and not caplog.messages
    assert statistics("vit_base_patch16_224", tmp_path / "mine.pth") == halves
    assert "mine.pth: took the mean [0.5, 0.5, 0.5] of timm's augreg2_in21k_ft_in1k, but its" in caplog.text
    assert statistics("vit_base_patch16_224.mae", tmp_path / "mine.pth") == imagenet and len(caplog.messages) == 1
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}')
    assert statistics("vit_base_patch16_224", tmp_path / "mine.pth") == ((0.1, 0.2, 0.3), (1, 1, 1))


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
            (state | {"blocks.6.norm1.bias": torch.zeros(64)}, r"w\.pth: .* has unknown blocks\.6\.norm1\.bias"),
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
            with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
                Encoder("test_vit", weights=tmp_path / name)
        torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
        with pytest.raises(ValueError, match="code.pth cannot be read as weights"):
            Encoder("test_vit", weights=tmp_path / "code.pth")

    def test_dinov2_with_registers(self, tmp_path):
        encoder = randomised(Encoder("vit_small_patch14_reg4_dinov2", timm_options=DINOV3, pos_grid=3))
        state = {k: v.clone() for k, v in encoder.backbone.state_dict().items()} | {"norm.weight": torch.ones(24)}
        cls_position = torch.rand(1, 1, 24)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - cls_position
        state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
        torch.save(
            state
            | {"norm.bias": torch.zeros(24), "mask_token": torch.zeros(1, 24), "masked_embed": torch.zeros(1, 24)},
            tmp_path / "w.pth",
        )
        got = Encoder("dinov2_vits14_reg", timm_options=DINOV3, pos_grid=3, weights=tmp_path / "w.pth")
        for key, value in encoder.backbone.state_dict().items():
            torch.testing.assert_close(got.backbone.state_dict()[key], value)

    def test_openmmlab_names(self, tmp_path):
        encoder = randomised(Encoder("dinov2_vits14", timm_options=DINOV3, pos_grid=3))
        state = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
        state |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24), "mask_token": torch.zeros(1, 24)}
        for ours, theirs in (
            ("patch_embed.proj", "patch_embed.projection"), (r"^blocks", "layers"), (r"^norm\.", "ln1."),
            (r"\.norm", ".ln"), (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"),
            (r"ls1\.gamma", "attn.gamma1.weight"), (r"ls2\.gamma", "ffn.gamma2.weight"),
        ):  # fmt: skip
            state = {re.sub(ours, theirs, key): value for key, value in state.items()}
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
        got = Encoder("dinov2_vits14", timm_options=DINOV3, pos_grid=3, weights=tmp_path / "w.pth")
        assert all(torch.equal(v, got.backbone.state_dict()[k]) for k, v in encoder.backbone.state_dict().items())

    def dinov3_file(self, encoder, names):
        """`encoder`'s weights in facebookresearch's or transformers' names."""
        width, state = encoder.channels, {}
        for key, value in encoder.backbone.state_dict().items():
            state[re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", key).replace("reg_token", "storage_tokens")] = value.clone()
        for i in range(len(encoder.backbone.blocks)):
            at = f"blocks.{i}.attn"
            query, content = state.pop(f"{at}.q_bias"), state.pop(f"{at}.v_bias")
            state[f"{at}.qkv.bias"] = torch.cat([query, torch.rand(width), content])
            state[f"{at}.qkv.bias_mask"] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
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
        if names == "transformers":  # key_bias = true: nothing of it may be lost unsaid
            save_file(state | {"layer.0.attention.k_proj.bias": torch.rand(24)}, tmp_path / "w.safetensors")
            with pytest.raises(ValueError, match="k.bias is not zero"):
                Encoder("dinov3_vits16", timm_options=DINOV3, weights=tmp_path / "w.safetensors")
            save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="add _qkvb to its name"):
            Encoder("vit_small_patch16_dinov3", timm_options=DINOV3, weights=tmp_path / "w.safetensors")
        one_number = {
            key: F.one_hot(torch.tensor(0), len(value)).float() if re.search(r"(qkv|[qv]_proj)\.bias", key) else value
            for key, value in state.items()
        }
        save_file(one_number, tmp_path / "w.safetensors")
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


def test_weights_of_another_encoder_name_theirs(monkeypatch):
    """As facebookresearch/dinov2#218 and its kin: registers, sizes and versions are easily taken for another."""
    made = {}
    for name in ("dinov2_vits14", "dinov2_vits14_reg"):
        with torch.device("meta"):
            made[name] = encoder._create(encoder.ALIASES[name], None, {"depth": 1})
    monkeypatch.setattr(encoder, "_create", lambda name, *_: made["dinov2_vits14" + "_reg" * ("reg4" in name)])
    with pytest.raises(ValueError, match=r"w.pth: .* has unknown reg_token; .*; they are of dinov2_vits14_reg"):
        encoder._load(made["dinov2_vits14"], made["dinov2_vits14_reg"].state_dict(), "w.pth")


def test_a_hub_id_in_place_of_an_encoder_is_told_its_name():
    with pytest.raises(LookupError, match="did you mean dinov3_vits16plus, with its file as weights"):
        Encoder("facebook/dinov3-vits16plus-pretrain-lvd1689m")


def transformers_names(state):
    """A DINOv2's tensors as transformers names those of one block."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    out = {}
    for key, value in state.items():
        key = names.get(key, key).replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = key.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        key = re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", re.sub(r"^norm\.", "layernorm.", key))
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True) if ".attn.qkv." in key else [("", value)]
        out |= {key.replace("attn.qkv", f"attention.attention.{part}"): piece.clone() for part, piece in parts}
    return out


def test_tensors_of_odd_dimensions_are_refused_and_a_dinov2_has_a_key_bias(tmp_path):
    options = {"timm_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "pos_grid": 2, "final_norm": True}
    own = dict(randomised(Encoder("dinov2_vits14", **options)).backbone.state_dict())
    theirs, file = transformers_names(own), tmp_path / "w.safetensors"
    save_file(theirs, file)
    assert all(
        torch.equal(v, own[k])
        for k, v in Encoder("dinov2_vits14", weights=file, **options).backbone.state_dict().items()
    )
    query = "encoder.layer.0.attention.attention.query.weight"
    for state, said in (
        (
            own | {"patch_embed.proj.weight": own["patch_embed.proj.weight"].flatten(1)},
            r"patch_embed.proj.weight \(\(24, 588",
        ),
        (own | {"pos_embed": own["pos_embed"].flatten()}, r"pos_embed \(\(120,\)"),
        (theirs | {query: theirs[query].flatten()}, r"attn.q.weight .* have the shapes \(576,\), \(24, 24\)"),
        (
            {k: v for k, v in theirs.items() if not k.endswith(".key.bias")},
            r"blocks.0.attn.qkv.bias \(\(48,\), not \(72,",
        ),
    ):
        save_file(state, file)
        with pytest.raises(ValueError, match=f"w.safetensors.*{said}"):
            Encoder("dinov2_vits14", weights=file, **options)


def test_what_timm_says_becomes_one_sentence(monkeypatch):
    def offline(name, **options):
        raise OSError("No connection is on.\nTraceback")

    monkeypatch.setattr(encoder.timm, "create_model", offline)
    with pytest.raises(OSError, match=r"No connection is on\. Download them yourself"):
        encoder._download("vit_small_patch16_dinov3")
