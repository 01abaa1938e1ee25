"""Phrases that messages share: counted nouns, long lists cut short, "did you mean", other libraries' errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 image", "2,000 images"; plural: of a noun that does not take an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def shortened(names: Sequence[str], most: int = 3) -> str:
    """ "a, b, c and 2 more": the first `most` names, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """ "; did you mean NAME?", or nothing where no known name is near. Names that are equally near are all given.

    prefix: of every suggestion ("train.").
    """
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.6)
    if not near:
        return ""
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(name)  # as get_close_matches: the ratio is not symmetric

    def ratio(candidate: str) -> float:
        matcher.set_seq1(candidate)
        return matcher.ratio()

    best = ratio(near[0])
    nearest = sorted(candidate for candidate in near if ratio(candidate) == best)
    return f"; did you mean {' or '.join(prefix + candidate for candidate in nearest)}?"


def first_line(error: BaseException, *, most: int | None = None) -> str:
    """The first line that is not blank of an error's text, at most `most` characters; without one, its class's name.

    Libraries put a hint or a list on further lines, and raise errors without a text.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:most]


def on_one_line(error: BaseException, *, most: int | None = None) -> str:
    """An error's whole text on one line, at most `most` characters, for one whose reason is on a further line.

    A KeyError's text is only the key, so its class's name stands before it, as it does in place of an empty text.
    """
    text = " ".join(str(error).split())
    return (f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text)[:most]
