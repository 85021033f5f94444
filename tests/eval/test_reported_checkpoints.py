"""Checkpoints of public reports have the perplexity that transformers gives them."""

import functools
import pathlib
import subprocess
import sys

import pytest

from calibration.data import evaluation_tokens
from calibration.tokenizer import load_tokenizer
from eval.perplexity import perplexity
from models.checkpoint.reader import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "part", "expected"),
    [
        ("c02_tied_head.py", "", 252.516),  # a head that differs from the embedding is not tied
        *(("c07_index.py", part, 230.548) for part in "abdg"),  # names that no tensor needs
    ],
)
def test_a_reported_checkpoint_has_its_perplexity(
    script: str, part: str, expected: float, shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """On the first 8 windows of 128 tokens of WikiText-2's test text."""
    cases = shared / "cases"
    command = [sys.executable, cases / script, tmp_path]
    subprocess.run(command, cwd=cases, check=True, capture_output=True)
    checkpoint = open_checkpoint(tmp_path / part)
    text = str(shared / "data" / "wikitext2" / "wiki.test.raw")
    tokenizer = functools.partial(load_tokenizer, checkpoint.directory)
    vocab = checkpoint.model.arch.config.vocab
    tokens = evaluation_tokens(text, tokenizer, length=128, windows=8, vocab=vocab).ids
    assert perplexity(checkpoint.model, tokens).value == pytest.approx(expected, abs=1e-3)
