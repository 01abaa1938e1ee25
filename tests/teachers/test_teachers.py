"""What every file in teachers/ keeps: the contract on tiny random models, strict weights, clear errors."""

from __future__ import annotations

import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

from distill.app.cli import main
from distill.core.depth import DepthMap, Kind
from distill.core.plugins import find
from tests import tiny_teachers as tiny
from tests.teachers.asking import IMAGES, NAMES, NETWORKS, RESIZING, load, one_line, predict
from tests.tiny_teachers import KEYS, SIZE

pytestmark = pytest.mark.usefixtures("parts_read_once")


def test_there_are_teachers():
    assert {"analytic", "checkpoint", "depth_anything_v2", "depth_anything_3", "marigold", "genpercept"} <= set(NAMES)
    for name in NAMES:
        assert hasattr(tiny, name), f"tests/tiny_teachers.py has no {name}(folder): the contract cannot be tested"


@pytest.mark.parametrize("name", NAMES)
def test_cards_and_signature(name):
    module = find("distill.teachers", name)
    assert module.CARDS and all(card.name == name for card in module.CARDS)
    assert len({card.weights for card in module.CARDS}) == len(module.CARDS)
    for card in module.CARDS:
        assert isinstance(card.kind, Kind) and card.licence and card.code_licence and card.source
        assert not (card.commercial and "NC" in card.licence)
    parameters = inspect.signature(module.Teacher.load).parameters
    assert list(parameters)[:3] == ["weights", "device", "dtype"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])
    seeded = "keys" in inspect.signature(module.Teacher.predict).parameters
    assert all(card.seeded == seeded for card in module.CARDS)


def test_the_list_of_teachers(capsys):
    """Kind, direction, size, licences, commercial use, revision: readable at 100 columns."""
    assert main(["list", "teachers"]) == 0
    said = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100
    for name in NAMES:
        for card in find("distill.teachers", name).CARDS:
            assert card.weights in said and card.licence in said and card.code_licence in said
    for words in (
        "depth_anything_v2: affine_disparity, larger is nearer; native size 518, sides multiples of 14",
        "depth_anything_3: metric_depth, larger is farther; native size 504, sides multiples of 14",
        "licence of weights and code: MIT",
    ):
        assert words in said
    row = next(line for line in said.splitlines() if line.startswith("pocket"))
    assert row.split()[1] == "no" and len(row.split()[2]) == 10


@pytest.fixture
def anew():
    """Teachers are imported anew, where their heavy libraries cannot be; afterwards all is as it was."""
    package, heavy = sys.modules["distill.teachers"], ("transformers", "diffusers", "scipy", "huggingface_hub")
    modules, attributes = dict(sys.modules), dict(vars(package))
    for name in modules:
        if name.startswith("distill.teachers.") or name.partition(".")[0] in heavy:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(heavy))
    yield
    for name in [name for name in sys.modules if name.startswith("distill.teachers.") or name in heavy]:
        del sys.modules[name]
    sys.modules.update(modules)
    vars(package).clear()
    vars(package).update(attributes)


def test_importing_every_teacher_is_cheap(anew):
    """What else they import is theirs to import (tests/test_layout.py); the package's own top is read as it lies."""
    for name in NAMES:
        assert importlib.import_module(f"distill.teachers.{name}").CARDS


@pytest.mark.parametrize("name", NAMES)
def test_contract(made, name):
    teacher = load(made, name)
    before = IMAGES.clone()
    both = predict(teacher, IMAGES)
    assert torch.equal(IMAGES, before)
    assert isinstance(both, DepthMap) and both.kind == teacher.card.kind and teacher.card.name == name
    assert both.values.shape == (2, *SIZE) and both.values.dtype == torch.float32 and not both.values.requires_grad
    assert both.valid.all() and torch.isfinite(both.values).all()
    for i, key in enumerate(KEYS):
        one = predict(teacher, IMAGES[i : i + 1], [key])
        torch.testing.assert_close(one.values, both.values[i : i + 1], atol=2e-5, rtol=2e-5)
    assert torch.equal(predict(teacher, IMAGES).values, both.values), "the same question has the same answer"
    assert (both.values[0] - both.values[1]).abs().max() > 1e-4, "it looks at the image"
    assert both.values[0].std() > 1e-4


@pytest.mark.parametrize("name", RESIZING)
def test_sizes(made, name):
    none = load(made, name, resize="none")
    for height, width in ((40, 31), (64, 32)):
        images = torch.rand(1, 3, height, width)
        assert predict(none, images, KEYS[:1]).values.shape == (1, height, width)
    with pytest.raises(ValueError, match="native_size has no meaning"):
        find("distill.teachers", name).Teacher.load(made(name)[0], resize="none", native_size=64)
    with pytest.raises(ValueError, match="resize must be"):
        find("distill.teachers", name).Teacher.load(made(name)[0], resize="squash")
    smaller = load(made, name, native_size=32)
    assert smaller.card.native_size == 32
    out = predict(smaller, IMAGES)
    assert out.values.shape == (2, *SIZE)
    assert (out.values - predict(none, IMAGES).values).abs().max() > 1e-4, "native_size changes what the network sees"


@pytest.mark.parametrize("name", NAMES)
def test_values_outside_the_range_are_seen(made, name):
    if name == "stored":
        return
    teacher = load(made, name, **({"resize": "none"} if name in RESIZING else {}))
    inside, outside = (predict(teacher, IMAGES * factor).values for factor in (1.0, 1.2))
    clamped = predict(teacher, (IMAGES * 1.2).clamp(0, 1)).values
    assert torch.isfinite(outside).all()
    assert (outside - inside).abs().max() > 1e-4 and (outside - clamped).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_images_at_the_door(made, name):
    teacher = load(made, name)
    for bad in (IMAGES[0], IMAGES[:, :2], (IMAGES * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match="images must be") as error:
            predict(teacher, bad)
        one_line(error)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_stays_near(made, name):
    full = predict(load(made, name), IMAGES).values
    half = predict(load(made, name, dtype=torch.bfloat16), IMAGES)
    assert half.values.dtype == torch.float32 and torch.isfinite(half.values).all()
    assert np.corrcoef(full.flatten(), half.values.flatten())[0, 1] > 0.9
    assert not torch.equal(full, half.values), "the dtype that was asked for is used"
