"""The wording of an address: what it names, without what grants access to it.

A password, a signed query or a token is used as it was given, and is neither printed nor stored. Two addresses that
differ only in these name the same thing, so that a run is resumed after an address was signed again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# user@, user:password@; in the second form a password may hold slashes, as keys of S3 do. A port is no password.
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.\-])([A-Za-z][A-Za-z0-9+.\-]+://)([^\s'\"<>`|]*)")
_USER = re.compile(r"(?:[^/?#]*@|[\w.%+\-]+:(?!\d*(?:[/?#]|$))[^@]*@)")
_SECRET = re.compile(
    r"^(?:x-(?:amz|goog|oss|cos|obs|ms|bz)-|q-(?:ak|sig|key|sign)|code$|hmac|sas$|auth$|authorization$|key$|pass$|pwd$)"
    r"|sign(?:ature|ed|$)|^sig$|token|secret|passw|passphrase|credential|api[-_]?key|access[-_]?key|key[-_]?(?:id|pair)"
    r"|expire|^policy$|session|jwt|bearer",
    re.IGNORECASE,
)
# Of a shared access signature of Azure, whose names are of two letters: only beside its "sig".
_SHARED_ACCESS = re.compile(r"^(?:sv|st|se|sr|sp|ss|srt|sip|spr|sdd|ske|skoid|skt|sktid|sks|skv|si|saoid|suoid|scid)$")
_FILE = re.compile(r"[\w%/.\-]*[^.]\.[A-Za-z0-9]{1,5}")  # the name of a file: "?key=photos/sa_0.tar" is no secret
_TOKEN = re.compile(r"\b(hf_|ghp_|gho_|github_pat_)[A-Za-z0-9_]{16,}")


def public(value: Any) -> Any:
    """A copy of plain values (as JSON holds them), or a text, without passwords, signatures and tokens in addresses."""
    if isinstance(value, Mapping):
        return {public(key): public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = _ADDRESS.sub(lambda match: match[1] + _plain(match[1], match[2]), value) if "://" in value else value
    return _TOKEN.sub(lambda match: f"{match[1]}...", text)


def _plain(scheme: str, rest: str) -> str:
    ended = len(rest.rstrip(",.:;)]}"))
    rest, end = rest[:ended], rest[ended:]  # of the sentence that mentions it
    if "@" in rest and not scheme.startswith(("file:", "hf:")) and (user := _USER.match(rest)):
        rest = rest[user.end() :]
    place, *parts = re.split(r"([?#])", rest)
    for mark, query in zip(parts[::2], parts[1::2], strict=True):
        pairs = re.split(r"[&;]", query)
        is_azure = any(pair.lower().startswith("sig=") for pair in pairs)
        kept = [pair for pair in pairs if not ("=" in pair and _is_secret(*pair.split("=", 1), is_azure=is_azure))]
        if len(kept) == len(pairs):
            place += mark + query
        elif kept:
            place += mark + "&".join(kept)
    return place + end


def _is_secret(name: str, value: str, *, is_azure: bool) -> bool:
    if is_azure and _SHARED_ACCESS.match(name):
        return True
    return _SECRET.search(name) is not None and not (name.lower() in ("key", "code") and _FILE.fullmatch(value))
