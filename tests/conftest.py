"""Settings of all tests: eight CPU devices, strict types, one compilation cache.

Everything here is set before JAX starts.
"""

import os
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLATFORMS_GIVEN = "JAX_PLATFORMS" in os.environ
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Small programs gain nothing from being compiled in several parts.
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# Most of a test's time is compilation. Workers and the processes that tests start share one cache
# on disk; a process that kept every program in memory would run out of memory maps.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from reference.local_hub import LocalHub  # noqa: E402
from reference.processes import xla_flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config: pytest.Config) -> None:
    """Compile without what takes most of the time: compilation is most of what tests take.

    Tests of accelerators take whatever JAX finds, the others the CPU.
    """
    if config.getoption("markexpr") == "accelerator" and not PLATFORMS_GIVEN:
        del os.environ["JAX_PLATFORMS"]
        jax.config.update("jax_platforms", None)
    if jax.__version_info__ < (0, 11):
        # These emitters take half of the compilation there; later versions have no such flag.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    optimize(False)


def optimize(on: bool) -> None:
    """Let XLA optimize programs or not, here and in processes that tests start."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0" if on else "1"
    jax.config.update("jax_disable_most_optimizations", not on)


# Seconds since 1970 after which no test begins: a run that may take only so long says what it left
# out on a slow machine, where it would be stopped and say nothing.
DEADLINE = float(os.environ.get("TOPIARY_TEST_DEADLINE", "inf"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files of many tests last.

    They repeat one claim for every method and family, so a deadline costs least there. With
    `--no-loadscope-reorder` workers take files in this order.
    """
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: sizes[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip a test that would begin after the deadline, before its fixtures are made."""
    if time.time() > DEADLINE:
        pytest.skip("the time for tests is over on this machine")


SHARED = ROOT.parent / "shared"
SMOLLM2 = pathlib.Path(
    os.environ.get("TOPIARY_SMOLLM2", pathlib.Path(tempfile.gettempdir()) / "topiary-smollm2")
)


@pytest.fixture(scope="module", autouse=True)
def forget_compilations() -> Iterator[None]:
    """Drop compiled programs after every file; the cache on disk still has them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized_programs() -> Iterator[None]:
    """Optimize the programs of a file of tests that run for longer than they compile."""
    optimize(True)
    yield
    optimize(False)


@pytest.fixture
def plain_programs(optimized_programs: None) -> Iterator[None]:
    """Leave one test of such a file without optimizations.

    Those of some processors round a pair at a boundary the other way than the authors' code.
    """
    jax.clear_caches()
    optimize(False)
    yield
    jax.clear_caches()
    optimize(True)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Return the folder of reference models, tokens and goldens; skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def smollm2(shared: pathlib.Path) -> pathlib.Path:
    """Return SmolLM2-135M as a Hugging Face directory; skip where TOPIARY_SMOLLM2 has none."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(
            "needs SmolLM2-135M: python ../shared/tools/smollm2_to_hf.py DIR, "
            "and TOPIARY_SMOLLM2=DIR"
        )
    return SMOLLM2


@pytest.fixture
def local_hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Start a hub of this machine for the real clients in this process, with empty caches."""
    import huggingface_hub
    from huggingface_hub import constants

    from models.checkpoint import hub_client

    monkeypatch.setattr(hub_client, "WAITS", (0.01, 0.02, 0.03))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LocalHub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
    # Connections of the client that are still open would be warned about.
    huggingface_hub.close_session()


@pytest.fixture
def hub_environment(tmp_path: pathlib.Path, local_hub: LocalHub) -> dict[str, str]:
    """Return the environment of a process whose clients use the hub of this machine."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": local_hub.url}
    process = {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)}
    return os.environ | home | process
