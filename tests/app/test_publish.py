"""What is published says what it is, keeps photographs back unless their licence lets them go, and is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from distill.app import build, publish
from distill.app.cli import main
from distill.app.publish import check, may_share
from distill.app.recipe import load
from distill.core.hub import card_metadata
from distill.shards.shards import MANIFEST, LabelDataset, verify
from distill.students import checkpoint
from tests.app.test_renamed import RECIPE
from tests.labelling.formula import make_tar
from tests.students.tiny import tiny


@pytest.mark.parametrize(
    ("terms", "allowed"),
    [
        ("my own photographs", True),
        ("CC BY 4.0", True),
        ("CC0", True),
        ("CC BY-ND 4.0", False),
        ("unknown", False),
        ("", False),
        ("SA-1B: research only", False),
        ("MIT, for academic use", False),
    ],
)
def test_what_a_licence_lets_go(terms, allowed):
    assert may_share(terms) is allowed


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    make_tar(folder / "sa_0.tar")
    path = folder / "r.toml"
    path.write_text(RECIPE.format(out=folder / "run", tars=folder / "sa_0.tar"))
    assert main(["--quiet", "label", str(path)]) == 0
    return build.labels_folder(load(path)), path


def test_labels_without_their_photographs(labels, tmp_path):
    folder, recipe = labels
    out = tmp_path / "out"
    assert main(["publish", "labels", str(folder), str(out), "--recipe", str(recipe)]) == 0
    tars = sorted(out.glob("*.tar"))
    names = [name for tar in tars for name in tarfile.open(tar).getnames()]
    assert sum(name.endswith(".json") for name in names) == 7 and not any(name.endswith(".jpg") for name in names)
    lines = [json.loads(line) for line in (out / "regions.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    old = tarfile.open(folder / lines[0]["tar"])
    assert lines[0]["region_sha256"] == hashlib.sha256(old.extractfile(f"{lines[0]['key']}.jpg").read()).hexdigest()
    source = tarfile.open(recipe.parent / "sa_0.tar")
    (name,) = [
        n
        for n in source.getnames()
        if n.removeprefix("./").rpartition(".")[0] == lines[0]["image"] and not n.endswith(".json")
    ]
    photo = source.extractfile(name).read()
    assert lines[0]["file_sha256"] == hashlib.sha256(photo).hexdigest() and lines[0]["crop"]["side"] > 0
    for read in (LabelDataset, verify):
        with pytest.raises(ValueError, match="out was published without its photographs, which training needs"):
            read(out)
    manifest = json.loads((out / MANIFEST).read_text())
    for shard in manifest["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    card = card_metadata(out / "README.md")
    assert card["configs"][0]["data_files"] == "*.tar" and "depth-estimation" in card["task_categories"]
    text = (out / "README.md").read_text()
    assert "The photographs are not here" in text and "| analytic |" in text and "WebDataset(" in text
    assert str(recipe.parent) not in "".join(p.read_text() for p in out.glob("*.*") if p.suffix in (".md", ".json"))
    assert check(out) == []
    for count, size in ((7, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "10M<n<100M")):
        text = publish.labels_card(manifest | {"samples": count}, name="x", shared=True)
        assert f"size_categories:\n- {size}\n" in text
    tars[0].write_bytes(tars[0].read_bytes()[:-1])
    assert check(out) == [f"{tars[0].name} does not match its checksum"]
    with (out / "weights.bin").open("wb") as file:
        file.truncate(10**7 + 1)
    assert check(out)[1:] == ["weights.bin is large, but no rule of .gitattributes stores it in LFS"]
    tars[0].unlink()
    assert check(out)[0] == f"{tars[0].name} is missing"


def test_labels_with_their_photographs_are_a_labels_folder(labels, tmp_path, capsys):
    folder, _ = labels
    out = tmp_path / "out"
    assert main(["publish", "labels", str(folder), str(out), "--images", "include"]) == 0
    assert verify(out) == [] and len(LabelDataset(out)) == 7 and check(out) == []
    assert main(["publish", "labels", str(folder), str(tmp_path)]) == 2
    assert "was not written by this command" in capsys.readouterr().err and out.is_dir()
    assert main(["--json", "publish", "labels", str(folder), str(out), "--images", "include"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == "included"


def test_a_full_disk_leaves_what_was_published_and_nothing_beside_it(labels, tmp_path, capsys, monkeypatch):
    folder, _ = labels
    out = tmp_path / "out"
    assert main(["publish", "labels", str(folder), str(out), "--images", "include"]) == 0

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(publish.shutil, "copyfile", full)
    assert main(["publish", "labels", str(folder), str(out), "--images", "include"]) == 2
    assert f"{out / 'sa_0-000.tar'}: no space left" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [out] and check(out) == []


def test_a_student_with_scores_and_cost_on_its_card(tmp_path):
    student = {"name": "mine", "licence": "what its teachers allow", "commercial": False}
    rows = {"scores": [{"model": "student", "abs_rel": "0.1"}], "cost": [{"model": "student", "GFLOPs": "3"}]}
    checkpoint.save(tiny("dpt").eval(), tmp_path / "s", card=student | rows)
    (tmp_path / "s" / ".notes").write_text("mine")
    out = tmp_path / "out"
    assert main(["publish", "student", str(tmp_path / "s"), str(out)]) == 0
    card = card_metadata(out / "README.md")
    assert card["pipeline_tag"] == "depth-estimation" and card["license"] == "other" and card["license_name"]
    text = (out / "README.md").read_text()
    assert (
        'load("OWNER/out")' in text
        and "## Cost" in text
        and "GFLOPs" in text
        and "million parameters" in text
        and "Without this package" in text
    )
    checkpoint.load(out)
    assert not (out / ".notes").exists()
    assert "*.safetensors filter=lfs" in (out / ".gitattributes").read_text() and check(out) == []


def test_the_scores_of_the_run_replace_those_of_the_card_and_four_bits_are_explained(tmp_path, monkeypatch):
    new, old = ({"scores": [{"model": "student", "abs_rel": word}]} for word in ("0.11", "0.22"))
    monkeypatch.setattr(publish, "scored", lambda folder, revision: new)
    checkpoint.save(tiny("dpt").eval(), tmp_path / "s", card=old, bits=4)
    assert publish.publish_student(tmp_path / "s", tmp_path / "out")["scores"] == 1
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| student | 0.11 |" in text and "0.22" not in text and "groups of 64" in text


def texts(folder):
    """Every byte of the files in a folder: plain tars hold their members as they are."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """Labels of a teacher whose weights lie in a private folder."""
    folder = tmp_path_factory.mktemp("private")
    make_tar(folder / "sa_0.tar")
    checkpoint.save(tiny("dpt").eval(), folder / "my weights" / "mine", card={"name": "mine"})
    path = folder / "r.toml"
    recipe = RECIPE.format(out=folder / "run", tars=folder / "sa_0.tar")
    weights = f'name = "checkpoint"\nweights = "{folder}/my weights/mine"'
    path.write_text(recipe.replace('name = "analytic"', weights))
    assert main(["--quiet", "label", str(path)]) == 0
    return folder, build.labels_folder(load(path))


@pytest.mark.parametrize("images", ["include", "hashes"])
def test_labels_name_weights_and_their_digest_but_no_folder(private, tmp_path, images):
    folder, labels = private
    assert str(folder).encode() in texts(labels)
    publish.publish_labels(labels, tmp_path / "out", images=images)
    assert str(folder).encode() not in texts(tmp_path / "out") and b"my weights" not in texts(tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| checkpoint | mine | affine_disparity |" in page and "| checkpoint | sha256:" in page
    if images == "include":
        assert verify(tmp_path / "out") == [] and len(LabelDataset(tmp_path / "out")) == 7
        own, public = LabelDataset(labels)[0], LabelDataset(tmp_path / "out")[0]
        assert public.record["labels"]["checkpoint"]["card"]["weights"] == "mine"
        assert own.image.equal(public.image)
        assert own.labels["checkpoint"].shared.values.equal(public.labels["checkpoint"].shared.values)


def test_labels_without_a_private_path_are_copied_to_the_byte(labels, tmp_path):
    folder, _ = labels
    publish.publish_labels(folder, tmp_path / "out", images="include")
    same = [path.name for path in folder.iterdir() if path.suffix == ".tar" or path.stem.startswith("sa_0")]
    assert len(same) == 6
    for name in [*same, "settings.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def private_card():
    weights = {"weights": "/home/me/weights/a.pth", "revision": "sha256:0123456789abcdef"}
    recipe = {"run": {"out": "/home/me/run"}, "images": [{"folder": "/home/me/my photos"}]}
    return {"name": "mine", "teachers": {"t": weights}, "recipe": recipe, "lineage": {"start": weights}}


@pytest.mark.parametrize("has_encoder", [True, False])
def test_a_student_names_no_folder_of_this_machine(tmp_path, monkeypatch, has_encoder):
    checkpoint.save(tiny("dpt").eval(), tmp_path / "s", card=private_card())
    if not has_encoder:
        about = checkpoint.describe(tmp_path / "s") | {"encoder_weights": {"name": "a", "sha256": "0"}}
        monkeypatch.setattr(publish.checkpoint, "describe", lambda folder: about)
    publish.publish_student(tmp_path / "s", tmp_path / "out")
    assert b"/home/me" not in texts(tmp_path / "out") and check(tmp_path / "out") == []
    monkeypatch.undo()
    weights = checkpoint.read_card(tmp_path / "out")["teachers"]["t"]
    assert weights == {"weights": "a.pth", "revision": "sha256:0123456789abcdef"}


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    checkpoint.save(tiny("dpt").eval(), tmp_path / "s", card=private_card())
    assert main(["export", str(tmp_path / "s"), str(tmp_path / "out")]) == 0
    assert b"/home/me" not in texts(tmp_path / "out")
    assert checkpoint.read_card(tmp_path / "out")["lineage"]["start"]["weights"] == "a.pth"


@pytest.mark.parametrize("inside", [".", "student"])
def test_a_link_out_of_a_students_folder_is_not_published(tmp_path, inside):
    (tmp_path / "secret").write_text("mine")
    folder, blobs = tmp_path / "models" / "snapshots" / "0" / inside, tmp_path / "models" / "blobs"
    checkpoint.save(tiny("dpt").eval(), folder, card={"name": "a"})
    (tmp_path / "disk").mkdir()
    blobs.symlink_to(tmp_path / "disk")
    (folder / checkpoint.WEIGHTS).rename(blobs / "0123")  # as the hub's cache keeps them
    (folder / checkpoint.WEIGHTS).symlink_to(blobs / "0123")
    (blobs / "4567").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "4567")
    publish.publish_student(folder, tmp_path / "out")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes.txt is a link to a file of another folder"):
        publish.publish_student(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
