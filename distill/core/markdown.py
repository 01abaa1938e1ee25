"""Text from data within a line of Markdown: it is shown as it is, and neither links nor ends a cell or the line."""

from __future__ import annotations

import re

from distill.core.printable import printable

# A backslash before punctuation, which would be an escape; the ends of cells, code, links and tags.
_MEANT = re.compile(r"\\(?=[!-/:-@\[-`{-~])|[|`<]|\[(?=[^\]]*\][\[(])|\](?=[\[(])|!(?=\[)")


def inline(text: str) -> str:
    """The text on one line, without Markdown's cells, code, links and tags; emphasis stays as it is."""
    return _MEANT.sub(r"\\\g<0>", printable(" ".join(text.split()) if re.search(r"\s{2}|[^\S ]", text) else text))
