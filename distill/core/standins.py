"""Detects files that are not usable weights: pointers, web pages, archives, incomplete downloads.

Each function returns a clause that follows the file's name, or "" if nothing is wrong.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.core import signatures

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"),
    (b"<", "is a web page, not weights: download it again, logged in where it is gated"),
    (b"{", "is JSON, not weights: an error of the server that it came from, or an index under another name"),
)
_GIVE = "give the weights that it was made from"
_READ = ("a zip archive", "a Python pickle")  # results of signatures.sniff: torch's own files are one of these
_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P"
"""The magic number of torch's legacy pickles (before zip files), which follows the protocol."""


_JOIN = "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth`"


def fault_of_start(path: Path) -> str:
    """Return the fault that the first bytes show."""
    if path.suffix == ".distcp":  # concatenated torch files, of which torch.load would read only the last tensor
        return f"is a shard of torch.distributed.checkpoint: {_JOIN} joins its folder's"
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name) and not any(path.parent.glob("*.index*.json")):
        return "is one of several shards, whose index (.index.json) is missing: download all of them with it"
    with path.open("rb") as stream:
        start = stream.read(512)
    if start[8:9] == b"{" and len(start) > 9:
        return ""  # safetensors: the header follows its length, whose bytes may look like anything
    if not start:
        return "cannot be read as weights: it is empty; download it again"
    if not any(start):
        return "begins with zeros: an unfinished download; download it again"
    if fault := next((fault for magic, fault in _WORDS if start.lstrip().startswith(magic)), ""):
        return fault
    kind = signatures.sniff(start)
    if kind and kind not in _READ:
        return f"is {kind}{': unpack it' if signatures.is_packed(kind) else ', not weights of a torch network'}"
    if start[:1] == b"\x80" and _TORCH not in start[:32]:
        return "is a plain Python pickle, which is not opened: store its state_dict() by torch.save"
    if re.fullmatch(rb"[\t\r\n -~]{12,}", start):
        return f"cannot be read as weights: it is text, beginning {start[:24].decode()!r}; download it again"
    return "is an ONNX network, not weights" if start[:1] == b"\x08" and b"pytorch" in start[:32] else ""


_TENSORS = 100_000
"""The most tensors of a .safetensors: each takes as long as a large one, and networks have thousands at most."""


def fault_of_count(path: Path) -> str:
    """Return the fault of a .safetensors that lists too many tensors."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        most = _TENSORS * len('"data_offsets":')
        count = stream.read(size).count(b'"data_offsets"') if most < size <= 100_000_000 else 0
    return f"lists {count} tensors, more than {_TENSORS}: no weights of one network" if count > _TENSORS else ""


def fault_of_extra_bytes(path: Path) -> str:
    """Return the fault of a .safetensors with bytes after its tensors; its reader's error is that of a short file."""
    try:
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if path.suffix != ".safetensors" or header_size > 100_000_000:
                return ""
            header = json.loads(stream.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        extra_bytes = path.stat().st_size - 8 - header_size - max(ends, default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return (
        f"has {extra_bytes} bytes after its tensors that its header does not list: download or copy it again"
        if extra_bytes > 0
        else ""
    )


def remedy_for_shards(folder: Path) -> str:
    """Return how to turn the shards that trainers leave in a folder into weights, or ""."""
    names = [path.name for depth in ("*", "*/*") for path in folder.glob(depth)]
    if any(name.endswith("_optim_states.pt") or name == "zero_to_fp32.py" for name in names):
        return f"; these are DeepSpeed's shards: {ZERO}"
    if any(name.endswith(".distcp") for name in names):
        return f"; these are shards of torch.distributed.checkpoint: {_JOIN} joins them"
    return ""


_END, _END_SIZE = b"PK\5\6", 22
_END_WITHIN = _END_SIZE + 65535
"""The signature and size of a zip's end, and within how many last bytes it is: a comment may follow."""


def fault_of_zip(path: Path) -> str:
    """Return the fault of a zip that is not a torch file, or whose parts do not match their checksums.

    torch does not verify the checksums: a hole in a download would become weights of zeros.
    """
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
        stream.seek(max(0, path.stat().st_size - _END_WITHIN))
        # Not zipfile.is_zipfile, which since Python 3.14 is False for a zip with lost bytes, too.
        if not is_zip or _END not in stream.read()[: 4 - _END_SIZE]:
            return ""  # another format, or cut short: its reader reports that
    if fault := fault_of_list(path):
        return fault
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/archive_format") for name in names):
            return f"is a torch.export program (.pt2): {_GIVE}"
        if any(name.endswith("/constants.pkl") for name in names):
            return f"is a TorchScript program: {_GIVE}"
        if all(name.endswith(".npy") for name in names):
            return "holds NumPy's arrays (.npz), not weights of a torch network"
        if not any(name.endswith("data.pkl") for name in names):
            return f"is a zip archive ({', '.join(names[:2])}), not weights: unpack it, and give the file in it"
        damaged = [name for name in names if not _is_whole(archive, name)]
    if not damaged or len(damaged) == len(names):  # all of them: written without checksums
        return ""
    return (
        f"is damaged: {len(damaged)} of its {len(names)} parts do not match their stored checksums; "
        "download or copy it again"
    )


_UNSUSPECTED, _MOST_PACKED = 1 << 28, 20
"""A zip may unpack to so many bytes, or else to so many times its own."""


def fault_of_list(path: Path) -> str:
    """Return the fault of a zip whose list of parts does not lie where its last bytes say, or claims far too much.

    torch stores its parts as they are, and compressed again, numbers become little smaller.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(part.file_size for part in archive.infolist()), path.stat().st_size
            if unpacked > _UNSUSPECTED and unpacked > _MOST_PACKED * size:
                return f"has {size} bytes that unpack to {unpacked}, which weights do not: a decompression bomb"
            if all(part.header_offset >= 0 for part in archive.infolist()):
                return ""
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        pass
    return (
        "is damaged: bytes were lost or added before its end, as in a resumed download or a transfer as text: "
        "download or copy it again"
    )


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as part:
            while part.read(1 << 22):
                pass
    except (zipfile.BadZipFile, zlib.error, OSError):
        return False
    return True


# Patterns of the names that libraries give to tensors other than the network's own weights.
_LORA = r"(.*\.)?lora_(embedding_)?[AB]\b.*|.*\.lora_(up|down)\.weight"
_KINDS = (
    (_LORA, "an adapter (LoRA): merge it with its network, and save that"),
    (r".*\.(SCB|weight_format)|.*\.(absmax|quant_map|quant_state\.\w+)", f"quantised by bitsandbytes: {_GIVE}"),
    (r".*\.(qweight|qzeros|g_idx)", f"quantised (GPTQ, AWQ): {_GIVE}"),
    (r".*\.weight_scale(_inv)?|.*\.input_scale", f"quantised to eight bits: {_GIVE}"),
)


_NUMBERS = (".weight", ".bias")
_USED = (*_NUMBERS, ".running_mean", ".running_var")
ZERO = "run the zero_to_fp32.py that lies beside it, and give the file that it writes"
"""How DeepSpeed's shards become weights."""


def fault_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the fault of tensors that a network cannot load as they are, but only after another library's conversion.

    Also of diverged weights: with NaN weights a network predicts NaN maps.
    """
    import torch

    packed = any(tensor.element_size() == 1 and tensor.dtype != torch.bool for tensor in state.values())
    for pattern, description in _KINDS if packed else _KINDS[:-1]:
        if name := next((name for name in state if re.fullmatch(pattern, name)), ""):
            return f"holds {name}: {description}"
    for name, tensor in state.items():
        if tensor.is_meta:
            return f"holds {name} without its numbers (on the device meta): save the weights after they are loaded"
        if _spread(tensor):
            return f"holds {name} {tuple(tensor.shape)}, which repeats few stored numbers: save it as contiguous()"
        if not tensor.numel() and tensor.ndim and name.endswith(_NUMBERS):
            return f"holds {name} empty, as DeepSpeed's ZeRO leaves it: {ZERO}"
        if name.endswith(_NUMBERS) and tensor.element_size() == 1:
            return f"holds {name} as {str(tensor.dtype)[6:]}: quantised to eight bits: {_GIVE}"
        is_integer = name.endswith(_NUMBERS) and not tensor.is_floating_point()
        if tensor.is_quantized or tensor.layout != torch.strided or is_integer:
            form = str(tensor.dtype if tensor.is_quantized or is_integer else tensor.layout).removeprefix("torch.")
            return f"holds {name} as {form}: save plain floating-point tensors"
        if name.endswith(_USED) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            if bool(tensor.isnan().any()):
                return f"holds {name} with numbers that are NaN: its training has diverged; give an earlier checkpoint"
            return (
                f"holds {name} with infinite numbers, as of a copy in float16 that overflowed: give the float32 weights"
            )
    return _fault_of_zeros(state)


def _spread(tensor: Tensor) -> bool:
    """Whether a large tensor is a view that repeats its numbers: any copy of it would take the memory of its shape."""
    import torch

    size = tensor.numel() * tensor.element_size()
    return size > _UNSUSPECTED and tensor.layout == torch.strided and size > tensor.untyped_storage().nbytes()


def _fault_of_zeros(state: Mapping[str, Tensor]) -> str:
    """The fault of weights of which a part never arrived: holes are zeros, and .safetensors has no checksums.

    Single matrices of zeros are common: layers begin so, and some are never used.
    """
    matrices = [name for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim >= 2]
    empty = [name for name in matrices if not bool(state[name].any())]
    if len(empty) < max(3, len(matrices) / 10):
        return ""
    rest = f"{len(empty) - 1} of the {len(matrices) - 1} others"
    return f"holds {empty[0]} and {rest} as zeros alone, as an unfinished download does: download or copy it again"
