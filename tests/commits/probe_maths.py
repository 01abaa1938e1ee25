"""The parts without a command of their own: losses, crops, codecs, scenes, sampling."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from probe_names import call, one, part
from probe_record import Record
from torch import Tensor

NORMALIZATIONS = ("global", "hybrid", "local", "none")
# Options of L_Dis, and the normalizations that accept them.
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, NORMALIZATIONS),
    "trimmed": ({"trim_top": 0.1}, NORMALIZATIONS),
    "label_only": ({"label_only": True}, NORMALIZATIONS),
    "trimmed_label_only": ({"trim_top": 0.25, "label_only": True}, NORMALIZATIONS),
    "weighted": ({"weight": True}, NORMALIZATIONS),
    "hdn": ({"faithful": True}, NORMALIZATIONS),
    "hdn_dp": ({"faithful": True, "contexts": "dp"}, NORMALIZATIONS[:3]),
    "hdn_ds": ({"faithful": True, "contexts": "ds"}, NORMALIZATIONS[:3]),
}


def maths(record: Record) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that needs no files, as sections."""
    sections: dict[str, Callable[..., None]] = {
        "names": _names,
        "losses": _losses,
        "batched losses": _batched,
        "other losses": _other_losses,
        "crops": _crops,
        "kinds": _kinds,
        "codecs": _codecs,
        "scenes": _scenes,
        "sampling": _sampling,
        "rates": _rates,
        "augment": _augment,
        "metrics": _metrics,
    }
    for name, take in sections.items():
        yield name, partial(take, record)


def _maps(height: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, label, valid and weight, (6,H,W): plain, flat, with NaN, with ties, nowhere valid, few pixels."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    pred, noise, weight = torch.rand(3, 6, height, width, generator=generator, dtype=torch.float64)
    ramp = torch.linspace(0.1, 3.0, width).double().expand(6, height, width)
    target = ramp + 0.5 * noise
    valid = torch.rand(6, height, width, generator=generator) < 0.8
    target[1] = 2.0
    target[2, ::7, ::5] = torch.nan
    pred[3], target[3] = (pred[3] * 8).round() / 8, (target[3] * 4).round() / 4
    valid[4] = False
    valid[5] = False
    valid[5, 3, :5] = True  # the minimum for a context
    return pred.to(dtype), target.to(dtype), valid, weight.to(dtype)


def with_gradient(pred: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss (B,) and the gradient of its sum."""
    x = pred.clone().requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return value, torch.zeros_like(x) if gradient is None else gradient


def _names(record: Record) -> None:
    """The public names, which must exist in every layout."""
    losses = importlib.import_module("distill.losses")
    record.json("names", [callable(getattr(losses, n)) for n in ("distillation_loss", "gradient_loss", "hdn_loss")])


def _losses(record: Record) -> None:

    loss = one("losses", "distillation_loss")
    plain = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
    for size in ((37, 53), (96, 96), (120, 100)):
        for option, (options, normalizations) in OPTIONS.items():
            if option == "hdn_ds" and size[0] != size[1]:
                continue
            results: dict[str, Tensor] = {}
            for word, dtype in plain.items() if option == "plain" else [("f32", torch.float32), ("f64", torch.float64)]:
                pred, target, valid, weight = _maps(*size, dtype)
                arguments = options | ({"weight": weight} if "weight" in options else {})
                for name in normalizations:
                    value, gradient = with_gradient(
                        pred,
                        lambda x, t=target, v=valid, n=name, m=arguments: call(loss, x, t, v, n, **m),
                    )
                    results |= {f"{name}.{word}.loss": value, f"{name}.{word}.gradient": gradient}
            record.arrays(f"losses/{option} {size[0]}x{size[1]}", results)


def _batched(record: Record) -> None:
    """The accelerator's version of the loss, on the CPU."""
    batch_loss = one("batched", "batch_loss")
    pred, target, valid, weight = (x.flatten(1) for x in _maps(64, 48))
    usable = valid & torch.isfinite(target)
    results = {}
    for name, levels in {"global": (1,), "hybrid": (1, 2, 4), "local": (4,)}.items():
        for option, (trim, only, weighted) in {"plain": (0.0, False, 0), "all": (0.2, True, 1)}.items():
            loss, gradient, live = batch_loss(
                pred, target, usable, weight if weighted else None,
                levels=levels, trim_top=trim, label_only=only, want_gradient=True,
            )  # fmt: skip
            key = f"{name}.{option}"
            results |= {f"{key}.loss": loss, f"{key}.gradient": gradient, f"{key}.live": live}
    record.arrays("losses/batched", results)


def _other_losses(record: Record) -> None:
    names = ("gradient_loss", "anchor_loss", "hdn_loss", "feature_loss")
    gradient_loss, anchor_loss, hdn_loss, feature_loss = (one("losses", name) for name in names)
    found: dict[str, Tensor] = {}
    for size in ((37, 53), (96, 96)):
        pred, target, valid, _ = _maps(*size)

        def take(name: str, loss: Callable[[Tensor], Tensor], pred: Tensor = pred) -> None:
            found[f"{name}.loss"], found[f"{name}.gradient"] = with_gradient(pred, loss)

        for scales in (1, 4):
            for normalize in (True, False):
                more = {"scales": scales, "normalize": normalize}
                take(
                    f"gradient {size} {more}",
                    lambda x, t=target, v=valid, m=more: gradient_loss(x, t, v, **m),
                )
        take(f"anchor {size}", lambda x, t=target, v=valid: anchor_loss(x, t, v))
        for contexts in ("dr", "dp", "ds") if size[0] == size[1] else ("dr", "dp"):
            for level in (0, 1, 2, 3, 4):
                for finest in (False, True) if level else (False,):
                    more = {"contexts": contexts, "level": level, "finest_only": finest}
                    take(f"hdn {size} {more}", lambda x, t=target, v=valid, m=more: hdn_loss(x, t, v, **m))
    draw = torch.Generator().manual_seed(1)
    features, reference = torch.randn(2, 3, 16, 5, 7, generator=draw)
    reference = features + 0.5 * reference
    for margin in (0.85, 0.99):
        value = with_gradient(features, lambda x, m=margin: feature_loss(x, reference, margin=m))
        found[f"feature {margin}.loss"], found[f"feature {margin}.gradient"] = value
    record.arrays("losses/others", found)


# --- crops, kinds, codecs ---------------------------------------------------------------------------------------------


def _plan(plan: Callable[..., Any], height: int, width: int, given: dict[str, Any], **drawn: Any) -> Any:
    """A crop plan, whether its settings are keywords or a class."""
    if "settings" not in inspect.signature(plan).parameters:
        return call(plan, height, width, **given, **drawn)
    return plan(height, width, call(one("crop settings", "CropSettings"), **given), **drawn)


def _crops(record: Record) -> None:
    crops = part("crops")
    plans, sampled = [], {}
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 1000, 1300), dtype=np.uint8))
    for number in range(400):
        height, width = 700 + 37 * (number % 9), 650 + 53 * (number % 13)
        patches = ("grid", "random", "none")[number % 3]
        settings = {"size": (560, 140, 224)[number % 3], "min_side": 644, "patches": patches, "num_patches": 3}
        settings |= {"overlap": 0.125 + 0.1 * (number % 2), "patch_size": (0, 200)[number % 2], "small": "use"}
        plan = _plan(crops.plan, height, width, settings, key=f"sa_{number}", seed=number % 4, draw=number % 5)
        plans.append(dataclasses.asdict(plan))
        if number < 12:
            sampled[f"region{number}"] = crops.cut_region(image[:, :height, :width], plan)
            sampled[f"patches{number}"] = crops.cut_patches(image[:, :height, :width], plan)
            maps = torch.rand(1, 70, 70, generator=torch.Generator().manual_seed(number))
            if len(plan.patches):
                values, inside = crops.sample_boxes(maps, plan.boxes()[None], 40)
                sampled |= {f"values{number}": values, f"inside{number}": inside}
                blocks = crops.student_blocks(plan.boxes()[None], 70)
                sampled |= {f"blocks{number}": blocks[0], f"within{number}": blocks[1]}
    record.json("crops/400 plans", plans)
    record.arrays("crops/pixels", sampled)


def _kinds(record: Record) -> None:
    depth, align = part("depth"), part("align")
    pred, target, valid, _ = _maps(40, 60)
    results: dict[str, Tensor] = {}
    for kind in depth.Kind:
        for other in depth.Kind:
            try:
                converted = depth.DepthMap(target - 0.3, valid, kind).convert(other)
                results |= {f"{kind} to {other}": converted.values, f"{kind} to {other} valid": converted.valid}
            except depth.KindError:
                results[f"{kind} to {other}"] = torch.zeros(0)
    usable = valid & torch.isfinite(target)
    results["scale"], results["shift"] = align.fit_affine(pred, target, usable)
    record.arrays("kinds and alignment", results)


def _codecs(record: Record) -> None:
    codec = part("codec")
    rng = np.random.default_rng(5)
    maps = {
        "noise": rng.random((33, 47)) * 80,
        "ramp": np.linspace(1e-3, 1e3, 64 * 64).reshape(64, 64),
        "flat": np.full((8, 9), 3.25),
        "narrow": 1000 + rng.random((20, 20)) * 1e-3,
        "holes": np.where(rng.random((40, 40)) < 0.3, np.nan, rng.random((40, 40))),
        "nothing": np.full((6, 6), np.inf),
        "negative": rng.standard_normal((30, 31)),
    }
    for name in codec.CODECS:
        results: dict[str, Any] = {}
        for map_name, array in maps.items():
            values = torch.from_numpy(array).float()
            data, span = codec.encode_map(values, torch.from_numpy(rng.random(array.shape) < 0.9), codec=name)
            again, valid = codec.decode_map(data, span, codec=name)
            results |= {
                f"{map_name}.bytes": np.frombuffer(data, np.uint8),
                f"{map_name}.values": again,
                f"{map_name}.valid": valid,
            }
            results[f"{map_name}.span"] = [span["low"], span["high"], span["valid"]]
        record.arrays(f"codecs/{name}", results | {"bound": codec.CODECS[name].bound})


def _scenes(record: Record) -> None:
    scenes = part("scenes")
    results: dict[str, Any] = {}
    for number, kind in enumerate(scenes.KINDS):
        view = scenes.render(1_000_000 + number, size=(48, 64), kind=kind)
        results |= {f"{kind}.image": view.image, f"{kind}.depth": view.depth, f"{kind}.valid": view.valid}
    record.arrays("scenes/every kind", results)
    record.json("scenes/kinds of 2000 seeds", [scenes.kind_of(seed) for seed in range(2000)])


# --- sampling, rates, metrics -----------------------------------------------------------------------------------------


def _sampling(record: Record) -> None:
    sampling = part("sampling")
    shares = {"primary": 0.7, "assistant": 0.3}
    choose_teacher = one("label choice", "choose_teacher")
    drawn = [choose_teacher(shares, seed=7, step=step)[0] for step in range(20_000)]
    text = "".join(drawn)
    record.json(
        "sampling/teachers of 20000 steps", [text.count("p"), hashlib.sha256(text.encode()).hexdigest(), text[:99]]
    )
    keys = [f"sa_{number // 3}" for number in range(3000)]
    record.json("sampling/held out", [sampling.hold_out(keys, share)[1] for share in (0.0, 0.02, 0.2)])
    order = _order(sampling)(tuple(range(37)), 5)
    batches = [[(p.position, p.index) for p in order.batch(step, 8)] for step in range(30)]
    record.json("sampling/order", batches)


def _order(sampling: Any) -> Any:
    """The class of the sample order, found by its `batch` method, since its name changes."""
    return next(v for v in vars(sampling).values() if isinstance(v, type) and callable(getattr(v, "batch", None)))


def _rates(record: Record) -> None:
    factor, settings = one("schedule", "factor"), one("settings", "TrainSettings")
    rates = {
        name: [factor(step, settings(steps=60, batch_size=8, warmup_steps=warmup, schedule=name)) for step in range(60)]
        for name in ("cosine", "linear", "poly", "constant")
        for warmup in (0, 7)
    }
    record.json("rates/60 steps", rates)


def _augment(record: Record) -> None:
    augment, labels, depth = one("augment", "augment"), part("labels"), part("depth")
    draw = getattr(importlib.import_module(augment.__module__), "draw", None)  # older checkouts draw inside `augment`
    generator = torch.Generator().manual_seed(2)
    images, values = torch.rand(6, 3, 40, 40, generator=generator), torch.rand(6, 40, 40, generator=generator)
    local = torch.rand(12, 20, 20, generator=generator)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.3, 0.4, 0.8, 0.9]]]).expand(6, 2, 4).clone()
    kind = depth.Kind.AFFINE_DISPARITY
    batch_labels = labels.Labels(
        depth.DepthMap(values, values > 0.1, kind), depth.DepthMap(local, local > 0.1, kind), boxes
    )
    batch = labels.Batch(tuple("abcdef"), images, {"a": batch_labels})
    results: dict[str, Tensor] = {}
    for name, options in {
        "all": {"hflip": True, "colour": 0.3, "crop": 0.5},
        "flip": {"hflip": True, "colour": 0.0, "crop": 1.0},
        "crop": {"hflip": False, "colour": 0.0, "crop": 0.3},
    }.items():
        places: list[Any] = list(range(50, 56))
        if draw is None:
            out = call(augment, batch, places, seed=9, **options)
        else:
            draws = [call(draw, place, seed=9, rotation=0.0, **options) for place in places]
            out = call(augment, batch, draws, colour=options["colour"], crop=options["crop"])
        augmented = out.labels["a"]
        results |= {
            f"{name}.images": out.images,
            f"{name}.shared": augmented.shared.values,
            f"{name}.valid": augmented.shared.valid,
        }
        results |= {
            f"{name}.local": augmented.local.values,
            f"{name}.inside": augmented.local.valid,
            f"{name}.boxes": augmented.boxes,
        }
    record.arrays("augmentations", results)


def _metrics(record: Record) -> None:
    pred, target, valid, _ = _maps(60, 80)
    usable = valid & torch.isfinite(target)
    pred, target = pred + 0.2, torch.where(usable, target, 1.0)
    record.arrays("scores/metrics", part("eval.metrics").all_metrics(pred, target, usable))
    f1 = part("eval.boundary").boundary_f1
    record.arrays("scores/boundary", {"masked": f1(pred, target, usable), "published": f1(pred, target)})
