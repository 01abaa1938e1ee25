"""Tiny checkpoints, written once."""

from __future__ import annotations

import functools
import shutil

import pytest

from distill.teachers import fiffdepth, genpercept, marigold
from tests import tiny_teachers as tiny


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(name)` -> (weights, options) of a tiny checkpoint, written once."""
    written: dict[str, tuple] = {}

    def make(name):
        if name not in written:
            written[name] = getattr(tiny, name)(tmp_path_factory.mktemp(name))
        return written[name]

    return make


@pytest.fixture(scope="module")
def parts_read_once():
    """The diffusion networks in a folder are read once for all tests of a file that modifies none."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (marigold, genpercept, fiffdepth):
            patch.setattr(module, "load_parts", functools.cache(module.load_parts))
        yield


@pytest.fixture
def copy(made, tmp_path):
    """`copy(name)` -> a copy of a tiny checkpoint's folder that may be modified."""

    def make(name):
        shutil.copytree(made(name)[0], tmp_path / name)
        return tmp_path / name

    return make
