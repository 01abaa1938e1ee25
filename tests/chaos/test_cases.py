"""Users' files: the inputs of public bug reports, if DISTILL_CASES is their folder.

Each case's folder has a run.py that prints HOLDS or FAILS; it uses older names, which are updated here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CASES = Path(os.environ.get("DISTILL_CASES", "/nowhere"))
FOLDERS = sorted(path.parent for path in CASES.glob("[0-9]*/run.py"))
RENAMED = {
    "import decode, BadImage\n": "import decode, BadImageError as BadImage\n",
    "from distill.photos import": "from distill.data.photos import",
    "from distill.pairs import": "from distill.data.pairs import",
    "from teachers import": "from distill.teachers import",
    "from students.": "from distill.students.",
    "from eval.": "from distill.eval.",
    "from distill import checkpoint": "from distill.students import checkpoint",
    "from tests import test_golden_teachers": "from tests.teachers import test_golden_teachers",
    'small="use"': 'on_small="use"',
}
RENAMED_KEYS = {"small = ": "on_small = ", "draws = ": "crops_per_image = ", "holdout = ": "val_fraction = "}


@pytest.mark.skipif(not FOLDERS, reason="set DISTILL_CASES to the folder of the cases")
@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_case(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "run.py", *tmp_path.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        for old, new in (RENAMED if path.suffix == ".py" else RENAMED_KEYS).items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    environment = {**os.environ, "REPO": str(ROOT), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.rstrip().endswith("HOLDS"), done.stdout[-2000:] + done.stderr[-2000:]
