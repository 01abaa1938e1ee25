"""Plain records that trainers save beside weights, as stand-ins for torch's safe reader: none of their code is run.

The reader calls what a pickle names and then fills what it got: an object by its state, a dict or list item by item.
It fills only exact dicts and lists, so what is a kind of dict (EasyDict, CfgNode, defaultdict) becomes a dict.
"""

from __future__ import annotations

import pickletools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any


class Inert(dict[str, Any]):
    """Stand-in for a record beside the tensors: accepts any arguments and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Accept any arguments, as a pickle may pass them."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


class Table:
    """Stand-in for a kind of dict: an empty OrderedDict, which the reader fills."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """Accept any arguments, such as a defaultdict's factory."""
        return OrderedDict()


class Series:
    """Stand-in for a kind of list: an empty list, which the reader fills."""

    def __new__(cls, *args: Any, **kwargs: Any) -> list[Any]:  # type: ignore[misc]
        """Accept any arguments, such as a deque's greatest length."""
        return []


# Classes by their full names, which are all that is used of them.
_RECORDS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?\w+|datetime\.\w+|collections\.(defaultdict|deque)|enum\.\w+"
    r"|numpy\.(_?core\.)?multiarray\.(scalar|_reconstruct)|numpy\._core\.multiarray\.\w+|numpy\.(dtypes\.)?\w+"
    r"|(omegaconf|yacs|easydict|addict|ml_collections|box)(\.\w+)*|(mmcv|mmengine)\.(utils\.)?config(\.\w+)*"
    r"|(pytorch_lightning|lightning|lightning_fabric)(\.\w+)*|typing\.\w+|(\w+\.)+(EasyDict|AttrDict|CfgNode|ConfigDict)"
    r"|(__builtin__|builtins)\.(set|frozenset|complex|slice|range|bytearray|object|int|float|str|bool|bytes|list|dict|tuple)"
    r"|torch\.torch_version\.TorchVersion|transformers\.(training_args|trainer_utils|trainer_pt_utils)\.\w+"
    r"|copy_?reg\._reconstructor"
)
_TABLES = re.compile(r"collections\.defaultdict|.*\.(\w*Dict|CfgNode|Box)")


def stand_ins(path: Path) -> list[Any]:
    """(stand-in, name) of every class that a torch file refers to and that is known to be harmless."""
    import numpy as np

    names = _names(path)
    arrays = {"multiarray._reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
    found: list[Any] = [(arrays.get(re.sub(r"numpy\.(_?core\.)?", "", name), _kind(name)), name) for name in names]
    if "numpy.dtype" in names:  # each dtype has its own class, which pickles do not name
        found += [(getattr(np.dtypes, name), f"numpy.dtypes.{name}") for name in np.dtypes.__all__]
    return found


def _kind(name: str) -> type:
    if name == "collections.deque":
        return Series
    return Table if _TABLES.fullmatch(name) else Inert


def _names(path: Path) -> list[str]:
    import torch

    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # a legacy file, not a zip
        names = set()
        with path.open("rb") as file:
            for _ in range(4):  # four pickles: magic number, version, system, object
                names |= {
                    str(arg).replace(" ", ".") for code, arg, _ in pickletools.genops(file) if code.name == "GLOBAL"
                }
        names = {_modern(name) for name in names}
    return [name for name in names if _RECORDS.fullmatch(name)]


def _modern(name: str) -> str:
    """The name that torch compares for one in a pickle, which has those of Python 2."""
    module, _, last = name.rpartition(".")
    if module == "__builtin__":
        return f"builtins.{({'long': 'int', 'unicode': 'str', 'xrange': 'range'}).get(last, last)}"
    return f"copyreg.{last}" if module == "copy_reg" else name
