"""A trained student as a teacher: a folder written by `students.checkpoint`, or "pocket", which ships with the project.

Resizing ("ours"): the short side becomes the student's training size, aspect kept, each side the nearest multiple of
its patch; bilinear with antialias. The map is resized back to the image's size bilinearly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.core import crops
from distill.core.crops import native_shape
from distill.core.depth import DepthMap, Kind
from distill.core.focal import factor, resized
from distill.core.folders import POCKET, pocket
from distill.teachers import Card, WeightsMissingError, check_images, check_resize, finite, revision_of

if TYPE_CHECKING:
    from distill.students import Student

CARDS: tuple[Card, ...] = (
    Card(
        name="checkpoint",
        weights=POCKET,
        kind=Kind.AFFINE_DISPARITY,
        licence="research and demonstration only",
        code_licence="Apache-2.0",
        commercial=False,
        source="ours",
        note="the small student that ships with this project; its training data forbids more",
    ),
)


class Teacher:
    """A trained student on [0,1] images."""

    def __init__(self, student: Student, card: Card, *, resize: str = "native", native_size: int | None = None) -> None:
        check_resize(resize, native_size)
        self.student = student
        self.card = card
        self.resize = resize
        self.native_size = native_size or card.native_size

    @property
    def takes_focal(self) -> bool:
        """Whether `predict` needs the camera's focal length."""
        return self.student.canonical_focal is not None

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        encoder_weights: str | None = None,
    ) -> Teacher:
        """The student in folder `weights`, also a run's or a checkpoint's ("pocket": the embedded one).

        encoder_weights: the frozen encoder's, for a folder that holds only the decoder. native_size: overrides the
        training size in student.json.
        """
        from distill.students import checkpoint  # imports timm, too slow for `distill list`

        check_resize(resize, native_size)
        folder = pocket() if weights == POCKET else checkpoint.located(weights)
        if not folder.exists():
            raise WeightsMissingError(
                f'weights {weights!r}: no such folder; give one that `distill train` wrote, or "pocket"'
            )
        student = checkpoint.load(folder, device=device, encoder_weights=encoder_weights)
        student = student.requires_grad_(False).to(dtype=dtype)
        student_card = checkpoint.read_card(folder)
        card = replace(
            CARDS[0],
            weights=str(weights),
            licence=str(student_card.get("licence", "unknown")),
            commercial=student_card.get("commercial") is True,
            note=str(student_card.get("name", "")),
            revision=revision_of(folder),
            multiple=student.encoder.patch_size,
            native_size=native_size or student.native_size,
            kind=student.kind,
        )
        return cls(student, card, resize=resize, native_size=native_size)

    @torch.no_grad()
    def predict(self, images: Tensor, *, focal: float | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine disparity, or depth in metres of a metric student.

        focal: the camera's focal length in pixels of `images`; only a student of canonical depth needs it, and raises
        ValueError without it.
        """
        if self.takes_focal and focal is None:
            raise ValueError(
                f"{self.card.weights} gives metres only with the camera's focal length: give fov=DEGREES or intrinsics "
                "(distill predict --fov), or images whose source says it"
            )
        images = check_images(images)
        height, width = images.shape[-2:]
        size = self.native_size if self.resize == "native" else None
        if size is not None:
            sized = crops.resize(images, *native_shape(height, width, size, self.card.multiple))
        else:
            sized = images  # the student pads by itself
        parameter = next(self.student.parameters())
        values = self.student(sized.to(device=parameter.device, dtype=parameter.dtype)).float()
        if self.student.canonical_focal is not None and focal is not None:
            resized_focal = resized(focal, (height, width), (sized.shape[-2], sized.shape[-1]))
            values = values * factor(resized_focal, self.student.canonical_focal)
        if size is not None:
            values = crops.resize(values[:, None], height, width)[:, 0]
        return finite(values.to(images.device), self.card.kind)
