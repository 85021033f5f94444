"""Eight CPU devices, strict ranks, and where the reference material is. Set before JAX starts."""

import os
import pathlib
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
SMOLLM2 = pathlib.Path(
    os.environ.get("TOPIARY_SMOLLM2", pathlib.Path(tempfile.gettempdir()) / "topiary-smollm2")
)


@pytest.fixture(scope="module", autouse=True)
def forget_compilations() -> Iterator[None]:
    """Drop compiled programs after every file: a process that keeps thousands runs out of memory maps, and the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference models, tokens and goldens; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def smollm2(shared: pathlib.Path) -> pathlib.Path:
    """SmolLM2-135M as a Hugging Face directory; its location is TOPIARY_SMOLLM2, else made once by ../shared/tools/smollm2_to_hf.py."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(
            "needs SmolLM2-135M: python ../shared/tools/smollm2_to_hf.py DIR, and TOPIARY_SMOLLM2=DIR"
        )
    return SMOLLM2
