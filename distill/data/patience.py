"""Reads that fail for a moment: a network disk that did not answer is asked again before an image is lost."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS_S = (0.5, 2.0)
"""Seconds before each further try."""
_PASSING = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
}


def patiently(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again where the system says that it failed for a moment; its last error."""
    for seconds in WAITS_S:
        try:
            return read()
        except Exception as error:
            if not _is_passing(error):
                raise
        time.sleep(seconds)
    return read()


def _is_passing(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is one of a disk or network that may answer later."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (cause.errno in _PASSING or isinstance(cause, TimeoutError)):
            return True
        cause = cause.__cause__
    return False
