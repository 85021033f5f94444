"""Flax's msgpack, below the formats: chunks, damage, and headers read without their data."""

import os
import pathlib
import struct
import tracemalloc

import flax.serialization
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from models.checkpoint.flax_msgpack import as_torch, msgpack_entries
from models.checkpoint.tensors import Entry
from models.errors import InputError

RNG = np.random.default_rng(0)
FLAT = {
    "params.model.layers.0.q_proj.kernel": RNG.random((8, 6)),
    "params.model.layers.0.q_proj.bias": RNG.random(6),
    "params.lm_head.kernel": RNG.random((6, 20)),
}
TREE = unflatten_dict(FLAT, sep=".")


@pytest.mark.parametrize("largest", [2**30, 100])
def test_arrays_are_read_whole_or_in_chunks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", largest)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(TREE))
    assert (b"__msgpack_chunked_array__" in path.read_bytes()) == (largest == 100)
    entries = msgpack_entries(path)
    assert {n: e.shape for n, e in entries.items()} == {n: v.shape for n, v in FLAT.items()}
    for name, value in FLAT.items():
        np.testing.assert_array_equal(entries[name].load(), value)


def test_names_and_orientation_become_pytorchs() -> None:
    value = np.arange(12).reshape(3, 4)
    names = {
        "params.model.layers.1.mlp.up_proj.kernel": "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.embedding": "model.embed_tokens.weight",
        "model.decoder.layers.0.fc1.bias": "model.decoder.layers.0.fc1.bias",
        "model.decoder.final_layer_norm.scale": "model.decoder.final_layer_norm.weight",
        "model.norm.weight": "model.norm.weight",
    }
    entries = as_torch(
        {name: Entry((3, 4), lambda: value) for name in names}, pathlib.Path("somewhere")
    )
    assert list(entries) == list(names.values())
    for name, entry in zip(names, entries.values(), strict=True):
        wanted = value.T if name.endswith("kernel") else value
        assert entry.shape == wanted.shape
        np.testing.assert_array_equal(entry.load(), wanted)


def test_a_parameter_of_another_model_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"somewhere: h\.0\.state\.mean is no parameter of a Flax LLaMA or OPT model: convert",
    ):
        as_torch({"h.0.state.mean": Entry((2,), lambda: np.ones(2))}, pathlib.Path("somewhere"))


def damaged(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"flax_model\.msgpack is damaged or not complete .*: download it again"
    ):
        msgpack_entries(path)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x81", id="a map without its entry"),
        pytest.param(b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", id="an array of 4 GiB in 9 bytes"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of 4 billion entries"),
        pytest.param(b"\x81\xa1a\x07", id="a number in place of an array"),
        pytest.param(b"\x07", id="a number in place of a map"),
        pytest.param(b"\x80", id="a map of nothing"),
        pytest.param(b"\x81\xa1a\xc7\x02\x02\x90\x90", id="a complex number"),
        pytest.param(flax.serialization.to_bytes({"a": np.float64(1)}), id="a scalar"),
        pytest.param(b"\xc1", id="a byte that msgpack does not use"),
        pytest.param(b"\x81\xa1a" * 100_000, id="nested without end"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(tmp_path: pathlib.Path, data: bytes) -> None:
    damaged(tmp_path / "flax_model.msgpack", data)


def test_a_file_cut_short_or_too_long_is_refused(tmp_path: pathlib.Path) -> None:
    whole = flax.serialization.to_bytes(TREE)
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        damaged(tmp_path / "flax_model.msgpack", data)


def test_opening_reads_no_data(tmp_path: pathlib.Path) -> None:
    """32 arrays of 2 GiB that are holes in the file, then a small one."""
    path, count, size = tmp_path / "flax_model.msgpack", 32, 2 << 30
    head = (
        b"\x93\x91\xce"
        + struct.pack(">I", size // 4)
        + b"\xa7float32\xc6"
        + struct.pack(">I", size)
    )
    try:
        with path.open("wb") as file:
            file.write(b"\xde" + struct.pack(">H", count + 1))
            for i in range(count):
                file.write(
                    b"\xa5big%02d\xc9" % i + struct.pack(">I", len(head) + size) + b"\x01" + head
                )
                file.seek(size, os.SEEK_CUR)
            file.write(flax.serialization.msgpack_serialize({"last": np.ones(4, np.float32)})[1:])
    except OSError:
        pytest.skip("needs a file system with sparse files")
    tracemalloc.start()
    try:
        entries = msgpack_entries(path)
        assert entries["last"].load().sum() == 4
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert [entries[f"big{i:02}"].shape for i in range(count)] == [(size // 4,)] * count
    path.unlink()
