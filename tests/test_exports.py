"""A student as ONNX and as an exported program: the same outputs on sizes and batches that were not traced."""

from __future__ import annotations

import importlib

import pytest
import torch

import students
from distill import checkpoint, cli, exports


def tiny(encoder, decoder, **options):
    torch.manual_seed(0)
    shape = {"depth": 1, "embed_dim": 32, "num_heads": 1}
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


def dinov3_sdt():
    return tiny("dinov3_vits16", "sdt", fusion_channels=8)


def test_the_graph_is_the_student_on_any_size():
    for student in (dinov3_sdt(), tiny("dinov2_vits14", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])):
        graph = exports.Graph(student)
        for size in [(1, 3, 48, 32), (2, 3, 61, 47), (1, 3, 9, 50)]:
            images = torch.rand(size, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(graph(images), student(images), atol=1e-5, rtol=1e-5)
        assert student.encoder.backbone is not graph.encoder.backbone


def test_rotary_positions_follow_the_size():
    """A tracer that kept the example's grid would be right on the example alone."""
    rope = dinov3_sdt().encoder.backbone.rope
    for shape in [(5, 7), (3, 11), (1, 4)]:
        found = exports._Rotary(rope, "x").get_embed(shape)
        torch.testing.assert_close(found, rope.get_embed(shape=list(shape)), atol=1e-6, rtol=0)


def test_other_rotary_positions_are_refused():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="rope_vit: its rotary positions .Other. cannot be exported"):
        exports._Rotary(Other(), "rope_vit")


def test_export_writes_onnx_beside_the_student_and_checks_it(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = tiny("dinov3_vits16", "sdt_fast", fusion_channels=8, widths=[8, 8, 8, 8])
    checkpoint.save(student, tmp_path / "s", card={"name": "tiny", "licence": "Apache-2.0"})
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--onnx", "--program"]) == 0
    path = tmp_path / "o" / "model.onnx"
    assert f"{path}" in capsys.readouterr().out
    images = torch.rand(3, 3, 97, 50, generator=torch.Generator().manual_seed(2))
    found, expected = exports.run_onnx(path)(images), student(images)
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=0)
    program = torch.export.load(tmp_path / "o" / "model.pt2").module()
    torch.testing.assert_close(program(images), expected, atol=1e-4 * float(expected.std()), rtol=0)
    model = onnx.load(path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["licence"] == "Apache-2.0" and said["kind"] == "affine_disparity"
    names = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert names == [["batch", 3, "height", "width"]]
    # A later save must not leave a graph of other weights behind.
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o")]) == 0
    assert not path.exists()


def test_a_graph_that_differs_is_refused():
    student = dinov3_sdt()
    assert exports.parity(student, lambda images: student(images).detach(), "x.onnx") == 0.0
    with pytest.raises(ValueError, match="x.onnx: differs from torch by .* do not use it"):
        exports.parity(student, lambda images: student(images).detach() * 1.01, "x.onnx")
    with pytest.raises(ValueError, match="x.onnx: gives"):
        exports.parity(student, lambda images: student(images).detach()[:, 1:], "x.onnx")


def test_without_the_extra_the_line_names_it(tmp_path, monkeypatch):
    found = importlib.import_module

    def missing(name):
        if name == "onnx":
            raise ModuleNotFoundError(name=name)
        return found(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"onnx is not installed; pip install 'depth-distill\[export\]'"):
        exports.write_onnx(dinov3_sdt(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_program_traced_on_an_even_grid_takes_odd_ones():
    """DPT's coarsest level is half the grid, rounded up: a branch on equal sizes would be kept as the tracer saw it."""
    student = tiny("dinov2_vits14", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])
    assert exports.parity(student, exports.to_program(student).module(), "x") <= exports.TOLERANCE
