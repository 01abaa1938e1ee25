"""Students by name: a folder, the embedded one, a hub's; and the way there."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from distill.core import hub
from distill.students import checkpoint
from tests.students.test_checkpoint import IMAGES, tiny


class TestFromPretrained:
    def test_a_folder_and_the_embedded_one(self, tmp_path):
        student = tiny()
        checkpoint.save(student, tmp_path / "s")
        assert torch.equal(checkpoint.from_pretrained(tmp_path / "s")(IMAGES), student(IMAGES))
        assert torch.equal(checkpoint.from_pretrained(str(tmp_path / "s"))(IMAGES), student(IMAGES))
        assert (checkpoint.fetch("pocket") / "student.json").is_file()

    def test_a_hub_id_is_downloaded_by_its_three_files(self, tmp_path, monkeypatch):
        import huggingface_hub

        checkpoint.save(tiny(), tmp_path / "s")
        asked = {}

        def snapshot_download(name, **options):
            asked.update(options, name=name)
            return str(tmp_path / "s")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert checkpoint.from_pretrained("someone/student", revision="v2").native_size == 64
        files = ["model.safetensors", "student.json", "README.md"]
        assert asked == {"name": "someone/student", "revision": "v2", "allow_patterns": files}

    def test_what_is_pushed_is_what_is_loaded(self, tmp_path, monkeypatch):
        import huggingface_hub

        class Hub:
            def create_repo(self, name, **options):
                assert (name, options) == (
                    "someone/student",
                    {"repo_type": "model", "private": True, "exist_ok": True},
                )

            def upload_folder(self, *, repo_id, folder_path, **options):
                assert repo_id == "someone/student" and options == {
                    "repo_type": "model",
                    "commit_message": "The second" if (tmp_path / "hub").exists() else "Upload student",
                    "ignore_patterns": [".*", "**/.*"],
                }
                shutil.rmtree(tmp_path / "hub", ignore_errors=True)
                shutil.copytree(folder_path, tmp_path / "hub")

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / "hub"))
        student = tiny()
        for message in ("", "The second"):
            student.push_to_hub("someone/student", card={"licence": "Apache-2.0"}, private=True, message=message)
        assert torch.equal(checkpoint.from_pretrained("someone/student")(IMAGES), student(IMAGES))
        assert checkpoint.read_card(tmp_path / "hub") == {"name": "student", "licence": "Apache-2.0"}

        def refused(self, **options):
            raise OSError("403 Forbidden: no write access\nmore")

        monkeypatch.setattr(Hub, "upload_folder", refused)
        with pytest.raises(OSError, match="someone/student was not uploaded: 403 Forbidden: no write access; is `hf"):
            student.push_to_hub("someone/student", private=True)

    def test_what_would_be_downloaded_is_what_is_not_here(self, monkeypatch):
        import huggingface_hub
        from huggingface_hub import errors

        asked = []
        files = [("a.json", 5, False), ("b.bin", 70, True), ("c.bin", None, True)]

        def snapshot_download(name, **options):
            asked.append(options)
            if offline and not (options.get("local_files_only") and cached):
                raise errors.LocalEntryNotFoundError("offline")
            return [SimpleNamespace(filename=n, file_size=size, will_download=new) for n, size, new in files]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        wanted, offline = {"revision": "v2", "allow_patterns": ["*"]}, False
        assert hub.to_download("a/b", files=("*",), revision="v2") == {"b.bin": 70, "c.bin": 0}
        assert asked == [wanted | {"dry_run": True}]
        offline = cached = True
        assert hub.to_download("a/b", files=("*",), revision="v2") == {}
        assert asked[-1] == wanted | {"local_files_only": True}
        cached = False
        with pytest.raises(hub.HubError, match="cannot be reached .offline.*`hf download a/b`"):
            hub.to_download("a/b", files=("*",))
        for error, told in (
            (errors.GatedRepoError, "a/b is gated: accept the licence at https://huggingface.co/a/b, then `hf auth"),
            (errors.RevisionNotFoundError, "no such repository or revision"),
        ):
            raised = error.__new__(error)
            monkeypatch.setattr(
                huggingface_hub, "snapshot_download", lambda *_, e=raised, **__: (_ for _ in ()).throw(e)
            )
            with pytest.raises(hub.HubError, match=told):
                hub.download("a/b", files=("*",))

    def test_a_commit_is_known_where_its_files_are_cached(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert hub.cached_commit("a/b") == ""
        (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
        (tmp_path / "models--a--b" / "refs" / "main").write_text("c0ffee\n")
        assert hub.cached_commit("a/b") == "", "its files are gone"
        (tmp_path / "models--a--b" / "snapshots" / "c0ffee").mkdir(parents=True)
        assert hub.cached_commit("a/b") == "c0ffee"

    @pytest.mark.parametrize("name", ["someone/student", "nowhere", "./a/b", "a/b/c"])
    def test_what_is_not_there_is_one_line(self, name):
        with pytest.raises(OSError, match="no such folder") as caught:
            checkpoint.from_pretrained(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)

    def test_a_misspelt_run_gets_the_nearest_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "own").mkdir(parents=True)
        with pytest.raises(OSError, match=r"runs/onw: no such folder here, and .*; did you mean runs/own\?$"):
            checkpoint.from_pretrained("runs/onw")
