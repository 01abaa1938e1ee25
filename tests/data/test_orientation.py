"""A map whose file has an orientation tag meets its photograph as a viewer shows both."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from distill.data import maps, orientation
from distill.data.maps import read_map
from distill.data.packing import Packed
from distill.data.pairs import read_pairs
from distill.eval.stored import read_prediction
from distill.teachers import stored

STORED = (np.arange(1, 41) + 100 * np.arange(30)[:, None]).astype(np.uint16)


def exif(tag):
    table = Image.Exif()
    table[0x0112] = tag
    return table


def write(path, values, tag):
    options = {"tiffinfo": {0x0112: tag}} if path.suffix == ".tif" else {"exif": exif(tag)}
    Image.fromarray(values).save(path, **options)


def pair(folder, name, *, photo_tag, map_tag, values=STORED):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "a.jpg", exif=exif(photo_tag))
    write(folder / name, values, map_tag)
    (folder / "INDEX.tsv").write_text(f"name\trgb\tdepth\tscale_to_metres\nx\ta.jpg\t{name}\t1\n")
    [one] = read_pairs(folder)
    assert one.rgb().shape[1:] == one.truth().values.shape[1:]
    return one.truth().values[0].numpy()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("name", ["d.png", "d.tif"])
def test_a_map_is_read_as_a_viewer_shows_it(tmp_path, name, tag):
    upright = orientation.turn(STORED, tag)
    write(tmp_path / name, STORED, tag)
    assert np.array_equal(read_map(tmp_path / name), upright)
    assert np.array_equal(pair(tmp_path, name, photo_tag=tag, map_tag=tag), upright)
    assert np.array_equal(orientation.turn_back(upright, tag), STORED)


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
@pytest.mark.parametrize("name", ["d.png", "d.tif"])
def test_a_tag_that_was_copied_to_an_upright_map_is_passed_over(tmp_path, name, tag):
    upright = np.ascontiguousarray(orientation.turn(STORED, tag))
    assert np.array_equal(pair(tmp_path, name, photo_tag=tag, map_tag=tag, values=upright), upright)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_stored_prediction_of_an_upright_photograph_keeps_its_sides(tmp_path, name, tag):
    upright = np.ascontiguousarray(orientation.turn(STORED, tag))
    images = torch.zeros(1, 3, *upright.shape)
    teacher = stored.Teacher.load(str(tmp_path), kind="affine_disparity")
    for values in (STORED, upright) if tag >= 5 else (STORED,):
        write(tmp_path / name, values, tag)
        read, _ = read_prediction(tmp_path / name, upright.shape)
        assert np.array_equal(read, upright)
        assert np.array_equal(teacher.predict(images, keys=["a.jpg"]).values[0].numpy(), upright)


def test_a_map_without_a_tag_is_turned_with_its_photograph(tmp_path):
    assert np.array_equal(pair(tmp_path, "d.png", photo_tag=6, map_tag=1), orientation.turn(STORED, 6))


def test_of_several_pages_the_largest_has_the_tag(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STORED[:3, :4], extratags=[(274, 3, 1, 8, True)])
        file.write(STORED, extratags=[(274, 3, 1, 6, True)])
    assert np.array_equal(read_map(tmp_path / "a.tif"), orientation.turn(STORED, 6))


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"bigtiff": True, "byteorder": ">"}, {"byteorder": ">"}, {}])
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float64])
def test_every_kind_of_tiff_is_turned(tmp_path, options, dtype):
    tifffile.imwrite(tmp_path / "a.tif", STORED.astype(dtype), extratags=[(274, 3, 1, 6, True)], **options)
    assert np.array_equal(read_map(tmp_path / "a.tif"), orientation.turn(STORED.astype(dtype), 6))


def test_what_a_map_declares_survives_its_turn(tmp_path, monkeypatch):
    packed = STORED.view(Packed)
    packed.factor, packed.offset, packed.unit = 0.001, 0.0, "mm"
    write(tmp_path / "a.png", STORED, 3)
    turned = orientation.upright(packed, (tmp_path / "a.png").read_bytes())
    assert isinstance(turned, Packed) and turned.factor == 0.001 and np.array_equal(turned, STORED[::-1, ::-1])


@pytest.mark.parametrize("tag", [0, 9, "x"])
def test_a_tag_that_means_nothing_turns_nothing(tmp_path, tag):
    assert orientation._valid(tag if isinstance(tag, int) else b"x") == 1
    if isinstance(tag, int):
        write(tmp_path / "a.png", STORED, tag)
        assert np.array_equal(maps.read_map(tmp_path / "a.png"), STORED)
