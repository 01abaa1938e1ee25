"""Training in tests runs on one thread."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_teachers


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("base")
    return tiny_teachers.diffusion(folder, channels=4)
