"""[crops]: which regions and patches are cut out of an image; distill.core.crops cuts them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from distill.core.settings import above, below, raise_faults, unknown_words


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSettings:
    """Regions (the shared context, seen by teacher and student) and patches of them (seen by the teacher alone)."""

    size: int = 560
    """Side in pixels that every region is resized to. Paper: 560."""
    width: int = 0
    """Width in pixels that regions are resized to, where they are not square: their shape is width x size. Needs
    patches = "none"; 0 = size. Ours."""
    min_side: int = 644
    """Smallest side (height, where there is a width) of a region in the image's pixels; it is drawn uniformly from here
    to the largest that fits. Paper: 644; uniformly: inferred."""
    crops_per_image: int = 1
    """Regions drawn from each image, each a sample of its own. Ours."""
    redraw: bool = False
    """Draw a new region of an image at every visit; needs labels.online = true. Inferred: true; false here, because
    labels on disk have fixed crops."""
    region: Literal["random", "whole"] = "random"
    """"random" draws a square of the image; "whole" takes the image itself, squashed to a square of its short side,
    with nothing left out: the paper's baseline "with no random cropping". How it becomes a square is ours."""
    patches: Literal["grid", "random", "none"] = "grid"
    """Local patches of a region: "grid" covers it with overlap, "random" draws `num_patches`, "none" makes none.
    Ours."""
    num_patches: int = 4
    """How many patches are drawn with patches = "random". Ours."""
    patch_size: int = 0
    """Side of a patch in the image's pixels; 0 is `size`. Paper: 560, as the regions."""
    overlap: float = 0.125
    """Minimum overlap of neighbouring patches in a grid, as a fraction of a patch, in [0, 0.9). Ours."""
    on_small: Literal["refuse", "use"] = "refuse"
    """An image whose short side is below `min_side`: "refuse" quarantines it, "use" takes its largest square.
    Ours."""

    def __post_init__(self) -> None:
        faults = below(self, size=14, min_side=1, crops_per_image=1, num_patches=1, patch_size=0) + unknown_words(self)
        faults += above(self, size=8192, min_side=65536, crops_per_image=1000, num_patches=1000, patch_size=8192)
        if not 0.0 <= self.overlap < 0.9:
            faults.append(f"overlap must be in [0, 0.9), not {self.overlap}")
        faults += below(self, width=0) + above(self, width=8192)
        if self.width and (self.patches != "none" or self.region == "whole"):
            faults.append(
                f'width = {self.width} draws regions that are not square: set patches = "none", and no region'
            )
        if self.redraw and self.crops_per_image != 1:
            faults.append(
                f"redraw = true draws a region at every visit: leave out crops_per_image = {self.crops_per_image}"
            )
        raise_faults(faults)

    @property
    def content(self) -> dict[str, Any]:
        """The settings that determine the contents of a labels folder; newer keys only if not at their default."""
        settings = {key: value for key, value in asdict(self).items() if key != "redraw"}
        return {
            key: value for key, value in settings.items() if (key, value) not in (("region", "random"), ("width", 0))
        }
