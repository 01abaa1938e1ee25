"""DA-2K: which of two points is nearer, in photographs of eight kinds of scene (distill.eval.da2k has the rule).

Root: the folder that holds annotations.json, as published, or that file. Images lie where it says; without them, stored
predictions can still be scored, but their size is not checked. list_file: images to use, one per line. Groups: the
kinds of scene, whose plain mean is given beside the accuracy over all pairs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from distill.core.files import inside
from distill.data.pairs import read_names
from distill.data.photos import upright_size
from distill.eval.benchmarks import BenchmarkSample, Download, prediction_path
from distill.eval.benchmarks._files import Files
from distill.eval.da2k import PointPair, Points, read_annotations, scene
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(
    benchmark="da2k",
    truth="point pairs",
    mask="the annotated points",
    pooling="over all pairs of all images",
    task="order",
)
DOWNLOAD = Download(
    archive="DA-2K", manual="take it from https://huggingface.co/datasets/depth-anything/DA-2K, and unpack it"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The annotated images, in the order of the file."""
    if root is None:
        raise ValueError("the benchmark da2k needs a root: the folder that holds annotations.json")
    places = (Path(root, *inner) for inner in (("DA-2K", "DA-2K"), ("DA-2K",), ()))
    folder = next((path for path in places if (path / "annotations.json").is_file()), root)
    annotations = read_annotations(folder)
    folder = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    names = list(annotations) if list_file is None else _names(Path(list_file), annotations)
    return [
        BenchmarkSample(
            name,
            prediction_path(name),
            partial(_image, folder, name, names),
            partial(_no_depth, name),
            scene(name),
            mark=partial(_points, folder, name, tuple(annotations[name])),
        )
        for name in names
    ]


def _names(path: Path, annotations: dict[str, list[PointPair]]) -> list[str]:
    known = {name.removeprefix("./"): name for name in annotations}
    names = [known.get(name.removeprefix("./"), name) for name in read_names(path)]
    if unknown := [name for name in names if name not in annotations]:
        raise ValueError(f"{path}: {unknown[0]} is not in annotations.json")
    return names


def _image(folder: Path, name: str, names: list[str]) -> Tensor:
    if not inside(folder, name).is_file():
        missing = sum(not inside(folder, other).is_file() for other in names)
        raise FileNotFoundError(
            f"{folder}: {missing} of {len(names)} images are missing, such as {name}; unpack the data set again, "
            "or set list to a file that names the others, one per line"
        )
    return Files(folder).rgb(name)


def _no_depth(name: str) -> NoReturn:
    raise ValueError(f"{name} has point pairs and no depth")


def _points(folder: Path, name: str, pairs: tuple[PointPair, ...]) -> Points:
    path = inside(folder, name)
    if not path.is_file():
        return Points(pairs)
    return Points(pairs, upright_size(path.read_bytes())[:2])
