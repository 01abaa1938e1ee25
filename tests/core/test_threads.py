"""One thread inside the block, the former number behind it, whatever happens inside."""

import pytest
import torch

from distill.core.threads import one_thread


def test_the_number_of_threads_is_restored_also_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    with pytest.raises(ValueError, match="inside"), one_thread():
        assert calls == [1]
        raise ValueError("inside")
    assert calls == [1, 7]
