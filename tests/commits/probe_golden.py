"""The golden cases in both checkouts: HDN's loss, decoders, the encoder, teachers. Outputs are compared bit by bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe_inputs import weights_of
from probe_maths import with_gradient
from probe_names import one, part
from probe_record import Record
from torch import Tensor


def golden(record: Record, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The golden cases, as sections."""
    for name, take in {"hdn": _hdn, "students": _students, "teachers": _teachers}.items():
        yield f"golden {name}", partial(take, record, folder)


def _case(golden: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts = json.loads((golden / name / "case.json").read_text())
    with np.load(golden / name / "data.npz") as data:
        return facts, {key: torch.from_numpy(data[key].copy()) for key in data.files}


def _hdn(record: Record, golden: Path) -> None:
    hdn_loss, results = one("losses", "hdn_loss"), {}
    facts, data = _case(golden, "hdn_losses_small")
    for run in facts["runs"]:
        i = run["index"]
        pred, target, valid = (data[f"{n}{i}"][:, 0] for n in ("pred", "gt", "mask"))
        for name in run["values"]:
            if name == "ssimae":
                options: dict[str, Any] = {"level": 0}
            else:
                contexts, level, finest = re.fullmatch(r"(d[rps])(\d)(_finest)?", name).groups()  # type: ignore[union-attr]
                options = {"contexts": contexts, "level": int(level), "finest_only": bool(finest)}
            value, gradient = with_gradient(pred, lambda x, t=target, v=valid, m=options: hdn_loss(x, t, v, **m))
            results |= {f"{i} {name}.loss": value, f"{i} {name}.gradient": gradient}
    record.arrays("golden/hdn", results)


def _torch(weights: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in weights.items()}


def _students(record: Record, golden: Path) -> None:
    """Decoders and encoder on golden weights: outputs, and the gradient of a training step."""
    decoders = {name: part(f"students.decoders.{name}").Decoder for name in ("sdt", "dpt", "dav2")}
    results: dict[str, Tensor] = {}
    for case in ("sdt_head_f64_cls", "sdt_head_f256_nocls", "sdt_head_train_f64", "dpt_head_vits"):
        facts, data = _case(golden, case)
        kwargs = facts.get("make_head_kwargs") or facts["kwargs"]
        if case.startswith("sdt"):
            decoder = decoders["sdt"](
                kwargs["in_channels"], kwargs["fusion_channels"], kwargs.get("use_cls_token", True)
            )
        else:
            decoder = decoders["dpt"](
                kwargs["embed_dims"], kwargs["channels"], kwargs["post_process_channels"],
                readout="project" if kwargs["use_cls_token"] else "ignore",
                norm="batch" if kwargs.get("use_batchnorm") else "none",
            )  # fmt: skip
        decoder.load_released(_torch(weights_of(golden / case))).train("train" in case)
        maps = [data[f"spatial{i}"] for i in range(4)]
        features = [(m, data[f"cls{i}"]) for i, m in enumerate(maps)] if "cls0" in data else maps
        out = decoder(features)
        out.mean().backward()
        results[f"{case}.output"] = out
        results |= {f"{case}.{name}": p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    record.arrays("golden/decoders", results)
    encoder = part("students.encoder").Encoder
    facts, data = _case(golden, "anydepth_encoder_vits16")
    network = encoder("dinov3_vits16", weights="inputs/weights/dinov3_vits16.safetensors").eval()
    with torch.no_grad():
        outputs = {str(run["index"]): network(data[f"x{run['index']}"]) for run in facts["runs"]}
    flat = {f"{i}.{j}.{k}": x for i, taps in outputs.items() for j, tap in enumerate(taps) for k, x in enumerate(tap)}
    record.arrays("golden/encoder", flat)


def _photo(array: Tensor) -> Tensor:
    return array.permute(2, 0, 1)[None].float() / 255


def _calls(golden: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every teacher's golden inputs as calls: a name and a function that returns the map."""
    weights = Path("inputs/weights")
    _, data = _case(golden, "dav2_vits")

    def load(name: str, path: Path, **options: Any) -> Any:
        return part(f"teachers.{name}").Teacher.load(str(path), **options)

    image = _photo(data["image0"])
    yield (
        "dav2 raw",
        lambda: load("depth_anything_v2", weights / "dav2_vits.safetensors", resize="none").predict(data["x0"]),
    )
    yield (
        "dav2 photo",
        lambda: load("depth_anything_v2", weights / "dav2_vits.safetensors", native_size=112).predict(image),
    )
    _, more = _case(golden, "da3_mono_vits")
    for sky in ("keep", "far", "invalid"):
        yield (
            f"da3 {sky}",
            lambda s=sky: load("depth_anything_3", weights / "da3", resize="none", sky=s).predict(more["x0"][0]),
        )
    yield "da3 photo", lambda: load("depth_anything_3", weights / "da3", native_size=112).predict(image)
    for name, case, options in (
        ("marigold", "marigold_v11", {"steps": 2, "ensemble": 2, "seed": 3}),
        ("marigold", "marigold_v11", {"steps": 1, "ensemble": 1, "seed": 0, "resize": "none"}),
        ("genpercept", "genpercept_dpt", {"mode": "disparity"}),
        ("genpercept", "genpercept_dpt", {"mode": "depth", "timestep": 400}),
    ):
        small = image[..., :64, :96]
        yield (
            f"{name} {options}",
            lambda n=name, c=case, o=options, x=small: load(
                n, golden / c / "model", **({"native_size": 64} if "resize" not in o else {}), **o
            ).predict(x),
        )


def _teachers(record: Record, golden: Path) -> None:
    results: dict[str, Any] = {}
    for name, make in _calls(golden):
        depth = make()
        results |= {f"{name}.values": depth.values, f"{name}.valid": depth.valid, f"{name}.kind": str(depth.kind)}
    record.arrays("golden/teachers", results)
