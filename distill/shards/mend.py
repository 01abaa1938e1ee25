"""Repairs the json of a tar without labelling: the tar gives the samples' offsets, a checksum verifies the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.seal import is_broken
from distill.shards.codec import dump_json
from distill.shards.shards import index_from_headers, verify_sidecar


def mend_sidecar(tar: Path, shard: Mapping[str, Any]) -> bool:
    """Rewrite the offsets of samples in the json of `tar`; returns whether that restored it, else leaves it unchanged.

    shard: the manifest's entry of the tar, which must match it to the last byte. A json of earlier versions has no
    checksum: the rest of its content is trusted. Raises OSError if it cannot be written.
    """
    sidecar = tar.with_suffix(".json")
    try:
        original = sidecar.read_bytes()
        table = json.loads(original)
        if not isinstance(table, dict) or files.file_sha256(tar) != shard["sha256"]:
            return False
        index = index_from_headers(tar)
    except (OSError, ValueError, RecursionError):
        return False
    tar_entry = {key: shard[key] for key in ("name", "sha256", "bytes", "samples")}
    mended = {**table, "tar": tar_entry, "samples": [list(entry) for entry in index]}
    if is_broken(mended):
        return False
    files.write_bytes(sidecar, dump_json(mended))
    if verify_sidecar(tar, shard, [key for key, _, _ in index]):
        files.write_bytes(sidecar, original)
        return False
    return True
