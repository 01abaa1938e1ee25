"""The json of a tar put right without labelling: the tar says where samples lie, a checksum whether that was all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.core import files
from distill.core.seal import is_broken
from distill.shards.codec import dump_json
from distill.shards.shards import verify_sidecar, walked_index


def mend_sidecar(tar: Path, shard: Mapping[str, Any]) -> bool:
    """Write the places of samples into the json of `tar` anew; whether it is then what it was, else it stays as it is.

    shard: what the manifest says of the tar, which must be that one to the last byte. A json of earlier versions has
    no checksum: what else it says is believed. Raises OSError where it cannot be written.
    """
    sidecar = tar.with_suffix(".json")
    try:
        before = sidecar.read_bytes()
        table = json.loads(before)
        if not isinstance(table, dict) or files.file_sha256(tar) != shard["sha256"]:
            return False
        index = walked_index(tar)
    except (OSError, ValueError, RecursionError):
        return False
    place = {key: shard[key] for key in ("name", "sha256", "bytes", "samples")}
    mended = {**table, "tar": place, "samples": [list(one) for one in index]}
    if is_broken(mended):
        return False
    files.write_bytes(sidecar, dump_json(mended))
    if verify_sidecar(tar, shard, [key for key, _, _ in index]):
        files.write_bytes(sidecar, before)
        return False
    return True
