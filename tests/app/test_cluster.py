"""Labelling on a Ray cluster whose node dies makes one worker's bytes."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from distill.app import build, cluster, console
from distill.app.cli import main
from distill.app.recipe import load
from distill.app.status import sentence
from distill.labelling.leases import NOTES, FolderLeases
from distill.labelling.run_status import RunStatus

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
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    manifest = json.loads(found.pop("manifest.json"))  # it has the recipe, whose run.out differs
    found.pop("README.md")
    return found, {key: value for key, value in manifest.items() if key not in ("recipe", "sha256", "seal")}


def test_workers_have_a_gpu_each_unless_the_recipe_says_cpu(tmp_path):
    on_cpu = load(recipe(tmp_path, "a"), command="label")
    on_gpu = load(recipe(tmp_path, "a"), ["run.device=cuda", "labels.threads=8"], command="label")
    assert cluster.resources(on_cpu) == {"num_cpus": 1.0}
    wanted = cluster.resources(on_gpu)
    assert wanted == {"num_cpus": 8.0, "num_gpus": 1.0}
    big, small = {"CPU": 64.0, "GPU": 4.0}, {"CPU": 15.0, "GPU": 4.0}
    assert [cluster.slots(wanted, nodes) for nodes in ([], [big], [big, small], [small, small])] == [1, 4, 5, 2]


def test_the_command_line_has_workers_and_their_status(tmp_path, capsys, monkeypatch):
    path = str(recipe(tmp_path, "one", 6))
    assert main(["status", path]) == 1 and "not started" in capsys.readouterr().out
    assert main(["label", path]) == 0
    other = str(recipe(tmp_path, "two", 6))
    assert main(["label", other, "--worker"]) == 0
    capsys.readouterr()
    assert main(["status", other]) == 0 and "complete; 3 of 3 parts, 6 of 6 images" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["label", str(recipe(tmp_path, "three", 6))]) == 0, "any one of several processes can do it all"
    assert labels(tmp_path, "one") == labels(tmp_path, "two") == labels(tmp_path, "three")
    idle = RunStatus(False, 4, 1, 8, 2, False, (), (), ())
    assert (
        sentence(idle) == "1 of about 4 parts, 2 of about 8 images, 0 running, 0 lost, 0 images/s, no worker is running"
    )


class FakeRay:
    """Ray as far as `label_on` uses it, in this process: actors whose calls are made when they are waited for."""

    class exceptions:  # noqa: N801
        class RayTaskError(Exception):  # noqa: N818
            def as_instanceof_cause(self):
                return self.__cause__

            cause = property(as_instanceof_cause)

        class RayActorError(Exception):
            pass

    @dataclass(eq=False)
    class Call:
        call: Callable[[], object]
        number: int

    def __init__(self, nodes, fate):
        self.all, self.fate, self.asked, self.actors = nodes, fate, [], 0
        self.remote = lambda **wanted: lambda kind: SimpleNamespace(remote=lambda *a: self.actor(kind(*a)))

    def actor(self, one):
        number, self.actors = self.actors, self.actors + 1
        return SimpleNamespace(part=SimpleNamespace(remote=lambda: self.Call(one.part, number)))

    def init(self, **options):
        self.asked.append(options)

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": n}} for n in self.all]

    def wait(self, calls, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        if error := self.fate(call.number):
            raise error
        try:
            return call.call()
        except Exception as error:  # as Ray does with whatever a task raises
            raise self.exceptions.RayTaskError from error

    def kill(self, actor):
        pass


@pytest.fixture
def on_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_node", lambda: "node")
    monkeypatch.setattr(console, "quiet", lambda *on: None)  # the actors are in this process

    def label(name, fate, nodes=(1.0, 1.0)):
        fake = FakeRay(nodes, fate)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake, cluster.label_on(load(recipe(tmp_path, name, 6), command="label"), "", look_s=0.0)

    return label


def test_actors_label_part_by_part_and_one_that_dies_has_another_in_its_place(tmp_path, on_ray, capsys):
    assert main(["label", str(recipe(tmp_path, "one", 6))]) == 0
    deaths = [FakeRay.exceptions.RayActorError()]
    fake, outcome = on_ray("ray", lambda number: deaths.pop() if number == 0 and deaths else None)
    assert fake.actors >= 3 and (outcome.complete, outcome.parts, outcome.images) == (True, 3, 6)
    assert labels(tmp_path, "ray") == labels(tmp_path, "one")
    told = capsys.readouterr()
    assert "0 images in quarantine; 1 worker died" in told.err and f"{socket.gethostname()} node" in told.out
    assert "6 samples in 3 tars" in told.out


def test_what_fails_on_ray_is_raised_and_a_part_that_kills_is_named(tmp_path, on_ray, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")
        yield

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(cluster, "label_by_parts", full)
        on_ray("full", lambda number: None)
    made = load(recipe(tmp_path, "deadly", 6), command="label")
    card = {"host": "a", "device": "cuda", "part": "x-000.tar", "ended": False, "parts": 0, "lost": 0, "seconds": 1.0}
    for pid in range(3):
        cluster.worker_meeting(made, build.labels_folder(made)).write_note(f"worker-{pid}", {**card, "pid": pid})
    with pytest.raises(ChildProcessError, match="x-000.tar: 3 workers were killed while labelling it"):
        on_ray("deadly", lambda number: FakeRay.exceptions.RayActorError())


def test_a_node_that_dies_on_a_ray_cluster(tmp_path, capsys):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    assert main(["label", str(recipe(tmp_path, "one"))]) == 0
    capsys.readouterr()
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
    told = capsys.readouterr()
    assert "1 worker died" in told.err and "images/s a worker" in told.out
    assert labels(tmp_path, "ray") == labels(tmp_path, "one")
