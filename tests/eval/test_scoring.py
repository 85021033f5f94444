"""Log-likelihoods against float64 NumPy, in any order, batch, padding and mesh."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from eval import forward
from eval.scoring import SHORTEST, Pair, bucket, log_likelihoods
from models.arch import Model, logits
from models.errors import InputError
from models.sharding import make_mesh
from models.surgery import cut
from reference import tiny
from reference.told import Told

pytestmark = pytest.mark.slow

LONGEST = 40


def draw(count: int = 30, seed: int = 0) -> list[Pair]:
    """Return pairs of every length: some exceed LONGEST, share texts, or are greedy."""
    rng = np.random.default_rng(seed)
    pairs = [
        (
            rng.integers(0, 96, rng.integers(1, 60)).tolist(),
            rng.integers(0, 96, rng.integers(0, 9)).tolist(),
        )
        for _ in range(count)
    ]
    return pairs + [(pairs[0][0], [token]) for token in range(96)]  # one of them is the most likely


def by_numpy(model: Model, pair: Pair) -> tuple[float, bool]:
    """In float64 from the logits of the text alone, without padding."""
    context, continuation = pair
    text = [*context, *continuation][-(LONGEST + 1) :]
    if not continuation:
        return 0.0, True
    z = np.asarray(logits(model, jnp.asarray([text[:-1]])), np.float64)[0, -len(continuation) :]
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    best = (z.argmax(-1) == continuation).all()
    return float(np.take_along_axis(log_p, np.asarray(continuation)[:, None], -1).sum()), bool(best)


def check(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([v for v, _ in got], [v for v, _ in expected], atol=2e-5, rtol=1e-5)
    assert [best for _, best in got] == [best for _, best in expected]


@pytest.mark.parametrize("name", ["gqa", "opt", "opt-350m"])
def test_scores_equal_numpy(name: str) -> None:
    model, pairs = tiny.random_model(tiny.EVERY[name]), draw(12)
    expected = [by_numpy(model, pair) for pair in pairs]
    assert sum(best for _, best in expected[12:]) == 1
    check(log_likelihoods(model, pairs, longest=LONGEST), expected)


def test_scores_of_pruned_models_equal_numpy() -> None:
    model = tiny.random_model({**tiny.GQA, "num_hidden_layers": 3})
    narrow = cut(model.blocks[0], model.arch.group("neurons"), np.arange(40) < 7)
    ragged, pairs = model._replace(blocks=(narrow, model.blocks[2])), draw(5)
    check(
        log_likelihoods(ragged, pairs, longest=LONGEST), [by_numpy(ragged, pair) for pair in pairs]
    )


@pytest.mark.parametrize(
    ("batch", "mesh", "held"),
    [
        (1, "", 1 << 30),
        (64, "", 1 << 30),
        (3, "", 1),
        (8, "data=8", 1 << 30),
        (4, "data=2,model=2", 9999),
    ],
)
def test_order_batches_passes_and_meshes_do_not_matter(
    batch: int, mesh: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "ACTIVATION_BYTES", held)
    model, pairs = tiny.random_model(tiny.GQA), draw(30)
    expected = log_likelihoods(model, pairs, longest=LONGEST)
    order = np.random.default_rng(1).permutation(len(pairs))
    got = log_likelihoods(
        model,
        [pairs[i] for i in order],
        longest=LONGEST,
        batch=batch,
        mesh=make_mesh(mesh) if mesh else None,
    )
    check(got, [expected[i] for i in order])


def test_equal_texts_are_read_once() -> None:
    told, model = Told(), tiny.random_model(tiny.GQA)
    log_likelihoods(
        model,
        [([1, 2, 3], [token]) for token in range(96)],
        longest=LONGEST,
        batch=2,
        progress=told,
    )
    # One batch of two rows, the shortest that is compiled, through every block.
    steps, taken, more = told.stages["log-likelihoods"]
    assert more["tokens"] == 2 * SHORTEST
    assert steps == taken == 2 * SHORTEST * len(model.blocks)


def test_no_pairs_give_no_scores() -> None:
    assert log_likelihoods(tiny.random_model(tiny.GQA), [], longest=LONGEST) == []


def test_a_continuation_that_fills_the_model_and_one_that_does_not_fit() -> None:
    model = tiny.random_model(tiny.OPT)
    whole = ([3], list(range(LONGEST)))
    check(log_likelihoods(model, [whole], longest=LONGEST), [by_numpy(model, whole)])
    with pytest.raises(InputError, match="41 tokens, the model reads 40"):
        log_likelihoods(model, [([3], list(range(41)))], longest=LONGEST)


def test_few_shapes_are_compiled() -> None:
    sizes = [bucket(n, SHORTEST) for n in range(1, 4097)]
    assert all(n <= size for n, size in enumerate(sizes, start=1)) and len(set(sizes)) == 15
    assert (
        max(size / n for n, size in itertools.islice(enumerate(sizes, start=1), SHORTEST, None))
        < 1.5
    )
