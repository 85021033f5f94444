"""What the hub refuses, what it fails at, what the cache holds: the real client, a local hub."""

import contextlib
import pathlib
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from models.checkpoint import hub, hub_client
from models.errors import InputError
from reference.local_hub import LocalHub

NAME = "owner/name"
WEIGHTS = bytes(range(256)) * 2000
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


def failure(name: str = NAME) -> str:
    """Return the error of a model that cannot be fetched, as a line."""
    with pytest.raises(InputError) as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gated_model_says_so_and_how_to_log_in(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_hub.add(NAME, FILES).gated = frozenset({"friend"})
    page = f"{local_hub.url}/{NAME}"
    assert failure() == (
        f"model={NAME} is gated on the hub: ask for access at {page}, then log in with "
        "`hf auth login`, or set HF_TOKEN"
    )
    for token, account in (("t1", "stranger"), ("t2", "friend")):
        local_hub.account(token, account)
    monkeypatch.setenv("HF_TOKEN", "t1")
    refusal = f"model={NAME} is gated, and your account has no access: ask for it at {page}"
    assert failure() == refusal
    monkeypatch.setenv("HF_TOKEN", "t2")
    assert (hub.resolve(NAME) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("kind", ["absent", "private"])
def test_an_absent_model_may_be_a_gated_or_private_one(
    kind: str, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "private":
        local_hub.add(NAME, FILES).private = True
    assert failure() == (
        f"model={NAME} is no model of the hub, or a gated or private one ({NAME}): check the "
        "name; for a gated or private one log in with `hf auth login`, or set HF_TOKEN"
    )
    local_hub.account("token", "stranger")
    monkeypatch.setenv("HF_TOKEN", "token")
    assert failure() == (
        f"model={NAME} is no model of the hub that your account may see ({NAME}): check the name"
    )


def test_a_token_that_the_hub_refuses_is_named(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_hub.add(NAME, FILES)
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert "cannot be fetched, as the hub refuses your token: log in with" in failure()


@pytest.mark.parametrize("place", ["GET /api/models", "GET /lfs", "GET /owner/name/resolve"])
def test_a_busy_hub_is_tried_again(
    place: str, local_hub: LocalHub, caplog: pytest.LogCaptureFixture
) -> None:
    local_hub.add(NAME, FILES)
    local_hub.fail(place, times=2)
    assert (hub.resolve(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    again = [r.message for r in caplog.records if r.message.endswith("; trying again")]
    assert again and NAME in again[0] and "503" in again[0]


def test_a_hub_that_stays_busy_ends_in_one_line(local_hub: LocalHub) -> None:
    local_hub.add(NAME, FILES)
    local_hub.fail("GET /api/models", times=100)
    message = failure()
    assert message.startswith(f"model={NAME} cannot be fetched from the hub ({NAME}: ")
    assert "503" in message and message.endswith("try again, or give local files")
    assert local_hub.asked("GET /api/models") == 1 + len(hub_client.WAITS)


@pytest.mark.slow
def test_a_body_that_was_cut_goes_on_where_it_ended(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    local_hub.add(NAME, FILES)
    local_hub.fail("GET /lfs", status=0)
    assert (hub.resolve(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert local_hub.asked(r"GET /lfs/\w+$") == 1
    assert local_hub.asked(r"GET /lfs/\w+ bytes=[1-9]\d+-") == 1


def test_a_filled_cache_needs_no_network(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = local_hub.add(NAME, FILES)
    repository.commit({**FILES, "added.json": b""}, "v1")
    paths = {name: hub.resolve(name) for name in (NAME, f"{NAME}@v1")}
    local_hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert {name: hub.resolve(name) for name in paths} == paths
    assert not local_hub.requests
    assert failure("owner/other") == (
        "model=owner/other is not in the cache (owner/other), and HF_HUB_OFFLINE is set: unset it, "
        "or give local files"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert {name: hub.resolve(name) for name in paths} == paths
    assert "cannot be fetched from the hub (owner/other: " in failure("owner/other")


def test_a_cache_with_a_part_of_the_files_is_no_model(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"model-0000{k}-of-00002.safetensors": WEIGHTS for k in (1, 2)}
    local_hub.add(NAME, {"config.json": b"{}", **shards})
    path = hub.resolve(NAME)
    (path / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache" in failure()


def test_progress_counts_the_bytes_that_arrive(local_hub: LocalHub) -> None:
    local_hub.add(NAME, FILES)
    shown: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def show(description: str) -> Iterator[hub_client.Progress]:
        calls = shown.setdefault(description, [])
        yield lambda done, total: calls.append((done, total))

    with hub_client.reporting(show):
        hub.resolve(NAME)
        size = sum(map(len, FILES.values()))
        assert shown.pop(f"downloading {NAME}")[-1] == (size, size)
        hub.resolve(NAME)
        assert not shown, "nothing is downloaded twice"
        # Of a new commit, what is new counts alone.
        local_hub.repositories["models", NAME].commit({**FILES, "new.json": b"12345"})
        hub.resolve(NAME)
    assert shown[f"downloading {NAME}"][-1] == (5, 5)


def test_the_origin_of_a_path_is_read_from_the_cache_alone(tmp_path: pathlib.Path) -> None:
    commit = "0123456789" * 4
    inside = pathlib.Path(f"/x/hub/models--owner--my--name/snapshots/{commit}")
    assert hub_client.source_of(inside) == ("owner/my--name", commit)
    assert hub_client.source_of(inside / "model.gguf") == ("owner/my--name", commit)
    assert hub_client.source_of(tmp_path) is None
