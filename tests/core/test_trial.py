"""The trial of a faster backend: what its failure is called, and what is not its failure."""

from __future__ import annotations

import pytest
import torch

from distill.core.trial import DifferentResultError, failure


def raising(error: BaseException):
    def trial():
        raise error

    return trial


def test_a_failure_is_one_short_line():
    assert failure(lambda: None) == failure(lambda: False) == ""
    assert failure(raising(DifferentResultError("off by 2"))) == "DifferentResultError: off by 2"
    assert failure(raising(RuntimeError("a\n  b " + "x" * 999))).startswith("RuntimeError: a b xxx")
    assert len(failure(raising(RuntimeError("x" * 999)))) == 200


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_a_full_device_and_an_interruption_are_no_verdict(error):
    with pytest.raises(type(error)):
        failure(raising(error))
