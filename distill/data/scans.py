"""Serialize a tar's scan, so that the headers that one machine has read need not be read by the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from distill.data import storage
from distill.data.sources import InputShard, Rejected, Scan, tar_entry


def scan_table(scan: Scan) -> dict[str, list[Any]]:
    """A tar's scan as plain values, the inverse of `scan_from`."""
    return {
        "entries": [
            [entry.key, entry.origin, *entry.load.args[1]] for entry in scan.entries if isinstance(entry.load, partial)
        ],
        "rejected": [[bad.origin, bad.key, bad.reason] for bad in scan.rejected],
        "passed": [list(count) for count in scan.skipped],
    }


def scan_from(shard: InputShard, table: Mapping[str, list[Any]]) -> Scan:
    """The scan of a tar from the table that `scan_table` made of it, without reading the tar."""
    path: Path | str = shard.origin if storage.is_url(shard.origin) else Path(shard.origin)
    entries = [
        tar_entry(path, key, origin, tuple((at, size) for at, size in copies))
        for key, origin, *copies in table["entries"]
    ]
    rejected = tuple(Rejected(*row) for row in table["rejected"])
    return Scan(tuple(entries), rejected, tuple((suffix, count) for suffix, count in table["passed"]))
