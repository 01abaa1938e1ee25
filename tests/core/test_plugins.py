"""Plug-ins by name, by path and by entry point: what is found, what is refused, and what each is called."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from pathlib import Path

import pytest

from distill.core import plugins
from distill.core.by_path import module_name
from distill.core.plugins import PluginError, file_hashes, find, is_path, name_fault, names, origins, short_name

TEACHERS = "distill.teachers"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_ALLOWED", {})
    return tmp_path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed("my-pkg", group, name, value)`: a package with an entry point, as pip would leave it."""

    def install(package: str, *lines: tuple[str, str, str], code: str = "") -> None:
        site = tmp_path / f"site-{package}"
        info = site / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("".join(f"[{g}]\n{n} = {v}\n" for g, n, v in lines))
        (site / f"{package.replace('-', '_')}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        plugins._installed.cache_clear()
        monkeypatch.setattr(plugins, "_ours", {})  # a process's packages stay what they were, but for this test's

    yield install
    plugins._installed.cache_clear()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"./{path.name}"


# --- by path ----------------------------------------------------------------------------------------------------------


def test_a_file_is_imported_once_however_its_path_is_written(folder):
    name = write(folder / "mine.py", "import random\nTOKEN = random.random()\nTeacher = None\n")
    module = find(TEACHERS, name)
    assert find(TEACHERS, str(folder / "mine.py")) is module is find(TEACHERS, "mine.py")
    (folder / "link.py").symlink_to(folder / "mine.py")
    assert find(TEACHERS, "link.py") is module
    assert "mine" not in sys.modules
    assert module.__file__ == str((folder / "mine.py").resolve())


def test_two_files_of_one_name_are_two_modules(folder):
    for sub in ("a", "b"):
        (folder / sub).mkdir()
        (folder / sub / "mine.py").write_text(f"WHICH = {sub!r}\nTeacher = None\n")
    assert [find(TEACHERS, f"{sub}/mine.py").WHICH for sub in ("a", "b")] == ["a", "b"]


def _spoken(value: bytes, queue) -> None:
    queue.put(pickle.loads(value).word())


def test_its_classes_go_to_a_fresh_process_by_pickle(folder):
    """What a DataLoader's worker needs under "spawn", where nothing is inherited."""
    name = write(folder / "mine.py", "class Teacher:\n    def word(self):\n        return 'hello'\n")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_spoken, args=(pickle.dumps(find(TEACHERS, name).Teacher()), queue))
    child.start()
    assert queue.get(timeout=60) == "hello"
    child.join()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./none.py", "./none.py: no such file; paths are taken from the working directory, "),
        ("/nowhere/none.py", "/nowhere/none.py: no such file"),
        ("some/folder", "some/folder is a path, and no Python file (.py)"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(folder, name, words):
    assert name_fault(TEACHERS, name).startswith(words)
    with pytest.raises(LookupError):
        find(TEACHERS, name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = zzz\n", "./bad.py, bad.py line 2: NameError: name 'zzz' is not defined"),
        ("def f(:\n", "./bad.py, bad.py line 1: SyntaxError: invalid syntax"),
        (
            "\nimport no_such_thing_x\n",
            "./bad.py, bad.py line 2: ModuleNotFoundError: No module named 'no_such_thing_x'",
        ),
        ("import beside_x\n", "it lies in {folder}: put that on PYTHONPATH, or make a package with an entry point"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(folder, text, words):
    (folder / "beside_x.py").write_text("")
    name = write(folder / "bad.py", text)
    with pytest.raises(PluginError) as caught:
        find(TEACHERS, name)
    assert words.format(folder=folder) in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_paths():
    assert [is_path(n) for n in ("midas", "./a.py", "a.py", "/x/a.py", "a/b")] == [False, True, True, True, True]
    assert short_name("./x/my_depth.py") == "my_depth" and short_name("midas") == "midas"
    assert module_name(Path("a-b.c.py")).startswith("distill.core.by_path.a_b_c_")


def test_a_files_hash_follows_its_bytes(folder):
    name = write(folder / "mine.py", "A = 1\n")
    table = {"teachers": [{"name": name, "options": {}}, {"name": "midas"}]}
    first = file_hashes(table)
    assert list(first) == [name] and first[name].startswith("sha256:")
    write(folder / "mine.py", "A = 2\n")
    assert file_hashes(table) != first
    assert file_hashes({"name": "midas", "other": "absent.py"}) == {}


# --- by entry point ---------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_listed_and_traced(installed):
    installed("my-pkg", ("distill.teachers", "mine", "my_pkg"), code="Teacher = 'there'\n")
    assert "mine" in names(TEACHERS) and "mine" not in names("distill.eval.benchmarks")
    assert find(TEACHERS, "mine").Teacher == "there"
    assert plugins.where_from(TEACHERS, "mine") == ["my_pkg of my-pkg 1.2"]
    assert "did you mean mine?" in name_fault(TEACHERS, "mien")
    assert origins([{"name": "mine"}]) == {"mine": "my-pkg 1.2"}


def test_every_kind_has_a_group(installed):
    installed(
        "all-pkg",
        *((f"distill.{kind}", "mine", "all_pkg") for kind in plugins.KINDS),
        code=f"{' = '.join(plugins.SIGNS.values())} = 1\n",
    )
    for kind, package in plugins.KINDS.items():
        assert getattr(find(package, "mine"), plugins.SIGNS[kind]) == 1


def test_a_name_of_ours_is_never_somebody_elses(installed):
    installed("my-pkg", ("distill.teachers", "midas", "my_pkg"), code="raise SystemExit\n")
    with pytest.raises(LookupError) as caught:
        find(TEACHERS, "midas")
    assert str(caught.value).startswith("midas is distill.teachers.midas and my_pkg of my-pkg 1.2: rename or uninstall")
    assert names(TEACHERS).count("midas") == 1


def test_two_packages_with_one_name(installed):
    for package in ("one-pkg", "two-pkg"):
        installed(package, ("distill.decoders", "mine", package.replace("-", "_")))
    fault = name_fault("distill.students.decoders", "mine")
    assert "one_pkg of one-pkg 1.2 and two_pkg of two-pkg 1.2" in fault


def test_a_package_that_cannot_be_imported_is_named(installed):
    installed("bad-pkg", ("distill.teachers", "mine", "bad_pkg"), code="1 / 0\n")
    with pytest.raises(PluginError, match="mine of bad-pkg 1.2, bad_pkg.py line 1: ZeroDivisionError"):
        find(TEACHERS, "mine")


def test_help_reads_no_entry_points(monkeypatch):
    def never(**_):
        raise AssertionError("entry points were read")

    monkeypatch.setattr("importlib.metadata.entry_points", never)
    assert "show" in names("distill.app.verbs") and find("distill.app.verbs", "show")


def test_the_path_of_a_file_may_be_a_path(folder):
    path = folder / "own_decoder.py"
    path.write_text("class Decoder: pass\n")
    assert plugins.find("distill.students.decoders", path) is plugins.find("distill.students.decoders", str(path))
