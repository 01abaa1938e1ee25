"""Weight files: one reader for teachers, students and encoders, which unwraps what trainers put around the tensors.

The format is detected by the first bytes. Torch files are read with weights_only=True; plain records beside the tensors
(argparse.Namespace, numpy scalars, configurations) are read as empty stand-ins, so that none of their code is ever
imported or run, and any other pickled object is refused by name. Of several tables of tensors (raw and averaged
weights, teacher and student) one is chosen, by a fixed rule that is logged, or by `weights_key`.

The worst failure is silent: names that do not match and weights that stay random. So a prefix is only removed if a name
that the network must have (an anchor) follows it; the caller then checks every name.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from distill.core import allocations, records, standins
from distill.core.files import decoded
from distill.core.wording import first_line, shortened

# This module is also imported to read teachers' names, without waiting for torch.
if TYPE_CHECKING:
    from torch import Tensor

INDEX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_log = logging.getLogger(__name__)
_READ_ERRORS = (
    *(safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError),
    *(AttributeError, TypeError, MemoryError),
)


class WeightsMissingError(FileNotFoundError):
    """The weights are missing; the message says which and how to get them."""


class WeightsMismatchError(ValueError):
    """The weights do not fit the network or are unreadable; the message names the file and the first keys."""


def find_weights(path: Path, names: Iterable[str]) -> Path:
    """Return `path` itself if it is a file, else the file in that folder that the first matching one of `names` finds.

    names: patterns. Sharded weights are returned as their index (NAME.index.json). Raises WeightsMissingError if
    nothing is found or a shard is missing, WeightsMismatchError if there are several files or the file is no weights
    file: a git-lfs pointer, a web page.
    """
    names = list(names)
    matching = [path] if path.is_file() else next(filter(None, (_matching(path, name) for name in names)), [])
    if not matching:
        raise WeightsMissingError(
            f"{path} holds none of {', '.join(names)}: give the weights file itself, or complete the folder"
            + _below(path)
            + standins.remedy_for_shards(path)
        )
    if len(matching) > 1:
        if all(_SHARD.search(file.name) for file in matching):
            raise WeightsMissingError(f"{path} holds weights in shards without their index ({INDEX}): download it too")
        raise WeightsMismatchError(
            f"{path} holds {', '.join(file.name for file in matching[:4])}: give the path of one of them"
        )
    if matching[0].name.endswith(".json"):
        shards(matching[0])
        return matching[0]
    if not matching[0].exists():
        raise WeightsMissingError(f"{matching[0]} is a link to nothing, as of a half emptied cache: download it again")
    if reason := standins.fault_of_start(matching[0]):
        raise WeightsMismatchError(f"{matching[0]} {reason}")
    return matching[0]


def _below(folder: Path) -> str:
    """List files in a folder and its subfolders that may be weights: `; there is checkpoint-500/model.safetensors`."""
    files = [file for depth in ("*", "*/*") for file in sorted(folder.glob(depth)) if _LIKE_WEIGHTS.search(file.name)]
    candidates = [file.relative_to(folder).as_posix() for file in files if not _BESIDE_WEIGHTS.fullmatch(file.name)]
    return f"; there is {shortened(candidates)}" if candidates else ""


_LIKE_WEIGHTS = re.compile(r"\.(safetensors|pth|pt|ckpt|bin|pkl|tar|distcp|msgpack|h5|onnx|gguf)$", re.IGNORECASE)
# Files that trainers and systems put beside weights, with the same suffixes.
_BESIDE_WEIGHTS = re.compile(r"\..*|(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.\w+")


def _matching(folder: Path, name: str) -> list[Path]:
    """The files that match a pattern; for shards, only their index."""
    files = sorted(file for file in folder.glob(name) if not _BESIDE_WEIGHTS.fullmatch(file.name))
    if files and not all(_SHARD.search(file.name) for file in files):
        return [file for file in files if not _SHARD.search(file.name)]
    variant = name.replace(".fp16.safetensors", f".safetensors{INDEX[:-5]}.fp16.json")
    return sorted(folder.glob(f"{name}{INDEX}")) or (sorted(folder.glob(variant)) if variant != name else []) or files


def shards(index: Path) -> dict[str, Path]:
    """Read an index: tensor name -> the file that holds it; raises WeightsMissingError if one of them is missing."""
    try:
        table = json.loads(decoded(index.read_bytes()))["weight_map"]
        files = {str(name): index.parent / str(file) for name, file in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsMismatchError(f"{index} is not an index of weights ({error!r}): download it again") from error
    outside = [str(file_path) for file_path in files.values() if file_path.parent != index.parent]
    if outside:
        raise WeightsMismatchError(f"{index} names files of other folders ({outside[0]})")
    if absent := sorted({file_path.name for file_path in files.values() if not file_path.is_file()}):
        raise WeightsMissingError(f"{index.parent} lacks {', '.join(absent[:3])}, which {index.name} names")
    return files


ANY = ("model.safetensors", "*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin")
"""Patterns for a folder that may hold weights in any format."""


def read_state(path: Path, *, weights_key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or torch file, or of an index of shards, on the CPU.

    Wrappers are removed: {"model": ...}, {"state_dict": ...}, {"teacher": ...}, {"ema": {"module": ...}}, and the name
    segments that DDP, FSDP and torch.compile add. Of several tables, raw weights are preferred to averaged ones and a
    teacher to a student, and the choice is logged; weights_key ("model_ema", or "model_ema." of a flat table) selects
    another. Raises FileNotFoundError, WeightsMissingError, or WeightsMismatchError for what cannot be read.
    """
    if not path.is_file():
        raise WeightsMissingError(f"{path}: no such weights file")
    index = path.with_name(_SHARD.sub(".", path.name) + INDEX)
    if path.name.endswith(".json") or (_SHARD.search(path.name) and index.is_file()):
        index = path if path.name.endswith(".json") else index
        shard_files = shards(index)
        state = {key: tensor for file in sorted(set(shard_files.values())) for key, tensor in _read(file).items()}
        if missing := sorted(shard_files.keys() - state.keys()):
            raise WeightsMismatchError(f"{index} names {missing[0]}, which no shard holds: download them again")
        return _plain_names(state, path)
    nested = _read(path)
    tables = _tables_of(nested)
    if not tables:
        content = f", but {', '.join(map(str, list(nested)[:5]))}" if isinstance(nested, Mapping) and nested else ""
        content += f": a shard of DeepSpeed's: {standins.ZERO}" if path.name.endswith("_optim_states.pt") else ""
        raise WeightsMismatchError(f"{path} holds no table of named tensors{content}")
    return _plain_names(_choose(tables, path, weights_key), path)


def mentions(path: Path, *words: str) -> bool:
    """Whether all `words` occur in the pickle of a torch file (a zip), which lacks only the tensors' values.

    Not in one that cannot be opened, whose fault `read_state` describes.
    """
    if not zipfile.is_zipfile(path) or standins.fault_of_list(path):
        return False
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    return any(all(word.encode() in data for word in words) for data in pickles)


def read_described(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a torch file, and the table of plain values that it stores under `key`.

    Raises as `read_state` does, and WeightsMismatchError if there is no such table.
    """
    if not path.is_file():
        raise WeightsMissingError(f"{path}: no such weights file")
    nested = _read(path)
    described = nested.get(key) if isinstance(nested, dict) else None
    if not isinstance(described, dict):
        raise WeightsMismatchError(f"{path} has no {key}, which says what network its tensors are of")
    tables = _tables_of({name: value for name, value in nested.items() if name != key})
    if not tables:
        raise WeightsMismatchError(f"{path} holds no table of named tensors")
    return _plain_names(_choose(tables, path, None), path), described


def _read(path: Path) -> Any:
    import safetensors.torch
    import torch

    if reason := standins.fault_of_start(path) or standins.fault_of_zip(path):
        raise WeightsMismatchError(f"{path} {reason}")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        zipped = head[:2] == b"PK"
        if (path.suffix == ".safetensors" and not zipped) or (head[8:9] == b"{" and not zipped):
            if reason := standins.fault_of_count(path):
                raise WeightsMismatchError(f"{path} {reason}")
            return safetensors.torch.load_file(path)
        if reason := allocations.fault(path):
            raise WeightsMismatchError(f"{path} {reason}")
        with torch.serialization.safe_globals(records.stand_ins(path)):
            with path.open("rb") as file:  # opened, because torch would infer a format from a .safetensors name
                return torch.load(file, map_location="cpu", weights_only=True)
    except WeightsMismatchError:
        raise
    except _READ_ERRORS as error:
        reason = first_line(error, most=160)
        if isinstance(error, pickle.UnpicklingError):  # torch's own message recommends unsafe loading
            global_name = re.search(r"GLOBAL (\S+)", str(error))
            content = f"a pickled {global_name[1]}" if global_name else "more than tensors in it"
            content = "another protocol of pickle than torch.save's own" if "operand" in str(error) else content
            reason = f"{content}, or not a torch file; save its state_dict() alone"
        if excess := standins.fault_of_extra_bytes(path):
            raise WeightsMismatchError(f"{path} {excess}") from error
        if any(words in reason for words in _CUT):
            raise WeightsMismatchError(f"{path} is cut short: download or copy it again") from error
        raise WeightsMismatchError(f"{path} cannot be read as weights (cut short, or not tensors): {reason}") from error


_CUT = ("central directory", "not fully covered", "MetadataIncompleteBuffer", "Ran out of input")
"""Parts of the messages by which the readers of torch's and safetensors' files report a truncated file."""


_ASIDE = re.compile(
    r"optim|sched|scaler|rng|random|callback|loop|hyper|hparam|arg|config|cfg|amp|grad|loss|metric|buffer"
)
_RAW = (
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "generator",
    "teacher",
)
_AVERAGED = re.compile(r"(^|[._])(ema|ema\w*|\w*_ema|swa\w*|averag\w*|shadow\w*)($|[._])")


def _tables_of(nested: Any) -> dict[str, dict[str, Tensor]]:
    """The tables of named tensors by dotted path; if there are none, tables of NumPy arrays alone."""
    return dict(_tables(nested)) or dict(_tables(nested, arrays=True))


def _tables(nested: Any, name: str = "", *, arrays: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every table of named tensors in nested mappings with its dotted path, except those of optimizers.

    NumPy arrays beside tensors count as tensors; arrays: also where there is no tensor beside them.
    """
    import numpy as np
    import torch
    from torch import Tensor

    if not isinstance(nested, Mapping) or name.count(".") > 3:
        return
    inner = [
        table
        for key, value in nested.items()
        if isinstance(key, str) and isinstance(value, Mapping) and not _ASIDE.search(key.lower())
        for table in _tables(value, f"{name}.{key}".lstrip("."), arrays=arrays)
    ]
    tensors = {key: value for key, value in nested.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors or arrays:
        numpy_arrays = {
            key: value for key, value in nested.items() if isinstance(key, str) and isinstance(value, np.ndarray)
        }
        tensors |= {
            key: torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
            for key, value in numpy_arrays.items()
            if value.dtype.kind in "fiub"
        }
    if tensors and len(tensors) >= max((len(table) for _, table in inner), default=0):
        yield name, tensors
    else:
        yield from inner


def _rank(name: str) -> tuple[bool, int, int]:
    """Sort key of tables: raw before averaged, then by the usual names, then the shortest."""
    parts = name.strip(".").split(".")
    position = next((i for i, raw in enumerate(_RAW) if raw in parts), len(_RAW) + ("student" in parts))
    return bool(_AVERAGED.search(name)), 0 if not name else position, len(name)


def _choose(tables: Mapping[str, dict[str, Tensor]], path: Path, key: str | None) -> dict[str, Tensor]:
    if key is not None:
        stripped = key.strip(".")
        matches = [n for n in tables if n == stripped] or [n for n in tables if f".{n}.".find(f".{stripped}.") >= 0]
        if len(matches) == 1:
            return tables[matches[0]]
        entries = [(_plain_name(k), v) for t in tables.values() for k, v in t.items()]
        flat = {k[len(stripped) + 1 :]: v for k, v in entries if k.startswith(f"{stripped}.")}
        if flat:
            return flat
        raise WeightsMismatchError(f"{path} has no weights_key {key!r}; it holds {', '.join(tables) or 'one table'}")
    return tables[_taken(tables, path)[0]]


def _taken(names: Iterable[str], where: str | Path) -> tuple[str, list[str]]:
    """Of several tables or prefixes the one to take, and the others, which are logged; refuses equally good ones."""
    first, *others = sorted(names, key=_rank)
    if others and _rank(first)[:2] == _rank(others[0])[:2]:
        raise WeightsMismatchError(f"{where} holds {', '.join(names)}: give one as weights_key")
    if others:
        _log.warning('%s: took "%s"; weights_key takes another of: %s', where, first, ", ".join(others))
    return first, others


_COUNTS = {"n_averaged", "initted", "step", "num_updates", "decay"}
"""Counters stored beside averaged weights: torch's AveragedModel, ema-pytorch, LDM's LitEma."""
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _plain_name(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _plain_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _plain_name(key)
        if name in _COUNTS and tensor.numel() == 1:
            continue
        if name in plain:
            raise WeightsMismatchError(f"{path} holds {name} twice, once inside a wrapper: save one network alone")
        plain[name] = tensor
    if reason := standins.fault_of_tensors(plain):
        raise WeightsMismatchError(f"{path} {reason}")
    return unchunked(plain)


def unchunked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove DINOv2's chunks from names: blocks.0.7.x becomes blocks.7.x; chunks that restart at 0 are renumbered."""
    chunked = {key: m for key in state if (m := re.match(r"(.*?\bblocks\.)(\d+)\.(\d+)(\..*)", key))}
    if not chunked:
        return dict(state)
    pairs = sorted({(int(m[2]), int(m[3])) for m in chunked.values()})
    ambiguous = len({inner for _, inner in pairs}) < len(pairs)
    number = {pair: i if ambiguous else pair[1] for i, pair in enumerate(pairs)}
    return {
        f"{m[1]}{number[int(m[2]), int(m[3])]}{m[4]}" if (m := chunked.get(key)) else key: tensor
        for key, tensor in state.items()
    }


def thirds(tensor: Tensor) -> Sequence[Tensor]:
    """The parts of queries, keys and values of a joint tensor.

    One that cannot be divided is returned three times: the strict comparison of shapes refuses it.
    """
    return tensor.chunk(3) if tensor.ndim and tensor.shape[0] % 3 == 0 else [tensor] * 3


# Parts of trainers that do not belong to the network: self-supervision heads, losses, copies.
_BESIDE = re.compile(
    r"(\w+\.)*(dino_head|ibot_head|koleo\w*|\w*loss\w*|\w*criterion\w*|\w*metrics?|lpips|discriminator|queue\w*)\."
    r"|(student|teacher|gram_teacher|model|ema\w*|\w*_ema|swa\w*|averaged?\w*)\."
)


def below_prefix(
    state: Mapping[str, Tensor],
    anchors: Sequence[str],
    where: str | Path = "weights",
    *,
    beside: Sequence[str] = (),
    is_part: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors under the prefix that precedes an anchor, without the prefix; `state` if no anchor is found.

    anchors: names that the network must have; the first one found decides. Of several prefixes one is chosen as
    `read_state` chooses tables. Tensors without it are kept, for the caller to refuse, unless they belong to a known
    part of a trainer or begin with one of `beside`. is_part: the network is a part of larger ones, whose other parts
    are left out; unknown ones are named in a warning.
    """
    for anchor in anchors:
        prefixes = [key[: -len(anchor)] for key in state if f".{key}".endswith(f".{anchor}")]
        if not prefixes:
            continue
        first, others = _taken(prefixes, where)
        ignored = (*beside, *others)
        # A trainer may keep its averaged copy inside the network: "a.weight" and "ema.a.weight".
        copies = tuple(p for p in others if p.startswith(first) and _BESIDE.match(p.removeprefix(first)))
        tensors = {
            key.removeprefix(first): tensor
            for key, tensor in state.items()
            if key.startswith(first) and not key.startswith(copies)
        }
        unknown = {
            key: tensor
            for key, tensor in state.items()
            if not (key.startswith(first) or _BESIDE.match(key) or key.startswith(ignored))
        }
        if is_part and unknown:
            _log.warning('%s: took "%s" and left out %s', where, first, ", ".join(sorted(unknown)[:3]))
            return tensors
        return tensors | unknown
    return dict(state)
