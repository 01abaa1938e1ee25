"""Ways in which data is damaged: on disks, in downloads, by power cuts, and by hand."""

from __future__ import annotations

import json
from random import Random

from distill.core.seal import sealed

LOSSES = ("cut", "nul", "zeroed")
"""The kinds that lose data."""


def mutate(
    data: bytes, rng: Random, kinds: tuple[str, ...] = ("flip", "flip", "flip", *LOSSES, "more", "swap")
) -> tuple[str, bytes]:
    """A description of random damage of one of these kinds, and the damaged data."""
    kind, out = rng.choice(kinds), bytearray(data)
    at = rng.randrange(len(out)) if out else 0
    if not out or kind == "empty":
        return "empty", b""
    if kind == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        out[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    elif kind == "cut":
        del out[at:]
    elif kind == "nul":  # as a file system may leave a file after a power cut
        out[at:] = bytes(len(out) - at)
    elif kind == "zeroed":
        end = min(len(out), at + rng.choice((16, 512, 4096)))
        out[at:end] = bytes(end - at)
    elif kind == "more":
        out += rng.randbytes(rng.choice((1, 100, 512)))
    elif kind == "swap":
        other, size = rng.randrange(len(out)), rng.choice((4, 64, 512))
        out[at : at + size], out[other : other + size] = out[other : other + size], out[at : at + size]
    return f"{kind} at {at} of {len(data)}", bytes(out)


HOSTILE = (
    *(10**18, -(10**18), -1, 0, 2**31 - 1, 1e308, -0.0, True, None),
    *("", "..", "../../x", "/etc", "x" * 10_000, "\x1b[2J", "{1..100000000}", "s3://x/y"),
    *([], [[]], [10**18], [""], {}, {"a": 10**18}),
)


def hostile_json(data: bytes, rng: Random, *, seal: bool = True) -> tuple[str, bytes]:
    """A JSON table of ours with one value replaced or removed and a matching checksum, like an edit by hand."""
    table = json.loads(data)
    if not isinstance(table, dict):
        return "empty table", b"{}"
    place, path = table, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        path.append(str(key))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.2 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = rng.choice(HOSTILE)
        break
    return ".".join(path), json.dumps(sealed(table) if seal and "sha256" in table else table).encode()
