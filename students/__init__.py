"""Students: an encoder and a decoder that together map an image to affine disparity of the same size.

`Student` and `build` are defined in distill.students.student and exported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.students.student import Student, build

__all__ = ["Student", "build"]


def __getattr__(name: str) -> Any:
    # Lazy: reading a student's settings (distill.students.settings) imports this package and must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill.students import student

    return getattr(student, name)
