"""On a GPU or a TPU results are those of the CPU: `pytest -m accelerator`.

One file, so that one worker alone takes the device.
"""

import functools

import jax
import pytest

from launch.benchmarks import device_checks
from launch.benchmarks.device_checks import MODELS, Case
from pruning.methods import METHODS

pytestmark = [pytest.mark.accelerator, pytest.mark.usefixtures("optimized_programs")]


@functools.cache
def accelerators() -> list[jax.Device]:
    """Return the local accelerators; skip where there is none."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        pytest.skip("needs a GPU or a TPU, and JAX finds none")
    return devices


@pytest.mark.parametrize(
    "case", device_checks.cases(list(METHODS)), ids=lambda c: "-".join(filter(None, c))
)
def test_a_method_gives_what_it_gives_on_the_cpu(case: Case) -> None:
    check = device_checks.check_method(case, accelerators()[0])
    assert check.passed, check


@pytest.mark.parametrize("model", MODELS)
def test_generation_gives_the_tokens_of_the_cpu(model: str) -> None:
    check = device_checks.check_generation(model, accelerators()[0])
    assert check.passed, check


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "flap"])
def test_all_devices_give_what_one_gives(method: str) -> None:
    devices = accelerators()
    if len(devices) == 1:
        pytest.skip("needs several GPUs or TPUs")
    for spec in ("", f"model={len(devices)}"):
        check = device_checks.check_sharding(spec, method, devices)
        assert check.passed, check
