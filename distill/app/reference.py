"""The network whose features the student's are compared with (L_feat), from [loss] and [student]."""

from __future__ import annotations

import copy

from torch import nn

from distill.app.build import weights_file
from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.students import Student
from distill.students.encoder import Encoder
from distill.teachers import WEIGHT_SUFFIXES


def feature_reference(recipe: Recipe, student: nn.Module) -> nn.Module | None:
    """The frozen encoder for L_feat, as loss.feature_reference says.

    None if there is nothing to compare: the term is off, the student's encoder is frozen, or the reference is its own
    start and that is random. Raises RecipeError if the reference's feature width or patch size differs from the
    student's.
    """
    spec, source = recipe.student, recipe.loss.feature_reference
    uses_features = "feature" in recipe.loss.weights | recipe.loss.against_truth().weights
    if not uses_features or recipe.train.freeze_encoder or not isinstance(student, Student):
        return None
    if source == "start":
        trained = bool(spec.weights or spec.init_from or spec.encoder_init_from)
        return copy.deepcopy(student.encoder).eval().requires_grad_(False) if trained else None
    encoder = student.encoder
    is_file = source.endswith(WEIGHT_SUFFIXES)
    reference = Encoder(
        encoder.name if is_file else source,
        weights=weights_file(source) if is_file else "pretrained",
        indices=encoder.indices,
        final_norm=encoder.final_norm,
        frozen=True,
        timm_options=encoder.options["timm_options"] if is_file else None,
    )
    ours, theirs = (encoder.channels, encoder.patch_size), (reference.channels, reference.patch_size)
    if ours != theirs:
        raise RecipeError(
            f'loss.feature_reference = "{source}": its features are {theirs[0]} wide on patches of {theirs[1]}, the '
            f"student's {ours[0]} on {ours[1]}; take an encoder of the student's width and patch, or \"start\""
        )
    return reference.eval()
