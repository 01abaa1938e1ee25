"""The contact sheet: every part of a labels folder that a person should see, and numbers that are right."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.app import label_preview
from distill.app.cli import main
from distill.app.label_preview import PIXELS, _pixels, write_contact
from distill.core.depth import DepthMap, Kind
from distill.labelling.run import label
from tests.labelling.formula import CROPS, Formula, two_tars


class Double(Formula):
    """Another scale and shift of the same answer, but noise on the photo whose blue is 160 (see test_annotate.Sick)."""

    def predict(self, images):
        depth = super().predict(images)
        sick = ((images[:, 2].mean((1, 2)) * 255).round() - 160).abs() < 5
        noise = torch.rand(depth.values.shape, generator=torch.Generator().manual_seed(0))
        values = torch.where(sick[:, None, None], noise, 7 + 3 / depth.values)
        return DepthMap(values, depth.valid, Kind.AFFINE_DISPARITY)


@pytest.fixture
def folder(tmp_path):
    teachers = [("one", Formula()), ("two", Double(kind=Kind.AFFINE_DISPARITY))]
    assert label(two_tars(tmp_path), teachers, out=tmp_path / "labels", crops=CROPS).complete
    return tmp_path / "labels"


def test_the_page_shows_pictures_quarantine_and_the_photo_on_which_teachers_disagree(folder, tmp_path):
    before = {path.name for path in folder.iterdir()}
    html = write_contact(folder, tmp_path / "deep" / "page.html", shown=3).read_text()
    assert {path.name for path in folder.iterdir()} == before
    for section in ("samples", "disagreement", "histograms", "quarantine", "teachers"):
        assert f'id="{section}"' in html
    samples = html[html.index('id="samples"') : html.index('id="disagreement"')]
    assert samples.count("<figure") == 3 * (1 + 2 * 3) and "sa_0.tar:sa_0.jpg" in samples
    worst = html[html.index("The most disagreement") : html.index('id="histograms"')]
    first, second = re.findall(r"apart by ([0-9.]+)", worst)[:2]
    assert "sa_3.jpg" in worst[: worst.index("apart by")] and float(first) > 0.5, "noise has nothing in common"
    assert re.findall(r"sa_[0-9]+.jpg", worst)[:2] == ["sa_3.jpg", "sa_8.jpg"] and float(second) > 0.5
    assert [float(v) for v in re.findall(r"apart by ([0-9.]+)", worst)][2] < 0.01, "scale and shift are no disagreement"
    assert "not an image: it is text" in html
    assert "one against two" in html and "across: two, fitted to one" in html and html.count("<circle") > 100
    assert "http" not in html.replace("http://www.w3.org", ""), "it is read offline"


def test_the_verb_writes_it_into_the_folder(folder, capsys):
    assert main(["inspect", str(folder), "--shown", "1"]) == 0
    assert (folder / "contact.html").exists() and "contact.html" in capsys.readouterr().out
    assert main(["inspect", str(folder / "nowhere")]) == 2


@pytest.mark.parametrize("kind", [Kind.AFFINE_DISPARITY, Kind.METRIC_DEPTH])
def test_a_row_outlines_each_patch_and_shows_near_bright(monkeypatch, kind):
    tiles = {}
    monkeypatch.setattr(
        label_preview, "tile", lambda name, picture, *, note="", **_: tiles.update({name: (picture, note)}) or ""
    )
    values, valid = torch.arange(1.0, 101)[:, None].repeat(1, 100)[None], torch.ones(1, 100, 100, dtype=torch.bool)
    valid[:, :, :25] = False
    local = DepthMap(torch.arange(50.0)[:, None].repeat(1, 50)[None], valid[:, :50, 30:80], kind)
    boxes = torch.tensor([[[0.1, 0.3, 0.5, 0.9]]])
    labels = SimpleNamespace(shared=DepthMap(values, valid, kind), local=local, boxes=boxes)
    record = {"crop": {"side": 200}, "patches": [(20, 60, 40)], "image": {"origin": "a.jpg"}}
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    label_preview._picture_row(SimpleNamespace(key="k", image=image, record=record, labels={"one": labels}))
    drawn = np.argwhere(tiles["k"][0].any(-1))
    assert drawn.min(0).tolist() == [10, 30] and drawn.max(0).tolist() == [29, 49], "rows, then columns"
    assert tiles["k"][1] == "200 px" and tiles["one"][1] == "75 % valid"
    assert tiles["one: patch 1 in the region"][1] == "60 px" and tiles["one: patch 1 alone"][1] == "50 px"
    for name in ("one", "one: patch 1 in the region", "one: patch 1 alone"):
        top, bottom = (tiles[name][0][row, -5].astype(int).sum() for row in (2, -3))
        assert (bottom > top) == (kind.quantity == "disparity"), name


def test_numbers_of_the_page():
    assert [label_preview._evenly(*given) for given in ((10, 3), (2, 5), (0, 3))] == [[0, 4, 9], [0, 1], []]
    values = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    left, right = (torch.arange(20)[None, None].repeat(1, 20, 1) < column for column in (10, 20))
    wild = DepthMap(torch.where(left, 2 + values, -9 * values), left, Kind.AFFINE_DISPARITY)
    for pair in ((DepthMap(values, right, Kind.AFFINE_DISPARITY), wild), (wild, DepthMap(values, right, wild.kind))):
        assert label_preview._pair_error(*pair) < 1e-3, "where both have a value"
    labels = {"one": SimpleNamespace(shared=wild)}
    seen = label_preview._statistics(SimpleNamespace(key="k", record={"crop": {"side": 70}}, labels=labels))
    assert (seen.key, seen.side, seen.valid) == ("k", 70, {"one": 0.5}) and seen.shape["one"].sum() == pytest.approx(
        0.96
    )
    page = label_preview._quarantine([{"origin": f"{i}.jpg", "reason": f"truncated: {i}"} for i in range(3)])
    assert re.search(r">truncated</t.>\s*<td[^>]*>3<", page) and "all 3" in page
    manifest = {"shards": [{"bytes": 1_000_000}, {"bytes": 2_000_000}], "images": {"count": 9}, "teachers": {"one": {}}}
    manifest |= {"quarantine": [1] * 5, "settings": {"codec": "zst"}, "licence": {"images": "mine"}}
    facts = label_preview._facts(Path("HASH"), manifest, 4)
    for word in ("4 of 9 images", "2, 3.0 MB", "750 kB", "zst", "mine", "HASH/", ">5<"):
        assert word in facts, word


def test_a_scale_and_a_shift_leave_every_pixel_on_the_line():
    """What the chart of agreement draws (Fig. 9 of Distill-Any-Depth), of two maps that say the same, and of noise."""
    values = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 20, 20, dtype=torch.bool)
    valid[:, :3] = False
    one = DepthMap(values, valid, Kind.AFFINE_DISPARITY)
    two = DepthMap(3 + 0.1 * values, torch.ones_like(valid), Kind.AFFINE_DISPARITY)
    points = torch.tensor(_pixels(one, two))
    assert len(points) == PIXELS and (points[:, 0] - points[:, 1]).abs().max() < 1e-4
    assert points.min() < 0.1 and points.max() > 0.9
    noise = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(1))
    apart = torch.tensor(_pixels(one, DepthMap(noise, valid, Kind.AFFINE_DISPARITY)))
    assert (apart[:, 0] - apart[:, 1]).abs().max() > 0.3
    nothing = DepthMap(values, torch.zeros_like(valid), Kind.AFFINE_DISPARITY)
    assert _pixels(one, nothing) == []
