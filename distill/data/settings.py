"""[[images]]: where images come from; distill.data.sources opens them."""

from __future__ import annotations

from dataclasses import dataclass

from distill.core.settings import below, refuse

SOURCES = ("tars", "photos", "pairs", "scenes", "bundled_photos")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """One source of images: exactly one of tars, photos, pairs, scenes, bundled_photos."""

    tars: str = ""
    """Tars of photos such as SA-1B's: paths or URLs, with braces ("sa_{000000..000017}.tar") or globs."""
    photos: str = ""
    """A folder of photos, or a glob."""
    pairs: str = ""
    """A tsv of images with ground truth."""
    scenes: int = 0
    """How many procedural views to render, with their ground truth."""
    bundled_photos: bool = False
    """The photographs that ship inside the scikit-image and scikit-learn wheels."""
    names: str = ""
    """Of pairs: a text file with the names to keep; all by default."""
    limit: int = 0
    """Keep the first so many images; 0 keeps all."""
    size: int = 224
    """Of scenes: side in pixels of a rendered view."""

    def __post_init__(self) -> None:
        if sum(bool(getattr(self, source)) for source in SOURCES) != 1:
            raise ValueError(f"needs exactly one of {', '.join(SOURCES)}")
        refuse(below(self, scenes=0, limit=0, size=1))
