"""A student as ONNX and as an exported program: the same outputs on sizes and batches that were not traced."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from distill import students
from distill.app import cli
from distill.core import plugins
from distill.students import checkpoint, export, modelcard, onnx_graph


def tiny(encoder, decoder, *, use_abs_pos_emb=None, img_size=None, **options):
    torch.manual_seed(0)
    shape = {"depth": 1, "embed_dim": 32, "num_heads": 1}
    shape |= {"use_abs_pos_emb": True, "img_size": img_size} if use_abs_pos_emb else {}
    student = students.build(
        encoder=encoder, decoder=decoder, encoder_options={"timm_options": shape}, decoder_options=options
    )
    for name, parameter in student.named_parameters():
        with torch.no_grad():  # layer scales start at almost nothing: positions would not show
            if name.endswith(("gamma_1", "gamma_2", "ls1.gamma", "ls2.gamma")):
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    return student.eval()


def small():
    """The cheapest student that there is."""
    return tiny("test_vit", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])


def dinov3_sdt():
    return tiny("dinov3_vits16", "sdt", fusion_channels=8)


DECODER = """
from torch import nn
from distill.students.decoders.dpt import Fusion
from distill.students.dysample import DySample


class Decoder(nn.Module):
    def __init__(self, in_channels, channels=8):
        super().__init__()
        self.options = {"in_channels": in_channels, "channels": channels}
        self.into = nn.Conv2d(in_channels[0], channels, 1)
        self.halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.fusion = Fusion(channels, lateral=True)
        self.sample = DySample(channels, scale=2, style="lp", groups=4, scope=True)
        self.out = nn.Conv2d(2 * channels, 1, 1)

    def forward(self, features):
        patches, cls = features[0]
        level = self.into(patches)
        x = self.sample(self.fusion(self.halve(level), level))
        return self.out(x.repeat(1, 2, 1, 1)) + 0.01 * cls.mean(dim=1)[:, None, None, None]
"""


def parts(tmp_path):
    """A student of what is hard to trace: rotary positions and a position table, ceil(h/2) and a resize to another
    level (DPT), sampling grids (SDT).

    Tracing costs by the number of operations. tests/speed/export.py traces every decoder whole.
    """
    path = tmp_path / "parts.py"
    path.write_text(DECODER)
    plugins.allow(path)
    student = tiny("dinov3_vits16", str(path), use_abs_pos_emb=True, img_size=64)
    torch.nn.init.normal_(student.encoder.backbone.pos_embed)
    return student


def test_the_graph_is_the_student_on_any_size():
    metric = tiny("dinov2_vits14", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])
    metric.max_depth = 20.0
    for student in (dinov3_sdt(), metric):
        graph = export.Graph(student)
        for size in [(1, 3, 48, 32), (2, 3, 61, 47), (1, 3, 9, 50)]:
            images = torch.rand(size, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(graph(images), student(images), atol=1e-5, rtol=1e-5)
        assert student.encoder.backbone is not graph.encoder.backbone


def test_rotary_positions_follow_the_size():
    """A tracer that kept the example's grid would be right on the example alone."""
    rope = dinov3_sdt().encoder.backbone.rope
    for shape in [(5, 7), (3, 11), (1, 4)]:
        found = export._Rotary(rope, "x").get_embed(shape)
        torch.testing.assert_close(found, rope.get_embed(shape=list(shape)), atol=1e-6, rtol=0)


def test_other_rotary_positions_are_refused():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="rope_vit: its rotary positions .Other. cannot be exported"):
        export._Rotary(Other(), "rope_vit")
    rope = dinov3_sdt().encoder.backbone.rope
    for key, value in (("grid_offset", 0.5), ("grid_indexing", "xy"), ("normalize_coords", "max")):
        other = copy.deepcopy(rope)
        setattr(other, key, value)
        with pytest.raises(ValueError, match="cannot be exported"):
            export._Rotary(other, "rope_vit")


@pytest.mark.slow
def test_both_graphs_are_written_beside_the_student_and_checked(tmp_path, capsys, monkeypatch):
    """One student for both, with every part that is hard to trace: tracing is most of this test's time."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = parts(tmp_path)
    checkpoint.save(student, tmp_path / "s", card={"name": "tiny", "licence": "Apache-2.0"})
    read, load = [], torch.export.load  # reading takes seconds: what the check read is looked at here, too
    monkeypatch.setattr(torch.export, "load", lambda path: read.append(load(path)) or read[0])
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--onnx", "--program"]) == 0
    path = tmp_path / "o" / "model.onnx"
    said = capsys.readouterr().out.replace("\n", "")
    assert f"{path}: " in said and f"{tmp_path / 'o' / 'model.pt2'}: within" in said
    run, program = onnx_graph.run_onnx(path), read[0].module()
    least = export.smallest(student)
    spread = float(student(torch.rand(3, 3, 97, 50, generator=torch.Generator().manual_seed(2))).std())
    assert spread > 1e-2
    for size in [(3, 3, 97, 50), (2, 3, least, 50), (2, 3, 1, 1), (1, 3, 16, 16), (1, 3, 20, 70)]:
        images = torch.rand(size, generator=torch.Generator().manual_seed(2))
        expected = student(images).detach()
        for graph in [run, program] if min(size[2:]) >= least else [run]:
            torch.testing.assert_close(graph(images), expected, atol=1e-4 * spread, rtol=0)
    # What the program refuses, the card says; an export without it has no such line.
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.rand(1, 3, least - 1, 50))
    page = (tmp_path / "o" / "README.md").read_text()
    assert "| model.pt2 | for images of at least 33 x 33 pixels |" in page and "| model.onnx | float32 |" in page
    model = onnx.load(path)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert texts["licence"] == "Apache-2.0" and texts["kind"] == "affine_disparity"
    assert texts["multiple"] == "16" and texts["images"] == "RGB in [0, 1]"
    assert not any(node.metadata_props for node in model.graph.node)  # the tracer notes this machine's paths
    names = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert names == [["batch", 3, "height", "width"]]
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o")]) == 2 and path.exists()
    assert "--overwrite" in capsys.readouterr().err
    # A later save must not leave graphs of other weights behind.
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--overwrite"]) == 0
    assert not path.exists() and checkpoint.read_card(tmp_path / "o") == {"name": "tiny", "licence": "Apache-2.0"}


def test_a_graph_that_differs_is_refused():
    student = dinov3_sdt()
    assert export.parity(student, lambda images: student(images).detach(), "x.onnx") == 0.0
    with pytest.raises(ValueError, match="x.onnx: differs from torch by .* do not use it"):
        export.parity(student, lambda images: student(images).detach() * 1.01, "x.onnx")
    with pytest.raises(ValueError, match="x.onnx: gives"):
        export.parity(student, lambda images: student(images).detach()[:, 1:], "x.onnx")
    with pytest.raises(ValueError, match="x.onnx: its outputs are not finite"):
        export.parity(student, lambda images: torch.full_like(images[:, 0], math.nan), "x.onnx")
    spoil(student)
    with pytest.raises(ValueError, match="x.onnx: torch's outputs are not finite"):
        export.parity(student, lambda images: student(images).detach(), "x.onnx")


def test_a_difference_is_of_the_worst_pixel_of_all_sizes_and_of_the_map_s_spread():
    student = small()
    sizes = []

    def off(images):
        out = student(images).detach() + 0.0
        sizes.append(tuple(images.shape))
        if len(sizes) == 1:
            out[0, 3, 2] -= 5e-5 * (out.max() - out.min())
        return out

    student.forward = lambda images: images[:, 0] + 5.0
    patch = student.encoder.patch_size
    assert export.parity(student, off, "x.onnx") == pytest.approx(5e-5, rel=0.05)
    assert len(sizes) == 4 and {len(size) for size in sizes} == {4} and max(size[0] for size in sizes) == 3
    assert (1, 3, 2 * patch + 1, 9 * patch) in sizes and export.smallest(student) == 2 * patch + 1


def test_an_output_that_is_not_finite_is_no_small_difference():
    images = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 9, 8)]
    with pytest.raises(ValueError, match="x: not written, for its outputs would not be finite"):
        export.difference(lambda x: x[:, 0], lambda x: x[:, 0] * math.nan, "x", images=images)
    off = export.difference(lambda x: x[:, 0], lambda x: x[:, 0] - (x.shape[2] == 8) * 0.1, "x", images=images)
    assert off == pytest.approx(0.1 / float(images[0][:, 0].std()))


def test_a_map_that_varies_is_no_reason():
    assert export.flatness(lambda images: images[:, 0]) == ""
    assert "train it for longer" in export.flatness(lambda images: images[:, 0] * 0.05 + 1)


def spoil(student, value=math.nan):
    with torch.no_grad():
        next(p for p in student.decoder.parameters() if p.ndim > 1).view(-1)[0] = value


def test_a_program_that_differs_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "m.pt2").write_text("older")
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"new"))
    monkeypatch.setattr(torch.export, "load", lambda path: torch.nn.Sequential())
    monkeypatch.setattr(torch.nn.Module, "module", lambda self: lambda images: images[:, 0], raising=False)
    with pytest.raises(ValueError, match=r"/m\.pt2: differs from torch"):
        export.write_program(small(), tmp_path / "m.pt2", program=object())
    with pytest.raises(ValueError, match=r"^shipped/m\.pt2: differs from torch"):
        export.write_program(small(), tmp_path / "m.pt2", program=object(), named="shipped/m.pt2")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.pt2", "older")]


@pytest.mark.parametrize("bits", ["32", "16", "4"])
def test_a_student_with_nan_is_not_shipped(tmp_path, capsys, bits):
    student = small()
    spoil(student)
    checkpoint.save(student, tmp_path / "s")
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--bits", bits]) == 2
    said = capsys.readouterr().err
    assert "the student's own outputs are not finite" in said.replace("\n", " ") and str(tmp_path / "o") in said
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("bits", ["16", "4"])
def test_a_weight_beyond_float16_is_shipped_whole(tmp_path, bits):
    student = small()
    spoil(student, 1e5)
    checkpoint.save(student, tmp_path / "s")
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--bits", bits]) == 0
    images = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert checkpoint.load(tmp_path / "o")(images).isfinite().all()


def test_an_export_that_differs_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    student = small()
    checkpoint.save(student, tmp_path / "s", card={"name": "new"})
    checkpoint.save(student, tmp_path / "o", card={"name": "old"})
    monkeypatch.setattr(export, "to_program", lambda student: object())

    def differs(*given, named, **options):
        raise ValueError(f"{named}: differs")

    monkeypatch.setattr(export, "write_program", differs)
    for off, switches in ((0.0, ["--program"]), (1.0, []), (math.nan, [])):
        monkeypatch.setattr(export, "difference", lambda before, after, path, off=off: off)
        for out in ("o", "fresh"):
            assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / out), "--overwrite", *switches]) == 2
            assert "differ" in (said := capsys.readouterr().err) and ".partial" not in said
        assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "s"]
        assert checkpoint.read_card(tmp_path / "o") == {"name": "old"}


def test_a_map_that_hardly_varies_is_named_as_the_reason(tmp_path, capsys):
    student = small()
    with torch.no_grad():
        last = student.decoder.conv_depth.head.get_submodule("4")
        last.weight.mul_(1e-7)
        last.bias.fill_(0.5)
    checkpoint.save(student, tmp_path / "s")
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--bits", "16"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"of their spread, which is small: its map deviates by .* from a level of 0\.5; train it", said)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("released = 2024-05-01\n[[a]]\nb = [1, 10:00:00]", 'released is a date or a time; .*"2024-05-01".*a[0].b[1]'),
        ("loss = nan", "loss is nan, which a card cannot hold"),
        ("name = ", "not TOML: Invalid value"),
        (b"name = '\xff'", "not TOML: 'utf-8' codec"),
    ],
)
def test_a_card_that_cannot_be_one_is_a_line_with_its_file(tmp_path, text, message):
    path = tmp_path / "card.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape("card.toml: ") + message.replace("[", r"\[")) as caught:
        modelcard.read_card_file(path)
    assert "\n" not in str(caught.value)


def test_a_card_file_takes_the_cards_place(tmp_path):
    checkpoint.save(small(), tmp_path / "s", card={"name": "old"})
    (tmp_path / "card.toml").write_text('name = "new"\nscores = [{ benchmark = "b", abs_rel = 0.1 }]\n')
    card = ["--card", str(tmp_path / "card.toml")]
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), *card]) == 0
    card = checkpoint.read_card(tmp_path / "o")
    assert card == {"name": "new", "scores": [{"benchmark": "b", "abs_rel": 0.1}]}


def test_in_its_own_folder_a_student_keeps_its_weights_unless_that_is_asked(tmp_path, capsys):
    own, weights = str(tmp_path / "s"), tmp_path / "s" / checkpoint.WEIGHTS
    checkpoint.save(small(), own)
    whole = weights.read_bytes()
    for bits in ("4", "16"):
        assert cli.main(["export", own, own, "--bits", bits]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"whose weights --bits {bits} would replace" in said and said.endswith("with --overwrite")
        assert weights.read_bytes() == whole
    assert cli.main(["export", own, own]) == 0 and weights.read_bytes() == whole
    assert cli.main(["export", own, own, "--bits", "16", "--overwrite"]) == 0
    half = weights.read_bytes()
    assert len(half) < len(whole)
    # What is stored so already loses nothing, and may be given a graph.
    assert cli.main(["export", own, own, "--bits", "16"]) == 0 and weights.read_bytes() == half
