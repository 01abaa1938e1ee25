"""Access to the Hugging Face hub: a repository's files through huggingface_hub, from its cache where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.core.wording import first_line, on_one_line


class HubError(OSError):
    """A repository is not available; the message is a clause that says why and what to do."""


def download(repository: str, *, files: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of OWNER/NAME that match `files`; returns the folder. revision: a branch, tag or commit.

    Raises HubError for a repository that is gated, private, absent or unreachable.
    """
    import huggingface_hub

    with _hub_errors(repository):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def to_download(repository: str, *, files: Sequence[str], revision: str | None = None) -> dict[str, int]:
    """Return the bytes of each file that `download` would fetch now, by name; empty if everything is cached.

    Raises HubError as `download` does. Offline, if any of the repository is cached, its files are assumed to be
    complete, as `download` assumes.
    """
    import huggingface_hub

    query: dict[str, Any] = {"revision": revision, "allow_patterns": list(files)}
    try:
        with _hub_errors(repository):
            planned = huggingface_hub.snapshot_download(repository, dry_run=True, **query)
    except HubError:
        with _hub_errors(repository):
            huggingface_hub.snapshot_download(repository, local_files_only=True, **query)
        return {}
    return {file.filename: file.file_size or 0 for file in planned if file.will_download}


@contextmanager
def _hub_errors(repository: str, *, writing: bool = False) -> Iterator[None]:
    """Convert huggingface_hub's errors to HubError."""
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
            raise HubError(
                f"{repository} was not uploaded: {first_line(error)}; is `hf auth login` done, and is it yours?"
            ) from error
        raise HubError(
            f"the Hugging Face hub cannot be reached (offline?); where it can, `hf download {repository}`, then give "
            "that folder's path"
        ) from error


def upload(folder: Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload a folder as the model OWNER/NAME, created if it does not exist, without dot-files; the commit's URL.

    The token is huggingface_hub's (`hf auth login`). Raises HubError with one line.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _hub_errors(repository, writing=True):
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=str(folder),
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=[".*", "**/.*"],
        )
    return str(getattr(commit, "commit_url", commit))


def cached_commit(repository: str) -> str:
    """The commit of OWNER/NAME's main branch in this machine's cache; empty if its files are not cached."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    ref = folder / "refs" / "main"
    if not ref.is_file():
        return ""
    commit = ref.read_text(encoding="utf-8").strip()
    return commit if (folder / "snapshots" / commit).is_dir() else ""


def card_metadata(path: Path) -> dict[str, Any]:
    """The front matter of a card (README.md), as the hub reads it; ValueError if there is none or it is unreadable."""
    import huggingface_hub

    try:
        metadata = huggingface_hub.metadata_load(path)
    except (OSError, ValueError) as error:
        raise ValueError(on_one_line(error)) from error
    except Exception as error:  # noqa: BLE001  the YAML parser's error class is not known here
        raise ValueError(f"its front matter is no YAML ({on_one_line(error, most=120)})") from error
    if not metadata:
        raise ValueError("it has no front matter")
    return dict(metadata)
