"""JPEG files of so many parts that reading them takes minutes: few bytes that name no large picture."""

from __future__ import annotations

import re

_SEGMENTS = 10_000
"""Header segments, and bytes of filling before one: profiles and depth in metadata take hundreds."""
_SCANS = 1_000
"""Scans of a progressive JPEG, each of which visits every block: encoders write about ten, and a hundred at most."""
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def jpeg_excess(data: bytes) -> str:
    """Why a JPEG has too many segments or scans, or "". Thumbnails, gain maps and films behind it do not count."""
    at = 2
    for _ in range(_SEGMENTS):
        start = at
        while data[at + 1 : at + 2] == b"\xff" and at - start <= _SEGMENTS:
            at += 1
        if at - start > _SEGMENTS:
            break
        if data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] == b"\xda":
            return _excess_of_scans(data, at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return f"its header has more than {_SEGMENTS} parts, which takes minutes to read: save it again without metadata"


def _excess_of_scans(data: bytes, at: int) -> str:
    if data.count(b"\xff\xda", at) <= _SCANS:
        return ""
    scans = 0
    while (marker := _MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        if scans > _SCANS:
            return f"it has more than {_SCANS} scans, which takes minutes to read: save it again"
        at = marker.start() + 2 + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return ""
