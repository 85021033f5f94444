"""Warnings say where a linear lost another share than was asked, and where nothing is left."""

import pytest

from launch.report.removal import LinearCounts, linear_warnings
from launch.run import export
from models.checkpoint.reader import Checkpoint, open_checkpoint
from pruning.types import Outcome, Removed
from reference import tiny

SLOTS = ("q", "k", "v", "o", "gate", "up", "down")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    state = tiny.state_of(tiny.GQA, tiny.random_model(tiny.GQA))
    return open_checkpoint(tiny.write(tmp_path_factory.mktemp("model"), state))


def counts(checkpoint: Checkpoint, removed: dict[str, float], rest: float) -> LinearCounts:
    """Return the counts of a model whose linears lost these shares."""
    sizes = tuple(
        {slot: getattr(block, slot).w.shape for slot in SLOTS} for block in checkpoint.specs
    )
    dense = export.by_linear(checkpoint.specs, sizes, lambda shape: shape[0] * shape[1])
    return LinearCounts(dense, {n: int(removed.get(n, rest) * c) for n, c in dense.items()})


def weights(asked: float) -> Outcome:
    return Outcome(asked=(dict.fromkeys(SLOTS, asked),) * 2)


def test_linears_that_reach_their_share_say_nothing(checkpoint: Checkpoint) -> None:
    # 0.488 is 0.5 of 41 entries, rounded down.
    for share in (0.5, 0.502, 0.488):
        assert list(linear_warnings(weights(0.5), counts(checkpoint, {}, share), checkpoint)) == []


def test_a_linear_that_misses_its_share_is_named(checkpoint: Checkpoint) -> None:
    (said,) = linear_warnings(weights(0.5), counts(checkpoint, {DOWN: 0.75}, 0.5), checkpoint)
    assert "1 of 14 linears" in said and f"{DOWN} 75% for 50%" in said


def test_a_linear_of_zeros_is_named_for_every_kind_of_method(checkpoint: Checkpoint) -> None:
    empty = counts(checkpoint, {DOWN: 1.0}, 0.5)
    missed, said = linear_warnings(weights(0.5), empty, checkpoint)
    assert DOWN in missed and "hold zeros alone" in said and DOWN in said
    units = Outcome(
        asked=({"down": 0.5},) * 2, removed=({"down": Removed(columns=(0,), cut=True)},) * 2
    )
    (said,) = linear_warnings(units, empty, checkpoint)
    assert "1 of 14 linears hold zeros alone" in said


def test_blocks_that_are_gone_are_no_empty_linears(checkpoint: Checkpoint) -> None:
    blocks = Outcome(asked=(dict.fromkeys(SLOTS, 0.5),) * 2, kept_blocks=(0,))
    gone = {f"model.layers.1.{name}": 1.0 for name in ("mlp.down_proj", "self_attn.q_proj")}
    assert list(linear_warnings(blocks, counts(checkpoint, gone, 0.0), checkpoint)) == []


def test_many_linears_are_counted(checkpoint: Checkpoint) -> None:
    (said,) = linear_warnings(weights(0.3), counts(checkpoint, {}, 0.6), checkpoint)
    assert "14 of 14 linears" in said and "and 11 more" in said
