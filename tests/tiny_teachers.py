"""Tiny random checkpoints in the formats that teachers' authors publish: one maker per plug-in, `NAME(folder)`.

Each returns (weights, options) for `teachers.NAME.Teacher.load`.
"""

from __future__ import annotations

import json

import numpy as np
import safetensors.torch
import torch

from distill import students
from distill.students import checkpoint as checkpoints
from distill.teachers import _dpt_head
from distill.teachers._da3_network import Network, NetworkLayout
from distill.teachers._moge_network import Network as MogeNetwork

SIZE = (37, 53)  # of the contract tests' images: a multiple of no patch size
KEYS = ("scene/a.png", "scene/b.png")


def _randomize(module):
    """Random parameters of a trained network's magnitude, so that zeros do not hide errors."""
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        fan_in = max(1, parameter[0].numel() if parameter.ndim > 1 else 1)
        parameter.data = noise / fan_in**0.5 if parameter.ndim > 1 else 0.5 + 0.1 * noise
    return module


def analytic(folder):
    return "none", {}


def stored(folder):
    rng = np.random.default_rng(0)
    for key in KEYS:
        path = (folder / key).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.random(SIZE, dtype=np.float32))
    return str(folder), {"kind": "affine_disparity"}


def checkpoint(folder):
    student = students.build(
        encoder="test_vit",
        encoder_options={"timm_options": {"depth": 3, "embed_dim": 32}, "blocks": [0, 2], "pos_grid": 4},
        decoder="sdt",
        decoder_options={"fusion_channels": 16},
        native_size=48,
    )
    card = {"name": "tiny", "licence": "Apache-2.0", "commercial": True}
    checkpoints.save(_randomize(student).eval(), folder / "student", card=card)
    return str(folder / "student"), {}


def depth_anything_v2(folder):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    _randomize(DepthAnythingForDepthEstimation(config)).save_pretrained(folder)
    return str(folder), {"native_size": 56}


def da3(folder, *, main=False, name="da3mono-large"):
    layout = NetworkLayout(
        width=64, blocks=4, heads=2 if main else 1, hidden=128, swiglu=False, positions=26, taps=(0, 1, 2, 3),
        main_from=2 if main else None, features=16, channels=(8, 8, 16, 16), sky=not main,
    )  # fmt: skip
    network = _randomize(Network(layout))
    for name_, parameter in network.named_parameters():
        if "output_conv2.2.weight" in name_:
            parameter.data *= 0.1  # exp of the logit: keep it small
        if name_.endswith("sky_output_conv2.2.bias"):
            parameter.data -= 0.19  # some sky and some not
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    starts = {key: 2 if main else -1 for key in ("alt_start", "qknorm_start", "rope_start")}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config = {"model_name": name, "config": {"net": {"out_layers": [0, 1, 2, 3], **starts}}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), {"native_size": 56}


def depth_anything_3(folder):
    return da3(folder)


def midas(folder):
    from transformers import BeitConfig, DPTConfig, DPTForDepthEstimation

    backbone = BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16,
        use_relative_position_bias=True, out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )  # fmt: skip
    config = DPTConfig(
        backbone_config=backbone, hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        use_bias_in_fusion_residual=True,
    )  # fmt: skip
    _randomize(DPTForDepthEstimation(config)).save_pretrained(folder)
    return str(folder), {}


def depth_pro(folder):
    """Squares of 256 from patches of 64; a field of view near 55 degrees, and an inverse depth that is rarely 0."""
    from transformers import DepthProConfig, DepthProForDepthEstimation

    vit = {
        "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "use_mask_token": False,
    }  # fmt: skip
    config = DepthProConfig(
        patch_size=64, fusion_hidden_size=8, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8],
        scaled_images_feature_dims=[16, 16, 8], merge_padding_value=1, use_fov_model=True,
        **{f"{name}_model_config": dict(vit) for name in ("image", "patch", "fov")},
    )  # fmt: skip
    model = _randomize(DepthProForDepthEstimation(config))
    model.fov_model.head.layers[4].bias.data.fill_(55.0)
    model.head.layers[4].bias.data.fill_(2.0)
    model.save_pretrained(folder)
    return str(folder), {}


def moge(folder):
    """Points near a plane in front of the camera, and a mask that excludes none of them."""
    stack = {
        "dim_res_blocks": [16, 8, 8, 8, 8], "num_res_blocks": [0, 1, 1, 1, 0], "res_block_in_norm": "none",
        "res_block_hidden_norm": "none", "resamplers": [*["conv_transpose"] * 3, "bilinear"],
    }  # fmt: skip
    into, out = [16, 8, 8, 8, 8], [None, None, None, None]
    description = {
        "encoder": {"backbone": "tiny", "intermediate_layers": 2, "dim_out": 16},
        "neck": stack | {"dim_in": [18, 2, 2, 2, 2], "dim_out": None},
        "points_head": stack | {"dim_in": into, "dim_out": [*out, 3]},
        "mask_head": stack | {"dim_in": into, "dim_out": [*out, 1]},
        "scale_head": {"dims": [32, 16, 1]},
        "remap_output": "exp",
        "num_tokens_range": [4, 16],
    }
    layout = NetworkLayout(
        width=32, blocks=2, heads=1, hidden=64, swiglu=False, positions=26, taps=(0, 1), main_from=None, features=0,
        channels=(), sky=False,
    )  # fmt: skip
    network = _randomize(MogeNetwork(layout, description))
    network.mask_head.output_blocks[4].bias.data.fill_(50.0)
    # x / z and y / z equal the position in the view, an input of the finest level, and log z comes from the image; the
    # features of coarser levels are kept small relative to the position.
    for stack_ in (network.neck, network.points_head):
        stack_.resamplers[3][1].weight.data *= 0.05
        stack_.resamplers[3][1].bias.data.zero_()
        stack_.input_blocks[4].weight.data[:, :, 0, 0] = torch.eye(*stack_.input_blocks[4].weight.shape[:2])
        stack_.input_blocks[4].bias.data.zero_()
    last = network.points_head.output_blocks[4]
    last.weight.data[:2, :, 0, 0], last.bias.data[:] = torch.eye(2, 8), 0.0
    last.weight.data[2, :2] = 0.0
    state = {**network.state_dict(), "encoder.backbone.mask_token": torch.zeros(1, 32)}
    torch.save({"model_config": description, "model": state}, folder / "model.pt")
    return str(folder), {"native_size": 56}


def diffusion(folder, *, channels, scheduler=None, blocks=2, index=None):
    """Write a folder of Stable Diffusion parts in diffusers' format."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    crossed, plain = ["CrossAttnDownBlock2D"] * (blocks - 1), ["DownBlock2D"]
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, layers_per_block=1, cross_attention_dim=16,
        block_out_channels=(8, 16, 16, 16)[:blocks], attention_head_dim=2, norm_num_groups=4,
        down_block_types=crossed + plain, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (blocks - 1),
        use_linear_projection=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    )  # fmt: skip
    letters = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=4, eos_token_id=5,
        )
    )  # fmt: skip
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        _randomize(module).save_pretrained(folder / part)
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": letters[4], "eos_token": letters[5], "unk_token": letters[5], "pad_token": letters[5]}
    (tokens / "tokenizer_config.json").write_text(json.dumps({**special, "tokenizer_class": "CLIPTokenizer"}))
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def marigold(folder):
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    index = {"default_denoising_steps": 2, "default_processing_resolution": 48}
    return diffusion(folder, channels=8, scheduler=scheduler, index=index), {}


def genpercept(folder):
    return diffusion(folder, channels=4), {"native_size": 48}


def genpercept_head(folder):
    """GenPercept with a DPT head on a UNet of four blocks."""
    weights = diffusion(folder, channels=4, blocks=4)
    (folder / "dpt_head_identity").mkdir()
    head = _randomize(_dpt_head.DptHead([8, 16, 16, 16], 8, 8))
    safetensors.torch.save_file(head.state_dict(), folder / "dpt_head_identity" / "model.safetensors")
    return weights, {"native_size": 48}


def fiffdepth(folder):
    return diffusion(folder, channels=4, index={"default_processing_resolution": 48}), {}


# --- larger ones, for speed -------------------------------------------------------------------------------------------


def depth_anything_v2_small(folder):
    """Random weights of the published Small size, in transformers' format."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14,
        out_indices=[3, 6, 9, 12], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64, head_hidden_size=32,
    )  # fmt: skip
    _randomize(DepthAnythingForDepthEstimation(config)).save_pretrained(folder)
    return str(folder)


def depth_anything_3_small(folder):
    """The mono network with a ViT-S."""
    layout = NetworkLayout(
        width=384, blocks=12, heads=6, hidden=1536, swiglu=False, positions=1370, taps=(2, 5, 8, 11),
        main_from=None, features=64, channels=(48, 96, 192, 384), sky=True,
    )  # fmt: skip
    network = _randomize(Network(layout))
    for name, parameter in network.named_parameters():
        if "output_conv2.2.weight" in name:
            parameter.data *= 0.1
    safetensors.torch.save_file(
        {f"model.{key}": value for key, value in network.state_dict().items()}, folder / "model.safetensors"
    )
    return str(folder)


def diffusion_small(folder, name):
    """A Stable Diffusion of a fifth of the width, with its blocks, attention and factor of 8."""
    import diffusers

    maker = {"marigold": marigold, "genpercept": genpercept, "fiffdepth": fiffdepth}[name]
    weights, _ = maker(folder)
    widths = (64, 128, 256, 256)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, in_channels=8 if name == "marigold" else 4, out_channels=4, layers_per_block=2,
        cross_attention_dim=16, block_out_channels=widths, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    _randomize(unet).save_pretrained(folder / "unet")
    _randomize(vae).save_pretrained(folder / "vae")
    return weights
