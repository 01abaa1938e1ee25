"""Photographs with measured depth from a table: units, formulas, invalid values, sizes, and tables with faults."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.core.depth import Kind
from distill.data import cells, pairs
from distill.data.pairs import _fits, read_pairs
from distill.eval.benchmarks import pairs as benchmark
from distill.eval.score import score

HEAD = "name\trgb\tdepth\tscale_to_metres\tinvalid\tkind\tdataset\tnotes"
STORED = np.array([[0, 1000, 2000, 65535], [500, 65100, 3000, 42]], np.uint16)


def table(folder: Path, *rows: str, head: str = HEAD, stored: np.ndarray = STORED) -> Path:
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)).save(folder / "a.png")
    Image.fromarray(stored).save(folder / "d.png")
    np.save(folder / "d.npy", stored.astype(np.float32))
    path = folder / "INDEX.tsv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def one(folder: Path, scale: str, invalid: str = "", kind: str = "depth", depth: str = "d.png"):
    (pair,) = read_pairs(table(folder, f"x\ta.png\t{depth}\t{scale}\t{invalid}\t{kind}\tset\t"))
    return pair


@pytest.mark.parametrize("depth", ["d.png", "d.npy"])
def test_depth_is_metres_where_it_is_not_invalid(tmp_path, depth):
    truth = one(tmp_path, "0.001", "0", depth=depth).truth()
    assert truth.kind == Kind.METRIC_DEPTH and truth.values.shape == (1, 2, 4)
    assert truth.valid[0].tolist() == [[False, True, True, True], [True, True, True, True]]
    assert truth.values[0, 0, 1:3].tolist() == [1.0, 2.0] and truth.values[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("invalid", "valid"),
    [
        ("none", [1, 2, 3, 4, 5, 6, 7]),
        ("0 and 65535", [1, 2, 4, 6, 7]),
        (">=65000 (sky)", [1, 2, 4, 6, 7]),
        (">=2500", [1, 2, 4, 7]),
        ("42", [1, 2, 3, 4, 5, 6]),
        ("inf (non-finite)", [1, 2, 3, 4, 5, 6, 7]),
        ("-1", [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_invalid_values_are_read_from_words(tmp_path, invalid, valid):
    assert one(tmp_path, "1", invalid).truth().valid.flatten().nonzero().flatten().tolist() == valid


def test_values_that_are_not_finite_or_not_positive_are_invalid(tmp_path):
    odd = np.array([[np.nan, np.inf, -np.inf, -1], [0, 1, 2, 3]], np.float32)
    table(tmp_path, "x\ta.png\td.npy\t1\t\tdepth\t\t", stored=np.zeros((2, 4), np.uint16))
    np.save(tmp_path / "d.npy", odd)
    truth = read_pairs(tmp_path)[0].truth()
    assert truth.valid.flatten().tolist() == [False] * 5 + [True] * 3 and truth.values.isfinite().all()
    np.save(tmp_path / "d.npy", np.full((2, 4), -9999.0))  # a frame without a measurement
    assert not read_pairs(tmp_path)[0].truth().valid.any()
    np.save(tmp_path / "d.npy", np.repeat([[-1.0], [-2.0]], 4, axis=1))  # with two numbers for it
    assert not read_pairs(tmp_path)[0].truth().valid.any()
    np.save(tmp_path / "d.npy", -1 - np.arange(8.0).reshape(2, 4))
    with pytest.raises(ValueError, match="d.npy: all its values are negative, from -8 to -1, but only positive ones"):
        read_pairs(tmp_path)[0].truth()


@pytest.mark.parametrize(
    ("formula", "metres"),
    [
        ("Z[m]=700*0.2/disp", 140 / 1000),
        ("700*0.2/(disp+400)", 140 / 1400),
        ("Z[m] = 700 * 2e-1 / ( disp - 400 )", 140 / 600),
        ("Z[m]=700*0.2/(disp/256)", 140 * 256 / 1000),
        ("700*0.2/(disp/256+10)", 140 / (1000 / 256 + 10)),
    ],
)
def test_a_stereo_formula_makes_metric_depth_of_disparity(tmp_path, formula, metres):
    truth = one(tmp_path, formula, "0", "disparity").truth()
    assert truth.kind == Kind.METRIC_DEPTH and float(truth.values[0, 0, 1]) == pytest.approx(metres)
    assert not truth.valid[0, 0, 0]
    if "-" in formula:
        assert not truth.valid[0, 1, 3], "42 pixels minus 400 is no disparity"


@pytest.mark.parametrize(
    ("scale", "kind", "expected"),
    [
        ("unknown (relative)", "depth", "scale_depth"),
        ("disparity px = value/4; no metric calibration", "disparity", "affine_disparity"),
        ("0.25", "disparity", "scale_disparity"),
        ("", "", "scale_depth"),
        ("1", "affine_depth", "affine_depth"),
    ],
)
def test_what_is_not_known_of_the_scale_becomes_the_kind(tmp_path, scale, kind, expected):
    assert one(tmp_path, scale, kind=kind).truth().kind == expected


def test_a_scale_that_is_upside_down_is_said(tmp_path):
    """As `png_depth_scale` of cvg/nice-slam#45 and Open3D's `depth_scale` (its #1225) are written: units per metre."""
    with pytest.raises(ValueError, match=r"d.png: its nearest point is at 210000 m: .* 5000 may be its inverse"):
        one(tmp_path, "5000", "0").truth()
    assert one(tmp_path, "1/5000", "0").truth().values.max() < 14


def test_a_map_of_another_size_takes_the_photographs_by_nearest_neighbour(tmp_path):
    pair = one(tmp_path, "1", "0")
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "a.png")
    truth = pair.truth()
    assert pair.rgb().shape == (3, 4, 8) and truth.values.shape == (1, 4, 8)
    assert torch.equal(
        truth.values[0], torch.from_numpy(STORED.astype(np.float32)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert truth.valid.sum() == 28


def test_all_faults_of_a_table_are_reported_at_once(tmp_path):
    good, unknown = "x\ta.png\td.png\t1\t\tdepth\t\t", "y\ta.png\td.png\t1\t\theight\t\t"
    path = table(tmp_path, good, unknown, "\ta.png\td.png\t1", good, "../z\ta.png\td.png\t1", "w\ta.png\td.png\t0")
    with pytest.raises(
        ValueError, match=r"INDEX\.tsv: line 3: kind must be.*'height'; line 4: name is empty; line 5: .*'x' was"
    ) as error:
        read_pairs(path)
    assert "line 6: the name '../z' points outside" in str(error.value)
    assert "line 7: scale_to_metres must be finite and above 0, not 0; words mean an unknown scale" in str(error.value)
    with pytest.raises(ValueError, match='no column "depth"; it has name, rgb'):
        read_pairs(table(tmp_path, head="name\trgb"))
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_pairs(tmp_path / "none.tsv")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are missing: .*no\.png"):
        read_pairs(table(tmp_path, "x\tno.png\td.png\t1"))
    with pytest.raises(ValueError, match=r"has no q \(1 names unknown, 1 known\)"):
        read_pairs(table(tmp_path, good), names=["q", "x"])


@pytest.mark.parametrize("scale", ["-0.001", "nan", "inf", "0.0", "1e999", "-inf", "0*3/disp"])
def test_a_scale_that_is_a_number_must_be_positive_and_finite(tmp_path, scale):
    with pytest.raises(ValueError, match=r"line 2: scale_to_metres must .*above 0, not " + scale.replace("*", r"\*")):
        one(tmp_path, scale)
    assert one(tmp_path, ".5").scale == 0.5


def test_text_that_is_not_utf8_or_absent_names_its_file(tmp_path):
    good = table(tmp_path, "x\ta.png\td.png\t1")
    for data, reason in ((b"caf\xe9\n", "not UTF-8 .*save it as UTF-8"), (b"\n", "empty")):
        (tmp_path / "names.txt").write_bytes(data)
        with pytest.raises(ValueError, match=rf"names\.txt: {reason}"):
            benchmark.samples(good, tmp_path / "names.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such list"):
        benchmark.samples(good, tmp_path / "none.txt")
    good.write_bytes(good.read_bytes() + b"caf\xe9\ta.png\td.png\t1\n")
    with pytest.raises(ValueError, match=r"INDEX\.tsv: not UTF-8 \(byte \d+: .*save it as UTF-8"):
        read_pairs(good)


def test_broken_files_name_themselves(tmp_path):
    pair = one(tmp_path, "1")
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes()[:60])
    with pytest.raises(OSError, match=r"d\.png: not a readable depth map"):
        pair.truth()
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(OSError, match=r"a\.png: not a readable image"):
        pair.rgb()
    table(tmp_path, "x\ta.png\td.npy\t1")
    np.save(tmp_path / "d.npy", np.zeros((2, 4, 3)))
    with pytest.raises(OSError, match=r"d\.npy: .*has the shape \(2, 4, 3\)"):
        read_pairs(tmp_path)[0].truth()


def test_pairs_are_a_benchmark(tmp_path):
    rows = ["b.1\ta.png\td.npy\t0.001\t0 and 65535\tdepth\tone\t", "sub/c\ta.png\td.png\tunknown\t0\tdisparity\ttwo\t"]
    root = table(tmp_path, *rows)
    some = benchmark.samples(root)
    assert [(s.key, s.prediction_path, s.group) for s in some] == [
        ("b.1", "pred_b.1.npy", "one"),
        ("sub/c", "sub/pred_c.npy", "two"),
    ]
    assert some[0].image().dtype == torch.float32 and float(some[0].image().max()) == pytest.approx(23 / 255)
    (tmp_path / "names.txt").write_text("sub/c\n\n")
    assert [s.key for s in benchmark.samples(tmp_path, tmp_path / "names.txt")] == ["sub/c"]
    store = tmp_path / "store"
    (store / "sub").mkdir(parents=True)
    for sample in some:
        disparity = sample.truth().convert(f"{sample.truth().kind.unknown}_disparity")
        np.save(store / sample.prediction_path, 3 * disparity.values[0].numpy() + 1)
    got = score(store, "affine_disparity", some, benchmark.PROTOCOL)
    assert got.num_failed == 0 and got.metrics["abs_rel"] < 1e-4
    with pytest.raises(ValueError, match="pairs needs a root"):
        benchmark.samples(None)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("Scale_To_Meters", '"0.001"', ""),
        ("scale", "0.001", "the column scale is not read: metres per stored unit belong in scale_to_metres"),
        ("Metres per unit", "0.001", "the column metres per unit is not read"),
        ("depth_factor", "1000", "belong in scale_to_metres"),
        ("scale_to_metres", "\ufeff0.001\u200b", ""),
        ("scale_to_metres", "#DIV/0!", "a spreadsheet's error"),
        ("scale_to_metres", "x 0.001", "is not a number"),
        ("scale_to_metres", "units of 1/256 m", "is not a number"),
    ],
)
def test_a_scale_is_understood_or_refused_whatever_a_spreadsheet_made_of_it(tmp_path, column, cell, said):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    np.save(tmp_path / "d.npy", np.full((20, 30), 2500.0, np.float32))
    path = tmp_path / "t.tsv"
    path.write_text(f'"Name"\tRGB\tdepth \t{column}\n"x"\t"a.png"\td.npy\t{cell}\n')
    if said:
        with pytest.raises(ValueError, match=said):
            read_pairs(path)
    else:
        (pair,) = read_pairs(path)
        assert pair.kind == Kind.METRIC_DEPTH and float(pair.truth().values.max()) == 2.5


@pytest.mark.parametrize(
    ("column", "cell", "belongs"),
    [("nodata", "65535", "invalid"), ("valid_mask", "m.png", "invalid"), ("Depth Kind", "disparity", "kind")],
)
def test_a_column_under_another_name_is_told(tmp_path, column, cell, belongs):
    path = tmp_path / "t.tsv"
    path.write_text(f"name\trgb\tdepth\tscale_to_metres\t{column}\nx\ta.png\td.npy\tmm\t{cell}\n")
    with pytest.raises(ValueError, match=f"the column {column.lower()} is not read: .* belong in {belongs}"):
        read_pairs(path)
    path.write_text(
        path.read_text().replace(f"\t{column}\n", f"\t{column}\t{belongs}\n").replace(f"{cell}\n", f"{cell}\t\n")
    )
    with pytest.raises(FileNotFoundError, match="files are missing"):  # both are there: a note, then
        read_pairs(path)


@pytest.mark.parametrize("scale", ["7.0*20/(disp+doffs 400)", "700*0.2/disp/256", "baseline*700/disparity"])
def test_another_formula_is_words(tmp_path, scale):
    assert one(tmp_path, scale, "0", "disparity").kind == Kind.AFFINE_DISPARITY


HEAD, ROW = "name\trgb\tdepth\tscale_to_metres\n", "x\ta.png\td.npy\t1\n"


@pytest.mark.parametrize("before", ["\r\n \n", "# my photos, May\n", "sep=;\n", '"sep=,"\r\n'])
def test_lines_before_the_columns_are_passed_over_and_counted(tmp_path, before):
    one(tmp_path, "1", "0", "depth")
    separator = ";" if "sep" in before else "\t"
    (tmp_path / "INDEX.tsv").write_text((before + HEAD + ROW + "y\n").replace("\t", separator), newline="")
    with pytest.raises(ValueError, match=f"line {before.count(chr(10)) + 3}: rgb, depth is empty"):
        read_pairs(tmp_path)
    (tmp_path / "INDEX.tsv").write_text((before + "#" + HEAD + ROW).replace("\t", separator), newline="")
    assert [pair.name for pair in read_pairs(tmp_path)] == ["x"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\3\4" + bytes(9), "an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\r\n<!DOCTYPE html>", "a web page"),
        ((HEAD + "x" * (1 << 18) + "\ta.png\td.npy\t1\n").encode(), "line 1: not a table"),
        (HEAD.replace("scale_to_metres", "depth").encode(), "two columns are called depth"),
        (HEAD.encode(), "no pairs below it"),
    ],
)
def test_what_stands_in_a_tables_place_is_named(tmp_path, data, said):
    (tmp_path / "INDEX.tsv").write_bytes(data)
    with pytest.raises(ValueError, match=f"INDEX.tsv: .*{said}"):
        read_pairs(tmp_path)


def test_a_name_in_other_letters_is_found_and_an_address_is_named(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "photo.jpg")
    np.save(tmp_path / "d.npy", np.ones((3, 4)))
    table = "name\trgb\tdepth\tscale_to_metres\na\t{}\td.NPY\tz = 2*0.5/disp\n"
    (tmp_path / "INDEX.tsv").write_text(table.format("Photo.JPG"))
    assert read_pairs(tmp_path)[0].truth().values.max() == 1
    (tmp_path / "INDEX.tsv").write_text(table.format("https://a.b/photo.jpg"))
    with pytest.raises(FileNotFoundError, match=r"https://a.b/photo.jpg is a URL.*download"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(("shape", "fits"), [((240, 320), True), ((239, 320), True), ((240, 426), False)])
def test_a_map_of_another_aspect_is_told_from_one_of_another_size(shape, fits):
    assert _fits(shape, (480, 640)) is fits  # 4:3, and 16:9 of it


@pytest.mark.parametrize(
    "cell", ["40-48", "40 to 48", "40\u201348", "40+", "!=3", "above 40", "more than 40", "0xffff"]
)
def test_an_invalid_cell_that_is_no_rule_is_not_half_understood(tmp_path, cell):
    with pytest.raises(ValueError, match="is not a supported rule: write values and bounds"):
        one(tmp_path, "1", cell)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        *(("65,535", "write 65535"), ("0, 65.535", "write 65535"), (">=10 m", ">=10 m has a unit")),
        *(("80m", "80m has a unit"), ("mask/x.png", "mask/x.png is a file, but no masks are read")),
    ],
)
def test_an_invalid_cell_of_two_readings_or_of_a_unit_is_refused(tmp_path, cell, said):
    with pytest.raises(ValueError, match=said):
        one(tmp_path, "1", cell)


@pytest.mark.parametrize("scale", ["700*0.2/disp/256", "721.5*0.54/disp*256", "f*b/disparity", "0,5*700/disp", "f*b/d"])
def test_a_formula_of_disparity_that_is_not_understood_makes_no_depth(tmp_path, scale):
    with pytest.raises(
        ValueError, match="disparity formula that cannot be parsed, but kind says depth|is not a number"
    ):
        one(tmp_path, scale, "0", "depth")
    assert one(tmp_path, "700*.2/disp", "0", "depth").baseline == pytest.approx(140)


def test_cells_that_say_nothing_are_no_formula_and_no_unit(tmp_path):
    assert one(tmp_path, "n/d", "0 m").kind is Kind.SCALE_DEPTH


def test_metric_is_no_scale(tmp_path):
    with pytest.raises(ValueError, match="'metric' is not a number"):
        one(tmp_path, "metric")


def test_a_comma_within_a_cell_shifts_no_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,rgb,depth,trust,scale_to_metres\nx,a.png,d.npy,good, mostly,0.001\n")
    with pytest.raises(ValueError, match="t.csv: line 2: more cells than columns: put quotes around"):
        read_pairs(path)


def test_the_table_that_the_guide_shows_is_one(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "labelled-data.md").read_text()
    head, row = guide.partition("```text\nname,")[2].partition("\n```")[0].splitlines()
    (tmp_path / "t.csv").write_text(f"name,{head}\n{row}\n")
    for name in ("photos/kitchen.jpg", "depth/kitchen.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (pair,) = read_pairs(tmp_path / "t.csv")
    assert (pair.name, pair.kind, pair.scale, pair.focal) == ("kitchen", Kind.METRIC_DEPTH, 0.001, 525.0)


def test_the_largest_code_is_told_where_nothing_says_what_it_means(tmp_path, caplog):
    for scale, invalid, told in (("unknown", "", 0), ("0.001", ">=65000", 0), ("0.001", "", 1), ("0.001", "", 1)):
        truth = one(tmp_path, scale, invalid).truth()
        assert len(caplog.messages) == told
    assert "d.png: 1 of its pixels are 65535, the largest" in caplog.text
    assert "they count as 65.535 m: write 65535 in the column invalid" in caplog.text
    assert truth.valid[0, 0, 3] and float(truth.values[0, 0, 3]) == pytest.approx(65.535)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("0 (65535 saturated)", (65000.0, ())),
        ("0 (65535 in the original, set to 0 here)", (65000.0, ())),
        ("65535 (max), 0", (65000.0, ())),
        (">=65000 (sky)", (65000.0, ())),
        ("0 and 65535", (65000.0, ())),
        ("255 = max", (math.inf, (255.0,))),
        ("none(inpainted)", (math.inf, ())),
        ("inf (non-finite)", (math.inf, ())),
    ],
)
def test_an_invalid_cell_may_explain_its_numbers(cell, expected):
    assert cells.invalid(cell) == expected


@pytest.mark.parametrize("invalid", ["65 535", "65\u202f535", "65'535", "10,000", "0 and 2.000", "max", "saturated"])
def test_a_value_with_a_separator_of_thousands_is_not_read_as_two(tmp_path, invalid):
    with pytest.raises(ValueError, match="may be one value or two: write|is not a supported rule"):
        one(tmp_path, "0.001", invalid)


def test_a_metric_kind_needs_a_number_or_nothing_as_scale(tmp_path):
    assert one(tmp_path, "", kind="metric_depth").kind == Kind.METRIC_DEPTH
    with pytest.raises(ValueError, match="scale_to_metres 'unknown' is no number, which the kind metric_depth needs"):
        one(tmp_path, "unknown", kind="metric_depth")


@pytest.mark.parametrize(
    ("kind", "top"), [(np.uint8, "255"), (np.int16, "32767"), (np.int32, "2147483647"), (np.float16, "65504")]
)
def test_the_largest_number_of_any_type_is_told(tmp_path, caplog, monkeypatch, kind, top):
    monkeypatch.setattr(pairs, "_told", set())  # some pytests give the folder's name again
    table(tmp_path, f"x\ta.png\te.npy\t1\t{top}\tdepth\tset\t", "y\ta.png\te.npy\t1\t\tdepth\tset\t")
    np.save(tmp_path / "e.npy", np.array([[1, 2, 3, float(top)], [1, 2, 3, 4]]).astype(kind))
    silent, told = read_pairs(tmp_path)
    assert silent.truth().valid.sum() == 7 and not caplog.messages
    assert told.truth().valid.sum() == 8 and f"pixels are {top}, the largest number of its type" in caplog.text


def test_a_list_of_a_benchmark_names_pairs_by_the_whole_line_or_its_first_word(tmp_path):
    path = table(tmp_path, *(f"{name}\ta.png\td.png\t1\t\tdepth\tset\t" for name in ("my", "my photo")))
    (tmp_path / "list.txt").write_text("my photo\nmy d.png\n")
    assert [sample.key for sample in benchmark.samples(path, tmp_path / "list.txt")] == ["my photo", "my"]
