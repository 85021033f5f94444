"""Pretraining: a tiny run learns, repeats to the byte, and writes a checkpoint for transformers."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from launch import pretrain
from launch.flags import cli
from launch.pretrain import Settings
from models.arch import logits
from models.checkpoint import reader as store
from models.errors import InputError
from models.families import hf

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = Settings(
    family="llama",
    hidden=32,
    blocks=1,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocabulary=400,
    length=32,
    batch=4,
    steps=60,
    warmup=5,
    learning_rate=1e-2,
    weight_decay=0.1,
    clip=1.0,
    eval_windows=4,
    log_every=20,
    seed=3,
)
SETTINGS = {"llama": TINY, "opt": dataclasses.replace(TINY, family="opt", kv_heads=0)}


@pytest.fixture(scope="module", autouse=True)
def promoted_dtypes() -> Iterator[None]:
    """Let dtypes promote: optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", params=list(SETTINGS))
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, pathlib.Path, float]:
    """Train a tiny model of each family; return settings, checkpoint and perplexity."""
    settings = SETTINGS[request.param]
    output = tmp_path_factory.mktemp(request.param) / "model"
    return settings, output, pretrain.pretrain(settings, output)


def read(directory: pathlib.Path) -> dict[str, bytes]:
    """Return the content of every file by its name."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_few_steps_lower_the_perplexity(run: tuple[Settings, pathlib.Path, float]) -> None:
    """A uniform guess has perplexity 400; even few steps should reach a fraction of that."""
    assert 1 < run[2] < 160


def test_the_output_has_all_files_and_nothing_beside_it(
    run: tuple[Settings, pathlib.Path, float],
) -> None:
    _, output, _ = run
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(read(output)) == names
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_same_settings_give_the_same_bytes(
    run: tuple[Settings, pathlib.Path, float], tmp_path: pathlib.Path
) -> None:
    settings, output, perplexity = run
    assert pretrain.pretrain(settings, tmp_path / "again") == perplexity
    assert read(tmp_path / "again") == read(output)


def test_the_perplexity_is_that_of_the_checkpoint(
    run: tuple[Settings, pathlib.Path, float],
) -> None:
    """It is measured on the float16 parameters that were written, not on those in memory."""
    settings, output, perplexity = run
    model = store.in_memory(store.open_checkpoint(output).model)
    tokenizer = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    assert pretrain.held_out_perplexity(model, tokenizer, settings) == pytest.approx(
        perplexity, rel=1e-6
    )


def test_transformers_reads_the_same_model(run: tuple[Settings, pathlib.Path, float]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings, output, _ = run
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    assert theirs.generation_config.eos_token_id == 1
    tokens = np.random.default_rng(0).integers(0, settings.vocabulary, (2, settings.length))
    ours = logits(
        store.in_memory(store.open_checkpoint(output).model), jnp.asarray(tokens, jnp.int32)
    )
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.from_numpy(tokens)).logits.numpy(), atol=1e-4)


def test_transformers_reads_the_tokenizer(run: tuple[Settings, pathlib.Path, float]) -> None:
    transformers = pytest.importorskip("transformers")
    settings, output, _ = run
    config = transformers.AutoConfig.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert config.model_type == settings.family
    assert config.vocab_size == len(tokenizer) == settings.vocabulary
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 0)
    text = 'Mia said: "Déjà vu!"\n\t3 ✂ 漢字  end '
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and 1 not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_loss_is_the_mean_cross_entropy() -> None:
    """The reference is NumPy in float64, on the positions that have a successor."""
    config = pretrain.model_config(TINY, 400)
    model = pretrain.init.init_model(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 400, (3, 10))
    z = np.asarray(logits(model, jnp.asarray(tokens)), np.float64)[:, :-1]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -np.mean([log_p[b, t, tokens[b, t + 1]] for b in range(3) for t in range(9)])
    assert float(pretrain.loss(model, jnp.asarray(tokens))) == pytest.approx(expected, rel=1e-5)


def test_only_matrices_decay() -> None:
    """Without a gradient, a step at the peak rate shrinks matrices by rate x decay."""
    optimizer = pretrain.make_optimizer(
        dataclasses.replace(TINY, warmup=0, learning_rate=0.25, weight_decay=0.5)
    )
    params = {"matrix": jnp.full((2, 3), 8.0), "norm": jnp.full((3,), 8.0)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["matrix"], -1.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0.0)


def test_rate_rises_then_falls_to_a_tenth() -> None:
    """With a constant gradient, every update of Adam has the size of its rate."""
    settings = dataclasses.replace(TINY, warmup=10, steps=50, learning_rate=0.5, weight_decay=0.0)
    optimizer, param = pretrain.make_optimizer(settings), jnp.ones((1,))
    state, sizes = optimizer.init(param), []
    for _ in range(51):
        update, state = optimizer.update(jnp.full((1,), 0.01), state, param)
        sizes.append(float(-update[0]))
    np.testing.assert_allclose(sizes[:11], np.linspace(0, 0.5, 11), atol=1e-4)
    assert all(a > b for a, b in itertools.pairwise(sizes[10:]))
    assert sizes[50] == pytest.approx(0.05, rel=1e-3)


def test_clipping_bounds_the_gradient() -> None:
    """After a huge gradient a small one counts: unclipped, the second moment would hide it."""
    settings = dataclasses.replace(TINY, warmup=0, weight_decay=0.0)
    optimizer, param = pretrain.make_optimizer(settings), jnp.ones((1,))
    state = optimizer.init(param)
    for gradient in (1e6, 0.5):
        update, state = optimizer.update(jnp.full((1,), gradient), state, param)
    # Adam's moments of the gradients 1 and 0.5.
    m = 0.1 * 0.9 + 0.1 * 0.5
    v = 0.01 * 0.99 + 0.01 * 0.25
    expected = -TINY.learning_rate * (m / (1 - 0.9**2)) / (v / (1 - 0.99**2)) ** 0.5
    np.testing.assert_allclose(update, expected, rtol=0.01)


def test_a_run_that_fails_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: pathlib.Path, *_: object) -> None:
        (directory / "model.safetensors").write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(pretrain.writer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrain.pretrain(dataclasses.replace(TINY, steps=6), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_another_directory_is_refused_before_any_work(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda *_: pytest.fail("work began"))
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not an earlier result"):
        pretrain.pretrain(TINY, tmp_path)
    assert read(tmp_path) == {"note": b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 60}, "^warmup=60 leaves none of the 60 steps"),
        ({"learning_rate": 0.0}, r"^learning_rate=0\.0 must be positive"),
        ({"clip": 0.0}, r"^clip=0\.0 must be positive"),
        ({"weight_decay": -1.0}, r"^weight_decay=-1\.0 must be positive or 0"),
        ({"family": "opt"}, "^kv_heads=2 is for family=llama"),
        ({"heads": 5}, "not a multiple"),
        ({"kv_heads": 3}, "not a multiple"),
    ],
)
def test_settings_that_disagree_are_refused(
    change: dict[str, object], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain.pretrain(dataclasses.replace(TINY, **change), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_flag_file_makes_the_embedded_model(family: str) -> None:
    """The file's settings give the configuration that ships, with 1 to 2 million parameters."""
    values = pretrain.options().parse(
        [f"--flagfile={ROOT / 'configs' / f'pretrain-{family}.flags'}"]
    )
    settings = cli.frozen(Settings, values)
    config = pretrain.model_config(settings, settings.vocabulary)
    shipped = json.loads(
        (ROOT / "models" / "embedded" / f"tiny-{family}" / "config.json").read_text()
    )
    assert {name: shipped.get(name) for name in config} == config
    _, non_block, blocks = hf.specs(config)
    sizes = [
        np.prod(spec.shape) for spec in jax.tree.leaves((non_block, blocks), is_leaf=hf.is_spec)
    ]
    assert 1e6 < sum(sizes) < 1.8e6


def test_main_trains_with_the_settings_of_the_flags(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, pathlib.Path]] = []
    monkeypatch.setattr(
        pretrain, "pretrain", lambda settings, output: seen.append((settings, output))
    )
    flagfile = tmp_path / "run.flags"
    flagfile.write_text("# a comment\n--family=opt\n--steps=7\n--learning_rate=0.5\n")
    arguments = [f"--flagfile={flagfile}", "--steps=9", f"--output={tmp_path / 'model'}"]
    assert cli.run(pretrain.options(), pretrain.main, arguments) == 0
    ((settings, output),) = seen
    assert (settings.family, settings.steps, settings.learning_rate) == ("opt", 9, 0.5)
    assert output == tmp_path / "model"


def test_main_refuses_a_missing_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(pretrain.options(), pretrain.main, []) == 2
    assert (
        capsys.readouterr().err
        == "error: --output is missing: name the directory to write the model to\n"
    )


def test_one_compilation_serves_every_step() -> None:
    arch, *params = pretrain.init.init_model(
        pretrain.model_config(TINY, 400), jax.random.key(TINY.seed)
    )
    params, optimizer = tuple(params), pretrain.make_optimizer(TINY)
    state, step = optimizer.init(params), pretrain.make_step(arch, optimizer)
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, 400, (4, 32)).astype(np.int32)
        params, state, value = step(params, state, tokens)
    assert step._cache_size() == 1 and np.isfinite(value)
