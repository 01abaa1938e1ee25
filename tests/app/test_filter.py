"""`distill filter`: what it drops and why, resuming, new thresholds without a pass, the lists that recipes take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distill.app import build, commands, filtering
from distill.app.cli import main
from distill.app.filter_sources import open_sources
from distill.app.recipe import parse
from distill.data.datasets import _index
from distill.data.quality import SCORES
from distill.data.settings import ImageSettings
from distill.shards.shards import verify
from tests.app.test_supervision import write_pairs
from tests.data.layouts import tartanair

BAD = {2: "constant", 5: "one bin", 7: "hardly valid"}


def smooth(seed, size=(24, 32)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    return (2 + rng.random() + 0.1 * x + 0.05 * y + 0.05 * np.sin(x / 3 + seed)).astype(np.float32)


@pytest.fixture(scope="module")
def flight(tmp_path_factory) -> Path:
    """Eleven frames, three of them planted."""
    root = tmp_path_factory.mktemp("tartanair")
    frames = []
    for number in range(11):
        depth = smooth(number)
        if BAD.get(number) == "constant":
            depth[:] = 3
        elif BAD.get(number) == "one bin":
            depth = 1 + 0.001 * np.random.default_rng(0).random(depth.shape).astype(np.float32)
            depth[0, 0] = 50
        elif BAD.get(number) == "hardly valid":
            depth[2:] = 0
        image = np.random.default_rng(number).integers(0, 255, (*depth.shape, 3), dtype=np.uint8)
        frames.append((image, depth))
    tartanair(root, frames)
    _index.write("tartanair", root)
    return root


def names(flight) -> list[str]:
    return [f"abandonedfactory/Easy/P000/{number:06d}" for number in range(11)]


def test_the_planted_are_dropped_and_lists_pages_and_counts_say_so(flight, tmp_path, capsys):
    out = tmp_path / "filter"
    assert main(["filter", f"tartanair={flight}", "--out", str(out), "--workers", "0"]) == 0
    kept = (out / "tartanair.txt").read_text().splitlines()
    assert not {names(flight)[number] for number in BAD} & {*kept} and len(kept) >= 11 - 1 - 4
    table = json.loads((out / "filter.json").read_text())["sources"][0]
    assert table["dropped"]["valid < 0.2"] == 1 and table["dropped"]["worst 20% of s_dist"] == 2
    page = (out / "filter.html").read_text()
    assert "306,637" in page and "186,693" in page and "0.391" in page and page.count("<img") >= 10
    lines = [json.loads(line) for line in (out / "tartanair.scores.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[8]["valid"] < 0.2 and {"edges", "sky", "sharpness"} & {*lines[1]}
    assert 'images.names = "' in capsys.readouterr().out


def test_a_killed_run_goes_on_and_thresholds_need_no_other_pass(flight, tmp_path):
    [source] = open_sources([f"tartanair={flight}"])
    filtering.score_source(source, tmp_path)
    path = filtering.scores_path(tmp_path, source)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    assert filtering.score_source(source, tmp_path) == 4 and path.read_bytes() == whole

    def never(number):
        raise AssertionError("read again")

    still = filtering.Source(source.name, source.what, source.names, never)
    assert filtering.score_source(still, tmp_path) == 11
    harder = filtering.judge(still, tmp_path, filtering.Rules(worst={"total": 0.5}))
    assert len(harder.kept) == 11 - 1 - 5
    cut = filtering.judge(still, tmp_path, filtering.Rules(worst={}, cuts=(filtering.cut("s_grad<0.5"),)))
    assert set(cut.reasons) == {"", "valid < 0.2", "s_grad < 0.5"}
    other = filtering.Source(source.name, "another", source.names, source.load)
    assert filtering.score_source(other, tmp_path) == 0


def test_ties_errors_and_bad_rules():
    scores = {name: np.full(6, np.nan) for name in SCORES}
    scores["valid"] = np.array([1, 1, 0.1, 1, 1, 1.0])
    scores["s_dist"] = np.array([0.5, 0.5, 0.0, 0.5, 0.5, np.nan])
    scores["edges"] = np.array([0.1, 0.9, 0.95, 0.2, 0.3, 0.4])
    rules = filtering.Rules(worst={"s_dist": 0.25, "edges": 0.2})
    said = filtering._reasons(scores, {5: "cut short"}, rules)
    assert said == ["worst 25% of s_dist", "", "valid < 0.2", "", "", "unreadable"]
    for wrong in ({"worst": {"s_dits": 0.2}}, {"worst": {"s_dist": 1.0}}, {"valid": 2.0}):
        with pytest.raises(ValueError, match="no score s_dits|share in|valid must"):
            filtering.Rules(**wrong)
    with pytest.raises(ValueError, match="write a score, < or >, and a number"):
        filtering.cut("edges=0.4")


def test_a_name_that_is_no_data_sets_says_so(tmp_path):
    """Not that its index is missing: `distill index` could not write that."""
    table = tmp_path / "INDEX.tsv"
    table.write_text("name\trgb\tdepth\n")
    with pytest.raises(ValueError, match="for pairs give only their table"):
        open_sources([f"mine={table}"])
    with pytest.raises(LookupError, match="mine is not one of the datasets"):
        open_sources([f"mine={tmp_path}"])


def test_the_worst_are_the_lowest_or_the_highest_of_those_that_have_the_score():
    values, left = np.array([3.0, np.nan, 1.0, 9.0, 2.0]), np.array([0, 1, 2, 4])
    assert filtering._worst(values, left, 0.34, high_is_good=True).tolist() == [2]  # a third of three
    assert filtering._worst(values, left, 0.27, high_is_good=True).tolist() == []  # less than one of three
    assert filtering._worst(values, left, 0.67, high_is_good=False).tolist() == [0, 4]


def test_each_source_says_which_key_takes_its_list(tmp_path):
    (tmp_path / "scenes.toml").write_text('run.name = "x"\n[[images]]\nscenes = 2\n')
    [scenes] = open_sources([str(tmp_path / "scenes.toml")])
    table = write_pairs(tmp_path, 2)
    comma = table.with_suffix(".csv")
    comma.write_text(table.read_text().replace("\t", ","))
    tabs, commas = open_sources([str(table), str(comma)])
    assert (scenes.key, tabs.key) == ("", "images.names") and commas.names == tabs.names
    with pytest.raises(ValueError, match="names needs pairs or a dataset"):
        ImageSettings(photos="photos", names="kept.txt")  # it would be read and mean nothing


def test_recipes_take_the_lists_and_labels_are_filtered_too(flight, tmp_path):
    (tmp_path / "kept.txt").write_text("\n".join(names(flight)[:4]))
    images = {"dataset": "tartanair", "root": str(flight), "names": str(tmp_path / "kept.txt"), "far": 9.0}
    table = {
        "run": {"name": "x", "out": str(tmp_path)},
        "images": [images],
        "crops": {"size": 16, "min_side": 16, "patches": "none"},
        "teachers": [{"name": "truth"}, {"name": "truth", "alias": "noisy", "options": {"warp": 0.5}}],
        "labels": {"threads": 0},
    }
    recipe = parse(table)
    assert commands.run_label(recipe).samples == 4
    folder = build.labels_folder(recipe)
    [source] = open_sources([str(folder)])
    filtering.score_source(source, tmp_path / "f")
    verdict = filtering.judge(source, tmp_path / "f", filtering.Rules(worst={"disagreement": 0.25}))
    assert len(verdict.kept) == 3 and (verdict.scores["disagreement"] > 0.05).all()
    (tmp_path / "labels.txt").write_text("\n".join(verdict.kept))
    fewer = parse(table | {"labels": {"threads": 0, "names": str(tmp_path / "labels.txt")}})
    assert build.training_labels(fewer).keys == verdict.kept and build.identity(fewer) != build.identity(recipe)


def test_regions_that_are_no_squares_are_labelled_learnt_and_turned(flight, tmp_path):
    table = {
        "run": {"name": "x", "out": str(tmp_path)},
        "images": [{"dataset": "tartanair", "root": str(flight), "limit": 2}],
        "crops": {"size": 16, "width": 32, "min_side": 12, "patches": "none"},
        "teachers": [{"name": "truth"}],
        "labels": {"threads": 0},
        "student": {"encoder": "test_vit", "decoder_options": {"fusion_channels": 8}},
        "loss": {"feature": 0.0, "local_global": 0.0},
        "train": {"epochs": 2, "batch_size": 2, "workers": 0, "val_fraction": 0.0, "rotation": 10.0, "trackers": []},
    }
    recipe = parse(table)
    assert commands.run_label(recipe).samples == 2
    sample = build.training_labels(recipe)[0]
    assert sample.image.shape == (3, 16, 32) and sample.labels["truth"].shared.values.shape == (1, 16, 32)
    assert not verify(build.labels_folder(recipe))
    assert commands.run_train(recipe).step == 2


def test_one_process_at_a_time_scores_a_source(flight, tmp_path, monkeypatch):
    [source] = open_sources([f"tartanair={flight}"])
    plain, other = filtering.score_line, []

    def late(*args, **options):
        if not other:
            other.append(None)
            with pytest.raises(OSError, match="another process writes it: wait for it"):
                filtering.score_source(source, tmp_path)
        return plain(*args, **options)

    monkeypatch.setattr(filtering, "score_line", late)
    assert filtering.score_source(source, tmp_path) == 0 and other
    names = [json.loads(line)["name"] for line in filtering.scores_path(tmp_path, source).read_text().splitlines()[1:]]
    assert names == list(source.names) and not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_samples_that_could_not_be_read_are_read_again_by_the_next_run(flight, tmp_path):
    [source] = open_sources([f"tartanair={flight}"])
    filtering.score_source(source, tmp_path / "whole")
    read = []

    def load(number):
        read.append(number)
        if len(read) < 12 and number in (3, 10):
            raise FileNotFoundError(2, "No such file or directory", f"{number}.png")
        return source.load(number)

    away = filtering.Source(source.name, source.what, source.names, load)
    assert filtering.score_source(away, tmp_path) == 0
    assert [*filtering.judge(away, tmp_path, filtering.Rules()).errors] == [3, 10]
    with filtering.scores_path(tmp_path, source).open("a") as file:
        file.write('{"name": "a line that a kill')
    assert filtering.score_source(away, tmp_path) == 9 and read[11:] == [3, 10]
    expected = filtering.scores_path(tmp_path / "whole", source).read_bytes()
    assert filtering.scores_path(tmp_path, source).read_bytes() == expected
