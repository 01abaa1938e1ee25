"""Text from data, made safe for a terminal: characters that control it or hide or reorder text become escapes."""

from __future__ import annotations

import re

# C0, DEL and C1 controls; the line and paragraph separators; soft hyphen, zero-width and bidirectional marks; tags;
# lone surrogates, which cannot be encoded.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: str, *, keep: str = "") -> str:
    r"""Return `text` with control and invisible characters as `\x1b` or `\u202e`, except those in `keep` ("\n")."""
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
