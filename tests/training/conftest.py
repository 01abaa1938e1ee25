"""Training in tests is on one thread."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_teachers


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are added up in another order
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("base")
    return tiny_teachers.diffusion(folder, channels=4)
