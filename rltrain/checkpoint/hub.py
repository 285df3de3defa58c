"""Pushes files to a model repository on the Hugging Face Hub, and compares every one of them afterwards.

huggingface_hub takes the token from the environment (HF_TOKEN) or from the login; nothing here keeps it, and
a file that holds it is refused. A push that ended halfway is finished by the same push: it begins by asking
what the repository holds, and contents that are already uploaded are not sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from rltrain.errors import UserError

__all__ = ["Content", "HubError", "PushedFiles", "hide_progress_bars", "open_repository", "push_files"]

T = TypeVar("T")
Content = Path | bytes
Report = Callable[[str], None]
Wait = Callable[[float], None]

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
_TRANSIENT = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # HTTP status codes
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of whichever HTTP library huggingface_hub uses
_BLOCK = 2**20  # bytes read at a time
_TEXT_BYTES = 10**7  # a larger file is no text that could quote a token
# what loaders of models look for: one that an earlier push left would be loaded in place of the new ones
_LOADED = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|(model|pytorch_model)\.(safetensors|bin)\.index\.json|adapter_config\.json"
)


class HubError(UserError):
    """A push that the Hub refused or did not answer. What it holds is as before, or as the push wants it."""


@dataclass(frozen=True)
class PushedFiles:
    """What the repository holds after a push. commits: 0 where it held everything before."""

    url: str
    names: tuple[str, ...]
    size: int  # bytes
    commits: int

    def __str__(self) -> str:
        what = "pushed" if self.commits else "nothing to push"
        return f"{what}: {len(self.names)} files, {self.size / 1e6:.1f} MB, verified at {self.url}"


@dataclass(frozen=True)
class _Identity:
    """How the Hub names a content: by SHA-256 in its large file storage, else by git's SHA-1 of the blob."""

    size: int
    sha256: str
    blob: str

    @classmethod
    def read(cls, content: Content) -> _Identity:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with _open_content(content) as file:
            while block := file.read(_BLOCK):
                sha256.update(block)
                blob.update(block)
        return cls(size, sha256.hexdigest(), blob.hexdigest())

    def is_of(self, stored: RepoFile) -> bool:
        return stored.blob_id == self.blob if stored.lfs is None else stored.lfs.sha256 == self.sha256


@dataclass(frozen=True)
class _Differences:
    wanting: list[str]  # files that the repository lacks or holds with another content
    stale: list[str]  # weights in the repository that a loader may prefer to the pushed ones

    def __bool__(self) -> bool:
        return bool(self.wanting or self.stale)

    def __str__(self) -> str:
        return ", ".join([*self.wanting, *self.stale][:5])


def hide_progress_bars() -> None:
    """huggingface_hub draws none from now on: a run reports its own progress."""
    disable_progress_bars()


def open_repository(name: str, *, private: bool, report: Report, wait: Wait = time.sleep) -> str:
    """Checks the token and makes the model repository ``name`` unless it exists; returns its address.

    Raises HubError: no or a wrong token, no right to write, a public repository where ``private`` is wanted,
    a Hub that does not answer.
    """
    api = HfApi()
    with _hub_errors(name):
        _attempt(api.whoami, "the token's owner", report, wait)
        url = _attempt(
            lambda: api.create_repo(name, private=private, exist_ok=True), "the repository", report, wait
        )
        if private and not _attempt(lambda: api.model_info(name), "its visibility", report, wait).private:
            raise HubError(
                f"{name} is public on the Hub, and the push is to be private; make the repository private, "
                "or push with --public (push.private: false)"
            )
        return str(url)


def push_files(
    name: str, files: Mapping[str, Content], message: str, report: Report, wait: Wait = time.sleep
) -> PushedFiles:
    """Makes ``files``, by path in the repository, what the repository ``name`` holds under these paths.

    One commit, which also removes weights that an earlier push left and a loader would prefer. Before every
    attempt the Hub is asked what it holds, so that a commit whose answer was lost is not made twice; the
    push is done when the Hub names the SHA-256 or git's SHA-1 of every file. Raises HubError.
    """
    _refuse_token(files)
    identities = {path: _Identity.read(content) for path, content in files.items()}
    api = HfApi()
    commits = 0
    with _hub_errors(name):
        for seconds in (*WAITS, None):
            try:
                differences = _compare(api, name, identities)
                if differences:
                    api.create_commit(name, _operations(files, differences), commit_message=message)
                    commits += 1
                    differences = _compare(api, name, identities)
                if not differences:
                    url = f"{api.endpoint}/{name}"
                    size = sum(identity.size for identity in identities.values())
                    return PushedFiles(url, tuple(files), size, commits)
                problem = f"the Hub took the commit and holds other contents of {differences}"
            except _ATTEMPT_ERRORS as error:
                if not _is_transient(error):
                    raise
                if seconds is None:
                    raise HubError(
                        f"the Hub did not take the commit ({_reason(error)}); push again later"
                    ) from error
                problem = _reason(error)
            if seconds is None:
                raise HubError(f"{name}: {problem}; push again, and remove these files there if that repeats")
            report(f"push: {problem}; asking what {name} holds in {seconds:g} s")
            wait(seconds)
    raise AssertionError("the last attempt returns or raises")


# hf_xet, which uploads large files, raises RuntimeError; an answer that is no JSON is json's ValueError
_ATTEMPT_ERRORS = (_HTTP_ERROR, json.JSONDecodeError, RuntimeError)


def _attempt(call: Callable[[], T], what: str, report: Report, wait: Wait) -> T:
    """The result of a call that may be repeated, after as many attempts as there are WAITS."""
    for seconds in WAITS:
        try:
            return call()
        except _ATTEMPT_ERRORS as error:
            if not _is_transient(error):
                raise
            report(f"push: {_reason(error)}; asking for {what} again in {seconds:g} s")
            wait(seconds)
    return call()


def _compare(api: HfApi, name: str, identities: Mapping[str, _Identity]) -> _Differences:
    stored = {
        file.path: file for file in api.list_repo_tree(name, recursive=True) if isinstance(file, RepoFile)
    }
    wanting = [
        path
        for path, identity in identities.items()
        if path not in stored or not identity.is_of(stored[path])
    ]
    stale = [
        path
        for path in stored
        if path not in identities and _LOADED.fullmatch(PurePosixPath(path).name)
        if str(PurePosixPath(path).parent) == "."
    ]
    return _Differences(wanting, stale)


def _operations(
    files: Mapping[str, Content], differences: _Differences
) -> list[CommitOperationAdd | CommitOperationDelete]:
    contents = {path: files[path] for path in differences.wanting}
    added = [CommitOperationAdd(path, content) for path, content in contents.items()]
    return [*added, *(CommitOperationDelete(path) for path in differences.stale)]


def _refuse_token(files: Mapping[str, Content]) -> None:
    """Raises HubError where a text quotes the token: what is pushed may become public."""
    token = get_token()
    for path, content in files.items() if token else ():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if size > _TEXT_BYTES:
            continue
        data = content.read_bytes() if isinstance(content, Path) else content
        if token and token.encode() in data:
            raise HubError(
                f"{path} holds the token for the Hub and is not pushed; take it out of the file, and revoke "
                "it if the file was shared"
            )


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Inside, what huggingface_hub raises becomes a HubError with the remedy."""
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"no token to push to {name} with; set HF_TOKEN to one that may write, or run hf auth login"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"HF_HUB_OFFLINE is set, so nothing can be pushed to {name}; unset it, or leave push out"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            remedy = "set HF_TOKEN to a token that may write there, or run hf auth login"
        elif status in _TRANSIENT:
            remedy = "push again later"
        else:
            remedy = "expected a repository NAME/MODEL that the token may write to"
        raise HubError(f"the Hub refused the push to {name} ({_reason(error)}); {remedy}") from error
    except (_HTTP_ERROR, json.JSONDecodeError, RuntimeError) as error:
        raise HubError(
            f"the Hub did not answer the push to {name} ({_reason(error)}); push again later"
        ) from error
    except (ValueError, OSError) as error:
        raise HubError(f"{name} cannot be pushed: {_reason(error)}") from error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled):
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in _TRANSIENT


def _reason(error: Exception) -> str:
    """An error in one line, without the token should it hold it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines)[:300]}"
    token = get_token()
    return text.replace(token, "***") if token else text


@contextlib.contextmanager
def _open_content(content: Content) -> Iterator[BinaryIO]:
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        yield file
