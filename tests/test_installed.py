"""The wheel in a fresh environment, next to a user's own eval.py, teachers/, ...: it installs only `distill`.

The environment uses this one's packages through a .pth file, which does not import editable installs.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_layout import ALL, ROOT

TOPS = ["eval", "teachers", "students", "recipes"]
TINY = [
    "images=[{photos='*.png'}]", "teachers=[{name='analytic'}]", "crops.size=28", "crops.min_side=40",
    "train.steps=2", "train.warmup_steps=0", "train.batch_size=2", "train.workers=0",
    "benchmarks=[{name='pairs', root='INDEX.tsv'}]", "score.plane_prior=false", "run.device=cpu",
]  # fmt: skip
SNIPPET = """
from distill.app.cli import main
from distill.inference.predict import load, read

depth = load("pocket").predict(read("photo.png"))
assert str(depth.kind) == "affine_disparity" and depth.values.shape == depth.valid.shape == (1, 40, 50)
tiny = [word for assignment in {tiny!r} for word in ("--set", assignment)]
verbs = [["label", "demo"], ["train", "demo"], ["score", "demo"], ["report", "demo"], ["doctor", "demo"]]
for argv in [["list"], ["show", "demo"], *[[*verb, *tiny] for verb in verbs], ["predict", "photo.png"]]:
    assert main(argv) == 0, argv
"""
WHOSE = """
import importlib.util
for top in {tops!r}:
    spec = importlib.util.find_spec(top)
    print(top, spec and (spec.origin or list(spec.submodule_search_locations)[0]))
import distill
print("distill", distill.__file__)
"""


def run(*argv: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a command; PYTHONPATH is `path` or unset."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    env |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built from a copy because building writes next to the sources."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("built")
    source.mkdir()
    for name in ["distill", *TOPS]:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source)
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with the wheel installed."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    argv = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    run(sys.executable, *argv, wheel, cwd=home)
    return python


@pytest.fixture
def user(tmp_path) -> Path:
    """A folder with a user's modules, named like our top folders, that exit when imported."""
    import numpy as np
    from PIL import Image

    for top in TOPS:
        (tmp_path / top).mkdir()
        (tmp_path / top / "__init__.py").write_text("raise SystemExit('the user\\'s own was imported')\n")
    (tmp_path / "eval.py").write_text("raise SystemExit('the user\\'s own was imported')\n")
    rng = np.random.default_rng(0)
    for name in ("photo", "other"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "photo.npy", rng.uniform(1, 5, (40, 50)).astype(np.float32))
    (tmp_path / "INDEX.tsv").write_text("name\trgb\tdepth\tscale_to_metres\nphoto\tphoto.png\tphoto.npy\t1\n")
    return tmp_path


def test_wheel_and_source_hold_every_file_once(built):
    wheel, archive = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as z:
        in_wheel = z.namelist()
    with tarfile.open(archive) as t:
        in_source = [m.name.partition("/")[2] for m in t.getmembers() if not m.isdir()]
        assert not [m.name for m in t.getmembers() if m.issym() or m.islnk()]
    modules = {name.removeprefix("distill.").replace(".", "/") for name in ALL if name != "distill"}
    for names in (in_wheel, in_source):
        assert not [name for name, times in collections.Counter(names).items() if times > 1]
        python = {name for name in names if name.endswith(".py")}
        packaged = {n.removeprefix("distill/").removesuffix(".py").removesuffix("/__init__") for n in python}
        assert packaged - {"__init__"} == modules
        data = {str(path.relative_to(ROOT)) for path in (ROOT / "distill" / "assets").rglob("*") if path.is_file()}
        data |= {f"distill/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*") if p.is_file()}
        assert data | {"distill/eval/papers.toml", "distill/py.typed"} <= set(names)
    assert {name.partition("/")[0] for name in in_wheel} == {"distill", "depth_distill-0.1.0.dist-info"}


@pytest.mark.slow
def test_every_command_works_beside_a_users_own_modules(python, user):
    """The README's snippet and the commands, with the user's folders in the working directory and on PYTHONPATH."""
    whose = run(python, "-c", WHOSE.format(tops=TOPS), cwd=user, path=user)
    assert dict(line.split() for line in whose.splitlines()) == {
        **{top: str(user / top / "__init__.py") for top in TOPS},
        "distill": str(next(python.parents[1].glob("lib/*/site-packages")) / "distill" / "__init__.py"),
    }
    run(python, "-c", SNIPPET.format(tiny=TINY), cwd=user, path=user)
    assert (user / "runs" / "demo" / "train" / "student" / "model.safetensors").is_file()
    written = [path for path in Path(whose.split()[-1]).parent.rglob("*") if path.name in ("runs", "labels")]
    assert not written, "a run belongs to the working directory"


def test_nothing_else_is_importable(python, tmp_path):
    whose = run(python, "-c", WHOSE.format(tops=TOPS), cwd=tmp_path)
    assert whose.splitlines()[: len(TOPS)] == [f"{top} None" for top in TOPS]
    assert "usage: distill" in run(python.with_name("distill"), "--help", cwd=tmp_path)
