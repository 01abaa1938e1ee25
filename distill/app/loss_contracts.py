"""What normalizations and terms of the objective must keep (distill.app.contracts says how)."""

from __future__ import annotations

import inspect

import torch

from distill.app.promises import Contract, Subject, require, signature
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.core.plugins import find
from distill.losses.normalize import Comparison
from distill.losses.settings import term_facts
from distill.losses.terms import NEEDS, TermInputs


def _maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 16, 16, generator=g), torch.rand(2, 16, 16, generator=g)
    return pred, target, torch.rand(2, 16, 16, generator=g) > 0.2


def compares_per_image(subject: Subject) -> None:
    """`compare(pred, target, valid)` gives a `Comparison` of loss, live and dead, (B,) each; 0 for two equal maps. Its keywords `trim_top`, `label_only`, `weight` are needed only where a recipe sets them."""  # noqa: E501 - the promise is one line
    pred, target, valid = _maps()
    comparison = subject.module.compare(pred, target, valid)
    require(isinstance(comparison, Comparison), f"it gave {type(comparison).__name__}")
    shapes = [tuple(part.shape) for part in (comparison.loss, comparison.live, comparison.dead)]
    require(shapes == [(2,)] * 3, f"shapes {shapes}")
    equal = subject.module.compare(target, target, valid).loss
    require(torch.allclose(equal, torch.zeros(2), atol=1e-6), f"equal maps gave {equal.tolist()}")


def says_what_it_ignores(subject: Subject) -> None:
    """`INVARIANT` is True where a positive scale and a shift of the prediction change nothing, else False; `LEVELS` is a tuple."""  # noqa: E501 - the promise is one line
    pred, target, valid = _maps()
    loss, moved = (subject.module.compare(p, target, valid).loss for p in (pred, 3 * pred + 1))
    same = torch.allclose(moved, loss, rtol=1e-4)
    require(same is subject.module.INVARIANT, f"INVARIANT = {subject.module.INVARIANT}, but the check gives {same}")
    require(isinstance(subject.module.LEVELS, tuple), f"LEVELS = {subject.module.LEVELS!r}")


def only_valid_pixels_count(subject: Subject) -> None:
    """A pixel outside `valid` never counts, NaN included, and the gradient flows to the prediction alone."""
    pred, target, valid = _maps()
    loss = subject.module.compare(pred, target, valid).loss
    spoilt = [torch.where(valid, values, torch.nan).requires_grad_() for values in (pred, target)]
    masked = subject.module.compare(*spoilt, valid).loss
    require(torch.allclose(masked, loss), f"NaN outside turned {loss.tolist()} into {masked.tolist()}")
    masked.sum().backward()
    of_pred, of_target = (one.grad for one in spoilt)
    finite = of_pred is not None and bool(torch.isfinite(of_pred).all())
    require(finite, "the prediction's gradient is missing or not finite")
    require(
        of_target is None or not of_target.any(), "the label has a gradient: compute with target.detach() in its place"
    )


NORMALIZATIONS: tuple[Contract, ...] = (compares_per_image, says_what_it_ignores, only_valid_pixels_count)


# --- terms ------------------------------------------------------------------------------------------------------------


def says_its_key(subject: Subject) -> None:
    """`WEIGHT` is a number, `NEEDS` a set of the known words, both written out; the docstring's first line is the key's meaning, and `term`'s options have a line each."""  # noqa: E501 - the promise is one line
    module, facts = subject.module, term_facts(subject.asked)
    require(facts.weight == module.WEIGHT, f"WEIGHT is {module.WEIGHT}, but its source reads {facts.weight}")
    require(facts.needs == module.NEEDS, f"NEEDS is {sorted(module.NEEDS)}, but its source reads {sorted(facts.needs)}")
    require(facts.needs <= NEEDS, f"unknown needs {', '.join(sorted(facts.needs - NEEDS))}; there are {sorted(NEEDS)}")
    require(facts.meaning.endswith("."), f"its first line is {facts.meaning!r}, which is not a sentence")
    options = [p.name for p in signature(module.term).values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    require([*facts.options] == options, f"the options {options} need defaults that are plain values")
    require(
        {*facts.meanings} >= {*options}, f"of {options}, only {sorted(facts.meanings)} have a line in the docstring"
    )


def _inputs(subject: Subject, *, spoilt: bool = False, rows: int = 3) -> TermInputs:
    """Three images of a kind that meets every need, the last without a valid pixel."""
    g = torch.Generator().manual_seed(0)
    valid = torch.rand(3, 16, 16, generator=g) > 0.3
    valid[2] = False
    kind = Kind.METRIC_DEPTH if "metric" in subject.module.NEEDS else Kind.AFFINE_DISPARITY
    values, pred = (1.0 + torch.rand(3, 16, 16, generator=g) for _ in range(2))
    features, reference = (torch.rand(3, 4, 2, 2, generator=g) - 0.5 for _ in range(2))
    shared = DepthMap(torch.where(valid, values, torch.nan) if spoilt else values, valid, kind)[:rows]
    return TermInputs(
        pred=pred[:rows].requires_grad_(),
        labels=Labels(shared, shared, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * rows)),
        features=features[:rows].requires_grad_(),
        reference=reference[:rows],
        normalization="global",
        patch_resolution="patch",
        compare=lambda p, t, v, _: find("distill.losses.normalize", "global").compare(p, t, v),
    )


def one_number_per_image(subject: Subject) -> None:
    """`term(inputs)` gives one value per image, (B,), whatever the other images are."""
    whole, alone = (subject.module.term(_inputs(subject, rows=rows)) for rows in (3, 1))
    require(tuple(whole.shape) == (3,), f"three images gave {tuple(whole.shape)}")
    require(bool(torch.isfinite(whole).all()), f"it gave {whole.tolist()}")
    require(torch.allclose(whole[:1], alone), f"the first image gave {whole[0]:.6g}, but {alone[0]:.6g} alone")


def only_labelled_pixels_teach(subject: Subject) -> None:
    """An invalid pixel never counts, NaN included, an image without any valid one gives 0 unless only features matter, and the gradient is finite."""  # noqa: E501 - the promise is one line
    plain, marked = _inputs(subject), _inputs(subject, spoilt=True)
    clean, spoilt = subject.module.term(plain), subject.module.term(marked)
    require(torch.allclose(clean, spoilt), f"NaN outside turned {clean.tolist()} into {spoilt.tolist()}")
    if "features" not in subject.module.NEEDS:
        empty = float(spoilt[2].detach())
        require(empty == 0.0, f"an image without valid pixels gave {empty:.6g}")
    spoilt.sum().backward()
    gradients = [one.grad for one in (marked.pred, marked.features) if one is not None and one.grad is not None]
    require(gradients, "neither the prediction nor the features get a gradient")
    require(all(bool(torch.isfinite(one).all()) for one in gradients), "the gradient is not finite")


TERMS: tuple[Contract, ...] = (says_its_key, one_number_per_image, only_labelled_pixels_teach)
