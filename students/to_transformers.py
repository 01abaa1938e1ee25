"""A student as a folder that transformers opens: a native class where one matches weight for weight, else custom code.

Native: a `dav2` decoder on a DINOv2 without registers is DepthAnythingForDepthEstimation; a `dpt` decoder of 256
channels on one is DPTForDepthEstimation (its projection's width is fixed in the class; batch norms are folded into the
convolutions after them). No class of transformers feeds a DINOv3 with its class token to a DPT, so those, SDT, and
everything else get students/remote_code.py, whose model.safetensors stays a student's own.

Surprises: both native heads end in a ReLU, which a student of unknown shift does not have. So its last bias is raised
far above the lowest value seen, by a number in config.json ("shift"); the shift is unknown anyway. And transformers
resizes DINOv2's position table without antialias and with another cubic kernel than timm: on the table's own grid
nothing differs; on others the difference is measured and returned.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.core import crops
from distill.core.optional import optional
from distill.core.plugins import find
from distill.core.tensors import save_file
from distill.students import Student, checkpoint, vggt

CODE = "modeling_student.py"
TOLERANCE = 1e-4
_READS = "remote_code"


def native(student: Student) -> str:
    """ "DepthAnything", "DPT", or "" if no class of transformers matches this student."""
    encoder, options = student.encoder, student.decoder.options
    vit = encoder.backbone
    table = getattr(vit, "pos_embed", None)
    plain = (
        type(vit).__name__ == "VisionTransformer"
        and "dinov2" in encoder.timm_name
        and vit.num_prefix_tokens == 1
        and table is not None
        and vit.patch_embed.grid_size[0] == vit.patch_embed.grid_size[1]
        and len(set(encoder.indices)) == 4
    )
    integral_depth = student.max_depth is None or float(student.max_depth).is_integer()
    if plain and student.spec["decoder"] == "dav2" and integral_depth and options["patch_size"] == encoder.patch_size:
        return "DepthAnything"
    folds = options.get("norm") in ("batch", "frozen", "none")
    if plain and student.spec["decoder"] == "dpt" and options["channels"] == 256 and folds and not student.max_depth:
        return "DPT"
    return ""


def write(student: Student, folder: Path, *, how: str = "auto", named: Path | None = None) -> str:
    """Write transformers' files into `folder`, load them again, and compare; returns a line about it.

    how: "native", "code", or "auto", which is native if a class matches. For code, `folder` already holds the student
    (checkpoint.save), in float32 or float16. named: the folder's name in errors, if `folder` is temporary. Raises
    ImportError without transformers, ValueError if no class matches, or if the written model differs from the student
    by more than 1e-4 of its map's spread on a square image of the position table's own size.
    """
    optional("transformers", "teachers")
    named = named or folder
    if student.encoder.name == vggt.NAME:
        raise ValueError(f"{named}: the encoder vggt is no ViT of timm or transformers; export a program instead")
    if type(student.encoder.backbone).__name__ == "Beit":
        raise ValueError(f"{named}: timm's BEiT alone takes images of one size; export a program or ONNX instead")
    name = native(student)
    if how == "native" and not name:
        raise ValueError(f"{named}: no class of transformers is this student; use --transformers code")
    is_code = how == "code" or not name
    if is_code:
        _write_code(student, folder)
        name, shift = "modeling_student.py with trust_remote_code=True", 0.0
    else:
        shift = _write_native(student, folder, name)
        name = f"{name}ForDepthEstimation"
    near, *far = _compare(student, folder, shift, named)
    worst = max(near, *far) if is_code else near  # a native class resizes the table differently
    if not worst <= TOLERANCE:
        raise ValueError(f"{named}: not written, for transformers' outputs differ by {worst:.2g} of their spread")
    sizes = ["3:4", f"a square of the native size, {student.native_size}"]
    others = " and ".join(f"{off:.1g} on {size}" for off, size in zip(far, sizes, strict=False))
    return f"{name}: within {near:.1g} of torch's outputs (of their spread) on a square, {others}"


# --- native classes ---------------------------------------------------------------------------------------------------


def _write_native(student: Student, folder: Path, name: str) -> float:
    transformers = optional("transformers", "teachers")
    encoder, options, vit = student.encoder, student.decoder.options, student.encoder.backbone
    block = vit.blocks[0]
    gated = block.mlp.fc1.out_features != block.mlp.fc2.in_features
    backbone = transformers.Dinov2Config(
        hidden_size=encoder.channels,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        mlp_ratio=4 if gated else block.mlp.fc1.out_features // encoder.channels,
        image_size=vit.patch_embed.grid_size[0] * encoder.patch_size,
        patch_size=encoder.patch_size,
        use_swiglu_ffn=gated,
        use_mask_token=False,
        out_indices=[i + 1 for i in encoder.indices],
        apply_layernorm=encoder.final_norm,
        reshape_hidden_states=False,
    )
    shift = 0.0 if student.max_depth else _shift(student)
    extra = {"shift": shift, "kind": str(student.kind), "larger_is": student.kind.larger_is}
    extra |= {"canonical_focal": student.canonical_focal} if student.canonical_focal else {}
    if name == "DepthAnything":
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=encoder.patch_size,
            reassemble_hidden_size=encoder.channels,
            neck_hidden_sizes=options["post_process_channels"],
            fusion_hidden_size=options["channels"],
            depth_estimation_type="metric" if student.max_depth else "relative",
            max_depth=int(student.max_depth or 1),
            depth_distill=extra,
        )
    else:
        config = transformers.DPTConfig(
            backbone_config=backbone,
            readout_type=options["readout"],
            neck_hidden_sizes=options["post_process_channels"],
            fusion_hidden_size=256,
            add_projection=True,
            use_bias_in_fusion_residual=False,
            depth_distill=extra,
        )
    model = getattr(transformers, f"{name}ForDepthEstimation")(config)
    state = _backbone_state(student) | (_dav2_state if name == "DepthAnything" else _dpt_state)(student)
    last = "head.conv3.bias" if name == "DepthAnything" else "head.head.4.bias"
    state[last] = state[last] + shift
    unused = "neck.fusion_stage.layers.0.residual_layer1."  # which the class has, and never calls
    state |= {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.startswith(unused)}
    state = {key: value.detach().float().contiguous().clone() for key, value in state.items()}
    save_file(state, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    size = student.native_size or backbone.image_size
    transformers.DPTImageProcessor(
        size={"height": size, "width": size},
        keep_aspect_ratio=True,
        ensure_multiple_of=encoder.patch_size,
        resample=2,
        image_mean=list(encoder.options["mean"]),
        image_std=list(encoder.options["std"]),
        do_pad=False,
    ).save_pretrained(folder)
    return shift


def _shift(student: Student) -> float:
    """The shift that keeps the map of a student without a ReLU positive, four spreads below the lowest value seen."""
    with torch.no_grad():
        values = torch.cat([student(image).flatten() for image in _images(student)])
    return max(0.0, 4 * float(values.max() - values.min()) - float(values.min()))


_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def _backbone_state(student: Student) -> dict[str, Tensor]:
    """timm's DINOv2 under the names of transformers' Dinov2Backbone."""
    vit = student.encoder.backbone
    state = vit.state_dict()
    out = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": _table(vit),
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state.get("norm.weight", torch.ones(student.encoder.channels)),
        "layernorm.bias": state.get("norm.bias", torch.zeros(student.encoder.channels)),
    }
    for i, block in enumerate(vit.blocks):
        from_prefix, to_prefix = f"blocks.{i}.", f"encoder.layer.{i}."
        gated = block.mlp.fc1.out_features != block.mlp.fc2.in_features
        names = _BLOCK | ({"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"} if gated else {})
        for part in ("weight", "bias"):
            out |= {
                f"{to_prefix}{theirs}.{part}": state[f"{from_prefix}{ours}.{part}"] for ours, theirs in names.items()
            }
            query, key, value = state[f"{from_prefix}attn.qkv.{part}"].chunk(3)
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                out[f"{to_prefix}attention.attention.{name}.{part}"] = tensor
        for n in (1, 2):
            ones = torch.ones(student.encoder.channels)
            out[f"{to_prefix}layer_scale{n}.lambda1"] = state.get(f"{from_prefix}ls{n}.gamma", ones)
    return {f"backbone.{key}": value for key, value in out.items()}


def _table(vit: Any) -> Tensor:
    table: Tensor = vit.pos_embed
    # timm's table of a ViT may leave the class token out; its position is then zero.
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1) if vit.no_embed_class else table


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors renamed by the first matching pattern; ValueError for a key without one."""
    out = {}
    for key, value in state.items():
        name = next((re.sub(p, to, key) for p, to in names.items() if re.match(p, key)), None)
        if name is None:
            raise ValueError(f"no place for {key} in transformers' model")
        out[name] = value
    return out


def _dav2_state(student: Student) -> dict[str, Tensor]:
    def layer(match: re.Match[str]) -> str:
        return f"neck.fusion_stage.layers.{4 - int(match[1])}."

    state = {re.sub(r"^scratch\.refinenet(\d)\.", layer, key): v for key, v in student.decoder.state_dict().items()}
    unit = r"^(neck\.fusion_stage\.layers\.\d\.)resConfUnit(\d)\.conv(\d)\."
    convs = {rf"^scratch\.layer{i + 1}_rn\.": f"neck.convs.{i}." for i in range(4)}
    return _renamed(
        state,
        {
            r"^projects\.(\d)\.": r"neck.reassemble_stage.layers.\1.projection.",
            r"^resize_layers\.(\d)\.": r"neck.reassemble_stage.layers.\1.resize.",
            **convs,
            unit: r"\1residual_layer\2.convolution\3.",
            r"^(neck\.fusion_stage\.layers\.\d\.)out_conv\.": r"\1projection.",
            r"^scratch\.output_conv1\.": "head.conv1.",
            r"^scratch\.output_conv2\.0\.": "head.conv2.",
            r"^scratch\.output_conv2\.2\.": "head.conv3.",
        },
    )


def _dpt_state(student: Student) -> dict[str, Tensor]:
    decoder = student.decoder
    state = dict(decoder.state_dict())
    for i in range(4):
        norm = decoder.reassemble_blocks.batchnorm_layers[i]
        if not isinstance(norm, nn.Identity):
            weight, bias = (f"reassemble_blocks.projects.{i}.conv.{part}" for part in ("weight", "bias"))
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            moved = norm.bias - norm.running_mean * scale
            state[bias] = state[bias] + state[weight][:, :, 0, 0] @ moved
            state[weight] = state[weight] * scale[None, :, None, None]
    state = {key: value for key, value in state.items() if ".batchnorm_layers." not in key}
    fusion = r"^fusion_blocks\.(\d)\."
    return _renamed(
        state,
        {
            r"^reassemble_blocks\.projects\.(\d)\.conv\.": r"neck.reassemble_stage.layers.\1.projection.",
            r"^reassemble_blocks\.resize_layers\.(\d)\.": r"neck.reassemble_stage.layers.\1.resize.",
            r"^reassemble_blocks\.readout_projects\.(\d)\.": r"neck.reassemble_stage.readout_projects.\1.",
            r"^convs\.(\d)\.conv\.": r"neck.convs.\1.",
            fusion + r"res_conv_unit(\d)\.conv(\d)\.conv\.": (
                r"neck.fusion_stage.layers.\1.residual_layer\2.convolution\3."
            ),
            fusion + r"project\.conv\.": r"neck.fusion_stage.layers.\1.projection.",
            r"^project\.conv\.": "head.projection.",
            r"^conv_depth\.head\.(\d)\.": r"head.head.\1.",
        },
    )


# --- code -------------------------------------------------------------------------------------------------------------


def _write_code(student: Student, folder: Path) -> None:
    """config.json, preprocessor_config.json and the source files; the weights are the student's own."""
    encoder = student.encoder
    names = {"timm_name": encoder.timm_name, "patch_size": encoder.patch_size}
    module = CODE.removesuffix(".py")
    config = {
        "model_type": "depth_distill_student",
        "architectures": ["StudentForDepthEstimation"],
        "auto_map": {
            "AutoConfig": f"{module}.StudentConfig",
            "AutoModelForDepthEstimation": f"{module}.StudentForDepthEstimation",
        },
        "dtype": "float32",
        "encoder": {**encoder.options, **names},
        "decoder": dict(student.decoder.options),
        "max_depth": student.max_depth,
        "kind": str(student.kind),
        "larger_is": student.kind.larger_is,
        **({"canonical_focal": student.canonical_focal} if student.canonical_focal else {}),
    }
    processor = {
        "image_processor_type": "StudentImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{module}.StudentImageProcessor"},
        "native_size": student.native_size,
        "multiple": encoder.patch_size,
        "image_mean": list(encoder.options["mean"]),
        "image_std": list(encoder.options["std"]),
    }
    for name, values in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    template = Path(__file__).with_name(f"{_READS}.py")
    source = template.read_text(encoding="utf-8")
    decoder = find("distill.students.decoders", student.spec["decoder"])
    # A user's decoder is a file, or a package's module; its name is kept.
    name = re.sub(r"\W", "_", Path(student.spec["decoder"]).stem)
    source = source.replace(
        "from distill.students.decoders.sdt import", f"from distill.students.decoders.{name} import"
    )
    _write_sources(folder, {CODE: source}, {f"distill.students.decoders.{name}": Path(str(decoder.__file__))})


def _write_sources(folder: Path, todo: dict[str, str], known: dict[str, Path]) -> None:
    """Write Python files with imports of this package made relative, and the files that they import, each once."""
    written: set[str] = set()
    while todo:
        name, source = todo.popitem()
        written.add(name)
        for module in sorted(_ours(source, known), key=len, reverse=True):
            path, file = known.get(module) or _source(module), _file(module)
            source = re.sub(rf"^from {re.escape(module)} import", f"from .{file} import", source, flags=re.M)
            if f"{file}.py" not in written:
                todo[f"{file}.py"] = path.read_text(encoding="utf-8")
        (folder / name).write_text(source, encoding="utf-8")
    files = sorted(file.removesuffix(".py") for file in written - {CODE})
    named = "".join(f"    from .{file} import __name__\n" for file in files)
    with (folder / CODE).open("a", encoding="utf-8") as code:
        code.write(f"\n\nif False:  # most releases of transformers copy only files that this one names\n{named}")


def _ours(source: str, known: Mapping[str, Path]) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in nodes if str(node.module).startswith("distill.") or node.module in known}


def _source(module: str) -> Path:
    base = Path(__file__).parent.parent.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _file(module: str) -> str:
    return "_".join(re.sub(r"\W", "_", part) for part in module.removeprefix("distill.").split("."))


# --- comparison -------------------------------------------------------------------------------------------------------


def _images(student: Student) -> list[Tensor]:
    """Smooth images (1,3,H,W): a square of the position table's own size, a 3:4 image of the native size, and a square
    of the native size if that is another.
    """
    patch = student.encoder.patch_size
    table = getattr(student.encoder.backbone, "pos_embed", None)
    grid = getattr(student.encoder.backbone.patch_embed, "grid_size", (16, 16))
    native = student.native_size or grid[0] * patch
    own = grid[0] * patch if table is not None else native
    draw = torch.Generator().manual_seed(0)
    seed = torch.rand(1, 3, 9, 12, generator=draw)
    shapes = [(own, own), crops.native_shape(3, 4, native, patch)]
    square = crops.native_shape(1, 1, native, patch)
    shapes += [square] if own not in (native, *square) else []
    return [nn.functional.interpolate(seed, size, mode="bicubic", align_corners=False).clamp(0, 1) for size in shapes]


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Disable transformers' progress bars, which --quiet and --json must not show."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _compare(student: Student, folder: Path, shift: float, named: Path) -> list[float]:
    """The largest difference on each of `_images`, in units of the map's spread."""
    transformers = optional("transformers", "teachers")
    with _without_bars(transformers.utils.logging):
        model, loaded = transformers.AutoModelForDepthEstimation.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
    for what, keys in loaded.items():
        if keys:
            raise ValueError(f"{named}: transformers reads it with {what.replace('_', ' ')}: {sorted(keys)[:3]}")
    model = model.eval().float()
    errors = []
    for images in _images(student):
        with torch.no_grad():
            expected = student(images)
            actual = model((images - student.encoder.mean) / student.encoder.std).predicted_depth - shift
        if actual.shape != expected.shape:
            actual = nn.functional.interpolate(
                actual[:, None], expected.shape[-2:], mode="bilinear", align_corners=False
            )[:, 0]
        spread = (expected.amax() - expected.amin()).clamp(min=1e-12)
        errors.append(float((actual - expected).abs().max() / spread))
    return errors
