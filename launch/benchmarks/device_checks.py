"""Check that pruning and generation give on a device what they give on the CPU.

Both run in this process. A device rounds in another order than the CPU, so that near ties fall the
other way there. What a rounding may change is measured: the CPU prunes a second time with every
embedding off by one rounding, and the device may lie FACTOR times as far from the CPU as that does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.data import calibration_tokens, evaluation_tokens
from calibration.runtime import Runtime
from calibration.tokenizer import load_tokenizer
from launch.benchmarks.device_results import (
    Distance,
    Result,
    distance,
    on_device,
    pruned_on,
    with_noise,
)
from models.arch import Model
from models.checkpoint.hub import resolve
from models.checkpoint.reader import in_memory, open_checkpoint
from models.errors import InputError
from models.generate import generate
from models.init import init_model
from models.precision import matmul_type
from models.progress import Progress
from models.sharding import make_mesh, tree_to_host
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Request

MIXTURE = "random mixture"
MODELS = ("embedded:tiny-llama", "embedded:tiny-opt", MIXTURE)
# What always passes: a right device may meet a near tie that the noise of the embeddings does not.
# Noise of 2 % changes a thousandth of Wanda's masks on tiny-llama, so a tenth of that is little.
BOUNDS = Distance(masks=1e-4, weights=1e-3, perplexity=1e-4)
FACTOR = 10  # the noise comes in once, a device's rounding at every step
# Relative size of a rounding where products are computed in a type.
ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
SAMPLES, LENGTH, BATCH = 16, 64, 8
NEW_TOKENS = 32
SPARSITY = {"weights": 0.5, "structured": 0.25}  # by the package of the method
_VOCAB = 256  # tokens of the mixture
_MIXTURE = {
    "model_type": "mixtral",
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": 24,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,  # large, so that routing and attention have clear choices
}


class Case(NamedTuple):
    """One comparison.

    Attributes:
      model: One of MODELS.
      method: Name of a method.
      extra: Name of an allocation or a refinement; empty for none.
      dtype: Type of the parameters in memory.
      matmul: Type of products of float32 matrices, as `models.precision.matmul_type` takes it.
    """

    model: str
    method: str
    extra: str = ""
    dtype: str = "float32"
    matmul: str = "float32"


class Check(NamedTuple):
    """What a comparison found.

    Attributes:
      name: What was compared.
      model: Name of the model.
      types: Type of the parameters, or of products where these alone are another's.
      distance: Distance of the two results.
      rounding: Distance that a rounding alone makes; None where none is allowed for.
      passed: Whether the results agree.
    """

    name: str
    model: str
    types: str
    distance: Distance
    rounding: Distance | None
    passed: bool


def cases(methods: Sequence[str]) -> list[Case]:
    """Return the comparisons with the CPU.

    Args:
      methods: Names of the methods to compare.
    """
    dense_models = MODELS[:2]
    all_cases = [Case(m, name) for name in methods if name != "reap" for m in dense_models]
    all_cases += [Case(MIXTURE, name) for name in ("reap", "wanda") if name in methods]
    some = (
        Case(MODELS[0], "wanda", "owl"),
        Case(MODELS[0], "wanda", "alpha"),  # singular values
        Case(MODELS[0], "wanda", "dsnot"),
        *(Case(MODELS[0], m, dtype="bfloat16") for m in ("wanda", "sparsegpt", "flap")),
        Case(MIXTURE, "wanda", dtype="bfloat16"),  # fused attention with a window
        *(Case(MODELS[0], m, matmul="bfloat16") for m in ("wanda", "sparsegpt")),
        *(Case(MODELS[0], m, matmul="auto") for m in ("wanda", "sparsegpt")),
    )
    return all_cases + [case for case in some if case.method in methods]


def cpu() -> jax.Device:
    """Return the CPU that results are compared with.

    Raises:
      InputError: JAX was told to leave the CPU out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise InputError(
            "JAX has no CPU to compare with", "unset JAX_PLATFORMS, or end it in ,cpu"
        ) from None


def load(name: str, dtype: str = "float32") -> Model:
    """Return a model in the memory of the default device.

    Args:
      name: One of MODELS.
      dtype: Type of its parameters.
    """
    if name == MIXTURE:
        # Drawn on the CPU: logarithms of random bits may differ in the last digit elsewhere.
        with jax.default_device(cpu()):
            drawn = init_model(_MIXTURE, jax.random.key(0), jnp.dtype(dtype))
        host = tree_to_host((drawn.non_block, drawn.blocks))
        non_block, blocks = jax.tree.map(jnp.asarray, host)
        return Model(drawn.arch, non_block, blocks)
    return in_memory(open_checkpoint(resolve(name), jnp.dtype(dtype)).model)


@functools.cache
def _windows(name: str) -> dict[str, np.ndarray]:
    """Return windows to calibrate on and to measure with, int [samples length]."""
    if name == MIXTURE:
        ids = np.random.default_rng(0).integers(0, _VOCAB, (2, SAMPLES, LENGTH))
        return dict(zip(("calibration", "evaluation"), ids.astype(np.int32), strict=True))
    path = resolve(name)
    tokenizer = functools.partial(load_tokenizer, path)
    vocab = open_checkpoint(path).model.arch.config.vocab
    options: dict[str, Any] = {"length": LENGTH, "vocab": vocab}
    return {
        "calibration": calibration_tokens(
            "embedded", tokenizer, samples=SAMPLES, seed=0, **options
        ).ids,
        "evaluation": evaluation_tokens("embedded", tokenizer, windows=SAMPLES, **options).ids,
    }


def _run(
    case: Case,
    device: jax.Device | None,
    runtime: Runtime = Runtime(BATCH),  # noqa: B008, frozen
    noise: float = 0.0,
) -> Result:
    """Prune as a case says, on a device or on the devices of a mesh."""
    method = METHODS[case.method]()
    sparsity = SPARSITY[type(method).__module__.split(".")[1]]
    allocation = ALLOCATIONS[case.extra]() if case.extra in ALLOCATIONS else None
    refine = REFINEMENTS[case.extra]() if case.extra in REFINEMENTS else None
    request = Request(sparsity, allocation=allocation, refine=refine)

    def model() -> Model:
        dense = load(case.model, case.dtype)
        return with_noise(dense, noise) if noise else dense

    with matmul_type(case.matmul):
        return pruned_on(device, model, method, request, _windows(case.model), runtime)


def agrees(found: Distance, rounding: Distance) -> bool:
    """Return whether two results differ by no more than roundings explain.

    Args:
      found: Distance of the two.
      rounding: Distance that one rounding of the embeddings makes.
    """
    return all(
        d <= max(bound, FACTOR * r) for d, bound, r in zip(found, BOUNDS, rounding, strict=True)
    )


def _types(case: Case) -> str:
    """Return the types of a case for people."""
    if case.dtype == "bfloat16" or case.matmul == "float32":
        return case.dtype
    return f"products {case.matmul}"


def check_method(case: Case, device: jax.Device) -> Check:
    """Prune on a device and on the CPU, and compare.

    Args:
      case: What to prune with.
      device: The device.
    """
    on_it, reference = _run(case, device), _run(case, cpu())
    # With "auto" a device may round operands to bfloat16, and a CPU does not.
    coarse = "bfloat16" in (case.dtype, case.matmul) or (
        case.matmul == "auto" and device.platform != "cpu"
    )
    noisy = _run(case, cpu(), noise=ROUNDING["bfloat16" if coarse else "float32"])
    found, rounding = distance(on_it, reference), distance(noisy, reference)
    name = f"{case.method}, {case.extra}" if case.extra else case.method
    return Check(name, case.model, _types(case), found, rounding, agrees(found, rounding))


def check_generation(name: str, device: jax.Device) -> Check:
    """Compare the greedy tokens of a device with those of the CPU.

    Args:
      name: Name of the model.
      device: The device.

    Returns:
      Check whose `masks` is the share of tokens that differ.
    """
    prompts = _windows(name)["evaluation"][:4, :16]
    texts = []
    for at in (device, cpu()):
        with on_device(at), matmul_type("float32"):
            texts.append(generate(load(name), prompts, NEW_TOKENS))
    share = float(np.mean(texts[0] != texts[1]))
    return Check("greedy tokens", name, "float32", Distance(share, 0.0, 0.0), None, share == 0)


def check_sharding(spec: str, method: str, devices: Sequence[jax.Device]) -> Check:
    """Compare pruning on all local devices with pruning on the first of them.

    Args:
      spec: Mesh, as `models.sharding.make_mesh` reads it.
      method: Name of the method.
      devices: The devices.
    """
    case = Case(MODELS[0], method)
    mesh = make_mesh(spec, BATCH, devices)
    found = distance(_run(case, None, Runtime(BATCH, mesh)), _run(case, devices[0]))
    name = f"{method}, {dict(mesh.shape)['data']} x {dict(mesh.shape)['model']} devices"
    return Check(name, case.model, "float32", found, None, agrees(found, Distance(0, 0, 0)))


def run_checks(methods: Sequence[str], progress: Progress) -> list[Check]:
    """Compare the default device with the CPU, and all local devices with the first.

    Args:
      methods: Names of the methods to compare.
      progress: Shows the progress.
    """
    devices = jax.local_devices()
    jobs: list[Callable[[], Check]] = [
        functools.partial(check_method, case, devices[0]) for case in cases(methods)
    ]
    jobs += [functools.partial(check_generation, name, devices[0]) for name in MODELS]
    if len(devices) > 1:
        split = [m for m in ("wanda", "sparsegpt", "flap") if m in methods]
        jobs += [
            functools.partial(check_sharding, spec, m, devices)
            for spec in ("", f"model={len(devices)}")
            for m in split
        ]
    advance = progress("checking results", len(jobs))
    checks = []
    for job in jobs:
        checks.append(job())
        advance()
    return checks
