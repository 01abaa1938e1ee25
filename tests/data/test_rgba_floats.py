"""TartanAir V2's depth, float32 in the bytes of RGBA pixels: read by its name, told from pictures without it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from distill.data.maps import BadMapError, read_map
from distill.data.pairs import read_pairs

NAME = "000012_rcam_back_depth.png"


def packed(depth):
    """Depth (H,W) as the authors' writer gives it to OpenCV."""
    return np.ascontiguousarray(depth, "<f4")[..., None].view(np.uint8)


@pytest.fixture
def depth():
    y, x = np.mgrid[:8, :10]
    return (0.7 + 0.3 * x + 1.1 * y).astype(np.float32)


def test_the_lowest_byte_is_blue_and_the_highest_is_alpha(tmp_path):
    """1.7 is 0x3FD9999A; 10000 is 0x461C4000."""
    rgba = np.array([[[0xD9, 0x99, 0x9A, 0x3F], [0x1C, 0x40, 0x00, 0x46]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / NAME)
    assert read_map(tmp_path / NAME).tolist() == [[np.float32(1.7), 10000.0]]


def test_it_is_read_as_the_authors_read_it_bit_by_bit(tmp_path, depth):
    depth[0, :3] = 0.0, np.inf, 3e8  # no pixel needs to be a depth of an ordinary scene
    cv2.imwrite(str(tmp_path / NAME), packed(depth))
    theirs = cv2.imread(str(tmp_path / NAME), cv2.IMREAD_UNCHANGED).view("<f4")[..., 0]
    ours = read_map(tmp_path / NAME)
    assert ours.dtype == np.float32 and ours.tobytes() == theirs.tobytes() == depth.tobytes()


def test_a_table_of_pairs_reads_it(tmp_path, depth):
    cv2.imwrite(str(tmp_path / NAME), packed(depth))
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "INDEX.tsv").write_text(f"name\trgb\tdepth\tscale_to_metres\tinvalid\na\ta.png\t{NAME}\t1\t>=9\n")
    [pair] = read_pairs(tmp_path)
    truth = pair.truth()
    assert np.array_equal(truth.values[0].numpy(), np.where(depth < 9, depth, 0))


def test_under_another_name_it_is_refused_by_what_it_is(tmp_path, depth):
    cv2.imwrite(str(tmp_path / "depth.png"), packed(depth))
    with pytest.raises(BadMapError, match=r"TartanAir V2's depth, which is only read by its own name .000000_lcam_fr"):
        read_map(tmp_path / "depth.png")


def test_pictures_of_maps_stay_pictures_whatever_their_name(tmp_path, depth):
    colours = np.random.default_rng(0).integers(0, 256, (8, 10, 4), np.uint8)
    for alpha in (255, 0, 128):
        colours[..., 3] = alpha
        Image.fromarray(colours).save(tmp_path / "plain.png")
        with pytest.raises(BadMapError, match="^has 4 channels: a picture, not a map; a depth map has one channel"):
            read_map(tmp_path / "plain.png")
    colours[..., 3] = 255
    Image.fromarray(colours).save(tmp_path / NAME)
    with pytest.raises(BadMapError, match="^has 4 channels, but not in four bytes the float32 of TartanAir V2's depth"):
        read_map(tmp_path / NAME)
    grey = np.dstack([np.repeat(colours[..., :1], 3, axis=-1), colours[..., 3:]])
    Image.fromarray(grey).save(tmp_path / NAME)  # opaque grey was always read
    assert np.array_equal(read_map(tmp_path / NAME), grey[..., 0])
