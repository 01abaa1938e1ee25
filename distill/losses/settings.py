"""[loss]: the training objective; distill.losses.objective computes it.

The terms are the files of distill/losses/terms. Each has a key here for its weight and one for each of its options.
The keys are read from the files' text, because a recipe is checked without importing torch.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from distill.core.plugins import name_fault, names, source, where_from
from distill.core.settings import raise_faults, unknown_words
from distill.core.wording import did_you_mean

TERMS = "distill.losses.terms"


@dataclass(frozen=True, slots=True)
class TermFacts:
    """The contents of a term's file: WEIGHT, NEEDS, its options' defaults, and the meanings of those keys."""

    meaning: str
    meanings: Mapping[str, str]
    weight: float
    needs: frozenset[str]
    options: Mapping[str, Any]

    @property
    def is_metric(self) -> bool:
        """Whether the term compares metres."""
        return "metric" in self.needs


def term_facts(name: str) -> TermFacts:
    """The facts of a term, by name or path; it is not imported. Raises ValueError if it breaks the terms' contract."""
    try:
        tree = ast.parse(source(TERMS, name))
        assignments = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        term = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "term")
        options = zip(term.args.kwonlyargs, term.args.kw_defaults, strict=True)
        needs = {node.value for node in ast.walk(assignments["NEEDS"]) if isinstance(node, ast.Constant)}
        lines = (ast.get_docstring(tree) or "").splitlines() or [""]
        pairs = (line.partition(": ") for line in lines[1:])
        return TermFacts(
            lines[0],
            {option: meaning for option, _, meaning in pairs if meaning},
            float(ast.literal_eval(assignments["WEIGHT"])),
            frozenset(map(str, needs)),
            {argument.arg: ast.literal_eval(default) for argument, default in options if default is not None},
        )
    except (StopIteration, KeyError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"the term {name} needs WEIGHT (a number), NEEDS and term(inputs, *, option=default) "
            f"({type(error).__name__}: {error})"
        ) from error


def _every_term() -> dict[str, TermFacts]:
    """The facts of every term. One from outside that breaks the contract is left out; the contract tests say why."""
    facts: dict[str, TermFacts] = {}
    for name in names(TERMS):
        try:
            facts[name] = term_facts(name)
        except (ValueError, LookupError, ImportError, OSError):
            if where_from(TERMS, name)[0].startswith(TERMS):
                raise
    return facts


FACTS = _every_term()


@dataclass(frozen=True, slots=True, kw_only=True)
class _LossSettings:
    """The objective: the weights of its terms, and how prediction and label are normalized."""

    normalization: str = "hybrid"
    """How prediction and label are normalized: one of `distill list normalizations`, or a Python file of yours
    ("./mine.py"). Paper: hybrid."""
    trim_top: float = 0.0
    """The fraction of pixels, those with the largest loss, that is dropped, in [0, 1). Depth Anything V2: 0.1, for
    pseudo-labels; off, as in the paper."""
    label_range: Literal["as_is", "unit"] = "as_is"
    """"unit" scales every label to [0, 1] by its own lowest and highest value before the losses; it has no effect with
    a normalization that ignores scale and shift. AnyDepth: unit."""
    label_only: bool = False
    """Normalize the student with the label's statistics, not with its own. Ours."""
    feature_reference: str = "start"
    """What the student's features are compared with: "start" is its own initial encoder; else a frozen encoder, by
    its timm name or alias ("dinov2_vitl14", the prior work's choice) or a weights file of the student's own
    architecture. The paper does not say; "start" is inferred."""
    reference_hdn: bool = False
    """Exactly HDN's released loss, oddities included (losses.losses.hdn_loss); its mean is over a micro-batch."""
    contexts: Literal["dr", "dp", "ds"] = "dr"
    """With reference_hdn, which of HDN's contexts: equal parts of the label's range ("dr"), of its pixels ("dp"),
    squares ("ds")."""
    patch_resolution: Literal["patch", "student"] = "patch"
    """At which pixels a patch's label is compared with the student's map: the patch's, which keeps all of the label's
    detail, or the student's own, which constrains nothing between them. The paper does not say; ours."""
    truth: dict[str, Any] = field(default_factory=dict)
    """[loss.truth]: the keys of [loss] that differ where ground truth teaches, e.g. { normalization = "global",
    trim_top = 0.1 }; none by default."""

    def __post_init__(self) -> None:
        raise_faults(unknown_words(self))
        fault = name_fault("distill.losses.normalize", self.normalization)
        if fault:
            raise ValueError(fault)
        if self.reference_hdn and (self.trim_top or self.label_only):
            raise ValueError("reference_hdn is HDN's released loss, which knows no trim_top and no label_only")
        if self.contexts != "dr" and not self.reference_hdn:
            raise ValueError(
                f'contexts = "{self.contexts}" is a variant of HDN\'s released loss: set reference_hdn = true'
            )
        numbers = [*FACTS, *(key for key, value in _options().items() if isinstance(value, float))]
        values = {key: getattr(self, key) for key in numbers}
        faults = [
            f"{key} must be finite and at least 0, not {value}"
            for key, value in values.items()
            if not 0 <= value < math.inf
        ]
        metric = [name for name in FACTS if FACTS[name].is_metric and getattr(self, name)]
        if self.label_range == "unit" and metric:
            faults.append(f'{metric[0]} compares metres, but label_range = "unit" rescales the labels: leave one out')
        if not 0.0 <= self.trim_top < 1.0:
            faults.append(f"trim_top must be in [0, 1), not {self.trim_top}")
        raise_faults(faults + self._truth_faults())

    def _truth_faults(self) -> list[str]:
        known = [f.name for f in fields(self) if f.name != "truth"]
        unknown = [f"unknown key truth.{key}{did_you_mean(key, known)}" for key in self.truth if key not in known]
        if unknown or not self.truth:
            return unknown
        types = {key: type(getattr(self, key)) for key in self.truth}
        wrong = [
            f"truth.{key} must be like {getattr(self, key)!r}, not {value!r}"
            for key, value in self.truth.items()
            if type(value) is not types[key] and not (types[key] is float and type(value) is int)
        ]
        if wrong:
            return wrong
        try:
            self.against_truth()
        except ValueError as error:
            return [f"truth: {error}"]
        return []

    def against_truth(self) -> LossSettings:
        """The settings where ground truth teaches: these, overridden by [loss.truth]."""
        settings: Any = self
        return replace(settings, truth={}, **self.truth)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term whose weight is not 0, in the order in which they are added.

        In reverse order of names: float sums depend on the order, and this is the paper's for the paper's terms.
        """
        weights = {name: float(getattr(self, name)) for name in sorted(FACTS, reverse=True)}
        return {name: weight for name, weight in weights.items() if weight}

    def without(self, *terms: str) -> LossSettings:
        """The settings with these terms off."""
        settings: Any = self
        return replace(settings, **dict.fromkeys(terms, 0.0))

    def options(self, term: str) -> dict[str, Any]:
        """The keyword arguments of a term's function."""
        return {option: getattr(self, f"{term}_{option}") for option in FACTS[term].options}


def _options() -> dict[str, Any]:
    return {f"{name}_{option}": value for name, fact in FACTS.items() for option, value in fact.options.items()}


def _term_fields() -> list[tuple[str, type, Field[Any]]]:
    """A field for the weight and for every option of each term; its metadata has the meaning."""
    specs: list[tuple[str, type, Field[Any]]] = []
    taken_keys = {f.name for f in fields(_LossSettings)}
    for name, fact in FACTS.items():
        weight_field: Any = field(default=fact.weight, metadata={"meaning": fact.meaning})
        specs.append((name, float, weight_field))
        for option, default in fact.options.items():
            option_field: Any = field(default=default, metadata={"meaning": fact.meanings.get(option, "")})
            specs.append((f"{name}_{option}", type(default), option_field))
    keys = [key for key, *_ in specs]
    if duplicates := sorted({key for key in keys if key in taken_keys or keys.count(key) > 1}):
        raise ValueError(f"distill/losses/terms: {', '.join(duplicates)} would be two keys of [loss]: rename the term")
    return specs


if TYPE_CHECKING:

    class LossSettings(_LossSettings):
        """The objective's settings: _LossSettings and a key for each term's weight and options."""

        def __init__(self, **keys: Any) -> None: ...

else:
    LossSettings = make_dataclass(
        "LossSettings", _term_fields(), bases=(_LossSettings,), frozen=True, slots=True, kw_only=True
    )
    LossSettings.__module__, LossSettings.__doc__ = __name__, _LossSettings.__doc__
