"""Training in tests is on one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are added up in another order
    yield
    torch.set_num_threads(before)
