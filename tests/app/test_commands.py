"""The whole journey through the command line: synthetic tar -> label -> train -> checkpoint -> score -> report.

The teacher is analytic, so the right answer is known at every station. Then the same journey killed half-way and
resumed: same labels, same weights, to the byte.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
from distill.app import commands
from distill.app.cli import main
from distill.eval.benchmarks import scenes
from distill.shards import shards
from distill.students import checkpoint

ROOT = Path(__file__).parents[2]
RECIPE = """
[run]
name = "journey"
out = "{out}"
device = "cpu"
[[images]]
tars = "{tars}"
[crops]
size = 64
min_side = 64
crops_per_image = 3
patches = "random"
num_patches = 2
[[teachers]]
name = "analytic"
[labels]
samples_per_part = 9
[student]
encoder = "vit_tiny_patch16_224"
decoder = "sdt"
encoder_options = {{ blocks = [0, 1], timm_options = {{ embed_dim = 48, num_heads = 2 }} }}
decoder_options = {{ fusion_channels = 16 }}
[loss]
normalization = "hybrid"
[train]
steps = 20
batch_size = 4
lr = 2e-3
encoder_lr = 1e-3
warmup_steps = 3
val_fraction = 0.2
eval_every = 10
save_every = 10
workers = 0
[[benchmarks]]
name = "scenes"
limit = 3
"""


def photograph(seed: int) -> Image.Image:
    """Smooth colours, 96 to 128 pixels: something a crop can be cut from."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((128, 96 + seed % 9), Image.Resampling.BICUBIC)


def write_tar(path: Path, count: int, first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            data = io.BytesIO()
            photograph(i).save(data, "JPEG", quality=95)
            content = data.getvalue() if i != first + 2 else data.getvalue()[:500]
            for name, body in ((f"./sa_{i}.jpg", content), (f"./sa_{i}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    write_tar(folder / "sa_000000.tar", 7)
    write_tar(folder / "sa_000001.tar", 6, first=100)
    return folder


def recipe(world: Path, name: str) -> Path:
    path = world / f"{name}.toml"
    path.write_text(RECIPE.format(out=world / name, tars=world / "sa_{000000..000001}.tar"))
    return path


@pytest.fixture(scope="module")
def straight(world) -> Path:
    """One journey without interruption, its plane fitted to 3 views: drawing 64 takes longer than all the rest."""
    path = str(recipe(world, "straight"))
    drawn = scenes.training_samples
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scenes, "training_samples", lambda count: drawn(min(count, 3)))
        for verb in ("label", "train", "score", "report"):
            assert main([verb, path]) == 0, verb
    return world / "straight"


def labels_of(run: Path) -> Path:
    (found,) = (run / "labels").iterdir()
    return found


def test_every_good_image_is_labelled_and_every_bad_one_is_named(straight):
    manifest = shards.read_manifest(labels_of(straight))
    assert sum(shard["samples"] for shard in manifest["shards"]) == (7 + 6 - 2) * 3
    assert [q["origin"] for q in manifest["quarantine"]] == ["sa_000000.tar:sa_2.jpg", "sa_000001.tar:sa_102.jpg"]
    assert shards.verify(labels_of(straight)) == []


def test_the_student_learns_and_describes_itself(straight):
    lines = [json.loads(line) for line in (straight / "train" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert any("heldout" in line for line in lines)
    assert {"shared", "local_global", "gradient"} <= set(lines[0]["parts"])
    student = checkpoint.load(straight / "train" / "student")
    assert student(torch.rand(1, 3, 50, 70)).shape == (1, 50, 70)
    card = checkpoint.read_card(straight / "train" / "student")
    assert "analytic" in json.dumps(card["teachers"])
    assert card["lineage"]["teacher analytic"]["commercial"] and card["lineage"]["images"]["licence"] == "unknown"
    assert card["commercial"] is False, "nobody has said what the images allow"


def test_a_report_refuses_unknown_metrics_and_says_where_the_recipe_differs(straight, capsys):
    assert main(["report", str(straight), "--format", "md", "--metrics", "abs_rell"]) == 2
    assert "none of these scores has abs_rell; there are " in capsys.readouterr().err
    path = str(straight.with_suffix(".toml"))
    assert main(["report", path, "--format", "md", "--set", "train.steps=99999"]) == 0
    assert "other values of train.steps: the report shows the run as it is" in capsys.readouterr().err
    assert main(["report", path, "--format", "md"]) == 0
    assert "other values" not in capsys.readouterr().err
    assert main(["report", str(straight), "--set", "train.steps=9"]) == 2
    assert "--set changes a recipe, but this is the folder of a run: leave it out" in capsys.readouterr().err
    assert main(["report", str(straight), "--format", "latex"]) == 0
    assert "tabular" in capsys.readouterr().out
    broken = straight / "scores" / "broken.json"
    broken.write_text("{")
    assert main(["report", str(straight), "--format", "text"]) == 1, "a score is missing from the table"
    assert "broken.json" in capsys.readouterr().err
    broken.unlink()
    assert main(["train", path]) == 0
    assert "already trained: no step was left" in capsys.readouterr().out


def test_scores_and_report_are_written(straight):
    scores = {p.name for p in (straight / "scores").glob("*.json")}
    assert {"scenes--student.json", "scenes--analytic.json", "scenes--plane_baseline.json"} <= scores
    html = (straight / "report.html").read_text()
    faithful = json.loads((straight / "fidelity" / "scenes--analytic.json").read_text())
    own = json.loads((straight / "scores" / "scenes--student.json").read_text())["metrics"]
    assert 0 < faithful["abs_rel"] < own["abs_rel"]  # it learnt its teacher, whom the scenes' depth does not care for
    assert 'id="fidelity"' in html and f"{faithful['boundary_f1']:.4f}" in html
    assert "data:image/" in html and "abs_rel" in html.lower().replace("absrel", "abs_rel")
    for outside in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert outside not in html
    assert "depth" in html and (straight / "recipe.toml").is_file()


def test_an_export_carries_the_scores_of_these_weights_alone(straight, tmp_path):
    run = tmp_path / "run"
    for part in ("scores", "predictions", "train/student"):
        shutil.copytree(straight / part, run / part)
    student = run / "train" / "student"
    assert main(["export", str(student), str(tmp_path / "shipped")]) == 0
    score = json.loads((run / "scores" / "scenes--student.json").read_text())
    card = checkpoint.read_card(tmp_path / "shipped")
    row = next(row for row in card["scores"] if row["model"] == "student")
    assert {row["model"] for row in card["scores"]} > {"student"}, "its teachers beside it"
    cost = card["cost"][0]
    assert cost["model"] == "student" and float(cost["GFLOPs"]) > 0 and float(cost["ms an image"]) > 0
    assert row["abs_rel"] == f"{score['metrics']['abs_rel']:.4f}" and row["protocol"] == score["protocol"]["id"]
    assert f"| student | scenes | {row['abs_rel']} |" in (tmp_path / "shipped" / "README.md").read_text()
    again = checkpoint.load(student)
    with torch.no_grad():
        next(again.decoder.parameters()).add_(0.1)
    checkpoint.save(again, student, card=checkpoint.read_card(student))
    assert main(["export", str(student), str(tmp_path / "later")]) == 0
    assert "scores" not in checkpoint.read_card(tmp_path / "later")


def killed_after(processes, command: list[str], done: Path, pattern: str) -> None:
    """Runs a verb in a process of its own and kills it once a file has appeared."""
    process = processes.Process(target=main, args=(command,))
    process.start()
    deadline = time.monotonic() + 90
    while process.is_alive() and time.monotonic() < deadline:
        if list(done.glob(pattern)):
            process.kill()
            break
        time.sleep(0.005)
    process.join()


def test_killed_half_way_and_resumed_is_the_same_to_the_byte(world, straight, processes):
    path = str(recipe(world, "killed"))
    killed_after(processes, ["label", path], world / "killed", "labels/*/sa_000000-000.tar")
    assert main(["label", path]) == 0
    one, other = labels_of(straight), labels_of(world / "killed")
    assert one.name == other.name
    tars = sorted(p.name for p in one.glob("*.tar"))
    assert tars and all((one / t).read_bytes() == (other / t).read_bytes() for t in tars)
    killed_after(processes, ["train", path], world / "killed", "train/checkpoints/*10*")
    assert main(["train", path]) == 0
    ours, theirs = (run / "train" / "student" / "model.safetensors" for run in (straight, world / "killed"))
    assert ours.read_bytes() == theirs.read_bytes()


MISTAKES = {
    "no such recipe": (["label", "nowhere.toml"], "nowhere.toml: no such recipe"),
    "misspelt override": (["show", "{recipe}", "--set", "train.stps=3"], "did you mean train.steps?"),
    "train before label": (
        ["train", "{recipe}", "--set", "crops.crops_per_image=9"],
        "run `distill label` with this recipe",
    ),
    "no such tar": (["label", "{recipe}", "--set", 'images.0.tars="gone.tar"'], "gone.tar: no such tar"),
    "teacher option": (
        ["label", "{recipe}", "--set", "teachers.0.options.offst=1"],
        "unknown key teachers[0].options.offst; did you mean offset?",
    ),
    "teacher option that is a key": (
        ["label", "{recipe}", "--set", 'teachers.0.options.dtype="float16"'],
        "teachers[0].options.dtype: teachers[0].dtype decides; leave it out",
    ),
    "report of nothing": (["report", "nowhere"], "nowhere"),
    "report without scores": (["report", str(Path(__file__).parent), "--format", "md"], "no scores; run distill score"),
    "report of another folder": (["report", str(Path(__file__).parent)], "not the folder of a run"),
    "verify nothing": (["verify", "nowhere"], "nowhere"),
    "file of a recipe's scores": (
        ["score", "{recipe}", "--out", "s.json"],
        "a recipe's scores go to its run's folder",
    ),
    "score of nothing": (["score"], "score takes a recipe, or --predictions"),
}


@pytest.mark.parametrize("case", list(MISTAKES))
def test_a_mistake_ends_in_one_line_and_a_code(case, world, capsys):
    command, message = MISTAKES[case]
    path = str(recipe(world, "mistake"))
    assert main([part.format(recipe=path) for part in command]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said


def test_help_is_instant_and_needs_no_heavy_import():
    code = (
        "import sys, distill.app.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'transformers', 'diffusers', 'accelerate', 'cv2', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "label", "train", "score", "report", "verify", "show", "list"):
        assert f"\n    {verb}" in done.stdout


def test_the_commit_needs_no_git_on_the_machine(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(commands.subprocess, "run", none)
    assert commands.commit().startswith(distill.__version__)
