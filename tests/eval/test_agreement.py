"""Agreement with the dense model against float64 NumPy, other batches and meshes."""

import math

import jax
import numpy as np
import pytest

from eval import agreement as module
from eval.agreement import Agreement, Comparison, agreement, equal_starts, estimate
from eval.perplexity import perplexity
from models.arch import Model, apply_block, embed
from models.errors import InputError
from models.sharding import make_mesh
from models.surgery import cut
from reference import tiny

WINDOWS = tiny.tokens(batch=5)


def pruned(model: Model, scale: float = 1.0) -> Model:
    """Return the model with fewer neurons in one block, and another in place of the other."""
    other = tiny.random_model(tiny.GQA, seed=1).blocks[1]
    mixed = jax.tree.map(lambda a, b: a + scale * b, model.blocks[1], other)
    narrow = cut(model.blocks[0], model.arch.group("neurons"), np.arange(40) < 30)
    return model._replace(blocks=(narrow, mixed))


def logits(model: Model, windows: np.ndarray = WINDOWS) -> np.ndarray:
    """Return the logits before the last position in float64, [windows t - 1 vocab]."""
    x = embed(model.arch, model.non_block, windows)
    for block in model.blocks:
        x = apply_block(model.arch, block, x)
    return np.asarray(model.arch.head(model.non_block, x), np.float64)[:, :-1]


def by_numpy(z: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each window's mean KL divergence and share of equal top tokens in float64."""

    def log_softmax(z: np.ndarray) -> np.ndarray:
        top = z.max(-1, keepdims=True)
        return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(z), log_softmax(w)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return kl.mean(1), (z.argmax(-1) == w.argmax(-1)).mean(1)


def check(got: Agreement, kl: np.ndarray, top1: np.ndarray) -> None:
    np.testing.assert_allclose(got.window_kl, kl, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(got.window_top1, top1, rtol=1e-6)
    assert got.window_kl.dtype == got.window_top1.dtype == np.float64


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_agreement_equals_numpy(scale: float) -> None:
    """Small divergences, too, where a difference of float32 logarithms would lose its digits."""
    dense = tiny.random_model(tiny.GQA)
    other = dense._replace(blocks=(dense.blocks[0], pruned(dense, scale).blocks[1]))
    kl, top1 = by_numpy(logits(dense), logits(other))
    assert (kl > 0).all() and (scale < 1 or (top1 < 1).all())
    check(agreement(dense, other, WINDOWS), kl, top1)


def test_positions_computed_together_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """23 positions in parts of 5, the last shorter."""
    monkeypatch.setattr(module, "POSITIONS", 5)
    dense = tiny.random_model(tiny.FAMILIES["opt"])
    other = tiny.random_model(tiny.FAMILIES["opt"], seed=1)
    # Two windows, so that no program of another test is used.
    check(
        agreement(dense, other, WINDOWS[:2]),
        *by_numpy(logits(dense, WINDOWS[:2]), logits(other, WINDOWS[:2])),
    )


def test_a_model_agrees_with_itself_exactly() -> None:
    model = tiny.random_model(tiny.GQA)
    got = agreement(model, model, WINDOWS)
    assert got.kl == (0, 0) and got.top1 == (1, 0)


@pytest.mark.parametrize("mesh", [pytest.param("data=4", marks=pytest.mark.slow), "data=2,model=2"])
@pytest.mark.parametrize("batch", [4])
def test_batches_and_meshes_do_not_matter(mesh: str, batch: int) -> None:
    """Five windows in batches of four: the last is on every device whole."""
    dense = tiny.random_model(tiny.GQA)
    got = agreement(dense, pruned(dense), WINDOWS, batch=batch, mesh=make_mesh(mesh))
    check(got, *by_numpy(logits(dense), logits(pruned(dense))))


def test_one_pass_gives_perplexity_and_agreement() -> None:
    """States kept while the dense model is evaluated serve the pruned model's evaluation."""
    dense = tiny.random_model(tiny.GQA)
    states: list[jax.Array] = []
    perplexity(dense, WINDOWS, batch=2, visit=states.append)
    comparison = Comparison(dense, states, pruned(dense), None)
    got = perplexity(pruned(dense), WINDOWS, batch=2, visit=comparison)
    assert got.value == perplexity(pruned(dense), WINDOWS, batch=2).value
    check(comparison.result(), *by_numpy(logits(dense), logits(pruned(dense))))


def test_a_broken_model_has_no_divergence() -> None:
    dense = tiny.random_model(tiny.GQA)
    broken = dense.non_block.replace(
        head=jax.tree.map(lambda w: w * math.nan, dense.non_block.head)
    )
    got = agreement(dense, dense._replace(non_block=broken), WINDOWS)
    assert math.isnan(got.kl.value) and got.kl.error is None


def test_models_of_other_vocabularies_are_refused() -> None:
    dense, other = tiny.random_model({**tiny.GQA, "vocab_size": 97}), tiny.random_model(tiny.GQA)
    with pytest.raises(InputError, match="vocabulary of 97 tokens, the model 96"):
        agreement(dense, other, WINDOWS)


def test_the_standard_error_is_that_of_a_mean_over_windows() -> None:
    samples = [1.0, 2.0, 4.0]
    assert estimate(samples) == pytest.approx((7 / 3, np.std(samples, ddof=1) / 3**0.5))
    assert estimate([2.0]) == (2.0, None)
    assert estimate([1.0, math.inf]) == (math.inf, None)


def test_tokens_count_until_the_texts_first_differ() -> None:
    first = np.asarray([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    second = np.asarray([[1, 2, 3], [1, 5, 3], [0, 2, 3], [1, 2, 4]])
    assert equal_starts(first, second).tolist() == [3, 1, 0, 2]
