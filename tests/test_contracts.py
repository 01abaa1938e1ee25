"""What every plug-in must keep, by walking the four folders: adding a file adds its tests.

The depth of each contract stands with its room (test_decoders, test_teachers, test_losses, test_score); here are the
promises that the rest of the house relies on.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.core.plugins import find, name_fault, names, option_faults
from distill.eval.protocol import Protocol
from distill.students import Student
from distill.students.encoder import Encoder
from distill.teachers import Card

FOLDERS = {
    "distill.teachers": {"depth_anything_v2", "checkpoint", "stored"},
    "distill.students.decoders": {"sdt", "dpt"},
    "distill.losses.normalize": {"global", "hybrid", "local", "none"},
    "distill.eval.benchmarks": {"scenes", "pairs", "nyu", "kitti", "eth3d", "scannet", "diode"},
}
TINY = {"encoder": "vit_tiny_patch16_224", "blocks": [0, 1]}


@pytest.mark.parametrize("folder", list(FOLDERS))
def test_the_folders_are_not_empty(folder):
    assert FOLDERS[folder] <= set(names(folder))


@pytest.mark.parametrize("folder", list(FOLDERS))
def test_an_unknown_name_is_answered_with_the_known_ones(folder):
    near = names(folder)[0] + "x"
    with pytest.raises(LookupError, match=f"did you mean {names(folder)[0]}"):
        find(folder, near)
    assert all(name in name_fault(folder, "zzz") for name in names(folder))


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("distill.teachers"))
def test_a_teacher_has_cards_and_the_two_verbs(name):
    plugin = find("distill.teachers", name)
    assert plugin.CARDS and all(isinstance(card, Card) and card.name == name for card in plugin.CARDS)
    for card in plugin.CARDS:
        assert card.weights and card.licence and card.code_licence and isinstance(card.kind, Kind)
        assert not (card.commercial and "NC" in card.licence.upper().replace("-", " ").split())
    parameters = inspect.signature(plugin.Teacher.load).parameters
    assert list(parameters)[0] == "weights"
    for keyword in ("device", "dtype"):
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert "images" in inspect.signature(plugin.Teacher.predict).parameters
    assert option_faults(plugin.Teacher.load, {"reszie": 1}, "options")[0].startswith("unknown key options.reszie")


@pytest.mark.parametrize("name", [n for n in names("distill.teachers") if n not in ("analytic", "checkpoint")])
def test_missing_weights_end_in_one_line_that_names_them(name, tmp_path):
    with pytest.raises((OSError, ValueError, LookupError)) as caught:
        find("distill.teachers", name).Teacher.load(str(tmp_path / "nowhere" / "w.pth"))
    said = str(caught.value)
    assert "nowhere" in said and "\n" not in said and len(said) < 500


def test_the_embedded_teacher_keeps_size_kind_and_batch():
    teacher = find("distill.teachers", "checkpoint").Teacher.load("pocket")
    images = torch.rand(3, 3, 61, 90)
    whole = teacher.predict(images)
    assert isinstance(whole, DepthMap) and whole.kind == teacher.card.kind == "affine_disparity"
    assert whole.values.shape == (3, 61, 90) and whole.valid.all() and torch.isfinite(whole.values).all()
    alone = torch.cat([teacher.predict(images[i : i + 1]).values for i in range(3)])
    torch.testing.assert_close(alone, whole.values, atol=1e-4, rtol=1e-4)


# --- decoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(TINY["encoder"], blocks=TINY["blocks"])


@pytest.mark.parametrize("name", names("distill.students.decoders"))
def test_a_decoder_gives_any_image_size_a_map_and_every_parameter_a_gradient(name, encoder):
    decoder = find("distill.students.decoders", name).Decoder(in_channels=[encoder.channels] * 4, **small(name))
    student = Student(encoder, decoder)
    for size in [(32, 48), (33, 50)]:
        assert student(torch.rand(2, 3, *size)).shape == (2, *size)
    student(torch.rand(2, 3, 48, 48)).square().mean().backward()
    without = [key for key, p in decoder.named_parameters() if p.grad is None]
    assert not without


def small(name: str) -> dict[str, object]:
    narrow = {"fusion_channels": 32, "channels": 16, "post_process_channels": [8, 8, 8, 8]}
    known = inspect.signature(find("distill.students.decoders", name).Decoder).parameters
    return {key: value for key, value in narrow.items() if key in known}


# --- normalizations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("distill.losses.normalize"))
def test_a_normalization_compares_per_image_and_says_what_it_ignores(name):
    plugin = find("distill.losses.normalize", name)
    g = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 16, 16, generator=g), torch.rand(2, 16, 16, generator=g)
    valid = torch.rand(2, 16, 16, generator=g) > 0.2
    loss, live, dead = plugin.compare(pred, target, valid)
    assert loss.shape == live.shape == dead.shape == (2,)
    same = torch.allclose(plugin.compare(3 * pred + 1, target, valid).loss, loss, rtol=1e-4)
    assert same is plugin.INVARIANT
    assert torch.allclose(plugin.compare(target, target, valid).loss, torch.zeros(2), atol=1e-6)


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("distill.eval.benchmarks"))
def test_a_benchmark_has_a_protocol_of_its_name_and_names_a_missing_root(name, tmp_path):
    plugin = find("distill.eval.benchmarks", name)
    assert isinstance(plugin.PROTOCOL, Protocol) and plugin.PROTOCOL.benchmark == name
    assert list(inspect.signature(plugin.samples).parameters)[:2] == ["root", "list_file"]
    if plugin.PROTOCOL.num_images and name in ("scenes", "motorcycle"):
        assert len(plugin.samples()) == plugin.PROTOCOL.num_images
        return
    with pytest.raises((OSError, ValueError, LookupError)) as caught:
        plugin.samples(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)
