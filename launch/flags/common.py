"""Flags that several commands share, and the conversion of their values."""

import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.sharding import Mesh

from calibration.corpora import HUB
from calibration.mixtures import SELF
from calibration.states import OFFLOADS, Offload, choose_offload
from launch.flags.cli import Flags
from launch.flags.compilation import FLAG, OFF
from launch.flags.dtypes import compute_dtype, dtype_flag, matmul_flag
from launch.targets.syntax import EXAMPLES
from models.checkpoint import hub
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.errors import InputError
from models.families.fields import longest_text
from models.processes import is_multiprocess
from models.sharding import make_mesh
from models.untrusted import user_path
from pruning.methods import REFINEMENTS
from pruning.recovery import RECOVERIES

LONGEST_DEFAULT = 2048  # most tokens in a window whose length is not given
MOST_DRAWS = 1000
TEXTS = ("embedded", *HUB)  # sources of texts that have a name


def model_flags(f: Flags, writes: bool = False, compilation_cache: str = "") -> None:
    """Define --model, --revision, --dtype, --matmul, --mesh and --compilation_cache.

    Args:
      f: The command's flags.
      writes: Whether the command writes a model, whose type may be that of the source.
      compilation_cache: Value of --compilation_cache if it is not given.
    """
    f.group("Model")
    f.string(
        "model",
        None,
        "Hugging Face directory, hub id, .gguf file, embedded:tiny-llama or embedded:tiny-opt",
        names=hub.embedded_models(),
        files=True,
    )
    f.string(
        "revision",
        "",
        "commit, tag or branch of a hub id, as in --model=owner/name@REVISION",
    )
    dtype_flag(f, writes)
    matmul_flag(f)
    f.string(
        "mesh",
        "",
        "devices by axis, such as data=4,model=2; empty: as many local devices on data as divide "
        "the batch",
    )
    compilation_flag(f, compilation_cache)


def compilation_flag(f: Flags, default: str = "") -> None:
    """Define --compilation_cache.

    Args:
      f: The command's flags.
      default: Value if the flag is not given.
    """
    f.string(
        FLAG,
        default,
        "folder that keeps compiled programs for later runs, or off; empty: "
        "JAX_COMPILATION_CACHE_DIR, else topiary/programs in XDG_CACHE_HOME (~/.cache)",
        names=(OFF,),
        files=True,
    )


def target_flag(f: Flags, several: bool = False) -> None:
    """Define --target, or --targets.

    Args:
      f: The command's flags.
      several: Whether the command takes a list of targets.
    """
    f.string(
        "targets" if several else "target",
        "",
        ("comma-separated, as" if several else "in place of --sparsity:")
        + " params=100M, weights=400MiB, memory=1.2GiB@8x4096 (8 texts of 4096 tokens) or "
        "latency=1.3x[@[decode:|prefill:]1x512]",
        names=EXAMPLES,
        several=several,
    )


def mask_flags(f: Flags) -> None:
    """Define --pattern, --refine and --recover.

    Args:
      f: The command's flags.
    """
    f.string(
        "pattern",
        "unstructured",
        "unstructured, or N:M for N zeros in every M consecutive inputs",
        names=("unstructured", "2:4", "4:8", "16:32"),
    )
    f.string(
        "refine",
        "none",
        f"improves finished masks: {', '.join(REFINEMENTS)}",
        names=REFINEMENTS,
    )
    recover_flag(f)


def recover_flag(f: Flags, default: str = "none") -> None:
    """Define --recover.

    Args:
      f: The command's flags.
      default: Value if the flag is not given.
    """
    f.string(
        "recover",
        default,
        "trains what is left towards the dense model, zeros and shapes kept: "
        f"{', '.join(RECOVERIES)}, such as blocks(steps=48); several joined with +",
        names=("none", *RECOVERIES),
    )


def calibration_flags(f: Flags, draws: bool = True) -> None:
    """Define --calibration, its settings, and --activations.

    Args:
      f: The command's flags.
      draws: Whether the command can repeat its run on other windows.
    """
    f.group("Calibration")
    f.string(
        "calibration",
        "",
        "embedded, wikitext2, c4, ptb, a .npy, .txt, .jsonl, .json, .parquet file, self or "
        "self(temperature=1.0) for text that the model writes, or a mix such as "
        "c4:0.5,wikitext2:0.3,FILE:0.2; empty: embedded for an embedded model and where no "
        "activations are read, else wikitext2",
        names=(*TEXTS, SELF),
        files=True,
        several=True,
    )
    f.integer("calibration_samples", 128, "number of windows", 1)
    f.integer(
        "calibration_length",
        0,
        f"tokens in a window; 0: the model's own length, at most {LONGEST_DEFAULT}",
    )
    f.integer("calibration_batch", 8, "windows at a time", 1)
    if draws:
        f.integer(
            "calibration_draws",
            1,
            "repeat the run on windows of seed, seed+1, ... and report the spread; the first model "
            "is written",
            1,
            MOST_DRAWS,
        )
    f.choice(
        "activations",
        "auto",
        ["auto", *OFFLOADS],
        "memory for the hidden states between two blocks: devices, host, or files under TMPDIR; "
        "auto: the fastest with room",
    )


def evaluation_flags(f: Flags) -> None:
    """Define --eval_data, --eval_length and --eval_windows.

    Args:
      f: The command's flags.
    """
    f.group("Evaluation")
    f.string(
        "eval_data",
        "embedded",
        "comma-separated: embedded, wikitext2, c4, ptb, or .npy, .txt, .jsonl, .json, .parquet "
        "files",
        names=TEXTS,
        files=True,
        several=True,
    )
    f.integer(
        "eval_length",
        0,
        f"tokens in a window; 0: the model's own length, at most {LONGEST_DEFAULT}",
    )
    f.integer("eval_windows", 0, "most windows of a data set; 0: all")


def open_model(name: str | None, dtype: str, revision: str = "") -> Checkpoint:
    """Open the checkpoint that --model names.

    Args:
      name: A directory, file or hub id; None if the flag is not given.
      dtype: Value of --dtype.
      revision: A commit, tag or branch of a hub id; empty: as the name says.

    Raises:
      InputError: The name is missing, or the checkpoint cannot be opened.
    """
    if not name:
        raise InputError(
            "is missing",
            "give a directory, a hub id, a .gguf file or embedded:tiny-llama",
            field="model",
        )
    return open_checkpoint(hub.resolve(hub.at_revision(name, revision)), compute_dtype(dtype))


def mesh_of(spec: str, batch: int) -> Mesh | None:
    """Make the mesh that --mesh describes; None for one device.

    Args:
      spec: The flag's value.
      batch: Windows in a micro-batch.
    """
    mesh = make_mesh(spec, batch)
    # With one device no array has to be placed.
    return None if mesh.size == 1 else mesh


def offload_for(
    activations: str, x: jax.ShapeDtypeStruct, mesh: Mesh | None, available: Mapping[str, int]
) -> Offload:
    """Choose the memory that holds the hidden states between two blocks.

    Args:
      activations: Value of --activations.
      x: Shape of the hidden states of all windows, [samples time d].
      mesh: Devices of the run; None: one.
      available: Bytes of one device's memory and of the host's, by "device" and "host".

    Raises:
      InputError: Several processes cannot use that memory.
    """
    if is_multiprocess():
        if activations not in ("auto", "device"):
            raise InputError(
                "works in one process only",
                "leave it out: several processes keep hidden states on the devices",
                field="activations",
                value=activations,
            )
        return "device"
    if activations != "auto":
        return cast(Offload, activations)
    size, shards = x.size * x.dtype.itemsize, 1
    if mesh:
        # As `models.sharding` splits them: `data` divides a micro-batch, `model` may not divide d.
        shards = mesh.shape["data"]
        shards *= 1 if x.shape[-1] % mesh.shape["model"] else mesh.shape["model"]
    return choose_offload(size // shards, size, available)


def window_length(length: int, config: Mapping[str, Any]) -> int:
    """Return the number of tokens in a window.

    Args:
      length: The flag's value; 0 for the model's own length.
      config: The model's `config.json`.
    """
    return length or min(LONGEST_DEFAULT, longest_text(config, LONGEST_DEFAULT))


def check_length(field: str, length: int, checkpoint: Checkpoint) -> None:
    """Check that windows are not longer than a model with learned positions allows.

    Args:
      field: Setting that the windows come from.
      length: Tokens in a window.
      checkpoint: The model.

    Raises:
      InputError: The windows are too long.
    """
    positions = getattr(checkpoint.model.arch.config, "positions", None)
    if positions is not None and length > positions:
        raise InputError(
            f"has windows of {length} tokens, the model has {positions} positions",
            "give a shorter length",
            field=field,
        )


def dataset_list(text: str) -> list[str]:
    """Split a comma-separated list of data sets, each once.

    Args:
      text: The list.
    """
    names = (part.strip() for part in text.split(","))
    return list(dict.fromkeys(name for name in names if name))


def output_path(text: str | None) -> pathlib.Path:
    """Return the directory that --output names.

    Args:
      text: The flag's value; None if it is not given.

    Raises:
      InputError: It is not given.
    """
    if not text:
        raise InputError("is missing", "give the directory to write", field="output")
    return user_path(text, "output")
