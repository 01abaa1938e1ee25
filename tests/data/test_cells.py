"""Cells of a table of pairs: what each text means, or why it is refused."""

from __future__ import annotations

import math
import re

import pytest

from distill.data import cells


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("", 0),
        ("-", 0),
        ("N/A", 0),
        ("nan", 0),
        ("519.5", 519.5),
        ("0", None),
        ("-3", None),
        ("inf", None),
        ("f", None),
    ],
)
def test_a_focal_length_is_a_number_of_pixels_above_zero_or_empty(text, pixels):
    if pixels is None:
        with pytest.raises(ValueError, match=f"focal must be a number of pixels above 0, or empty, not '{text}'"):
            cells.focal(text)
    else:
        assert cells.focal(text) == pixels


@pytest.mark.parametrize(
    ("text", "metres"),
    [
        *(("m", 1.0), ("Metres", 1.0), ("centimeters", 0.01), ("mm", 0.001), ('"0.001"', 0.001), ("1/256", 1 / 256)),
        *(("5 cm", 0.05), ("1/4 mm", 0.00025), ("2 metres", 2.0), ("1e-3", 0.001), ("-1", -1.0), ("", None)),
        *(
            ("unknown", None),
            ("no metric scale", None),
            ("n/a", None),
            ("up to 1.5", None),
            ("?", None),
            ("words", None),
        ),
        *(("none, not 0.001 m", None), ("relative (0.5-2)", None), ("1/disp", None)),
        *(("SfM, not in metres", None), ("scene units without metres", None)),
        *(("up-to-scale (factor 2)", None), ("depth, up-to-scale, times 2", None)),
    ],
)
def test_a_scale_is_metres_per_unit_or_unknown(text, metres):
    assert cells.scale(text) == (None if metres is None else pytest.approx(metres, rel=1e-12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            ("0,001", "is not a number: write 0.001;"),
            ("-0,5", "is not a number: write -0.5;"),
            ("depth in millimetres", 'is not a number of metres per unit, such as 0.001; write "unknown" if the scale'),
            ("uint16 mm", "is not a number of metres per unit"),
            ("divide by 1000", "is not a number of metres per unit"),
            ("1/0", "not a number of metres"),
        ),
        *(("5 feet", "not a number of"), ("#REF!", "a spreadsheet's error"), ("Err:502", "a spreadsheet's error")),
    ],
)
def test_a_scale_that_looks_like_a_number_is_no_unknown_one(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        cells.scale(text)


@pytest.mark.parametrize(
    ("text", "bound", "values"),
    [
        *(("0", math.inf, ()), ("", math.inf, ()), ("0, 255", math.inf, (255.0,)), ("-1, 9", math.inf, (9.0,))),
        *(
            (">= 80", 80.0, ()),
            ("\u226580", 80.0, ()),
            (">80 and 5", 80.0, (5.0,)),
            (">=90, >=80", 80.0, ()),
            ("0 >=80", 80.0, ()),
        ),
        *(("<=0, 7", math.inf, (7.0,)), ("\u22640 or 7", math.inf, (7.0,)), ("< 0", math.inf, ())),
        *(("64999", math.inf, (64999.0,)), ("65535", 65000.0, ()), ("70000, 80000", 70000.0, ()), ("1e9", 1e9, ())),
    ],
)
def test_an_invalid_cell_has_bounds_and_single_values(text, bound, values):
    assert cells.invalid(text) == (bound, values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<5", "bounds must be >=NUMBER; < and <= only work with 0"),
        ("<= 0.1", "bounds must be >=NUMBER"),
        ("100 000", "write 100000, or"),
        ("65.599", "write 65599, or"),
        (">80 metres", "has a unit"),
        ("sky.npy", "sky.npy is a file"),
        ("80 < depth", "is not a supported rule"),
        ("80>", "is not a supported rule"),
    ],
)
def test_an_invalid_cell_that_cannot_be_kept_to_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        cells.invalid(text)


@pytest.mark.parametrize(
    ("name", "column"),
    [("unit", "scale_to_metres"), ("divisor", "scale_to_metres"), ("nodata", "invalid"), ("valid_mask", "invalid")],
)
def test_other_names_of_a_column_are_known(name, column):
    assert [known for known, (pattern, _) in cells.MISNAMED.items() if pattern.search(name)] == [column]
