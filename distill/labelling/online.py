"""Samples labelled on demand: training with loaded teachers, read like a labels folder.

Only the teachers whose labels are used are asked. With crops.redraw an image's region is drawn anew at every visit, as
in the paper; the sample at a position of the training stream still depends on (seed, position) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

from torch.utils.data import Dataset

from distill.core.crop_settings import CropSettings
from distill.data.patience import patiently
from distill.data.sources import BadImageError, Entry, InputShard, Rejected
from distill.labelling.annotate import label_photo
from distill.labelling.jobs import Teachers, asked_about, teachers_for
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.shards.codec import Sample


class OnlineDataset(Dataset[Sample]):
    """Samples labelled on demand, for training with loaded teachers; read like a LabelDataset.

    shards: the sources. keys: image or sample keys to keep. An image that cannot be labelled is replaced by the next
    with the same teachers that can, and added once to `quarantine`, whatever regions of it are drawn. Use 0 DataLoader
    workers where a teacher is on a GPU.
    Raises ValueError where there is no image at all, or none that can be labelled.
    """

    def __init__(
        self,
        shards: Sequence[InputShard],
        teachers: Teachers,
        *,
        crops: CropSettings,
        labels: LabelSettings = DEFAULTS,
        seed: int = 0,
        keys: Collection[str] | None = None,
    ) -> None:
        self.networks, self.crops, self.labels, self.seed = teachers, crops, labels, seed
        self.teachers = [name for name, _ in teachers]
        asked = [asked_about(shard, teachers) for shard in shards]
        scans = [(shard.source, names, shard.scan()) for shard, names in zip(shards, asked, strict=True)]
        self.quarantine = [rejected for *_, scan in scans for rejected in scan.rejected]
        candidates = [
            (entry, draw, source, names)
            for source, names, scan in scans
            for entry in scan.entries
            for draw in range(crops.crops_per_image)
        ]
        allowed = None if keys is None else frozenset(keys)
        chosen = [c for c in candidates if allowed is None or not allowed.isdisjoint((c[0].key, f"{c[0].key}-{c[1]}"))]
        if not chosen:
            raise ValueError(
                f"no image to label among {len(candidates)} candidates in {len(shards)} shards; check [images]"
            )
        self.entries: list[tuple[Entry, int]] = [(entry, draw) for entry, draw, *_ in chosen]
        self.keys = [f"{entry.key}-{draw}" for entry, draw in self.entries]
        self.image_keys = [entry.key for entry, _ in self.entries]
        self.sources = [source for *_, source, _ in chosen]
        self._asked = [names for *_, names in chosen]
        self._heldout: frozenset[int] = frozenset()
        self._unusable: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self.entries) <= index < len(self.entries):
            raise IndexError(f"sample {index} of {len(self.entries)}")
        return self.get(index, self.teachers_of(index))

    def keep_apart(self, heldout: Collection[int]) -> None:
        """From now on an image of these samples is never replaced by one of the others, nor the reverse."""
        self._heldout = frozenset(heldout)

    def teachers_of(self, index: int) -> tuple[str, ...]:
        """The teachers of the source of sample `index`."""
        return self._asked[index]

    def get(self, index: int, teachers: Sequence[str], *, visit: int | None = None) -> Sample:
        """Sample `index` with the labels of these teachers only; the others are not asked.

        visit: the position in the training stream, which seeds the region where crops.redraw is true; None: the
        sample's own draw.
        """
        asked = teachers_for(teachers, self.networks, origin=self.keys[index])
        index %= len(self.entries)
        reason = ""
        for candidate in chain(range(index, len(self.entries)), range(index)):
            if not {*teachers} <= {*self.teachers_of(candidate)}:
                continue
            if (candidate in self._heldout) != (index in self._heldout):
                continue
            entry, draw = self.entries[candidate]
            draw = visit if self.crops.redraw and visit is not None else draw
            try:
                sample = label_photo(
                    patiently(entry.load), asked, crops=self.crops, labels=self.labels, seed=self.seed, draw=draw
                )
            except BadImageError as error:
                reason = str(error)
                if candidate not in self._unusable:
                    self._unusable.add(candidate)
                    self.quarantine.append(Rejected(entry.origin, f"{entry.key}-{draw}", reason))
                continue
            for name in [name for name in sample.labels if name not in teachers]:
                del sample.labels[name]  # only asked for a bridge
            return sample
        raise ValueError(f"none of {len(self.entries)} images can be labelled; the last failed with: {reason}")
