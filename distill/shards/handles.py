"""Tars that are read again and again: a limited number stays open, in each process its own."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

from distill.core import machine


class _OpenFile:
    """A file that is closed when nobody reads from it any more; without the ResourceWarning of Python's own files."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        # At the end of the process another thread may still be reading; the system closes it then.
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def fileno(self) -> int:
        """Its descriptor."""
        return self._descriptor


class OpenTars:
    """The tars of a folder, read by byte ranges. Can be forked or pickled to data workers."""

    most = 64  # open tars, but at most a quarter of the files that may be open

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, name: str, start: int, size: int) -> bytes:
        """At most `size` bytes of the tar `name` from `start` on; fewer where it ends before. Raises OSError."""
        file = self._open.get(name)
        if file is None:
            if len(self._open) >= min(self.most, (machine.open_files() or 1 << 20) // 4):
                # Dropped rather than closed: another thread may be reading from it.
                with contextlib.suppress(KeyError):
                    self._open.popitem(last=False)  # in one step: another thread may be opening one
            file = self._open[name] = _OpenFile(self.folder / name)
        # pread does not move the file's position, so forked workers may share the handle.
        return os.pread(file.fileno(), size, start)
