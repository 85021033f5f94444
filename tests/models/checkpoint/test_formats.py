"""Every format gives the tensors that were written; damage gives one line with a remedy."""

import contextlib
import json
import os
import pathlib
import pickle
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from models.checkpoint.formats import open_tensors, weight_files
from models.errors import InputError

State = dict[str, np.ndarray]
DIM, HIDDEN, VOCAB = 8, 12, 20


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a one-block checkpoint of transformers' Llama or OPT."""
    if family == "llama":
        block = {
            f"self_attn.{n}_proj.weight": (out, DIM)
            for n, out in (("q", DIM), ("k", 4), ("v", 4), ("o", DIM))
        }
        block |= {
            "mlp.gate_proj.weight": (HIDDEN, DIM),
            "mlp.up_proj.weight": (HIDDEN, DIM),
            "mlp.down_proj.weight": (DIM, HIDDEN),
        }
        block |= {"input_layernorm.weight": (DIM,), "post_attention_layernorm.weight": (DIM,)}
        non_block = {
            "model.embed_tokens.weight": (VOCAB, DIM),
            "model.norm.weight": (DIM,),
            "lm_head.weight": (VOCAB, DIM),
        }
        return non_block | {f"model.layers.0.{n}": s for n, s in block.items()}
    linears = {"fc1": (HIDDEN, DIM), "fc2": (DIM, HIDDEN)} | {
        f"self_attn.{n}_proj": (DIM, DIM) for n in ("q", "k", "v", "out")
    }
    block = {f"{n}.weight": s for n, s in linears.items()} | {
        f"{n}.bias": s[:1] for n, s in linears.items()
    }
    block |= {
        f"{n}_layer_norm.{kind}": (DIM,)
        for n in ("self_attn", "final")
        for kind in ("weight", "bias")
    }
    non_block = {
        "embed_tokens.weight": (VOCAB, 4),
        "embed_positions.weight": (10, DIM),
        "project_in.weight": (DIM, 4),
    }
    non_block |= {
        "project_out.weight": (4, DIM),
        "final_layer_norm.weight": (DIM,),
        "final_layer_norm.bias": (DIM,),
    }
    return {f"model.decoder.{n}": s for n, s in non_block.items()} | {
        f"model.decoder.layers.0.{n}": s for n, s in block.items()
    }


def random_state(family: str, dtype: type = np.float32) -> State:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes_of(family).items()
    }


def as_flax(state: State) -> State:
    """Return the names of these parameters in transformers' FlaxLlama and FlaxOPT."""
    out = {}
    for name, value in state.items():
        module, role = name.rsplit(".", 1)
        if "embed_" in name:
            role = "embedding"
        elif role == "weight" and value.ndim == 2:
            role, value = "kernel", value.T
        elif role == "weight" and "decoder" in name:
            # OPT's norms are flax.linen.LayerNorm; LLaMA's own RMS norms say "weight".
            role = "scale"
        out[f"{module}.{role}".replace(".", "/")] = value
    return out


def write_index(directory: pathlib.Path, name: str, weight_map: dict[str, object]) -> None:
    (directory / f"{name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )


def halves(
    directory: pathlib.Path, name: str, state: State, write: Callable[[State, pathlib.Path], None]
) -> None:
    """Write the state as two shards with an index, tensors alternating between them."""
    stem, _, suffix = name.partition(".")
    shards = [f"{stem}-0000{k + 1}-of-00002.{suffix}" for k in range(2)]
    for k, shard in enumerate(shards):
        write({n: v for i, (n, v) in enumerate(state.items()) if i % 2 == k}, directory / shard)
    write_index(directory, name, {n: shards[i % 2] for i, n in enumerate(state)})


def write_safetensors(state: State, path: pathlib.Path) -> None:
    save_file(
        {n: np.ascontiguousarray(v) for n, v in state.items()}, path, metadata={"format": "pt"}
    )


def write_msgpack(state: State, path: pathlib.Path) -> None:
    path.write_bytes(flax.serialization.to_bytes(unflatten_dict(state, sep="/")))


def write_bin(state: State, path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")

    def tensor(v: np.ndarray) -> object:
        v = np.ascontiguousarray(v)
        return (
            torch.from_numpy(v.view(np.int16)).view(torch.bfloat16)
            if v.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(v)
        )

    torch.save({n: tensor(v) for n, v in state.items()}, path)


WRITERS: dict[str, Callable[[pathlib.Path, State], None]] = {
    "safetensors": lambda d, s: write_safetensors(s, d / "model.safetensors"),
    "safetensors, sharded": lambda d, s: halves(d, "model.safetensors", s, write_safetensors),
    "safetensors of Flax": lambda d, s: write_safetensors(
        {n.replace("/", "."): v for n, v in as_flax(s).items()}, d / "model.safetensors"
    ),
    "msgpack": lambda d, s: write_msgpack(as_flax(s), d / "flax_model.msgpack"),
    "msgpack under params": lambda d, s: write_msgpack(
        {f"params/{n}": v for n, v in as_flax(s).items()}, d / "flax_model.msgpack"
    ),
    "msgpack, sharded": lambda d, s: halves(d, "flax_model.msgpack", as_flax(s), write_msgpack),
    "bin": lambda d, s: write_bin(s, d / "pytorch_model.bin"),
    "bin, sharded": lambda d, s: halves(d, "pytorch_model.bin", s, write_bin),
}


def assert_same(directory: pathlib.Path, state: State) -> None:
    tensors = open_tensors(directory)
    assert dict(tensors.shapes) == {n: v.shape for n, v in state.items()}
    for name, value in state.items():
        got = tensors.read(name)
        assert got.dtype == value.dtype, name
        np.testing.assert_array_equal(got, value, err_msg=name)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_tensors_written(
    tmp_path: pathlib.Path, form: str, family: str, dtype: type
) -> None:
    state = random_state(family, dtype)
    WRITERS[form](tmp_path, state)
    assert_same(tmp_path, state)


def test_safetensors_come_before_the_other_formats(tmp_path: pathlib.Path) -> None:
    state = random_state("llama")
    WRITERS["msgpack"](tmp_path, {n: v + 1 for n, v in state.items()})
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    WRITERS["safetensors, sharded"](tmp_path, {n: v + 2 for n, v in state.items()})
    WRITERS["safetensors"](tmp_path, state)
    assert_same(tmp_path, state)


@contextlib.contextmanager
def memory_below(size: int) -> Iterator[None]:
    """Assert that the block allocates at most `size` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def fails(directory: pathlib.Path, *says: str) -> None:
    """Opening raises one line of InputError that holds all of `says`."""
    with pytest.raises(InputError) as caught:
        open_tensors(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


def test_a_directory_without_weights_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    fails(
        tmp_path,
        str(tmp_path),
        "holds no weights",
        "model.safetensors",
        "flax_model.msgpack",
        "pytorch_model.bin",
        ".index.json",
    )


def header(tensors: object, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGED = {
    "empty": b"",
    "a header of 4 EiB": struct.pack("<Q", 2**62) + b"{}",
    "a header longer than the file": struct.pack("<Q", 2**20) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"abcdefgh",
    "cut short": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
    "a shape larger than its bytes": header(
        {"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 16]}}, bytes(16)
    ),
    "offsets that overlap": header(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors_are_refused(tmp_path: pathlib.Path, damage: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[damage])
    with memory_below(2**20):
        fails(
            tmp_path,
            str(tmp_path / "model.safetensors"),
            "damaged or not complete",
            "download it again",
        )


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path: pathlib.Path, name: str) -> None:
    if name.endswith("bin"):
        pytest.importorskip("torch")
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 12345\n"
    )
    fails(tmp_path, name, "git lfs pull")


def test_a_bin_without_torch_names_the_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(tmp_path, "pytorch_model.bin", "pip install torch", "safetensors")


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.target}",)

    def __init__(self, target: pathlib.Path):
        self.target = target


def test_opening_a_bin_runs_no_code(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    target = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Malicious(target)}, tmp_path / "pytorch_model.bin")
    fails(tmp_path, "pytorch_model.bin", "convert it to safetensors")
    assert not target.exists()


def test_a_damaged_bin_is_refused(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2000)}, path)
    for damaged in (path.read_bytes()[:1000], b"", b"PK", pickle.dumps({"a": 1})):
        path.write_bytes(damaged)
        fails(tmp_path, "pytorch_model.bin", "download it again")
    for other in ([torch.ones(2)], {"epoch": 3}, {1: torch.ones(2)}):
        torch.save(other, path)
        fails(tmp_path, "pytorch_model.bin", "not a mapping of names to tensors", "state_dict")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        "a\\b",
        "..",
        ".",
        "",
        "a\0b",
        3,
        None,
    ],
)
def test_an_index_must_not_leave_its_directory(tmp_path: pathlib.Path, name: object) -> None:
    write_safetensors(random_state("llama"), tmp_path / "model.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    write_index(inside, "model.safetensors", {"a": name})
    fails(inside, "model.safetensors.index.json", repr(name), "no file of its own directory")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_a_damaged_index_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    fails(tmp_path, "model.safetensors.index.json", "download it again")


def test_the_shards_and_not_their_index_say_which_tensors_there_are(
    tmp_path: pathlib.Path,
) -> None:
    """Real indices name buffers and tied heads that no shard has, and leave out others."""
    state = random_state("llama")
    WRITERS["safetensors, sharded"](tmp_path, state)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    without_head = {n: f for n, f in weight_map.items() if n != "lm_head.weight"}
    for changed in (
        weight_map | {"surplus.weight": first},
        weight_map | {"lm_head.weight": second},
        without_head,
    ):
        write_index(tmp_path, "model.safetensors", changed)
        assert_same(tmp_path, state)
    write_index(tmp_path, "model.safetensors", weight_map)
    (tmp_path / second).unlink()
    fails(tmp_path, str(tmp_path / second), "missing", "download")


def test_a_shard_with_a_name_too_long_for_a_file_is_missing(tmp_path: pathlib.Path) -> None:
    write_index(tmp_path, "model.safetensors", {"x": "y" * 5000})
    fails(tmp_path, "is missing, but model.safetensors.index.json names it")


def test_the_index_decides_between_two_shards_with_the_same_tensor(tmp_path: pathlib.Path) -> None:
    first, second = "a.safetensors", "b.safetensors"
    for shard, value in ((first, 1.0), (second, 2.0)):
        write_safetensors({"x": np.full(2, value, np.float32)}, tmp_path / shard)
    for chosen, value in ((first, 1.0), (second, 2.0)):
        write_index(tmp_path, "model.safetensors", {"x": chosen, "y": first, "z": second})
        assert open_tensors(tmp_path).read("x")[0] == value


def test_shards_may_lie_in_a_directory_below_their_index(tmp_path: pathlib.Path) -> None:
    state = random_state("llama")
    (tmp_path / "weights").mkdir()
    write_safetensors(state, tmp_path / "weights" / "part.safetensors")
    write_index(tmp_path, "model.safetensors", dict.fromkeys(state, "weights/part.safetensors"))
    assert_same(tmp_path, state)
    assert weight_files(tmp_path) == [tmp_path / "weights" / "part.safetensors"]


@pytest.mark.parametrize("kind", ["sparse", "sparse rows", "meta", "quantised", "conjugate"])
def test_a_bin_with_tensors_that_are_no_plain_arrays_is_refused(
    kind: str, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch")
    plain = torch.ones(4, 4)
    odd = {
        "sparse": lambda: plain.to_sparse(),
        "sparse rows": lambda: plain.to_sparse_csr(),
        "meta": lambda: torch.ones(4, 4, device="meta"),
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "conjugate": lambda: torch.ones(4, 4, dtype=torch.complex64).conj(),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": plain, "b": odd()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"tensor b is stored as|is damaged"):
            open_tensors(tmp_path).read("b")


@pytest.mark.parametrize("form", ["safetensors", "msgpack", "bin"])
def test_integers_are_an_error_only_when_read(tmp_path: pathlib.Path, form: str) -> None:
    state = {
        "model.norm.weight": np.ones(4, np.float32),
        "model.extra.kernel": np.ones((4, 4), np.int8),
    }
    if form == "msgpack":
        write_msgpack(
            {n.replace(".", "/"): v for n, v in state.items()}, tmp_path / "flax_model.msgpack"
        )
    else:
        WRITERS[form](tmp_path, state)
    tensors = open_tensors(tmp_path)
    assert tensors.read("model.norm.weight").sum() == 4
    name = next(n for n in tensors.shapes if "extra" in n)
    with pytest.raises(InputError, match=r"model\.extra\.kernel is stored as .*dequantise"):
        tensors.read(name)


def test_float8_is_an_error_when_read(tmp_path: pathlib.Path) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}
    (tmp_path / "model.safetensors").write_bytes(header({"a": entry}, bytes(16)))
    with pytest.raises(InputError, match="tensor a is stored as F8_E4M3"):
        open_tensors(tmp_path).read("a")


def test_an_unknown_tensor_is_refused(tmp_path: pathlib.Path) -> None:
    WRITERS["safetensors"](tmp_path, random_state("llama"))
    with pytest.raises(
        InputError, match=r"has no tensor model\.layers\.7\.x: check that its config\.json"
    ):
        open_tensors(tmp_path).read("model.layers.7.x")


@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_a_file_cut_or_gone_after_opening_is_reported(tmp_path: pathlib.Path, form: str) -> None:
    state = random_state("llama")
    WRITERS[form](tmp_path, state)
    tensors = open_tensors(tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="damaged or not complete"):
        tensors.read("lm_head.weight")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        tensors.read("lm_head.weight")


def test_opening_reads_no_data(tmp_path: pathlib.Path) -> None:
    """Write a file of 64 GiB that takes no disk: `last.weight` holds ones, the rest is a hole."""
    size, path = 64 << 30, tmp_path / "model.safetensors"
    entries = {"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    entries["last.weight"] = {"dtype": "F32", "shape": [4], "data_offsets": [size, size + 16]}
    try:
        with path.open("wb") as file:
            file.write(header(entries))
            file.seek(size, os.SEEK_CUR)
            file.write(np.ones(4, np.float32).tobytes())
    except OSError:
        pytest.skip("needs a file system with sparse files")
    with memory_below(2**20):
        tensors = open_tensors(tmp_path)
        assert tensors.shapes["big"] == (size // 4,)
        assert tensors.read("last.weight").sum() == 4
    path.unlink()


@pytest.mark.parametrize("form", ["safetensors", "bin"])  # what msgpack gives is read-only
def test_an_array_that_was_read_belongs_to_the_caller(tmp_path: pathlib.Path, form: str) -> None:
    WRITERS[form](tmp_path, random_state("llama"))
    tensors = open_tensors(tmp_path)
    tensors.read("model.norm.weight")[:] = 0
    assert tensors.read("model.norm.weight").all()


def test_a_bin_is_mapped_not_loaded(tmp_path: pathlib.Path) -> None:
    maps = pathlib.Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs /proc")
    WRITERS["bin"](tmp_path, random_state("llama"))
    tensors = open_tensors(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in maps.read_text() and tensors.shapes


@pytest.mark.parametrize("form", ["safetensors", "msgpack", "bin"])
def test_reading_keeps_nothing_in_memory(tmp_path: pathlib.Path, form: str) -> None:
    state = {
        f"model.layers.{i}.mlp.up_proj.weight": np.full((1024, 1024), i, np.float32)
        for i in range(16)
    }
    WRITERS[form](tmp_path, state)
    tensors = open_tensors(tmp_path)
    with memory_below(5 * 2**22):
        for i, name in enumerate(state):
            assert tensors.read(name)[0, 0] == i
