"""Generation: cached logits equal uncached ones, and texts are transformers' greedy ones."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generate as module
from models.arch import Arch, Block, Model, NonBlockParams, logits
from models.cache import empty_cache
from models.checkpoint.reader import in_memory, open_checkpoint
from models.families import hf
from models.generate import decode, forward, generate, prefill
from models.rotary import Rope, rotate, rotate_from
from models.sampling import Sampling, nucleus
from models.surgery import cut, units
from reference import tiny, torch_models

pytestmark = pytest.mark.slow

CONFIGS = {
    "llama": tiny.LLAMA,
    "grouped": tiny.GQA,
    "one key-value head": {**tiny.LLAMA, "num_key_value_heads": 1},
    "biases": tiny.BIASED,
    "wide heads": {**tiny.GQA, "head_dim": 16},
    "windowed": tiny.MISTRAL,
    "window and full": {
        **tiny.QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1
    },
    "linear": {**tiny.SHORT, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {**tiny.GQA, "rope_scaling": tiny.LLAMA3},
    "dynamic, within its positions": {
        **tiny.GQA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}
    },
    "opt": tiny.OPT,
    "opt post-norm, projected": tiny.OPT_350M,
    "opt no biases": {**tiny.OPT, "enable_bias": False},
    "one block": {**tiny.GQA, "num_hidden_layers": 1},
}  # fmt: skip
DYNAMIC = {**tiny.SHORT, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


def ragged(config: dict[str, object]) -> Model:
    """Return a model whose blocks have lost different heads and neurons."""
    model = tiny.random_model(config)

    def narrow(i: int, block: object) -> object:
        for group in model.arch.groups:
            keep = np.ones(units(block, group), bool)
            keep[: i + 1 if group.name == "neurons" else i] = False
            block = cut(block, group, keep)
        return block

    return model._replace(blocks=tuple(narrow(i, b) for i, b in enumerate(model.blocks)))


@functools.partial(jax.jit, static_argnums=0)
def _whole(
    arch: Arch, non_block: NonBlockParams, blocks: tuple[Block, ...], tokens: np.ndarray
) -> jax.Array:
    return logits(Model(arch, non_block, blocks), tokens)


def assert_same(got: np.ndarray, model: Model, tokens: np.ndarray) -> None:
    """Assert that logits of the last positions equal the uncached forward's."""
    expected = _whole(*model, tokens)[:, -got.shape[1] :]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


step = jax.jit(forward, static_argnums=0)


def in_pieces(model: Model, tokens: np.ndarray, first: int, capacity: int = 32) -> np.ndarray:
    """Return logits [b t-first+1 vocab] from position first-1 on.

    The first `first` tokens run in one piece, the others one at a time.
    """
    found, caches = prefill(*model, jnp.asarray(tokens[:, :first]), capacity)
    rows = [found]
    for i in range(first, tokens.shape[1]):
        found, caches = step(*model, tokens[:, i : i + 1], caches, jnp.int32(i))
        rows.append(found)
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cached_path_gives_the_same_logits(name: str) -> None:
    """Token by token from the first, and after a prompt in one piece."""
    model, tokens = tiny.random_model(CONFIGS[name]), tiny.tokens()
    for first in (1, 16):
        assert_same(in_pieces(model, tokens, first), model, tokens)


@pytest.mark.parametrize(
    "config",
    [tiny.LLAMA, tiny.GQA, tiny.BIASED, tiny.OPT],
    ids=["llama", "grouped", "biases", "opt"],
)
def test_blocks_of_different_widths_have_caches_of_their_own(config: dict[str, object]) -> None:
    model, tokens = ragged({**config, "num_hidden_layers": 2}), tiny.tokens()
    widths = [b.k.w.shape for b in model.blocks]
    assert widths[0] != widths[1]
    assert_same(in_pieces(model, tokens, 9), model, tokens)


def test_a_model_of_fewer_blocks_has_the_same_logits_cached() -> None:
    model, tokens = tiny.random_model({**tiny.MISTRAL, "num_hidden_layers": 3}), tiny.tokens()
    model = model._replace(blocks=(model.blocks[0], model.blocks[2]))
    assert_same(in_pieces(model, tokens, 5), model, tokens)


@pytest.mark.parametrize("name", ["windowed", "opt"])
def test_several_tokens_may_follow_others_at_once(name: str) -> None:
    """Process a prompt in two pieces."""
    model, tokens = tiny.random_model(CONFIGS[name]), tiny.tokens()
    _, caches = prefill(*model, jnp.asarray(tokens[:, :10]), 40)
    found, _ = step(*model, tokens[:, 10:], caches, jnp.int32(10))
    assert_same(found[:, None], model, tokens)


def test_the_cache_of_a_bfloat16_model_is_bfloat16() -> None:
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), tiny.random_model(tiny.GQA)._replace(arch=None)
    )
    model = model._replace(arch=hf.specs(tiny.GQA)[0])
    assert empty_cache(model.blocks[0].k, 8, 1, 4).k.dtype == jnp.bfloat16
    found, expected = (
        in_pieces(model, tiny.tokens(), 9),
        np.asarray(_whole(*model, tiny.tokens())[:, 8:]),
    )
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "dynamic"])
def test_rotation_at_a_position_is_that_of_the_whole_text(kind: str) -> None:
    """Equal bits from the table; equal up to rounding under dynamic scaling."""
    rope = Rope(kind=kind, factor=4.0, max_positions=16)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 40, 3, 8)).astype(np.float32)
    whole = rotate(rope, q, k)
    for got, expected in zip(
        rotate_from(rope, q[:, 37:], k[:, 37:], jnp.int32(37), 50), whole, strict=True
    ):
        if kind == "dynamic":
            np.testing.assert_allclose(got, expected[:, 37:], atol=1e-5)
        else:
            np.testing.assert_array_equal(got, expected[:, 37:])


@pytest.mark.parametrize(
    "config",
    [DYNAMIC, CONFIGS["windowed"], tiny.OPT_350M],
    ids=["dynamic", "windowed", "opt post-norm"],
)
def test_greedy_tokens_of_random_models_equal_transformers(
    config: dict[str, object], tmp_path: pathlib.Path
) -> None:
    """Under dynamic scaling too, where earlier keys keep the rotation of a shorter text."""
    torch_models.save_random(config, tmp_path)
    model, tokens = in_memory(open_checkpoint(tmp_path).model), tiny.tokens(length=10)
    np.testing.assert_array_equal(
        generate(model, tokens, 32), torch_models.greedy(torch_models.load(tmp_path), tokens, 32)
    )


@pytest.mark.parametrize("name", ["stories260K", "tiny-llama", "tiny-llama-gqa", "tiny-opt"])
def test_greedy_tokens_of_trained_models_equal_transformers(
    name: str, shared: pathlib.Path
) -> None:
    tokens = np.load(shared / "golden" / "tokens" / "tiny_eval.npy")[:2, :24] % 512
    model = open_checkpoint(shared / "models" / name).model
    theirs = torch_models.greedy(torch_models.load(shared / "models" / name), tokens, 32)
    np.testing.assert_array_equal(generate(model, tokens, 32), theirs)


def test_greedy_tokens_of_smollm2_equal_transformers(
    smollm2: pathlib.Path, shared: pathlib.Path
) -> None:
    tokens = np.load(shared / "golden" / "tokens" / "smollm2_eval.npy")[:2, :24]
    np.testing.assert_array_equal(
        generate(open_checkpoint(smollm2).model, tokens, 8),
        torch_models.greedy(torch_models.load(smollm2), tokens, 8),
    )


def nucleus_reference(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities of one row: most likely tokens are taken until they hold top_p."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p, kept, held = p / p.sum(), np.zeros(len(p), bool), 0.0
    for i in np.argsort(-p):
        if held >= top_p:
            break
        kept[i], held = True, held + p[i]
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(
    temperature: float, top_p: float
) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32) * 3
    got = jax.nn.softmax(
        nucleus(rows, Sampling(jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0))),
        axis=-1,
    )
    expected = [nucleus_reference(r, temperature, top_p) for r in rows]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_tokens_are_drawn_with_the_probabilities_of_the_nucleus() -> None:
    """Count the first tokens of 4,000 equal prompts."""
    model, prompt = tiny.random_model(tiny.GQA), tiny.tokens(1, 6)
    drawn = generate(
        model, np.repeat(prompt, 4000, 0), 1, temperature=1.5, top_p=0.8, key=jax.random.key(3)
    )[:, 0]
    expected = nucleus_reference(np.asarray(logits(model, prompt))[0, -1], 1.5, 0.8)
    seen = np.bincount(drawn, minlength=tiny.VOCAB) / 4000
    assert not seen[expected == 0].any()
    assert np.abs(seen - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_one_key_gives_one_text() -> None:
    model, prompts = tiny.random_model(tiny.GQA), tiny.tokens(2, 6)

    def text(seed: int) -> np.ndarray:
        return generate(model, prompts, 12, temperature=1.0, key=jax.random.key(seed))

    np.testing.assert_array_equal(text(0), text(0))
    assert (text(0) != text(1)).any()
    assert (text(0)[0] != text(0)[1]).any()


def test_a_text_ends_at_eos() -> None:
    """A row that has ended is filled, the loop ends with the last row, and two end tokens work."""
    model, prompts = tiny.random_model(tiny.GQA), tiny.tokens(2, 6)
    free = generate(model, prompts, 12)
    eos = int(free[0, 3])
    got = generate(model, prompts, 12, eos=eos)
    for row, whole in zip(got, free, strict=True):
        end = list(whole).index(eos) + 1 if eos in whole else 12
        np.testing.assert_array_equal(row, [*whole[:end], *[eos] * (12 - end)])
    assert (
        generate(model, prompts[:1], 12, eos=[tiny.VOCAB - 1, eos])[0, 4:] == tiny.VOCAB - 1
    ).all()


@pytest.mark.parametrize("lengths", [None, np.asarray([6, 3])])
def test_a_caller_may_stop_a_text_after_each_part(
    lengths: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts continue each other: together they are the text that is made at once."""
    monkeypatch.setattr(module, "PART", 5)
    model, prompts = tiny.random_model(tiny.GQA), tiny.tokens(2, 6)
    whole = generate(model, prompts, 12, lengths=lengths)
    asked: list[np.ndarray] = []

    def stop(text: np.ndarray) -> bool:
        asked.append(text)
        return False

    np.testing.assert_array_equal(generate(model, prompts, 12, lengths=lengths, stop=stop), whole)
    assert [text.shape[1] for text in asked] == [5, 10]
    np.testing.assert_array_equal(asked[1], whole[:, :10])
    stopped = generate(model, prompts, 12, lengths=lengths, stop=lambda text: True)
    np.testing.assert_array_equal(stopped, whole[:, :5])


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    """The cache holds no position that was not computed."""
    model, prompts = tiny.random_model(tiny.GQA), tiny.tokens(1, 6)
    eos = jnp.asarray([generate(model, prompts, 4)[0, 3]])
    found, caches = prefill(*model, jnp.asarray(prompts), 26)
    _, caches = decode(*model, found, caches, jnp.int32(6), 20, None, eos)
    filled = np.abs(caches[0].k).sum((0, 1, 3)) > 0
    assert filled.sum() <= 6 + 3


def test_prompts_of_one_shape_share_one_compilation() -> None:
    """Neither the prompt nor temperature, nucleus, seed or end token compiles again."""
    model = tiny.random_model({**tiny.GQA, "intermediate_size": 44})
    before = prefill._cache_size(), decode._cache_size()
    for seed in range(3):
        generate(model, tiny.tokens(1, 7, seed), 5)
        generate(
            model,
            tiny.tokens(1, 7, seed),
            5,
            temperature=1.0 + seed,
            top_p=0.5 + seed / 10,
            key=jax.random.key(seed),
        )
    assert (prefill._cache_size(), decode._cache_size()) == (before[0] + 1, before[1] + 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "range"),
        ({"top_p": 0.0}, "range"),
        ({"top_p": 1.5}, "range"),
        ({"new_tokens": 0}, "range"),
        ({"temperature": 0.5}, "key"),
        ({"new_tokens": 60}, "64 positions"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    settings = {"new_tokens": 4, **change}
    with pytest.raises(ValueError, match=message):
        generate(tiny.random_model(tiny.OPT), tiny.tokens(1, 6), **settings)


@pytest.mark.parametrize("name", ["grouped", "windowed", "opt", "dynamic, within its positions"])
def test_prompts_of_different_lengths_stand_in_one_batch(name: str) -> None:
    """Padding after a prompt is not seen: each row gives its own text."""
    model, prompts, lengths = ragged(CONFIGS[name]), tiny.tokens(4, 20), np.array([20, 3, 11, 1])
    got = generate(model, prompts, 9, lengths=lengths, eos=[5])
    alone = [generate(model, prompts[i : i + 1, :n], 9, eos=[5])[0] for i, n in enumerate(lengths)]
    np.testing.assert_array_equal(got, alone)


def test_a_step_copies_a_cache_twice_at_most(optimized_programs: None) -> None:
    """Four copies of every cache at every token took two fifths of the time at 2,048 tokens."""
    m = tiny.random_model(tiny.GQA)
    m = m._replace(blocks=tuple(m.blocks))
    capacity = 67  # no other array has this size
    logits, caches = jax.eval_shape(lambda: prefill(*m, jnp.zeros((2, 60), jnp.int32), capacity))
    state = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part) for part in (logits, caches)]
    start, eos = jnp.int32(60), jnp.zeros(0, jnp.int32)
    program = decode.lower(*m, *state, start, 7, None, eos).compile().as_text()
    cache = ",".join(map(str, caches[0].k.shape))
    copies = re.findall(rf"= f32\[{cache}\]\S* copy\(", program)
    assert f"f32[{cache}]" in program and len(copies) <= 2 * 2 * len(m.blocks)
