"""The adapter against lm-eval's own Hugging Face model on the same weights."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[tasks]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from eval.answers import AnswerCache
from eval.harness import HarnessModel
from launch.run.measure import tokenizer_of
from launch.run.tasks import vocabulary_of
from models.checkpoint.hub import resolve
from models.checkpoint.reader import Checkpoint, in_memory, open_checkpoint
from models.errors import InputError
from models.sharding import make_mesh

pytestmark = [
    pytest.mark.slow,
    # torch, transformers and lm-eval warn about each other.
    pytest.mark.filterwarnings("ignore"),
]

MODELS = ("embedded:tiny-llama", "embedded:tiny-opt")
LONG = (
    "Once there was a girl who lived near the sea with her dog. " * 30
)  # more than the 256 tokens that the models read


def requests(kind: str, args: Sequence[Any]) -> list[Instance]:
    return [
        Instance(kind, {}, a if isinstance(a, tuple) else (a,), i, ("task", i, 1))
        for i, a in enumerate(args)
    ]


def adapter(checkpoint: Checkpoint, **settings: Any) -> HarnessModel:
    vocabulary = vocabulary_of(checkpoint, tokenizer_of(checkpoint)())
    return HarnessModel(
        checkpoint.model,
        vocabulary,
        longest=int(checkpoint.config["max_position_embeddings"]),
        **settings,
    )


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found = open_checkpoint(resolve(request.param))
    return found._replace(model=in_memory(found.model))


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> TemplateLM:
    for package in ("torch", "accelerate"):
        pytest.importorskip(package, reason=f"lm-eval's own model needs {package}")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint.directory), dtype="float32", device="cpu", batch_size=4)


PAIRS = [
    ("", "Once there was a dog."),  # no context: BOS stands for it
    ("Once there was", " a girl"),
    ("Once there was ", "a girl"),  # the space moves over
    ("Once there was", " a boy"),
    ("Once there was", " the"),
    ("The dog", "."),
    ("</s>Once there", " was"),  # brings its own BOS
    ("Zoë ate 🍎🍏 and naïve", " café ☕"),
    (LONG, " He was happy."),  # loses its beginning
    ("She said:", " " + LONG[:400]),
    ("Line one\n\nLine two\n", "Line three\n"),
    (" ", " x"),
    *((f"Number {i} " * i, f" is {i}") for i in range(1, 24)),
]


@pytest.mark.parametrize("some", [slice(None), slice(1)], ids=["all", "one"])
def test_loglikelihoods_equal_lm_evals_own(
    checkpoint: Checkpoint, theirs: TemplateLM, some: slice
) -> None:
    asked = PAIRS[some]
    got = adapter(checkpoint).loglikelihood(requests("loglikelihood", asked))
    expected = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in got], [v for v, _ in expected], atol=1e-3)
    assert [best for _, best in got] == [best for _, best in expected]


def test_rolling_loglikelihoods_equal_lm_evals_own(
    checkpoint: Checkpoint, theirs: TemplateLM
) -> None:
    texts = [LONG, LONG[:100], "a", LONG * 2, "Zoë 🍎"]
    got = adapter(checkpoint).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    np.testing.assert_allclose(got, expected, atol=2e-3)


GREEDY = {"until": ["."], "max_gen_toks": 24}
PROMPTS = [
    ("Once there was a girl named Lucy. One day", GREEDY),
    ("The dog", GREEDY),
    ("A boy went to the sea because", {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False}),
    (LONG, GREEDY),
    ("She looked", {"until": "the", "max_gen_toks": 24}),
    ("Zoë", GREEDY),
]


def test_generated_texts_equal_lm_evals_own(checkpoint: Checkpoint, theirs: TemplateLM) -> None:
    """Prompts of different lengths share a batch.

    lm-eval pads on the left, and a tiny model's choice between two close tokens may differ for it,
    so there each prompt is a batch of its own.
    """
    got = adapter(checkpoint, batch=4).generate_until(requests("generate_until", PROMPTS))
    expected = [
        theirs.generate_until(requests("generate_until", [p]), disable_tqdm=True)[0]
        for p in PROMPTS
    ]
    assert got == expected
    assert all("." not in text for text in (got[0], got[1], got[3], got[5])) and any(got)


def test_drawn_texts_are_repeatable_and_differ_from_greedy(checkpoint: Checkpoint) -> None:
    asked = requests(
        "generate_until",
        [("Once", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 24}), ("Once", GREEDY)],
    )
    first, second = (
        adapter(checkpoint).generate_until(asked),
        adapter(checkpoint).generate_until(asked),
    )
    assert first == second and not first[0].startswith(first[1])


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_order_batch_and_mesh_do_not_matter(checkpoint: Checkpoint, kind: str) -> None:
    args = PAIRS if kind == "loglikelihood" else PROMPTS

    def call(lm: HarnessModel) -> Any:
        return getattr(lm, kind)(requests(kind, args[::-1]))[::-1]

    expected = getattr(adapter(checkpoint), kind)(requests(kind, args))
    both = {"batch": 8, "mesh": make_mesh("data=4,model=2")}
    for settings in ({"batch": 3}, both) if kind == "loglikelihood" else (both,):
        got = call(adapter(checkpoint, **settings))
        if kind == "loglikelihood":
            np.testing.assert_allclose([v for v, _ in got], [v for v, _ in expected], atol=1e-4)
        else:
            assert got == expected


def test_answers_are_cached(
    checkpoint: Checkpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {
        "loglikelihood": PAIRS[:2],
        "loglikelihood_rolling": ["a text"],
        "generate_until": PROMPTS[1:2],
    }
    first = [
        getattr(adapter(checkpoint, answers=AnswerCache(tmp_path, {})), k)(requests(k, a))
        for k, a in calls.items()
    ]

    def fail(*args: Any, **more: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr("eval.harness.log_likelihoods", fail)
    monkeypatch.setattr("eval.harness.generate", fail)
    again = [
        getattr(adapter(checkpoint, answers=AnswerCache(tmp_path, {})), k)(requests(k, a))
        for k, a in calls.items()
    ]
    assert again == first and isinstance(again[0][0], tuple)


def test_requests_the_model_cannot_read_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="asks for 256 tokens, the model reads 256"):
        adapter(checkpoint).generate_until(requests("generate_until", [("Once", {})]))
    other = adapter(checkpoint)
    other._vocabulary = other._vocabulary._replace(
        tokenizer=type("T", (), {"encode": staticmethod(lambda text, special: [5000])})
    )
    with pytest.raises(InputError, match="token 5000, the model has 1024"):
        other.loglikelihood(requests("loglikelihood", [("a", "b")]))
