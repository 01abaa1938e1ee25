"""How much there is to read: `python -m tests.reading` prints the house in numbers, and what a newcomer reads for what.

A list is the files that somebody opens who has never seen the project, from where CONTRIBUTING.md sends them to where
the change is made; tests/test_layout.py holds each to its bound.
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
"""What is to be added or mended: the most lines that it may take, and the files."""


def lines(path: str | Path) -> int:
    """The lines of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8").count("\n")


def upwards() -> list[str]:
    """Imports of what is read later."""
    return [
        f"{module} imports {name}"
        for module, path in ALL.items()
        if module not in ("distill", "distill.__main__", "distill.contracts")
        for name in text(path).imports
        if name in ALL and name != "distill" and folder(name) > folder(module)
    ]


def circular() -> list[str]:
    """Modules that import each other in a circle, or what does. The front door imports its rooms when it is asked."""
    later = {
        m: {n for n in text(path).imports if n in ALL} - {m, "distill"} for m, path in ALL.items() if m != "distill"
    }
    while free := {m for m, names in later.items() if not names}:
        later = {m: names - free for m, names in later.items() if m not in free}
    return sorted(later)


def longest() -> tuple[int, str]:
    """The longest function, in lines, and where it is."""
    return max(
        (length, f"{path.relative_to(ROOT)}:{line} {name}")
        for path in ALL.values()
        for name, line, length in text(path).functions
    )


def main() -> None:
    """The table."""
    sizes = [lines(path) for path in ALL.values()]
    length, where = longest()
    print(f"{len(sizes)} files of {sum(sizes)} lines, the longest of {max(sizes)}")
    print(f"{len(upwards())} imports that run up, {len(circular())} modules in circles")
    print(f"longest function: {length} lines, {where}")
    for task, (most, files) in TASKS.items():
        each = ", ".join(f"{path} {lines(path)}" for path in files)
        print(f"{task}: {sum(map(lines, files))} lines of at most {most} ({each})")


if __name__ == "__main__":
    main()
