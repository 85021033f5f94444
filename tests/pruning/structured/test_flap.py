"""FLAP and methods by channels over whole models: cuts against masks, repairs, rounding, errors."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import Block, Group, Model, embed
from models.checkpoint.reader import abstract
from models.errors import InputError
from models.families import hf
from models.layers import Linear
from models.published import MODELS
from models.surgery import mask
from models.surgery import units as dense_units
from pruning.methods import METHODS
from pruning.structured.flap import Flap
from pruning.structured.flap_core import Structure
from pruning.structured.remove import units_per_block
from pruning.types import Outcome, Request, prune
from reference import tiny
from reference.small import FAMILIES, logits, model, run_block, same, tokens, weight

# The quick tests take the first family, the slow ones the others.
every_family = pytest.mark.parametrize(
    "family",
    [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)
SCOPES, REPAIRS = ("local", "global"), ("none", "bias", "refit", "refit_weights")
STRUCTURES = ["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


@functools.cache
def run(
    family: str, sparsity: float = 0.4, name: str = "flap", **arguments: Any
) -> tuple[Model, Outcome]:
    return prune(model(family), METHODS[name](**arguments), tokens(), Request(sparsity))


def widened(dense: Block, cut: Block, group: Group, kept: list[int]) -> Block:
    """Return the dense block with zeros for removed units, and the cut block's reader widened."""
    units = dense_units(dense, group)
    block = mask(dense, group, np.isin(np.arange(units), kept))
    reader, old = getattr(cut, group.reader.name), getattr(dense, group.reader.name)
    columns = (
        (np.asarray(kept)[:, None] * group.reader.width + np.arange(group.reader.width))
        .reshape(-1)
        .astype(int)
    )
    w = np.zeros_like(old.w)
    w[:, columns] = np.asarray(reader.w)[:, : len(columns)]
    return block.replace(**{group.reader.name: Linear(jnp.asarray(w), reader.b)})


CHOICES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("flap", {"structure": s, "heads_removed": 3, **o})
        for s in STRUCTURES
        for o in ({"refit": False}, {"bias": False}, {"bias": False, "refit": True}, {})
    ),
    *(("flap", {"structure": s, "heads_removed": 3, "variant": "official"}) for s in STRUCTURES),
    *(
        (n, {"scope": s, "repair": r})
        for n in ("wanda_sp", "magnitude_sp", "llmrank")
        for s in SCOPES
        for r in REPAIRS
    ),
    ("flap", {"round_to": 4}),
]


@every_family
@pytest.mark.parametrize(
    ("name", "options"),
    # The quick tests take every third choice, which meets all names, scopes and repairs.
    [c if i % 3 == 0 else pytest.param(*c, marks=pytest.mark.slow) for i, c in enumerate(CHOICES)],
    ids=str,
)
def test_a_cut_gives_what_the_mask_gives(name: str, options: dict[str, Any], family: str) -> None:
    """For every scorer, scope and repair; and the outcome counts the removed units."""
    m, (pruned, outcome) = model(family), run(family, name=name, **options)
    wide: list[Block] = []
    removed = 0
    for i, (dense, block) in enumerate(zip(m.blocks, pruned.blocks, strict=True)):
        new = dense
        for group in ("heads", "neurons"):
            if f"kept_{group}" in outcome.details:
                kept, g = outcome.details[f"kept_{group}"][i], m.arch.group(group)
                new = widened(new, block, g, kept)
                assert dense_units(block, g) == max(1, len(kept))
                removed += dense_units(dense, g) - len(kept)
        wide.append(new)
    assert removed > 0
    np.testing.assert_allclose(
        logits(m._replace(blocks=tuple(wide)), tokens()),
        logits(pruned, tokens()),
        atol=1e-4,
        rtol=1e-4,
    )


@every_family
@pytest.mark.parametrize("name", ["flap", "llmrank", "wanda_sp"])
def test_numbers_of_neurons_are_multiples_of_round_to(name: str, family: str) -> None:
    _, outcome = run(family, name=name, round_to=5)
    assert {len(k) for k in outcome.details["kept_neurons"]} <= {5, 10, 15, 20, 24}
    assert same(run(family, 0.0, name, round_to=5)[0].blocks, model(family).blocks)


@every_family
@pytest.mark.parametrize("name", ["flap", "llmrank"])
def test_repairs_help_on_the_calibration_tokens(name: str, family: str) -> None:
    """With the same units removed, logits are nearer to the dense ones after a repair."""
    errors = []
    for how in REPAIRS:
        options = (
            {"bias": how != "none", "refit": how == "refit", "structure": "UL-UM"}
            if name == "flap"
            else {"repair": how}
        )
        pruned, _ = run(family, name=name, **options)
        errors.append(np.square(logits(pruned, tokens()) - logits(model(family), tokens())).mean())
    assert errors[2] < errors[0] and errors[1] < 1.1 * errors[0]


@every_family
@pytest.mark.parametrize("name", ["wanda_sp", "magnitude_sp"])
def test_the_baselines_rank_units_by_sums_over_channels(name: str, family: str) -> None:
    """In the first block, whose inputs are the dense model's."""
    m, (_, outcome) = model(family), run(family, 0.5, name)
    _, taps = run_block(m, m.blocks[0], embed(m.arch, m.non_block, tokens()))
    for group, key in (("heads", "kept_heads"), ("neurons", "kept_neurons")):
        reader = m.arch.group(group).reader
        w = weight(m.blocks[0], reader.name)
        x = taps[next(s.reads for s in m.arch.slots if s.name == reader.name)]
        channel = np.abs(w) @ np.diag(np.sqrt((x**2).sum(1).mean(0))) if name == "wanda_sp" else w
        channel = channel.mean(0) if name == "wanda_sp" else np.linalg.norm(w, axis=0)
        score = channel.reshape(-1, reader.width).sum(1)
        assert outcome.details[key][0] == sorted(
            np.argsort(score)[int(0.5 * len(score)) :].tolist()
        )


def test_a_spread_bounds_what_blocks_lose() -> None:
    """Spread 0 gives the shares of UL-MM, but for rounding; without a limit blocks differ."""

    def widths(**options: Any) -> list[int]:
        pruned, _ = prune(model("llama"), METHODS["flap"](**options), tokens(), Request(0.3))
        return [len(block.up.w) for block in pruned.blocks]

    alike, free = widths(structure="UL-MM"), widths(structure="AL-MM")
    assert len(set(alike)) == 1 and len(set(free)) > 1
    even = widths(structure="AL-MM", spread=0.0)
    assert (
        sum(even) == sum(free) and max(abs(a - b) for a, b in zip(even, alike, strict=True)) <= 1
    )  # the budget to one neuron
    assert free != even


@pytest.mark.slow
def test_errors_choose_widths_of_blocks_and_scores_the_units_in_them() -> None:
    """A block that loses more than its share stays within the spread; none is made to lose."""

    def kept(**options: Any) -> list[list[int]]:
        method = METHODS["flap"](structure="AL-MM", **options)
        return prune(model("llama"), method, tokens(), Request(0.3))[1].details["kept_neurons"]

    alike, free, near = (kept(compare="error", spread=spread) for spread in (0.0, 1.0, 0.1))
    assert sum(map(len, alike)) == sum(map(len, free)) == sum(map(len, near))
    assert len({len(k) for k in free}) > 1
    # Of 24 neurons a block, 30 % of the parameters are 14.
    assert min(map(len, near)) >= 24 - 14 - round(0.1 * 24)
    for one, other in zip(free, kept(), strict=True):
        assert set(one) <= set(other) or set(other) <= set(one)


def test_errors_need_one_stream_and_the_corrected_variant() -> None:
    with pytest.raises(InputError, match="official"):
        METHODS["flap"](compare="error", variant="official")
    for family in ("olmo2", "mixtral"):
        with pytest.raises(InputError, match="on one scale"):
            METHODS["flap"](compare="error").check(model(family), Request(0.3))


MANY = {**tiny.LLAMA, "num_attention_heads": 8}
OPT_MANY = {**tiny.OPT, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("config", "structure", "rule"),
    [
        (MANY, "AL-AM", "8 head groups a block, 8 or more"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (MANY | {"num_key_value_heads": 4}, "AL-MM", "4 head groups a block, fewer than 8"),
                (OPT_MANY, "AL-AM", "8 head groups a block, 8 or more"),
                (tiny.OPT, "AL-MM", "4 head groups a block, fewer than 8"),
            ]
        ),
    ],
    ids=["8 heads", "4 of 8 heads", "opt with 8", "opt with 4"],
)
def test_the_number_of_head_groups_decides_the_structure(
    config: dict[str, Any], structure: Structure, rule: str
) -> None:
    """By default alone; the result is that of the structure by name, and the outcome says why."""
    m, request = tiny.random_model(config), Request(0.4)
    pruned, outcome = prune(m, METHODS["flap"](), tiny.tokens(), request)
    compare = "error" if structure == "AL-MM" else "score"
    method = METHODS["flap"](structure=structure, compare=compare)
    named, said = prune(m, method, tiny.tokens(), request)
    assert same(pruned.blocks, named.blocks)
    assert outcome.details["structure"] == {"used": structure, "rule": rule}
    assert outcome.notes == (f"flap used structure={structure}: {rule}",)
    assert said.details["structure"]["rule"] == "as asked" and said.notes == ()
    assert not METHODS["flap"]().shape_change(m).alike
    heads = outcome.details["kept_heads"]
    assert (structure == "AL-MM") == all(
        len(kept) == n for kept, n in zip(heads, outcome.details["units"]["heads"], strict=True)
    )


def test_the_structure_is_known_from_shapes_alone() -> None:
    """Of published models, without a parameter."""
    structures = {}
    for name in ("LLaMA-2-7B", "Mistral-7B", "Qwen2-0.5B"):
        m = abstract(*hf.specs(MODELS[name].config))
        structures[name] = Flap()._choose_structure(m)[0]
        assert Flap(heads_removed=32)._choose_structure(m)[0] == "UL-MM"
        assert Flap(variant="official")._choose_structure(m)[0] == "AL-AM"
    assert structures == {"LLaMA-2-7B": "AL-AM", "Mistral-7B": "AL-AM", "Qwen2-0.5B": "AL-MM"}
    # Without a refit, and with a norm behind each branch, errors do not compare blocks.
    assert Flap(refit=False)._choose_structure(m)[0] == "UL-MM"
    assert Flap()._choose_structure(model("olmo2"))[0] == "UL-MM"
    assert Flap()._choose_structure(model("mixtral"))[0] == "UL-MM"


def test_blocks_of_different_widths_count_by_their_mean() -> None:
    assert units_per_block(model("llama", ragged=True), "heads") == 3.0
    assert units_per_block(model("llama-gqa"), "heads") == 2.0
    assert units_per_block(model("opt"), "neurons") == 24.0


def test_lost_means_are_added_to_the_biases_of_opt() -> None:
    m, (pruned, _) = model("opt"), run("opt", structure="UL-UM")
    assert not np.array_equal(pruned.blocks[0].o.b, m.blocks[0].o.b)
    without, _ = run("opt", structure="UL-UM", bias=False)
    assert same(without.blocks[0].o.b, m.blocks[0].o.b)


def test_a_refit_without_bias_adds_none_and_fits_the_columns() -> None:
    (pruned, _), (plain, _) = (
        run("llama", structure="UL-UM", bias=False, refit=refit) for refit in (True, False)
    )
    for fitted, unfitted in zip(pruned.blocks, plain.blocks, strict=True):
        for reader in ("o", "down"):
            assert getattr(fitted, reader).b is None
            assert not same(getattr(fitted, reader).w, getattr(unfitted, reader).w)
        assert fitted.up.w.shape == unfitted.up.w.shape
    method = METHODS["flap"](structure="UL-UM", bias=False, refit=True)
    assert not method.shape_change(model("llama")).biased


def test_the_outcome_names_the_removed_rows_and_columns() -> None:
    m, (pruned, outcome) = (
        model("llama-gqa"),
        run("llama-gqa", structure="UL-UM", refit=False, sparsity=0.5),
    )
    removed = outcome.removed[0]
    assert (
        removed["down"].cut
        and len(removed["down"].columns) == 24 - pruned.blocks[0].down.w.shape[1] == 12
    )
    assert (
        removed["o"].cut
        and len(removed["o"].columns) == 8
        and len(removed["k"].rows) == 4
        and len(removed["q"].rows) == 8
    )
    stays = np.setdiff1d(np.arange(16), removed["o"].columns)
    assert np.array_equal(pruned.blocks[0].o.w, np.asarray(m.blocks[0].o.w)[:, stays])
    assert dataclasses.is_dataclass(outcome) and outcome.details["kept_neurons"][0] == sorted(
        outcome.details["kept_neurons"][0]
    )
    assert m.blocks[0].down.b is None and pruned.blocks[0].down.b is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads_removed": -1}, "heads_removed=-1 of flap must not be negative"),
        ({"spread": 1.5}, "spread=1.5 of flap must lie between 0 and 1"),
    ],
)
def test_flap_refuses_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        METHODS["flap"](**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flap", {"round_to": -1}),
        ("wanda_sp", {"round_to": -8}),
        ("llmrank", {"units": "rows", "repair": "bias"}),
    ],
)
def test_round_to_must_fit_the_method(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"round_to"):
        METHODS[name](**arguments)
