"""The phrases that messages share."""

from __future__ import annotations

from distill.core.wording import counted, did_you_mean, first_line, on_one_line, shortened


def test_nouns_agree_with_their_number():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "study", "studies") for n in (1, 2)] == ["1 study", "2 studies"]


def test_a_long_list_is_cut_short_and_counted():
    assert [shortened(list("abcde"[:n])) for n in (0, 1, 3, 4, 5)] == [
        "", "a", "a, b, c", "a, b, c and 1 more", "a, b, c and 2 more"
    ]  # fmt: skip
    assert shortened(["a", "b"], 1) == "a and 1 more"


def test_the_nearest_name_is_suggested_with_its_prefix():
    known = ["steps", "stages", "seed"]
    assert did_you_mean("stps", known) == "; did you mean steps?"
    assert did_you_mean("stps", iter(known), prefix="train.") == "; did you mean train.steps?"
    assert did_you_mean("zzz", known) == did_you_mean("stps", []) == ""


def test_names_that_are_equally_near_are_all_suggested():
    for known in (["table1", "table2", "other"], ["table2", "other", "table1", "table2"]):
        assert did_you_mean("table3", known) == "; did you mean table1 or table2?"
    assert did_you_mean("table1", ["table1x", "table2"]) == "; did you mean table1x?"


def test_an_error_is_said_on_one_line_even_without_a_text():
    assert first_line(ValueError("\n  the reason \n a hint")) == "the reason"
    assert first_line(RuntimeError("long"), most=2) == "lo"
    assert first_line(AssertionError()) == on_one_line(AssertionError()) == "AssertionError"
    assert on_one_line(TypeError("field 'a':\n   is text"), most=15) == "field 'a': is t"
    assert on_one_line(KeyError("gelu9")) == "KeyError 'gelu9'"
