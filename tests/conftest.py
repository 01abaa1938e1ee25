"""Fixtures for all tests: no network, few threads, no card but where a test asks for one, golden data."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Containers forbid it: every process of pytest-xdist and every child of a test would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
if "DISTILL_TESTS_FOLDER" not in os.environ:  # pytest-xdist's workers make theirs within that of the first process
    os.environ["DISTILL_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="distill-tests-")
    atexit.register(shutil.rmtree, os.environ["DISTILL_TESTS_FOLDER"], ignore_errors=True)
_own = tempfile.mkdtemp(dir=os.environ["DISTILL_TESTS_FOLDER"])
os.environ["XDG_STATE_HOME"] = _own  # recipes run by tests are not the person's
os.environ.setdefault("HF_MODULES_CACHE", _own)  # of transformers' remote code

import numpy as np
import pytest

CARD = "cuda"  # the marker of a test that needs one, and the only selection in which a card can be seen
SLOW = "slow"  # the marker of the few whose setting cannot be made small; pyproject.toml says what they are


def pytest_configure(config):
    if config.option.markexpr != CARD:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every other test means the CPU, whatever its machine has
    if not config.option.markexpr and not any(".py" in word for word in config.args):
        config.option.markexpr = f"not {SLOW}"  # whoever names a file means all of it
    os.fsync = os.fstat  # no test pulls the plug, and a fifth of the wait was for the disk
    gc.disable()  # imports make millions of objects that stay, and each round of the collector visits all of them


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    # What is never collected, extension modules report as leaks when the process ends; pytest collects before.
    atexit.register(gc.unfreeze)


def pytest_collection_modifyitems(items):
    import torch  # here and not above: pytest-xdist's first process, which only hands out tests, needs none

    # Two OpenMP threads on two busy cores wait for each other: the suite is several times faster with one.
    torch.set_num_threads(1)
    # pytest-xdist gives a worker neighbours: of two, one has then every file that asks for processes, and their server.
    served = {item.module for item in items if "processes" in item.fixturenames}
    items.sort(key=lambda item: item.module not in served)
    needing = [item for item in items if item.get_closest_marker(CARD)]
    if needing and not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card: make test-gpu"))


@pytest.fixture
def card(monkeypatch):
    """The card of a test that is marked cuda, with float32 as exact as a CPU's: convolutions take TF32 else."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


HERE = Path(__file__).parent / "golden"


def golden_folder(case: str) -> Path | None:
    """The folder of a golden case: in the tree, or in the larger set that DISTILL_GOLDEN names."""
    places = [HERE, *([Path(os.environ["DISTILL_GOLDEN"])] if "DISTILL_GOLDEN" in os.environ else [])]
    return next((place / case for place in places if (place / case / "case.json").exists()), None)


@pytest.fixture(scope="session")
def golden():
    """`golden(case)` -> (case.json as a dict, data.npz); skips where the case is not at hand."""

    def load(case: str):
        folder = golden_folder(case)
        if folder is None:
            pytest.skip(f"golden case {case} is not in tests/golden; set DISTILL_GOLDEN to the folder that has it")
        data = np.load(folder / "data.npz") if (folder / "data.npz").exists() else {}
        return json.loads((folder / "case.json").read_text()), data

    return load


def golden_weights(shapes: dict, seed: int) -> dict:
    """Golden weights of {key: (shape, dtype)}, but for the keys that stay as constructed."""
    import torch

    from tests.golden import weights_rule

    made = weights_rule.synth_state({key: tuple(entry[0]) for key, entry in shapes.items()}, seed)
    return {key: torch.from_numpy(value) for key, value in made.items()}


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose processes inherit nothing of this one, and hash otherwise.

    They are forks of one server, which has done the imports of the command line: seconds, else, for each of them.
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
    """`elsewhere(function, *arguments)` -> what it returns in another process, the same one within a test."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()


@pytest.fixture(autouse=True)
def _same_seed():
    import torch

    torch.manual_seed(0)
