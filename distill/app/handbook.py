"""The pages of docs/reference, made from the code: every command, recipe key, teacher's card, benchmark and recipe.

`python -m distill.app.handbook` writes them all; a test checks that the files match the code.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import distill
from distill.app import explain
from distill.app.shipped import headline, shipped
from distill.core.plugins import find, names, where_from
from distill.eval.protocol import Protocol
from distill.teachers import Card

FOLDER = Path(distill.__file__).parent.parent / "docs" / "reference"
_ORIGIN = "This page is made from the code by `python -m distill.app.handbook`."


def _ours(package: str) -> list[str]:
    """The plug-ins of this repository, without others that are installed on this machine."""
    return [name for name in names(package) if where_from(package, name)[0].startswith("distill.")]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its examples and options, from the parser itself."""
    from distill.app.cli import parser

    top_parser = parser()
    verbs = next(a for a in top_parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    common = {action.dest for action in top_parser._actions}
    text = [f"# Every command and option\n\n{_ORIGIN} [What they are for](../commands.md).\n", _options(top_parser)]
    for name, verb in verbs.items():
        arguments = [a for a in verb._actions if a.dest not in common]
        positionals = " ".join(_value(a) for a in arguments if not a.option_strings)
        text.append(
            f"\n## `{' '.join(f'distill {name} {positionals}'.split())}`\n\n{_sentence(verb.description or '')}\n"
        )
        if verb.epilog:
            text.append(f"```text\n{verb.epilog}\n```\n")
        if arguments:
            text.append(_rows(arguments))
    return "\n".join(text) + "\n"


def _options(whole: argparse.ArgumentParser) -> str:
    return f"Every command takes:\n\n{_rows([a for a in whole._actions if isinstance(a, argparse._StoreTrueAction)])}"


def _rows(actions: Iterable[argparse.Action]) -> str:
    return _table(
        ["argument", "meaning"], ([_argument(a), "; ".join(filter(None, (a.help, _choices(a))))] for a in actions)
    )


def _argument(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = _value(action)
    return f"{names} `{value}`" if names and value else names or f"`{value}`"


def _value(action: argparse.Action) -> str:
    """The placeholder of an argument's value: "FILE", "FX FY CX CY", "[HOW]"; "" for a switch."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    word = action.metavar or action.dest.upper()
    return {"?": f"[{word}]", "+": f"{word} ...", "*": f"[{word} ...]"}.get(str(action.nargs), word)


def _choices(action: argparse.Action) -> str:
    if action.choices is None:
        return ""
    default = action.default if isinstance(action.default, list) else [action.default]
    marked = [f"`{choice}`" + (" (default)" if choice in default else "") for choice in action.choices]
    return f"one of {', '.join(marked)}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# --- teachers ---------------------------------------------------------------------------------------------------------


def teachers() -> str:
    """Every card of every teacher."""
    cards = {name: list(find("distill.teachers", name).CARDS) for name in _ours("distill.teachers")}
    count = sum(len(teacher_cards) for teacher_cards in cards.values())
    text = [
        f"# Teachers' cards\n\n{_ORIGIN} `distill list teachers` also says which weights are on this machine. "
        f"{count} cards of {len(cards)} teachers; the first of each is its default.\n"
    ]
    for name, teacher_cards in cards.items():
        purpose = " ".join((find("distill.teachers", name).__doc__ or "").strip().partition("\n\n")[0].split())
        text.append(f"\n## `{name}`\n\n{purpose}\n")
        head = ["weights", "output", "native size, multiple", "licence of weights", "of code", "commercial use", "note"]
        text.append(_table(head, (_card(card) for card in teacher_cards)))
    return "\n".join(text) + "\n"


def _card(card: Card) -> list[str]:
    size = f"{card.native_size or 'as given'}, {card.multiple}"
    commercial = "yes" if card.commercial else "no"
    return [f"`{card.weights}`", str(card.kind), size, card.licence, card.code_licence, commercial, card.note]


# --- benchmarks -------------------------------------------------------------------------------------------------------


def benchmarks() -> str:
    """Every benchmark with its protocol."""
    text = [
        f"# Benchmarks and their protocols\n\n{_ORIGIN} The id is that of scoring affine disparity; numbers "
        "with different ids are not comparable. [Why one model has two numbers](../protocols.md).\n"
    ]
    rows = []
    for name in _ours("distill.eval.benchmarks"):
        module = find("distill.eval.benchmarks", name)
        p: Protocol = module.PROTOCOL
        first = " ".join((module.__doc__ or "").strip().partition("\n\n")[0].split())
        rows.append([f"`{name}`", first, *_protocol(p), f"`{p.with_kind('affine_disparity').id}`"])
    head = [
        "name",
        "what it is",
        "images",
        "mode, task",
        "truth in metres",
        "pixels that count",
        "disparity floor",
        "id",
    ]
    text.append(_table(head, rows))
    return "\n".join(text) + "\n"


def _protocol(p: Protocol) -> list[str]:
    images = f"{p.num_images:,}" if p.num_images else "any"
    span = f"{p.min_depth:g} to {'any' if p.max_depth == math.inf else f'{p.max_depth:g}'}"
    if p.task not in ("depth", "boundary_f1"):
        span = "none"
    floor = "" if p.task != "depth" else "1 / farthest truth" if p.disparity_floor is None else f"{p.disparity_floor:g}"
    mask = p.mask if p.crop == "none" else f"{p.mask}; crop: {p.crop}"
    return [images, p.mode if p.task == "depth" else f"{p.mode}, {p.task}", span, mask, floor]


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes() -> str:
    """Every recipe and study that ships."""
    text = [f"# Recipes and studies that ship\n\n{_ORIGIN} Each file's first lines have its command.\n"]
    for title, files in (("Recipes", shipped("recipe")), ("Studies (`distill ablate`)", shipped("study"))):
        rows = [[f"[`{name}`](../../recipes/{name}.toml)", headline(path)] for name, path in files.items()]
        text.append(f"## {title}: {len(rows)}\n\n{_table(['name', 'what it is'], rows)}\n")
    return "\n".join(text)


PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": explain.reference,
    "cli.md": commands,
    "teachers.md": teachers,
    "benchmarks.md": benchmarks,
    "recipes.md": recipes,
}
"""The functions that make the pages, by file name in docs/reference."""


def main(folder: Path = FOLDER) -> None:
    """Writes every page; prints the paths of those that changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        text, path = make(), folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
