"""The one way to the Hugging Face hub: a repository's files, by huggingface_hub and from its cache where they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class HubError(OSError):
    """A repository that cannot be had; the message is a clause that says why and what to do."""


def download(repository: str, *, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a snapshot of OWNER/NAME with what matches `files`; revision: a branch, tag or commit.

    Raises HubError for a repository that is gated, private, absent or out of reach.
    """
    import huggingface_hub

    with _one_line(repository):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def to_download(repository: str, *, files: Sequence[str], revision: str | None = None) -> dict[str, int]:
    """What `download` would fetch now, by name, with the bytes; nothing where all is in the cache.

    Raises HubError as `download` does. Off line, with something of the repository in the cache, its files are taken to
    be whole, as `download` takes them.
    """
    import huggingface_hub

    asked: dict[str, Any] = {"revision": revision, "allow_patterns": list(files)}
    try:
        with _one_line(repository):
            planned = huggingface_hub.snapshot_download(repository, dry_run=True, **asked)
    except HubError:
        with _one_line(repository):
            huggingface_hub.snapshot_download(repository, local_files_only=True, **asked)
        return {}
    return {file.filename: file.file_size or 0 for file in planned if file.will_download}


@contextmanager
def _one_line(repository: str, *, writing: bool = False) -> Iterator[None]:
    """huggingface_hub's errors as HubError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        address = f"https://huggingface.co/{repository}"
        raise HubError(f"{repository} is gated: accept the licence at {address}, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise HubError(
            "no such repository or revision on the Hugging Face hub (or it is private: `hf auth login`)"
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        if writing:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise HubError(
                f"{repository} was not uploaded: {reason}; is `hf auth login` done, and is it yours?"
            ) from error
        raise HubError(
            f"the Hugging Face hub cannot be reached (offline?); where it can, `hf download {repository}`, then give "
            "that folder's path"
        ) from error


def upload(folder: Path, repository: str, *, private: bool = False, message: str = "", kind: str = "model") -> str:
    """Upload a folder as OWNER/NAME, made where it is not there; the address of the commit. Dot-files stay here.

    kind: "model" or "dataset". The token is huggingface_hub's (`hf auth login`). Raises HubError in one line.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _one_line(repository, writing=True):
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=str(folder),
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=[".*", "**/.*"],
        )
    return str(getattr(made, "commit_url", made))


def cached_commit(repository: str) -> str:
    """The commit of OWNER/NAME's main branch in this machine's cache; empty where its files are not here."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    named = folder / "refs" / "main"
    if not named.is_file():
        return ""
    commit = named.read_text(encoding="utf-8").strip()
    return commit if (folder / "snapshots" / commit).is_dir() else ""


def card_metadata(path: Path) -> dict[str, Any]:
    """The front matter of a card (README.md), as the hub reads it; ValueError where it has none that can be read."""
    import huggingface_hub

    try:
        found = huggingface_hub.metadata_load(path)
    except (OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except Exception as error:  # noqa: BLE001  the YAML parser's own class, and this file's one owner does not know it
        raise ValueError(f"its front matter is no YAML ({' '.join(str(error).split())[:120]})") from error
    if not found:
        raise ValueError("it has no front matter")
    return dict(found)
