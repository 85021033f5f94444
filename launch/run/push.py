"""Upload a finished output to the hub, into a repository that is private at first."""

import contextlib
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from models.checkpoint.hub_client import quiet, retried
from models.checkpoint.hub_errors import LOG_IN, cause_of, status_of
from models.errors import InputError

FIELD = "push_to_hub"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(name: str) -> None:
    """Check before any work that an upload will be allowed.

    Args:
      name: Repository to upload to, owner/name; empty for no upload.

    Raises:
      InputError: The name is none, there is no token, or it may not write there.
    """
    if not name:
        return
    from huggingface_hub import HfApi, get_token

    if not REPOSITORY.fullmatch(name):
        raise InputError("is no repository", "write owner/name", field=FIELD, value=name)
    if get_token() is None:
        raise InputError("needs a token", LOG_IN, field=FIELD, value=name)
    try:
        with quiet():
            account = HfApi().whoami()
    except Exception as e:  # each version of the client raises its own
        if status_of(e) == 401:
            raise InputError(
                "cannot be written, as the hub refuses your token",
                f"{LOG_IN} to a valid token",
                field=FIELD,
                value=name,
            ) from e
        raise InputError(
            f"cannot be asked for ({cause_of(e)})",
            "check the network, or leave it out and upload the output later with `hf upload`",
            field=FIELD,
            value=name,
        ) from e
    reason = _no_right(account, name)
    if reason:
        raise InputError(
            f"cannot be written: {reason}",
            "give a token that may write there (https://huggingface.co/settings/tokens)",
            field=FIELD,
            value=name,
        )


def _no_right(account: Mapping[str, Any], name: str) -> str:
    """Return why an account may not write a repository; empty if nothing speaks against it.

    Args:
      account: What the hub says of the token's account.
      name: The repository.
    """
    owner, user = name.split("/")[0], account.get("name")
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return "your token may only read"
    if token.get("role") == "fineGrained":
        rights = token.get("fineGrained", {})
        scopes = [
            scope.get("permissions", ())
            for scope in rights.get("scoped", ())
            if scope.get("entity", {}).get("name") in (owner, name)
        ]
        scopes.append(rights.get("global", ()))
        if not any("write" in right for scope in scopes for right in scope):
            return f"your token may not write repositories of {owner}"
    organisations = {org.get("name"): org for org in account.get("orgs", ())}
    if owner != user and owner not in organisations:
        return f"your account {user} is no member of {owner}"
    if owner != user and organisations[owner].get("roleInOrg") == "read":
        return f"your account {user} may only read in {owner}"
    return ""


def push(name: str, directory: pathlib.Path) -> str:
    """Upload a finished output; make its repository, a private one, if there is none.

    Args:
      name: Repository, owner/name.
      directory: The output.

    Returns:
      Address of the repository.

    Raises:
      InputError: The upload failed. The output stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def upload() -> str:
        url = api.create_repo(name, private=True, exist_ok=True)
        # In a second try the client sends what has not arrived.
        api.upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message="Upload a model pruned by Topiary",
        )
        return str(url)

    try:
        with quiet(), _bars_on_terminals_alone():
            return retried(upload, f"{name}: the upload failed")
    except Exception as e:  # the clients of the hub and of its storage raise their own
        again = shlex.join(["hf", "upload", name, str(directory), ".", "--private"])
        raise InputError(
            f"was not uploaded ({cause_of(e)}); the output is complete in {directory}",
            f"upload it again with `{again}`",
            field=FIELD,
            value=name,
        ) from e


@contextlib.contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """Keep the client's progress bars out of logs."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
