"""Uploads to the hub, by the real clients: rights asked for before, what arrives, what fails."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from launch.run.push import check_push, push
from models.errors import InputError
from reference.local_hub import LocalHub

NAME = "me/pruned"
FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "model.safetensors": bytes(range(256)) * 400,
}
# The client itself uses an argument of its HTTP library that is to go.
BY_HTTP = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def output(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a finished output."""
    directory = tmp_path / "my output"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def account(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that logs in with an account of the hub of this machine."""

    def log_in(role: str = "write", **orgs: str) -> None:
        local_hub.account("token", "me", role, **orgs)
        monkeypatch.setenv("HF_TOKEN", "token")

    # By plain HTTP: the test of xet is one of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return log_in


def refusal(name: str) -> str:
    """Return the error of a name that may not be written."""
    with pytest.raises(InputError) as caught:
        check_push(name)
    assert caught.value.field == "push_to_hub"
    return str(caught.value)


def test_nothing_is_asked_without_an_upload(local_hub: LocalHub) -> None:
    check_push("")
    assert not local_hub.requests


@pytest.mark.parametrize("name", ["pruned", "a/b/c", "/tmp/x/y", "me/", "me/na me"])
def test_a_name_is_owner_and_name(name: str, account: Callable[..., None]) -> None:
    account()
    assert "is no repository: write owner/name" in refusal(name)


def test_an_upload_needs_a_token_that_the_hub_knows(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    assert refusal(NAME) == f"push_to_hub={NAME} needs a token: {log_in}"
    assert not local_hub.requests
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert f"the hub refuses your token: {log_in}" in refusal(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network, or leave it out" in refusal(NAME)


@pytest.mark.parametrize(
    ("role", "orgs", "name", "reason"),
    [
        ("read", {}, "me/x", "your token may only read"),
        ("write", {}, "them/x", "your account me is no member of them"),
        ("write", {"us": "read"}, "us/x", "your account me may only read in us"),
    ],
)
def test_an_account_without_the_right_to_write_is_refused(
    role: str, orgs: dict[str, str], name: str, reason: str, account: Callable[..., None]
) -> None:
    account(role, **orgs)
    assert f"cannot be written: {reason}: give a token that may write" in refusal(name)


@pytest.mark.parametrize(("orgs", "name"), [({}, "me/x"), ({"us": "write"}, "us/x")])
def test_an_account_with_the_right_to_write_is_let_through(
    orgs: dict[str, str], name: str, account: Callable[..., None]
) -> None:
    account(**orgs)
    check_push(name)


@pytest.mark.parametrize(
    ("scoped", "allowed"),
    [
        ([{"entity": {"name": "me"}, "permissions": ["repo.content.read", "repo.write"]}], True),
        ([{"entity": {"name": NAME}, "permissions": ["repo.write"]}], True),
        ([{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}], False),
        ([{"entity": {"name": "them"}, "permissions": ["repo.write"]}], False),
        ([], False),
    ],
)
def test_a_fine_grained_token_needs_the_right_for_this_owner(
    scoped: list[dict[str, Any]],
    allowed: bool,
    local_hub: LocalHub,
    account: Callable[..., None],
) -> None:
    account("fineGrained")
    local_hub.accounts["token"]["auth"]["accessToken"]["fineGrained"] = {"scoped": scoped}
    if allowed:
        check_push(NAME)
    else:
        assert "your token may not write repositories of me" in refusal(NAME)


@BY_HTTP
def test_an_output_arrives_whole_in_a_private_repository(
    local_hub: LocalHub, output: pathlib.Path, account: Callable[..., None]
) -> None:
    account()
    assert push(NAME, output) == f"{local_hub.url}/{NAME}"
    repository = local_hub.repositories["models", NAME]
    assert repository.private
    arrived = repository.commits[repository.refs["main"]]
    assert {name: arrived[name] for name in FILES} == FILES
    # A second upload of the same name replaces files, and leaves the repository as public as it is.
    repository.private = False
    (output / "config.json").write_bytes(b"{1}")
    push(NAME, output)
    assert repository.commits[repository.refs["main"]]["config.json"] == b"{1}"
    assert not repository.private


@pytest.mark.slow
@BY_HTTP
def test_a_busy_hub_is_tried_again(
    local_hub: LocalHub, output: pathlib.Path, account: Callable[..., None]
) -> None:
    account()
    local_hub.fail("POST /api/repos/create", times=2)
    push(NAME, output)
    assert "model.safetensors" in list(local_hub.repositories["models", NAME].commits.values())[-1]


def test_a_failed_upload_says_how_to_go_on(
    local_hub: LocalHub, output: pathlib.Path, account: Callable[..., None]
) -> None:
    account()
    (output / "README.md").write_bytes(b"---\nbase_model: /home/x\n---\n")  # the hub refuses it
    with pytest.raises(InputError) as caught:
        push(NAME, output)
    message = str(caught.value)
    assert message.startswith(f"push_to_hub={NAME} was not uploaded (Invalid metadata in README.md")
    assert f"the output is complete in {output}" in message
    assert message.endswith(f"`hf upload {NAME} '{output}' . --private`")
    assert "\n" not in message and (output / "model.safetensors").is_file()


def test_large_files_go_through_xet_where_the_client_has_it(
    local_hub: LocalHub,
    output: pathlib.Path,
    account: Callable[..., None],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("hf_xet")
    account()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    local_hub.xet = f"local://{tmp_path / 'xet'}"
    push(NAME, output)
    assert local_hub.asked("GET /api/models/.*/xet-write-token") and not local_hub.asked("PUT /lfs")
    files = HfApi().list_repo_files(NAME)
    assert set(FILES) <= set(files)
