"""Names of models: directories, files, embedded models and hub ids; others give one line."""

import pathlib

import huggingface_hub
import pytest

from models.checkpoint import hub, hub_client
from models.errors import InputError
from reference.local_hub import LocalHub


@pytest.fixture
def embedded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Make a folder of two embedded models, with a secret beside it."""
    folder = tmp_path / "embedded"
    for name in ("embedded/tiny-llama", "embedded/tiny-opt", "x"):
        (tmp_path / name).mkdir(parents=True)
    (folder / "README.md").touch()
    monkeypatch.setattr(hub, "EMBEDDED", folder)
    return folder


def test_local_paths_are_returned_as_they_are(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert hub.resolve(f"~/{tmp_path.name}") == tmp_path


def test_embedded_models_are_found_by_name(embedded: pathlib.Path) -> None:
    assert hub.resolve("embedded:tiny-llama") == embedded / "tiny-llama"


@pytest.mark.parametrize(
    "name", ["tiny-bert", "", ".", "..", "../x", "tiny-llama/../../x", "/etc", "README.md"]
)
def test_an_unknown_embedded_model_is_refused(name: str, embedded: pathlib.Path) -> None:
    with pytest.raises(
        InputError, match=r"there are embedded:tiny-llama, embedded:tiny-opt$"
    ) as caught:
        hub.resolve(f"embedded:{name}")
    assert f"model=embedded:{name} is" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "no-such-directory",
        "./no/such",
        "../x",
        "/no/such/directory",
        "a/b/c",
        "owner/na me",
    ],
)
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such directory or file, and not a hub id"):
        hub.resolve(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nobody-here/x", "names a home directory that does not exist"),
        ("x" * 300, "cannot be opened .File name too long"),
        ("a\0b", "cannot be opened"),
    ],
)
def test_a_path_that_cannot_be_looked_up_is_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        hub.resolve(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InputError, match=r"neither a directory nor a \.gguf file"):
        hub.resolve(str(tmp_path / "model.onnx"))


def files_of(*names: str) -> dict[str, bytes]:
    """Return the files of a repository, each with its name as contents."""
    return {name: name.encode() for name in ("config.json", *names)}


def names(path: pathlib.Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], {"model.safetensors"}),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.bin"],
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
        (["flax_model.msgpack", "pytorch_model.bin"], {"flax_model.msgpack"}),
        (["pytorch_model.bin", "onnx/model.safetensors"], {"pytorch_model.bin"}),
        (["model.safetensors", "consolidated.safetensors"], {"model.safetensors"}),
    ],
)
def test_a_download_has_one_format_of_weights(
    files: list[str], weights: set[str], local_hub: LocalHub
) -> None:
    local_hub.add("facebook/opt-125m", files_of(*files, "tokenizer.json", "onnx/config.json"))
    assert names(hub.resolve("facebook/opt-125m")) == {"config.json", "tokenizer.json"} | weights


def test_the_licence_and_the_card_are_downloaded(local_hub: LocalHub) -> None:
    kept = ["LICENSE", "LICENCE.txt", "NOTICE.md", "README.md", "COPYING"]
    local_hub.add("a/b", files_of("model.safetensors", *kept, "training.py", "tokenizer.py"))
    wanted = {"config.json", "model.safetensors", *kept}
    assert names(hub.resolve("a/b")) == wanted


def test_what_travels_with_a_pruned_model_is_downloaded(local_hub: LocalHub) -> None:
    kept = ["additional_chat_templates/tool_use.jinja", "USE_POLICY.md", "license.txt"]
    local_hub.add("a/b", files_of("model.safetensors", *kept, "LICENSE.py", "onnx/LICENSE"))
    assert names(hub.resolve("a/b")) == {"config.json", "model.safetensors", *kept}


def test_a_configuration_is_downloaded_alone(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_hub.add("facebook/opt-66b", files_of("model.safetensors"))
    assert names(hub.resolve("facebook/opt-66b", weights=False)) == {"config.json"}
    # What is in the cache now is no model.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="is not in the cache"):
        hub.resolve("facebook/opt-66b")


@pytest.mark.parametrize("files", [{"README.md": b""}, {"config.json": b"", "model.onnx": b""}])
def test_a_repository_without_weights_is_refused(
    files: dict[str, bytes], local_hub: LocalHub
) -> None:
    local_hub.add("owner/name", files)
    with pytest.raises(InputError, match=r"^model=owner/name has no weights in a known format"):
        hub.resolve("owner/name")


def test_a_revision_is_a_commit_a_tag_or_a_branch(local_hub: LocalHub) -> None:
    repository = local_hub.add("owner/name", files_of("model.safetensors"))
    first = repository.refs["main"]
    second = repository.commit(files_of("model.safetensors", "added.json"), "refs/pr/1")
    for revision, commit in (
        ("main", first),
        (first, first),
        ("refs/pr/1", second),
        (second, second),
    ):
        path = hub.resolve(hub.at_revision("owner/name", revision))
        assert path == hub.resolve(f"owner/name@{revision}")
        assert hub_client.source_of(path) == ("owner/name", commit)
        assert (path / "added.json").exists() == (commit == second)
    assert hub_client.source_of(hub.resolve("owner/name")) == ("owner/name", first)


def test_a_revision_that_does_not_exist_is_named(local_hub: LocalHub) -> None:
    local_hub.add("owner/name", files_of("model.safetensors"))
    hub.resolve("owner/name")
    # The cache, which holds the main branch, is no answer.
    with pytest.raises(
        InputError,
        match=r"^model=owner/name@v9 cannot be found, as owner/name has no revision v9: .*/name$",
    ):
        hub.resolve("owner/name@v9")


@pytest.mark.parametrize("name", ["embedded:tiny-llama", ".", "model.gguf"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^revision=v1 names a revision of the hub, and model"):
        hub.at_revision(name, "v1")
    assert hub.at_revision(name, "") == name


def test_two_revisions_of_a_name_must_agree() -> None:
    assert hub.at_revision("owner/name@v1", "v1") == "owner/name@v1"
    with pytest.raises(InputError, match=r"^revision=v2 contradicts"):
        hub.at_revision("owner/name@v1", "v2")
