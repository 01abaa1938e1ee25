"""list teachers (with kinds and licences), decoders, normalizations, benchmarks, recipes"""

from __future__ import annotations

import argparse
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ["teachers", "decoders", "normalizations", "benchmarks", "recipes"]
    parser.add_argument("what", nargs="?", choices=kinds, help="one kind")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import table
    from distill.core.plugins import names

    folders = {
        "teachers": "distill.teachers",
        "decoders": "distill.students.decoders",
        "normalizations": "distill.losses.normalize",
        "benchmarks": "distill.eval.benchmarks",
    }
    for what in [args.what] if args.what else [*folders, "recipes"]:
        if what == "recipes":
            root = RECIPES
            rows = [
                [str(p.relative_to(root.parent)), _headline(p)]
                for p in sorted(root.rglob("*.toml"))
                if not p.stem.endswith("_card")
            ]
            table("recipes", ["recipe", "what it is"], rows)
        elif what == "teachers" and args.what:
            _teachers()
        else:
            table(what, ["name"], [[name] for name in names(folders[what])])
    return 0


def _teachers() -> None:
    """A table for each teacher and kind of map; what all its weights share stands above it, so that 100 columns do."""
    from itertools import groupby

    from distill.app.console import note, table
    from distill.core.plugins import find, names
    from distill.teachers import revision_here, revision_of
    from distill.teachers.checkpoint import pocket

    cards = [card for name in names("distill.teachers") for card in find("distill.teachers", name).CARDS]
    cards.sort(key=lambda c: (c.name, c.kind, c.native_size or 0, c.code_licence))
    for (name, kind, size, code), group in groupby(
        cards, key=lambda c: (c.name, c.kind, c.native_size, c.code_licence)
    ):
        members = list(group)
        licences = {c.licence for c in members}
        sides = f"native size {size}, sides multiples of {members[0].multiple}" if size else "any size"
        if licences == {code}:
            stated = f"licence of weights and code: {code}"
        else:
            weights = f"licence of the weights: {members[0].licence}; " if len(licences) == 1 else ""
            stated = f"{weights}licence of the code: {code}"
        title = f"{name}: {kind}, larger is {kind.larger_is}; {sides}\n{stated}"
        rows = []
        for card in members:
            revision = revision_of(pocket()) if card.weights == "pocket" else revision_here(card)
            rows.append(
                [card.weights, "yes" if card.commercial else "no", revision.removeprefix("sha256:")[:10] or "-"]
            )
        head = ["weights", "commercial use", "revision"]
        if len(licences) > 1:
            rows = [[*row, card.licence] for row, card in zip(rows, members, strict=True)]
            head.append("licence")
        table(title, head, rows, text=True)
        for text in dict.fromkeys(card.note for card in members if card.note):
            first, *others = [c.weights.partition("/")[2] or c.weights for c in members if c.note == text]
            note(f"  {first}{f' and {len(others)} more' if others else ''}: {text}")
    note("revision: of the weights on this machine; every label's manifest carries the one that made it")


def _headline(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
