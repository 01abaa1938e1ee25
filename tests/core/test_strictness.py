"""The comparison behind every strict loading of weights."""

from __future__ import annotations

import torch

from distill.core.strictness import mismatches, unmatched

NETWORK = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}


def test_a_networks_own_state_fits_in_any_precision():
    assert not mismatches(NETWORK, NETWORK)
    assert not mismatches({key: value.half() for key, value in NETWORK.items()}, NETWORK)


def test_every_fault_is_told_at_once():
    state = {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(1)}
    assert mismatches(state, NETWORK) == [
        "lacks bn.num_batches_tracked",
        "has unknown b",
        "has another shape for a.weight ((3, 2), not (2, 3))",
        "has a.bias as int8: give weights that are not quantized",
    ]


def test_counters_may_be_missing_where_they_may():
    state = {key: value for key, value in NETWORK.items() if not key.startswith("bn")}
    assert mismatches(state, NETWORK) == ["lacks bn.num_batches_tracked"]
    assert not mismatches(state, NETWORK, may_lack=("num_batches_tracked",))


def test_only_the_first_names_are_given():
    assert unmatched("abcde", "") == ["lacks a, b, c and 2 more"]
