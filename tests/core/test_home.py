"""A "~" in a path: the home directory, or a name like any other where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.app.cli import main
from distill.core.home import home_expanded
from distill.data.sources import tars


def test_a_tilde_is_the_home_directory_and_an_unknown_user_is_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_expanded("~/a") == tmp_path / "a" and home_expanded(Path("~nobody_here/a")) == Path("~nobody_here/a")
    with pytest.raises(FileNotFoundError, match=r"^~nobody_here/a\.tar: no such tar"):
        tars("~nobody_here/a.tar")
    for words in (["predict", "~nobody_here/a.jpg"], ["index", "irs", "~nobody_here/IRS"]):
        assert main(words) == 2 and "~nobody_here" in capsys.readouterr().err
