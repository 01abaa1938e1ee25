"""Which samples a step sees, whose labels, and how fast each part learns: pure functions of seed and step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill import students
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels, Supervision
from distill.training import sampling
from distill.training.label_choice import average_labels, choose_patches, choose_teacher, convert_labels
from distill.training.sampling import MicroBatchPositions, Order, fingerprint, hold_out, make_order
from distill.training.schedule import factor, in_steps, make_optimizer, set_rates
from tests.training.toys import KIND, settings


def test_an_epoch_holds_every_sample_once():
    order = Order(tuple(range(5, 24)), seed=3)
    stream = [place.index for step in range(19) for place in order.batch(step, 8)]
    epochs = [stream[i : i + 19] for i in range(0, len(stream), 19)]
    assert all(sorted(epoch) == list(range(5, 24)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [p.index for p in Order(tuple(range(5, 24)), seed=4).batch(0, 8)] != stream[:8]


def test_a_stream_keeps_one_permutation_of_each_source_and_makes_each_epoch_once(monkeypatch):
    """Those of a million samples are 8 MB each, and a run of days has dozens of epochs."""
    made, sources = [], [number % 40 for number in range(400)]
    real = sampling._permutation
    monkeypatch.setattr(sampling, "_permutation", lambda *key: made.append(key) or real(*key))
    for order in (
        make_order(range(400), sources, seed=0, weights=(), temperature=1.0),
        make_order(range(400), sources, seed=0, weights=(), temperature=2.0, even=40),
    ):
        made.clear()
        for step in range(100):
            order.batch(step, 40)
        assert len(made) == len({*made}) >= 10 and len(order.shuffled) == (len(order.sources) or 1)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_parts_only_cut_the_global_batch(processes, accumulate):
    order = Order(tuple(range(20)), seed=0)
    cut = {"batch_size": 8, "accumulate": accumulate, "processes": processes, "steps": 5}
    parts = [list(MicroBatchPositions(order=order, process=p, **cut)) for p in range(processes)]
    for step in range(5):
        seen = [place for mine in parts for part in mine[step * accumulate : (step + 1) * accumulate] for place in part]
        assert sorted(seen, key=lambda p: p.position) == order.batch(step, 8)


def test_held_out_images_follow_from_their_keys_alone():
    keys = [f"sa_{i // 3}" for i in range(600)]
    kept, held = hold_out(keys, 0.1)
    assert sorted(kept + held) == list(range(600)) and len(held) % 3 == 0
    assert not {keys[i] for i in kept} & {keys[i] for i in held}
    shuffled = list(reversed(keys))
    assert {shuffled[i] for i in hold_out(shuffled, 0.1)[1]} == {keys[i] for i in held}
    assert set(held) < set(hold_out(keys, 0.2)[1])
    assert abs(len(hold_out([str(i) for i in range(20_000)], 0.1)[1]) - 2000) < 200
    assert len(hold_out(["a", "b", "c"], 1e-9)[1]) == 1 and hold_out(["a", "b"], 0.0)[1] == []
    assert [len(part) for part in hold_out(["a", "b", "b"], 1.0)] in ([1, 2], [2, 1]), "an image is left to learn from"
    assert hold_out([], 0.1) == ([], []), "that nothing is left to learn from, the batches say"


def test_holding_out_hashes_each_image_once(monkeypatch):
    hashed, real = [], sampling._hash
    monkeypatch.setattr(sampling, "_hash", lambda key: hashed.append(key) or real(key))
    hold_out([f"sa_{i // 3}" for i in range(600)], 0.1)
    assert len(hashed) == 200


def test_teachers_are_chosen_by_share_from_seed_and_step():
    shares = {"primary": 0.7, "assistant": 0.3}
    drawn = [choose_teacher(shares, seed=1, step=step) for step in range(2000)]
    assert drawn == [choose_teacher(shares, seed=1, step=step) for step in range(2000)]
    assert abs(drawn.count("primary") / 2000 - 0.7) < 0.04
    assert choose_teacher({"a": 0.0, "b": 1.0}, seed=0, step=0) == "b"


def test_rates_count_optimizer_steps():
    at = {name: settings(steps=103, schedule=name) for name in ("cosine", "linear", "poly", "constant")}
    assert [factor(t, at["cosine"]) for t in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert [factor(53, s) for s in at.values()] == pytest.approx([0.5, 0.5, 0.5**0.9, 1.0])
    assert 0 < factor(102, at["cosine"]) < 1e-3


def test_averaged_teachers_are_normalized_first():
    ramp = torch.arange(16.0).reshape(1, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    ramp[0, 0, 0] = math.nan
    boxes = torch.zeros(1, 0, 4)
    labels = {"a": Labels(DepthMap(ramp, valid, KIND), None, boxes)}
    labels["b"] = Labels(DepthMap(1000 * ramp + 7, torch.ones_like(valid), KIND), None, boxes)
    mean = average_labels(labels, {"a": 0.5, "b": 0.5}).shared
    assert torch.equal(mean.valid, valid) and mean.values.isfinite().all()
    part = mean.values[valid]
    torch.testing.assert_close(part.median(), torch.tensor(0.0))
    torch.testing.assert_close(part.abs().mean(), torch.tensor(1.0))
    plain = average_labels(labels, {"a": 0.5, "b": 0.5}, aligned=False).shared.values[valid]
    torch.testing.assert_close(plain, (1001 * ramp + 7)[valid] / 2)  # the larger map is nearly all of it


# --- which part learns how fast ---------------------------------------------------------------------------------------


def test_blocks_before_the_last_learn_more_slowly():
    student = students.build(
        encoder="test_vit",
        decoder="sdt",
        encoder_options={"timm_options": {"depth": 3, "embed_dim": 32}},
        decoder_options={"fusion_channels": 16},
    )
    given = settings(layer_decay=0.5, encoder_lr=1e-3, lr=1e-2, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(student, given)
    set_to = set_rates(optimizer, 5, given)
    assert (set_to["encoder"], set_to["decoder"]) == (1e-3, 1e-2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in student.named_parameters() if p.requires_grad}
    assert len(names) == len(rates), "every parameter once"
    for name, rate in names.items():
        if not name.startswith("encoder."):
            assert rate == 1e-2
        elif ".blocks." in name:
            block = int(name.split(".blocks.")[1].split(".")[0])
            assert rate == pytest.approx(1e-3 * 0.5 ** (2 - block)), name
        elif "embed" in name or "token" in name:
            assert rate == pytest.approx(1e-3 * 0.5**3), name
        else:
            assert rate == 1e-3, name


def test_what_is_drawn_is_what_was_drawn():
    """A resumed run continues the stream that it began, whatever has changed in between."""

    def stream(order, steps):
        return [place.index for step in range(steps) for place in order.batch(step, 4)]

    assert stream(Order(tuple(range(6)), 3), 3) == [2, 3, 1, 5, 4, 0, 2, 0, 3, 1, 5, 4]
    weighted = [
        make_order(range(8), [0] * 4 + [1] * 4, seed=seed, weights=(1.0, 2.0), temperature=1.0) for seed in (3, 4)
    ]
    assert stream(weighted[0], 5) == [1, 5, 0, 7, 6, 4, 2, 6, 3, 4, 5, 7, 6, 2, 5, 1, 0, 3, 7, 4]
    assert stream(weighted[1], 3) == [6, 4, 2, 7, 0, 5, 1, 3, 3, 6, 7, 4]
    drawn = [choose_teacher({"a": 0.5, "b": 0.5}, seed=seed, step=step) for seed in (1, 2) for step in range(8)]
    assert "".join(drawn) == "aababbbabbaabbaa"
    assert [choose_patches(2, seed, 7, 6) for seed in (0, 1)] == [[2, 3], [1, 3]]
    assert choose_patches(3, 0, 7, 3) == [0, 1, 2]


def test_even_batches_do_not_ask_how_many_images_a_source_has():
    order = make_order(range(8), [0] * 6 + [1] * 2, seed=3, weights=(), temperature=1.0, even=4)
    assert [share for _, share in order.sources] == [0.5, 0.5] and order.block == 4


def test_a_run_of_one_batch_trains_and_its_data_are_its_keys_and_indices():
    cut = {"accumulate": 1, "process": 0, "processes": 1, "steps": 1}
    assert len(MicroBatchPositions(order=Order((0, 1), 0), batch_size=2, **cut)) == 1
    with pytest.raises(ValueError, match="2 training samples are fewer than one batch of 3"):
        MicroBatchPositions(order=Order((0, 1), 0), batch_size=3, **cut)
    assert len({fingerprint(keys, indices) for keys in (["a", "b"], ["a", "c"]) for indices in ([0], [0, 1])}) == 4


def test_an_average_weighs_teachers_by_share_and_pixels_by_agreement():
    valid = torch.tensor([[[True, True, False]]])
    boxes = torch.zeros(1, 1, 4)
    maps = [DepthMap(torch.tensor([[row]]), valid, Kind.SCALE_DEPTH) for row in ([0.0, 2.0, 5.0], [1.0, 6.0, 5.0])]
    a, b = (Labels(one, one, boxes, supervision=Supervision("t", one.kind, truth=True)) for one in maps)
    found = average_labels({"a": a, "b": b}, {"a": 0.5, "b": 1.5, "c": 0.0}, aligned=False)
    for mean, weight in ((found.shared, found.shared_weight), (found.local, found.local_weight)):
        assert mean.values[0, 0, :2].tolist() == [0.75, 5.0] and mean.kind is Kind.AFFINE_DEPTH
        torch.testing.assert_close(weight, torch.tensor([[[1 / 2, 1 / 5, 0.0]]]))
    assert found.supervision.truth and found.supervision.teacher == "average"
    alone = average_labels({"a": a, "b": replace(b, local=None)}, {"a": 0.5, "b": 0.5})
    assert (
        alone.local is None
        and not average_labels(
            {"a": a, "b": replace(b, supervision=Supervision("n", Kind.SCALE_DEPTH))}, {"a": 0.5, "b": 0.5}
        ).supervision.truth
    )


def test_labels_are_converted_where_they_can_be_and_kept_where_asked():
    maps = {kind: DepthMap(torch.full((1, 2, 2), 4.0), torch.ones(1, 2, 2, dtype=torch.bool), kind) for kind in Kind}
    labels = {kind: Labels(depth, None, torch.zeros(1, 0, 4)) for kind, depth in maps.items()}
    for keep in (False, True):
        found = convert_labels(labels[Kind.SCALE_DEPTH], KIND, keep).shared
        assert found.kind is KIND and found.values.unique().tolist() == [0.25]
        assert convert_labels(labels[KIND], Kind.SCALE_DEPTH, True) is labels[KIND], "they know less than the student"
    assert convert_labels(labels[Kind.AFFINE_DEPTH], KIND, True) is labels[Kind.AFFINE_DEPTH]
    with pytest.raises(KindError):
        convert_labels(labels[Kind.AFFINE_DEPTH], KIND)


def test_rates_reach_their_end_where_they_are_told_to():
    early = settings(steps=100, warmup_steps=0, schedule="exponential", schedule_steps=50)
    assert [factor(t, early) for t in (0, 25, 50, 99)] == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_vectors_do_not_decay_and_the_moments_are_the_recipes():
    student = torch.nn.Module()
    student.decoder = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = make_optimizer(student, settings(weight_decay=0.3, betas=(0.8, 0.9)))
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {4: 0.3, 1: 0.0} and all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_epochs_are_rounded_to_steps_and_leave_one_after_the_warm_up():
    given = settings(epochs=5.0, batch_size=2, warmup_epochs=1.0)
    assert (in_steps(given, 7).steps, in_steps(given, 7).warmup_steps) == (18, 4)
    assert in_steps(replace(given, epochs=1.3), 3).steps == 2, "1.95 steps"
    short = in_steps(replace(given, epochs=0.2, warmup_epochs=0.19), 7)
    assert (short.steps, short.warmup_steps) == (1, 0)
