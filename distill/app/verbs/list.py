"""list what there is: teachers (depth types, licences), decoders, loss terms, data sets, benchmarks, recipes, studies

distill list teachers     depth types, sizes, licences, commercial use, revisions on this machine
distill list recipes      names that `distill show`, `label`, `train` and `score` take from anywhere
"""

from __future__ import annotations

import argparse
import ast
from typing import Any

from distill.core.plugins import KINDS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=[*KINDS, "recipes", "studies"], help="one kind")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import table
    from distill.app.shipped import headline, shipped
    from distill.core.plugins import names

    for what in [args.what] if args.what else [*KINDS, "recipes", "studies"]:
        if what in ("recipes", "studies"):
            files = shipped("recipe" if what == "recipes" else "study")
            table(what, ["name", "what it is"], [[name, headline(file)] for name, file in files.items()], text=True)
        elif what == "teachers" and args.what:
            _teachers()
        elif what == "datasets" and args.what:
            _datasets()
        else:
            rows = [[name, _description(KINDS[what], name)] for name in names(KINDS[what])]
            table(what, ["name", "what it is"], rows + (_OTHER_TEACHERS if what == "teachers" else []), text=True)
    return 0


def _description(package: str, name: str) -> str:
    """A plug-in in one line: its docstring's first paragraph; and where it comes from, if from outside the package."""
    from distill.core.plugins import source, where_from

    places = where_from(package, name)
    if len(places) > 1:
        return " and ".join(places)
    try:
        docstring = ast.get_docstring(ast.parse(source(package, name))) or ""
    except (LookupError, OSError, SyntaxError, ValueError):
        docstring = ""
    first = " ".join(docstring.partition("\n\n")[0].split())
    return first if places[0].startswith("distill.") else f"{places[0]}: {first}" if first else places[0]


_OTHER_TEACHERS = [
    ["truth", "the source's own ground truth: RGB-D pairs, synthetic scenes"],
    ['checkpoint, weights = "pocket"', "the built-in model"],
]
"""Teachers that a recipe can name and that have no file in teachers/."""


def _teachers() -> None:
    """Prints a table for each teacher and kind of map; the title has what all its weights share, to fit 100 columns."""
    from itertools import groupby

    from distill.app.console import note, table
    from distill.core.folders import pocket
    from distill.core.plugins import names
    from distill.teachers import cached_revision, revision_of

    cards = [card for name in names("distill.teachers") for card in _cards(name)]
    cards.sort(key=lambda c: (c.name, c.kind, c.native_size or 0, c.code_licence))
    for (name, kind, size, code), group in groupby(
        cards, key=lambda c: (c.name, c.kind, c.native_size, c.code_licence)
    ):
        members = list(group)
        licences = {c.licence for c in members}
        multiple = f", sides multiples of {members[0].multiple}" if members[0].multiple > 1 else ""
        sides = f"native size {size}{multiple}" if size else "any size"
        if licences == {code}:
            licence_text = f"licence of weights and code: {code}"
        else:
            weights = f"licence of the weights: {members[0].licence}; " if len(licences) == 1 else ""
            licence_text = f"{weights}licence of the code: {code}"
        title = f"{name}: {kind}, larger is {kind.larger_is}; {sides}\n{licence_text}"
        rows = []
        for card in members:
            revision = revision_of(pocket()) if card.weights == "pocket" else card.revision
            if revision == "unknown":
                revision = cached_revision(card.weights)
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
    note('truth: the source\'s own ground truth (name = "truth"); pocket: the built-in model (checkpoint)')
    note("revision: of the weights on this machine; every label's manifest carries the one that made it")


def _datasets() -> None:
    """Prints each data set's depth type, licence and published count, and its layout as its module describes it."""
    from distill.app.console import note, table
    from distill.core.plugins import PluginError, find, names

    rows, layouts = [], []
    for name in names(KINDS["datasets"]):
        try:
            module = find(KINDS["datasets"], name)
        except (LookupError, PluginError) as error:
            rows.append([name, str(error), "", "", ""])
            continue
        facts = module.FACTS
        images = f"{facts.images:,}" if facts.images else "-"
        rows.append([name, str(facts.kind), images, "yes" if facts.commercial else "no", facts.licence])
        layouts.append(f"{name}: {' '.join((module.__doc__ or '').split())}  {facts.url}")
    table("datasets", ["name", "depth type", "images", "commercial use", "licence"], rows, text=True)
    for layout in layouts:
        note(layout)
    note("`distill index NAME ROOT` comes first, then [[images]] dataset = NAME, root = ROOT")


def _cards(name: str) -> list[Any]:
    """A teacher's cards; one from outside that cannot be imported gives an error line and does not end the list."""
    from distill.app.console import fail, note
    from distill.core.plugins import PluginError, find, where_from

    places = where_from("distill.teachers", name)
    try:
        cards = list(find("distill.teachers", name).CARDS)
    except (LookupError, PluginError, AttributeError) as error:
        fail(f"{' and '.join(places)}: {error}")
        return []
    if not places[0].startswith("distill."):
        note(f"{name}: {places[0]}")
    return cards
