"""A distillation and teacher-comparison workbench for zero-shot monocular depth."""

__version__ = "0.1.0"
