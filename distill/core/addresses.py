"""The wording of an address: what it names, without what grants access to it.

A password, a signed query or a token is used as it was given, and is neither printed nor stored. Two addresses that
differ only in these name the same thing, so that a run is resumed after an address was signed again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Addresses may be chained: zip://a.png::https://host/x.zip.
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9+.\-])([A-Za-z][A-Za-z0-9+.\-]+://)((?:(?!::[A-Za-z][A-Za-z0-9+.\-]{1,30}://)[^\s'\"<>`|])*)"
)
# user:password@, whose password may hold slashes, as keys of S3 do; a port is no password. Only on the web a user
# alone may be a token: elsewhere it is a name that is needed, or a container (abfs://photos@account/x.tar).
_PASSWORD = re.compile(r"[^/?#@:]*:[^/?#]*@|[\w.%+\-]+:(?!\d*(?:[/?#]|$))[^@]*@")
_USER = re.compile(rf"[^/?#]*@|{_PASSWORD.pattern}")
_WEB = re.compile(r"(?:[a-z+.\-]*\+)?(?:https?|webdavs?|davs?)://", re.IGNORECASE)
_USERLESS = ("file:", "local:", "hf:", "git:", "github:", "zip:", "tar:", "memory:")
_SECRET = re.compile(
    r"^(?:x-(?:amz|goog|oss|cos|obs|ms|bz)-|q-(?:ak|sig|key|sign)|code$|hmac|sas$|auth$|authorization$|key$|pass$|pwd$)"
    r"|signature|(?<![a-z])sign(?:ed)?$|^sig$|token(?!i[sz]|s$)|secret|passw|passphrase|credential|api[-_]?key"
    r"|access[-_]?key|(?<![a-z])key[-_]?(?:id|pair)|expire|^policy$|session|jwt|bearer",
    re.IGNORECASE,
)
# Of a shared access signature of Azure, whose names are of two letters: only beside its "sig".
_SHARED_ACCESS = re.compile(r"^(?:sv|st|se|sr|sp|ss|srt|sip|spr|sdd|ske|skoid|skt|sktid|sks|skv|si|saoid|suoid|scid)$")
# "?key=photos/sa_0.tar", "?session=2024-05-01" and "?key=scene_07" tell files of one place apart, and are no secrets.
_NAMING = re.compile(r"(?:code|key|key[-_]?id|policy|session(?:[-_]?id)?)", re.IGNORECASE)
_NAME = re.compile(r"[\w%/.\-]*[^.]\.[A-Za-z0-9]{1,5}|[\d\-_.]{1,12}|[a-z]{1,12}[-_]?\d{1,6}")
# Of a hub's token: long, and without the underscores and small letters alone of a name (hf_depth_anything_v2_large).
_TOKEN = re.compile(
    r"\b(hf_|ghp_|gho_|github_pat_)(?=[a-z0-9_]*[A-Z])[A-Za-z0-9]{20,}(?:_[A-Za-z0-9]{40,})?(?![A-Za-z0-9_])"
)


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
    if "@" in rest and not scheme.lower().startswith(_USERLESS):
        user = (_USER if _WEB.match(scheme) else _PASSWORD).match(rest)
        rest = rest[user.end() :] if user else rest
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
    return _SECRET.search(name) is not None and not (_NAMING.fullmatch(name) and _NAME.fullmatch(value))
