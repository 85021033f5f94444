"""LLM-Rank's centralities against a float64 port, and the properties that they must have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pruning.structured import llmrank_core as core
from pruning.structured.llmrank_core import Centrality, Ffn
from pruning.structured.page_rank_core import Layer, modified_page_rank
from reference import llmrank as reference
from reference.llmrank import Graph, Settings

F, D, BLOCKS = 11, 6, 4  # all tests have BLOCKS blocks, so that a centrality compiles once
SETTINGS = {
    "wpr": Settings("wpr"),
    "wpr mixed": Settings("wpr", gamma=0.5, theta=0.5),
    "wpr weighted": Settings("wpr", gamma=1.0, theta=1.0),
    "wpr unweighted": Settings("wpr", gamma=0.7, theta=0.0),
    "mpr": Settings("mpr"),
    "mpr zeroed": Settings("mpr", zeroed=0.35),
    "norm": Settings("norm"),
    "activation": Settings("activation"),
    "wanda": Settings("wanda"),
}
GRAPHS = {"official": core.official_centrality, "corrected": core.corrected_centrality}


def graph(seed: int, gates: int = 1) -> Graph:
    """Return a random block; a fifth of the edges is zero, and all of input 2 and of neuron 3."""
    rng = np.random.default_rng(seed)

    def w(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * (rng.random(shape) > 0.2)

    g = Graph(
        w(F, D),
        tuple(w(F, D) for _ in range(gates)),
        w(D, F),
        *(rng.random(n) + 0.1 for n in (D, F, F, D)),
    )
    for into in (g.up, *g.gates):
        into[:, 2] = into[3] = 0
    g.down[:, 3] = 0
    return g


def ffn(g: Graph, seed: int = 0) -> Ffn:
    """Return the graph as the library takes it, float32, with noise for the random baseline."""
    noise = [np.random.default_rng(seed).random(n) for n in (F, D)]
    return Ffn(*jax.tree.map(np.float32, (*g, *noise)))


def stack(blocks: list[Ffn]) -> Ffn:
    """Return the arrays of all blocks with a leading axis of blocks."""
    return jax.tree.map(lambda *xs: np.stack(xs), *blocks)


def centrality(kind: str, s: Settings, chained: bool = True) -> Centrality:
    """Return the library's centrality of one of SETTINGS."""
    return GRAPHS[kind](s.name, s.gamma, s.theta, s.zeroed, chained)


def ranks_along(
    kind: str, s: Settings, graphs: list[Graph], chained: bool = True
) -> list[reference.Pair]:
    """Return the library's ranks along blocks, by its own scan."""
    backward = kind == "corrected" and s.name == "wpr"
    stacked = stack([ffn(g) for g in graphs])
    start = np.ones(D, np.float32) if backward else stacked.a_in[0]
    _, (neurons, channels) = core.flow(centrality(kind, s, chained), backward, stacked, start)
    return [(np.asarray(n), np.asarray(c)) for n, c in zip(neurons, channels, strict=True)]


def assert_close(got: list[reference.Pair], want: list[reference.Pair], rtol: float = 1e-5) -> None:
    """Assert that importances agree to a relative 1e-5; 1e-8 is below any share that matters."""
    for pair, expected in zip(got, want, strict=True):
        for a, b in zip(pair, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "gates", "chained"),
    [
        *((n, 1, True) for n in SETTINGS),
        ("wpr mixed", 1, False),
        ("mpr zeroed", 1, False),
        ("norm", 0, True),
    ],
)
@pytest.mark.parametrize("kind", GRAPHS)
def test_ranks_along_blocks_equal_those_of_the_port(
    kind: str, name: str, gates: int, chained: bool
) -> None:
    graphs = [graph(i, gates) for i in range(BLOCKS)]
    port = {"official": reference.official, "corrected": reference.corrected}[kind]
    assert_close(
        ranks_along(kind, SETTINGS[name], graphs, chained), port(SETTINGS[name], graphs, chained)
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_importance_sums_to_one(kind: str, name: str) -> None:
    for pair in ranks_along(kind, SETTINGS[name], [graph(i) for i in range(BLOCKS)]):
        for ranks in pair:
            assert ranks.sum() == pytest.approx(1, abs=1e-6)
            assert (ranks >= 0).all()


@pytest.mark.parametrize("kind", GRAPHS)
def test_wpr_without_graph_is_the_activation_alone(kind: str) -> None:
    """gamma = 0, the official default: the graph vanishes, and theta with it."""
    graphs = [graph(i) for i in range(BLOCKS)]
    for theta in (0.5, 1.0):
        assert_close(
            ranks_along(kind, Settings("wpr", theta=theta), graphs),
            ranks_along(kind, Settings("activation"), graphs),
            1e-6,
        )


def test_corrected_wpr_of_one_block_without_activations_is_summed_wanda() -> None:
    """gamma = 1 with equal channels leaves the neuron's outgoing weights times its activation."""
    graphs = [graph(i) for i in range(BLOCKS)]
    wpr, wanda = (
        ranks_along("corrected", s, graphs, chained=False)
        for s in (Settings("wpr", gamma=1.0), Settings("wanda"))
    )
    for (got, _), (want, _) in zip(wpr, wanda, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def permuted(g: Graph, neurons: np.ndarray, channels: np.ndarray) -> Graph:
    """Return the same network with its neurons and residual channels in another order."""
    into = [w[neurons][:, channels] for w in (g.up, *g.gates)]
    return Graph(
        into[0],
        tuple(into[1:]),
        g.down[channels][:, neurons],
        g.a_in[channels],
        g.a_up[neurons],
        g.a_mid[neurons],
        g.a_down[channels],
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_ranks_follow_a_permutation(kind: str, name: str) -> None:
    rng = np.random.default_rng(0)
    graphs, channels = [graph(i) for i in range(BLOCKS)], rng.permutation(D)
    orders = [rng.permutation(F) for _ in graphs]
    want = [
        (up[order], down[channels])
        for order, (up, down) in zip(orders, ranks_along(kind, SETTINGS[name], graphs), strict=True)
    ]
    assert_close(
        ranks_along(
            kind,
            SETTINGS[name],
            [permuted(g, order, channels) for g, order in zip(graphs, orders, strict=True)],
        ),
        want,
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_degenerate_blocks_give_finite_ranks(kind: str, name: str) -> None:
    """Weights, activations or both all zero (a block that was pruned away), or all equal."""
    base = graph(0)
    weights, norms = tuple(base[:3]), tuple(base[3:])
    blank, ones = (
        (lambda t: jax.tree.map(np.zeros_like, t)),
        (lambda t: jax.tree.map(np.ones_like, t)),
    )
    degenerate = [
        Graph(*a(weights), *b(norms)) for a, b in ((blank, blank), (blank, ones), (ones, blank))
    ]
    ranks = ranks_along(kind, SETTINGS[name], [base, *degenerate]) + ranks_along(
        kind, SETTINGS[name], [*degenerate, base]
    )
    assert all(np.isfinite(r).all() for pair in ranks for r in pair)
    neurons, channels = ranks_along(
        kind, SETTINGS[name], [Graph(*ones(weights), *ones(norms))] * BLOCKS
    )[-1]
    np.testing.assert_allclose(neurons, 1 / F, rtol=1e-5)
    np.testing.assert_allclose(channels, 1 / D, rtol=1e-5)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("kind", "name"), [("official", "mpr zeroed"), ("corrected", "wpr mixed")])
def test_the_scan_equals_a_loop_over_blocks(kind: str, name: str, backward: bool) -> None:
    step, blocks = centrality(kind, SETTINGS[name]), [ffn(graph(i)) for i in range(BLOCKS)]
    carried, want = jnp.linspace(1, 2, D), {}
    for i in reversed(range(BLOCKS)) if backward else range(BLOCKS):
        carried, want[i] = jax.jit(step)(blocks[i], carried)
    got, (neurons, channels) = core.flow(step, backward, stack(blocks), jnp.linspace(1, 2, D))
    np.testing.assert_allclose(got, carried, rtol=1e-6)
    assert_close(list(zip(neurons, channels, strict=True)), [want[i] for i in range(BLOCKS)], 1e-6)


@pytest.mark.parametrize("name", ["wpr mixed", "mpr zeroed"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_unchained_blocks_do_not_see_each_other(kind: str, name: str) -> None:
    """And chained ones do: importance comes from one side, and from that side alone."""
    before, s = [graph(i) for i in range(BLOCKS)], SETTINGS[name]
    after = [before[0], graph(9), *before[2:]]

    def changed(chained: bool) -> list[bool]:
        pairs = zip(
            ranks_along(kind, s, before, chained), ranks_along(kind, s, after, chained), strict=True
        )
        return [
            not all(np.allclose(x, y, rtol=1e-5) for x, y in zip(a, b, strict=True))
            for a, b in pairs
        ]

    assert changed(False) == [False, True, False, False]
    assert changed(True) == (
        [True, True, False, False]
        if kind == "corrected" and s.name == "wpr"
        else [False, True, True, True]
    )


def test_the_official_graph_ignores_gates_and_columns_of_down() -> None:
    """The corrected graph adds these two."""
    g, s = graph(0), Settings("norm")
    other = g._replace(gates=(g.gates[0] * 3,), down=g.down[:, ::-1])
    rows, neurons = (
        [ranks_along(kind, s, [one] * BLOCKS)[0][0] for one in (g, other)] for kind in GRAPHS
    )
    assert np.array_equal(*rows)
    assert not np.allclose(*neurons)


@pytest.mark.parametrize("kind", GRAPHS)
def test_random_ranks_by_its_noise(kind: str) -> None:
    (neurons, channels), made = (
        ranks_along(kind, Settings("random"), [graph(0)] * BLOCKS)[0],
        ffn(graph(0)),
    )
    np.testing.assert_allclose(neurons, made.noise_up / made.noise_up.sum(), rtol=1e-6)
    np.testing.assert_allclose(channels, made.noise_down / made.noise_down.sum(), rtol=1e-6)


def test_modified_page_rank_zeroes_the_lowest_inputs() -> None:
    """Truncated, not rounded: 0.3 of 6 inputs is one. The argument keeps its values."""
    prev = jnp.array([0.5, 0.1, 0.2, 0.05, 0.6, 0.3])
    layer = Layer(jnp.eye(6), prev, jnp.ones(6), prev)
    np.testing.assert_array_equal(
        modified_page_rank(0.3, layer, prev), jnp.array([0.5, 0.1, 0.2, 0, 0.6, 0.3])
    )
    np.testing.assert_array_equal(modified_page_rank(0.0, layer, prev), prev)


@pytest.mark.parametrize("kind", GRAPHS)
def test_bfloat16_weights_rank_as_their_rounded_values(kind: str) -> None:
    """They are read in float32."""
    step, made = jax.jit(centrality(kind, SETTINGS["wpr mixed"])), ffn(graph(0))
    low = dict(
        zip(("up", "gates", "down"), jax.tree.map(jnp.bfloat16, tuple(made[:3])), strict=True)
    )
    _, got = step(made._replace(**low), made.a_in)
    _, want = step(made._replace(**jax.tree.map(np.float32, low)), made.a_in)
    assert all(
        g.dtype == jnp.float32 and np.allclose(g, w, rtol=1e-6)
        for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("make", [core.official_centrality, core.corrected_centrality])
def test_equal_arguments_give_the_same_function(make: Callable[..., Centrality]) -> None:
    """A fresh function would compile again, as it is a static argument."""
    assert make("wpr", 0.5, 0.5, 0.0, True) is make("wpr", 0.5, 0.5, 0.0, True)
    assert make("wpr", 0.5, 0.5, 0.0, True) is not make("wpr", 0.5, 0.5, 0.0, False)
