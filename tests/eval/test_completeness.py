"""`distill doctor --benchmark`: what is there, what is missing, what is damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distill.app.cli import main
from distill.core.findings import Finding
from distill.core.plugins import find
from distill.eval.completeness import _npy_size, _samples, check_benchmark
from distill.eval.protocol import list_hash
from tests.eval.test_benchmarks import DEPTH, NAMES, RGB, content, image, listed, put, small_eth3d  # noqa: F401

PAIRS = {f"s/color/{i}.jpg": f"s/depth/{i}.png" for i in range(6)}


def scannet_files() -> dict[str, bytes]:
    rgb, depth = image(np.zeros((24, 32, 3), np.uint8), "JPEG"), image(np.full((24, 32), 3000, np.uint16))
    return {name: data for pair in PAIRS.items() for name, data in zip(pair, (rgb, depth), strict=True)}


@pytest.fixture
def scannet(monkeypatch):
    """ScanNet as if its published list were these six images."""
    module = find("distill.eval.benchmarks", "scannet")
    monkeypatch.setattr(module, "PROTOCOL", replace(module.PROTOCOL, num_images=6, list_sha256=list_hash(PAIRS)))
    return scannet_files()


def told(found: list[Finding], level: str) -> str:
    return "\n".join(f"{f.what} -> {f.remedy}" for f in found if f.level == level)


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_a_complete_download_is_all_well(tmp_path, scannet, form):
    found = check_benchmark("scannet", put(tmp_path, scannet, form))
    assert {f.level for f in found} == {"ok"}
    said = told(found, "ok")
    assert "6 of the 6 images of the published list (sha256 " in said and "12 files have the size" in said
    assert "3 images and truths decoded: 24 x 32, 100% valid" in said
    assert ("compressed" in said) == (form == "tar.gz")


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_missing_files_are_counted_and_the_first_named(tmp_path, scannet, form):
    for i in (1, 3):
        del scannet[f"s/depth/{i}.png"]
    for name in ("s/color/4.jpg", "s/depth/4.png"):
        del scannet[name]
    root = put(tmp_path, scannet, form)
    bad = told(check_benchmark("scannet", root), "bad")
    assert "3 images, not the 6 of the published list" in bad and "--list" in bad
    assert "2 of the 5 images with at least one file lack 2 files: s/depth/1.png, s/depth/3.png ->" in bad
    path = tmp_path / "list.txt"
    path.write_text("\n".join(" ".join(pair) for pair in PAIRS.items()))
    found = check_benchmark("scannet", root, path)
    assert "3 of the 6 listed images lack 4 files: s/depth/1.png, " in told(found, "bad")
    assert "6 of the 6 images of the published list" in told(found, "ok")


def test_another_list_is_a_warning(tmp_path, scannet):
    path = tmp_path / "list.txt"
    path.write_text("s/color/1.jpg s/depth/1.png")
    found = check_benchmark("scannet", put(tmp_path, scannet, "tar"), path)
    assert not told(found, "bad") and "1 images, not the 6 of the published list" in told(found, "warn")
    assert "are not comparable with published ones" in told(found, "warn")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("s/depth/2.png", b"", "s/depth/2.png (empty)"),
        ("s/depth/2.png", scannet_files()["s/depth/2.png"][:-20], "s/depth/2.png (cut short, or not a png)"),
        ("s/color/2.jpg", scannet_files()["s/color/2.jpg"][:-50], "s/color/2.jpg (cut short, or not a jpg)"),
        ("s/color/2.jpg", b"<!doctype html>", "s/color/2.jpg (a web page)"),
    ],
)
def test_damaged_files_are_named(tmp_path, scannet, name, data, said):
    bad = told(check_benchmark("scannet", put(tmp_path, scannet | {name: data}, "tar")), "bad")
    assert f"1 of 12 files are damaged: {said}" in bad


def test_a_jpeg_with_more_behind_its_end_is_whole(tmp_path, scannet):
    scannet["s/color/2.jpg"] += b"maker's notes" * 100
    assert not told(check_benchmark("scannet", put(tmp_path, scannet, "tar")), "bad")


def test_a_cut_tar_is_counted_up_to_its_cut(tmp_path, scannet):
    root = put(tmp_path, scannet, "tar")
    data = root.read_bytes()
    for length, said in ((5500, "cut short: its end is missing"), (6200, "cut short inside")):
        root.write_bytes(data[:length])
        bad = told(check_benchmark("scannet", root), "bad")
        assert said in bad and "2 images, not the 6" in bad and "resumes an interrupted download" in bad


def test_what_cannot_be_seen_at_the_ends_is_decoded(tmp_path, scannet):
    whole = scannet["s/depth/5.png"]
    scannet["s/depth/5.png"] = whole[:60] + b"\0" * 8 + whole[68:]
    assert "s/color/5.jpg cannot be decoded" in told(check_benchmark("scannet", put(tmp_path, scannet, "tar")), "bad")
    scannet["s/depth/5.png"] = image(np.full((24, 30), 3000, np.uint16))
    (tmp_path / "again").mkdir()
    found = check_benchmark("scannet", put(tmp_path / "again", scannet, "tar"))
    assert "the image is 24 x 32, its truth has another size" in told(found, "bad")


@pytest.mark.parametrize("name", NAMES)
def test_every_published_benchmark_can_be_looked_at(tmp_path, small_eth3d, name):  # noqa: F811
    root = put(tmp_path, content(name), "tar")
    found = check_benchmark(name, root, listed(tmp_path, name))
    assert not told(found, "bad"), found
    assert f"{len(DEPTH[name]) + 1} files have the size" in told(found, "ok")
    if name == "diode":
        assert "indoors: 1 of 325 images" in told(found, "warn")
    assert f"1 images, not the {find('distill.eval.benchmarks', name).PROTOCOL.num_images}" in told(
        check_benchmark(name, root), "bad"
    )
    damaged = content(name) | {DEPTH[name][0]: b"\x93NUMPY\x01"}
    (tmp_path / "more").mkdir()
    bad = told(check_benchmark(name, put(tmp_path / "more", damaged, "tar"), listed(tmp_path, name)), "bad")
    assert f"files are damaged: {DEPTH[name][0]} (" in bad


def test_the_verb_ends_with_one_where_something_is_bad(tmp_path, scannet, capsys):
    root = put(tmp_path, scannet, "tar")
    assert main(["doctor", "--benchmark", "scannet", "--root", str(root)]) == 0
    assert main(["doctor", "--benchmark", "nyu", "--root", str(root)]) == 1
    assert main(["doctor", "--benchmark", "nyu"]) == 2
    assert "nyu needs a root" in capsys.readouterr().err
    assert main(["doctor", "--benchmark", "scenes"]) == 0 and RGB


def test_the_complete_images_keys_are_read_once(tmp_path, scannet):
    class Keys(list):
        reads = 0

        def __iter__(self):
            Keys.reads += 1
            return super().__iter__()

    keys = Keys([*PAIRS][1:])
    found = _samples(find("distill.eval.benchmarks", "scannet"), put(tmp_path, scannet, "folder"), None, keys)
    assert len(found) == 5 and Keys.reads == 1, "not for every sample"


@pytest.mark.parametrize("header", [b"{'descr': '<f4', 'shape': ('a', 9999999999999)}", b"(" * 240, b"-" * 240])
def test_a_header_that_would_take_all_memory_is_none(header):
    assert _npy_size(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header) is None
