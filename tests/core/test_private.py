"""What is given away names no folder of this machine, and stays as it is otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.core.private import without_places


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/weights", "weights"),
        ("/home/me/my weights/a b.pth", "a b.pth"),
        ("~/weights/a.pth", "a.pth"),
        ("~me/weights/", "weights"),
        (r"C:\Users\me\a.pth", "a.pth"),
        ("file:///home/me/a.pth", "a.pth"),
        ("/x/hub/models--org--name/snapshots/0123/a.pth", "org/name"),
        ("/home/me/photos/a.jpg: cut short (see /home/me/log.txt)", "a.jpg: cut short (see log.txt)"),
        ("--weights=/home/me/a.pth, --root '/data/me/x'", "--weights=a.pth, --root 'x'"),
        ("org/name/file.pth@main", "org/name/file.pth@main"),
        ("../weights/a.pth", "../weights/a.pth"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("s3://bucket/labels/a", "s3://bucket/labels/a"),
        ("it predicts 1/(a d + b), larger is nearer / farther and/or image/png", None),
        (r"\\server\share\a.pth", "a.pth"),
        (r"it is in C:\Users\me\a.pth or \\server\share\b.pth", "it is in a.pth or b.pth"),
        (r"\d{6}_rgb\.png", None),
        (r"the loss $\frac{a}{b}\cdot\alpha\beta$ of (\alpha\beta)", None),
        ("rgb=0.6,0.3,0.1 offset=0.5", None),
        ("", None),
        ("/", None),
    ],
)
def test_a_path_is_only_a_name(text, public):
    assert without_places(text) == (text if public is None else public)


def test_tables_keep_their_other_values():
    table = {"/home/me/mine.py": [1, 2.5, None, True, {"weights": "/home/me/a.pth"}], "path": Path("/home/me/b")}
    assert without_places(table) == {"mine.py": [1, 2.5, None, True, {"weights": "a.pth"}], "path": "b"}
