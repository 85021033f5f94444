"""SLEB against a plain search without caches: all budgets, early stopping, and limits."""

import math
import pathlib
import weakref
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from calibration.states import OFFLOADS
from eval.perplexity import perplexity
from models import arch
from models.arch import Model, embed
from models.checkpoint.blocks import LazyBlocks
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError
from models.programs import Program
from models.sharding import make_mesh
from pruning.structured import sleb_runner
from pruning.structured.sleb import Sleb
from pruning.types import Outcome, Request, prune
from reference import small, tiny
from reference.sleb import LENGTH, TOKENS, WINDOWS, deep, loss, plain_search

GIB = 1 << 30
STATE = 4 * LENGTH * 16 / GIB  # one window's hidden states
families = pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])


def run(m: Model, n: int, batch: int = 2, **arguments: Any) -> tuple[Model, Outcome]:
    # The search alone; test_depth_repair.py has the repairs.
    method = Sleb(n, **{"repair": "none"} | arguments)
    return prune(m, method, TOKENS, Request(0.0), Runtime(batch=batch))


def details(m: Model, n: int, batch: int = 2, **arguments: Any) -> dict[str, Any]:
    return dict(run(m, n, batch, **arguments)[1].details)


@families
@pytest.mark.parametrize("barriers", [(1, 1), (0, 0), (2, 3)])
def test_the_search_agrees_with_a_plain_one(family: str, barriers: tuple[int, int]) -> None:
    m = deep(family)
    order, phases, work = plain_search(m, 3, *barriers)
    pruned, outcome = run(
        m, 3, early_barrier=barriers[0], latter_barrier=barriers[1], variant="official"
    )
    d = outcome.details
    assert d["removal_order"] == order
    for got, want in zip(d["losses"], phases, strict=True):
        assert [i for i, x in enumerate(got) if x is not None] == list(want)
        np.testing.assert_allclose(
            [x for x in got if x is not None], list(want.values()), rtol=1e-5
        )
    assert sum(d["block_evaluations"]["plain_search"]) == work > sum(d["block_evaluations"]["run"])
    assert outcome.kept_blocks == tuple(i for i in range(8) if i not in order)
    assert small.same(pruned.blocks, tuple(m.blocks[i] for i in outcome.kept_blocks))


@families
def test_the_last_loss_is_that_of_the_pruned_model(family: str) -> None:
    """A block left out of a trial costs what a dropped block costs."""
    pruned, outcome = run(deep(family), 2)
    best = min(x for x in outcome.details["losses"][-1] if x is not None)
    assert math.exp(best / LENGTH / WINDOWS) == pytest.approx(
        perplexity(pruned, TOKENS).value, rel=1e-6
    )


ROOMS = [
    (0.0, 0.0, 0.0),
    (7 * WINDOWS * STATE, 0.0, 0.0),
    (0.0, 5 * STATE, 0.0),
    (3 * WINDOWS * STATE, 2 * WINDOWS * STATE, 0.0),
    (STATE, GIB * STATE, 0.0),
    (0.0, 0.0, 7 * WINDOWS * STATE),
    (2 * STATE, 3 * STATE, 1.0),
]


@families
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_no_result_depends_on_the_cache(
    family: str, room: tuple[float, float, float], variant: str
) -> None:
    m = deep(family)
    want = details(m, 4, variant=variant)
    got = details(m, 4, variant=variant, device_gib=room[0], host_gib=room[1], disk_gib=room[2])
    assert all(got[k] == want[k] for k in ("removal_order", "losses", "stopped_at"))
    spent = [got["cache"][f"{tier}_bytes"] for tier in OFFLOADS]
    assert all(s <= r * GIB for s, r in zip(spent, room, strict=True)) and any(spent) == any(room)
    runs = [sum(d["block_evaluations"]["run"]) for d in (want, got)]
    plain = sum(got["block_evaluations"]["plain_search"])
    assert runs[0] <= runs[1]
    if variant == "official":
        assert runs[0] < 0.55 * plain
        assert (runs[1] == plain) == (not any(room))


@pytest.mark.parametrize("search", ["greedy", "influence"])
def test_a_checkpoint_that_does_not_fit_is_read_as_it_is_run(
    search: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of held blocks, with at most two alive: one at work, and the next."""
    config = small.CONFIGS["llama"] | {"num_hidden_layers": 8}
    tiny.write(tmp_path, tiny.state_of(config, deep("llama")), config)
    m = open_checkpoint(tmp_path).model
    refs: list[weakref.ref[Any]] = []
    most: list[int] = []
    placed = LazyBlocks.placed

    def counted(self: LazyBlocks, block: Any, mesh: Any = None) -> Any:
        on_device = placed(self, block, mesh)
        refs.append(weakref.ref(on_device.up.w))
        most.append(sum(ref() is not None for ref in refs))
        return on_device

    monkeypatch.setattr(LazyBlocks, "placed", counted)
    held, want = run(m, 3, search=search)
    whole = sum(x.nbytes for x in jax.tree.leaves(deep("llama").blocks))
    monkeypatch.setattr(sleb_runner, "fits_in_memory", lambda size, shards: size < whole)
    refs.clear()
    most.clear()
    streamed, got = run(m, 3, search=search)
    reads = most[: -len(streamed.blocks)]  # the last ones are the result
    assert max(reads) <= 2 and len(reads) >= 7
    assert small.same(held.blocks, streamed.blocks) and got.kept_blocks == want.kept_blocks
    assert want.details["cache"]["blocks_held"] and not got.details["cache"]["blocks_held"]
    assert all(
        got.details[k] == want.details[k]
        for k in ("removal_order", "losses", "stopped_at", "influence")
    )


def test_states_of_candidates_save_work_in_the_next_phase() -> None:
    m = deep("llama")
    states = 7 * WINDOWS * STATE  # of the surviving blocks alone
    alone, both = (
        details(m, 4, variant="official", device_gib=g, host_gib=0.0) for g in (states, 1.0)
    )
    assert both["cache"]["device_bytes"] > alone["cache"]["device_bytes"]
    assert sum(both["block_evaluations"]["run"]) < sum(alone["block_evaluations"]["run"])


@families
def test_stopping_early_changes_nothing_but_the_work(family: str) -> None:
    """A stopped candidate has no loss, but the limit that it exceeded."""
    m = deep(family)
    # A head so sharp that losses differ by much; and more windows.
    m = m._replace(
        non_block=m.non_block.replace(norm=jax.tree.map(lambda x: 8 * x, m.non_block.norm))
    )
    outcomes = [
        prune(m, Sleb(4, variant=v), small.tokens(24, LENGTH), Request(0.0), Runtime(batch=1))[1]
        for v in ("official", "corrected")
    ]
    every, stopped = (dict(o.details) for o in outcomes)
    assert stopped["removal_order"] == every["removal_order"]
    assert not any(x is not None for phase in every["stopped_at"] for x in phase)
    ended = 0
    for phase, (full, losses, passed) in enumerate(
        zip(every["losses"], stopped["losses"], stopped["stopped_at"], strict=True)
    ):
        best = losses[stopped["removal_order"][phase]]
        for a, b, bound in zip(full, losses, passed, strict=True):
            assert (a is None) == (b is None and bound is None)
            if b is not None:
                assert a == b and bound is None
            elif a is not None:
                assert best <= bound <= a
                ended += 1
    assert ended > 0
    assert sum(stopped["block_evaluations"]["run"]) < sum(every["block_evaluations"]["run"])


def test_the_micro_batch_changes_no_order() -> None:
    a, b = (details(deep("opt"), 3, batch, variant="official") for batch in (4, 6))
    assert a["removal_order"] == b["removal_order"]
    np.testing.assert_allclose(*(np.array(d["losses"], float) for d in (a, b)), rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_removes_the_same() -> None:
    m, method = deep("llama"), Sleb(3, variant="official")
    one, many = (
        prune(m, method, TOKENS, Request(0.0), Runtime(batch=4, mesh=mesh))[1]
        for mesh in (None, make_mesh("data=4,model=2"))
    )
    assert one.kept_blocks == many.kept_blocks
    np.testing.assert_allclose(
        *(np.array(o.details["losses"], float) for o in (one, many)), rtol=1e-5
    )


def test_one_program_serves_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    chex.clear_trace_counter()
    once = chex.assert_max_traces(arch._apply.function, n=1)
    program = Program(once, arch._apply.name, arch._apply.static)
    monkeypatch.setattr(arch, "_apply", program)
    run(deep("llama"), 4)
    assert program.jitted._cache_size() == 1


def test_one_shot_by_perplexity_takes_the_lowest_of_the_first_phase() -> None:
    m = deep("llama")
    _, phases, _ = plain_search(m, 1)
    for variant in ("official", "corrected"):
        d = details(m, 3, batch=1, search="perplexity", variant=variant)
        assert d["removal_order"] == sorted(phases[0], key=lambda i: phases[0][i])[:3]
        assert len(d["losses"]) == 1


@families
def test_one_shot_by_influence_takes_the_blocks_that_turn_their_input_least(family: str) -> None:
    m = deep(family)
    xs = [embed(m.arch, m.non_block, TOKENS)]
    for block in m.blocks:
        xs.append(m.arch.block(block, xs[-1])[0])
    a, b = (np.asarray(x, np.float64) for x in (jnp.stack(xs[:-1]), jnp.stack(xs[1:])))
    want = 1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean(
        (1, 2)
    )
    d = details(m, 3, batch=4, search="influence")
    np.testing.assert_allclose(d["influence"][1:-1], want[1:-1], atol=1e-6)
    assert d["influence"][0] is None and d["influence"][-1] is None and d["losses"] == []
    assert d["removal_order"] == [int(i) + 1 for i in np.argsort(want[1:-1])[:3]]


@families
@pytest.mark.parametrize("search", ["greedy", "perplexity", "influence"])
def test_sublayers_are_removed_one_by_one(family: str, search: str) -> None:
    m = deep(family, 4)
    pruned, outcome = run(m, 5, units="sublayers", search=search, early_barrier=0, latter_barrier=0)
    parts = outcome.details["removed_parts"]
    assert len(parts) == 5 and len({tuple(p) for p in parts}) == 5
    both = [i for i in range(4) if sum(p[0] == i for p in parts) == 2]
    assert both and outcome.kept_blocks == tuple(i for i in range(4) if i not in both)
    writers = [s.name for s in m.arch.slots if s.feeds == "next"]
    blocks = [
        b.replace(
            **{w: jax.tree.map(jnp.zeros_like, getattr(b, w)) for w in writers if [i, w] in parts}
        )
        for i, b in enumerate(m.blocks)
    ]
    want = small.logits(m._replace(blocks=tuple(blocks)), TOKENS)
    np.testing.assert_allclose(small.logits(pruned, TOKENS), want, atol=1e-5)
    zero = sum(np.asarray(z).all() for block in small.zeros(pruned) for z in block.values())
    assert zero == sum(
        4 if w == writers[0] else len(m.arch.slots) - 4 for i, w in parts if i not in both
    )
    if search == "greedy":
        last = outcome.details["losses"][-1][outcome.details["removal_order"][-1]]
        assert last == pytest.approx(loss(m, blocks), rel=1e-5)


def test_sublayers_need_a_residual_stream() -> None:
    with pytest.raises(InputError, match="a norm follows"):
        run(
            tiny.random_model(tiny.OPT_350M | {"vocab_size": small.VOCAB}),
            1,
            units="sublayers",
            early_barrier=0,
        )


@pytest.mark.parametrize("search", ["greedy", "perplexity"])
def test_a_tie_goes_to_the_earliest(search: str) -> None:
    """Three blocks that do nothing cost the same; the order of trials does not decide."""
    m = deep("llama")
    m = m._replace(
        blocks=tuple(
            sleb_runner.silenced(b, ("o", "down")) if i in (2, 3, 4) else b
            for i, b in enumerate(m.blocks)
        )
    )
    for variant in ("official", "corrected"):
        d = details(
            m, 2, search=search, variant=variant, batch=1, early_barrier=2, latter_barrier=3
        )
        assert (
            d["removal_order"] == [2, 3] and len({x for x in d["losses"][0] if x is not None}) == 1
        )


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_neighbours_are_those_missed_least_together(variant: str) -> None:
    m = deep("llama")
    d = details(m, 3, batch=1, search="contiguous", variant=variant)
    losses = {
        i: loss(m, [b for k, b in enumerate(m.blocks) if not i <= k < i + 3]) for i in range(1, 5)
    }
    best = min(losses, key=lambda i: losses[i])
    assert d["removal_order"] == [best, best + 1, best + 2]
    assert d["losses"][0][best] == pytest.approx(losses[best], rel=1e-5)
    known = [i for i, x in enumerate(d["losses"][0]) if x is not None]
    assert known == list(losses) or variant == "corrected"


def test_named_blocks_go_without_a_search() -> None:
    """Another run's order gives its model."""
    m = deep("llama")
    searched, outcome = run(m, 3)
    order = outcome.details["removal_order"]
    named, again = run(m, None, remove=order)
    assert small.same(named.blocks, searched.blocks)
    assert again.kept_blocks == outcome.kept_blocks and again.asked == outcome.asked
    assert again.details["removal_order"] == order and again.details["losses"] == []
    # Barriers are for a search.
    assert len(run(m, None, remove=[0, 7])[0].blocks) == 6


def test_named_sublayers_are_those_of_the_report() -> None:
    m = deep("llama", 4)
    searched, outcome = run(m, 3, units="sublayers")
    order = outcome.details["removal_order"]
    named, again = run(m, None, units="sublayers", remove=order)
    assert small.same(named.blocks, searched.blocks)
    assert again.details["removed_parts"] == outcome.details["removed_parts"]


def test_a_loss_that_is_not_finite_is_not_chosen() -> None:
    """A block that overflows is removed if it may be; if it must stay, no candidate is finite."""
    m = deep("llama")
    huge = jax.tree.map(lambda x: x * 1e38, m.blocks[7])
    with pytest.raises(
        InputError, match="only 0 of 6 candidates have a finite loss, and 1 must be removed"
    ):
        run(m._replace(blocks=(*m.blocks[:7], huge)), 1)
    alone = m._replace(blocks=(*m.blocks[:2], huge, *m.blocks[3:]))
    for variant in ("official", "corrected"):
        _, outcome = run(alone, 1, variant=variant)
        assert outcome.details["removal_order"] == [2]
        assert outcome.details["losses"][0].count(None) == 7
        assert "phase 1: the loss without 1, 3, 4, 5, 6 is not finite" in outcome.warnings[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"blocks": 7},
            "cannot remove 7 of 8 blocks with early_barrier=1 and latter_barrier=1: "
            "ask for 6 or fewer",
        ),
        ({"blocks": 8, "early_barrier": 0, "latter_barrier": 0}, "ask for 7 or fewer"),
        ({"blocks": 1, "early_barrier": 5, "latter_barrier": 5}, "ask for 0 or fewer"),
        ({"blocks": 13, "units": "sublayers"}, "cannot remove 13 of 16 sublayers"),
        ({"blocks": -1}, "blocks=-1 of sleb must not be negative"),
        ({"early_barrier": -1}, "early_barrier=-1 of sleb must not be negative"),
        ({"device_gib": -1.0}, "device_gib=-1.0 of sleb must not be negative"),
        ({"remove": [1], "blocks": 1}, "blocks=1 of sleb contradicts remove: leave it out"),
        (
            {"remove": [1], "search": "influence"},
            "search=influence of sleb contradicts remove: leave it out",
        ),
        ({"remove": [2, 1, 2]}, r"remove=\[2, 1, 2\] of sleb names one twice"),
        (
            {"remove": [8]},
            r"remove=\[8\] of sleb must be some of the 8 blocks, and 8 is none of them: name some "
            "from 0 to 7",
        ),
        ({"remove": range(8)}, "and something must stay"),
    ],
)
def test_arguments_that_the_model_cannot_follow_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(deep("llama"), Sleb(**arguments), TOKENS, Request(0.0))


def test_sparsity_is_a_fraction_of_the_blocks_unless_their_number_is_given() -> None:
    m = deep("llama")
    assert len(prune(m, Sleb(), TOKENS, Request(0.25))[0].blocks) == 6
    assert len(prune(m, Sleb(blocks=1), TOKENS, Request(0.25))[0].blocks) == 7
    assert small.same(prune(m, Sleb(blocks=0), TOKENS, Request(0.25))[0].blocks, m.blocks)
