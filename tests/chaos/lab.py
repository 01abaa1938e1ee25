"""A small environment for chaos tests: photographs, a recipe with a weightless teacher, and the commands' outputs."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tests.chaos.trial import Outcome, distill, trial
from tests.data.pictures import encoded, pack, picture

RECIPE = """
[run]
name = "lab"
out = "{folder}/run"
device = "cpu"
seed = 3
[[images]]
tars = "{folder}/sa_{{0..1}}.tar"
[[images]]
photos = "{folder}/photos"
[crops]
size = 32
min_side = 32
patches = "random"
num_patches = 1
patch_size = 16
crops_per_image = 2
[[teachers]]
name = "analytic"
[labels]
samples_per_part = 4
threads = 2
licence = "ours"
[student]
encoder = "test_vit"
decoder = "dpt"
[student.encoder_options.timm_options]
depth = 4
embed_dim = 32
patch_size = 16
[student.decoder_options]
channels = 8
post_process_channels = [8, 8, 8, 8]
[train]
steps = 6
batch_size = 2
eval_every = 2
save_every = 2
eval_batch_size = 4
val_fraction = 0.2
workers = 0
warmup_steps = 1
trackers = []
keep_last = 3
[score]
plane_prior = false
[[benchmarks]]
name = "{benchmark}"
"""


class Lab:
    """A folder with images and a recipe; `call` runs a command there, `keep` and `back` save and restore run/."""

    def __init__(self, folder: Path, *, photos: int = 3, per_tar: int = 4) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            members = [
                (f"./sa_{number}_{i}.jpg", encoded(picture(40 + i, 48, seed=10 * number + i), quality=95))
                for i in range(per_tar)
            ]
            pack(folder / f"sa_{number}.tar", members)
        (folder / "photos").mkdir(exist_ok=True)
        for i in range(photos):
            (folder / "photos" / f"p{i}.png").write_bytes(encoded(picture(36, 44, seed=50 + i), "PNG"))
        self.write()

    def write(self) -> None:
        """Write the recipe for this folder."""
        benchmark = Path(__file__).parent.parent / "app" / "two_images.py"
        (self.folder / "r.toml").write_text(RECIPE.format(folder=self.folder, benchmark=benchmark))

    def call(
        self, *arguments: str | Path, limit: float = 60.0, signal_after: float | None = None, **more: int
    ) -> Outcome:
        """Run a command in the folder."""
        return trial(distill(*arguments, folder=self.folder), limit=limit, signal_after=signal_after, **more)

    @property
    def labels(self) -> Path:
        """The labels folder."""
        return next(path for path in (self.folder / "run" / "labels").iterdir() if path.is_dir())

    @property
    def train(self) -> Path:
        """The folder of the training run."""
        return self.folder / "run" / "train"

    def keep(self) -> Path:
        """Copy run/ to a backup and return its path."""
        backup = self.folder.with_name(self.folder.name + ".kept")
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(self.folder / "run", backup)
        return backup

    def back(self, kept: Path) -> None:
        """Restore run/ from the backup."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        shutil.copytree(kept, self.folder / "run")


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
