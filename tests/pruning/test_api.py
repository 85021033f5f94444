"""The public API opens, prunes, measures and saves a model as the command line does."""

from pathlib import Path

import numpy as np
import pytest

import pruning
from calibration.generated import generated_windows, self_text
from calibration.tokenizer import load_tokenizer
from models.errors import InputError

SMALL = {"samples": 4, "length": 32}


@pytest.fixture(scope="module")
def dense() -> pruning.LanguageModel:
    return pruning.open_model("embedded:tiny-llama")


@pytest.fixture(scope="module")
def pruned(dense: pruning.LanguageModel) -> pruning.LanguageModel:
    return pruning.prune(dense, "llmrank", sparsity=0.5, **SMALL)


def test_a_pruned_model_is_smaller_and_its_source_is_left_alone(
    dense: pruning.LanguageModel, pruned: pruning.LanguageModel
) -> None:
    assert pruned.parameters < dense.parameters
    assert dense.outcome is None and pruned.outcome is not None
    assert pruned.outcome.asked[0]["up"] == 0.5
    perplexity = [pruning.perplexity(m, length=32, windows=4) for m in (dense, pruned)]
    assert perplexity[0] < perplexity[1] < np.inf


def test_a_saved_model_opens_with_the_same_perplexity(
    pruned: pruning.LanguageModel, tmp_path: Path
) -> None:
    directory = pruning.save(pruned, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    again = pruning.open_model(str(directory))
    options = {"length": 32, "windows": 4}
    assert pruning.perplexity(again, **options) == pytest.approx(
        pruning.perplexity(pruned, **options), rel=1e-6
    )
    with pytest.raises(InputError, match="holds files already: choose a new directory"):
        pruning.save(pruned, directory)


def test_methods_take_their_settings_and_tokens_of_ones_own(dense: pruning.LanguageModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 100, (4, 16), np.int32)
    zeros = pruning.prune(dense, pruning.magnitude(scope="row"), tokens, pattern=(2, 4))
    w = np.asarray(zeros.model.blocks[0].q.w)
    assert np.all((w.reshape(len(w), -1, 4) == 0).sum(axis=2) == 2)
    owl = pruning.prune(dense, "wanda", tokens, sparsity=0.5, allocation=pruning.owl())
    assert "outliers" in owl.outcome.details


@pytest.mark.slow
def test_calibration_text_may_be_a_mix_or_the_models_own(
    dense: pruning.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = load_tokenizer(dense.checkpoint.directory)
    own, mixed = self_text(temperature=0.5), "embedded:1,self:1"
    options = {**SMALL, "seed": 0}
    windows = generated_windows(own, dense.checkpoint, lambda: tokenizer, **options).ids
    one, two = (pruning.prune(dense, "wanda", c, sparsity=0.5, **SMALL) for c in (own, windows))
    for a, b in zip(one.model.blocks, two.model.blocks, strict=True):
        np.testing.assert_array_equal(a.up.w, b.up.w)
    other = pruning.prune(dense, "wanda", mixed, sparsity=0.5, **SMALL)
    assert not np.array_equal(other.model.blocks[0].up.w, one.model.blocks[0].up.w)
    assert pruning.self_text is self_text
    with pytest.raises(InputError, match=r"has settings: give `pruning\.self_text"):
        pruning.prune(dense, "wanda", "self(temperature=0.5)", sparsity=0.5, **SMALL)


@pytest.mark.parametrize(
    ("method", "sparsity", "message"),
    [
        ("wando", 0.5, "method=wando is no pruning method: choose of magnitude"),
        ("wanda", 1.0, "sparsity=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_bad_input(
    dense: pruning.LanguageModel, method: str, sparsity: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pruning.prune(dense, method, sparsity=sparsity)


def test_every_public_name_can_be_had_and_no_other() -> None:
    for name in pruning.__all__:
        assert getattr(pruning, name) is not None
    assert set(pruning.METHODS) | set(pruning.REFINEMENTS) - {"none"} <= set(dir(pruning))
    with pytest.raises(AttributeError, match="no attribute 'wando'"):
        pruning.wando  # noqa: B018
