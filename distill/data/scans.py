"""A tar's scan as plain values and back, so that what one machine has read of its headers is known to the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from distill.data import storage
from distill.data.sources import InputShard, Rejected, Scan, tar_entry


def scan_table(scan: Scan) -> dict[str, list[Any]]:
    """A tar's scan as plain values, for `scan_from`."""
    return {
        "entries": [[one.key, one.origin, *one.load.args[1]] for one in scan.entries if isinstance(one.load, partial)],
        "rejected": [[one.origin, one.key, one.reason] for one in scan.rejected],
        "passed": [list(one) for one in scan.passed],
    }


def scan_from(shard: InputShard, table: Mapping[str, list[Any]]) -> Scan:
    """The scan of a tar from what `scan_table` said of it, without a look at the tar."""
    path: Path | str = shard.origin if storage.is_url(shard.origin) else Path(shard.origin)
    entries = [
        tar_entry(path, key, origin, tuple((at, size) for at, size in copies))
        for key, origin, *copies in table["entries"]
    ]
    rejected = tuple(Rejected(*one) for one in table["rejected"])
    return Scan(tuple(entries), rejected, tuple((sort, count) for sort, count in table["passed"]))
