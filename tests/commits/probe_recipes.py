"""The recipes that the probe runs, with the old layout's names (probe_names has the new ones). Small on purpose."""

from __future__ import annotations

from typing import Any

Recipe = dict[str, Any]

CROPS = {"size": 56, "min_side": 60, "draws": 2, "patches": "random", "num_patches": 2, "small": "use"}
ANALYTIC = {"name": "analytic", "alias": "colours", "options": {"rgb": [0.2, 0.5, 0.3], "offset": 0.3}}
DA3 = {"name": "depth_anything_3", "weights": "inputs/weights/da3", "alias": "da3", "options": {"native_size": 84}}
POCKET = {"name": "checkpoint", "weights": "pocket", "alias": "pocket"}
SMALL_POCKET = POCKET | {"options": {"native_size": 84}}


def _depth(kind: str, alias: str, offset: float = 0.5) -> dict[str, Any]:
    options = {"kind": kind, "offset": offset, "rgb": [-0.3, 0.4, -0.1]}
    return {"name": "analytic", "alias": alias, "options": options}


def _labels(images: list[dict[str, Any]], teachers: list[dict[str, Any]], **tables: Any) -> Recipe:
    crops = CROPS | tables.pop("crops", {})
    return {"images": images, "crops": crops, "teachers": teachers, "labels": tables.pop("labels", {}), **tables}


LABELS: dict[str, Recipe] = {
    "pocket jls": _labels(
        [{"wheels": True, "limit": 3}, {"tars": "inputs/tars/sa_000000.tar", "limit": 3}, {"scenes": 5, "size": 72}],
        [SMALL_POCKET, ANALYTIC],
        crops={"num_patches": 1},
        labels={"codec": "jls", "samples_per_part": 10, "threads": 2, "licence": "CC0"},
    ),
    "corruptions png16": _labels(
        [{"scenes": 6, "size": 80}, {"pairs": "inputs/pairs"}],
        [
            {"name": "truth", "alias": "noisy", "options": {"blur": 1.5, "far_noise": 0.2, "warp": 0.1}},
            {"name": "truth", "alias": "ranged", "options": {"own_range": True, "drift": 0.2, "warp": 0.05}},
        ],
        crops={"patches": "grid", "patch_size": 28, "overlap": 0.25, "draws": 1, "min_side": 64, "small": "refuse"},
        labels={"codec": "png16"},
    ),
    "truth float16": _labels(
        [{"scenes": 4, "size": 72}, {"pairs": "inputs/pairs", "names": "inputs/pairs/prior.txt"}],
        [{"name": "truth"}],
        labels={"codec": "float16", "store": "own", "batch_size": 3, "threads": 0},
    ),
    "truth of every kind": _labels(
        [{"pairs": "inputs/pairs"}], [{"name": "truth"}], labels={"codec": "png16", "store": "own"}
    ),
    # Nothing is trained on these; they check how photos are decoded.
    "bundled photos": _labels([{"wheels": True}], [ANALYTIC], crops={"patches": "none", "size": 112, "draws": 1}),
    "bridge": _labels(
        [{"wheels": True, "limit": 3}, {"tars": "inputs/tars/sa_000000.tar", "limit": 5}],
        [ANALYTIC, _depth("affine_depth", "painted")],
        labels={"codec": "png16", "bridge": "primary", "bridge_residual": 0.9},
    ),
    "kinds as they are": _labels(
        [{"tars": "inputs/tars/sa_{000000..000001}.tar"}, {"photos": "inputs/photos", "limit": 9}],
        [_depth("scale_depth", "scaled", 0.6), _depth("metric_depth", "metric", 0.8)],
        crops={"patches": "none", "draws": 1, "min_side": 90, "small": "refuse"},
        labels={"store": "own", "samples_per_part": 4},
    ),
    "depth as disparity": _labels(
        [{"tars": "inputs/tars/sa_*.tar"}],
        [_depth("scale_depth", "scaled", 0.6), _depth("metric_depth", "metric", 0.8)],
        crops={"draws": 1},
    ),
    "sky far": _labels(
        [{"scenes": 3, "size": 72}],
        [DA3, ANALYTIC],
        crops={"draws": 1, "num_patches": 1},
        labels={"sky": "far"},
        run={"seed": 4},
    ),
    "sky zero": _labels(
        [{"tars": "inputs/tars/sa_000000.tar", "limit": 3}],
        [DA3, ANALYTIC],
        crops={"draws": 1, "num_patches": 1},
        labels={"sky": "zero", "codec": "png16"},
    ),
    "two processes": _labels([{"tars": "inputs/tars/sa_000000.tar"}], [ANALYTIC], labels={"samples_per_part": 4}),
}
SA1B = _labels(
    [
        {"tars": "sa1b/sa_000000.tar", "limit": 6},
        {"tars": "sa1b/sa_000900_damaged.tar"},
        {"tars": "sa1b/sa_000901_cut.tar", "limit": 4},
    ],
    [ANALYTIC],
    crops={"size": 112, "min_side": 644, "patches": "grid", "patch_size": 280, "draws": 1, "small": "refuse"},
)
# Online: labels are made during training.
ONLINE = _labels(
    [{"tars": "inputs/tars/sa_000000.tar"}], [ANALYTIC, _depth("scale_depth", "scaled", 0.6)], labels={"online": True}
)

_TINY = {"timm_options": {"depth": 4, "embed_dim": 32, "patch_size": 14}}
_DECODERS: dict[str, dict[str, Any]] = {
    "sdt": {"fusion_channels": 16},
    "sdt_fast": {"fusion_channels": 16, "widths": [16, 8, 8, 8]},
    "dpt": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
    "dav2": {"channels": 16, "post_process_channels": [8, 8, 16, 16]},
}


def _student(decoder: str, **more: Any) -> dict[str, Any]:
    """The [student] table. A start has its own options, which must not be repeated here."""
    if "start" in more:
        return more
    table = {"encoder": "test_vit", "decoder": decoder, "decoder_options": _DECODERS[decoder]} | more
    return table if "encoder_start" in more else table | {"encoder_options": _TINY}


def _train(**more: Any) -> dict[str, Any]:
    defaults = {"steps": 20, "batch_size": 4, "lr": 2e-3, "encoder_lr": 1e-3, "warmup_steps": 3, "holdout": 0.25}
    return defaults | {"eval_every": 5, "save_every": 10, "keep_last": 9, "workers": 0, "trackers": []} | more


# By name: the labels to train on, and the tables of student, loss and loop. A training may start from an earlier one.
TRAININGS: dict[str, tuple[str, Recipe]] = {
    "select sdt_fast": (
        "pocket jls",
        {
            "student": _student("sdt_fast"),
            "loss": {"normalization": "hybrid", "anchor": 0.05, "feature": 0.0},
            "train": _train(colour=0.2, ema=0.9, layer_decay=0.8, seed=3, workers=1),
        },
    ),
    "average dpt frozen": (
        "pocket jls",
        {
            "student": _student("dpt", encoder_start="runs/select sdt_fast/train/student"),
            "loss": {"normalization": "global", "trim_top": 0.1, "patch_resolution": "student"},
            "train": _train(strategy="average", freeze_encoder=True, accumulate=2, schedule="linear", clip_norm=0.5),
        },
    ),
    "features": (
        "corruptions png16",
        {
            "student": _student("sdt_fast", start="runs/select sdt_fast/train/student"),
            "loss": {"normalization": "local", "label_only": True, "feature": 1.0},
            "train": _train(freeze_steps=5, schedule="poly", batchnorm="frozen", hflip=False, patience=3),
        },
    ),
    "hdn bf16": (
        "pocket jls",
        {
            "student": _student("sdt", norm="group"),
            "loss": {"normalization": "hybrid", "faithful": True, "contexts": "dp"},
            "train": _train(batch_size=2, precision="bf16", schedule="constant", primary_ratio=0.5, eval_every=10),
        },
    ),
    "online dav2": (
        "online",
        {
            "student": _student("dav2"),
            "loss": {"normalization": "none", "gradient": 0.5},
            "train": _train(batch_size=2, channels_last=True, gradient_checkpointing=True, steps=20),
        },
    ),
    "bridged sdt": (
        "bridge",
        {
            "student": _student(
                "sdt_fast",
                encoder_start="runs/select sdt_fast/train/student",
                decoder_start="runs/select sdt_fast/train/student",
            ),
            "loss": {"normalization": "hybrid", "faithful": True, "contexts": "ds", "local_global": 0.2},
            "train": _train(holdout=0.0, eval_every=0, primary_ratio=0.3, fused=True),
        },
    ),
    "truth dinov3": (
        "truth float16",
        {
            "student": {
                "encoder": "dinov3_vits16",
                "weights": "inputs/weights/dinov3_vits16.safetensors",
                "encoder_options": {"blocks": [0, 1]},
                "decoder": "sdt_fast",
                "decoder_options": _DECODERS["sdt_fast"],
                "leave_out_frozen_encoder": True,
            },
            "loss": {"normalization": "global"},
            "train": _train(freeze_encoder=True),
        },
    ),
}

_NYU = "golden/eval_nyu"
NYU = {
    "root": f"{_NYU}/data/nyuv2/nyu_labeled_extracted.tar",
    "list": f"{_NYU}/data_split/nyu_depth/labeled/filename_list_test.txt",
}
SCORES: dict[str, Recipe] = {
    "student and teachers": {
        "run": {"out": "runs/select sdt_fast"},
        "teachers": [POCKET, ANALYTIC],
        "score": {"plane_prior": False},
        "benchmarks": [
            {"name": "scenes", "limit": 4},
            {"name": "motorcycle"},
            {"name": "pairs", "root": "inputs/pairs"},
            *({"name": "nyu", "alias": f"nyu-{how}", "protocol": how, **NYU} for how in ("clean", "marigold")),
        ],
    },
    "every kind": {
        "teachers": [
            _depth(kind, kind, 0.9)
            for kind in ("scale_depth", "metric_depth", "affine_depth", "scale_disparity", "metric_disparity")
        ],
        "labels": {"store": "own"},
        "score": {"student": False},
        "benchmarks": [
            {
                "name": "pairs", "alias": f"pairs-{how}", "alignment": how, "root": "inputs/pairs",
                "list": "inputs/pairs/scored.txt", "prior": "inputs/pairs/prior.txt",
            }
            for how in ("auto", "affine", "scale", "median")
        ],
    },
}  # fmt: skip
COMPARE: Recipe = {
    "images": [
        {"wheels": True, "limit": 2},
        {"scenes": 2, "size": 72},
        {"pairs": "inputs/pairs", "names": "inputs/pairs/scored.txt"},
    ],
    "teachers": [SMALL_POCKET, ANALYTIC, _depth("affine_depth", "painted"), _depth("scale_depth", "scaled", 0.6)],
    "compare": {"limit": 7, "side": 112, "student": False},
}


def labels_of(name: str) -> Recipe:
    """The images, crops, teachers and labels tables of one of LABELS, or of the online one."""
    return ONLINE if name == "online" else SA1B if name == "sa1b" else LABELS[name]


def labelling(name: str, *, root: str = "") -> Recipe:
    """A complete labelling recipe. root: of the labels folders; the run's own by default."""
    recipe = dict(labels_of(name))
    recipe["labels"] = recipe["labels"] | {"root": root or f"runs/{name}/labels"}
    return recipe | {"run": {"name": name, "out": f"runs/{name}", "device": "cpu"} | recipe.get("run", {})}


def training(name: str, *, out: str = "", root: str = "", **train: Any) -> Recipe:
    """A complete training recipe. out: another folder. root: of the labels. train: keys to change."""
    labels, tables = TRAININGS[name]
    recipe = labelling(labels, root=root) | tables
    recipe["run"] = recipe["run"] | {"name": name, "out": out or f"runs/{name}"}
    return recipe | {"train": tables["train"] | train}


def scoring(name: str) -> Recipe:
    """A complete scoring recipe."""
    recipe = SCORES[name]
    return recipe | {"run": {"name": name, "out": f"runs/{name}", "device": "cpu"} | recipe.get("run", {})}


def comparing() -> Recipe:
    """A complete recipe that compares its teachers."""
    return COMPARE | {"run": {"name": "compare", "out": "runs/compare", "device": "cpu"}}
