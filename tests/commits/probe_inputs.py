"""The inputs of both checkouts: photographs, good and bad; tars, whole and damaged; pairs with depth; golden weights.

Made once, by numpy and Pillow only, without code of either checkout.
"""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import safetensors.numpy
from PIL import Image


def make(folder: Path, golden: Path) -> None:
    """Writes all inputs into `folder`."""
    folder.mkdir(parents=True)
    _photos(folder / "photos")
    _tars(folder / "tars")
    _pairs(folder / "pairs")
    _video(folder / "clip.mp4")
    _golden(folder, golden)


def _picture(seed: int, width: int = 150, height: int = 120) -> Image.Image:
    """Smooth colours with a few hard edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        pixels[top : top + rng.integers(8, 60), left : left + rng.integers(8, 60)] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def _jpeg(image: Image.Image, **more: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92, **more)
    return data.getvalue()


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _strange() -> dict[str, bytes]:
    """Files that are not a plain RGB photograph, good ones first."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    alpha = _picture(2).convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.arange(150, dtype=np.uint8), (120, 1))))
    deep = np.random.default_rng(3).integers(0, 65535, (110, 130)).astype(np.uint16)
    return {
        "grey.jpg": _jpeg(_picture(1).convert("L")),
        "alpha.png": _png(alpha),
        "alpha_named.jpg": _png(alpha),
        "deep.png": _png(Image.fromarray(deep)),
        "rotated.jpg": _jpeg(_picture(4, 180, 100), exif=exif),
        "cmyk.jpg": _jpeg(_picture(5).convert("CMYK")),
        "palette.png": _png(_picture(6).convert("P")),
        "wide.jpg": _jpeg(_picture(7, 400, 90)),
        "small.jpg": _jpeg(_picture(8, 40, 30)),
        "cut.jpg": _jpeg(_picture(9))[:900],
        "empty.jpg": b"",
        "page.jpg": b"<html><body>404</body></html>",
        "notes.txt": b"not an image",
    }


def _photos(folder: Path) -> None:
    for name, data in _strange().items():
        path = folder / ("inside" if name.startswith("a") else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _tars(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "sa_000000.tar", "w") as tar:
        for seed in range(100, 107):
            _add(tar, f"./sa_{seed}.jpg", _jpeg(_picture(seed, 150 + seed % 40)))
            _add(tar, f"./sa_{seed}.json", b"{}")
    with tarfile.open(folder / "sa_000001.tar", "w") as tar:
        for name, data in _strange().items():
            _add(tar, f"./{name}", data)
        for seed in (200, 201, 200):
            _add(tar, f"./sa_{seed}.jpg", _jpeg(_picture(seed))[: 700 if seed == 201 else None])
        _add(tar, "../../escape.jpg", _jpeg(_picture(203)))
        _add(tar, "/absolute.jpg", _jpeg(_picture(204)))
        link = tarfile.TarInfo("./link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "grey.jpg"
        tar.addfile(link)
    whole = (folder / "sa_000000.tar").read_bytes()
    (folder / "sa_000002_cut.tar").write_bytes(whole[: len(whole) * 3 // 5])
    broken = bytearray(whole)
    second = 512 + -(-len(_jpeg(_picture(100, 150 + 100 % 40))) // 512) * 512 + 1024  # the header of the third member
    broken[second : second + 512] = b"\xff" * 512
    (folder / "sa_000003_broken.tar").write_bytes(broken)


def _depth(seed: int, width: int, height: int) -> np.ndarray:
    """Metres, 1 to 9, with steps."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.random((4, 5), dtype=np.float32) * 6 + 1.5)
    depth = np.array(small.resize((width, height), Image.Resampling.BICUBIC)).clip(1, 9)
    depth[height // 3 :, width // 2 : width // 2 + 20] = 1.0 + rng.random()
    return depth.astype(np.float64)


def _pairs(folder: Path) -> None:
    """Eight pairs: metres, millimetres, unknown scale, disparity, stereo, npy; and one that is too small."""
    folder.mkdir()
    rows = ["name\trgb\tdepth\tkind\tscale_to_metres\tinvalid\tdataset"]
    for number in range(8):
        name, (width, height) = f"pair_{number}", (72, 60) if number == 6 else (140, 110)
        _picture(300 + number, width, height).save(folder / f"{name}.png")
        depth = _depth(number, width, height)
        holes = np.random.default_rng(number).random(depth.shape) < 0.05
        file = f"{name}_depth.png"
        stored, kind, scale, invalid = depth * 1000, "depth", "0.001", "0"
        if number == 2:
            scale = "unknown"
        elif number == 3:
            stored, kind, scale = 20000 / depth, "disparity", "0.01"
        elif number == 4:
            stored, kind, scale, invalid = 5000 / depth, "disparity", "Z[m]=1000*5.0/(disp+3.5)", "0 and 65535"
        elif number == 7:
            stored, kind, scale = 20000 / depth, "disparity", "by eye"
        if number == 5:
            file, scale = f"{name}_depth.npy", "1"
            np.save(folder / file, np.where(holes, np.nan, depth).astype(np.float32))
        else:
            code = 65535 if number == 4 else 0
            Image.fromarray(np.where(holes, code, stored.round()).astype(np.uint16)).save(folder / file)
        rows.append(f"{name}\t{name}.png\t{file}\t{kind}\t{scale}\t{invalid}\tset{number % 2}")
    (folder / "INDEX.tsv").write_text("\n".join(rows) + "\n")
    (folder / "prior.txt").write_text("pair_0\npair_1\n")
    (folder / "scored.txt").write_text("pair_2\npair_3\npair_4\npair_5\n")


def _video(path: Path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (96, 80))
    for number in range(4):
        writer.write(np.array(_picture(400 + number // 2, 96, 80))[..., ::-1].copy())
    writer.release()


# --- what golden cases need -------------------------------------------------------------------------------------------


def weights_of(case: Path) -> dict[str, np.ndarray]:
    """A golden case's synthetic weights, by the rule next to the cases (weights_rule.py)."""
    rule = runpy.run_path(str(case.parent / "weights_rule.py"))
    facts = json.loads((case / "case.json").read_text())
    seed = facts["seed"] if isinstance(facts["seed"], int) else facts["runs"][0]["seed"]
    state: dict[str, np.ndarray] = rule["synth_state"]({k: tuple(v[0]) for k, v in facts["state_dict"].items()}, seed)
    return state


def _golden(folder: Path, golden: Path) -> None:
    """Weights of teachers and encoders as files, and stored predictions to score."""
    weights = folder / "weights"
    (weights / "da3").mkdir(parents=True)
    mono = golden / "da3_mono_vits"
    named = {f"model.{key}": value for key, value in weights_of(mono).items()}
    safetensors.numpy.save_file(named, weights / "da3" / "model.safetensors")
    config = json.loads((mono / "case.json").read_text())["config"]
    (weights / "da3" / "config.json").write_text(json.dumps({"model_name": "da3_mono_vits", "config": config}))
    safetensors.numpy.save_file(weights_of(golden / "dav2_vits"), weights / "dav2_vits.safetensors")
    whole = weights_of(golden / "anydepth_sdt_vits")
    encoder = {k.removeprefix("0.encoder.backbone."): v for k, v in whole.items() if k.startswith("0.encoder.")}
    safetensors.numpy.save_file(encoder, weights / "dinov3_vits16.safetensors")
    for case in sorted(golden.glob("eval_*")):
        _predictions(case, folder / "predictions" / case.name)
    with np.load(golden / "da2k" / "data.npz") as maps:
        for name in json.loads((golden / "da2k" / "annotations.json").read_text()):
            path = folder / "predictions" / "da2k" / name
            path = path.with_name(f"pred_{path.stem}.npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, maps[f"disparity.{name}"])


def _predictions(case: Path, out: Path) -> None:
    """Writes a golden evaluation's predictions, stored as 16-bit pictures, as .npy by kind."""
    facts = json.loads((case / "case.json").read_text())
    if case.name in ("eval_metrics", "eval_eth3d"):  # no images; 24 megapixels each
        return
    for run, expected in facts["runs"].items():
        source = case / "pred_u16" / expected["pred_kind"]
        for png in sorted(source.rglob("*.png")):
            values = np.asarray(Image.open(png)).astype(np.float32) / np.float32(65535)
            path = out / run / png.relative_to(source).with_suffix(".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values * np.float32(expected["prediction_scale"]))
