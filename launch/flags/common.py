"""Flags that commands share, and what they mean."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from calibration.states import OFFLOADS, Offload, choose_offload
from launch.flags import calls
from launch.flags.cli import Flags
from models.checkpoint import hub
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.errors import InputError
from models.processes import is_multiprocess
from models.sharding import make_mesh
from pruning.methods import REFINEMENTS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LONGEST_DEFAULT = 2048


def model_flags(f: Flags) -> None:
    """--model, --dtype, --mesh."""
    f.group("Model")
    f.string(
        "model",
        None,
        "a Hugging Face directory, a hub id, a .gguf file, embedded:tiny-llama or embedded:tiny-opt",
    )
    f.choice(
        "dtype",
        "float32",
        list(DTYPES),
        "the model's type in memory and in the output; statistics stay float32",
    )
    f.string(
        "mesh",
        "",
        "devices, as data=4,model=2; empty: all local ones on data that divide the micro-batch",
    )


def layout_flag(f: Flags) -> None:
    """--layout, --output_format."""
    f.choice(
        "layout",
        "auto",
        ("auto", "padded"),
        "how blocks of different widths are written: with a class that ships with the "
        "checkpoint, or padded with zeros to a stock architecture",
    )
    f.choice(
        "output_format",
        "hf",
        ("hf", "orbax"),
        "orbax: the pytrees too, under OUTPUT/orbax, for models.checkpoint.orbax.load",
    )


def mask_flags(f: Flags) -> None:
    """--pattern, --refine."""
    f.string(
        "pattern", "unstructured", "unstructured, or N:M for N zeros in every M consecutive inputs"
    )
    f.string("refine", "none", f"what is done to finished masks: {', '.join(REFINEMENTS)}")


def calibration_flags(f: Flags) -> None:
    """--calibration, --calibration_samples, --calibration_length, --calibration_batch, --calibration_draws, --activations."""
    f.group("Calibration")
    f.string(
        "calibration",
        "embedded",
        "embedded, wikitext2, c4, ptb, or a .npy, .txt, .jsonl, .parquet file",
    )
    f.integer("calibration_samples", 128, "how many windows", 1)
    f.integer(
        "calibration_length", 0, "tokens in a window; 0: what the model was made for, at most 2048"
    )
    f.integer("calibration_batch", 8, "windows at a time", 1)
    f.integer(
        "calibration_draws",
        1,
        "draws of windows, by seed, seed+1, ..., over which figures spread; the first one's model is written",
        1,
    )
    f.choice(
        "activations",
        "auto",
        ["auto", *OFFLOADS],
        "where hidden states between two blocks are kept: on the devices, in host memory, or in files under TMPDIR; "
        "auto: the first with room",
    )


def evaluation_flags(f: Flags) -> None:
    """--eval_data, --eval_length, --eval_windows."""
    f.group("Evaluation")
    f.string(
        "eval_data",
        "embedded",
        "comma-separated: embedded, wikitext2, c4, ptb, or .npy, .txt, .jsonl, .parquet files",
    )
    f.integer(
        "eval_length",
        0,
        f"tokens in a window; 0: what the model was made for, at most {LONGEST_DEFAULT}",
    )
    f.integer("eval_windows", 0, "most windows of a data set; 0: all")


def open_model(name: str | None, dtype: str) -> Checkpoint:
    """The checkpoint that --model names; InputError if it was not given or cannot be opened."""
    if not name:
        raise InputError(
            "--model is missing: give a directory, a hub id, a .gguf file or embedded:tiny-llama"
        )
    return open_checkpoint(hub.resolve(name), DTYPES[dtype])


def mesh_of(spec: str, batch: int) -> Mesh | None:
    """The mesh that --mesh asks for, for micro-batches of `batch` windows; None where it is one device: nothing has to be placed."""
    mesh = make_mesh(spec, batch)
    return None if mesh.size == 1 else mesh


def offload_for(
    flag: str, x: jax.ShapeDtypeStruct, mesh: Mesh | None, there: Mapping[str, int]
) -> Offload:
    """Where --activations puts the hidden states x [samples length d] of all windows; "auto" goes by the memory that is there."""
    if is_multiprocess():
        if flag not in ("auto", "device"):
            raise InputError(
                f"--activations={flag} is for one process: with several, hidden states stay on the devices"
            )
        return "device"
    if flag != "auto":
        return cast(Offload, flag)
    size = x.size * x.dtype.itemsize
    return choose_offload(size // (mesh.shape["data"] if mesh else 1), size, there)


def window_length(flag: int, config: Mapping[str, Any]) -> int:
    """A window's length: the flag, or what the model of a `config.json` was made for."""
    return flag or min(LONGEST_DEFAULT, int(config.get("max_position_embeddings", LONGEST_DEFAULT)))


def check_sparsity(sparsity: float) -> None:
    """InputError unless it is a fraction that leaves something."""
    if not 0 <= sparsity < 1:
        raise InputError(f"--sparsity={sparsity} must be at least 0 and less than 1")


def check_length(name: str, length: int, checkpoint: Checkpoint) -> None:
    """InputError if windows are longer than a model with learned positions has positions for."""
    positions = getattr(checkpoint.model.arch.config, "positions", None)
    if positions is not None and length > positions:
        raise InputError(
            f"{name} has windows of {length} tokens, the model has {positions} positions: give a shorter length"
        )


def numbers(
    name: str, text: str, kind: Callable[[str], Any], allowed: Callable[[Any], bool], wanted: str
) -> tuple[Any, ...]:
    """The numbers of a comma-separated flag; InputError that says what is `wanted` unless all are allowed, and there is one."""
    try:
        found = tuple(kind(item) for item in calls.each(text))
    except ValueError:
        found = ()
    if not found or not all(map(allowed, found)):
        raise InputError(f"--{name}={text} must be {wanted}, separated by commas")
    return found


def seeds(text: str) -> tuple[int, ...]:
    """The seeds of --seeds."""
    return numbers("seeds", text, int, lambda v: 0 <= v < 2**31, "integers from 0 on")


def check_once(name: str, items: Sequence[Any]) -> None:
    """InputError if the list that --name gives has something twice."""
    if len(set(items)) < len(items):
        raise InputError(f"--{name}={','.join(map(str, items))} names one twice: give each once")


def dataset_list(text: str) -> list[str]:
    """The data sets of a comma-separated flag, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def output_path(text: str | None) -> pathlib.Path:
    """The directory that --output names; InputError if it was not given."""
    if not text:
        raise InputError("--output is missing: give the directory to write")
    return pathlib.Path(text).expanduser()
