"""Every weights file that a recipe needs: here, to be downloaded, or missing; checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.core.folders import POCKET
from distill.core.plugins import find
from distill.core.wording import shortened
from distill.labelling.jobs import TRUTH
from distill.students import checkpoint
from distill.teachers import WEIGHT_SUFFIXES, WeightsMissingError, _latent_student, to_download

_STUDENT_FILES = (checkpoint.WEIGHTS, checkpoint.DESCRIPTION, checkpoint.CARD)


def needed_weights(recipe: Recipe) -> Iterator[tuple[str, str, Sequence[str]]]:
    """(purpose, weights, file patterns) of everything read, except timm's own downloads ("pretrained")."""
    for spec in recipe.teachers:
        if spec.name == TRUTH:
            continue
        plugin, purpose = find("distill.teachers", spec.name), f"teacher {spec.alias_or_name}"
        weights = spec.weights or plugin.CARDS[0].weights
        if hasattr(plugin, "needs"):
            parameters = inspect.signature(plugin.needs).parameters
            options = {key: value for key, value in spec.options.items() if key in parameters}
            yield from ((purpose, text, files) for text, files in plugin.needs(weights, **options))
        elif hasattr(plugin, "FILES"):
            yield purpose, weights, plugin.FILES
    student, reference = recipe.student, recipe.loss.feature_reference
    if student.is_one_step:
        yield "student.weights", student.weights, _latent_student.FILES
    for key in () if student.is_one_step else ("weights", "decoder_weights"):
        if (text := getattr(student, key)) not in ("", "pretrained"):
            yield f"student.{key}", text, ()
    for key in ("init_from", "encoder_init_from", "decoder_init_from"):
        if (text := getattr(student, key)) not in ("", POCKET):
            yield f"student.{key}", text, _STUDENT_FILES
    if reference.endswith(WEIGHT_SUFFIXES):
        yield "loss.feature_reference", reference, ()


def weight_findings(recipe: Recipe) -> list[Finding]:
    """A finding for each, in the recipe's order: ok if it is here, warn if it is to be fetched, bad if unavailable."""
    findings: list[Finding] = []
    for purpose, text, files in dict.fromkeys(
        (purpose, text, tuple(files)) for purpose, text, files in needed_weights(recipe)
    ):
        try:
            missing = to_download(text, files=files)
        except WeightsMissingError as error:
            findings.append(Finding("bad", f"{purpose}: {error}", "what depends on it was not checked", purpose))
            continue
        if missing:
            names = shortened(sorted(missing), 4)
            size = sum(missing.values()) / 1e9
            line = f"{purpose}: {text} is not here yet: {size:.2f} GB to download ({names})"
            remedy = (
                f"the first command that needs it downloads it, or `hf download {'/'.join(text.split('/')[:2])}` now"
            )
            findings.append(Finding("warn", line, f"{remedy}; what depends on it was not checked", purpose))
        else:
            findings.append(Finding("ok", f"{purpose}: the files of {text} are here"))
    if recipe.student.weights == "pretrained":
        findings.append(
            Finding("ok", f"student.weights: timm's weights of {recipe.student.encoder}, downloaded by timm itself")
        )
    return findings
