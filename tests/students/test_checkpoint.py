"""A student's folder: the same outputs after a round trip, nothing half-written, and one clear line for every fault."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import students
from distill.core import files, plugins
from distill.students import checkpoint
from distill.students.skip_init import SkipInit
from tests.students.tiny import SMALL

DECODERS = plugins.names("distill.students.decoders")
IMAGES = torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(1))


def tiny(decoder="sdt", *, native_size=64, **encoder_options):
    options = {"timm_options": {"depth": 3, "embed_dim": 32}} | encoder_options
    student = students.build(
        encoder="test_vit",
        encoder_options=options,
        decoder=decoder,
        decoder_options=SMALL.get(decoder, {}),
        native_size=native_size,
    )
    student.train()(torch.rand(2, 3, 32, 32))  # running statistics worth keeping
    return student.eval()


def edit(folder, change):
    path = folder / "student.json"
    description = json.loads(path.read_text())
    description.pop("sha256", None)
    change(description)
    path.write_text(json.dumps(description))


def test_a_changed_description_is_seen(tmp_path):
    path = checkpoint.save(tiny("sdt"), tmp_path / "s", card={"licence": "MIT", "numbers": {1: 0.1}}) / "student.json"
    checkpoint.load(tmp_path / "s")
    path.write_text(path.read_text().replace('"MIT"', '"MIS"'))
    with pytest.raises(ValueError, match=r"student.json: does not agree with its own checksum.*remove its line"):
        checkpoint.load(tmp_path / "s")


def test_only_what_a_file_replaces_is_not_initialized():
    def draw() -> torch.Tensor:
        return torch.empty(4).normal_(generator=torch.Generator().manual_seed(1))

    before, known = torch.get_rng_state(), draw()
    with SkipInit():
        for layer in (torch.nn.Linear(4, 4), torch.nn.Conv2d(4, 4, 3)):
            torch.nn.init.trunc_normal_(layer.weight)
            torch.nn.init.xavier_uniform_(layer.weight)
        assert torch.equal(draw(), known)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("decoder", DECODERS)
class TestRoundTrip:
    def test_outputs_are_bit_identical(self, tmp_path, decoder):
        student = tiny(decoder, blocks=[0, 2], pos_grid=4)
        checkpoint.save(student, tmp_path / "s", card={"licence": "Apache-2.0"})
        before = torch.get_rng_state()
        again = checkpoint.load(tmp_path / "s")
        assert torch.equal(torch.get_rng_state(), before), "numbers were drawn, which the file's have replaced"
        assert torch.equal(again(IMAGES), student(IMAGES))
        assert again.spec == student.spec and again.native_size == 64 and not again.training

    def test_float16_is_half_the_size_and_stable(self, tmp_path, decoder):
        student = tiny(decoder)
        checkpoint.save(student, tmp_path / "full")
        checkpoint.save(student, tmp_path / "half", dtype=torch.float16)
        full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
        assert half < 0.7 * full
        stored = load_file(tmp_path / "half" / "model.safetensors").values()
        assert {(t.ndim > 1, t.dtype) for t in stored if t.is_floating_point()} == {
            (True, torch.float16),
            (False, torch.float32),
        }
        loaded = checkpoint.load(tmp_path / "half")
        torch.testing.assert_close(loaded(IMAGES), student(IMAGES), atol=1e-2, rtol=1e-2)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        checkpoint.save(loaded, tmp_path / "again", dtype=torch.float16)
        assert torch.equal(checkpoint.load(tmp_path / "again")(IMAGES), loaded(IMAGES))


def test_equal_students_are_equal_bytes(tmp_path):
    student = tiny()
    for name in "ab":
        checkpoint.save(student, tmp_path / name, card={"name": "x"})
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"model.safetensors", "student.json", "README.md"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_folder_describes_itself(tmp_path):
    card = {"name": "pocket", "licence": "Apache-2.0", "teachers": ["a", "b"]}
    checkpoint.save(tiny(), tmp_path / "s", card=card)
    assert checkpoint.read_card(tmp_path / "s") == card
    readme = (tmp_path / "s" / "README.md").read_text()
    assert readme.startswith("---\n") and "\n# pocket\n" in readme and "license: apache-2.0" in readme
    assert "## Lineage" in readme and "- a\n- b" in readme
    described = checkpoint.describe(tmp_path / "s")
    assert described["native_size"] == 64 and described["images"]["multiple"] == 16
    assert described["output"]["kind"] == "affine_disparity"
    checkpoint.save(tiny(), tmp_path / "s")
    assert checkpoint.read_card(tmp_path / "s") == {} and not (tmp_path / "s" / "README.md").exists()


def test_the_card_shows_lineage_recipe_scores_and_size(tmp_path):
    card = {
        "licence": "research only | mind",
        "lineage": {"images": "CC0", "pocket": "research"},
        "scores": [{"benchmark": "scenes", "abs_rel": "0.21"}, {"benchmark": "nyu", "abs_rel": "0.1", "delta1": "0.9"}],
        "recipe": {"train": {"steps": 3}},
    }
    checkpoint.save(tiny(), tmp_path / "s", card=card)
    readme = (tmp_path / "s" / "README.md").read_text()
    assert "| licence | research only \\| mind |" in readme and "license: other" in readme
    assert "| pocket | research |" in readme and "short side is 64 pixels" in readme
    assert "| benchmark | abs_rel | delta1 |" in readme and "| scenes | 0.21 |  |" in readme
    assert '"steps": 3' in readme and "load(" in readme


class TestFrozenEncoderLeftOut:
    @pytest.fixture
    def parts(self, tmp_path):
        """An encoder's own file, and a student on it whose folder leaves it out."""
        source = tiny().encoder.backbone.state_dict()
        state = {k: v.clone() for k, v in source.items()} | {
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        }
        save_file(state, tmp_path / "vit.safetensors")
        student = tiny(weights=tmp_path / "vit.safetensors", frozen=True, blocks=[0, 1])
        checkpoint.save(student, tmp_path / "s", exclude_frozen_encoder=True)
        return tmp_path / "vit.safetensors", student, tmp_path / "s"

    def test_round_trip_with_its_file(self, tmp_path, parts):
        file, student, folder = parts
        assert all(key.startswith("decoder.") for key in load_file(folder / "model.safetensors"))
        moved = file.rename(tmp_path / "elsewhere.safetensors")
        again = checkpoint.load(folder, encoder_weights=moved)
        assert torch.equal(again(IMAGES), student(IMAGES)) and again.encoder.frozen
        assert torch.equal(checkpoint.from_pretrained(folder, encoder_weights=moved)(IMAGES), student(IMAGES))
        checkpoint.save(again, tmp_path / "again", exclude_frozen_encoder=True)
        assert torch.equal(checkpoint.load(tmp_path / "again", encoder_weights=moved)(IMAGES), student(IMAGES))

    def test_without_its_file(self, tmp_path, parts):
        file, _, folder = parts
        with pytest.raises(
            ValueError, match=r"give --encoder-weights \(encoder_weights=\), the file vit\.safetensors \(sha256 "
        ):
            checkpoint.load(folder)
        with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file; .* needs .* vit\.safetensors"):
            checkpoint.load(folder, encoder_weights=tmp_path / "none.pth")
        file.write_bytes(file.read_bytes() + b" ")
        with pytest.raises(ValueError, match=r"vit\.safetensors: sha256 .* is not the encoder"):
            checkpoint.load(folder, encoder_weights=file)

    def test_only_a_frozen_encoder_from_a_file(self, tmp_path):
        with pytest.raises(ValueError, match="is not frozen"):
            checkpoint.save(tiny(), tmp_path / "s", exclude_frozen_encoder=True)
        with pytest.raises(ValueError, match="did not come from a local weights file"):
            checkpoint.save(tiny(frozen=True), tmp_path / "s", exclude_frozen_encoder=True)
        assert not (tmp_path / "s").exists()

    def test_trained_and_then_frozen(self, tmp_path, parts):
        file, _, _ = parts
        student = tiny(weights=file)
        student.encoder.freeze()
        checkpoint.save(student, tmp_path / "untouched", exclude_frozen_encoder=True)
        with torch.no_grad():
            student.encoder.backbone.cls_token += 1e-3
        with pytest.raises(ValueError, match=r"is not what vit\.safetensors holds any more"):
            checkpoint.save(student, tmp_path / "trained", exclude_frozen_encoder=True)

    def test_a_file_that_nobody_needs(self, tmp_path, parts):
        file, student, _ = parts
        checkpoint.save(student, tmp_path / "whole")
        with pytest.raises(ValueError, match="holds its own encoder; leave --encoder-weights"):
            checkpoint.load(tmp_path / "whole", encoder_weights=file)


class TestWriting:
    def test_a_failed_save_leaves_the_old_student(self, tmp_path, monkeypatch):
        student = tiny()
        checkpoint.save(student, tmp_path / "s")

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(tiny(), tmp_path / "s")
        monkeypatch.undo()
        assert torch.equal(checkpoint.load(tmp_path / "s")(IMAGES), student(IMAGES))
        assert [p.name for p in tmp_path.iterdir()] == ["s"]

    def test_killed_between_the_two_renames(self, tmp_path):
        first, second = tiny(), tiny()
        checkpoint.save(first, tmp_path / "s")
        shutil.copytree(tmp_path / "s", tmp_path / ".s.partial")
        (tmp_path / "s").rename(files.backup_name(tmp_path / "s"))
        with pytest.raises(NotADirectoryError, match=r"interrupted, .*\.s\.old is the student before it"):
            checkpoint.load(tmp_path / "s")
        checkpoint.save(second, tmp_path / "s")
        assert torch.equal(checkpoint.load(tmp_path / "s")(IMAGES), second(IMAGES))
        assert [p.name for p in tmp_path.iterdir()] == ["s"]

    def test_a_check_sees_the_whole_folder_and_may_stop_the_save(self, tmp_path):
        student = tiny()
        checkpoint.save(student, tmp_path / "s")

        def refuse(aside):
            assert checkpoint.load(aside).native_size == 64
            (aside / "model.onnx").write_bytes(b"")
            raise ValueError("differs")

        for place in ("s", "elsewhere"):
            with pytest.raises(ValueError, match="differs"):
                checkpoint.save(tiny(), tmp_path / place, check=refuse)
        assert [p.name for p in tmp_path.iterdir()] == ["s"] and not (tmp_path / "s" / "model.onnx").exists()
        assert torch.equal(checkpoint.load(tmp_path / "s")(IMAGES), student(IMAGES))

    def test_hidden_files_are_in_nobodys_way_and_stay(self, tmp_path):
        checkpoint.save(tiny(), tmp_path / "s")
        for name in (".DS_Store", ".model.onnx.new", ".new.model.pt2", ".model.onnx.partial"):
            (tmp_path / "s" / name).write_text(name)
        checkpoint.save(tiny(), tmp_path / "s")
        hidden = [p for p in (tmp_path / "s").iterdir() if p.name.startswith(".")]
        assert [p.read_text() for p in hidden] == [".DS_Store"]  # and not what a killed export had left
        (tmp_path / "s" / ".git").mkdir()
        with pytest.raises(FileExistsError, match=r"holds \.git"):
            checkpoint.save(tiny(), tmp_path / "s")

    def test_other_peoples_files_are_not_replaced(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
            checkpoint.save(tiny(), tmp_path)
        with pytest.raises(FileExistsError, match="is a file"):
            checkpoint.save(tiny(), tmp_path / "thesis.tex")
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    @pytest.mark.parametrize("bits", [None, 4])
    def test_what_float16_cannot_hold_stays_float32(self, tmp_path, bits):
        student = tiny()
        name = "encoder.backbone.blocks.0.mlp.fc1.weight"
        with torch.no_grad():
            student.get_parameter(name)[0, 0] = 1e5
        checkpoint.save(student, tmp_path / "s", dtype=torch.float16, bits=bits)
        stored = load_file(tmp_path / "s" / "model.safetensors")
        assert torch.equal(stored[name], student.get_parameter(name))
        assert all(value.isfinite().all() for value in stored.values())

    def test_dtype(self, tmp_path):
        with pytest.raises(ValueError, match=r"float32 or float16, not torch\.bfloat16"):
            checkpoint.save(tiny(), tmp_path / "s", dtype=torch.bfloat16)


class TestFaults:
    @pytest.fixture
    def folder(self, tmp_path):
        return checkpoint.save(tiny(), tmp_path / "s")

    def fails(self, folder, error, message):
        with pytest.raises(error, match=message) as caught:
            checkpoint.load(folder)
        assert "\n" not in str(caught.value) and re.search(r"student\.json|model\.safetensors|s: ", str(caught.value))

    def test_not_a_folder(self, folder, tmp_path):
        self.fails(folder / "student.json", NotADirectoryError, "a student is a folder with")
        self.fails(tmp_path / "nowhere" / "s", NotADirectoryError, "a student is a folder with")

    @pytest.mark.parametrize("name", ["student.json", "model.safetensors"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        self.fails(folder, FileNotFoundError, f"{name}: missing")

    def test_not_a_description(self, folder):
        (folder / "student.json").write_text("{")
        self.fails(folder, ValueError, "not JSON")
        (folder / "student.json").write_text("[1]")
        self.fails(folder, ValueError, "no version")
        (folder / "student.json").write_text('{"version": 1}')
        self.fails(folder, ValueError, "spec is missing; weights is missing; output is missing; card is")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda d: d.update(version=2), ValueError, "newer than 1; update"),
            (lambda d: d["spec"].update(decoder="sdtt"), LookupError, "did you mean sdt"),
            (lambda d: d["spec"].update(encoder="vit_smal"), LookupError, "no encoder 'vit_smal'"),
            (lambda d: d["spec"]["decoder_options"].update(wings=2), ValueError, "unknown key decoder_options.wings"),
            (lambda d: d["spec"].update(wings=2), ValueError, "wings"),
            (lambda d: d["weights"].update(sha256=5), ValueError, "weights.sha256 must be text, not 5"),
            (lambda d: d.update(encoder_weights="a"), ValueError, "encoder_weights must be a table or null, not 'a'"),
            (lambda d: d.update(encoder_weights={"name": "a"}), ValueError, r"encoder_weights\.sha256 is missing"),
            (lambda d: d.pop("encoder_weights"), ValueError, "encoder_weights is missing"),
            (lambda d: d["spec"].update(encoder_options=[1]), ValueError, r"spec\.encoder_options must be a table"),
            (lambda d: d["spec"].update(decoder=7), ValueError, r"spec\.decoder must be text, not 7"),
            (
                lambda d: d["spec"].update(native_size="abc"),
                ValueError,
                r"spec\.native_size must be a number of pixels",
            ),
            (lambda d: d["spec"].update(native_size=-3), ValueError, r"spec\.native_size must be .*, not -3"),
            (lambda d: d.update(native_size=True), ValueError, "description: native_size must be .*, not True"),
            (lambda d: d["spec"]["encoder_options"].update(mean=5), ValueError, "student.json: "),
            (lambda d: d["spec"]["encoder_options"].update(mean=[1, 2]), ValueError, "student.json: "),
            (lambda d: d["spec"]["decoder_options"].update(fusion_channels=-8), ValueError, "student.json: "),
            (lambda d: d["spec"]["encoder_options"].update(weights="/etc/passwd"), ValueError, "may not name"),
            (
                lambda d: d["spec"]["encoder_options"].update(blocks=[0, 1], indices=[0, 0, 1, 1]),
                ValueError,
                r"unknown encoder\.backbone",
            ),
            (lambda d: d["spec"]["decoder_options"].update(fusion_channels=8), ValueError, "another shape for decoder"),
        ],
    )
    def test_description_that_does_not_fit(self, folder, change, error, message):
        edit(folder, change)
        self.fails(folder, error, message)

    def test_damaged_weights(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.fails(folder, ValueError, "damaged or from another student")
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
        self.fails(folder, ValueError, "git lfs pull")

    def test_a_description_that_an_editor_saved_with_its_mark(self, folder):
        path = folder / "student.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert checkpoint.describe(folder)["version"]

    def test_missing_and_unknown_parameters(self, folder):
        path = folder / "model.safetensors"
        state = load_file(path)
        bias = state.pop("decoder.output_conv.4.bias")
        for changed, message in (
            (state, r"it lacks decoder\.output_conv\.4\.bias$"),
            (state | {"decoder.output_conv.4.bias": bias, "x": bias.clone()}, r"it has unknown x$"),
        ):
            save_file(changed, path)
            edit(folder, lambda d: d["weights"].update(sha256=checkpoint.file_sha256(path)))
            self.fails(folder, ValueError, message)


def test_a_run_that_has_not_trained_yet_is_told(tmp_path):
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(FileNotFoundError, match="it is a run that has not trained one yet: distill train RECIPE"):
        checkpoint.load(checkpoint.fetch(str(tmp_path)))
