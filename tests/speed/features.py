"""The gain from storing a frozen encoder's features: processor time of the bench's training, with and without.

    OMP_NUM_THREADS=1 python -m tests.speed.features [--recipe recipes/ablations/bench.toml] [--scenes 8] [--steps 20]

Prints processor seconds: of a step with the live encoder, of a step on stored features, of storing them once; and
the number of steps from which storing pays.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from distill.app import commands
from distill.app.recipe import Recipe, load


def _spent(recipe: Recipe) -> float:
    before = time.process_time()
    commands.run_train(recipe)
    return time.process_time() - before


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/ablations/bench.toml")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:

        def recipe(name: str, steps: int, *, cached: bool) -> Recipe:
            overrides = [f"images.0.scenes={args.scenes}", f"train.steps={steps}", "train.warmup_steps=1"]
            overrides += [f"train.cache_features={str(cached).lower()}", f"labels.root={folder}/labels"]
            return load(args.recipe, [*overrides, f"run.out={Path(folder) / name}"])

        commands.run_label(recipe("label", 2, cached=False))
        two_steps = _spent(recipe("live2", 2, cached=False))
        live = (_spent(recipe("live", args.steps, cached=False)) - two_steps) / (args.steps - 2)
        first = _spent(recipe("first", 2, cached=True))  # stores them
        two_steps = _spent(recipe("cached2", 2, cached=True))
        cached = (_spent(recipe("cached", args.steps, cached=True)) - two_steps) / (args.steps - 2)
        size = sum(path.stat().st_size for path in Path(folder).glob("labels/features/*/*.tar"))
    batch = recipe("x", 2, cached=False).train.batch_size
    print(f"a step of {batch} beside the encoder  {live:.3f} s")
    print(f"a step of {batch} on stored features  {cached:.3f} s   {live / cached:.1f} times faster")
    per_image = (first - two_steps) / args.scenes
    print(f"storing, both ways round              {per_image:.3f} s and {size / args.scenes / 1e6:.2f} MB an image")
    print(f"worth it from {per_image * args.scenes / (live - cached):.0f} steps on with {args.scenes} images")


if __name__ == "__main__":
    _main()
