"""Names of files: what a search reads, refuses with a reason, or skips and counts."""

from __future__ import annotations

import pytest

from distill.data import filetypes

READ, FILM, REFUSED = "read", "film", "refused"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.JPG", READ),
        ("../x/a.gif", READ),
        ("desktop.ini/a.hif", READ),
        ("a.MKV", FILM),
        ("a.LRV", FILM),
        ("a.hevc", FILM),
        ("a.ts", ".ts"),
        ("a.NEF", REFUSED),
        ("a.jxl", REFUSED),
        ("x.depth/a.b.png", READ),
        ("a.Depth.PNG", ".depth.png"),
        ("Hospital/Data_easy/P000/depth_lcam_front/000012_lcam_front_depth.png", "_depth.png"),
        ("000012_rcam_top_seg.png", "_seg.png"),
        ("flow_lcam_front/000012_000013_flow.png", "_flow.png"),
        ("Hospital/Data_easy/P000/image_lcam_front/000012_lcam_front.png", READ),
        ("my_depth.png", READ),
        ("IMG_000012_depth.png", READ),
        ("a.pred_v2.tif", ".pred_v2.tif"),
        ("a.normal.jpg", ".normal.jpg"),
        ("a.json", ".json"),
        ("Makefile", "without a suffix"),
        ("a." + "x" * 40, "." + "x" * 11),
        *((f"{folder}/{name}", "of the system (._*, .DS_Store, Thumbs.db)") for folder, name in (
            ("__MACOSX", "a.jpg"),
            ("@eaDir", "a.mp4"),
            (".thumbnails", "a.nef"),
            ("x", "._a.jpg"),
            ("x", "Thumbs.db"),
            ("x", ".DS_Store"),
        )),
        ("x\\.hidden\\a.jpg", "of the system (._*, .DS_Store, Thumbs.db)"),
        (".a.jpg.icloud", ".icloud (photos that were not downloaded from it)"),
    ],
)  # fmt: skip
def test_a_name_is_read_refused_or_counted(name, expected):
    assert filetypes.is_photo(name) is (expected == READ)
    assert filetypes.is_film(name) is (expected == FILM)
    assert bool(filetypes.refusal(name)) is (expected == REFUSED)
    if expected not in (READ, FILM, REFUSED):
        assert filetypes.skip_category(name) == expected


def test_six_sorts_are_named_and_the_others_counted():
    counts = {".a": 9, ".b": 8, ".c": 7, ".d": 6, ".e": 5, ".f": 4, ".g": 2, ".h": 1}
    assert filetypes.summarize_counts(counts) == "9 .a, 8 .b, 7 .c, 6 .d, 5 .e, 4 .f, 3 others"
    assert filetypes.summarize_counts([".x", ".y", ".y"]) == "2 .y, 1 .x"
    assert filetypes.summarize_counts({}) == ""


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("a video (MP4)", ": give it a video's suffix"),
        ("a ZIP archive", ": unpack it"),
        ("PAM, a variant of PNM", ": convert it"),
        ("GIMP's own format", ": convert it"),
        ("text", ": remove it"),
    ],
)
def test_what_to_do_about_a_file_of_another_kind(kind, start):
    assert filetypes.advice_for_kind(kind).startswith(start)
    assert filetypes.advice_for_kind("empty: copy it again") == "", "the kind says it itself"
