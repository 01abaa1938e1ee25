"""What one input cannot do is one line, and the others go on."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from distill.app import cli
from distill.data import sources
from distill.inference import outputs, predict
from distill.teachers.checkpoint import native_shape
from tests import tiny_teachers
from tests.inference.fake import Fake, call, grey


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA: no more"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes"),
    ],
)
def test_a_photo_too_large_for_the_memory_is_one_line(tmp_path, error):
    class Small(Fake):
        def predict(self, images):
            if images.shape[-1] > 8:
                raise error
            return super().predict(images)

    grey(tmp_path / "in" / "a.png", 10, size=(9, 6))
    grey(tmp_path / "in" / "b.png", 10)
    written, _, problems = call(Small(), tmp_path / "in", out=tmp_path / "o")
    assert written == 1
    assert problems == [f"{tmp_path / 'in' / 'a.png'}: not enough memory; --size N or a smaller image"]


def test_a_fault_of_the_student_is_not_blamed_on_a_photo(tmp_path):
    class Broken(Fake):
        def predict(self, images):
            raise RuntimeError("shape '[2]' is invalid for input of size 3")

    grey(tmp_path / "a.png", 10)
    with pytest.raises(RuntimeError, match="invalid for input"):
        call(Broken(), tmp_path / "a.png", out=tmp_path / "o")


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    out = tmp_path / "o"
    grey(tmp_path / "in" / "a.png", 10)
    grey(tmp_path / "in" / "sub" / "b.png", 10)
    out.mkdir()
    (out / "sub").write_text("in the way")
    written, _, problems = call(Fake(), tmp_path / "in", out=out)
    assert written == 1 and len(problems) == 1
    assert problems[0].startswith(f"{out / 'sub'}: File exists (a map of ")


def test_a_name_that_is_too_long_for_its_map_says_what_to_do(tmp_path):
    grey(tmp_path / f"{'b' * 251}.png", 10)
    written, _, problems = call(Fake(), tmp_path / f"{'b' * 251}.png", out=tmp_path / "o")
    assert written == 0 and len(problems) == 1 and problems[0].endswith("b.png): give the photo a shorter name")


def test_a_full_disk_names_the_map(tmp_path, monkeypatch):
    def full(path, values):
        raise OSError("100 requested and 0 written")  # what NumPy says

    grey(tmp_path / "a.png", 10)
    monkeypatch.setattr(np, "save", full)
    problems = call(Fake(), tmp_path / "a.png", out=tmp_path / "o")[2]
    assert problems == [f"{tmp_path / 'o' / 'a.npy'}: 100 requested and 0 written (a map of {tmp_path / 'a.png'})"]


def test_a_full_disk_ends_the_run_before_the_next_photo_is_predicted(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for name in ("a", "b", "c"):
        grey(tmp_path / "in" / f"{name}.png", 10)
    model = Fake()
    with monkeypatch.context() as patched:
        patched.setattr(predict, "write_map", full)
        written, _, problems = call(model, tmp_path / "in", out=tmp_path / "o")
    assert (written, model.calls) == (0, 1)
    assert problems == [
        f"{tmp_path / 'o' / 'a.npy'}: No space left on device (a map of {tmp_path / 'in' / 'a.png'}); "
        "the 2 after it were not tried: make room and rerun"
    ]
    assert call(model, tmp_path / "in", out=tmp_path / "o") == (3, 0, [])


def test_a_second_process_does_not_write_into_the_same_folder(tmp_path):
    grey(tmp_path / "a.png", 10)
    out = tmp_path / "o"
    with outputs.Outputs(out).locked(), pytest.raises(ValueError, match="o: another predict writes here; wait for it"):
        call(Fake(), tmp_path / "a.png", out=out)
    assert call(Fake(), tmp_path / "a.png", out=out) == (1, 0, [])
    assert {path.name for path in out.iterdir()} == {"a.npy", outputs.SETTINGS, outputs.SOURCES}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"revision": '])
def test_a_damaged_settings_file_is_named(tmp_path, text):
    grey(tmp_path / "a.png", 10)
    call(Fake(), tmp_path / "a.png", out=tmp_path / "o")
    (tmp_path / "o" / "predict.json").write_text(text)
    with pytest.raises(ValueError, match=r"o.predict.json: damaged, .*; give another --out, or delete this file"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "o")


def test_an_out_that_is_a_file_or_below_one_is_named(tmp_path):
    grey(tmp_path / "a.png", 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="^[^[].*file: is a file, and the maps need a folder; give another"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "file")
    with pytest.raises(OSError, match=r"^[^[].*file.below: cannot be written .*; give another --out"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "file" / "below")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"link: cannot be written \(a link to nothing\)"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "link")


def test_an_address_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="https://a.org/b.jpg: a URL, but only local files are read"):
        call(Fake(), "https://a.org/b.jpg", out=tmp_path)


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_name_is_not_the_working_directory(tmp_path, given):
    with pytest.raises(ValueError, match="names no photo; give files, folders or globs"):
        predict.survey([given], out=tmp_path)


def test_a_folder_with_brackets_and_gifs_are_found(tmp_path):
    for name in ("b [1]/x.jpg", "b [1]/y.gif", "b 1/z.jpg"):
        grey(tmp_path / name, 10)
    found = predict.survey([str(tmp_path / "b [1]" / "*.jpg")], out=tmp_path / "o").jobs
    assert [job.path.name for job in found] == ["x.jpg"]
    assert [job.path.name for job in predict.survey([str(tmp_path / "b [1]")], out=tmp_path / "o").jobs] == [
        "x.jpg",
        "y.gif",
    ]
    assert call(Fake(), tmp_path / "b [1]", out=tmp_path / "o") == (2, 0, [])


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_line(photos, tmp_path, capsys, device):
    code = cli.main(["predict", str(photos / "a.png"), "--out", str(tmp_path / "o"), "--device", device])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and f"device '{device}' cannot be used here: " in lines[0]


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [
        (480, 640, (224, 294)),
        (160, 640, (224, 896)),
        (640, 160, (896, 224)),
        (100, 800, (224, 1792)),
        (1, 1000, (224, 1792)),
        (80, 1, (1792, 224)),
    ],
)
def test_a_strip_is_squashed_and_a_photo_is_not(height, width, shape):
    assert native_shape(height, width, 224, 14) == shape


def test_read_and_refused_and_not_ours_are_all_that_was_found(tmp_path):
    photos = tmp_path / "photos"
    grey(photos / "a.png", 9)
    grey(photos / "b.jpg", 9)
    (photos / "b.jpg").rename(photos / "b.jfif")
    for name in ("raw.NEF", "x.jxl", "a.txt", "b.txt", "._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/a.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"1")
    found = predict.survey([str(photos)], out=tmp_path / "o")
    assert [job.stem for job in found.jobs] == ["a", "b"]
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in found.refused] == ["raw.NEF", "x.jxl"]
    assert found.skipped == {".txt": 2, "of the system (._*, .DS_Store, Thumbs.db)": 4}
    for job in found.jobs:
        job.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no photo or video there.*2 \.txt.*raw\.NEF: a camera raw"):
        predict.survey([str(photos)], out=tmp_path / "o")


def test_links_are_followed_once_counted_and_never_name_the_map(tmp_path):
    photos = tmp_path / "photos"
    grey(photos / "b.png", 9)
    grey(tmp_path / "elsewhere" / "c.png", 9)
    (photos / "a.png").symlink_to(photos / "b.png")
    (photos / "dead.png").symlink_to(tmp_path / "nothing")
    (photos / "far").symlink_to(tmp_path / "elsewhere")
    (photos / "circle").symlink_to(photos)
    (photos / "itself.png").symlink_to(photos / "itself.png")
    os.mkfifo(photos / "pipe.png")
    found = predict.survey([str(photos), str(photos / "b.png")], out=tmp_path / "o")
    assert [job.stem for job in found.jobs] == ["b", "far/c"] and found.skipped == {"linked twice": 1}
    assert [line.rsplit("/", 1)[1].split(":")[0] for line in found.refused] == ["dead.png", "itself.png", "pipe.png"]
    scan = sources.folders(photos)[0].scan()
    assert len(scan.entries) == 3 and len(scan.rejected) == 3


def test_a_numbered_pattern_is_its_pictures_in_order(tmp_path):
    for name in ("f_0001.png", "f_0010.png", "f_10000.png", "f_01.png", "f_0002_depth.png"):
        grey(tmp_path / "a" / name, 50)
    found = predict.survey([str(tmp_path / "a" / "f_%04d.png")], out=tmp_path / "o")
    assert [job.path.name for job in found.jobs] == ["f_0001.png", "f_0010.png", "f_10000.png"]
    assert "each picture is predicted on its own" in found.notes[0] and "ffmpeg" in found.notes[0]
    with pytest.raises(FileNotFoundError, match=r"b_%d.png: matches no file"):
        predict.survey([str(tmp_path / "a" / "b_%d.png")], out=tmp_path / "o")
    grey(tmp_path / "100%d.png", 50)
    assert not predict.survey([str(tmp_path / "100%d.png")], out=tmp_path / "o").notes


def test_pipes_links_and_lists_are_named_for_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    (tmp_path / "l.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    grey(tmp_path / "a.jpg", 9)
    found = predict.survey([str(tmp_path / name) for name in ("p.jpg", "a.jpg")], out=tmp_path / "o")
    assert len(found.jobs) == 1 and "p.jpg: not a plain file (a named pipe" in found.refused[0]
    with pytest.raises(FileNotFoundError, match="l.jpg: a link to nothing"):
        predict.survey([str(tmp_path / "l.jpg")], out=tmp_path / "o")
    with pytest.raises(FileNotFoundError, match="list.txt: a text file, not a photo: give the photos that it lists"):
        predict.survey([str(tmp_path / "list.txt")], out=tmp_path / "o")


def test_a_teacher_takes_its_options_and_the_folder_remembers_them(tmp_path, capsys):
    grey(tmp_path / "a.png", 9, size=(40, 30))
    (tmp_path / "t").mkdir()
    weights = tiny_teachers.depth_anything_v2(tmp_path / "t")[0]
    place = ["predict", str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), "--formats", "npy", "--device", "cpu"]
    taught = [*place, "--teacher", "depth_anything_v2", "--weights", weights, "--set", "native_size=28"]
    assert cli.main([*taught, "--set", "position_rule=transformers"]) == 0
    assert cli.main([*taught, "--set", 'position_rule="transformers"']) == 0
    assert "0 of 1 predicted, 1 already there" in " ".join(capsys.readouterr().out.split())
    for words, told in (
        (taught, "another options"),
        ([*taught, "--set", "max_dept=80"], "unknown key options.max_dept; did you mean max_depth?"),
        ([*taught, "--set", "max_depth=far"], "options.max_depth must be a number, not 'far'"),
        ([*taught, "--set", "max_depth=-1"], "max_depth must be above 0 metres"),
        ([*taught, "--set", "device=cpu"], "--set device: not an option of a teacher; give --device"),
        ([*place, "--set", "max_depth=80"], "--set: no effect without a teacher; give --teacher NAME"),
        (["serve", "--set", "max_depth=80"], "--set: no effect without a teacher; give --teacher NAME"),
    ):
        assert cli.main(words) == 2
        assert told in " ".join(capsys.readouterr().err.split())
