"""Sizes against counts by NumPy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.size import count_entries, measure_size, peak_memory
from models.checkpoint.reader import open_checkpoint
from models.checkpoint.writer import save
from models.families import hf
from models.surgery import cut, mask
from reference import tiny


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_parameters_and_nonzero_weights_are_counted(name: str) -> None:
    model = tiny.random_model(tiny.FAMILIES[name])
    rng = np.random.default_rng(0)

    def thin(x: jax.Array) -> jax.Array:
        return jnp.where(rng.random(x.shape) < 0.6, x, 0)

    model = model._replace(
        non_block=jax.tree.map(thin, model.non_block), blocks=jax.tree.map(thin, model.blocks)
    )
    size = measure_size(model)
    assert size.parameters == sum(
        np.asarray(x).size for x in jax.tree.leaves((model.non_block, model.blocks))
    )
    assert size.nonzero == tuple(
        {s.name: np.count_nonzero(getattr(b, s.name).w) for s in model.arch.slots}
        for b in model.blocks
    )
    assert {type(n) for n in size.nonzero[0].values()} == {int}


def test_masks_lower_nonzero_weights_and_cuts_lower_parameters() -> None:
    """Both have the same non-zero weights; only what is cut is no longer an entry."""
    model = tiny.random_model(tiny.BIASED)
    g, keep = model.arch.group("neurons"), np.arange(40) < 10
    masked = measure_size(model._replace(blocks=tuple(mask(b, g, keep) for b in model.blocks)))
    smaller = measure_size(model._replace(blocks=tuple(cut(b, g, keep) for b in model.blocks)))
    assert masked.nonzero == smaller.nonzero
    assert masked.parameters - smaller.parameters == 2 * 30 * (
        3 * 32 + 2
    )  # rows of gate and up, columns of down, two biases
    assert masked.nonzero[0]["down"] == 32 * 10 and masked.nonzero[0]["q"] == 32 * 32


def test_a_checkpoint_on_disk_has_the_size_of_its_model(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.OPT_350M)
    save(tmp_path / "out", model, tiny.OPT_350M, tmp_path)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert measure_size(checkpoint.model) == measure_size(model)
    assert count_entries((model.non_block, model.blocks)) == checkpoint.parameters
    assert set(measure_size(model).nonzero[0]) == {s.name for s in hf.specs(tiny.OPT_350M)[0].slots}


def test_bfloat16_zeros_are_counted() -> None:
    model = tiny.random_model(tiny.GQA)
    blocks = jax.tree.map(lambda x: x.astype("bfloat16"), model.blocks)
    assert measure_size(model._replace(blocks=blocks)).nonzero[0]["q"] == np.count_nonzero(
        np.asarray(blocks[0].q.w, np.float32)
    )


def test_peak_memory_of_the_host_is_what_the_kernel_reports() -> None:
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc, which Linux alone has")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(())["host"] == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_peak_memory_is_that_of_the_fullest_device() -> None:
    """None where no device says, as CPUs do not."""

    class Device:
        def __init__(self, stats: dict[str, int] | None):
            self.stats = stats

        def memory_stats(self) -> dict[str, int] | None:
            return self.stats

    devices = [
        Device({"peak_bytes_in_use": 3}),
        Device({"peak_bytes_in_use": 7}),
        Device({"bytes_in_use": 9}),
        Device(None),
    ]
    assert peak_memory(devices)["device"] == 7
    assert peak_memory(devices[2:])["device"] is None is peak_memory(jax.devices())["device"]
