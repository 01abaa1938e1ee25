"""Text, a list or a number where somebody else's JSON should hold a table: one line that names the file."""

from __future__ import annotations

import json

import pytest

from distill.core.plugins import find
from distill.teachers import WeightsMismatchError
from tests.teachers.asking import one_line

WRONG = (
    ("depth_anything_3", "config.json", "config", "da3-large"),
    ("depth_anything_3", "config.json", "config.net", ["net"]),
    ("depth_anything_3", "config.json", "config.net.out_layers", 4),
    ("depth_anything_3", "config.json", "config.net.out_layers", [0, 1, "2", 3]),
    ("depth_anything_3", "config.json", "config.net.out_layers", [-1, 1, 2, 3]),
    ("depth_anything_3", "config.json", "config.net.out_layers", [1, 1, 2, 3]),
    ("depth_anything_3", "config.json", "config.net.alt_start", [2]),
    ("depth_anything_v2", "config.json", "backbone_config", "dinov2"),
    ("depth_anything_v2", "config.json", "backbone_config.hidden_size", "384"),
    ("depth_anything_v2", "config.json", "backbone_config.hidden_act", "gelu9"),
    ("midas", "config.json", "backbone_config", ["beit"]),
    ("depth_pro", "config.json", "patch_model_config", "dinov2"),
    ("marigold", "unet/config.json", "block_out_channels", "wide"),
    ("marigold", "text_encoder/config.json", "hidden_size", {}),
    ("marigold", "scheduler/scheduler_config.json", "num_train_timesteps", "many"),
    ("marigold", "tokenizer/tokenizer_config.json", "bos_token", "text"),
    ("marigold", "model_index.json", "default_denoising_steps", "few"),
    ("marigold", "model_index.json", "default_processing_resolution", [768]),
)


@pytest.mark.parametrize(("name", "file", "key", "value"), WRONG)
def test_a_wrong_type_is_one_line_that_names_the_file(made, copy, name, file, key, value):
    path = copy(name) / file
    table = json.loads(path.read_text())
    *outer, last = key.split(".")
    inner = table
    for part in outer:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(table))
    with pytest.raises(WeightsMismatchError) as error:
        find("distill.teachers", name).Teacher.load(str(path.parents[file.count("/")]), **made(name)[1])
    assert str(path.parent) in one_line(error)


def test_numbers_as_text_and_an_unknown_name_of_the_model_are_taken(made, copy):
    folder = copy("depth_anything_3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_name": 3}))
    assert find("distill.teachers", "depth_anything_3").Teacher.load(str(folder), **made("depth_anything_3")[1])
    folder = copy("marigold")
    index = {"default_denoising_steps": "3", "default_processing_resolution": 48.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher = find("distill.teachers", "marigold").Teacher.load(str(folder))
    assert teacher.steps == 3 and teacher.native_size == 48 and type(teacher.native_size) is int
