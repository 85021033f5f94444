"""Passes over the blocks against a plain loop that keeps every activation, and their costs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from calibration import passes
from calibration.journal import Journal
from calibration.observers import batch_norms, gram, second_moment
from calibration.passes import calibrate_blocks, micro_batches
from calibration.runtime import Runtime
from calibration.step_cache import StepCache
from models import arch
from models.arch import Block, Model, embed
from models.errors import InputError
from models.init import init_model
from models.sharding import make_mesh
from reference.small import CONFIGS, FAMILIES, VOCAB, model, run_block, same, tokens


class Counted(Sequence[Block]):
    """Blocks that note which of them is read."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks, self.reads = blocks, []

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> Block:  # type: ignore[override]
        self.reads.append(i)
        return self.blocks[i]


@jax.jit
def halved(block: Block) -> Block:
    """Some other block of the same shapes."""
    return jax.tree.map(lambda w: w / 2, block)


def activations(m: Model, windows: np.ndarray, replace: bool) -> Iterator[dict[str, np.ndarray]]:
    """Yield each block's taps in float64; the next block sees outputs of the block or its half."""
    x = embed(m.arch, m.non_block, windows)
    for block in m.blocks:
        y, taps = run_block(m, block, x)
        yield taps
        x = run_block(m, halved(block), x)[0] if replace else y


def collect(
    m: Model,
    windows: np.ndarray,
    replace: bool,
    batch: int = 8,
    mesh: Mesh | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return every block's statistics; the visitor halves the blocks, or leaves them."""
    found: list[dict[str, Any]] = []

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, int]:
        assert i == len(found)
        found.append(dict(stats))
        return halved(block) if replace else block, i

    runtime = Runtime(batch, mesh)
    records = calibrate_blocks(m, windows, runtime, visit, name="collecting", **options)
    assert records == list(range(len(m.blocks)))
    return found


@pytest.mark.parametrize(
    ("family", "propagate"), [*((family, "pruned") for family in FAMILIES), ("llama", "dense")]
)
def test_statistics_are_those_of_the_activations(family: str, propagate: str) -> None:
    """Inputs (taps) and outputs (slots) alike; only a pruned pass sees replaced blocks."""
    m, windows = model(family), tokens()
    before = jax.tree.map(np.array, (m.non_block, m.blocks))
    names = {*(s.reads for s in m.arch.slots), *(s.name for s in m.arch.slots)}
    found = collect(
        m,
        windows,
        replace=True,
        watch=dict.fromkeys(names, second_moment),
        propagate=propagate,
        batch=3,
    )
    for stats, taps in zip(
        found, activations(m, windows, replace=propagate == "pruned"), strict=True
    ):
        assert stats.keys() == names
        for name, s in stats.items():
            np.testing.assert_allclose(
                s.total, (taps[name] ** 2).sum((0, 1)), rtol=1e-4, atol=1e-6, err_msg=name
            )
            assert float(s.samples) == len(windows)
    assert same(before, jax.tree.map(np.array, (m.non_block, m.blocks)))


def test_propagation_makes_a_difference() -> None:
    """The two expectations above are not the same one."""
    dense, pruned = (
        list(activations(model("llama"), tokens(), replace)) for replace in (False, True)
    )
    assert np.array_equal(dense[0]["attn_in"], pruned[0]["attn_in"])
    assert not np.allclose(dense[1]["attn_in"], pruned[1]["attn_in"], rtol=1e-2)


@pytest.mark.parametrize("batch", [4, 64])
def test_batches_change_no_second_moment_but_norms_by_design(batch: int) -> None:
    m, windows, watch = model("opt"), tokens(), {"mlp_in": second_moment, "mlp_mid": batch_norms}
    one_block = m._replace(blocks=m.blocks[:1])
    whole, parts = (
        collect(one_block, windows, False, watch=watch, propagate="dense", batch=b)[0]
        for b in (6, batch)
    )
    np.testing.assert_allclose(whole["mlp_in"].per_sample, parts["mlp_in"].per_sample, rtol=1e-5)
    assert float(parts["mlp_mid"].batches) == -(-len(windows) // batch)
    assert np.allclose(whole["mlp_mid"].mean, parts["mlp_mid"].mean, rtol=1e-2) == (
        batch >= len(windows)
    )


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_every_block_is_read_once_in_order_and_progress_is_told_after_each(propagate: str) -> None:
    m, events = model("llama"), []
    blocks = Counted(m.blocks)

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, None]:
        events.append(i)
        return block, None

    def progress(name: str, steps: int, **more: Any) -> Callable[[], None]:
        assert (name, steps) == ("visiting", 3)
        assert more == {"unit": "blocks", "tokens": 0, "done": 0}  # nothing is watched
        return lambda: events.append("advance")

    calibrate_blocks(
        m._replace(blocks=blocks),
        tokens(),
        Runtime(3, progress=progress),
        visit,
        watch={},
        propagate=propagate,
        name="visiting",
    )
    assert blocks.reads == [0, 1, 2]
    assert events == [0, "advance", 1, "advance", 2, "advance"]


@pytest.mark.parametrize(("propagate", "reruns"), [("pruned", 2 * 2), ("dense", 0)])
def test_a_dense_walk_needs_no_second_pass(
    propagate: str, reruns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruned walk runs all blocks but the last again, two micro-batches each."""
    calls = []
    monkeypatch.setattr(passes, "apply_block", lambda arch, block, x, name: calls.append(1) or x)
    watch = {"mlp_in": second_moment}
    collect(model("llama"), tokens(), False, watch=watch, propagate=propagate, batch=3)
    assert len(calls) == reruns


def test_nothing_is_computed_where_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods without statistics walk without tokens: no embedding, no forward."""
    m = model("llama")
    monkeypatch.setattr(passes, "_observe", None)
    monkeypatch.setattr(passes, "embed", None)
    assert collect(m, tokens(), False, watch={}, propagate="pruned") == [{}, {}, {}]


def test_activations_that_overflow_are_bad_input() -> None:
    """Before the visitor sees them: a score of NaN would silently remove the wrong weights."""
    m = model("llama")
    loud = m.blocks[1].replace(up=m.blocks[1].up.replace(w=m.blocks[1].up.w * 1e30))
    m, seen = m._replace(blocks=(m.blocks[0], loud, m.blocks[2])), []
    with pytest.raises(
        InputError, match="the activations of block 1 are not finite: try dtype=float32"
    ):
        calibrate_blocks(
            m,
            tokens(),
            Runtime(3),
            lambda i, block, _: (seen.append(i) or block, None),
            watch={"mlp_mid": second_moment},
            propagate="pruned",
            name="watching",
        )
    assert seen == [0]


@pytest.mark.parametrize("mesh", ["", "data=2,model=2"])
def test_equal_blocks_compile_once(mesh: str) -> None:
    """Three blocks and a second pass compile once, and once without output for the last block.

    On a mesh too: states and sums lie from the first micro-batch on as the compiler leaves them.
    """
    m, options = (
        model("llama"),
        {
            "watch": {"mlp_in": second_moment, "mlp_mid": gram},
            "propagate": "dense",
            "batch": 4,
            "mesh": make_mesh(mesh) if mesh else None,
        },
    )
    before = passes._observe.jitted._cache_size()
    for _ in range(2):
        collect(m, tokens(8, 9), False, **options)
    assert passes._observe.jitted._cache_size() - before == 2


@pytest.mark.parametrize("mesh", ["", "data=2,model=2"])
def test_replaced_blocks_compile_once(mesh: str) -> None:
    """The forward pass of the blocks that take the place of others, three of equal shapes."""
    m, on = model("llama"), make_mesh(mesh) if mesh else None
    before = arch._apply.jitted._cache_size()
    collect(m, tokens(8, 10), True, 4, on, watch={"mlp_in": second_moment}, propagate="pruned")
    assert arch._apply.jitted._cache_size() - before == 1


def test_micro_batches_are_the_tokens_in_order() -> None:
    windows = tokens(7)
    parts = list(micro_batches(windows, 3))
    assert [p.shape[0] for p in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate(parts), windows)


def test_micro_batches_are_split_over_the_mesh() -> None:
    """Where the number of windows allows it; a last batch of three stays whole on every device."""
    parts = list(micro_batches(tokens(11), 8, make_mesh("data=4,model=2")))
    assert [p.sharding.shard_shape(p.shape) for p in parts] == [(2, 12), (3, 12)]


def test_a_mesh_changes_no_statistic() -> None:
    """tests/pruning/test_devices.py runs whole methods on several."""
    m, windows, watch = (
        model("llama-gqa"),
        tokens(8),
        {"attn_in": second_moment, "down": batch_norms},
    )
    one, many = (
        collect(m, windows, False, watch=watch, propagate="pruned", batch=8, mesh=mesh)
        for mesh in (None, make_mesh("data=4,model=2"))
    )
    for a, b in zip(one, many, strict=True):
        assert len(jax.tree.leaves(b)[0].sharding.device_set) == 8
        np.testing.assert_allclose(a["attn_in"].per_sample, b["attn_in"].per_sample, rtol=1e-5)
        np.testing.assert_allclose(a["down"].mean, b["down"].mean, rtol=1e-5)


class Sink:
    blocks, files = 0, ()

    def mark(self) -> None: ...
    def rewind(self, mark: Any) -> None: ...


@pytest.fixture(scope="module")
def random_llama() -> Model:
    return init_model(CONFIGS["llama"], jax.random.key(0))


def visited_blocks(
    model: Model,
    tokens: np.ndarray,
    directory: Path,
    memory: StepCache,
    *,
    key: Any,
    watched: bool = True,
) -> tuple[list, int]:
    """What a walk over the tokens records, and how many blocks it visited."""
    visited = []

    def visit(i: int, block: Any, stats: Any) -> tuple[Any, Any]:
        visited.append(i)
        return block, {name: s.total for name, s in stats.items()} or {"block": i}

    directory.mkdir()
    runtime = Runtime(2, journal=Journal(directory, {}, Sink(), memory, "model"))
    watch = {s.reads: second_moment for s in model.arch.slots} if watched else {}
    records = calibrate_blocks(
        model, tokens, runtime, visit, watch=watch, propagate="dense", name="looking", key=key
    )
    return records, len(visited)


@pytest.mark.parametrize("watched", [True, False], ids=["of activations", "of weights"])
def test_other_tokens_are_visited_only_where_tokens_matter(
    watched: bool, random_llama: Model, tmp_path: Path
) -> None:
    a, b = np.random.default_rng(0).integers(0, VOCAB, (2, 2, 8), np.int32)
    memory, depth = StepCache(), len(random_llama.blocks)
    first, visits = visited_blocks(
        random_llama, a, tmp_path / "1", memory, key="k", watched=watched
    )
    assert visits == depth
    again, visits = visited_blocks(
        random_llama, a, tmp_path / "2", memory, key="k", watched=watched
    )
    assert visits == 0
    jax.tree.map(np.testing.assert_array_equal, again, first)
    other, visits = visited_blocks(
        random_llama, b, tmp_path / "3", memory, key="k", watched=watched
    )
    assert visits == (depth if watched else 0)
    assert (
        any(
            (x != y).any()
            for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True)
        )
        if watched
        else other == first
    )


def test_a_pass_without_a_key_or_with_another_one_is_made_again(
    random_llama: Model, tmp_path: Path
) -> None:
    tokens, memory = np.random.default_rng(0).integers(0, VOCAB, (2, 8), np.int32), StepCache()
    keys = [None, "k", None, ("k", 2)]
    assert [
        visited_blocks(random_llama, tokens, tmp_path / str(n), memory, key=key)[1]
        for n, key in enumerate(keys)
    ] == [len(random_llama.blocks)] * 4
