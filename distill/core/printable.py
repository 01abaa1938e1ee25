"""Text from data on a terminal: what would steer it, or hide or reorder what stands there, is written as an escape."""

from __future__ import annotations

import re

# C0, DEL and C1 controls; the line and paragraph separators; soft hyphen, zero-width and bidirectional marks; tags;
# lone surrogates, which no file and no console takes.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with every control and unseen character as `\x1b` or `\u202e`, apart from those in `keep` ("\n")."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
