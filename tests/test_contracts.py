"""The contracts of every plug-in, found by walking the folders: adding a file adds its tests.

The promises are in distill.app.contracts, so that plug-ins outside are checked too. Detailed tests of each contract
are in their folders (test_decoders, test_teachers, test_losses, test_score).
"""

from __future__ import annotations

import pytest

from distill.app.contracts import CONTRACTS, NotCheckedError, Subject, promise
from distill.core.plugins import KINDS, SIGNS, find, name_fault, names, option_faults
from tests.test_layout import ROOT

FOLDERS = {
    "teachers": {"depth_anything_v2", "checkpoint", "stored"},
    "decoders": {"sdt", "dpt"},
    "normalizations": {"global", "hybrid", "local", "none"},
    "terms": {"shared", "local_global", "feature", "gradient", "anchor"},
    "datasets": {"hypersim", "virtual_kitti2", "blendedmvs", "irs", "tartanair", "tartanair_v2", "virtual_kitti"},
    "benchmarks": {"scenes", "pairs", "nyu", "kitti", "eth3d", "scannet", "diode"},
}
EVERY = [(kind, name) for kind in KINDS for name in names(KINDS[kind])]


def test_every_kind_has_promises():
    assert set(CONTRACTS) == set(SIGNS) == set(KINDS)


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_the_folders_are_not_empty(kind):
    assert FOLDERS[kind] <= set(names(KINDS[kind]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_unknown_name_is_answered_with_the_known_ones(kind):
    known = names(KINDS[kind])
    with pytest.raises(LookupError, match=f"did you mean {known[0]}"):
        find(KINDS[kind], known[0] + "x")
    assert all(name in name_fault(KINDS[kind], "zzz") for name in known)


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}-{name}" for kind, name in EVERY])
def test_it_keeps_every_promise(kind, name, tmp_path):
    small = {"native_size": 56} if (kind, name) == ("teachers", "checkpoint") else {}
    subject = Subject(kind, name, tmp_path, options=small)
    for contract in CONTRACTS[kind]:
        try:
            contract(subject)
        except NotCheckedError:
            assert kind == "teachers"  # on tiny weights in tests/teachers


def test_a_misspelt_option_is_told():
    load = find("distill.teachers", "midas").Teacher.load
    assert option_faults(load, {"reszie": 1}, "options")[0].startswith("unknown key options.reszie")


def test_an_option_of_another_type_is_told():
    load = find("distill.teachers", "depth_anything_v2").Teacher.load
    assert not option_faults(load, {"max_depth": 20, "native_size": None, "weights_key": "a"}, "options")
    for key, value, message in (
        ("max_depth", "20", "must be a number, not '20'"),
        ("native_size", 2.5, "must be a whole number, not 2.5"),
        ("native_size", True, "must be a whole number, not True"),
        ("weights_key", 3, "must be text, not 3"),
        ("resize", None, "must be text, not None"),
    ):
        assert option_faults(load, {key: value}, "options") == [f"options.{key} {message}"]

    def own(weights, *, rule=None, share=0.5, size: Nowhere = 3, words: list[str] | None = None):  # noqa: F821
        pass

    assert not option_faults(own, {"rule": 3, "share": "all", "size": 4, "words": "a"}, "options")
    assert option_faults(own, {"size": "a"}, "options") == ["options.size must be a whole number, not 'a'"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_contributing_says_every_promise(kind):
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    missing = [promise(contract) for contract in CONTRACTS[kind] if promise(contract) not in text]
    assert not missing
