"""Perplexity against float64 NumPy, other batches and meshes, and the official codes' figures."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from eval import forward as module
from eval.perplexity import Perplexity, perplexity
from models import arch
from models.arch import Block, Model, apply_block, embed
from models.checkpoint.reader import open_checkpoint
from models.sharding import make_mesh
from models.surgery import cut
from reference import tiny
from reference.told import Told

WINDOWS = tiny.tokens(batch=8)


def by_numpy(model: Model, length: int = tiny.LENGTH) -> np.ndarray:
    """Return each window's mean cross-entropy over `length` tokens in float64, from the logits."""
    windows = WINDOWS[:, :length]
    x = embed(model.arch, model.non_block, WINDOWS)
    for block in model.blocks:
        x = apply_block(model.arch, block, x)
    z = np.asarray(model.arch.head(model.non_block, x), np.float64)[:, : length - 1]
    top = z.max(-1)
    total = top + np.log(np.exp(z - top[:, :, None]).sum(-1))
    chosen = np.take_along_axis(z, windows[:, 1:, None], -1)[:, :, 0]
    return (total - chosen).mean(1)


def check(got: Perplexity, expected: np.ndarray, length: int = tiny.LENGTH) -> None:
    np.testing.assert_allclose(got.cross_entropy, expected, rtol=1e-5)
    assert got.value == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert got.cross_entropy.dtype == np.float64 and got.tokens == len(expected) * (length - 1)


@pytest.mark.parametrize("name", ["biased", "opt"])
def test_perplexity_equals_numpy(name: str) -> None:
    model = tiny.random_model(tiny.FAMILIES[name])
    check(perplexity(model, WINDOWS), by_numpy(model))


def test_ragged_blocks_short_windows_and_other_integers_equal_numpy() -> None:
    model = tiny.random_model(tiny.GQA)
    g = model.arch.group("neurons")
    ragged = model._replace(blocks=(cut(model.blocks[0], g, np.arange(40) < 7), model.blocks[1]))
    check(perplexity(ragged, WINDOWS), by_numpy(ragged))
    check(perplexity(model, WINDOWS[:, :2].astype(np.int64)), by_numpy(model, 2), length=2)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity() -> None:
    model = tiny.random_model(tiny.GQA)
    zero = model.non_block.replace(head=jax.tree.map(np.zeros_like, model.non_block.head))
    assert perplexity(model._replace(non_block=zero), WINDOWS).value == pytest.approx(tiny.VOCAB)


class Counted(Sequence[Block]):
    """Blocks that count how often they are taken."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks, self.taken = blocks, 0

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: Any) -> Any:
        self.taken += 1
        return self.blocks[i]


@pytest.mark.parametrize(
    ("batch", "windows_at_once", "walks"),
    [(64, 100, 1), (3, 100, 1), (3, 1, 3), (1, 4, 2), (1, 0, 8), (3, 7, 2)],
)
def test_batches_and_passes_do_not_matter(
    batch: int, windows_at_once: int, walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass reads each block once, however many windows it has."""
    monkeypatch.setattr(module, "ACTIVATION_BYTES", windows_at_once * tiny.LENGTH * 32 * 4)
    model = tiny.random_model(tiny.GQA)
    counted = Counted(model.blocks)
    check(perplexity(model._replace(blocks=counted), WINDOWS, batch=batch), by_numpy(model))
    assert counted.taken == walks * len(model.blocks)


@pytest.mark.parametrize(
    ("name", "mesh"), [("gqa", "data=8"), ("gqa", "data=4,model=2"), ("opt", "data=4,model=2")]
)
def test_meshes_do_not_matter(name: str, mesh: str) -> None:
    """Ten windows in batches of eight: the last two are on every device whole."""
    model, windows = tiny.random_model(tiny.FAMILIES[name]), np.concatenate([WINDOWS, WINDOWS[:2]])
    expected = perplexity(model, WINDOWS).cross_entropy
    check(
        perplexity(model, windows, batch=8, mesh=make_mesh(mesh)),
        np.concatenate([expected, expected[:2]]),
    )


def test_equal_blocks_compile_once_on_a_mesh() -> None:
    """The first block gets its states from the embedding, the others from the block before."""
    model = tiny.random_model(tiny.GQA)
    before = arch._apply.jitted._cache_size()
    perplexity(model, WINDOWS, batch=4, mesh=make_mesh("data=4,model=2"))
    assert len(model.blocks) > 1 and arch._apply.jitted._cache_size() - before == 1


@pytest.mark.parametrize(("factor", "value"), [(math.nan, math.nan), (1e4, math.inf)])
def test_broken_models_give_nan_or_infinity(factor: float, value: float) -> None:
    """No exception, no warning: a method may break a model, and the report must say so."""
    model = tiny.random_model(tiny.GQA)
    head = jax.tree.map(lambda w: w * factor, model.non_block.head)
    got = perplexity(model._replace(non_block=model.non_block.replace(head=head)), WINDOWS)
    np.testing.assert_equal(got.value, value)
    assert (
        np.isnan(got.cross_entropy).all()
        if math.isnan(value)
        else np.isfinite(got.cross_entropy).all()
    )


GOLDEN = ["tiny-llama", "tiny-llama-gqa", "tiny-opt"]


def golden(shared: pathlib.Path, name: str) -> dict[str, Any]:
    runs = json.loads((shared / "golden" / "index.json").read_text())["runs"]
    (run,) = (r for r in runs if r["model"] == name and r["variant"] == "dense")
    return run


@pytest.mark.parametrize(
    "name",
    [n if n == "tiny-llama-gqa" else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN],
)
def test_perplexity_equals_the_official_codes_figures(name: str, shared: pathlib.Path) -> None:
    run = golden(shared, name)
    windows = np.load(shared / "golden" / "tokens" / run["eval_tokens"])
    model = open_checkpoint(shared / "models" / name).model
    got = perplexity(model, windows)
    assert got.value == pytest.approx(run["ppl"], rel=1e-4)
    assert math.exp(got.cross_entropy[:4].mean()) == pytest.approx(
        run["ppl_first4_windows"], rel=1e-4
    )


@pytest.mark.slow
def test_perplexity_of_smollm2_equals_the_official_codes_figure(
    smollm2: pathlib.Path, shared: pathlib.Path
) -> None:
    run = golden(shared, "smollm2")
    windows = np.load(shared / "golden" / "tokens" / run["eval_tokens"])[:4]
    assert perplexity(open_checkpoint(smollm2).model, windows, batch=4).value == pytest.approx(
        run["ppl_first4_windows"], rel=1e-4
    )


@pytest.mark.parametrize("batch", [3, 8])
def test_progress_takes_the_steps_it_announces_and_names_the_tokens(batch: int) -> None:
    """Every token passes every block, and a head that is as much work as one or more blocks."""
    told, model = Told(), tiny.random_model(tiny.GQA)
    perplexity(model, WINDOWS, batch=batch, progress=told, name="dense")
    steps, taken, more = told.stages["dense"]
    assert steps == taken >= WINDOWS.size * (len(model.blocks) + 1)
    assert more == {"tokens": WINDOWS.size}
