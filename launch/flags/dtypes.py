"""The flags --dtype and --matmul: types of a model in memory, in products and in the output."""

from typing import Any

import jax.numpy as jnp

from launch.flags.cli import Flags
from models.checkpoint.reader import Checkpoint
from models.precision import MATMULS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Compute in float32 and write the source's own type.
AUTO = "auto"


def dtype_flag(f: Flags, writes: bool) -> None:
    """Define --dtype.

    Args:
      f: The command's flags.
      writes: Whether the command writes a model, whose type may be that of the source.
    """
    if writes:
        f.choice(
            "dtype",
            AUTO,
            [AUTO, *DTYPES],
            "type of the model in memory and in the output; statistics are always float32; auto: "
            "float32 in memory, and the source's own type in the output",
        )
    else:
        f.choice("dtype", "float32", list(DTYPES), "type of the model in memory")


def matmul_flag(f: Flags) -> None:
    """Define --matmul.

    Args:
      f: The command's flags.
    """
    f.choice(
        "matmul",
        AUTO,
        list(MATMULS),
        "type in which float32 matrices are multiplied in a forward and in its statistics; solvers "
        "keep float32. bfloat16: operands rounded, sums in float32, two to three times faster on "
        "CPUs with avx512_bf16; auto: float32 on CPUs, the device's own default on GPUs and TPUs",
    )


def compute_dtype(dtype: str) -> Any:
    """Return the type of the model in memory.

    Args:
      dtype: Value of --dtype.
    """
    return DTYPES["float32" if dtype == AUTO else dtype]


def stored_dtype(dtype: str, checkpoint: Checkpoint) -> str:
    """Return the name of the type that a pruned model is written in.

    Args:
      dtype: Value of --dtype.
      checkpoint: The source.
    """
    return checkpoint.dtype if dtype == AUTO else dtype
