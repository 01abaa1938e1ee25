"""What the processes of one run exchange and must agree on. Threads stand for processes, each with its share."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.app import ablate
from distill.core.seal import sealed
from distill.training import checkpoints, parallel, state, step
from tests.training.test_step import noise, some_run
from tests.training.toys import run, settings


def together(count, call):
    """[call(processes) of each process], or the errors that they ended with."""
    barrier, slots, results = threading.Barrier(count, timeout=5), [None] * count, [None] * count

    def exchange(index, value):
        slots[index] = value
        barrier.wait()
        every = list(slots)
        barrier.wait()
        return every

    def one(index):
        processes = state.Processes(
            index=index,
            count=count,
            device=torch.device("cpu"),
            add=lambda values: torch.stack(exchange(index, values)).sum(0),
            gather=lambda values: [value for own in exchange(index, values) for value in own],
            share=lambda value: exchange(index, value)[0],
            wait=lambda: exchange(index, None) and None,
            without_exchange=lambda model: nullcontext(),
            track=lambda numbers, number: None,
        )
        try:
            results[index] = call(processes)
        except (ValueError, OSError, threading.BrokenBarrierError) as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- what must be alike -----------------------------------------------------------------------------------------------


def test_processes_with_other_settings_or_labels_are_refused_in_all():
    given = [(settings(workers=2), {"data": "a"}), (settings(lr=0.5), {"data": "a"}), (settings(), {"data": "b"})]
    errors = together(3, lambda processes: parallel.check_alike(processes, *given[processes.index]))
    wanted = "all processes of a run need the same recipe and labels: process 1: lr = 0.5, not 0.01; "
    assert [str(error) for error in errors] == [wanted + "process 2: data = 'b', not 'a'"] * 3
    assert together(1, lambda processes: parallel.check_alike(processes, *given[0])) == [None]
    assert parallel.check_alike(some_run(Path("none")).processes, *given[1]) is None


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of 4 steps with a checkpoint of step 2."""
    out = tmp_path_factory.mktemp("kept")
    run(out, steps=4, save_every=2, val_fraction=0.0)
    return out


def copied(kept, folder):
    """The checkpoint of step 2 in a folder of its own."""
    target = checkpoints.folder_of(folder, 2)
    for path in checkpoints.folder_of(kept, 2).rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(checkpoints.folder_of(kept, 2))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def same(outs):
    return together(len(outs), lambda p: parallel.same_checkpoint(p, outs[p.index], 2))


def test_a_machine_without_the_checkpoint_gets_it_and_a_shared_folder_is_left_alone(kept, tmp_path):
    assert same([kept, tmp_path / "a", tmp_path / "b"]) == [None] * 3
    for name in ("a", "b"):
        [got] = checkpoints.find(tmp_path / name)
        assert got.step == 2 and not got.is_damaged and got.digest == checkpoints.find(kept)[0].digest
    assert same([kept, kept]) == [None] * 2


@pytest.mark.parametrize("fault", ["bytes", "run"])
def test_a_copy_that_is_not_the_main_processs_is_refused_in_all(kept, tmp_path, fault):
    """Its process would go on from other weights than the rest, and nothing would show it."""
    folder = copied(kept, tmp_path)
    assert same([kept, tmp_path]) == [None] * 2
    if fault == "bytes":
        data = bytearray((folder / "training.safetensors").read_bytes())
        data[-5] ^= 64
        (folder / "training.safetensors").write_bytes(data)
    else:
        table = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(sealed({**table, "loss": table["loss"] + 1.0})))
    errors = same([kept, tmp_path, kept])
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], ValueError)
    assert f"checkpoint of step 2: {folder} on " in str(errors[0]) and str(kept) not in str(errors[0])


# --- what one of them meets -------------------------------------------------------------------------------------------


def test_the_image_of_another_process_that_is_not_finite_is_named(tmp_path):
    def one(processes):
        micro = noise(processes.index, 4)
        micro = replace(micro, keys=tuple(f"{processes.index}-{key}" for key in micro.keys))
        if processes.index == 1:
            micro.images[2] = torch.nan
        asked = some_run(tmp_path, log_every=5)
        asked.processes = processes
        return step.take_step(asked, iter([micro]))

    errors = together(2, one)
    for error in errors:
        assert isinstance(error, step.TrainingStoppedError) and "(not finite: 1-2)" in str(error)
    dumps = sorted(path.name for path in (tmp_path / "bad_batch_1").glob("*.json"))
    assert dumps == ["process-0.json", "process-1.json"]


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is ..."


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO), r"\(Connection closed by peer \[127.0.0.1\]:1\)"),
        (torch.distributed.DistBackendError("NCCL error\nremote"), r"\(NCCL error\)"),
    ],
)
def test_a_process_that_is_gone_is_one_line(tmp_path, error, reason):
    def struck(*_, **__):
        raise error

    with pytest.raises(OSError, match=f"^the connection to another process of this run is lost {reason}") as got:
        run(tmp_path, steps=4, objective=struck)
    assert "\n" not in str(got.value)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="^of a kernel$"), parallel.explain_lost_process():
        raise RuntimeError("of a kernel")


def test_a_study_is_not_run_by_a_launcher(tmp_path, monkeypatch):
    """Its processes would train different cells and average their gradients."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^a study starts its own processes: distill ablate STUDY --processes N"):
        ablate.run_studies([tmp_path / "study.toml"], out=tmp_path)
