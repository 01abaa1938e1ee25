"""Marigold, GenPercept and FiffDepth, one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from distill import teachers
from distill.core.depth import Kind
from distill.teachers import (
    WeightsMismatchError,
    WeightsMissingError,
    fiffdepth,
    genpercept,
    marigold,
)
from tests.teachers.asking import IMAGES, load
from tests.tiny_teachers import KEYS, SIZE


@pytest.mark.parametrize("name", ["genpercept", "fiffdepth"])
def test_one_step_teachers_take_the_diffusion_teachers_options(made, name):
    images = torch.rand(1, 3, 32, 40)
    teacher = load(made, name, steps=1, ensemble=1)
    assert torch.equal(teacher.predict(images, noise=torch.rand(1, 4, 4, 5)).values, teacher.predict(images).values)
    with pytest.raises(ValueError, match="steps and ensemble must be 1"):
        load(made, name, ensemble=5)


@pytest.mark.parametrize("name", ["marigold", "genpercept", "fiffdepth"])
@pytest.mark.parametrize(("native_size", "shape"), [(48, (3, 90)), (0, (60, 2))])
def test_a_strip_is_at_least_one_latent_high(made, name, native_size, shape):
    found = load(made, name, native_size=native_size).predict(torch.rand(1, 3, *shape))
    assert found.values.shape == (1, *shape) and found.valid.all()


class TestMarigold:
    def test_noise_belongs_to_the_key(self, made):
        teacher = load(made, "marigold")
        a = teacher.predict(IMAGES[[0, 0]], keys=["a", "b"]).values
        b = teacher.predict(IMAGES[[0, 0]], keys=["b", "a"]).values
        torch.testing.assert_close(a, b.flip(0), atol=2e-5, rtol=2e-5)
        assert (a[0] - a[1]).abs().max() > 1e-3
        plain = teacher.predict(IMAGES[[0, 0]]).values
        torch.testing.assert_close(plain[0], plain[1], atol=2e-5, rtol=2e-5)  # one seed for every image
        other = load(made, "marigold", seed=1).predict(IMAGES[[0]], keys=["a"]).values
        assert (a[0] - other[0]).abs().max() > 1e-3

    def test_given_noise(self, made):
        teacher = load(made, "marigold", resize="none", ensemble=2, steps=1)
        noise = torch.randn(4, 4, 10, 14)  # 37 x 53 padded to 40 x 56, four pixels to a latent
        out = teacher.predict(IMAGES, noise=noise).values
        swapped = teacher.predict(IMAGES.flip(0), noise=noise[[2, 3, 0, 1]]).values
        assert torch.equal(out, swapped.flip(0)), "an image's members lie next to one another, and see it alone"
        with pytest.raises(ValueError, match=r"noise must be .* \(4, 4, 10, 14\)"):
            teacher.predict(IMAGES, noise=noise[:2])
        with pytest.raises(ValueError, match="1 keys for 2 images"):
            teacher.predict(IMAGES, keys=["a"])

    def test_ensemble_is_independent_of_the_batch(self, made):
        teacher = load(made, "marigold", ensemble=3, steps=1)
        both = teacher.predict(IMAGES, keys=KEYS).values
        for i, key in enumerate(KEYS):
            torch.testing.assert_close(teacher.predict(IMAGES[[i]], keys=[key]).values[0], both[i], atol=1e-3, rtol=0)
        assert both.min() >= 0 and both.max() <= 1

    def test_steps(self, made):
        assert load(made, "marigold").steps == 2
        one, four = (load(made, "marigold", steps=n).predict(IMAGES).values for n in (1, 4))
        assert (one - four).abs().max() > 1e-3
        for bad in ({"steps": 0}, {"ensemble": 0}):
            with pytest.raises(ValueError, match="at least 1"):
                load(made, "marigold", **bad)

    def test_consistency_scheduler(self, made, copy):
        import diffusers

        folder = copy("marigold")
        config = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config
        diffusers.LCMScheduler.from_config(config, timestep_spacing="leading").save_pretrained(folder / "scheduler")
        teacher = marigold.Teacher.load(str(folder), steps=3)
        out = teacher.predict(IMAGES, keys=KEYS)
        again = teacher.predict(IMAGES.flip(0), keys=KEYS[::-1]).values.flip(0)
        torch.testing.assert_close(again, out.values, atol=2e-5, rtol=2e-5)  # noise between steps is the image's own
        two = marigold.Teacher.load(str(folder), steps=2, ensemble=2, resize="none")
        noise = torch.randn(2, 4, 10, 14)
        one, other = (two.predict(IMAGES[:1], noise=noise, keys=[key]).values for key in KEYS)
        assert (one - other).abs().max() > 1e-3, "given noise is the first noise only"
        seen = []
        two._denoise = lambda _, noise, generators: seen.append(noise) or torch.randn(1, 8, 8, generator=generators[0])
        two.predict(IMAGES[:1])
        authors = torch.Generator().manual_seed(1234)
        for drawn in seen:
            assert torch.equal(drawn, torch.randn(drawn.shape, generator=authors)), (
                "a member is finished before the next"
            )
            torch.randn(1, 8, 8, generator=authors)
        assert len(seen) == 2
        with pytest.raises(ValueError, match="steps must be 1 to 4"):
            marigold.Teacher.load(str(folder), steps=5)

    def test_refuses_another_scheduler_or_family(self, copy, made):
        folder = copy("marigold")
        table = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(table | {"_class_name": "PNDM"}))
        with pytest.raises(teachers.WeightsMismatchError, match="not PNDM"):
            marigold.Teacher.load(str(folder))
        with pytest.raises(teachers.WeightsMismatchError, match="takes 8 channels, FiffDepth takes 4"):
            fiffdepth.Teacher.load(made("marigold")[0])

    def test_long_side_rule(self):
        """The authors' floats: 1226 wide at 768 gives 767, and the values are rounded to 8 bits again."""
        from distill.teachers._latent import resize_long_side

        sized = resize_long_side(torch.rand(1, 3, 370, 1226), 768)
        assert sized.shape[-2:] == (231, 767)
        torch.testing.assert_close(sized * 255, (sized * 255).round())
        grey = torch.randint(0, 255, (1, 3, 20, 30)) / 255
        assert torch.equal(resize_long_side(grey + 0.4 / 255, 24), resize_long_side(grey, 24)), "and before"

    def test_a_map_comes_back_to_the_images_size_or_without_its_padding(self):
        from distill.teachers._latent import restore

        images, padded, values = torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 8, 8), torch.rand(1, 8, 8) * 1.5
        given = {"images": images, "sized": padded, "kind": Kind.AFFINE_DEPTH}
        cut = restore(values, resize="none", **given).values
        assert torch.equal(cut, values[:, :6].clip(0, 1))
        larger = torch.rand(1, 16, 16)  # a head's map of another size
        expected = F.interpolate(larger[None], (8, 8), mode="bilinear", antialias=True)[0, :, :6]
        assert torch.equal(restore(larger, resize="none", **given).values, expected.clip(0, 1))
        sized = F.interpolate(values[None], (6, 8), mode="bilinear", antialias=True)[0].clip(0, 1)
        assert torch.equal(restore(values, resize="native", **given).values, sized)


class TestOldLayouts:
    """Published files differ from what today's libraries write; the maps must not."""

    def rewrite(self, file, change):
        whole = safetensors.torch.load(file.read_bytes())  # not mapped into memory: the file is written again
        state = {change(key): value for key, value in whole.items()}
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})
        return state

    def test_text_encoder_prefix_and_position_ids(self, copy, made):
        expected = load(made, "fiffdepth").predict(IMAGES).values
        folder = copy("fiffdepth")
        file = folder / "text_encoder" / "model.safetensors"
        for prefix in ("text_model.", ""):
            state = self.rewrite(file, lambda key, p=prefix: p + key.removeprefix("text_model."))
            state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
            safetensors.torch.save_file(state, file)
            assert torch.equal(fiffdepth.Teacher.load(str(folder)).predict(IMAGES).values, expected)
            self.rewrite(file, lambda key: key)

    def test_vae_attention_names(self, copy, made):
        expected = load(made, "fiffdepth").predict(IMAGES).values
        folder = copy("fiffdepth")
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

        def rename(key):
            for new, name in old.items():
                key = key.replace(new, name)
            return key

        state = self.rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", rename)
        assert any(".query." in key for key in state)
        assert torch.equal(fiffdepth.Teacher.load(str(folder)).predict(IMAGES).values, expected)


class TestGenPercept:
    def test_mode_is_the_kind(self, made, tmp_path):
        maps = {mode: load(made, "genpercept", mode=mode).predict(IMAGES) for mode in ("depth", "disparity")}
        assert maps["depth"].kind == Kind.AFFINE_DEPTH and maps["disparity"].kind == Kind.AFFINE_DISPARITY
        assert torch.equal(maps["depth"].values, maps["disparity"].values)
        shutil.copytree(made("genpercept")[0], tmp_path / "genpercept-disparity")
        assert genpercept.Teacher.load(str(tmp_path / "genpercept-disparity")).card.kind == Kind.AFFINE_DISPARITY
        with pytest.raises(ValueError, match='mode must be "depth" or "disparity"'):
            load(made, "genpercept", mode="normal")

    def test_sign(self, made, tmp_path):
        """GenPercept's latent is minus the UNet's output, FiffDepth's is plus it, at t = 0."""
        folder = Path(made("genpercept")[0])
        same = fiffdepth.Teacher.load(str(folder), native_size=48)
        other = genpercept.Teacher.load(str(folder), native_size=48, timestep=0)
        for part in (same.parts.vae.decoder.conv_out, other.parts.vae.decoder.conv_out):
            part.bias.data.zero_()
        assert (same.predict(IMAGES).values - other.predict(IMAGES).values).abs().max() > 1e-3

    def test_one_that_was_trained_here_is_asked_at_the_index_that_it_learnt(self, copy):
        folder = copy("genpercept")
        assert genpercept.Teacher.load(str(folder)).timestep == 1
        (folder / "distill.json").write_text('{"teacher": "genpercept", "kind": "affine_depth", "timestep": 200}')
        assert genpercept.Teacher.load(str(folder)).timestep == 200
        assert genpercept.Teacher.load(str(folder), timestep=0).timestep == 0
        (folder / "distill.json").write_text('{"teacher": "genpercept", "kind": "affine_disparity"}')
        assert genpercept.Teacher.load(str(folder)).card.kind == Kind.AFFINE_DISPARITY
        (folder / "distill.json").write_text('{"teacher": "genpercept", "kind": ["affine_depth"]}')
        with pytest.raises(ValueError, match=r"distill.json: kind is \['affine_depth'\], which is no kind of map"):
            genpercept.Teacher.load(str(folder))

    @pytest.mark.parametrize("own_config", [True, False])
    def test_lone_unet(self, made, tmp_path, own_config):
        whole = made("genpercept")[0]
        lone = tmp_path / "unet_disparity_v2"
        shutil.copytree(Path(whole) / "unet", lone)
        if not own_config:
            (lone / "config.json").unlink()
        teacher = genpercept.Teacher.load(str(lone), base=whole, native_size=48)
        assert teacher.card.kind == Kind.AFFINE_DISPARITY
        assert torch.equal(teacher.predict(IMAGES).values, load(made, "genpercept").predict(IMAGES).values)
        with pytest.raises(OSError, match="stable-diffusion-2-1"):
            genpercept.Teacher.load(str(lone))

    def test_head(self, made, tmp_path):
        teacher = genpercept.Teacher.load(made("genpercept_head")[0], native_size=48)
        out = teacher.predict(IMAGES)
        assert out.values.shape == (2, *SIZE) and teacher.head is not None
        one = teacher.predict(IMAGES[1:])
        torch.testing.assert_close(one.values, out.values[1:], atol=2e-5, rtol=2e-5)  # min and max are per image
        lone = tmp_path / "unet_disparity_dpt_head_v2"
        shutil.copytree(Path(made("genpercept_head")[0]) / "unet", lone)
        with pytest.raises(OSError, match="give head="):
            genpercept.Teacher.load(str(lone), base=made("genpercept_head")[0])
        head = Path(made("genpercept_head")[0]) / "dpt_head_identity"
        again = genpercept.Teacher.load(str(lone), base=made("genpercept_head")[0], head=str(head), native_size=48)
        assert torch.equal(again.predict(IMAGES).values, out.values)

    def test_headless_unet(self, copy):
        """Released UNets for the head may lack the last convolution, which it does not use."""
        folder = copy("genpercept_head")
        expected = genpercept.Teacher.load(str(folder), native_size=48).predict(IMAGES).values
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = safetensors.torch.load_file(file)
        kept = {key: value for key, value in state.items() if not key.startswith(("conv_out", "conv_norm_out"))}
        assert len(kept) == len(state) - 4
        safetensors.torch.save_file(kept, file)
        assert torch.equal(genpercept.Teacher.load(str(folder), native_size=48).predict(IMAGES).values, expected)


def test_a_vae_that_does_not_fit_works_image_by_image_and_then_in_tiles(made):
    from distill.teachers._latent import within_memory

    vae = load(made, "marigold").parts.vae
    vae.disable_slicing()
    tried = []

    def work():
        tried.append((vae.use_slicing, vae.use_tiling))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(1)

    assert within_memory(vae, work) == 1
    assert tried == [(False, False), (True, False), (True, True)]
    vae.disable_tiling()


def test_a_trainers_folder_says_what_it_lacks(copy):
    """As prs-eth/Marigold#89 has it: output/checkpoint/latest/unet and nothing else."""
    folder = copy("marigold")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    with pytest.raises(WeightsMissingError, match="lacks vae, text_encoder, tokenizer: copy them from the checkpoint"):
        marigold.Teacher.load(str(folder))


def test_networks_of_the_same_parts_that_give_no_depth_are_refused(copy):
    folder = copy("marigold")
    (folder / "model_index.json").write_text('{"_class_name": "MarigoldNormalsPipeline"}')
    with pytest.raises(WeightsMismatchError, match="is a MarigoldNormalsPipeline by its model_index.json"):
        marigold.Teacher.load(str(folder))
    folder = copy("genpercept")
    config = json.loads((folder / "unet/config.json").read_text())
    config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}
    (folder / "unet/config.json").write_text(json.dumps(config))
    state = safetensors.torch.load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    for layer, width in (("linear_1", 4), ("linear_2", 32)):
        state |= {
            f"class_embedding.{layer}.weight": torch.zeros(32, width),
            f"class_embedding.{layer}.bias": torch.zeros(32),
        }
    safetensors.torch.save_file(state, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsMismatchError, match="its UNet wants a task beside the image, as Lotus's"):
        genpercept.Teacher.load(str(folder))


class LCMScheduler:
    """Known by its name."""


@pytest.mark.parametrize(
    ("device", "scheduler", "together"),
    [("cpu", None, [1] * 6), ("meta", None, [4, 2]), ("meta", LCMScheduler(), [1] * 6)],
)
@pytest.mark.parametrize("given", [True, False])
def test_each_member_of_an_ensemble_has_its_own_noise(monkeypatch, device, scheduler, together, given):
    """One by one on a CPU, as the authors compute them, and wherever members draw more noise on their way."""
    teacher, seen, generators = object.__new__(marigold.Teacher), [], []
    teacher.ensemble, teacher.scheduler = 6, scheduler

    def denoise(context, noise, each):
        assert len(context) == len(noise) == len(each)
        seen.append(noise)
        generators.extend(each)
        return noise[:, 0]

    teacher._denoise = denoise
    monkeypatch.setattr(marigold, "combine", lambda members: members)
    noise = torch.randn(6, 4, 2, 3, generator=torch.Generator().manual_seed(5))
    drawn = torch.Generator().manual_seed(7)
    out = teacher._members(torch.empty(4, 2, 3, device=device), noise if given else None, drawn)
    again = torch.Generator().manual_seed(7)
    expected = noise if given else torch.cat([torch.randn(1, 4, 2, 3, generator=again) for _ in range(6)])
    assert [len(part) for part in seen] == together and torch.equal(torch.cat(seen), expected)
    assert torch.equal(out, expected[:, 0]) and generators == [drawn] * 6


def test_marigold_says_far_is_large():
    assert {card.kind for card in marigold.CARDS} == {Kind.AFFINE_DEPTH}
