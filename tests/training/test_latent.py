"""How latent networks learn depth: the papers' equations, the released training code's numbers, exact resumes."""

from __future__ import annotations

import os

import pytest
import torch

from distill.core.depth import Kind
from distill.losses import latent as maths
from distill.losses.latent_settings import LatentSettings
from distill.losses.losses import gradient_loss
from distill.teachers import _latent_student
from distill.training import checkpoints, schedule, trainlog
from distill.training.latent import LatentTask
from distill.training.sampling import hold_out, make_order
from tests.conftest import golden_folder
from tests.ranks import ended_as, ranks_of_two
from tests.training import latent_toys, toys


def tensor(data, name):
    return torch.from_numpy(data[name])


# --- numbers of the released training code ----------------------------------------------------------------------------


def test_noise_targets_and_rates_are_those_of_marigolds_training(golden):
    facts, data = golden("latent_training")
    for i, call in enumerate(facts["noise"]):
        strength = 0.9 * (torch.tensor(call["timestep"]) / 1000)
        found = maths.multi_resolution_noise(
            tuple(call["shape"]), strength, torch.Generator().manual_seed(call["seed"])
        )
        torch.testing.assert_close(found, tensor(data, f"noise{i}"), atol=1e-6, rtol=0)
    plain = facts["plain_strength"]
    found = maths.multi_resolution_noise(tuple(plain["shape"]), torch.tensor(0.9), torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, tensor(data, "noise_plain_strength"), atol=1e-6, rtol=0)
    alphas = tensor(data, "alphas")[facts["timesteps"]]
    z, n = tensor(data, "z"), tensor(data, "n")
    torch.testing.assert_close(maths.add_noise(z, n, alphas), tensor(data, "noisy"), atol=1e-6, rtol=0)
    torch.testing.assert_close(maths.velocity(z, n, alphas), tensor(data, "target"), atol=1e-6, rtol=0)
    settings = toys.settings(steps=30_000, warmup_steps=100, schedule="exponential", schedule_steps=25_000)
    for step, factor in zip(data["lr_steps"].tolist(), data["lr_factor"].tolist(), strict=True):
        # Theirs begins at 0, so that their first step learns nothing; ours at 1 / warmup_steps.
        assert schedule.factor(step, settings) == pytest.approx(factor + (0.01 if step < 100 else 0), rel=1e-6)


def test_maps_masks_and_losses_are_those_of_marigold_and_genpercept(golden):
    facts, data = golden("latent_training")
    depth, valid = tensor(data, "depth"), tensor(data, "valid")
    unit, usable = maths.to_unit_range(depth, valid, 0.02)
    assert torch.equal(usable, valid)
    torch.testing.assert_close(unit, tensor(data, "normalized"), atol=1e-6, rtol=0)
    # GenPercept's disparity names quantiles, and then takes the least and the largest value after all.
    disparity, _ = maths.to_unit_range(1 / depth.clamp(min=1e-9), valid, 0.0)
    tolerance = facts["tolerance"]["normalized_disparity_abs"]
    torch.testing.assert_close(disparity, tensor(data, "normalized_disparity"), atol=tolerance, rtol=0)
    small = maths.pooled(~tensor(data, "invalid")[:, 0], 8)
    assert torch.equal(small, tensor(data, "mask_down"))
    each = maths.latent_distance(tensor(data, "out"), tensor(data, "target")[1:2], small, squared=True)
    assert each.item() == pytest.approx(data["masked_mse"].item(), rel=1e-5)
    pred, target = tensor(data, "pred")[:, 0], tensor(data, "normalized")
    assert maths.aligned_l1(pred, target, valid).item() == pytest.approx(data["ssi"].item(), rel=1e-5)
    turned = maths.aligned_l1(-target + 0.01 * pred - 2, target, valid)  # a negative fit: the medians' ratio
    p, t = -target[valid] + 0.01 * pred[valid], target[valid] + 2
    assert turned.item() == pytest.approx(float((p * t.median() / p.median() - t).abs().mean()), rel=1e-4)
    found = gradient_loss(pred, target, valid, scales=1, normalize=False)
    assert found.item() == pytest.approx(data["grad"].item(), rel=1e-5)
    each = maths.latent_distance(pred[:, None], target[:, None], valid, squared=True)
    assert each.item() == pytest.approx(data["mse"].item(), rel=1e-5)


def test_latents_and_passes_are_those_of_fiffdepth(golden):
    facts, data = golden("fiffdepth_direct")
    folder = golden_folder("fiffdepth_direct")
    asked = _latent_student.LatentStudentSpec(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH)
    student = _latent_student.build_student(str(folder / "model"), asked)
    tolerance = facts["tolerance"]["train_abs"]
    torch.testing.assert_close(student.alphas, tensor(data, "train.alphas_cumprod"), atol=1e-7, rtol=0)
    image = tensor(data, "image_mult8").permute(2, 0, 1)[None].float() / 255
    x0 = student.encode(image)
    torch.testing.assert_close(x0, tensor(data, "train.x0"), atol=tolerance, rtol=0)
    for t in (-1, 0, 1):
        out = student(x0, torch.tensor([t]))
        torch.testing.assert_close(out, tensor(data, f"train.unet_x0_t{t}"), atol=tolerance, rtol=0)
    filtered = student(tensor(data, "train.d0"), torch.tensor([-1]))
    torch.testing.assert_close(filtered, tensor(data, "train.unet_d0_t-1"), atol=tolerance, rtol=0)
    blended = 0.5 * x0 + 0.5 * tensor(data, "train.depth_latent_target")
    torch.testing.assert_close(blended, tensor(data, "train.b0_gamma0.5"), atol=tolerance, rtol=0)
    for t in (1, 250, 999):
        alphas, eps = student.alphas[[t]], tensor(data, "train.eps")
        noisy = maths.add_noise(blended, eps, alphas)
        torch.testing.assert_close(noisy, tensor(data, f"train.bt_t{t}"), atol=tolerance, rtol=0)
        velocity = maths.velocity(blended, eps, alphas)
        torch.testing.assert_close(velocity, tensor(data, f"train.v_t{t}"), atol=tolerance, rtol=0)
        out = student(noisy, torch.tensor([t]))
        torch.testing.assert_close(out, tensor(data, f"train.unet_bt_t{t}"), atol=tolerance, rtol=0)


# --- the equations ----------------------------------------------------------------------------------------------------


def test_truth_teaches_the_pass_and_the_trajectory_pseudo_labels_the_filter():
    network, batch = latent_toys.Network(), latent_toys.micro()
    settings = LatentSettings()
    found = LatentTask(network, settings, 0)(network, batch, precision="fp32")
    first, filtered = network.asked
    assert first[:4] == [0, 0, 0, 0] and len(first) == 6 and all(1 <= t <= 999 for t in first[4:])
    assert filtered == [-1, -1], "-1 goes to the UNet as it is"
    # Eq. 1, 4 to 6 by hand, for the first image (truth) and the second (disparity, learnt as depth).
    x0 = network.encode(batch.images)
    d0 = network(x0, torch.zeros(4))
    maps, valid = maths.to_unit_range(batch.images[:1, 0] * 5 + 1, batch.taught[0].labels.shared.valid[:1], 0.02)
    target, inside = network.encode_maps(maps), maths.pooled(valid, 4)
    assert not inside[0, 0, 0] and inside.sum() == 15, "a latent pixel counts where all of its pixels do"
    off = ((d0[:1] - target) * inside[:, None]).abs()
    mae = off.sum() / (4 * inside.sum())
    assert found.parts["mae"][0].item() == pytest.approx(mae.item(), rel=1e-5)
    expected = mae + 0.5 * found.parts["gradient"][0] + 0.2 * found.parts["trajectory"][0]
    assert found.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    disparity = batch.images[1:2, 0] * 5 + 1
    depth = maths.inverted(disparity, torch.ones_like(disparity, dtype=torch.bool), quantile=0.02, reach=50.0)
    ends = torch.stack([depth.flatten()[disparity.argmin()], depth.flatten()[disparity.argmax()]])
    torch.testing.assert_close(ends, torch.tensor([50.0, 1.0]))
    wanted = network.encode_maps(maths.to_unit_range(depth, torch.ones_like(depth, dtype=torch.bool), 0.02)[0])
    again = network(d0[1:2], torch.tensor([-1]))
    assert found.parts["filter_mae"][0].item() == pytest.approx((again - wanted).abs().mean().item(), rel=1e-5)


def test_the_trajectorys_loss_is_a_mean_over_valid_latents():
    """Eq. 2 and 3 by hand: the target's depth is the label's, and the squared norm a mean, as the other losses are."""
    network, batch = latent_toys.Network(), latent_toys.micro(2)
    task = LatentTask(network, LatentSettings(), 0)
    found = task(network, batch, precision="fp32").parts["trajectory"]
    levels, noise = task._drawn(batch, torch.Size((2, 4, 4, 4)), lowest=1, shaped=False)
    label = batch.taught[0].labels.shared
    maps, valid = maths.to_unit_range(label.values, label.valid, 0.02)
    blended = 0.5 * network.encode(batch.images)[:1] + 0.5 * network.encode_maps(maps)
    signal, rest = network.alphas[levels[:1]].sqrt(), (1 - network.alphas[levels[:1]]).sqrt()
    out = network(signal * blended + rest * noise[:1], levels[:1])
    error = (out - (signal * noise[:1] - rest * blended))[0].square()
    inside = maths.pooled(valid, 4)[0]
    assert found.tolist() == pytest.approx([error[:, inside].mean().item()], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "passes", "parts"),
    [
        ({"trajectory": 0.0, "pseudo": "direct"}, [[0] * 4], {"mae", "gradient"}),
        ({"pseudo": "off", "blend_depth": "predicted", "first_index": 999}, [[0] * 4, [999] * 2], {"trajectory"}),
        ({"negated": True, "timestep": 1, "distance": "mse", "trajectory": 0.0, "pseudo": "off"}, [[1] * 4], {"mse"}),
        ({"negated": True, "distance_weight": 0.0, "gradient": 0.0, "trajectory": 0.0, "image_mse": 1.0,
          "image_ssi": 0.5, "image_gradient": 2.0, "pseudo": "direct"}, [[0] * 4], {"image_mse", "image_ssi"}),
        ({"method": "denoise"}, None, {"velocity"}),
    ],
)  # fmt: skip
def test_the_other_ways(given, passes, parts):
    network, batch = latent_toys.Network(channels=8 if "method" in given else 4), latent_toys.micro()
    found = LatentTask(network, LatentSettings(**given), 0)(network, batch, precision="fp32")
    assert passes is None or network.asked == passes
    assert parts <= found.parts.keys()
    assert (found.losses[1::2] == 0).all() == (given.get("pseudo") == "off"), "pseudo-labels teach unless they are off"
    found.losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_genpercepts_output_is_minus_the_map_and_marigolds_input_begins_with_the_image():
    """Neither shows in a loss that falls, but the teachers that read the folders take them so."""
    network, batch = latent_toys.Network(), latent_toys.micro()
    given = LatentSettings(negated=True, timestep=1, distance="mse", gradient=0.0, trajectory=0.0, pseudo="off")
    found = LatentTask(network, given, 0)(network, batch, precision="fp32")
    maps, _ = maths.to_unit_range(batch.images[2:3, 0] * 5 + 1, batch.taught[0].labels.shared.valid[1:], 0.02)
    inside = maths.pooled(batch.taught[0].labels.shared.valid[1:], 4)
    out = -network(network.encode(batch.images[2:3]), torch.ones(1))
    wanted = maths.latent_distance(out, network.encode_maps(maps), inside, squared=True)
    assert found.parts["mse"][1].item() == pytest.approx(wanted.item(), rel=1e-5)

    network = latent_toys.Network(channels=8)
    seen = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    LatentTask(network, LatentSettings(method="denoise"), 0)(network, batch, precision="fp32")
    assert torch.equal(seen[0][:, :4], network.encode(batch.images))


def test_the_filter_moves_the_map_only_where_it_shall():
    for through in (True, False):
        network, batch = latent_toys.Network(), latent_toys.micro()
        seen = []
        task = LatentTask(network, LatentSettings(filter_gradient=through), 0)
        network.register_forward_hook(lambda module, given, out, to=seen: to.append(given[0].requires_grad))
        task(network, batch, precision="fp32")
        assert seen == [False, through]


def test_settings_refuse_what_no_teacher_reads():
    with pytest.raises(ValueError, match="timestep and random_timestep are GenPercept's"):
        LatentSettings(timestep=1)
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 0.5\)"):
        LatentSettings(quantile=0.5)
    for wrong, message in (({"reach": 1.0}, "reach must be above 1"), ({"blend": 1.5}, "blend must be .* 1")):
        with pytest.raises(ValueError, match=message):
            LatentSettings(**wrong)
    assert LatentSettings(reach=1.5, blend=1.0, quantile=0.0)
    with pytest.raises(ValueError, match="nothing to learn"):
        LatentSettings(distance_weight=0.0, gradient=0.0)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    latent_toys.run(out, ema=0.9)
    return out


def test_held_out_images_that_teach_nothing_are_no_part_of_the_mean(tmp_path):
    """Their loss of 0 would halve it. And what the untrained network does is written down, the base's own task too."""
    given = {"steps": 2, "val_fraction": 0.4, "eval_start": True, "eval_every": 0, "save_every": 0}
    result, _ = latent_toys.run(tmp_path, latent={"pseudo": "off", "watch_prior": True}, **given)
    start, end = (line for line in trainlog.read(result.log) if "heldout" in line)
    assert (start["step"], end["step"], result.selected_step) == (0, 2, 2)
    odd = [i for i in hold_out(latent_toys.Photos().image_keys, 0.4)[1] if i % 2]
    for line in (start, end):
        assert line["left_out"] == len(odd) > 0 and len(odd) < line["samples"]
        parts = line["heldout_parts"]
        whole = parts["mae"] + 0.5 * parts["gradient"] + 0.2 * parts["trajectory"]
        assert line["heldout"] == pytest.approx(whole, rel=1e-5)
    assert start["heldout_parts"]["prior"] != end["heldout_parts"]["prior"]
    assert trainlog.number(result.log, "heldout_parts.mae", relative=True) == pytest.approx(
        end["heldout_parts"]["mae"] / start["heldout_parts"]["mae"]
    )
    assert trainlog.number(result.log, "heldout_parts.nothing") is None


class _Killed(Exception):
    pass


def test_killed_and_cached_and_resumed_is_the_same_bit_for_bit(straight, tmp_path):
    def die(done, total, **numbers):
        if done == 3:
            raise _Killed

    with pytest.raises(_Killed):
        latent_toys.run(tmp_path / "a", ema=0.9, cache=tmp_path / "latents", report=die)
    _, network = latent_toys.run(tmp_path / "a", ema=0.9, cache=tmp_path / "latents")
    assert toys.losses_of(tmp_path / "a") == toys.losses_of(straight)
    for name, value in toys.newest(straight).items():
        assert torch.equal(toys.newest(tmp_path / "a")[name], value), name
    _, warm = latent_toys.run(tmp_path / "b", ema=0.9, cache=tmp_path / "latents")
    assert warm.encoded == 0 < network.encoded, "everything was found on the disk"
    assert toys.losses_of(tmp_path / "b") == toys.losses_of(straight)


def test_a_damaged_part_is_computed_again(tmp_path, straight):
    latent_toys.run(tmp_path / "a", ema=0.9, cache=tmp_path / "latents")
    for part in (tmp_path / "latents").rglob("*.safetensors"):
        part.write_bytes(part.read_bytes()[:40])
    _, network = latent_toys.run(tmp_path / "b", ema=0.9, cache=tmp_path / "latents")
    assert network.encoded and toys.losses_of(tmp_path / "b") == toys.losses_of(straight)


def _process(out, environment) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    latent_toys.run(out, ema=0.9, cache=out.parent / "latents")


def test_two_processes_are_one(straight, tmp_path, processes):
    runs = [(_process, tmp_path / "two", rank) for rank in ranks_of_two()]
    assert ended_as(runs, processes) == [0, 0]
    toys.assert_same_run(tmp_path / "two", straight)


def test_accumulating_changes_nothing(straight, tmp_path):
    latent_toys.run(tmp_path, ema=0.9, accumulate=2)
    toys.assert_same_run(tmp_path, straight)


def test_a_share_of_the_batch_has_the_whole_batchs_draws():
    network = latent_toys.Network()
    task = LatentTask(network, LatentSettings(), 0)
    whole = task(network, latent_toys.micro(4), precision="fp32").losses
    half = task(network, latent_toys.micro(2, first=2), precision="fp32").losses
    torch.testing.assert_close(half, whole[2:])
    rough = task(network, latent_toys.micro(4), precision="bf16").losses
    assert not torch.equal(rough, whole)
    torch.testing.assert_close(rough, whole, rtol=0.05, atol=0.02)


def test_every_batch_is_half_of_each_source():
    order = make_order(range(30), [0] * 26 + [1] * 4, seed=0, weights=(), temperature=1.0, even=8)
    batches = [order.batch(step, 8) for step in range(20)]
    assert all(sum(place.index >= 26 for place in batch) == 4 for batch in batches)
    assert {place.index for batch in batches for place in batch} == set(range(30))


def test_checkpoints_hold_what_learns_alone(tmp_path, tiny_base):
    asked = _latent_student.LatentStudentSpec(teacher="marigold", kind=Kind.AFFINE_DEPTH, zero_snr=True)
    student = _latent_student.build_student(tiny_base, asked)
    assert {name.partition(".")[0] for name in student.state_dict()} == {"unet"}
    assert student.alphas[-1] == 0, "no signal is left at the last level"
    four = _latent_student.build_student(
        tiny_base, _latent_student.LatentStudentSpec(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH)
    )
    latents = torch.rand(1, 4, 8, 8)
    eight = student.unet.conv_in(torch.cat([latents, latents], 1))
    torch.testing.assert_close(eight, four.unet.conv_in(latents), atol=1e-5, rtol=1e-5)
    four.set_grad_checkpointing()
    ran = []
    four.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: ran.append(1))
    out = four.train()(latents, torch.tensor([-1]))
    out.sum().backward()
    assert len(ran) == 2, "the backward pass computes its activations again"
    again = _latent_student.build_student(
        tiny_base, _latent_student.LatentStudentSpec(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH)
    )
    torch.testing.assert_close(out, again(latents, torch.tensor([-1])))
    assert checkpoints.VERSION == 1
