"""A student as a self-describing folder: model.safetensors, student.json, and a README.md for people.

No pickles. The folder is written to a temporary place, synced and renamed, so that a killed process leaves the old
student or the new one, never a part. A frozen encoder may be left out; the folder then names its file by hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill import students
from distill.core import files, hub
from distill.core.files import file_sha256
from distill.core.folders import LATENT, POCKET, pocket
from distill.core.home import home_expanded
from distill.core.plugins import allowed, is_path, origins
from distill.core.seal import KEY as SEAL
from distill.core.seal import is_broken, sealed
from distill.core.standins import fault_of_start
from distill.core.strictness import mismatches
from distill.core.wording import did_you_mean, first_line
from distill.students import Student
from distill.students.modelcard import canonical_rule, page_of
from distill.students.quantize import fits, may_shrink, pack, unpack
from distill.students.rounding import calibrated
from distill.students.skip_init import SkipInit
from distill.students.student import plain_state, unwrapped

VERSION = 1
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "student.json", "README.md"
EXPORTS = ("model.onnx", "model.pt2", "index.html", "config.json", "preprocessor_config.json")
"""Made from the weights (students.export, onnx_graph, to_transformers): a new save removes old ones."""

OF_A_RUN = Path("train", "student")
"""Where `distill train` leaves a run's student, below the run's folder."""


def save(
    student: Student,
    folder: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    calibration: Sequence[Tensor] = (),
    exclude_frozen_encoder: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write `student`, wrapped or not, to `folder`, replacing an older student; returns the folder. Dot-files are kept.

    card: plain values about where it comes from (name, licence, teachers, ...); also written as README.md.
    dtype: torch.float32, or torch.float16 for half the size; vectors (norms, biases, statistics) stay float32, and
    so does a tensor with a value that float16 cannot hold (above 65504).
    bits: 4 stores large matrices and kernels in four bits (students.quantize); the outputs then change a little.
    calibration: images (3,H,W), uint8 or in [0,1], on which the change by the four bits is minimised
    (students.rounding).
    exclude_frozen_encoder: write the decoder only, and the hash of the file that the encoder was loaded from.
    check: called with the complete temporary folder before it is renamed; it may add files, and an exception aborts
    the save.

    Raises ValueError if the encoder cannot be left out, FileExistsError if `folder` holds anything but a student,
    OSError if it cannot be written; the previous content is then unchanged.
    """
    folder, student = Path(folder), unwrapped(student)
    _check_place(folder)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{folder}: students are saved as float32 or float16, not {dtype!r}")
    if bits not in (None, 4):
        raise ValueError(f"{folder}: students are quantized to 4 bits or not at all, not to {bits}")
    encoder_file = _encoder_file(student, folder) if exclude_frozen_encoder else None
    tensors = {
        key: value.detach().to("cpu", dtype if may_shrink(value) and fits(value) else value.dtype).contiguous()
        for key, value in plain_state(student).items()
        if encoder_file is None or not key.startswith("encoder.")
    }
    if bits == 4:
        shapes = {key: value.shape for key, value in plain_state(student).items()}
        tensors = pack(tensors, shapes, calibrated=calibrated(student, calibration) if calibration else None)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    stored = "int4" if bits else str(dtype).removeprefix("torch.")
    text = _description(student, weights, stored=stored, encoder_file=encoder_file, card=card)
    contents = {WEIGHTS: weights, DESCRIPTION: text.encode()}
    if card:
        page = page_of(student, folder.name, card, bits=bits, num_bytes=len(weights), has_encoder=encoder_file is None)
        contents[CARD] = page.encode()
    _write(folder, contents, check)
    return folder


def _description(
    student: Student,
    weights: bytes,
    *,
    stored: str,
    encoder_file: dict[str, str] | None,
    card: Mapping[str, Any] | None,
) -> str:
    """student.json, with a checksum of itself; stored: the number format of matrices."""
    description = {
        "version": VERSION,
        **_spec(student),
        "native_size": student.native_size,
        "weights": {
            "sha256": hashlib.sha256(weights).hexdigest(),
            "dtype": stored,
        },
        "encoder_weights": encoder_file,
        "images": _images(student),
        "output": {"kind": str(student.kind), "larger_is": student.kind.larger_is, **_camera(student)},
        "card": dict(card or {}),
    }
    plain = json.loads(json.dumps(description))  # the checksum covers the description as it will be read
    return json.dumps(sealed(plain), indent=2, ensure_ascii=False) + "\n"


def _camera(student: Student) -> dict[str, str]:
    """The convention of a canonical camera, for readers outside this package."""
    rule = canonical_rule(student.canonical_focal) if student.canonical_focal else ""
    return {"camera": rule} if rule else {}


def _spec(student: Student) -> dict[str, Any]:
    """What rebuilds the student. A decoder file is stored by name and hash: its path is only valid on this machine."""
    spec, decoder = student.spec, student.spec["decoder"]
    if not (hashes := origins(decoder)):
        return {"spec": spec}
    name = Path(decoder).name if is_path(decoder) else decoder
    return {"spec": {**spec, "decoder": name}, "plugins": {name: hashes[decoder]}}


def load(
    folder: str | Path, *, device: torch.device | str = "cpu", encoder_weights: str | Path | None = None
) -> Student:
    """The student in `folder`, in float32 and evaluation mode, with the outputs of the saved one.

    encoder_weights: the encoder's own file, for a folder without the encoder. A user's decoder file is not executed
    unless core.plugins.allow, or a recipe, has named a file of that name.
    Raises OSError for a missing folder or file, ValueError or LookupError for one that does not match, naming the file.
    """
    folder = Path(folder)
    description = describe(folder)
    weights_path, needed = folder / WEIGHTS, description["encoder_weights"]
    spec = dict(description["spec"])
    options = dict(spec.get("encoder_options") or {})
    if "weights" in options:
        raise ValueError(f"{folder / DESCRIPTION}: a student's description may not name an encoder file to open")
    if needed is not None:
        options["weights"] = _needed_file(folder, needed, encoder_weights)
    elif encoder_weights is not None:
        raise ValueError(f"{weights_path}: holds its own encoder; leave --encoder-weights (encoder_weights=) out")
    try:
        decoder = allowed(spec["decoder"]) if is_path(spec["decoder"]) else spec["decoder"]
        with SkipInit():
            student = students.build(**(spec | {"encoder_options": options, "decoder": decoder}))
    except LookupError as error:
        raise LookupError(f"{folder / DESCRIPTION}: {error}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder / DESCRIPTION}: {first_line(error)}") from error

    state = _read_weights(weights_path, description["weights"]["sha256"])
    tensors = {key: v for key, v in student.state_dict().items() if needed is None or not key.startswith("encoder.")}
    state = unpack(state, tensors, weights_path)
    if faults := mismatches(state, tensors):
        raise ValueError(f"{weights_path}: not the weights of this student: it {'; it '.join(faults)}")
    student.load_state_dict(state, strict=False)
    return student.to(device).eval()


def from_pretrained(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    encoder_weights: str | Path | None = None,
) -> Student:
    """The student called `name` (see `fetch`), in float32 and evaluation mode; encoder_weights: see `load`."""
    return load(fetch(name, revision=revision), device=device, encoder_weights=encoder_weights)


def fetch(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a student: "pocket" (the built-in one), a folder (see `located`), or OWNER/NAME on the hub.

    A hub id is downloaded once, by huggingface_hub, where no such folder exists; revision: its branch, tag or commit.
    Raises FileNotFoundError or OSError in one line if there is none, or no network.
    """
    if name == POCKET:
        return pocket()
    folder = located(name)
    if folder.exists() or isinstance(name, Path):
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(
            f'{name}: no such folder; give a student\'s folder, "{POCKET}", or OWNER/NAME on the hub'
        )
    try:
        return hub.download(name, files=[WEIGHTS, DESCRIPTION, CARD], revision=revision)
    except hub.HubError as error:
        near = did_you_mean(name, map(str, folder.parent.glob("*")))
        raise OSError(f"{name}: no such folder here, and {error}{near}") from error


def located(folder: str | Path) -> Path:
    """The student's folder in a run's folder, in its train/ or in one of its checkpoints; else `folder` itself."""
    folder = home_expanded(folder)
    if (folder / DESCRIPTION).is_file():
        return folder
    return next((inner for inner in (folder / OF_A_RUN, folder / OF_A_RUN.name) if inner.is_dir()), folder)


def push_to_hub(
    student: Student,
    repository: str,
    *,
    card: Mapping[str, Any] | None = None,
    private: bool = False,
    message: str = "",
) -> str:
    """Upload `student` as OWNER/NAME (core.hub.upload); returns the commit's URL. Raises OSError in one line."""
    with tempfile.TemporaryDirectory() as folder:
        name = repository.rpartition("/")[2]
        saved = save(student, Path(folder, name), card={"name": name, **(card or {})})
        return hub.upload(saved, repository, private=private, message=message)


def load_decoder(student: Student, folder: str | Path) -> None:
    """Load the decoder of the student in `folder` into `student`, strictly; ValueError names a mismatch."""
    folder = Path(folder)
    description = describe(folder)
    state = _read_weights(folder / WEIGHTS, description["weights"]["sha256"])
    expected = {f"decoder.{key}": value for key, value in student.decoder.state_dict().items()}
    state = {key: value for key, value in state.items() if key.startswith("decoder.")}
    state = unpack(state, expected, folder / WEIGHTS)
    if faults := mismatches(state, expected):
        raise ValueError(f"{folder}: its decoder is not the one asked for: it {'; it '.join(faults)}")
    student.decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in state.items()})


def describe(folder: str | Path) -> dict[str, Any]:
    """The content of student.json; does not read the weights. Raises OSError or ValueError naming the file."""
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not folder.is_dir():
        old = files.backup_name(folder)
        hint = f"; a save was interrupted, {old} is the student before it: rename it back" if old.is_dir() else ""
        raise NotADirectoryError(f"{folder}: a student is a folder with {DESCRIPTION} and {WEIGHTS}{hint}")
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            advice = "; it is a latent network: --teacher NAME --weights FOLDER" * (folder / LATENT).is_file()
            if (folder / "recipe.toml").is_file():
                advice = "; it is a run that has not trained one yet: distill train RECIPE"
            raise FileNotFoundError(f"{folder / name}: missing, so {folder} is not a student{advice}")
    try:
        description = json.loads(files.decoded(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    version = description.get("version") if isinstance(description, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path}: not a student's description: it has no version")
    if version > VERSION:
        raise ValueError(f"{path}: written in format {version}, newer than {VERSION}; update this package to read it")
    if is_broken(description):
        raise ValueError(
            f"{path}: does not agree with its own checksum: it is damaged, copy it again; or it was edited, remove its "
            f'line "{SEAL}"'
        )
    if faults := _description_faults(description):
        raise ValueError(f"{path}: not a student's description: {'; '.join(faults)}")
    return {key: value for key, value in description.items() if key != SEAL}


_KEYS = {
    "spec": "a table",
    "spec.encoder": "text",
    "spec.encoder_options": "a table or null",
    "spec.decoder": "text",
    "spec.decoder_options": "a table or null",
    "spec.native_size": "a number of pixels or null",
    "spec.max_depth": "a number of metres or null",
    "spec.canonical_focal": "a focal length or null",
    "native_size": "a number of pixels or null",
    "weights": "a table",
    "weights.sha256": "text",
    "encoder_weights": "a table or null",
    "encoder_weights.name": "text",
    "encoder_weights.sha256": "text",
    "output": "a table",
    "output.kind": "text",
    "output.larger_is": "text",
    "card": "a table",
}
_FITS: dict[str, Callable[[Any], bool]] = {
    "a table": lambda value: isinstance(value, dict),
    "a table or null": lambda value: value is None or isinstance(value, dict),
    "text": lambda value: isinstance(value, str),
    "a number of metres or null": lambda value: value is None or (type(value) in (int, float) and value > 0),
    "a focal length or null": lambda value: value is None or (type(value) in (int, float) and value > 0),
    "a number of pixels or null": lambda value: value is None or (type(value) is int and value > 0),
}


def _description_faults(description: Mapping[str, Any]) -> list[str]:
    """Faults of the keys that readers rely on: missing, or of another type."""
    faults = [] if "encoder_weights" in description else ["encoder_weights is missing"]
    for key, kind in _KEYS.items():
        table, _, name = key.rpartition(".")
        inside = description.get(table) if table else description
        if not isinstance(inside, Mapping):
            continue  # reported for the table itself
        if name not in inside and not kind.endswith("null"):
            faults.append(f"{key} is missing")
        elif not _FITS[kind](inside.get(name)):
            faults.append(f"{key} must be {kind}, not {inside[name]!r}")
    return faults


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card passed to `save`, or an empty one."""
    return dict(describe(folder)["card"])


def _images(student: Student) -> dict[str, Any]:
    """How an image becomes the network's input, for readers outside this package."""
    encoder = student.encoder
    return {
        "order": "RGB in [0, 1], then (x - mean) / std",
        "resize": "short side to native_size, aspect kept, each side the nearest multiple; bilinear, antialiased",
        "multiple": encoder.patch_size,
        "padding": "zeros after normalisation up to the multiple, the smaller half left and top; cut off the output",
    }


def _encoder_file(student: Student, folder: Path) -> dict[str, str]:
    encoder = student.encoder
    if not encoder.frozen:
        raise ValueError(f"{folder}: the encoder is not frozen, so it cannot be left out; save it too")
    if encoder.weights_sha256 is None or encoder.weights_name is None:
        raise ValueError(f"{folder}: the encoder did not come from a local weights file, so it cannot be left out")
    if not encoder.is_as_read():
        raise ValueError(f"{folder}: the encoder is not what {encoder.weights_name} holds any more; save it too")
    return {"name": encoder.weights_name, "sha256": encoder.weights_sha256}


def _needed_file(folder: Path, needed: Mapping[str, str], given: str | Path | None) -> Path:
    expected = f"{needed['name']} (sha256 {needed['sha256'][:12]}...)"
    if given is None:
        raise ValueError(
            f"{folder}: its frozen encoder was left out; give --encoder-weights (encoder_weights=), the file {expected}"
        )
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} needs the encoder weights {expected}")
    if (digest := file_sha256(path)) != needed["sha256"]:
        raise ValueError(f"{path}: sha256 {digest[:12]}... is not the encoder that {folder} was trained on: {expected}")
    return path


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    content = path.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        if reason := fault_of_start(path):
            raise ValueError(f"{path} {reason}")
        raise ValueError(
            f"{path}: sha256 {digest[:12]}... is not {sha256[:12]}..., which {DESCRIPTION} names; "
            "the file is damaged or from another student"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def _check_place(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; a student needs a folder")
    known = {WEIGHTS, DESCRIPTION, CARD, *EXPORTS, *(p.name for p in _dot_files(folder))}
    if (folder / "config.json").is_file():  # written by to_transformers, with its code
        known |= {path.name for path in folder.glob("*.py")}
    others = sorted(p.name for p in folder.iterdir() if p.name not in known)
    if others:
        raise FileExistsError(f"{folder}: holds {others[0]}; a student is only saved to a folder of its own")


def _dot_files(folder: Path) -> list[Path]:
    """Hidden files such as .DS_Store; a hidden folder (.git) means that `folder` is not a student's own."""
    return [path for path in folder.iterdir() if path.name.startswith(".") and path.is_file()]


def _write(folder: Path, contents: Mapping[str, bytes], check: Callable[[Path], object] | None) -> None:
    """Write `contents` as `folder` atomically; existing dot-files are copied."""
    leftover_names = {path.name for name in EXPORTS for path in files.leftovers(folder / name)}
    with files.writing_folder(folder) as new:
        for name, content in contents.items():
            (new / name).write_bytes(content)
        if check is not None:
            check(new)
        for path in _dot_files(folder) if folder.exists() else []:
            if path.name not in leftover_names:
                shutil.copy2(path, new)
