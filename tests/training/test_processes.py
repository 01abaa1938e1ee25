"""What the processes of one run exchange and must agree on. Threads stand for processes, each with its share."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from distill.app import ablate
from distill.core import machine
from distill.core.crops import generator
from distill.core.seal import sealed
from distill.training import checkpoints, loading, parallel, state, step
from distill.training import train as train_module
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.heldout import HeldOutSamples, evaluate
from distill.training.resume import resume
from distill.training.sampling import MicroBatchPositions, Order
from distill.training.stopping import Stopped
from distill.training.trainlog import WALL_CLOCK
from tests.training.test_step import flat, noise, some_run
from tests.training.toys import Toys, collate, run, settings


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

    threads = [threading.Thread(target=one, args=(index,), name=str(index)) for index in range(count)]
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


def test_processes_may_differ_in_what_is_their_own_and_in_nothing_else():
    own = {"workers": 3, "keep_last": 5, "trackers": ("tensorboard",), "alarm_growth": 3.0, "compile": True}
    own |= {"gradient_checkpointing": True}
    given = [settings(), settings(**own)]
    assert together(2, lambda processes: parallel.check_alike(processes, given[processes.index], {})) == [None] * 2
    assert {*own} == parallel.OWN
    # The order of steps, evaluations and exchanges, what each process does to its own copy of the weights, and the
    # order of the gradients in memory: where it differs, one process fails and the others wait for it.
    differing = {"log_every": 2, "eval_batch_size": 4, "save_every": 5, "fused": True, "accumulate": 2}
    for name, value in {**differing, "channels_last": True}.items():
        given = [settings(), settings(**{name: value})]
        (error, _) = together(2, lambda processes, g=given: parallel.check_alike(processes, g[processes.index], {}))
        assert f"process 1: {name} = {value}" in str(error)


def test_processes_wait_longer_for_each_other_than_for_a_step_of_micro_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(parallel, "Accelerator", lambda **given: seen.append(given) or some_accelerator())
    parallel.accelerator_of(torch.nn.Identity(), settings(accumulate=4), Path("out"), device=None)
    [timeout] = [h.timeout for h in seen[0]["kwargs_handlers"] if isinstance(h, InitProcessGroupKwargs)]
    assert timeout.total_seconds() > 4 * loading.PATIENCE


def some_accelerator():
    return SimpleNamespace(distributed_type=DistributedType.NO)


def test_a_run_begins_with_what_must_be_alike(monkeypatch):
    asked = SimpleNamespace(index=1, share=lambda own: {**own, "lr": 0.5, "data": "b"}, gather=list)
    monkeypatch.setattr(parallel, "processes_of", lambda accelerator: asked)
    with pytest.raises(ValueError, match=r"process 1: data = 'a', not 'b'; process 1: lr = 0.01, not 0.5"):
        parallel.new_run(torch.nn.Identity(), None, settings(), facts={"data": "a"})


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


def test_one_process_of_a_machine_writes_what_it_gets(kept, tmp_path, monkeypatch):
    written, real = [], checkpoints.files.writing_folder
    local_rank = {"0": 0, "1": 0, "2": 1}
    monkeypatch.setattr(parallel.machine, "from_launcher", lambda *_: local_rank[threading.current_thread().name])
    monkeypatch.setattr(checkpoints.files, "writing_folder", lambda path: written.append(path) or real(path))
    assert same([kept, tmp_path, tmp_path]) == [None] * 3
    assert len(written) == 1 and checkpoints.find(tmp_path)[0].step == 2


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


def resumed(kept, outs):
    """What `resume` does in processes with these folders, and their runs."""
    facts = {name: checkpoints.find(kept)[0].state[name] for name in ("identity", "samples", "data")}
    runs = [some_run(out, steps=4, save_every=2) for out in outs]

    def one(processes):
        own = runs[processes.index]
        own.processes, own.facts = processes, facts
        resume(own, print)
        if own.log:
            own.log.close()

    return together(len(outs), one), runs


def test_all_processes_go_on_from_the_main_ones_newest_step(kept, tmp_path):
    copied(kept, tmp_path / "main")
    ended, runs = resumed(kept, [tmp_path / "main", tmp_path / "other"])
    assert ended == [None, None] and [own.step for own in runs] == [2, 2]
    assert [own.log is not None for own in runs] == [True, False]
    assert all(map(torch.equal, *(own.parameters for own in runs)))
    shutil.copytree(kept, tmp_path / "both")
    ended, runs = resumed(kept, [tmp_path / "both", tmp_path / "none"])
    assert ended == [None, None] and [own.step for own in runs] == [4, 4], "of two steps the newer one is handed out"
    errors, _ = resumed(kept, [tmp_path / "main", kept])
    assert {str(error).partition(":")[0] for error in errors} == {
        f"{out} is not the same folder on all machines, and the main process's has an older step ([2, 4])"
        for out in (tmp_path / "main", kept)
    }


# --- what one of them meets -------------------------------------------------------------------------------------------


def test_the_image_of_another_process_that_is_not_finite_is_named(tmp_path):
    runs = [some_run(tmp_path, log_every=5) for _ in range(2)]

    def one(processes):
        micro = noise(processes.index, 4)
        micro = replace(micro, keys=tuple(f"{processes.index}-{key}" for key in micro.keys))
        if processes.index == 1:
            micro.images[2] = torch.nan
        runs[processes.index].processes = processes
        return step.take_step(runs[processes.index], iter([micro]))

    errors = together(2, one)
    for error in errors:
        assert isinstance(error, step.TrainingStoppedError) and "(not finite: 1-2)" in str(error)
    dumps = sorted(path.name for path in (tmp_path / "bad_batch_1").glob("*.json"))
    assert dumps == ["process-0.json", "process-1.json"]


def test_a_process_that_is_told_to_stop_waits_for_the_main_ones_checkpoint():
    """A launcher that sees it end kills the others."""
    for step_, waits in ((7, [1]), (20, [])):
        waited: list[int] = []
        own = SimpleNamespace(step=step_, settings=settings(), evaluations_since_best=0)
        own.processes = SimpleNamespace(main=False, count=1, wait=lambda kept=waited: kept.append(1))
        with pytest.raises(Stopped) if waits else nullcontext():
            train_module._obey(own, print)
        assert waited == waits


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is ..."


def test_one_process_that_is_told_in_the_last_step_ends_all():
    def end(told):
        def one(processes):
            over = SimpleNamespace(step=20, settings=settings(), processes=processes, evaluations_since_best=0)
            over.told_to_stop = lambda: processes.index == told
            with suppress(Stopped):
                train_module._obey(over, None)
                going_on.append(processes.index)

        going_on: list[int] = []
        assert together(2, one) == [None] * 2
        return sorted(going_on)

    assert end(1) == [] and end(-1) == [0, 1]


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


# --- what the processes of one machine share --------------------------------------------------------------------------


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(machine, "open_files", lambda: None)
    monkeypatch.setattr(machine, "shared_memory", lambda: 100_000_000)
    for count, fits, readers in (("-1", True, (2, 4)), ("1", True, (2, 4)), ("2", True, (2, 1)), ("3", False, (0, 1))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert machine.has_shared_memory(50_000_000) is fits
        assert machine.readers(2, 4, size=8_000_000 if count != "3" else 10_000_000, tensors=8)[:2] == readers


# --- what each process takes ------------------------------------------------------------------------------------------


def test_parts_are_dealt_in_the_order_of_the_stream():
    """Part by part over the processes: dropout and the line's sums depend on it, and a run resumes with both."""
    cut = {"order": Order(tuple(range(20)), seed=0), "batch_size": 8, "accumulate": 2, "processes": 2, "steps": 5}
    taken = [MicroBatchPositions(process=process, **cut).after(3) for process in range(2)]
    places = [[[place.position - 24 for place in part] for part in positions] for positions in taken]
    assert [parts[:2] for parts in places] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert [len(positions) for positions in taken] == [len(parts) for parts in places] == [4, 4]


@pytest.mark.parametrize(("processes", "accumulate"), [(3, 1), (1, 3), (2, 8), (16, 1)])
def test_a_batch_is_cut_evenly_or_not_at_all(processes, accumulate):
    cut = {"order": Order(tuple(range(20)), 0), "batch_size": 8, "process": 0, "steps": 5}
    with pytest.raises(ValueError, match=rf"must be a multiple of .* \({processes} x {accumulate}\)"):
        MicroBatchPositions(accumulate=accumulate, processes=processes, **cut)
    with pytest.raises(ValueError, match="7 training samples are fewer than one batch of 8"):
        MicroBatchPositions(**{**cut, "order": Order(tuple(range(7)), 0)}, accumulate=1, processes=2)


# --- a step and an evaluation are those of the whole batch ------------------------------------------------------------


def test_two_halves_of_a_batch_are_the_batch(tmp_path):
    """A line is of all processes' images, and the mean of the gradients, as they exchange it, is the whole's."""
    images = noise(3, 4).images
    teachers = ("a", "b")

    def micro(at, names):
        taught = tuple(TaughtRows(rows, flat([1.0] * 2), name) for name, rows in names)
        return MicroBatch(tuple(map(str, at)), images[list(at)], taught, tuple(at))

    one = some_run(tmp_path, batch_size=4, clip_norm=0.0)
    rows = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    whole = step.take_step(one, iter([micro(range(4), list(zip(teachers, rows, strict=True)))]))
    runs = [some_run(tmp_path, batch_size=4, clip_norm=0.0) for _ in range(2)]

    def half(processes):
        own = runs[processes.index]
        own.processes, own.told_to_stop = processes, lambda: processes.index == 1
        at = range(2 * processes.index, 2 * processes.index + 2)
        return step.take_step(own, iter([micro(at, [(teachers[processes.index], None)])])), own.stopping

    (line, stops), (same_line, stops_too) = together(2, half)
    assert stops and stops_too and not one.stopping, "whichever was told"
    clocks = {*WALL_CLOCK, "grad_norm"}
    for found in (line, same_line):
        assert found.keys() == whole.keys() and found["images_per_s"] * found["seconds"] == pytest.approx(4)
        for name in found.keys() - clocks:
            assert found[name] == (pytest.approx(whole[name]) if isinstance(whole[name], float) else whole[name]), name
    for mine, *theirs in zip(one.parameters, *(run_.parameters for run_ in runs), strict=True):
        torch.testing.assert_close(sum(p.grad for p in theirs) / 2, mine.grad)


def test_a_number_that_only_one_process_has_is_in_the_sums_of_all(tmp_path):
    runs = [some_run(tmp_path) for _ in range(3)]

    def one(processes):
        own = runs[processes.index]
        own.processes = processes
        sums = {"a": torch.tensor(1.0 + processes.index).double()}
        more = {"b": torch.tensor(5.0).double()} if processes.index == 2 else {}
        return [step._reduce(own, given, torch.tensor(2.0)) for given in (sums, sums | more, sums)]

    a = {"a": 6.0, "grad_norm": 2.0}
    assert together(3, one) == [[a, {**a, "b": 5.0}, {**a, "b": 0.0}]] * 3


def test_parts_of_a_step_exchange_gradients_once_and_draw_by_process(tmp_path, monkeypatch):
    alone, seeds = [], []
    monkeypatch.setattr(step, "_seed", lambda seed, device: seeds.append(seed))
    own = some_run(tmp_path, batch_size=6, accumulate=3)
    own.processes = replace(own.processes, index=1, without_exchange=lambda model: alone.append(1) or nullcontext())
    step.take_step(own, iter([noise(part, 2) for part in range(3)]))
    assert len(alone) == 2
    assert seeds == [int(generator("step", 0, 0, 1, part).integers(2**62)) for part in range(3)]


def partly(samples):
    """As `collate`, but images 2 and 3 have no label."""
    batch = collate(samples)
    known = torch.tensor([not key.startswith("image1-") for key in batch.keys])[:, None, None]
    maps = {name: replace(labels.shared, valid=labels.shared.valid & known) for name, labels in batch.labels.items()}
    return replace(batch, labels={name: replace(batch.labels[name], shared=found) for name, found in maps.items()})


def many_parts(pred, labels, features=None, teacher_features=None):
    loss = (pred - labels.shared.values).abs().mean((1, 2)) * labels.known
    return loss, {f"part{i}": (i + 1) * loss for i in range(9)}


def test_an_evaluation_is_of_every_held_out_image_once(tmp_path):
    runs = [some_run(tmp_path, objective=many_parts, eval_batch_size=2) for _ in range(7)]

    def one(processes):
        runs[processes.index].processes = processes
        return evaluate(runs[processes.index], HeldOutSamples(Toys(), range(11), partly))

    [[whole], *others] = [together(count, one) for count in (1, 2, 4, 7)]
    assert whole["samples"] == 11 and whole["left_out"] == 2.0
    for lines in others:
        assert all(line == lines[0] for line in lines) and lines[0].keys() == whole.keys()
        assert lines[0]["heldout"] == pytest.approx(whole["heldout"], rel=1e-6) and lines[0]["left_out"] == 2.0
        assert lines[0]["heldout_parts"] == pytest.approx(whole["heldout_parts"], rel=1e-6)
        # In this order the parts are summed, and that of a set differs from process to process.
        assert list(lines[0]["heldout_parts"]) == sorted(whole["heldout_parts"])
