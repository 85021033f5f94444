"""Programs run as plain jit does, are counted, and are planned from shapes alone."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.costs import flops
from models.programs import DeviceArray, Recorder, planner, program, record_programs
from models.sharding import make_mesh, to_host

BYTES = 4  # of a float32


@program("twice", static=(0,))
def scaled(factor: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return factor * x + y."""
    return factor * x + y


@program("sum grown", donated=(0,))
def grown(total: jax.Array, x: jax.Array) -> jax.Array:
    """Return total + x."""
    return total + x


def test_a_program_without_a_recorder_is_a_compiled_function() -> None:
    np.testing.assert_array_equal(scaled(2, jnp.arange(3.0), jnp.ones(3)), [1.0, 3.0, 5.0])
    assert planner() is None


def test_a_recorder_without_a_mesh_counts_calls_and_runs_them() -> None:
    with record_programs(Recorder()) as recorder:
        assert planner() is None
        for _ in range(3):
            result = scaled(2, jnp.arange(3.0), jnp.ones(3))
        scaled(2, jnp.arange(4.0), jnp.ones(4), name="wider")
    np.testing.assert_array_equal(result, [1.0, 3.0, 5.0])
    assert [(c.name, c.calls) for c in recorder.costs] == [("twice", 3), ("wider", 1)]


def test_a_planned_result_is_placed_as_the_compiler_says() -> None:
    mesh = make_mesh("data=4")
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with record_programs(Recorder(mesh)) as recorder:
        x = recorder.place(jax.ShapeDtypeStruct((8, 2), jnp.float32), rows)
        out = scaled(2, x, np.ones((8, 2), np.float32))
    assert isinstance(out, DeviceArray) and out.shape == (8, 2)
    assert out.sharding.is_equivalent_to(rows, 2)
    (cost,) = recorder.costs
    assert cost.calls == 1 and cost.memory >= 2 * 2 * 2 * BYTES and not cost.collectives


def test_planned_arrays_take_memory_while_they_are_referenced() -> None:
    with record_programs(Recorder(make_mesh("data=2"))) as recorder:
        a = recorder.place(np.zeros((6, 2), np.float32))
        b = recorder.place(np.zeros((4,), np.float32))
        assert recorder.alive["device"] == 16 * BYTES
        del a
        gc.collect()
        assert recorder.alive["device"] == 4 * BYTES
        assert recorder.peak["device"] == 16 * BYTES
        recorder.keep_off(b, "host")
    assert recorder.peak["host"] == 4 * BYTES


def test_a_donated_argument_gives_its_memory_to_the_result() -> None:
    with record_programs(Recorder(make_mesh("data=1"))) as recorder:
        total, x = (recorder.place(np.zeros((1000,), np.float32)) for _ in range(2))
        for _ in range(3):
            total = grown(total, x)
        assert recorder.alive["device"] == 2000 * BYTES
    assert recorder.peak["device"] == 2000 * BYTES


def test_equal_shapes_are_compiled_once() -> None:
    mesh = make_mesh("data=2")
    with record_programs(Recorder(mesh)) as recorder:
        total, x = (recorder.place(np.zeros((6,), np.float32)) for _ in range(2))
        for _ in range(5):
            total = grown(total, x)
    assert [(c.name, c.calls) for c in recorder.costs] == [("sum grown", 5)]


def test_the_host_gets_rising_numbers_that_fall_from_time_to_time() -> None:
    """Distinct values keep selections apart; falling ones let no search stop early."""
    with record_programs(Recorder(make_mesh("data=1"))) as recorder:
        x = recorder.place(np.zeros((5,), np.float32))
        first, second = to_host(x), to_host(x)
    assert np.all(np.diff(first) > 0) and np.all(second < first)
    assert 0.99 < first[0] < 2 and bool(x)


def test_loops_are_counted() -> None:
    def looped(x: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    assert flops(jax.make_jaxpr(looped)(jnp.ones((8, 8))).jaxpr) == 5 * 2 * 8**3 + 2 * 8**3
