"""Names, licences and reasons from data stay text in Markdown, LaTeX and an index: no cell ends, no link, no tag."""

from __future__ import annotations

import re

import pytest

from distill.core.depth import Kind
from distill.core.markdown import inline
from distill.data.datasets import Group, Row, _index
from distill.eval.reports.tables import Grid, TableCell, as_latex, as_markdown
from distill.shards.codec import CODECS
from distill.shards.readme import describe_format, labels_readme
from distill.students.modelcard import latent_card

EVIL = "a|b\n# c`d <script>x</script> [l](javascript:y) ![i](//z) \\| ](u) [r][s] \x1b\u202e"
HEAD, TAIL = re.compile(r"(?<!\\)(?:\\\\)*[|`<]"), re.compile(r"(?<!\\)\]\(|(?<!\\)!\[")


def is_text(line: str) -> bool:
    return not HEAD.search(line) and not TAIL.search(line) and "\n" not in line and line.isprintable()


def test_hostile_text_is_shown_and_does_nothing():
    shown = inline(EVIL)
    assert is_text(shown) and "script" in shown and r"\\\|" in shown
    assert is_text(inline("\\|")) and is_text(inline("\\\\|")) and is_text(inline("x\n\n|"))


@pytest.mark.parametrize(
    "text", ["CC BY-NC 4.0 (non-commercial)", "C:\\Users\\me", "org/name@main", "a < b", "[0, 1] *x* _y_", "1,000", ""]
)
def test_ordinary_text_stays(text):
    assert inline(text).replace("\\<", "<") == text


def test_cards_and_tables_have_the_rows_that_they_should():
    card = {"weights": EVIL, "stored": ["affine_disparity"], "licence": EVIL}
    crops, shown = {"size": 56}, inline(EVIL)
    manifest = {
        "format": describe_format(next(iter(CODECS))),
        "settings": {"crops": crops},
        "teachers": {"t": card},
        "samples": 1,
    }
    text = labels_readme(manifest | {"images": {"count": 1}, "licence": {"images": EVIL}})
    assert f"| t | {shown} | affine_disparity | {shown} |\n" in text and f"Licence of the images: {shown}.\n" in text
    text = latent_card("x", {"name": EVIL, EVIL: 1, "why": EVIL}, teacher="marigold", kind=Kind.AFFINE_DEPTH)
    assert f"# {shown}\n" in text and f"| {shown} | 1 |\n" in text and f"| why | {shown} |\n" in text
    table = Grid(["model", EVIL], [[TableCell(EVIL), TableCell("0.1", 1)]], [EVIL])
    assert as_markdown(table).splitlines()[0] == f"| model | {shown} |"
    assert as_markdown(table).splitlines()[-1] == f"- {shown}"


def test_latex_is_text_and_no_option_of_the_row_before():
    table = Grid(
        ["model", "a"], [[TableCell(name), TableCell("1")] for name in ("[1cm] \\input{x}", "*^~%$#&_\nb")], ["n\n!"]
    )
    lines = as_latex(table).splitlines()
    assert lines[0] == r"% n\n!" and r"{[}1cm] \textbackslash{}input\{x\} & 1 \\" in lines
    assert r"{*}\textasciicircum{}\textasciitilde{}\%\$\#\&\_\textbackslash{}nb & 1 \\" in lines


def test_a_name_that_an_index_cannot_hold_is_told():
    for name in ("a\tb", "a\nb"):
        with pytest.raises(ValueError, match="a tab or a line break cannot stand in an index: rename it"):
            _index._lines("g", Group(rows=(Row(name=name, rgb="x", depth="y"),)))
