"""What shapes alone predict is what a run writes: parameters, files, packs, cache."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.targets.shapes import Subject, Written
from launch.targets.sizes import (
    Storage,
    cache_entries,
    memory_bytes,
    parameters,
    weight_bytes,
)
from models.arch import Model
from models.checkpoint.formats import weight_files
from models.checkpoint.output_format import Layout
from models.checkpoint.pack import pack
from models.checkpoint.reader import open_checkpoint
from models.checkpoint.writer import Writer, save
from models.families import hf
from pruning.methods import METHODS
from pruning.types import Method, Request, prune
from reference.small import CONFIGS, EVERY_FAMILY, MORE_CONFIGS, model, tokens

CONFIG_OF = {**CONFIGS, **MORE_CONFIGS}
# Methods whose widths do not follow from scores.
ALIKE: dict[str, dict[str, Any]] = {
    "flap": {"structure": "UL-UM"},
    "llmrank": {"scorer": "norm"},
    "wanda_sp": {"repair": "bias"},
    "sleb": {"latter_barrier": 0},
    "magnitude": {},
    "sparsegpt": {},
    "minitron": {"hidden": 0.75},
}
FLOAT32 = Storage("float32", "none")


def write(
    directory: Path, family: str, method: Method, request: Request, layout: Layout = "auto"
) -> Path:
    """Prune the family's random model and write it."""
    m = model(family)
    pruned, outcome = prune(m, method, tokens(), request)
    writer = Writer(directory, CONFIG_OF[family], layout, work=directory.with_suffix(".work"))
    for i, block in enumerate(pruned.blocks):
        writer.put(i, block)
    writer.finish(pruned.non_block, directory, outcome.kept_blocks)
    return directory


def subject(family: str, method: Method, layout: Layout = "auto", **request: Any) -> Subject:
    return Subject(CONFIG_OF[family], method, Request(0.0, **request), layout)


def check_same(written: Written, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    loaded = open_checkpoint(directory)
    expected = {s.name: s.shape for s in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)}
    assert written.shapes == expected
    assert written.config["model_type"] == config["model_type"]
    assert parameters(written, FLOAT32) == loaded.parameters
    files = sum(path.stat().st_size for path in weight_files(directory))
    assert weight_bytes(written, FLOAT32) == files


CASES = [
    ("flap", "llama-gqa"),
    *(
        pytest.param(name, family, marks=pytest.mark.slow)
        for name in ALIKE
        for family in EVERY_FAMILY
        if (name == "flap" and family != "llama-gqa") or family in ("llama-gqa", "opt", "mixtral")
        if (name, family) != ("flap", "llama-gqa")
    ),
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_shapes_predict_is_what_is_written(name: str, family: str, tmp_path: Path) -> None:
    method = METHODS[name](**ALIKE[name])
    written = subject(family, method).at(0.4)
    check_same(written, write(tmp_path / "out", family, method, Request(0.4)))


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize(
    ("structure", "bias"),
    [
        ("AL-AM", False),
        pytest.param("AL-AM", True, marks=pytest.mark.slow),
        # No head goes, so that their reader gets no bias.
        pytest.param("AL-MM", True, marks=pytest.mark.slow),
    ],
)
def test_what_scored_units_predict_is_what_is_written(
    layout: Layout, structure: str, bias: bool, tmp_path: Path
) -> None:
    """With blocks of different widths, in a shipped class and padded to a stock one."""
    method, seen = METHODS["flap"](structure=structure, bias=bias), []

    def settle(choose: Any) -> float:
        seen.append(subject("llama-gqa", method, layout).with_units(choose(0.35)))
        return 0.35

    request = Request(0.1, settle=settle)
    directory = write(tmp_path / "out", "llama-gqa", method, request, layout)
    assert len({math.prod(b.up.w.shape) for b in seen[0].blocks}) > 1 or layout == "padded"
    check_same(seen[0], directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llmrank", {"scorer": "norm", "scope": "global"}),
        ("wanda_sp", {"scope": "global", "repair": "refit"}),
        ("magnitude_sp", {"scope": "global"}),
    ],
)
@pytest.mark.parametrize("family", ["llama-gqa", "opt", "phi3", "mixtral"])
def test_every_method_of_scored_units_settles(
    name: str, options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    method, seen = METHODS[name](**options), []

    def settle(choose: Any) -> float:
        seen.append(subject(family, method).with_units(choose(0.3)))
        return 0.3

    directory = write(tmp_path / "out", family, method, Request(0.1, settle=settle))
    check_same(seen[0], directory)


@pytest.mark.parametrize("remove", [[0, 2, 4], [0, 1, 4], [1, 2, 3]])
def test_parts_of_blocks_leave_no_larger_file_than_predicted(
    remove: list[int], tmp_path: Path
) -> None:
    method = METHODS["sleb"](units="sublayers", repair="none", early_barrier=0, latter_barrier=0)
    chosen = METHODS["sleb"](units="sublayers", repair="none", remove=remove)
    directory = write(tmp_path / "out", "llama", chosen, Request(0.5))
    predicted = subject("llama", method).at(0.5)
    assert parameters(predicted, FLOAT32) >= open_checkpoint(directory).parameters


def test_experts_and_routers_that_go_are_predicted(tmp_path: Path) -> None:
    method = METHODS["reap"]()
    written = subject("qwen3_moe", method).at(0.5)
    assert [len(b.experts) for b in written.blocks] == [2, 0, 2]
    check_same(written, write(tmp_path / "out", "qwen3_moe", method, Request(0.5)))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("wanda", None),
        ("wanda", (2, 4)),
        pytest.param("magnitude", None, marks=pytest.mark.slow),
    ],
)
def test_a_bitmask_pack_is_predicted_to_the_byte(
    name: str, pattern: tuple[int, int] | None, tmp_path: Path
) -> None:
    method = METHODS[name](**({"scope": "row"} if name == "magnitude" else {}))
    m = model("llama-gqa")
    # Prunable entries of zero would be fewer than counted; random ones are none.
    request = Request(0.5, pattern=pattern)
    directory = write(tmp_path / "out", "llama-gqa", method, request)
    sizes = pack(directory, "bitmask")
    written = subject("llama-gqa", method).at(0.5)
    storage = Storage("float32", "bitmask")
    assert sizes.packed == weight_bytes(written, storage)
    zeros = sum(
        int(np.sum(np.asarray(leaf) == 0))
        for block in open_checkpoint(directory).model.blocks
        for leaf in jax.tree.leaves(block)
    )
    assert parameters(written, storage) == parameters(written, FLOAT32) - zeros
    assert m.arch.config.tied


def test_zeros_are_never_more_than_predicted_where_a_threshold_is_for_a_matrix(
    tmp_path: Path,
) -> None:
    method = METHODS["magnitude"](scope="matrix")
    directory = write(tmp_path / "out", "llama-gqa", method, Request(0.37))
    written, storage = subject("llama-gqa", method).at(0.37), Storage("float32", "bitmask")
    packed, unit = pack(directory, "bitmask").packed, sum(s[0] for s in written.linears.values())
    assert 0 <= weight_bytes(written, storage) - packed <= 4 * unit


def test_a_macko_pack_is_predicted_for_zeros_at_random_places(tmp_path: Path) -> None:
    config = CONFIGS["llama"] | {"hidden_size": 128, "intermediate_size": 256}
    arch, non_block, blocks = hf.specs(config)
    rng = np.random.default_rng(0)

    def draw(spec: hf.Spec) -> jax.Array:
        kept = rng.random(spec.shape) < 0.1 if len(spec.shape) == 2 else 1.0
        return jnp.asarray(rng.normal(1, 0.1, spec.shape) * kept, jnp.float32)

    m = Model(arch, *jax.tree.map(draw, (non_block, blocks), is_leaf=hf.is_spec))
    save(tmp_path / "out", m, config, tmp_path)
    packed = pack(tmp_path / "out", "macko").packed
    dense = Written(dict(config), non_block, blocks, {})
    entries = {name: round(0.1 * math.prod(shape)) for name, shape in dense.linears.items()}
    predicted = weight_bytes(dense._replace(entries=entries), Storage("float32", "macko"))
    assert abs(predicted / packed - 1) < 0.02


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gemma2", "mistral", "mixtral"])
def test_the_cache_has_the_heads_and_windows_of_the_configuration(family: str) -> None:
    config, batch, length = CONFIG_OF[family], 3, 7
    _, non_block, blocks = hf.specs(config)
    written = Written(dict(config), non_block, blocks, {})
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    # Gemma 2 has a window in every other block, Mistral in all.
    windows = {"gemma2": [5, None, 5], "mistral": [5, 5, 5]}.get(family, [None] * 3)
    expected = sum(2 * batch * min(length, w or length) * heads * size for w in windows)
    assert cache_entries(written, batch, length) == expected
    whole = memory_bytes(written, Storage("bfloat16", "none"), batch, length)
    assert whole == 2 * (expected + written.parameters)


def test_an_allocation_does_not_change_the_number_of_zeros() -> None:
    method = METHODS["wanda"]()
    plain = subject("llama", method)
    with_owl = dataclasses.replace(
        plain, request=Request(0.0, allocation=lambda *_: pytest.fail("was asked"))
    )
    assert with_owl.at(0.5).entries == plain.at(0.5).entries
