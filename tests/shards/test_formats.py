"""docs/formats.md is enough to read labels: its Python, and the rule in the manifest, give what our reader gives."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.core.depth import Kind
from distill.shards.codec import CODECS, encode_map
from distill.shards.readme import describe_format
from distill.shards.shards import LabelDataset
from tests.shards.samples import make_sample, write

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def python_of_the_page():
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, scope)
    return scope


def test_the_pages_decoder_of_zst_gives_our_codes():
    values = torch.randn(31, 45).cumsum(0) + 100 * (torch.rand(31, 45) > 0.98)  # jumps of more than a byte, and holes
    data, _ = encode_map(values, torch.rand(31, 45) > 0.1, codec="zst")
    codes = CODECS["zst"].read(data)
    assert (codes == 0).any() and np.array_equal(python_of_the_page()["zst_decode"](data), codes)


def test_the_reader_of_the_page_reads_what_we_read(tmp_path):
    scope = python_of_the_page()
    folder = write(tmp_path / "labels", [make_sample(kind=Kind.METRIC_DISPARITY)])
    (sample,) = LabelDataset(folder)
    for teacher, labels in sample.labels.items():
        for patch in (None, 0, 1, 2):
            values, kind = scope["read_map"](folder / "sa_0-000.tar", sample.key, teacher, patch)
            ours, i = (labels.shared, 0) if patch is None else (labels.local, patch)
            assert kind == ours.kind and (np.isfinite(values) == ours.valid[i].numpy()).all()
            assert np.allclose(np.nan_to_num(values), ours.values[i].numpy(), atol=1e-6)
        # The rule stands in the sample itself, for whoever has one tar and no manifest.
        assert sample.record["decode"] == {"invalid_below": 8, "first": 16, "last": 65535}
        assert sample.record["labels"][teacher]["unit"] == "1/m"


@pytest.mark.parametrize("codec", list(CODECS))
def test_the_rule_of_the_manifest_is_what_the_codec_does(codec):
    rule, how = describe_format(codec), CODECS[codec]
    if "first" not in rule:
        return
    codes = np.arange(65536)
    unit = np.clip((codes - rule["first"]) / (rule["last"] - rule["first"]), 0, 1)
    assert np.array_equal(np.where(codes >= rule["invalid_below"], unit, np.nan), how.units, equal_nan=True)
    values = torch.linspace(0, 1, 64).reshape(8, 8)
    data, span = encode_map(values, torch.ones(8, 8, dtype=torch.bool), codec=codec)
    assert (how.read(data) >= rule["invalid_below"]).all() and span["valid"] == 64
