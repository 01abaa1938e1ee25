"""list teachers (with kinds and licences), decoders, normalizations, benchmarks, recipes"""

from __future__ import annotations

import argparse
from pathlib import Path

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ["teachers", "decoders", "normalizations", "benchmarks", "recipes"]
    parser.add_argument("what", nargs="?", choices=kinds, help="one kind")


def run(args: argparse.Namespace) -> int:
    from distill.console import table
    from distill.plugins import find, names

    folders = {
        "teachers": "teachers",
        "decoders": "students.decoders",
        "normalizations": "distill.normalize",
        "benchmarks": "eval.benchmarks",
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
            cards = [card for name in names("teachers") for card in find("teachers", name).CARDS]
            rows = [
                [c.name, c.weights, str(c.kind), c.licence, "yes" if c.commercial else "no", str(c.native_size or "-")]
                for c in cards
            ]
            table("teachers", ["teacher", "weights", "kind", "licence", "commercial", "native size"], rows)
        else:
            table(what, ["name"], [[name] for name in names(folders[what])])
    return 0


def _headline(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
