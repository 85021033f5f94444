"""Errors of the hub's clients: which may pass, and what each tells the user to do."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from models.errors import InputError

BUSY = (408, 425, 429, 500, 502, 503, 504)  # statuses of a hub that may answer the next time
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Repository(NamedTuple):
    """A repository of the hub at a revision, and the setting that names it.

    Attributes:
      name: Its id, owner/name.
      revision: A commit, tag or branch; None for the main branch.
      kind: What it holds.
      field: Setting that names it, for errors.
      value: Value of that setting.
    """

    name: str
    revision: str | None
    kind: Literal["model", "dataset"]
    field: str
    value: str

    def error(self, reason: str, remedy: str) -> InputError:
        """Return the error for a repository that cannot be used."""
        return InputError(reason, remedy, field=self.field, value=self.value)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def status_of(error: BaseException) -> int | None:
    """Return the status of the hub's answer; None if it did not answer.

    Args:
      error: An exception of a client of the hub.
    """
    for e in _chain(error):
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None


def cause_of(error: Exception) -> str:
    """Return in one line what went wrong: the hub's answer, or else the first cause.

    Args:
      error: An exception of a client of the hub.
    """
    if isinstance(error, ValueError):  # the client's own words for what it or the hub refuses
        return " ".join(str(error).split())
    causes = list(_chain(error))
    answers = [e for e in causes if getattr(e, "response", None) is not None]
    cause = (answers or causes[-1:])[0]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def is_transient(error: Exception) -> bool:
    """Return True if the next try may succeed.

    Args:
      error: An exception of a client of the hub.
    """
    status = status_of(error)
    if status is not None:
        return status in BUSY
    for e in _chain(error):
        # By name: huggingface_hub has changed its HTTP library twice.
        names = {kind.__name__ for kind in type(e).__mro__}
        if names & {"ConnectError", "ProxyError", "OfflineModeIsEnabled"}:
            return False
        if names & {"TransportError", "RequestException"} or "Consistency check" in str(e):
            return True
    return False


def explained(error: Exception, repository: Repository) -> InputError:
    """Return the error that says what the hub has refused, and what to do.

    Args:
      error: An exception of a client of the hub.
      repository: What was asked for.
    """
    return repository.error(*_explanation(error, repository))


def _explanation(error: Exception, repository: Repository) -> tuple[str, str]:
    """Return reason and remedy."""
    from huggingface_hub import constants, errors, get_token

    kind = "model" if repository.kind == "model" else "data set"
    folder = "" if repository.kind == "model" else "datasets/"
    name, page = repository.name, f"{constants.ENDPOINT}/{folder}{repository.name}"
    causes = list(_chain(error))

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in causes)

    # A gated repository counts as one that is not found, too.
    if caused_by(errors.GatedRepoError):
        if get_token():
            return "is gated, and your account has no access", f"ask for it at {page}"
        return "is gated on the hub", f"ask for access at {page}, then {LOG_IN}"
    # From a hub without https the client takes the answer for another error.
    if caused_by(errors.RepositoryNotFoundError) or (status_of(error) == 401 and not get_token()):
        if get_token():
            return f"is no {kind} of the hub that your account may see ({name})", "check the name"
        # Without a token the hub gives the same answer for all three.
        return (
            f"is no {kind} of the hub, or a gated or private one ({name})",
            f"check the name; for a gated or private one {LOG_IN}",
        )
    if caused_by(errors.RevisionNotFoundError):
        return (
            f"cannot be found, as {name} has no revision {repository.revision}",
            f"give a commit, tag or branch of {page}",
        )
    if status_of(error) == 401:
        return "cannot be fetched, as the hub refuses your token", f"{LOG_IN} to a valid token"
    if caused_by(errors.OfflineModeIsEnabled):
        return (
            f"is not in the cache ({name}), and HF_HUB_OFFLINE is set",
            "unset it, or give local files",
        )
    return (
        f"cannot be fetched from the hub ({name}: {cause_of(error)})",
        "check the network and try again, or give local files",
    )
