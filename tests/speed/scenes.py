"""Views per minute that distill.data.scenes renders. Run: python tests/speed/scenes.py [COUNT]"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill.data import scenes

count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
started = time.perf_counter()
scenes.render(scenes.TRAIN_SEEDS[0])
print(f"first view, with the texture bank: {time.perf_counter() - started:.2f} s")
started, cpu = time.perf_counter(), time.process_time()
for index in range(count):
    scenes.render(scenes.TRAIN_SEEDS[index])
wall, cpu = time.perf_counter() - started, time.process_time() - cpu
print(
    f"{count * 60 / wall:.0f} views of 224 x 224 per minute, {count * 60 / cpu:.0f} per minute of CPU time "
    f"({wall / count:.3f} s wall, {cpu / count:.3f} s CPU each)"
)
