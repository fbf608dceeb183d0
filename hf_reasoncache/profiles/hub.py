"""Profiles on the Hugging Face Hub, through `huggingface_hub`.

Endpoint, token, proxies, cache and `HF_HUB_OFFLINE` are those of that library. Its errors come
through as they are: OSError and ValueError with the Hub's own explanation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_download,
)
from huggingface_hub.errors import HTTPError, XetDownloadError
from huggingface_hub.utils import validate_repo_id

from hf_reasoncache.messages import shown
from hf_reasoncache.profiles.files import (
    CONFIG,
    LIMITS,
    STATISTICS,
    expect_ours,
    read_bounded,
    too_large,
)

Token = str | bool | None


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form ORG/NAME."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return name.count("/") == 1


def require_repo_id(name: str | os.PathLike[str]) -> str:
    """Return `name` if it has the form ORG/NAME.

    Raises
    ------
    ValueError
        Otherwise.
    """
    repo_id = os.fspath(name)
    if not is_repo_id(repo_id):
        raise ValueError(
            f"profile: expected a repository ORG/NAME of the Hub, got {shown(repo_id)}."
        )
    return repo_id


def answers(timeout: float = 3.0) -> bool:
    """Whether the Hub, or what `HF_ENDPOINT` names, answers at all, within `timeout` seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except (HTTPError, OSError):
        return False
    return True


def offline_if_silent() -> str | None:
    """Have this process use only what is on the machine if the Hub does not answer.

    Its own library tries for a minute.

    Returns
    -------
    str or None
        The Hub's address if it is given up now.
    """
    if constants.HF_HUB_OFFLINE or answers():
        return None
    constants.HF_HUB_OFFLINE = True
    return constants.ENDPOINT


@dataclass(frozen=True)
class Repository:
    """Files of one repository, brought into the Hub's cache when they are asked for.

    Attributes
    ----------
    repo_id : str
    revision : str or None
        Branch, tag or commit.
    local_files_only : bool
        Whether to look in the cache only; a Hub that cannot be reached has the same effect.
    cache_dir : path or None
    token : str, bool or None
    """

    repo_id: str
    revision: str | None = None
    local_files_only: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    token: Token = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The repository, at its revision."""
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    def locate(self, name: str, beside: Path | None = None) -> Path:
        """Return the path of a file of a profile; see `Source`.

        Raises
        ------
        OSError
            If repository, revision or file does not exist, access is denied, or the download fails.
        ValueError
            If the file is over its limit; it is then not downloaded.
        """
        where: dict[str, Any] = {
            # The cache names a directory by the commit that its files are of.
            "revision": self.revision if beside is None else beside.parent.name,
            "local_files_only": self.local_files_only,
            "cache_dir": self.cache_dir,
            "token": self.token,
        }
        with _as_os_error(self.repo_id):
            found = hf_hub_download(self.repo_id, name, dry_run=True, **where)
            # Some mirrors do not tell the size; reading the file has the same limit.
            if found.file_size is not None and found.file_size > LIMITS[name]:
                raise too_large(f"{self.name}/{name}", found.file_size)
            return Path(hf_hub_download(self.repo_id, name, **where))


def upload(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str,
    token: Token = None,
) -> str:
    """Commit the files to a repository, which is made if needed; return the commit's address.

    Statistics of an older profile are deleted if the new one has none. Other files stay.

    Raises
    ------
    OSError
        If access is denied, or the upload fails: nothing is committed then.
    ValueError
        If the repository's `config.json` is a model's.
    """
    api = HfApi(token=token)
    with _as_os_error(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, data) for name, data in files.items()
        ]
        if api.file_exists(repo_id, CONFIG, revision=revision):
            there = Repository(repo_id, revision, token=token).locate(CONFIG)
            expect_ours(f"{repo_id}/{CONFIG}", read_bounded(there))
        if STATISTICS not in files and api.file_exists(repo_id, STATISTICS, revision=revision):
            changes.append(CommitOperationDelete(STATISTICS))
        commit = api.create_commit(
            repo_id, changes, commit_message=commit_message, revision=revision
        )
    return str(commit.commit_url)


@contextmanager
def _as_os_error(repo_id: str) -> Iterator[None]:
    """Turn what the HTTP client raises, where the Hub's library lets it through, into OSError."""
    try:
        yield
    except (HTTPError, XetDownloadError) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"{repo_id}: expected an answer of the Hub, got {type(error).__name__}: {error}; check "
            "the connection and HF_ENDPOINT, and try again."
        ) from error
