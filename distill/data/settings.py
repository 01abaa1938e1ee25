"""Settings of [[images]], the image sources; distill.data.sources opens them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from distill.core.plugins import name_fault
from distill.core.settings import above, below, raise_faults

SOURCES = ("tars", "photos", "pairs", "dataset", "scenes", "bundled_photos")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """One source of images: exactly one of tars, photos, pairs, dataset, scenes, bundled_photos."""

    tars: str = ""
    """Tars of photos such as SA-1B's: paths or URLs, with braces ("sa_{000000..000017}.tar") or globs, or their
    folder."""
    photos: str = ""
    """A folder of photos, sub-folders included, or a glob."""
    pairs: str = ""
    """A tsv of images with ground truth."""
    dataset: str = ""
    """A published data set with ground truth, one of `distill list datasets` or a Python file; needs `root`."""
    root: str = ""
    """For a data set: its folder, laid out as published; run `distill index NAME ROOT` first."""
    index: str = ""
    """For a data set: its index file, if not ROOT/INDEX.NAME.tsv."""
    scenes: int = 0
    """How many procedural views to render, with their ground truth."""
    bundled_photos: bool = False
    """The photographs that ship inside the scikit-image and scikit-learn wheels."""
    names: str = ""
    """For pairs and data sets: a text file with the names to keep, such as `distill filter` writes; default: all."""
    limit: int = 0
    """Keep only this many images, the first ones; 0 keeps all."""
    far: float = 0.0
    """For ground truth in metres: farther values are invalid; 0 = no limit. AnyDepth: 100."""
    size: int = 224
    """For scenes: side of a rendered view in pixels."""
    variety: bool = False
    """For scenes: add clutter, thin structures, people, window frames and repeated texture, and sometimes night or
    fog; views without `variety` are unaffected. Ours."""
    teachers: tuple[str, ...] = ()
    """Teachers of these images, by alias: ["dav2", "truth"]; an image that one of them cannot label is quarantined.
    Default: every teacher of the recipe, but "truth" only where a source can have it."""
    weight: float = 1.0
    """Weight of the source in training, which draws sources in proportion to (images * weight) ** (1 /
    train.source_temperature); with 0 its images are labelled, but not trained on. Ours."""

    @property
    def content(self) -> dict[str, Any]:
        """The settings that determine the content of a labels folder.

        Settings added later are left out at their defaults, so that older folders keep their identity.
        """
        left_out = {"weight"} if self.teachers else {"weight", "teachers"}
        added_later = {"dataset", "root", "index", "far", "variety"}
        fields = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {key: value for key, value in fields.items() if value or key not in added_later}

    @property
    def may_have_truth(self) -> bool:
        """Whether images of this source can have ground truth."""
        return not (self.tars or self.photos)

    def __post_init__(self) -> None:
        if sum(bool(getattr(self, source)) for source in SOURCES) != 1:
            raise ValueError(f"needs exactly one of {', '.join(SOURCES)}")
        raise_faults(["variety needs scenes"] if self.variety and not self.scenes else [])
        raise_faults(["names needs pairs or a dataset"] if self.names and not (self.pairs or self.dataset) else [])
        raise_faults(self._dataset_faults())
        raise_faults(below(self, scenes=0, limit=0, size=1, weight=0, far=0) + above(self, scenes=1_000_000, size=8192))

    def _dataset_faults(self) -> list[str]:
        if not self.dataset:
            return ["root and index need a dataset"] if self.root or self.index else []
        if fault := name_fault("distill.data.datasets", self.dataset):
            return [fault]
        return [] if self.root else [f"dataset = {self.dataset!r} needs root, the folder that contains it"]
