"""Plug-ins of a user's own project, by path, through every command; and their contracts, run by the user."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import build, contracts
from distill.app.cli import main
from distill.app.recipe import load, parse
from distill.app.strict import read_toml
from distill.core import plugins
from distill.students import checkpoint

TEACHER = '''
"""The mean colour."""
import torch
from dataclasses import replace
from distill.core.depth import Kind
from distill.teachers import Card, WeightsMissingError, check_images, finite

KIND = Kind.AFFINE_DISPARITY
CARDS = (Card(name="mean", weights="none", kind=KIND, licence="MIT", code_licence="MIT", commercial=True),)


class Teacher:
    def __init__(self, factor):
        self.card, self.factor = CARDS[0], factor

    @classmethod
    def load(cls, weights, *, device="cpu", dtype=torch.float32, factor=1.0):
        if weights != "none":
            raise WeightsMissingError(f"no weights here, so not {weights}")
        return cls(factor)

    @torch.no_grad()
    def predict(self, images):
        return finite(self.factor * check_images(images).mean(1), self.card.kind)
'''
DECODER = '''
"""One convolution."""
from torch import nn
from distill.students.decoders import four_channels, split


class Decoder(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.options = {"in_channels": four_channels(in_channels)}
        self.conv = nn.Conv2d(self.options["in_channels"][-1], 1, 1)

    def forward(self, features):
        return self.conv(split(features[-1])[0])
'''
NORMALIZATION = """
from distill.losses.normalize.none import INVARIANT, LEVELS, compare
"""
BENCHMARK = """
from functools import partial
from pathlib import Path
import torch
from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(benchmark="bench", num_images=2)


def samples(root=None, list_file=None):
    return [sample(i, name) for i, name in enumerate("ab")]


def sample(i, name):
    return BenchmarkSample(name, prediction_path(f"{name}.npy"), partial(image, i), partial(truth, i))


def image(seed):
    return torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(seed))


def truth(seed):
    return DepthMap(1 + image(seed)[:1], torch.ones(1, 30, 40, dtype=torch.bool), Kind.METRIC_DEPTH)
"""
RECIPE = """
[run]
name = "mine"
device = "cpu"
[[images]]
photos = "photos"
[crops]
size = 32
min_side = 32
patches = "none"
[[teachers]]
name = "./mean.py"
options = { factor = 2.0 }
[student]
encoder = "test_vit"
decoder = "./conv.py"
[loss]
normalization = "./plain.py"
local_global = 0.0
feature = 0.0
[train]
steps = 2
warmup_steps = 0
batch_size = 2
workers = 0
hflip = false
[[benchmarks]]
name = "sub/bench.py"
[score]
plane_prior = false
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A user's folder, the working directory, with a plug-in of each kind and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_ALLOWED", {})
    (tmp_path / "sub").mkdir()
    (tmp_path / "photos").mkdir()
    files = {"mean.py": TEACHER, "conv.py": DECODER, "plain.py": NORMALIZATION, "sub/bench.py": BENCHMARK}
    for name, text in {**files, "r.toml": RECIPE}.items():
        (tmp_path / name).write_text(text)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def test_every_command_takes_them(project, capsys):
    for verb in ("show", "doctor", "label", "train", "score", "report"):
        assert main([verb, "r.toml"]) == 0, verb
    run = project / "runs" / "mine"
    manifest = json.loads(next(run.glob("labels/*/manifest.json")).read_text())
    assert list(manifest["teachers"]) == ["mean"] and list(manifest["plugins"]) == ["./mean.py"]
    assert manifest["plugins"]["./mean.py"].startswith("sha256:")
    description = json.loads((run / "train" / "student" / "student.json").read_text())
    assert description["spec"]["decoder"] == "conv.py" and list(description["plugins"]) == ["conv.py"]
    assert {path.name for path in (run / "scores").glob("*.json")} == {"bench--mean.json", "bench--student.json"}

    capsys.readouterr()
    plugins._ALLOWED.clear()  # as in a new process
    student = str(run / "train" / "student")
    assert main(["predict", "photos", "--student", student]) == 2
    assert "conv.py is a Python file from outside, and a student's folder runs none unasked" in capsys.readouterr().err
    assert main(["predict", "photos", "--student", student, "--decoder", "conv.py"]) == 0
    assert main(["export", student, "shipped", "--decoder", "conv.py"]) == 0
    again = checkpoint.load("shipped")
    assert torch.isfinite(again(torch.rand(1, 3, 32, 32))).all()


def test_a_students_folder_cannot_name_a_file_to_run(project):
    """Neither by an absolute path nor by one inside itself: the name is looked up among allowed files alone."""
    recipe = load("r.toml")
    folder = checkpoint.save(build.make_student(recipe), project / "student")
    plugins._ALLOWED.clear()
    path = folder / "student.json"
    for name in (str(project / "evil.py"), "./evil.py"):
        (project / "evil.py").write_text("raise SystemExit('run')")
        description = json.loads(path.read_text())
        description["spec"]["decoder"] = name
        description.pop("sha256", None)
        path.write_text(json.dumps(description))
        with pytest.raises(LookupError, match="runs none unasked"):
            checkpoint.load(folder)


def test_a_changed_file_makes_other_labels_and_another_run(project):
    recipe = load("r.toml")
    before = build.labels_folder(recipe), build.identity(recipe)
    (project / "plain.py").write_text(NORMALIZATION + "\n# changed\n")
    assert build.labels_folder(recipe) == before[0] and build.identity(recipe) != before[1]
    (project / "mean.py").write_text(TEACHER + "\n# changed\n")
    assert build.labels_folder(recipe) != before[0]


def test_faults_name_the_file(project, capsys):
    assert main(["show", "r.toml", "--set", "teachers.0.name=./meen.py"]) == 2
    assert "teachers[0]: ./meen.py: no such file; paths are taken from the working directory" in capsys.readouterr().err
    (project / "mean.py").write_text("import nothing_like_it\n")
    assert main(["label", "r.toml"]) == 2
    error = capsys.readouterr().err
    assert "./mean.py, mean.py line 1: ModuleNotFoundError: No module named 'nothing_like_it'" in error
    assert "depth-distill[" not in error
    assert main(["label", "r.toml", "--set", "teachers.0.name=./sub/bench.py"]) == 2
    assert "./sub/bench.py has no Teacher, so it is not one of the teachers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("./mean.py", "teachers"),
        ("conv.py", "decoders"),
        ("plain.py", "normalizations"),
        ("sub/bench.py", "benchmarks"),
    ],
)
def test_the_user_runs_the_contracts(project, capsys, file, kind):
    assert contracts.kind_of(file) == kind
    assert contracts.main([file]) == 0
    captured = capsys.readouterr()
    kept = [line.removeprefix("kept  ") for line in captured.out.splitlines()]
    assert kept == [contracts.promise(contract) for contract in contracts.CONTRACTS[kind]]
    assert "not checked" not in captured.err


def test_the_teacher_of_the_contributors_page_keeps_its_promises(project, capsys):
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (project / "my_depth.py").write_text(textwrap.dedent(page.partition("```python\n")[2].partition("```")[0]))
    assert contracts.main(["./my_depth.py"]) == 0, capsys.readouterr().err


BROKEN = {
    "another name": (TEACHER.replace('name="mean"', 'name="x"'), "a card's name is x, not mean"),
    "sold under NC": (
        TEACHER.replace('licence="MIT", code', 'licence="CC BY-NC", code'),
        "commercial = True under CC BY-NC",
    ),
    "loose keywords": (TEACHER.replace("factor=1.0)", "factor=1.0, **more)"), "takes *more"),
    "silent about weights": (TEACHER.replace('if weights != "none"', "if False"), "raised nothing"),
    "a wrong size": (TEACHER.replace(".mean(1)", ".mean(1)[:, 1:]"), "(61, 90) gave (2, 60, 90)"),
    "it depends on the batch": (TEACHER.replace("self.factor *", "len(images) *"), "they differ by"),
    "it takes bytes": (TEACHER.replace("check_images(images)", "images.float()[-1:]"), "gave (1, 61, 90)"),
    "raises": (TEACHER.replace("return finite", "1 / 0\n        return finite"), "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_promise_is_told(project, capsys, case):
    text, words = BROKEN[case]
    assert text != TEACHER
    (project / "mean.py").write_text(text)
    assert contracts.main(["mean.py"]) == 1
    assert words in capsys.readouterr().err


def test_what_is_no_plugin(project, capsys):
    (project / "empty.py").write_text("")
    assert contracts.main(["empty.py"]) == 2
    assert "empty.py has none of Teacher (teachers), Decoder (decoders)" in capsys.readouterr().err
    assert contracts.main(["nothing"]) == 2
    assert contracts.main(["marigold"]) == 0
    assert "needs weights: give --weights PATH" in capsys.readouterr().err


def test_a_recipe_that_is_only_read_lets_no_file_run(project):
    """As the one in the manifest of somebody's labels, which is compared with one's own."""
    table = read_toml(project / "r.toml")
    plugins._ALLOWED.clear()
    parse(table, uses=["images", "crops"])
    parse(table)
    assert not plugins._ALLOWED
    load("r.toml")
    assert [*plugins._ALLOWED] == ["conv.py"]


def test_of_two_files_of_one_name_none_is_taken_for_the_other(project):
    for place in ("conv.py", "sub/conv.py"):
        (project / place).write_text(DECODER)
        plugins.allow(place)
    assert plugins.allowed("conv.py") == str((project / "conv.py").resolve())
    (project / "conv.py").rename(project / "other.py")
    plugins._ALLOWED.clear()
    for place in ("a", "b"):
        (project / place).mkdir()
        (project / place / "conv.py").write_text(DECODER)
        plugins.allow(f"{place}/conv.py")
    with pytest.raises(LookupError, match=r"conv.py may be .*a.conv.py or .*b.conv.py: give one"):
        plugins.allowed("conv.py")


def test_command_started_in_a_removed_folder_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["list", "teachers"]) == 2
    assert "the current folder was removed" in capsys.readouterr().err
