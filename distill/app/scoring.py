"""Which models are scored, and with which options: a teacher is scored with other options than it labels crops with.

They are `options` without the resizing that was set for crops, then what the benchmark sets (Marigold's family works at
other sizes on other benchmarks), then the teacher's `score_options`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from distill.app import build, teaching
from distill.app.recipe import Recipe
from distill.core.plugins import file_hashes, find
from distill.eval.settings import BenchmarkSettings
from distill.labelling.run import TRUTH
from distill.teachers._settings import TeacherSettings

USED = ("resize", "native_size", "steps", "ensemble")
"""Attributes by which a teacher says how it works, if it has them."""


def options_on(spec: TeacherSettings, benchmark: BenchmarkSettings) -> dict[str, Any]:
    """The options of `load` with which a teacher is scored on a benchmark."""
    plugin = find("distill.teachers", spec.name)
    added: dict[str, Any] = {}
    # Only latent-diffusion teachers take `steps`; of them, only those that draw noise can take more than one step.
    if benchmark.processing_size >= 0 and "steps" in inspect.signature(plugin.Teacher.load).parameters:
        added["native_size"] = benchmark.processing_size
    if plugin.CARDS[0].seeded:
        added |= {key: getattr(benchmark, key) for key in ("steps", "ensemble") if getattr(benchmark, key)}
    if spec.score_options.get("resize") == "none":
        added.pop("native_size", None)
    return {**spec.scored_with, **added, **spec.score_options}


class Models:
    """The student and the teachers of a recipe, loaded on first use, and loaded again for other options."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises FileNotFoundError if there is no student to score, RecipeError for options that no teacher takes."""
        self.recipe, self.device = recipe, build.device(recipe)
        self.folder = recipe.run.folder / "train" / "student"
        if recipe.score.student and not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder}: there is no student yet; run `distill train` with this recipe first, or score "
                "its teachers alone: --set score.student=false"
            )
        self.teachers = [spec for spec in recipe.teachers if spec.name != TRUTH] if recipe.score.teachers else []
        if self.teachers:
            teaching.check_teachers(recipe)
        self._loaded: dict[str, tuple[dict[str, Any], Any]] = {}

    def __call__(self, benchmark: BenchmarkSettings) -> list[tuple[str, Any]]:
        """(name, teacher) of every model that is scored on this benchmark."""
        models: list[tuple[str, Any]] = []
        if self.recipe.score.student:
            models.append(("student", self._student()))
        return models + [(spec.alias_or_name, self._teacher(spec, benchmark)) for spec in self.teachers]

    def _student(self) -> Any:
        if "student" not in self._loaded:
            self._loaded["student"] = ({}, build.trained_student_teacher(self.recipe, on=self.device))
        return self._loaded["student"][1]

    def _teacher(self, spec: TeacherSettings, benchmark: BenchmarkSettings) -> Any:
        name, options = f"teacher {spec.alias_or_name}", options_on(spec, benchmark)
        if name not in self._loaded or self._loaded[name][0] != options:
            self._loaded.pop(name, None)  # frees its memory before the next one is loaded
            self._loaded[name] = (options, teaching.load_teacher(spec, on=self.device, options=options))
        return self._loaded[name][1]


def prediction_settings(recipe: Recipe, model: str, benchmark: BenchmarkSettings) -> dict[str, Any]:
    """What a model's stored predictions depend on besides its weights: non-default options and dtype, plug-in files."""
    spec = next((t for t in recipe.teachers if t.alias_or_name == model), None)
    settings: dict[str, Any] = {"options": options_on(spec, benchmark), "dtype": spec.dtype} if spec else {}
    settings["files"] = file_hashes([spec.name if spec else recipe.student.decoder])
    return {key: value for key, value in settings.items() if value not in ({}, "float32")}


def how_used(recipe: Recipe, model: str, teacher: Any, benchmark: BenchmarkSettings) -> Mapping[str, Any]:
    """How a model effectively works, defaults included; eval.papers compares it with what a paper's row was made by."""
    spec = next((t for t in recipe.teachers if t.alias_or_name == model), None)
    attributes = {key: getattr(teacher, key) for key in USED if hasattr(teacher, key)}
    attributes |= {"root": benchmark.root} if benchmark.root else {}
    return {"benchmark": benchmark.name, "dtype": spec.dtype if spec else "float32", **attributes}
