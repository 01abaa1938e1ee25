"""Every recipe in the tree loads and names real plug-ins; bad ones give exactly the messages a person needs."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from distill import students
from distill.app import build, strict
from distill.app import recipe as recipes
from distill.app.cli import main
from distill.app.reference import feature_reference
from distill.core.depth import Kind
from distill.core.plugins import find
from distill.labelling.settings import LabelSettings
from distill.shards.codec import CODECS
from distill.students.decoders import FrozenBatchNorm
from distill.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
STUDIES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if "\n[full]\n" in p.read_text())
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if not p.stem.endswith("_card") and p not in STUDIES)
GOOD = """
[run]
name = "try"
[[images]]
photos = "pictures"
[[teachers]]
name = "depth_anything_v2"
weights = "w.pth"
[student]
decoder = "sdt"
[train]
steps = 10
warmup_steps = 5
lr = 3e-4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(strict.RecipeError) as caught:
        recipes.load(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_in_the_tree_loads_and_survives_a_round_trip(path, tmp_path):
    loaded = recipes.load(path)
    assert recipes.load(write(tmp_path, recipes.dumps(loaded))) == loaded
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), f"{path} should open with what it is and its command"


def test_numbers_defaults_and_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    loaded = recipes.load(path, ["train.steps=100", "run.name=other", "teachers.0.dtype=bfloat16", "loss.anchor=1"])
    assert (loaded.train.steps, loaded.run.name, loaded.teachers[0].dtype) == (100, "other", "bfloat16")
    assert loaded.loss.anchor == 1.0 and isinstance(loaded.loss.anchor, float)
    assert loaded.train.lr == 3e-4 and loaded.train.batch_size == 8
    assert loaded.run.folder == Path("runs/other")
    assert (loaded.loss.shared, loaded.loss.local_global, loaded.loss.feature, loaded.loss.gradient) == (1, 0.5, 1, 2)


BAD = {
    "unknown key": ("[train]\nstep = 3", "unknown key train.step; did you mean train.steps?"),
    "unknown key far from all": (
        "[compare]\nzzz = 3",
        "unknown key compare.zzz; compare has limit, side, student, time_at",
    ),
    "unknown table": ("[trian]\nsteps = 3", "unknown key trian; did you mean train?"),
    "text for a number": ('[train]\nlr = "3e-4"', "train.lr must be a number, not '3e-4'"),
    "number for text": ("[student]\nencoder = 3", "student.encoder must be a string, not 3"),
    "float for integer": ("[train]\nsteps = 1.5", "train.steps must be an integer, not 1.5"),
    "true is not a number": ("[train]\nsteps = true", "train.steps must be an integer, not True"),
    "not a choice": (
        '[train]\nprecision = "fp16"',
        "train.precision must be 'fp32' or 'bf16', not 'fp16'",
    ),
    "table for array": ('[teachers]\nname = "midas"', "[teachers] needs double brackets, [[teachers]]"),
    "array for table": ("[[crops]]\nsize = 28", "[[crops]] needs single brackets, [crops]"),
    "unknown decoder": ('[student]\ndecoder = "std"', "student: std is not one of the decoders; did you mean sdt?"),
    "unknown normalization": (
        '[loss]\nnormalization = "globl"',
        "loss: globl is not one of the normalizations; did you mean global?; available: global, hybrid, local, none",
    ),
    "two sources in one": (
        '[[images]]\nphotos = "a"\nscenes = 3',
        "images[0]: needs exactly one of tars, photos, pairs, dataset, scenes, bundled_photos",
    ),
    "out of range": ("[loss]\ntrim_top = 1.0", "loss: trim_top must be in [0, 1), not 1.0"),
    "device": (
        '[run]\nname = "x"\ndevice = "gpu"',
        "run: device must be auto, cpu, cuda, cuda:N, mps or xpu, not 'gpu'",
    ),
    "no name": ('[run]\nname = ""', "run: name = '' cannot name a folder below runs/: use a plain word"),
    "climbing name": (
        '[run]\nname = "../../x"',
        "run: name = '../../x' cannot name a folder below runs/: use a plain word",
    ),
    "patch_size": ("[crops]\npatch_size = -5", "crops: patch_size must be at least 0, not -5"),
    "labels.batch_size": ("[labels]\nbatch_size = 0", "labels: batch_size must be at least 1, not 0"),
    "labels.threads": ("[labels]\nthreads = -2", "labels: threads must be at least 0, not -2"),
    "images.limit": ('[[images]]\nphotos = "a"\nlimit = -3', "images[0]: limit must be at least 0, not -3"),
    "scenes": ("[[images]]\nscenes = -3", "images[0]: scenes must be at least 0, not -3"),
    "benchmarks.limit": (
        '[[benchmarks]]\nname = "nyu"\nlimit = -2',
        "benchmarks[0]: limit must be at least 0, not -2",
    ),
    "climbing alias": (
        '[[benchmarks]]\nname = "nyu"\nalias = "../../x"',
        "benchmarks[0]: alias = '../../x' cannot name a folder of predictions: use a word without slashes",
    ),
    "loss.shared": ("[loss]\nshared = -1", "loss: shared must be finite and at least 0, not -1.0"),
    "loss.anchor": ("[loss]\nanchor = nan", "loss: anchor must be finite and at least 0, not nan"),
    "crops redrawn of labels on disk": (
        "[crops]\nredraw = true",
        "crops.redraw needs labels.online = true: labels on disk have fixed crops",
    ),
    "squares out of regions that are none": (
        '[crops]\nwidth = 640\npatches = "none"\n[train]\nrandom_resized_crop = 0.5',
        "train.random_resized_crop cuts squares, but crops.width makes regions that are not square: leave one out",
    ),
    "a number beyond all": ("[train]\nsteps = 3000000000", "train.steps must be a whole number below 2,147,483,648"),
    "two beginnings": (
        '[student]\ninit_from = "pocket"\ndecoder_init_from = "other"',
        "student: init_from takes a whole student: encoder_init_from and decoder_init_from would be passed over, leave "
        "them out",
    ),
    "a whole student and weights": (
        '[student]\ninit_from = "pocket"\nweights = "pretrained"',
        'student: init_from takes a whole student: weights = "pretrained" would be passed over, leave one of them out',
    ),
    "two encoders": (
        '[student]\nencoder_init_from = "pocket"\nweights = "vit.pth"',
        "student: encoder_init_from and weights both say what the encoder begins with: leave one of them out",
    ),
    "native_size": ("[student]\nnative_size = -4", "student: native_size must be at least 0, not -4"),
    "lr": ("[train]\nlr = -1", "train: lr must be finite and above 0, not -1.0"),
    "lr inf": ("[train]\nlr = inf", "train: lr must be finite and above 0, not inf"),
    "lr nan": ("[train]\nlr = nan", "train: lr must be finite and above 0, not nan"),
    "ema": ("[train]\nema = 2", "train: ema must be a fraction, not 2.0"),
    "clip_norm": ("[train]\nclip_norm = inf", "train: clip_norm must be finite and at least 0, not inf"),
    "warmup": ("[train]\nsteps = 3", "train: warmup_steps (500, the default) must be fewer than steps (3)"),
    "betas": ("[train]\nbetas = [0.9]", "train.betas must have 2 entries, not 1"),
    "betas' range": ("[train]\nbetas = [0.9, 1]", "train: betas must be two numbers in [0, 1), not (0.9, 1.0)"),
    "alarm_growth": ("[train]\nalarm_growth = 1", "train: alarm_growth must be finite and above 1, not 1.0"),
    "random_resized_crop": (
        "[train]\nrandom_resized_crop = 0",
        "train: random_resized_crop must lie in (0, 1], not 0.0",
    ),
    "share": ("[train.teacher_shares]\na = 'b'", "train.teacher_shares.a must be a number, not 'b'"),
    "shares": (
        "[train.teacher_shares]\na = -1",
        "train: teacher_shares must be at least 0 and not all 0, not {'a': -1.0}",
    ),
    "accumulate": (
        "[train]\nbatch_size = 3\naccumulate = 2",
        "train: batch_size (3) must be a multiple of accumulate (2)",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_recipe_gives_exactly_the_expected_message(case, tmp_path):
    text, message = BAD[case]
    found = faults(tmp_path, f'[run]\nname = "x"\n{text}\n'.replace('[run]\nname = "x"\n[run]', "[run]"))
    assert len(found) == 1
    assert found[0] == message or (message.endswith("?") and found[0].startswith(message))


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.toml").write_text(GOOD + '[[benchmarks]]\nname = "nyu"\nroot = "~/nyu"\n')
    loaded = recipes.load(tmp_path / "own.toml", ["run.out=~/runs/x"])
    assert (loaded.run.out, loaded.benchmarks[0].root) == (f"{tmp_path}/runs/x", f"{tmp_path}/nyu")
    assert main(["predict", "~/none.jpg", "--out=~/depth"]) == 2 and f"{tmp_path}/none.jpg" in capsys.readouterr().err
    assert main(["show", "~/own.toml"]) == 0


def test_every_fault_is_reported_at_once(tmp_path):
    found = faults(tmp_path, '[run]\nnam = "x"\n[train]\nlr = "fast"\nsteps = "many"\n[loss]\nnormalization = 3\n')
    assert found == [
        "unknown key run.nam; did you mean run.name?",
        "run.name is missing",
        "train.lr must be a number, not 'fast'",
        "train.steps must be an integer, not 'many'",
        "loss.normalization must be a string, not 3",
    ]


def test_every_fault_of_every_table_is_reported_at_once(tmp_path):
    text = '[run]\nname = ""\ndevice = "gpu"\n[crops]\nsize = 1\noverlap = nan\n[train]\nlr = nan\nprimary_ratio = 2\n'
    run, crops, train = faults(tmp_path, text)
    assert run.startswith("run: name = ''") and "; device must be auto" in run
    assert crops == "crops: size must be at least 14, not 1; overlap must be in [0, 0.9), not nan"
    assert train == "train: primary_ratio must be in [0, 1], not 2.0; lr must be finite and above 0, not nan"


def test_every_setting_of_training_is_a_key_and_reaches_the_trainer(tmp_path):
    overrides = ["betas=[0.8, 0.99]", "random_resized_crop=0.5", "eval_batch_size=2", "alarm_growth=3"]
    overrides += ["kind=metric_depth", "val_fraction=0.1", "color_jitter=0.2"]
    given = ["student.max_depth=20", *(f"train.{text}" for text in overrides)]
    reached = build.train_settings(recipes.load(write(tmp_path, GOOD), given))
    assert (reached.betas, reached.random_resized_crop, reached.eval_batch_size) == ((0.8, 0.99), 0.5, 2)
    assert (reached.alarm_growth, reached.kind) == (3.0, "metric_depth")
    assert (reached.val_fraction, reached.color_jitter, reached.seed) == (0.1, 0.2, 0)
    assert set(typing.get_args(typing.get_type_hints(TrainSettings)["kind"])) == {kind.value for kind in Kind}
    assert set(typing.get_args(typing.get_type_hints(LabelSettings)["codec"])) == set(CODECS)


def test_who_is_learnt_from_and_how_often(tmp_path):
    path = write(tmp_path, GOOD + '[[teachers]]\nname = "midas"\n'.replace("[[", "\n[["))
    shares = [build.train_settings(recipes.load(path, more)).teacher_shares for more in ([], ["train.primary_ratio=1"])]
    assert shares == [{"depth_anything_v2": 0.7, "midas": pytest.approx(0.3)}, {"depth_anything_v2": 1.0, "midas": 0.0}]
    told = recipes.load(path, ["train.teacher_shares={midas = 1}"])
    assert build.train_settings(told).teacher_shares == {"midas": 1.0}


def test_teachers_at_hand_see_the_batches_that_the_recipe_says(tmp_path, monkeypatch):
    text = '[run]\nname = "x"\n[[images]]\nscenes = 1\nsize = 64\n[crops]\nsize = 28\nmin_side = 40\npatch_size = 14\n'
    loaded = recipes.load(write(tmp_path, text + '[[teachers]]\nname = "analytic"\n'), ["labels.online=true"])
    sizes: list[int] = []
    predict = find("distill.teachers", "analytic").Teacher.predict
    seen = lambda self, images: (sizes.append(len(images)), predict(self, images))[1]  # noqa: E731
    monkeypatch.setattr(find("distill.teachers", "analytic").Teacher, "predict", seen)
    for wanted in (8, 2):
        sizes.clear()
        labels = dataclasses.replace(loaded.labels, batch_size=wanted)
        build.training_labels(dataclasses.replace(loaded, labels=labels))[0]
        assert max(sizes) == wanted


def test_a_device_that_is_not_here_is_a_line_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert build.device(recipes.load(write(tmp_path, GOOD), ["run.device=cuda:0"])) == torch.device("cuda", 0)
    for name, count in {"cuda": 0, "cuda:1": 1, "mps": 0}.items():
        loaded = recipes.load(write(tmp_path, GOOD), [f"run.device={name}"])
        monkeypatch.setattr(torch.get_device_module(name), "device_count", lambda count=count: count)
        with pytest.raises(
            strict.RecipeError, match=f'run.device = "{name}": torch finds {count} .* devices? here; use "auto"'
        ):
            build.device(loaded)


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_each_process_of_a_machine_takes_a_card_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = recipes.load(write(tmp_path, GOOD), [f"run.device={name}"])
    assert build.device(asked) == torch.device("cuda", 0)
    for rank, card in (("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert build.device(asked) == torch.device("cuda", card)


def test_a_teacher_named_twice_needs_an_alias(tmp_path):
    twice = '[[teachers]]\nname = "midas"\n[[teachers]]\nname = "midas"\n'
    assert faults(tmp_path, f'[run]\nname = "x"\n{twice}') == ["teachers named twice: midas; give each its own alias"]
    twice = '[[benchmarks]]\nname = "scenes"\n[[benchmarks]]\nname = "scenes"\n'
    assert faults(tmp_path, f'[run]\nname = "x"\n{twice}') == [
        "benchmarks named twice: scenes; give each its own alias"
    ]


def test_broken_toml_missing_file_and_bad_set(tmp_path):
    assert faults(tmp_path, "[run\n")[0].startswith("not valid TOML: ")
    with pytest.raises(strict.RecipeError, match="no such recipe.*r.toml"):
        recipes.load(tmp_path / "q.toml")
    path = write(tmp_path, GOOD)
    for bad, message in {
        "train.steps": "write it as KEY=VALUE",
        "teachers.7.weights=a": "teachers has 1 entries, numbered from 0",
        "train.steps.more=1": "is not a table|train.steps",
        "train.stps=3": "unknown key train.stps; did you mean train.steps",
    }.items():
        with pytest.raises(strict.RecipeError, match=message):
            recipes.load(path, [bad])


STUDENTS = sorted((ROOT / "recipes" / "students").glob("*.toml"))


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: p.stem)
def test_the_students_of_the_papers_tables_can_be_built(path):
    """On the meta device: shapes and options are judged, no weight is needed."""
    spec = recipes.load(path, ["student.weights="]).student
    with torch.device("meta"):
        student = students.build(
            encoder=spec.encoder,
            decoder=spec.decoder,
            encoder_options=spec.encoder_options,
            decoder_options=spec.decoder_options,
        )
        assert student.decoder(student.encoder.features(torch.rand(1, 3, 112, 112))).shape[0] == 1


def test_norm_by_recipe_reaches_decoder_and_trainer(tmp_path, monkeypatch):
    tiny = '[run]\nname = "x"\n[student]\nencoder = "test_vit"\n[student.decoder_options]\nfusion_channels = 8\n'
    path = write(tmp_path, tiny)
    for norm, found in {"group": nn.GroupNorm, "frozen": FrozenBatchNorm, "sync": nn.BatchNorm2d}.items():
        loaded = recipes.load(path, [f"student.norm={norm}"])
        assert isinstance(build.make_student(loaded).decoder.detail_enhancer.norm, found)
        assert build.train_settings(loaded).batchnorm == ("batch" if norm == "group" else norm)
    plain = recipes.load(path)
    assert build.train_settings(plain).batchnorm == "batch" and not build.batch_norm_note(
        plain, build.make_student(plain)
    )
    cut = recipes.load(path, ["train.accumulate=4"])
    assert "BatchNorm sees 2 of a step's 8 images" in build.batch_norm_note(cut, build.make_student(cut))
    grouped = recipes.load(path, ["train.accumulate=4", "student.norm=group"])
    assert not build.batch_norm_note(grouped, build.make_student(grouped))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "BatchNorm sees 1 of" in build.batch_norm_note(plain, build.make_student(plain))
    synced = recipes.load(path, ["student.norm=sync"])
    assert not build.batch_norm_note(synced, build.make_student(synced))


def test_norm_in_two_places_is_a_fault(tmp_path):
    text = '[run]\nname = "x"\n[student]\nnorm = "group"\ndecoder_options = { norm = "batch" }\n'
    assert faults(tmp_path, text) == ["student: norm and decoder_options.norm both say it: keep norm"]


def test_a_student_begins_from_a_whole_checkpoint(tmp_path):
    """Encoder and head of one released file; with `weights` alone only the encoder (paper, Appendix C.1)."""
    options = {"channels": 8, "post_process_channels": [8, 8, 8, 8]}
    torch.manual_seed(5)  # not the seed of the recipe
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 1, "img_size": 28}
    released = students.build(
        encoder="dinov2_vits14", decoder="dav2", encoder_options={"timm_options": shape}, decoder_options=options
    )
    state = {f"pretrained.{key}": value for key, value in released.encoder.backbone.state_dict().items()}
    state |= {"pretrained.norm.weight": torch.ones(32), "pretrained.norm.bias": torch.zeros(32)}
    state |= {f"depth_head.{key}": value for key, value in released.decoder.state_dict().items()}
    torch.save(state, tmp_path / "dav2.pth")
    text = (
        f'[run]\nname = "x"\n[student]\nencoder = "dinov2_vits14"\ndecoder = "dav2"\nweights = "{tmp_path}/dav2.pth"\n'
        "[student.encoder_options.timm_options]\ndepth = 2\nembed_dim = 32\nnum_heads = 1\nimg_size = 28\n"
        "[student.decoder_options]\nchannels = 8\npost_process_channels = [8, 8, 8, 8]\n"
    )
    path, image = write(tmp_path, text), torch.rand(1, 3, 28, 42)
    whole = build.make_student(recipes.load(path, [f"student.decoder_weights={tmp_path}/dav2.pth"])).eval()
    torch.testing.assert_close(whole(image), released.eval()(image))
    half = build.make_student(recipes.load(path)).eval()
    assert torch.equal(half.encoder(image)[3][0], released.encoder(image)[3][0])
    assert not torch.equal(half(image), released(image))


def test_features_are_compared_with_the_start_or_with_a_named_encoder(tmp_path):
    shape = "encoder_options = { timm_options = { depth = 2, embed_dim = 32, num_heads = 1, img_size = 28 } }"
    text = f'[run]\nname = "x"\n[student]\nencoder = "dinov2_vits14"\n{shape}\n'
    path = write(tmp_path, text)
    student = build.make_student(recipes.load(path))
    assert feature_reference(recipes.load(path), student) is None, "its own start is random"
    state = {key: value + 1 for key, value in student.encoder.backbone.state_dict().items()}
    norm = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    torch.save(state | norm, tmp_path / "other.pth")
    named = f'loss.feature_reference="{tmp_path}/other.pth"'
    other = feature_reference(recipes.load(path, [named]), student)
    assert other is not None and torch.equal(other.backbone.cls_token, state["cls_token"])
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    begun = recipes.load(path, [f"student.weights={tmp_path}/other.pth"])
    trained = build.make_student(begun)
    start = feature_reference(begun, trained)
    assert start is not trained.encoder and torch.equal(start.backbone.cls_token, trained.encoder.backbone.cls_token)
    for off in ("loss.feature=0", "train.freeze_encoder=true"):
        assert feature_reference(recipes.load(path, [named, off]), student) is None


def test_features_of_another_width_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, '[run]\nname = "x"\n[student]\nencoder = "test_vit"\n')
    monkeypatch.setattr("distill.students.encoder._download", lambda name: timm.create_model(name).state_dict())
    student = build.make_student(recipes.load(path))
    with pytest.raises(strict.RecipeError, match="192 wide on patches of 16, the student's"):
        feature_reference(recipes.load(path, ['loss.feature_reference="vit_tiny_patch16_224"']), student)


@pytest.mark.parametrize("override", ['run.out="s3://bucket/run"', 'labels.root="memory://labels"'])
def test_outputs_go_to_paths(override):
    with pytest.raises(strict.RecipeError, match="local path|mount it"):
        recipes.load(ROOT / "recipes" / "demo.toml", [override])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("name = \u201cx\u201d", "there is a LEFT DOUBLE QUOTATION MARK: type a plain character"),
        ("name\u00a0= 'x'", "there is a NO-BREAK SPACE: type a plain character"),
        ("lr = \u22121.5", "there is a MINUS SIGN: type a plain character"),
        ('out = "C:\\Users\\x"', "a backslash in double quotes starts an escape"),
        ("resume = True", "instead of True write true or false, or leave the key out"),
        ("lr = 1,5", "a decimal point is needed: 1.5"),
        ("name: x", "joined by ="),
    ],
)
def test_what_people_write_for_toml_has_a_way_out(tmp_path, line, said):
    (fault,) = faults(tmp_path, f"# \u00e9\n[run]\n{line}\n")
    assert fault.startswith("not valid TOML: ") and said in fault


def test_a_recipe_of_another_encoding_says_which_to_take(tmp_path):
    (tmp_path / "l.toml").write_bytes(b"[run]\nname = '\xe9'\n")
    with pytest.raises(strict.RecipeError, match="l.toml: not valid TOML: .*; save it as UTF-8"):
        recipes.load(tmp_path / "l.toml")
