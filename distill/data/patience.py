"""Reads that fail for a moment: a network disk that did not answer is asked again before an image is lost."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS_S = (0.5, 2.0)
"""Seconds before each further try."""
VAIN, VAIN_S = 10, 600.0
"""So many reads in so many seconds may be waited for in vain; then none is: a disk that is broken stays so."""
_vain: deque[float] = deque(maxlen=VAIN)
"""When this process last waited in vain, by time.monotonic; emptied when it was not in vain."""
_PASSING = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
}


def patiently(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again where the system says that it failed for a moment; its last error."""
    try:
        return read()
    except Exception as error:
        if not _is_passing(error) or (len(_vain) == VAIN and time.monotonic() - _vain[0] < VAIN_S):
            raise
        last = error
    for seconds in WAITS_S:
        time.sleep(seconds)
        try:
            result = read()
        except Exception as error:
            if not _is_passing(error):
                _vain.clear()
                raise
            last = error
        else:
            _vain.clear()
            return result
    _vain.append(time.monotonic())
    raise last


def _is_passing(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is one of a disk or network that may answer later."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (cause.errno in _PASSING or isinstance(cause, TimeoutError)):
            return True
        cause = cause.__cause__
    return False
