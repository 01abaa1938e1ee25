"""The house rules, read from the imports: reading order, one owner per dependency, sizes, no forbidden files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Files are read in this order and import only what has been read before. A trailing dot stands for a folder.
ORDER = [
    "distill.plugins",
    "distill.findings",
    "distill.depth",
    "distill.align",
    "distill.crops",
    "distill.scenes.",
    "distill.labels",
    "distill.bridge",
    "distill.faults",
    "distill.pairs",
    "distill.photos",
    "distill.places",
    "distill.sources",
    "distill.codec",
    "distill.shards",
    "distill.mirror",
    "distill.normalize.",
    "distill.losses",
    "distill.objective",
    "students.encoder",
    "students.dysample",
    "students.decoders.",
    "students",
    "distill.quantize",
    "distill.modelcard",
    "distill.checkpoint",
    "distill.exports",
    "teachers.",
    "distill.annotate",
    "distill.claim",
    "distill.ledger",
    "distill.label",
    "distill.augment",
    "distill.order",
    "distill.schedule",
    "distill.trainlog",
    "distill.diagnose",
    "distill.runstate",
    "distill.feed",
    "distill.step",
    "distill.train",
    "eval",
    "eval.metrics",
    "eval.boundary",
    "eval.verdict",
    "eval.agreement",
    "eval.protocol",
    "eval.da2k",
    "eval.benchmarks.",
    "eval.fit",
    "eval.tasks",
    "eval.prior",
    "eval.completeness",
    "eval.fetch",
    "eval.stored",
    "eval.scorefile",
    "eval.papers",
    "eval.tables",
    "eval.score",
    "eval.compare",
    "eval.figures",
    "eval.page",
    "distill.outputs",
    "distill.film",
    "distill.predict",
    "eval.disagreement",
    "eval.compare_page",
    "eval.gallery",
    "eval.scoreboard",
    "eval.report",
    "eval.ablation",
    "distill.strict",
    "distill.recipe",
    "distill.lineage",
    "distill.study",
    "distill.build",
    "distill.preflight",
    "distill.contact",
    "distill.console",
    "distill.journey",
    "distill.repair",
    "distill.comparison",
    "distill.ablate",
    "distill.verbs.",
    "distill.cli",
    "distill.__main__",
]
OWNERS = {
    "timm": ["students.encoder"],
    "accelerate": ["distill.train"],
    "rich": ["distill.console"],
    "webdataset": ["distill.shards"],
    "imagecodecs": ["distill.codec"],
    "fsspec": ["distill.places"],
    "transformers": ["teachers."],
    "diffusers": ["teachers."],
    "tensorboard": ["distill.train"],
    "tomli_w": ["distill.recipe"],
    "argparse": ["distill.cli", "distill.verbs."],
}
# The maths: pure functions of tensors. No files, no processes, no recipes.
MATHS = [
    "distill.depth",
    "distill.align",
    "distill.crops",
    "distill.scenes.",
    "distill.labels",
    "distill.bridge",
    "distill.faults",
    "distill.normalize.",
    "distill.losses",
    "distill.objective",
    "distill.quantize",
    "eval.metrics",
    "eval.verdict",
    "eval.agreement",
    "eval.boundary",
]
IMPURE = {"pathlib", "os", "json", "tomllib", "shutil", "subprocess", "accelerate", "PIL", "cv2", "safetensors", "rich"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("distill", "students", "teachers", "eval"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


def place(module: str) -> int | None:
    """The position of a module in ORDER; the longest matching entry wins."""
    best, length = None, -1
    for i, entry in enumerate(ORDER):
        folder = entry.rstrip(".")
        if module == folder or (entry.endswith(".") and module.startswith(entry)):
            if len(entry) > length:
                best, length = i, len(entry)
    return best


def imported(path: Path) -> list[str]:
    """Every absolute module name imported anywhere in the file, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import on line {node.lineno}"
            names += [
                f"{node.module}.{a.name}" if is_module(f"{node.module}.{a.name}") else str(node.module)
                for a in node.names
            ]
    return names


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


ALL = modules()
IDS = [name for name, _ in ALL]


def test_there_is_something_to_check():
    assert len(ALL) > 20 and {"distill.depth", "eval.score", "students"} <= set(IDS)


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_imports_only_what_has_been_read_before(module, path):
    if module == "distill":
        return
    here = place(module)
    assert here is not None, f"{module} has no place in the reading order: add it to ORDER"
    for name in imported(path):
        if name.split(".")[0] not in ("distill", "students", "teachers", "eval") or name == "distill":
            continue
        there = place(name)
        assert there is not None, f"{module} imports {name}, which has no place in the reading order"
        same_folder = there == here and (ORDER[here].endswith(".") or name == module)
        assert there < here or same_folder, f"{module} imports {name}, which is read later"


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_one_owner_per_dependency(module, path):
    for name in imported(path):
        owners = OWNERS.get(name.split(".")[0])
        if owners:
            allowed = any(module == o or (o.endswith(".") and module.startswith(o)) for o in owners)
            assert allowed, f"{module} imports {name}; only {owners} may"


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_maths_is_pure(module, path):
    if not any(module == m or (m.endswith(".") and (module + ".").startswith(m)) for m in MATHS):
        return
    for name in imported(path):
        assert name.split(".")[0] not in IMPURE, f"{module} is maths and imports {name}"


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_eval_is_never_imported_whole(module, path):
    assert "eval" not in imported(path), f"{module} binds the name eval: use `from eval.metrics import ...`"


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_teachers_import_heavy_libraries_only_when_loading(module, path):
    if not module.startswith("teachers."):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            heavy = name.split(".")[0] in ("transformers", "diffusers", "scipy")
            assert not heavy, f"{module} imports {name} at the top: import it inside load"


@pytest.mark.parametrize(("module", "path"), ALL, ids=IDS)
def test_sizes_and_docstrings(module, path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 420, f"{path} has {text.count(chr(10))} lines"
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 65, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_no_drawers_for_everything():
    forbidden = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
    assert not [str(path) for _, path in ALL if path.name in forbidden]
