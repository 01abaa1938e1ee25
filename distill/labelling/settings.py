"""[labels]: how labels are made and stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.core.settings import above, below, raise_faults, unknown_words

STORES = ("s3://", "gs://", "az://")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """How teachers are asked, and how and where their labels are kept."""

    root: str = ""
    """The folder of label folders, a path; RUN/labels by default. Or a finished labels folder, to train on. Or the
    address of an object store (s3://, gs://, az://), where workers without a common disk meet."""
    samples_per_part: int = 1000
    """The largest number of samples in one output tar; a tar is the unit of resuming and of repair."""
    fine_tail: int = 1
    """Parts of the last twentieth of the input shards are this many times smaller, so that many workers finish at about
    the same time; 1: all parts have one size."""
    batch_size: int | Literal["auto"] = 8
    """Crops per teacher batch, also where labels are made during training. "auto" tries sizes when labelling begins and
    keeps the fastest in the labels folder, so that a resumed run gives the same bits."""
    threads: int = 4
    """Threads that decode, cut and encode while the teachers predict."""
    licence: str = "unknown"
    """The images' licence in words; it is written into the manifest and the student's card."""
    store: Literal["disparity", "as_is"] = "disparity"
    """The kind of stored maps: "disparity" turns depth without an unknown shift into disparity, exactly; "as_is"
    keeps it."""
    codec: Literal["jls", "zst", "png16", "float16"] = "jls"
    """How maps are encoded; the error is at most 1/8192 of a map's range (distill.shards.codecs). "jls" is JPEG-LS,
    which other programs open; "zst" is as small at a quarter of the CPU time."""
    names: str = ""
    """A text file with the samples, or images, of the labels to train on, such as `distill filter` writes; all by
    default."""
    mirror: str = ""
    """A URL (fsspec) where finished labels are sent, and from which training fetches those that it does not find
    locally."""
    cache_gb: float = 0.0
    """Gigabytes (1e9 bytes) of remote labels' tars (of mirror, or of a root that is an address) that training keeps
    locally: each is fetched at its first use while there is room; from the others a sample's bytes are fetched at every
    visit. 0: all are fetched before training begins, and kept (distill.shards.cache)."""
    online: bool = False
    """Label during training instead of before it."""
    commercial_only: bool = False
    """Refuse teachers whose weights' licence forbids commercial use."""
    sky: Literal["teacher", "keep", "far", "invalid", "zero"] = "teacher"
    """How sky is labelled: "teacher" leaves it to each teacher's own rule; the others apply to all teachers: "keep"
    what the networks predict, "far", "invalid" or "zero" (disparity) where a teacher that detects sky sees it
    (distill.teachers._sky)."""
    bridge: Literal["", "primary"] = ""
    """"primary" allows an assistant of affine depth, by fitting 1 / (a d + b) to the first teacher's disparity on
    every crop (distill.labelling.bridge)."""
    bridge_residual: float = 0.3
    """A bridged label whose residual is larger, as a share of the disparity's spread, is dropped and counted; in (0,
    1]."""

    align: Literal["", "truth"] = ""
    """"truth" fits every teacher's label to the image's measured depth, by a robust scale and shift per map, so that
    sparse lidar or SfM points make dense metric labels (distill.labelling.alignment). Depth Anything 3."""
    align_residual: float = 0.3
    """A fitted label whose residual on its inliers is larger, as a share of the truth's spread, is dropped and counted;
    in (0, 1]. Ours."""
    align_inliers: float = 0.5
    """A fitted label that fits a smaller share of the truth's points is dropped and counted; in [0, 1]. Ours."""

    def __post_init__(self) -> None:
        faults = below(self, samples_per_part=1, threads=0, fine_tail=1, cache_gb=0.0) + unknown_words(self)
        faults += above(self, samples_per_part=1_000_000, threads=256, fine_tail=100)
        if isinstance(self.batch_size, int):
            faults += below(self, batch_size=1) + above(self, batch_size=65536)
        elif self.online:
            faults.append('batch_size = "auto" is stored in a labels folder: with online = true set a number')
        if "://" in self.root and not self.meeting:
            faults.append(
                f"root = {self.root!r}: labels must be made on a local path, where tars are finished by renaming, or "
                f"at {', '.join(STORES)}, which have conditional puts; labels.mirror takes any URL"
            )
        if self.meeting and self.mirror:
            faults.append(
                "root is a URL, from which training fetches: remove mirror, which is for labels made on a path"
            )
        if self.cache_gb and not self.source:
            faults.append("cache_gb is for labels that are fetched: set labels.mirror, or remove cache_gb")
        if self.mirror and "://" not in self.mirror:
            faults.append(f"mirror = {self.mirror!r} must be a URL, such as s3://bucket/labels or file:///mnt/labels")
        if not 0.0 < self.bridge_residual <= 1.0:
            faults.append(f"bridge_residual must be in (0, 1], not {self.bridge_residual}")
        if not 0.0 < self.align_residual <= 1.0:
            faults.append(f"align_residual must be in (0, 1], not {self.align_residual}")
        if not 0.0 <= self.align_inliers <= 1.0:
            faults.append(f"align_inliers must be in [0, 1], not {self.align_inliers}")
        if self.align and self.bridge:
            faults.append("align fits every teacher to the truth: remove bridge")
        if self.bridge and self.store != "disparity":
            faults.append(f'bridge = "{self.bridge}" makes disparity: it needs store = "disparity"')
        raise_faults(faults)

    @property
    def crops_at_once(self) -> int:
        """The batch size as a number; the default until "auto" is resolved (distill.labelling.tuning)."""
        return DEFAULTS.crops_at_once if isinstance(self.batch_size, str) else self.batch_size

    def with_batch_size(self, number: int) -> LabelSettings:
        """The same with another batch size."""
        return replace(self, batch_size=number)

    @property
    def meeting(self) -> str:
        """The address of an object store where workers meet, or ""."""
        return self.root if self.root.startswith(STORES) else ""

    @property
    def source(self) -> str:
        """The address that training fetches labels from, or ""."""
        return self.mirror or self.meeting

    @property
    def content(self) -> dict[str, Any]:
        """The settings that determine a labels folder's content, besides images, crops and teachers."""
        names = ["store", "codec", "samples_per_part", "sky"]
        names += ["bridge", "bridge_residual"] if self.bridge else []
        names += ["align", "align_residual", "align_inliers"] if self.align else []
        names += ["fine_tail"] if self.fine_tail > 1 else []
        return {name: getattr(self, name) for name in names}


DEFAULTS = LabelSettings()
