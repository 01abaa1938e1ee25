"""How much there is to read: `python -m tests.reading` prints sizes of the code, and of what a newcomer reads per task.

A task's list has the files that somebody new to the project opens, from where CONTRIBUTING.md points to where the
change is made; tests/test_layout.py checks each list against its limit.
"""

from __future__ import annotations

from pathlib import Path

from tests.test_layout import ALL, ROOT, folder, text

TASKS: dict[str, tuple[int, list[str]]] = {
    "a teacher": (450, ["distill/core/depth.py", "teachers/__init__.py", "teachers/midas.py"]),
    "a loss term": (
        300,
        [
            "distill/losses/terms/__init__.py",
            "distill/losses/terms/gradient.py",
            "distill/losses/losses.py",
        ],
    ),
    "a resume bug": (
        900,
        [
            "distill/training/train.py",
            "distill/training/resume.py",
            "distill/training/checkpoints.py",
            "distill/training/sampling.py",
        ],
    ),
    "a benchmark": (450, ["eval/benchmarks/__init__.py", "eval/benchmarks/nyu.py", "eval/protocol.py"]),
    "supervised training": (
        600,
        [
            "distill/core/labels.py",
            "distill/data/datasets/__init__.py",
            "distill/data/datasets/tartanair.py",
            "distill/losses/objective.py",
            "distill/losses/terms/__init__.py",
        ],
    ),
}
"""What is to be added or fixed: the maximum number of lines to read, and the files."""


def lines(path: str | Path) -> int:
    """The number of lines of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8").count("\n")


def upwards() -> list[str]:
    """Imports of modules that come later in the reading order."""
    return [
        f"{module} imports {name}"
        for module, path in ALL.items()
        if module not in ("distill", "distill.__main__", "distill.contracts")
        for name in text(path).imports
        if name in ALL and name != "distill" and folder(name) > folder(module)
    ]


def circular() -> list[str]:
    """Modules in an import cycle, or that import one. `distill` itself is exempt: it imports its parts lazily."""
    imports = {
        m: {n for n in text(path).imports if n in ALL} - {m, "distill"} for m, path in ALL.items() if m != "distill"
    }
    while leaves := {m for m, names in imports.items() if not names}:
        imports = {m: names - leaves for m, names in imports.items() if m not in leaves}
    return sorted(imports)


def longest() -> tuple[int, str]:
    """The longest function: its lines and its place."""
    return max(
        (length, f"{path.relative_to(ROOT)}:{line} {name}")
        for path in ALL.values()
        for name, line, length in text(path).functions
    )


def main() -> None:
    """Print the table."""
    sizes = [lines(path) for path in ALL.values()]
    length, where = longest()
    print(f"{len(sizes)} files of {sum(sizes)} lines, the longest of {max(sizes)}")
    print(f"{len(upwards())} imports that run up, {len(circular())} modules in circles")
    print(f"longest function: {length} lines, {where}")
    for task, (limit, files) in TASKS.items():
        per_file = ", ".join(f"{path} {lines(path)}" for path in files)
        print(f"{task}: {sum(map(lines, files))} lines of at most {limit} ({per_file})")


if __name__ == "__main__":
    main()
