"""Fixtures for all tests: no network, few threads, no GPU unless a test asks for one, golden data."""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Some containers set it: every process of pytest-xdist and every child of a test would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
if "DISTILL_TESTS_FOLDER" not in os.environ:  # pytest-xdist's workers make theirs inside the first process's
    os.environ["DISTILL_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="distill-tests-")
    atexit.register(shutil.rmtree, os.environ["DISTILL_TESTS_FOLDER"], ignore_errors=True)
_own = tempfile.mkdtemp(dir=os.environ["DISTILL_TESTS_FOLDER"])
os.environ["XDG_STATE_HOME"] = _own  # keeps the tests' recipes out of the user's state
os.environ.setdefault("HF_MODULES_CACHE", _own)  # for transformers' remote code

import numpy as np
import pytest

CARD = "cuda"  # the marker of a test that needs a GPU; only with exactly this selection is a GPU visible
SLOW = "slow"  # the marker of the few tests that cannot be made small; described in pyproject.toml


def pytest_configure(config):
    if config.option.markexpr != CARD:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all other tests run on the CPU, whatever the machine has
    if not config.option.markexpr and not any(".py" in word for word in config.args):
        config.option.markexpr = f"not {SLOW}"  # naming a file selects all of its tests
    os.fsync = os.fstat  # no test cuts the power, and syncing took a fifth of the time
    gc.disable()  # imports make millions of permanent objects, and each collection visits all of them


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    # Extension modules report objects that are never collected as leaks at exit; pytest collects before that.
    atexit.register(gc.unfreeze)


def pytest_collection_modifyitems(items):
    import torch  # not at the top: pytest-xdist's first process, which only distributes tests, does not need it

    # Two OpenMP threads on two busy cores wait for each other: the suite is several times faster with one thread.
    torch.set_num_threads(1)
    # pytest-xdist gives a worker consecutive tests: sorted so, one of two workers runs all files that use `processes`,
    # and only that worker starts their server.
    using_processes = {item.module for item in items if "processes" in item.fixturenames}
    items.sort(key=lambda item: item.module not in using_processes)
    needing = [item for item in items if item.get_closest_marker(CARD)]
    if needing and not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card: make test-gpu"))


@pytest.fixture
def card(monkeypatch):
    """The GPU of a test that is marked cuda, with float32 as exact as a CPU's: no TF32 in convolutions."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


@pytest.fixture
def forked():
    """Reading processes are forked, so that they have a test's patches and local classes; Python 3.14's are not."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


HERE = Path(__file__).parent / "golden"


def golden_folder(case: str) -> Path | None:
    """The folder of a golden case: in the tree, or in the larger set in DISTILL_GOLDEN."""
    places = [HERE, *([Path(os.environ["DISTILL_GOLDEN"])] if "DISTILL_GOLDEN" in os.environ else [])]
    return next((place / case for place in places if (place / case / "case.json").exists()), None)


@pytest.fixture(scope="session")
def golden():
    """`golden(case)` -> (case.json as a dict, data.npz); skips if the case is missing."""

    def load(case: str):
        folder = golden_folder(case)
        if folder is None:
            pytest.skip(f"golden case {case} is not in tests/golden; set DISTILL_GOLDEN to the folder that has it")
        data = np.load(folder / "data.npz") if (folder / "data.npz").exists() else {}
        return json.loads((folder / "case.json").read_text()), data

    return load


def golden_weights(shapes: dict, seed: int) -> dict:
    """Golden weights for {key: (shape, dtype)}, without the keys that stay as constructed."""
    import torch

    from tests.golden import weights_rule

    state = weights_rule.synth_state({key: tuple(entry[0]) for key, entry in shapes.items()}, seed)
    return {key: torch.from_numpy(value) for key, value in state.items()}


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose processes inherit nothing from this one and use another hash seed.

    They are forks of one server that has done the command line's imports, which otherwise take seconds for each.
    """
    from multiprocessing import forkserver, get_context

    context = get_context("forkserver")
    context.set_forkserver_preload(["distill.app.commands", "distill.eval.fetch"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "1")
        forkserver.ensure_running()
    return context


@pytest.fixture
def elsewhere(processes):
    """`elsewhere(function, *arguments)` -> its result in another process, which stays the same within a test."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()


@pytest.fixture(autouse=True)
def _same_seed():
    import torch

    torch.manual_seed(0)
