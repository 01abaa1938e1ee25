"""Labelling on a Ray cluster whose node dies makes one worker's bytes."""

from __future__ import annotations

import json
import threading
import time

import pytest

from distill.app import build, cluster
from distill.app.cli import main
from distill.app.recipe import load
from distill.app.status import sentence
from distill.labelling.leases import NOTES, FolderLeases
from distill.labelling.standing import Standing

RECIPE = """
[run]
name = "many"
out = "{out}"
device = "cpu"
[[images]]
scenes = {scenes}
size = 56
[crops]
size = 28
min_side = 40
patches = "none"
[[teachers]]
name = "truth"
options = {{ own_range = true }}
[labels]
samples_per_part = 2
threads = 1
"""


def recipe(tmp_path, name, scenes=24):
    path = tmp_path / f"{name}.toml"
    path.write_text(RECIPE.format(out=tmp_path / name, scenes=scenes))
    return path


def labels(tmp_path, name):
    folder = build.labels_folder(load(tmp_path / f"{name}.toml", command="label"))
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found.pop("manifest.json"))  # it has the recipe, whose run.out differs
    found.pop("README.md")
    return found, {key: value for key, value in manifest.items() if key not in ("recipe", "sha256", "seal")}


def test_workers_have_a_gpu_each_unless_the_recipe_says_cpu(tmp_path):
    on_cpu = load(recipe(tmp_path, "a"), command="label")
    on_gpu = load(recipe(tmp_path, "a"), ["run.device=cuda", "labels.threads=8"], command="label")
    assert cluster.resources(on_cpu) == {"num_cpus": 1.0}
    wanted = cluster.resources(on_gpu)
    assert wanted == {"num_cpus": 8.0, "num_gpus": 1.0}
    assert [cluster.slots(wanted, there) for there in ({}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 17.0, "GPU": 4.0})] == [
        1,
        4,
        2,
    ]


def test_the_command_line_has_workers_and_their_status(tmp_path, capsys, monkeypatch):
    path = str(recipe(tmp_path, "one", 6))
    assert main(["status", path]) == 1 and "not begun" in capsys.readouterr().out
    assert main(["label", path]) == 0
    other = str(recipe(tmp_path, "two", 6))
    assert main(["label", other, "--worker"]) == 0
    capsys.readouterr()
    assert main(["status", other]) == 0 and "complete; 3 of 3 parts, 6 of 6 images" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["label", str(recipe(tmp_path, "three", 6))]) == 0, "any one of several processes can do it all"
    assert labels(tmp_path, "one") == labels(tmp_path, "two") == labels(tmp_path, "three")
    idle = Standing(False, 4, 1, 8, 2, False, (), (), (), None)
    assert sentence(idle) == "1 of about 4 parts, 2 of about 8 images, 0 running, 0 lost, 0 images/s, nobody works"


def test_a_node_that_dies_on_a_ray_cluster(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    assert main(["label", str(recipe(tmp_path, "one"))]) == 0
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    made = load(recipe(tmp_path, "ray"), command="label")
    killed = []

    def pids():
        return {holder.pid for holder in FolderLeases(build.labels_folder(made) / NOTES).holders()}

    def kill():
        while len(pids()) < 2:
            time.sleep(0.01)
        killed.append(len(list(build.labels_folder(made).glob("*.tar"))))
        nodes.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        cluster.label_on(made, nodes.address, look_s=0.5)
        killer.join(timeout=60)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert killed and killed[0] < 12, "both worked, and not all was made"
    assert labels(tmp_path, "ray") == labels(tmp_path, "one")
