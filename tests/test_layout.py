"""The layout rules, checked by the imports: folder order, one owner per dependency, sizes, no forbidden files."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In the order of the data flow. A folder imports only itself and folders above it; no import cycles inside a folder.
FOLDERS = [
    "distill.core",
    "distill.students",
    "distill.data",
    "distill.losses",
    "distill.shards",
    "distill.training",
    "distill.teachers",
    "distill.labelling",
    "distill.eval",
    "distill.eval.reports",
    "distill.inference",
    "distill.app",
]
OWNERS = {
    "timm": ["distill.students.encoder", "distill.students.positions", "distill.students.remote_code"],
    "accelerate": ["distill.training.parallel", "distill.training.train"],
    "rich": ["distill.app.console"],
    "webdataset": ["distill.shards.shards"],
    "imagecodecs": ["distill.shards.codecs", "distill.data.tiffs", "distill.data.cicp"],
    "av": ["distill.inference.video"],
    "pillow_heif": ["distill.data.photos"],
    "OpenEXR": ["distill.data.exrs"],
    "h5py": ["distill.data.hdf5s"],
    "fsspec": ["distill.data.storage"],
    "transformers": ["distill.teachers.", "distill.students.remote_code"],
    "diffusers": ["distill.teachers."],
    "tensorboard": ["distill.training.train"],
    "huggingface_hub": ["distill.core.hub"],
    "fcntl": ["distill.core.files"],
    "filelock": ["distill.labelling.leases"],
    "obstore": ["distill.labelling.objects"],
    "ray": ["distill.app.cluster"],
    "tomli_w": ["distill.app.recipe", "distill.app.explain"],
    "triton": [
        "distill.core.codes_kernel",
        "distill.core.launch",
        "distill.losses.kernels.",
        "distill.data.scenes.gpu.",
    ],
    "numba": ["distill.data.scenes.fused.compiled"],
    "argparse": ["distill.app.cli", "distill.app.contracts", "distill.app.handbook", "distill.app.verbs."],
}
# The maths: pure functions of tensors. No files, no processes, no recipes.
MATHS = [
    "distill.core.depth",
    "distill.core.align",
    "distill.core.crops",
    "distill.core.labels",
    "distill.data.scenes.",
    "distill.data.corruptions",
    "distill.losses.",
    "distill.labelling.bridge",
    "distill.labelling.alignment",
    "distill.students.quantize",
    "distill.eval.metrics",
    "distill.eval.verdict",
    "distill.eval.agreement",
    "distill.eval.boundary",
]
IMPURE = {"pathlib", "os", "json", "tomllib", "shutil", "subprocess", "accelerate", "PIL", "cv2", "safetensors", "rich"}


def modules() -> dict[str, Path]:
    """Every module of the package by name; Path.rglob does not follow links, so the top folders are walked too."""
    paths = {}
    for top in ("distill", "students", "teachers", "eval"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            paths[name if top == "distill" else f"distill.{name}"] = path
    return paths


ALL = modules()


def each_module(rule):
    """Turn a rule for one module into a test of all modules, which names every module that breaks it."""

    def test():
        broken = []
        for module, path in ALL.items():
            try:
                rule(module, path)
            except AssertionError as error:
                broken.append(f"{module}: {error}")
        assert not broken, "\n".join(broken)

    test.__name__, test.__doc__ = rule.__name__, rule.__doc__
    return test


def folder(module: str) -> int:
    """The position of a module's folder; the longest entry wins."""
    places = [(len(f), i) for i, f in enumerate(FOLDERS) if module == f or module.startswith(f + ".")]
    assert places, f"{module} is in no folder of FOLDERS"
    return max(places)[1]


def owned(module: str, entries: list[str]) -> bool:
    """Whether a module is an entry, or is in a folder that is an entry with a trailing dot."""
    return any(module == e or (e.endswith(".") and (module + ".").startswith(e)) for e in entries)


@dataclass(frozen=True, slots=True)
class Text:
    """The facts of a file that the tests need; caching the syntax trees would take a hundred megabytes."""

    lines: int
    docstring: str | None
    functions: list[tuple[str, int, int]]
    """Name, line and length in lines."""
    imports: list[str]
    """Every absolute module name imported anywhere in the file, inside functions too."""
    at_top: list[str]
    """Only those outside functions."""


@functools.cache
def text(path: Path) -> Text:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes = [*ast.walk(tree)]
    functions = [
        (n.name, n.lineno, (n.end_lineno or 0) - n.lineno + 1) for n in nodes if isinstance(n, ast.FunctionDef)
    ]
    everywhere, at_top = ([name for n in part for name in imported_by(n, path)] for part in (nodes, tree.body))
    return Text(source.count("\n"), ast.get_docstring(tree), functions, everywhere, at_top)


def imported_by(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{path}: relative import on line {node.lineno}"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in ALL else str(node.module) for name in names]


def test_there_is_something_to_check():
    assert len(ALL) > 20 and {"distill.core.depth", "distill.eval.score", "distill.students"} <= set(ALL)


@each_module
def test_a_folder_imports_only_what_stands_above_it(module, path):
    if module in ("distill", "distill.__main__", "distill.contracts"):
        return
    for name in text(path).imports:
        if name.startswith("distill.") and name in ALL:
            assert folder(name) <= folder(module), f"{module} imports {name}, which is read later"


def test_no_circle():
    # `distill` itself is exempt: it imports its parts lazily.
    imports = {m: {n for n in text(path).imports if n in ALL and n != m} for m, path in ALL.items() if m != "distill"}
    imports = {m: names - {"distill"} for m, names in imports.items()}
    while leaves := {m for m, names in imports.items() if not names}:
        imports = {m: names - leaves for m, names in imports.items() if m not in leaves}
    assert not imports, f"these import each other in a circle, or what does: {', '.join(imports)}"


def test_only_distill_is_importable():
    outside = re.compile(r"^ *(from|import) +(students|teachers|eval|recipes)\b", re.MULTILINE)
    files = [*ALL.values(), *(ROOT / "tests").rglob("*.py")]
    matches = [(path, outside.search(path.read_text(encoding="utf-8"))) for path in files]
    assert not [f"{path.relative_to(ROOT)}: {line[0]}" for path, line in matches if line]


@each_module
def test_one_owner_per_dependency(module, path):
    for name in text(path).imports:
        owners = OWNERS.get(name.split(".")[0])
        assert not owners or owned(module, owners), f"{module} imports {name}; only {owners} may"


@each_module
def test_maths_is_pure(module, path):
    if owned(module, MATHS):
        assert not {name.split(".")[0] for name in text(path).imports} & IMPURE, f"{module} is maths"


def test_promised_names_are_found_and_the_door_is_light():
    import distill
    from distill import losses

    assert all(getattr(losses, name) for name in ("distillation_loss", "gradient_loss", "hdn_loss"))
    assert callable(distill.load) and callable(distill.load_teacher)
    code = "import sys, distill, distill.losses, distill.losses.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@each_module
def test_teachers_import_heavy_libraries_only_when_loading(module, path):
    if module.startswith("distill.teachers.") or module == "distill.core.hub":
        at_top = {name.split(".")[0] for name in text(path).at_top}
        heavy = at_top & {"transformers", "diffusers", "scipy", "huggingface_hub"}
        assert not heavy, f"{module} imports {heavy} at the top: import it inside load"


@each_module
def test_sizes_and_docstrings(module, path):
    facts = text(path)
    assert facts.lines <= 420, f"{path} has {facts.lines} lines"
    assert facts.docstring, f"{path} does not say what it is for"
    for name, line, length in facts.functions:
        assert length <= 65, f"{path}:{line} {name} has {length} lines"


def test_tests_are_short_too():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > 420}


def test_no_drawers_for_everything():
    forbidden = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
    assert not [str(path) for path in ALL.values() if path.name in forbidden]


def test_what_a_newcomer_reads_stays_short():
    from tests import reading

    counts = {task: (sum(map(reading.lines, files)), limit) for task, (limit, files) in reading.TASKS.items()}
    assert not {task: count for task, count in counts.items() if count[0] > count[1]}


@pytest.mark.parametrize("name", ["speed", "evidence", "chaos"])
def test_every_script_beside_the_tests_can_be_imported(name):
    """No test runs these scripts: without this, renamed imports would break documented commands unnoticed."""
    paths = sorted((ROOT / "tests" / name).glob("[!_]*.py"))
    assert paths
    for path in paths:
        importlib.import_module(f"tests.{name}.{path.stem}")
