"""Names of models: directories, files, embedded models and hub ids; others give one line."""

import pathlib

import huggingface_hub
import pytest

from models.checkpoint import hub
from models.errors import InputError


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
        "~nobody-here/x",
        "owner/na me",
    ],
)
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such directory or file, and not a hub id"):
        hub.resolve(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InputError, match=r"neither a directory nor a \.gguf file"):
        hub.resolve(str(tmp_path / "model.onnx"))


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, files: list[str] | Exception, target: pathlib.Path | Exception
) -> list[dict[str, object]]:
    """Put a hub in the place of the real one; returns the downloads asked of it."""
    asked: list[dict[str, object]] = []

    def list_repo_files(self: object, name: str) -> list[str]:
        if isinstance(files, Exception):
            raise files
        return files

    def snapshot_download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        if isinstance(target, Exception):
            raise target
        return str(target)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], "*.safetensors"),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], "*.safetensors"),
        (["flax_model.msgpack", "pytorch_model.bin"], "flax_model*.msgpack"),
        (["pytorch_model-00001-of-00002.bin", "onnx/model.safetensors"], "pytorch_model*.bin"),
        (ConnectionError("offline"), "*.safetensors"),
    ],
)
def test_a_download_has_one_format_of_weights(
    files: list[str] | Exception,
    weights: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = fake_hub(monkeypatch, files, tmp_path)
    assert hub.resolve("facebook/opt-125m") == tmp_path
    (download,) = asked
    assert download["name"] == "facebook/opt-125m"
    patterns = download["allow_patterns"]
    assert isinstance(patterns, list)
    assert [p for p in patterns if p in hub.WEIGHTS] == [weights] and "*.json" in patterns
    assert download["ignore_patterns"] == ["*/*"]


def test_a_configuration_is_downloaded_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_hub(monkeypatch, AssertionError("nobody needs the list"), tmp_path)
    assert hub.resolve("facebook/opt-66b", weights=False) == tmp_path
    assert [download["allow_patterns"] for download in asked] == [["config.json"]]


@pytest.mark.parametrize(
    "reason",
    [ConnectionError("no route to host\nTraceback of many lines"), OSError(), KeyError("repo")],
)
def test_an_unreachable_hub_is_reported(reason: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ConnectionError("offline"), reason)
    with pytest.raises(
        InputError,
        match=r"model=owner/name cannot be fetched from the hub \(.+\): check the name and the "
        "network",
    ) as caught:
        hub.resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_a_model_outside_the_cache_is_reported_offline() -> None:
    """Use the library itself: HF_HUB_OFFLINE is set for all tests and the cache lacks the model."""
    with pytest.raises(InputError, match="cannot be fetched from the hub"):
        hub.resolve("no-such-owner/no-such-model-of-topiary")
