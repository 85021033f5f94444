"""A run writes further formats beside the checkpoint, checked and in the report."""

import pathlib

import jax
import numpy as np
import pytest

pytest.importorskip("gguf")

import pruning
from launch import unpack
from launch.flags.cli import run
from launch.run import export
from launch.run.formats import warnings
from models.checkpoint.gguf_writer import write_gguf
from models.checkpoint.reader import in_memory, open_checkpoint
from models.checkpoint.writer import save
from models.generate import generate
from models.init import init_model
from reference import tiny, tiny_tokenizer
from reference.prune_runs import call, report_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with `llama` and `opt` checkpoints and a token file."""
    root = tmp_path_factory.mktemp("inputs")
    for config in (tiny.GQA, tiny.OPT):
        directory = root / str(config["model_type"])
        random = dict(config) | {"initializer_range": 0.2, "init_std": 0.2}
        save(directory, init_model(random, jax.random.key(1)), config, root)
        tiny_tokenizer.write(directory)
    rng = np.random.default_rng(0)
    np.save(root / "tokens.npy", rng.integers(0, 96, (4, 16), np.int32))
    return root


def args(inputs: pathlib.Path, model: str, output: pathlib.Path, *more: str) -> list[str]:
    tokens = inputs / "tokens.npy"
    data = [f"--calibration={tokens}", f"--eval_data={tokens}", "--mesh=data=1"]
    return [f"--model={inputs / model}", *data, f"--output={output}", *more]


def test_opt_as_gguf_is_refused_before_any_work(
    inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = args(inputs, "opt", out, "--method=wanda", "--sparsity=0.5", "--output_format=gguf")
    assert call(argv) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: --output_format=gguf is not possible: Topiary writes no GGUF of opt: leave "
        "--output_format out\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_type_without_gguf_is_refused(
    inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(args(inputs, "llama", tmp_path / "out", "--sparsity=0", "--gguf_type=q8_0")) == 2
    assert "--gguf_type=q8_0 does nothing without --output_format=gguf" in capsys.readouterr().err


def test_warnings_name_what_a_format_lacks() -> None:
    formats = {
        "gguf": {"context": 4096},
        "pack": {"format": "macko", "dense": 10, "packed": 11},
    }
    said = list(warnings(formats, {"max_position_embeddings": 8192}, "bfloat16"))
    assert len(said) == 3 and "at most 4096 tokens" in said[0]
    assert "no smaller" in said[1] and "float16" in said[2]
    formats = {"gguf": {"context": 4096}, "pack": {"format": "bitmask", "dense": 10, "packed": 9}}
    assert not list(warnings(formats, {"max_position_embeddings": 4096}, "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("no_samples", "no_transformers")
def test_a_run_writes_a_gguf_file_and_a_pack(
    dtype: str,
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    flags = ("--method=wanda", "--sparsity=0.5", "--output_format=gguf", "--pack=bitmask")
    assert call(args(inputs, "llama", out, *flags, f"--dtype={dtype}")) == 0
    formats = report_of(out)["other_formats"]
    assert report_of(out)["load_back"]["gguf"] == formats["gguf"]["load_back"]
    file = out / formats["gguf"]["file"]
    assert formats["gguf"]["bytes"] == file.stat().st_size
    assert formats["gguf"]["load_back"].startswith("largest difference of the logits")
    packed = (out / "packed/packed.safetensors").stat().st_size
    assert formats["pack"]["packed"] == packed < formats["pack"]["dense"]
    assert str(file) in capsys.readouterr().out
    assert in_memory(open_checkpoint(file).model).arch.config.dim == 32
    assert run(unpack.options(), unpack.main, [f"--model={out}/packed", f"--output={out}2"]) == 0
    again = pathlib.Path(f"{out}2")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    # What lies at the output is never replaced.
    assert run(unpack.options(), unpack.main, [f"--model={out}/packed", f"--output={out}"]) == 2
    assert "exists and is not an earlier result" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_samples", "no_transformers")
def test_a_wrong_gguf_file_leaves_no_output(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE_LOW_PRECISION", -1.0)
    flags = ("--method=wanda", "--sparsity=0.5", "--output_format=gguf")
    with pytest.raises(RuntimeError, match="the GGUF file gives other logits"):
        call(args(inputs, "llama", tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        (pruning.flap(), 0.2),
        (pruning.llmrank(), 0.2),
        (pruning.sleb(blocks=3), 0.0),
        (pruning.sparsegpt(), 0.5),
    ],
    ids=["flap", "llmrank", "sleb", "sparsegpt"],
)
def test_smollm2_in_llama_cpp_predicts_what_ours_does(
    method: object, sparsity: float, smollm2: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The perplexity of a text, and the most likely tokens, forced and free."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model = pruning.open_model(str(smollm2))
    pruned = pruning.prune(model, method, "embedded", sparsity=sparsity, samples=2, length=32)
    directory = pruning.save(pruned, tmp_path / "out")
    path = write_gguf(directory).path
    loaded = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    text = pathlib.Path(smollm2 / "config.json").read_text() + pathlib.Path(__file__).read_text()
    ids = loaded.tokenize(text.encode(), add_bos=True)[:128]
    read = in_memory(open_checkpoint(path).model)
    loaded.eval(ids)
    scores = np.array(loaded.scores[:127], np.float64)
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(127), ids[1:]]
    ours = pruning.perplexity(pruned, np.array([ids], np.int32))
    np.testing.assert_allclose(np.exp(losses.mean()), ours, rtol=2e-3)
    free = []
    loaded.reset()
    for token in loaded.generate(ids[:16], top_k=1, temp=0.0, repeat_penalty=1.0):
        free.append(token)
        if len(free) == 8:
            break
    assert free == generate(read, np.array([ids[:16]]), 8)[0].tolist()
    loaded.close()
