"""What every plug-in must keep, as checks that anybody can run on a plug-in of their own.

A check takes a Subject and raises what says how the promise is broken; the first line of its docstring is the promise
itself, in the words of CONTRIBUTING.md. tests/test_contracts.py runs all of them on everything in the folders.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.app.console import fail, note, say
from distill.app.loss_contracts import NORMALIZATIONS, TERMS
from distill.app.promises import EXPECTED, Contract, ContractError, NotCheckedError, Subject, require, signature
from distill.app.strict import set_key
from distill.core.depth import DepthMap, Kind
from distill.core.plugins import KINDS, SIGNS, import_file, is_path, names
from distill.data.datasets import Facts
from distill.eval.protocol import Protocol
from distill.students import Student
from distill.teachers import Card

SIZE = (61, 90)


def name_is_a_word(subject: Subject) -> None:
    """Its name is lower-case letters, digits and underscores: it becomes part of file names."""
    require(re.fullmatch("[a-z][a-z0-9_]*", subject.name), f"{subject.name!r} is not")


def _too_free(stated: Card | Facts) -> bool:
    """Whether commercial use is stated under an NC licence."""
    return stated.commercial and "NC" in stated.licence.upper().replace("-", " ").split()


# --- teachers ---------------------------------------------------------------------------------------------------------


def cards(subject: Subject) -> None:
    """`CARDS` holds a `Card` for each published checkpoint, the default first, all of the plug-in's own name."""
    published = subject.module.CARDS
    require(
        published and all(isinstance(card, Card) for card in published),
        "CARDS is empty, or holds something other than a Card",
    )
    others = {card.name for card in published} - {subject.name}
    require(not others, f"a card's name is {', '.join(sorted(others))}, not {subject.name}")
    require(len({card.weights for card in published}) == len(published), "two cards have the same weights")


def cards_say_what_is_owed(subject: Subject) -> None:
    """Each card says weights, kind, licence of weights and of code; none under an NC licence is `commercial`."""
    for card in subject.module.CARDS:
        complete = card.weights and card.licence and card.code_licence and isinstance(card.kind, Kind)
        require(complete, f"the card of {card.weights or '?'} lacks one of them")
        require(not _too_free(card), f"{card.weights}: commercial = True under {card.licence}")


def load_signature(subject: Subject) -> None:
    """`Teacher.load(weights, *, device, dtype, ...)`: only keywords after weights and no **kwargs, since they are the schema of a recipe's options."""  # noqa: E501 - the promise is one line
    parameters = signature(subject.module.Teacher.load)
    require(list(parameters)[:1] == ["weights"], f"load takes {', '.join(parameters)}")
    for keyword in ("device", "dtype"):
        require(keyword in parameters, f"load takes no {keyword}")
    positional = [p.name for p in list(parameters.values())[1:] if p.kind is not p.KEYWORD_ONLY]
    require(not positional, f"{', '.join(positional)} can be given by position")


def predict_signature(subject: Subject) -> None:
    """`predict(images)`; a teacher that draws noise takes `keys=` too, and its cards say `seeded`."""
    parameters = inspect.signature(subject.module.Teacher.predict).parameters
    require("images" in parameters, f"predict takes {', '.join(parameters)}")
    seeded = "keys" in parameters
    wrong = [card.weights for card in subject.module.CARDS if card.seeded != seeded]
    require(not wrong, f"predict {'takes' if seeded else 'does not take'} keys, and the card of {wrong[:1]} differs")


def missing_weights(subject: Subject) -> None:
    """Missing weights end in one line (OSError, ValueError or LookupError) that names them."""
    weights = str(subject.folder / "nowhere" / "w.pth")
    try:
        subject.module.Teacher.load(weights)
    except EXPECTED as error:
        text = str(error)
        require("nowhere" in text and "\n" not in text and len(text) < 500, f"{type(error).__name__}: {text}")
        return
    raise ContractError(
        f"load({weights!r}) raised nothing; a teacher without weights refuses any but its card's word for them"
    )


def prediction(subject: Subject) -> None:
    """`predict` gives a `DepthMap` of the card's kind at the images' own size, any size: float32, finite where valid, without a gradient."""  # noqa: E501 - the promise is one line
    for height, width in (SIZE, (40, 31)):
        depth = subject.predict(torch.rand(2, 3, height, width))
        require(isinstance(depth, DepthMap) and depth.kind == subject.teacher.card.kind, f"it gave {depth!r:.80}")
        require(depth.values.shape == (2, height, width), f"{(height, width)} gave {tuple(depth.values.shape)}")
        require(depth.values.dtype == torch.float32 and not depth.values.requires_grad, f"{depth.values.dtype}")
        finite = torch.isfinite(depth.values[depth.valid])
        require(depth.valid.any() and finite.all(), "NaN or infinite where valid, or nothing is valid")


def batches(subject: Subject) -> None:
    """A batch of N equals N batches of one, equal calls give equal predictions, and the images are not changed."""
    images = torch.rand(3, 3, *SIZE)
    before = images.clone()
    whole = subject.predict(images).values
    require(torch.equal(images, before), "predict wrote into the images")
    require(torch.equal(subject.predict(images).values, whole), "two equal calls gave different predictions")
    if subject.teacher.card.seeded:
        keys = [f"key{i}" for i in range(3)]
        alone = [subject.teacher.predict(images[i : i + 1], keys=[keys[i]]).values for i in range(3)]
    else:
        alone = [subject.predict(images[i : i + 1]).values for i in range(3)]
    off = (torch.cat(alone) - whole).abs().nan_to_num().max() / whole.abs().nan_to_num().max().clamp(min=1e-6)
    require(off < 1e-3, f"they differ by {off:.1e} of the largest value")


def images_at_the_door(subject: Subject) -> None:
    """Images that are not (B,3,H,W) floating are refused with a ValueError (`distill.teachers.check_images`)."""
    images = torch.rand(2, 3, *SIZE)
    for bad in (images[0], images[:, :2], (images * 255).to(torch.uint8)):
        try:
            subject.predict(bad)
        except ValueError:
            continue
        raise ContractError(f"{tuple(bad.shape)} {bad.dtype} was accepted")


# --- decoders ---------------------------------------------------------------------------------------------------------


def any_image_size(subject: Subject) -> None:
    """With an encoder it maps images of any size to maps of that size."""
    student = Student(subject.encoder, subject.decoder)
    for size in [(32, 48), (33, 50)]:
        shape = student(torch.rand(2, 3, *size)).shape
        require(shape == (2, *size), f"images of {size} gave {tuple(shape)}")


def every_parameter_learns(subject: Subject) -> None:
    """Every parameter of a decoder gets a gradient."""
    decoder = subject.decoder
    Student(subject.encoder, decoder)(torch.rand(2, 3, 48, 48)).square().mean().backward()
    without = [key for key, p in decoder.named_parameters() if p.requires_grad and p.grad is None]
    require(not without, f"none for {', '.join(without[:5])}")


def options_build_it_again(subject: Subject) -> None:
    """A decoder's `options` are plain values that build it again; its constructor takes no **kwargs, since it is the schema of `decoder_options`."""  # noqa: E501 - the promise is one line
    signature(subject.module.Decoder)
    decoder = subject.decoder
    options = json.loads(json.dumps(decoder.options))
    again = subject.module.Decoder(**options)
    shapes, same = ({k: tuple(v.shape) for k, v in one.state_dict().items()} for one in (decoder, again))
    require(shapes == same, f"{options} build another network")


# --- benchmarks -------------------------------------------------------------------------------------------------------


def protocol(subject: Subject) -> None:
    """`PROTOCOL` is a `Protocol` of the benchmark's own name."""
    declared = subject.module.PROTOCOL
    require(isinstance(declared, Protocol), f"it is {type(declared).__name__}")
    require(declared.benchmark == subject.name, f"its benchmark is {declared.benchmark!r}, not {subject.name!r}")


def samples(subject: Subject) -> None:
    """`samples(root, list_file)` names a root that is missing; one that makes its own images has a default root and as many images as `PROTOCOL.num_images`."""  # noqa: E501 - the promise is one line
    parameters = inspect.signature(subject.module.samples).parameters
    require(list(parameters)[:2] == ["root", "list_file"], f"samples takes {', '.join(parameters)}")
    if parameters["root"].default is not inspect.Parameter.empty:
        count, number = len(subject.module.samples()), subject.module.PROTOCOL.num_images
        require(count == number, f"samples() gives {count} images, PROTOCOL says {number}")
        return
    try:
        subject.module.samples(subject.folder / "nowhere")
    except EXPECTED as error:
        require("nowhere" in str(error), f"{type(error).__name__}: {error}")
        return
    raise ContractError("a root that does not exist raised nothing")


# --- data sets --------------------------------------------------------------------------------------------------------


def facts(subject: Subject) -> None:
    """`FACTS` is a `Facts` that says title, url, licence and the kind of its truth; none under an NC licence is `commercial`."""  # noqa: E501 - the promise is one line
    found = subject.module.FACTS
    require(isinstance(found, Facts), f"it is {type(found).__name__}")
    require(found.title and found.url and found.licence and isinstance(found.kind, Kind), "one of them is missing")
    require(not _too_free(found), f"commercial = True under {found.licence}")


def finds_nothing_elsewhere(subject: Subject) -> None:
    """`groups(root)` of a folder where nothing of the data set lies is empty; `rows(root, group)` and `read(root, row)` are there."""  # noqa: E501 - the promise is one line
    (subject.folder / "photos").mkdir(exist_ok=True)
    (subject.folder / "photos" / "a.txt").write_text("nothing")
    found = list(subject.module.groups(subject.folder))
    require(not found, f"it found {found[:3]} in a folder with one text")
    for function in ("rows", "read"):
        require(callable(getattr(subject.module, function, None)), f"there is no {function}")


CONTRACTS: Mapping[str, Sequence[Contract]] = {
    "teachers": (
        name_is_a_word,
        cards,
        cards_say_what_is_owed,
        load_signature,
        predict_signature,
        missing_weights,
        prediction,
        batches,
        images_at_the_door,
    ),
    "decoders": (name_is_a_word, any_image_size, every_parameter_learns, options_build_it_again),
    "normalizations": (name_is_a_word, *NORMALIZATIONS),
    "terms": (name_is_a_word, *TERMS),
    "datasets": (name_is_a_word, facts, finds_nothing_elsewhere),
    "benchmarks": (name_is_a_word, protocol, samples),
}
"""The promises of every kind in plugins.KINDS."""


def promise(contract: Contract) -> str:
    """What is promised, in one line."""
    return (contract.__doc__ or "").partition("\n")[0]


# --- for people -------------------------------------------------------------------------------------------------------


def kind_of(asked: str) -> str:
    """The kind of a plug-in by name or path. Raises LookupError where it is none, or of more than one."""
    if is_path(asked):
        module = import_file(asked)
        kinds = [kind for kind, sign in SIGNS.items() if hasattr(module, sign)]
    else:
        kinds = [kind for kind, package in KINDS.items() if asked in names(package)]
    if len(kinds) != 1:
        signs = ", ".join(f"{sign} ({kind})" for kind, sign in SIGNS.items())
        none = f"has none of {signs}" if is_path(asked) else "names no plug-in"
        what = f"could be any of {', '.join(kinds)}" if kinds else none
        raise LookupError(f"{asked} {what}: give --kind, one of {', '.join(KINDS)}")
    return kinds[0]


def check(subject: Subject) -> bool:
    """Prints a line per promise; whether all that could be looked at are kept."""
    kept = True
    for contract in CONTRACTS[subject.kind]:
        torch.manual_seed(0)
        try:
            contract(subject)
        except NotCheckedError as error:
            note(f"not checked  {promise(contract)}  ({error})")
        except Exception as error:  # noqa: BLE001 - a stranger's file may raise anything
            kept = False
            text = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
            fail(f"{promise(contract)} But {text.partition(chr(10))[0]}")
        else:
            say(f"kept  {promise(contract)}")
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m distill.contracts PLUGIN`; 0 where every promise is kept, 1 where one is broken, 2 for no plug-in."""
    parser = argparse.ArgumentParser(prog="python -m distill.contracts", description=__doc__.partition("\n")[0])
    parser.add_argument("plugin", metavar="PLUGIN", help="a file, or the name of an installed plug-in")
    parser.add_argument("--kind", choices=list(KINDS), help="the plug-in's kind, if it could be more than one")
    parser.add_argument("--weights", default="", metavar="PATH", help="a teacher's weights; small ones are enough")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of load or of Decoder"
    )
    args = parser.parse_args(argv)
    try:
        options: dict[str, Any] = {}
        for assignment in args.set:
            set_key(options, assignment)
        kind = args.kind or kind_of(args.plugin)
        with tempfile.TemporaryDirectory() as folder:
            return 0 if check(Subject(kind, args.plugin, Path(folder), args.weights, options)) else 1
    except (LookupError, ValueError, ImportError) as error:
        fail(str(error))
        return 2
