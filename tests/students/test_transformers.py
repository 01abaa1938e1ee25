"""Students as transformers opens them: its own classes where one matches, a small file of code where none does."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from distill import load, students
from distill.app import cli
from distill.core import crops, plugins
from distill.students import checkpoint, to_transformers
from tests.students.test_export import DECODER

transformers = pytest.importorskip("transformers")

WIDTHS = {"post_process_channels": [8, 8, 8, 8]}
NATIVE = {
    "DepthAnything": {"decoder": "dav2", "decoder_options": {"channels": 8, **WIDTHS}},
    "DPT": {"decoder": "dpt", "decoder_options": {"channels": 256, **WIDTHS}},
}


def made(decoder, *, encoder="dinov2_vits14", decoder_options=None, **options):
    """A student whose every part shows: norms with statistics, layer scales of one, positions."""
    torch.manual_seed(0)
    shape = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    grid = {"pos_grid": 4} if "dinov2" in encoder else {}
    student = students.build(
        encoder=encoder,
        decoder=decoder,
        encoder_options={"timm_options": shape, "final_norm": decoder == "dav2", **grid},
        decoder_options=decoder_options,
        native_size=56 if "14" in encoder else 64,
        **options,
    )
    for name, parameter in student.named_parameters():
        with torch.no_grad():
            if name.endswith(("gamma_1", "gamma_2", "ls1.gamma", "ls2.gamma")):
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return student.eval()


@pytest.fixture
def photo():
    values = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((90, 120))  # tall, and not of the native size


@pytest.mark.parametrize("name", ["DepthAnything", "metric", "DPT"])
def test_a_native_class_has_the_same_map(tmp_path, photo, name, capsys):
    options = NATIVE["DPT" if name == "DPT" else "DepthAnything"]
    student = made(**options, **({"max_depth": 20} if name == "metric" else {}))
    expected = to_transformers.native(student)
    assert expected == ("DPT" if name == "DPT" else "DepthAnything")
    checkpoint.save(student, tmp_path / "s", card={"name": "tiny"})
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--transformers"]) == 0
    assert capsys.readouterr().err == "", "no progress bar of somebody else's"
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "s"), "--transformers"]) == 2
    assert "--transformers native would replace" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "s" / checkpoint.DESCRIPTION).is_file()
    assert not list((tmp_path / "o").glob("*.py"))
    assert "library_name: transformers" in (tmp_path / "o" / "README.md").read_text()
    pipe = transformers.pipeline("depth-estimation", model=str(tmp_path / "o"))
    assert type(pipe.model).__name__ == f"{expected}ForDepthEstimation"
    # The size rule of `distill predict`, for a photo that it makes smaller.
    pixels = pipe.image_processor(photo, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape[-2:]) == crops.native_shape(120, 90, 56, 14)
    unit = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
    normal = (crops.resize(unit, *pixels.shape[-2:]) - student.encoder.mean) / student.encoder.std
    assert float((pixels - normal).abs().max()) < 0.02  # the processor's photo has 8 bits
    square = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = student(square)
        found = pipe.model((square - student.encoder.mean) / student.encoder.std).predicted_depth
    found = torch.nn.functional.interpolate(found[:, None], wanted.shape[-2:], mode="bilinear")[:, 0]
    found = found - json.loads((tmp_path / "o" / "config.json").read_text())["depth_distill"]["shift"]
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.max() - wanted.min())
    assert pipe(photo)["predicted_depth"].shape == (120, 90)


@pytest.mark.parametrize("decoder", ["sdt_fast", "of a file"])
def test_any_other_student_comes_with_its_code(tmp_path, photo, decoder):
    options = {"decoder_options": {"fusion_channels": 8, "widths": [8, 8, 8, 8]}, "max_depth": 12.5}
    if decoder == "of a file":
        (tmp_path / "own_parts.py").write_text(DECODER)
        plugins.allow(tmp_path / "own_parts.py")
        decoder, options = str(tmp_path / "own_parts.py"), {}
    student = made(decoder, encoder="dinov3_vits16", **options)
    checkpoint.save(student, tmp_path / "s", card={"name": "tiny"})
    out = str(tmp_path / "o")
    assert cli.main(["export", str(tmp_path / "s"), out, "--transformers", "--bits", "16"]) == 0
    code = (tmp_path / "o" / to_transformers.CODE).read_text()
    for path in (tmp_path / "o").glob("*.py"):
        assert "distill." not in path.read_text().replace("distill.students.Student", ""), path
        assert path.name == to_transformers.CODE or f"from .{path.stem} import" in code, path
    pipe = transformers.pipeline("depth-estimation", model=out, trust_remote_code=True)
    found = pipe(photo)["predicted_depth"].numpy()
    expected = load(out)(photo).numpy()  # it is still a student of ours
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.ptp(expected)))
    odd = torch.rand(2, 3, 61, 83, generator=torch.Generator().manual_seed(2))
    ours = checkpoint.load(out)
    with torch.no_grad():
        theirs = pipe.model((odd - ours.encoder.mean) / ours.encoder.std).predicted_depth
        torch.testing.assert_close(theirs, ours(odd), atol=1e-5 * float(np.ptp(expected)), rtol=0)
    strip = pipe.image_processor(np.zeros((3, 90, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert tuple(strip.shape[-2:]) == crops.native_shape(3, 90, 64, 16) == (64, 512)
    for wrong, message in (
        (np.array(photo).astype(np.uint16) * 257, "divide by its largest possible value"),
        (np.array(photo).astype(np.float32), "divide by its largest possible value"),
        (np.array(photo)[..., 0], "an array is H x W x 3, RGB, not 120 x 90"),
        (torch.rand(2, 3, 9, 9), "a tensor is 3 x H x W, RGB, not 2 x 3 x 9 x 9"),
        (Image.fromarray(np.array(photo)[..., 0].astype(np.uint16) * 257), "mode I;16 goes beyond 255"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.image_processor(wrong)
    for mode in ("I;16B", "I;16L"):  # as big-endian TIFFs are opened; Pillow knows no extremes of theirs
        assert len(pipe.image_processor(Image.new(mode, (90, 120)))["pixel_values"]) == 1
    # A second export takes the place of the first; a plain one leaves none of its files.
    assert cli.main(["export", str(tmp_path / "s"), out, "--overwrite"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["README.md", "model.safetensors", "student.json"]


def test_what_no_class_can_be_is_refused(tmp_path, capsys):
    student = made("sdt", encoder="dinov3_vits16", decoder_options={"fusion_channels": 8})
    with pytest.raises(ValueError, match="no class of transformers is this student; use --transformers code"):
        to_transformers.write(student, tmp_path, how="native")
    checkpoint.save(made(**NATIVE["DepthAnything"]), tmp_path / "s")
    both = ["export", str(tmp_path / "s"), str(tmp_path / "o"), "--transformers", "--program"]
    assert cli.main(both) == 2 and "--transformers code" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    checkpoint.save(student, tmp_path / "t")
    for switches, message in (
        (["--transformers", "native"], f"{tmp_path / 'o'}: no class of transformers"),
        (
            ["--transformers", "--bits", "4"],
            f"{tmp_path / 'o'}: transformers reads weights in 32 or 16 bits: leave out",
        ),
    ):
        assert cli.main(["export", str(tmp_path / "t"), str(tmp_path / "o"), *switches]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    metric = made(**NATIVE["DPT"], max_depth=20)
    odd = made(**NATIVE["DepthAnything"], max_depth=12.5)  # the class's config holds whole metres
    registers = made(**NATIVE["DepthAnything"], encoder="dinov2_vits14_reg")
    assert [to_transformers.native(one) for one in (metric, odd, registers)] == ["", "", ""]


def test_a_native_class_is_judged_on_the_tables_own_size_and_code_on_every_size(tmp_path, monkeypatch):
    student = made(**NATIVE["DepthAnything"])
    torch.nn.init.normal_(student.encoder.backbone.pos_embed)
    student.native_size = 42
    line = to_transformers.write(student, tmp_path, named=tmp_path / "o")
    assert re.fullmatch(r"DepthAnything.*: within \S+ of .* on a square, 0\.\d+ on 3:4 and 0\.\d+ .* size, 42", line)
    assert [tuple(images.shape[2:]) for images in to_transformers._images(student)] == [(56, 56), (42, 56), (42, 42)]
    monkeypatch.setattr(to_transformers, "_write_code", lambda *given: None)
    for how, found in (("code", [0.0, 1e-3]), ("code", [1e-3, 0.0]), ("native", [1e-3, 0.0])):
        monkeypatch.setattr(to_transformers, "_compare", lambda *given, found=found: found)
        with pytest.raises(ValueError, match="/o: not written, for transformers' outputs differ by 0.001"):
            to_transformers.write(student, tmp_path, how=how, named=tmp_path / "o")
