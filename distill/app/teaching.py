"""[[teachers]] as loaded teachers: options and licences checked, with bridge, alignment and sky policy applied."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.core.plugins import find, option_faults
from distill.data.corruptions import Corruptions
from distill.labelling.alignment import Aligned
from distill.labelling.bridge import Bridged
from distill.labelling.run import TRUTH
from distill.teachers import Card
from distill.teachers._compile import compile_networks
from distill.teachers._settings import TeacherSettings
from distill.teachers._sky import POLICIES, under_policy

Teachers = list[tuple[str, Any]]

_ELSEWHERE = {"weights": "teachers[{}].weights", "dtype": "teachers[{}].dtype", "device": "run.device"}
"""Arguments of every `Teacher.load` that are no options, and the keys that give them."""


def check_teachers(recipe: Recipe) -> None:
    """Raises RecipeError with every option that no teacher takes."""
    if not recipe.teachers:
        raise RecipeError("the recipe names no teachers: add a [[teachers]] table")
    faults = []
    for i, spec in enumerate(recipe.teachers):
        load = Corruptions if spec.name == TRUTH else find("distill.teachers", spec.name).Teacher.load
        faults += option_faults(load, spec.options, f"teachers[{i}].options")
        faults += option_faults(load, spec.score_options, f"teachers[{i}].score_options")
        faults += [
            f"teachers[{i}].{table}.{key}: {_ELSEWHERE[key].format(i)} decides; leave it out"
            for table, options in (("options", spec.options), ("score_options", spec.score_options))
            for key in _ELSEWHERE
            if key in options and spec.name != TRUTH
        ]
        if recipe.labels.sky != "teacher" and "sky" in spec.options:
            faults.append(f"teachers[{i}].options.sky: labels.sky decides for all teachers; leave one of them out")
    if faults:
        raise RecipeError("\n".join(faults))


def check_teacher_count(recipe: Recipe) -> None:
    """Raises RecipeError for more teachers than labels and training take; comparing and scoring take any number.

    Ground truth is not a teacher and does not count; corrupted ground truth stands for a teacher and counts.
    """
    networks = [spec for spec in recipe.teachers if spec.name != TRUTH or spec.options]
    if len(networks) > 2:
        raise RecipeError(f"at most two teachers, a primary and an assistant, not {len(networks)}")


def load_teacher(
    spec: TeacherSettings, *, on: torch.device, sky: str = "teacher", options: dict[str, Any] | None = None
) -> Any:
    """One [[teachers]] table as a loaded teacher, whatever its kind and licence.

    sky: labels.sky, or "teacher" for the teacher's own rule. options: of `load`; by default those for labels.
    """
    plugin = find("distill.teachers", spec.name)
    weights = spec.weights or plugin.CARDS[0].weights
    options = dict(spec.options if options is None else options)
    if sky != "teacher" and "sky" in inspect.signature(plugin.Teacher.load).parameters:
        # This covers the sky that the teacher detects; the policy is applied to all teachers alike.
        options["sky"] = "keep" if sky == "keep" else "invalid"
    teacher = plugin.Teacher.load(weights, device=on, dtype=getattr(torch, spec.dtype), **options)
    if spec.compile:
        compile_networks(teacher)
    return teacher


def float32_twins(recipe: Recipe, *, on: torch.device) -> dict[str, Callable[[], Any]]:
    """By name, how to load the eager float32 twin of each teacher that is compiled or runs in half precision."""
    return {
        spec.alias_or_name: functools.partial(
            load_teacher, dataclasses.replace(spec, dtype="float32", compile=False), on=on, sky=recipe.labels.sky
        )
        for spec in recipe.teachers
        if spec.name != TRUTH and (spec.compile or spec.dtype != "float32")
    }


def load_teachers(recipe: Recipe, *, on: torch.device) -> Teachers:
    """(label, teacher) pairs in the recipe's order, to make labels; "truth" stays a string, or is Corruptions.

    Raises RecipeError for kinds and licences that the recipe does not allow.
    """
    check_teachers(recipe)
    sky = recipe.labels.sky
    loaded: Teachers = []
    for spec in recipe.teachers:
        if spec.name == TRUTH:
            loaded.append((spec.alias_or_name, Corruptions(**spec.options) if spec.options else TRUTH))
            continue
        teacher = load_teacher(spec, on=on, sky=sky)
        card: Card = teacher.card
        if recipe.labels.commercial_only and not card.commercial:
            raise RecipeError(
                f"labels.commercial_only = true refuses {spec.alias_or_name}: the weights {card.weights} are under "
                f"{card.licence}, which does not allow commercial use; `distill list teachers` shows those that do"
            )
        if card.kind.value == "affine_depth" and recipe.labels.store == "disparity" and not recipe.labels.align:
            teacher = _bridged(recipe, spec, teacher, primary=loaded[0][0] if loaded else "")
        loaded.append((spec.alias_or_name, teacher))
    if sky in POLICIES:
        # A bridge must be fitted to maps to which the policy was applied before.
        with_policy = under_policy([(name, t.teacher if isinstance(t, Bridged) else t) for name, t in loaded], sky)
        loaded = [
            (name, dataclasses.replace(old, teacher=new) if isinstance(old, Bridged) else new)
            for (_, old), (name, new) in zip(loaded, with_policy, strict=True)
        ]
    return _fitted(recipe, loaded)


def _fitted(recipe: Recipe, teachers: Teachers) -> Teachers:
    """The teachers with labels.align applied: the maps of networks are fitted to ground truth."""
    if not recipe.labels.align:
        return teachers
    limits = recipe.labels.align_residual, recipe.labels.align_inliers
    not_fitted = (str, Corruptions)
    return [
        (name, teacher if isinstance(teacher, not_fitted) else Aligned(teacher, *limits)) for name, teacher in teachers
    ]


def _bridged(recipe: Recipe, spec: TeacherSettings, teacher: Any, *, primary: str) -> Bridged:
    """An assistant of affine depth, bridged to the primary; raises RecipeError if the recipe has no bridge."""
    problem = (
        f"teacher {spec.alias_or_name} predicts {teacher.card.kind}, which cannot become the disparity that the "
        "student learns (its shift is unknown): use its disparity checkpoint, leave it out, or "
    )
    if not recipe.labels.bridge:
        raise RecipeError(
            f'{problem}set labels.bridge = "primary", which fits it on every crop to the disparity of the first teacher'
        )
    if not primary:
        raise RecipeError(f'{problem}put a disparity teacher before it: labels.bridge = "primary" fits it to that one')
    return Bridged(teacher, primary, recipe.labels.bridge_residual)
