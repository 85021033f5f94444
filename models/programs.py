"""Compiled functions that can be costed from shapes as well as run.

A `Program` is a `jax.jit` function with a name. Called normally, it runs. Under a `Recorder` that
plans, the same call compiles the program for its arguments' shapes, notes what the compiler says,
and returns `DeviceArray` shapes instead of arrays. A method therefore describes its work only once:
the plan of a run is the run's own code, followed on shapes.
"""

import contextlib
import contextvars
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from models.costs import Compiled, Cost, compile_for, dtype_of, flops, placement_key

Place = Literal["device", "host", "disk"]  # where a planned array lies
PLACES: tuple[Place, ...] = get_args(Place)


class _Memory:
    """Bytes that a planned array takes; given back when the object goes."""

    def __init__(self, recorder: "Recorder", place: Place, size: int) -> None:
        self._recorder, self.place, self._size = recorder, place, size
        # Tied to this object, so that a plan frees memory where a run drops the last reference.
        recorder.add(place, size)

    def __del__(self) -> None:
        self.free()

    def free(self) -> None:
        """Give the bytes back."""
        self._recorder.add(self.place, -self._size)
        # A donated array is freed before it goes: its bytes must not be given back twice.
        self._size = 0


class DeviceArray(jax.ShapeDtypeStruct):
    """Shape of an array in a planned run, on the devices or kept off them.

    The recorder counts its bytes for as long as it is referenced. Host code that asks for its
    values gets numbers rising from 1 to 2, slightly lower each time: a search that stops early, or
    looks around its best trial, then does the most it can, so that a plan is an upper bound.
    """

    _recorder: "Recorder"
    _memory: _Memory

    def __init__(
        self,
        recorder: "Recorder",
        shape: Any,
        dtype: Any,
        sharding: Sharding | None,
        place: Place = "device",
    ) -> None:
        super().__init__(shape, dtype, sharding=sharding)
        # A device's share, as limits are those of one device.
        local = sharding.shard_shape(self.shape) if sharding else self.shape
        size = math.prod(local) * self.dtype.itemsize
        # The base class allows no other attributes once it is made.
        object.__setattr__(self, "_recorder", recorder)
        object.__setattr__(self, "_memory", _Memory(recorder, place, size))

    @property
    def place(self) -> Place:
        """Return where the array lies."""
        return self._memory.place

    def delete(self) -> None:
        """Free the memory, as donation to a program does."""
        self._memory.free()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        size = math.prod(self.shape)
        rising = 1 + np.arange(size, dtype=np.float32).reshape(self.shape) / max(size, 1)
        return np.asarray(rising * self._recorder.falling(), dtype or self.dtype)

    def __float__(self) -> float:
        return self._recorder.falling()

    def __bool__(self) -> bool:
        # As if all were finite: checks of planned statistics must let the run go on.
        return True


class Recorder:
    """Record of the programs that run while it is active.

    Args:
      mesh: Devices to plan for. None: programs run as usual and only their calls are counted.
      memory: Bytes of one device and of the host that the planned run has, by "device" and "host";
        empty: those of this machine.

    Attributes:
      values_read: Number of planned arrays whose values host code has asked for.
    """

    def __init__(self, mesh: Mesh | None = None, memory: Mapping[str, int] | None = None) -> None:
        self.memory = memory or {}
        # Bytes that planned arrays take now: of one device, of the host, in files.
        self.alive: dict[Place, int] = dict.fromkeys(PLACES, 0)
        # The most of them at once; on the device with the memory of the program at work.
        self.peak: dict[Place, int] = dict.fromkeys(PLACES, 0)
        self.values_read = 0
        self._devices = set(mesh.devices.flat) if mesh else set()
        self._replicated = NamedSharding(mesh, PartitionSpec()) if mesh else None
        self._costs: dict[Any, Cost] = {}
        self._compiled: dict[Any, Compiled] = {}

    @property
    def plans(self) -> bool:
        """Return True if programs are compiled instead of run."""
        return self._replicated is not None

    @property
    def costs(self) -> list[Cost]:
        """Every program by name and shapes, in the order of first calls."""
        return list(self._costs.values())

    @property
    def functions(self) -> set[str]:
        """Names of the functions behind the programs, as JAX logs them."""
        return {key[0].__name__ for key in self._costs}

    def place(self, x: Any, sharding: Sharding | None = None) -> DeviceArray:
        """Return the planned array of x's shape; every device holds all of it by default."""
        assert self._replicated is not None
        return DeviceArray(self, np.shape(x), x.dtype, sharding or self._replicated)

    def _place_result(self, result: jax.ShapeDtypeStruct) -> DeviceArray:
        """Place a result as the compiler did.

        A program that reads none of its arguments, such as one that makes zeros, is compiled for
        one device; its results move to where they are used.
        """
        sharding = result.sharding
        on_mesh = sharding is not None and sharding.device_set == self._devices
        return self.place(result, sharding if on_mesh else None)

    def keep_off(self, x: DeviceArray, place: Place) -> DeviceArray:
        """Return a planned array of x's shape in host memory or in a file."""
        return DeviceArray(self, x.shape, x.dtype, None, place)

    def falling(self) -> float:
        """Return a factor just below the one of the call before."""
        self.values_read += 1
        # A step of 1e-6 survives float32 (1e-7) and stays far below the range 1 to 2.
        return 1 / (1 + 1e-6 * self.values_read)

    def add(self, place: Place, size: int) -> None:
        """Count bytes that a planned array takes, or gives back."""
        self.alive[place] += size
        self.peak[place] = max(self.peak[place], self.alive[place])

    def _shape(self, x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        # As `jit` does: the host's float64 and int64 have 32 bits on a device.
        dtype = jax.dtypes.canonicalize_dtype(dtype_of(x))
        return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=sharding or self._replicated)

    def call(self, program: "Program", name: str, args: Sequence[Any]) -> Any:
        """Run or plan one call of a program.

        Args:
          program: The program.
          name: Name of this call for people.
          args: Positional arguments, static ones included.

        Returns:
          Result of the function: arrays, or planned arrays in their place.
        """
        dynamic = [a for k, a in enumerate(args) if k not in program.static]
        leaves, structure = jax.tree.flatten(dynamic)
        fixed = tuple(args[k] for k in program.static)
        # With placements: arrays of one shape that are split otherwise make another program.
        shapes = tuple((np.shape(x), str(dtype_of(x)), placement_key(x)) for x in leaves)
        key = (program, name, fixed, structure, shapes)
        if not self.plans:
            cost = self._costs.get(key) or Cost(name, 0, 0.0)
            self._costs[key] = cost._replace(calls=cost.calls + 1)
            return program.jitted(*args)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = compile_for(
                program.jitted, program.static, args, self._shape
            )
        known = self._costs.get(key) or compiled.cost._replace(name=name)
        # Arguments are planned arrays, which are counted as alive already.
        own = compiled.cost.memory - compiled.argument_bytes
        peak = self.alive["device"] + own
        self._costs[key] = known._replace(calls=known.calls + 1, peak=max(known.peak, peak))
        self.peak["device"] = max(self.peak["device"], peak)
        # The results have taken this memory: the compiler's figure counts the two once.
        for k in program.donated:
            for x in jax.tree.leaves(args[k]):
                if isinstance(x, DeviceArray):
                    x.delete()
        return jax.tree.map(self._place_result, compiled.result)


class ShapeRecorder(Recorder):
    """Recorder that follows programs on shapes alone: nothing is compiled.

    Args:
      mesh: Devices to plan for.

    Attributes:
      flops: Floating-point operations of all matrix products so far.
    """

    def __init__(self, mesh: Mesh) -> None:
        # Room enough that no method takes a path for a smaller machine.
        super().__init__(mesh, {"device": 0, "host": sys.maxsize})
        self._traced: dict[Any, tuple[Any, float]] = {}
        self.flops = 0.0

    def call(self, program: "Program", name: str, args: Sequence[Any]) -> Any:
        """Follow one call of a program, as `Recorder.call` has it.

        Args:
          program: The program.
          name: Name of this call for people.
          args: Positional arguments, static ones included.

        Returns:
          Planned arrays in place of the function's result.
        """
        dynamic = [a for k, a in enumerate(args) if k not in program.static]
        leaves, structure = jax.tree.flatten(dynamic)
        fixed = tuple(args[k] for k in program.static)
        key = (program, fixed, structure, tuple((np.shape(x), str(dtype_of(x))) for x in leaves))
        if key not in self._traced:
            shapes = [
                a if k in program.static else jax.tree.map(self._shape, a)
                for k, a in enumerate(args)
            ]
            traced = program.jitted.trace(*shapes)
            self._traced[key] = traced.out_info, flops(traced.jaxpr.jaxpr)
        result, work = self._traced[key]
        self.flops += work
        return jax.tree.map(self.place, result)


_ACTIVE: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def record_programs(recorder: Recorder) -> Iterator[Recorder]:
    """Record, or plan, every program that is called inside the context.

    Args:
      recorder: Takes the record.
    """
    token = _ACTIVE.set(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.reset(token)


def planner() -> Recorder | None:
    """Return the active recorder if it plans, else None: arrays are real."""
    recorder = _ACTIVE.get()
    return recorder if recorder and recorder.plans else None


class Program:
    """A compiled function with a name, which a recorder can count or plan.

    Args:
      function: Pure function of positional arguments.
      name: Name for people; a call may give a more precise one.
      static: Positions of arguments that are part of the program.
      donated: Positions of arguments whose memory the results may take.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        static: tuple[int, ...] = (),
        donated: tuple[int, ...] = (),
    ) -> None:
        self.function, self.name, self.static, self.donated = function, name, static, donated
        self.jitted = jax.jit(function, static_argnums=static, donate_argnums=donated)
        self.__doc__ = function.__doc__
        self.__name__ = getattr(function, "__name__", name)
        self.__wrapped__ = function

    def __call__(self, *args: Any, name: str = "") -> Any:
        """Run, count or plan the function; `name` replaces the program's in the record."""
        recorder = _ACTIVE.get()
        if recorder is None:
            return self.jitted(*args)
        return recorder.call(self, name or self.name, args)


def program(
    name: str, static: tuple[int, ...] = (), donated: tuple[int, ...] = ()
) -> Callable[[Callable[..., Any]], Program]:
    """Return the decorator that makes a pure function a `Program`.

    Args:
      name: Name for people.
      static: Positions of arguments that are part of the program.
      donated: Positions of arguments whose memory the results may take.
    """
    return lambda function: Program(function, name, static, donated)
