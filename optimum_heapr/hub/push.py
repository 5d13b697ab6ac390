# Licensed under the Apache License, Version 2.0
"""Uploads a saved model to the Hub in one commit: a repository holds all of a model or nothing of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.companions import CARD_NAME, FOLDER, OWN_NAMES, STATISTICS_NAME
from ..utils.errors import HeaprError
from .card import PLACEHOLDER, point_to_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


# Of an earlier model in the same repository these would be loaded in place of, or mistaken for, parts of the new one.
_REPLACED = ("model*.safetensors", "model.safetensors.index.json", f"{FOLDER}/*", *OWN_NAMES)

_NEXT_STEPS = {
    400: "the Hub takes no such name, card or file; correct it",
    401: "the Hub does not know who you are; log in with `hf auth login`, or pass token or set HF_TOKEN",
    403: "you may not write there; pass a token with write access, or name a repository of your own",
    404: "the Hub has no such repository or revision, or hides it from you; check the name and the token",
    409: "somebody else changed it in the meantime; push again",
    412: "somebody else changed it in the meantime; push again",
}


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    with_statistics: bool = False,
) -> CommitInfo:
    """Uploads a folder that this package wrote, in one commit; the repository is made if there is none.

    Args:
        folder (`str`): a saved pruned model.
        repo_id (`str`): `NAME` or `OWNER/NAME` of the repository.
        private (`bool`, *optional*): whether a repository that is made is private; by default what the owner chose.
        token (`str` or `bool`, *optional*): defaults to that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*): branch to commit to, made if there is none; defaults to `main`.
        commit_message (`str`, *optional*): first line of the commit.
        create_pr (`bool`): open a pull request in place of committing.
        with_statistics (`bool`): upload the calibration statistics, too, if the folder has them.

    Returns:
        `CommitInfo`: the address of the commit, as a string with more to it.

    Raises:
        HeaprError: if the Hub refuses or the upload breaks off; then the repository holds what it held before.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, folder = HfApi(token=token), Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in set(OWN_NAMES) & set(paths):  # as the first version wrote it, into the root
        paths.setdefault(f"{FOLDER}/{name}", paths.pop(name))
    if not with_statistics:
        paths.pop(f"{FOLDER}/{STATISTICS_NAME}", None)
    with hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in paths and any(fnmatch(name, pattern) for pattern in _REPLACED)
        ]
        additions: dict[str, Path | bytes] = dict(paths)
        if CARD_NAME in paths:  # the card says how to load the model, and now that has a name
            card = paths[CARD_NAME].read_text(encoding="utf-8")
            additions[CARD_NAME] = point_to_folder(card.replace(PLACEHOLDER, repo_id)).encode()
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in additions.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=commit_message or "Upload a model pruned with optimum-heapr",
            revision=revision,
            create_pr=create_pr,
        )


def split_push_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those options that [`push_folder`] has, and the others."""
    ours = inspect.signature(push_folder).parameters.keys() - {"folder", "repo_id"}
    return (
        {name: value for name, value in options.items() if name in ours},
        {name: value for name, value in options.items() if name not in ours},
    )


def check_login(repo_id: str) -> None:
    """Refuses a malformed name or a missing token before any work is done for the push.

    Raises:
        HeaprError: naming the repository and the next step.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        HfApi().whoami()


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what the Hub answers into one line that names the repository and the next step.

    Raises:
        HeaprError: in place of the client's errors.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HFValidationError as error:
        raise HeaprError(f"repo_id={repo_id!r}: is no name for a repository; use NAME or OWNER/NAME") from error
    except LocalTokenNotFoundError as error:
        raise HeaprError(f"repo_id={repo_id!r}: {_NEXT_STEPS[401]}") from error
    except OfflineModeIsEnabled as error:
        raise HeaprError(f"repo_id={repo_id!r}: HF_HUB_OFFLINE is set; unset it to push") from error
    except (HTTPError, OSError, RuntimeError) as error:
        # An upload that fails is reported as a RuntimeError, by whatever went wrong below it.
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = f"{type(cause or error).__name__}: {' '.join(str(cause or error).split())[:200]}"
        if status in _NEXT_STEPS:
            detail = f" ({reason})" if status == 400 else f" ({status})"
            raise HeaprError(f"repo_id={repo_id!r}: {_NEXT_STEPS[status]}{detail}") from error
        raise HeaprError(
            f"repo_id={repo_id!r}: the upload broke off ({reason}); nothing was committed; push again, files that "
            "arrived are not sent twice"
        ) from error
