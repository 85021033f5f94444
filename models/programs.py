"""Compiled functions that can be costed from shapes as well as run.

A `Program` is a `jax.jit` function with a name. Called normally, it runs. Under a `Recorder` that
plans, the same call compiles the program for its arguments' shapes, notes what the compiler says,
and returns `DeviceArray` shapes instead of arrays. A method therefore describes its work only once:
the plan of a run is the run's own code, followed on shapes.
"""

import contextlib
import contextvars
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


Place = Literal["device", "host", "disk"]  # where a planned array lies
PLACES: tuple[Place, ...] = get_args(Place)


class Cost(NamedTuple):
    """Cost of one program for one set of shapes.

    Attributes:
      name: Name for people.
      calls: Calls in the whole run.
      flops: Floating-point operations of one call's matrix products, all devices together.
      bytes: Bytes that one call moves on one device, as XLA counts them (loops once).
      memory: Bytes of one device that one call takes, arguments and results included.
      peak: Bytes alive on one device while the program runs, at the worst of its calls.
      collectives: Number of collective operations in the program's text, by kind.
      seconds: Seconds to compile.
      failed: Reason why the program could not be compiled; empty if it could.
    """

    name: str
    calls: int
    flops: float
    bytes: float = 0.0
    memory: int = 0
    peak: int = 0
    collectives: Mapping[str, int] = {}
    seconds: float = 0.0
    failed: str = ""


class _Memory:
    """Bytes that a planned array takes; given back when the object goes."""

    def __init__(self, recorder: "Recorder", place: Place, size: int) -> None:
        self._recorder, self.place, self._size = recorder, place, size
        recorder.add(place, size)

    def __del__(self) -> None:
        self.free()

    def free(self) -> None:
        """Give the bytes back."""
        self._recorder.add(self.place, -self._size)
        self._size = 0


class DeviceArray(jax.ShapeDtypeStruct):
    """Shape of an array in a planned run, on the devices or kept off them.

    The recorder counts its bytes for as long as it is referenced. Host code that asks for its
    values gets numbers rising from 1 to 2: enough for decisions that do not change the work.
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
        return np.asarray(rising, dtype or self.dtype)

    def __float__(self) -> float:
        return 1.0

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> "DeviceArray":
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._recorder.place(jax.ShapeDtypeStruct(self.shape[1:], self.dtype))


class Recorder:
    """Record of the programs that run while it is active.

    Args:
      mesh: Devices to plan for. None: programs run as usual and only their calls are counted.
      memory: Bytes of one device and of the host that the planned run has, by "device" and "host";
        empty: those of this machine.
    """

    def __init__(self, mesh: Mesh | None = None, memory: Mapping[str, int] | None = None) -> None:
        self.memory = memory or {}
        # Bytes that planned arrays take now: of one device, of the host, in files.
        self.alive: dict[Place, int] = dict.fromkeys(PLACES, 0)
        # The most of them at once; on the device with the memory of the program at work.
        self.peak: dict[Place, int] = dict.fromkeys(PLACES, 0)
        self._replicated = NamedSharding(mesh, PartitionSpec()) if mesh else None
        self._costs: dict[Any, Cost] = {}
        self._compiled: dict[Any, _Compiled] = {}

    @property
    def plans(self) -> bool:
        """Whether programs are compiled instead of run."""
        return self._replicated is not None

    @property
    def costs(self) -> list[Cost]:
        """Every program by name and shapes, in the order of first calls."""
        return list(self._costs.values())

    def place(self, x: Any, sharding: Sharding | None = None) -> DeviceArray:
        """Return the planned array of x's shape; every device holds all of it by default."""
        assert self._replicated is not None
        return DeviceArray(self, np.shape(x), x.dtype, sharding or self._replicated)

    def keep_off(self, x: DeviceArray, place: Place) -> DeviceArray:
        """Return a planned array of x's shape in host memory or in a file."""
        return DeviceArray(self, x.shape, x.dtype, None, place)

    def add(self, place: Place, size: int) -> None:
        """Count bytes that a planned array takes, or gives back."""
        self.alive[place] += size
        self.peak[place] = max(self.peak[place], self.alive[place])

    def _shape(self, x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        dtype = jax.dtypes.canonicalize_dtype(np.result_type(x))
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
        shapes = tuple((np.shape(x), str(np.result_type(x)), _spec(x)) for x in leaves)
        key = (program, name, fixed, structure, shapes)
        if not self.plans:
            cost = self._costs.get(key) or Cost(name, 0, 0.0)
            self._costs[key] = cost._replace(calls=cost.calls + 1)
            return program.jitted(*args)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = _compile(program, args, self._shape)
        known = self._costs.get(key) or compiled.cost._replace(name=name)
        own = compiled.cost.memory - compiled.argument_bytes
        peak = self.alive["device"] + own
        self._costs[key] = known._replace(calls=known.calls + 1, peak=max(known.peak, peak))
        self.peak["device"] = max(self.peak["device"], peak)
        for k in program.donated:
            for x in jax.tree.leaves(args[k]):
                if isinstance(x, DeviceArray):
                    x.delete()
        return jax.tree.map(lambda s: self.place(s, s.sharding), compiled.result)


class _Compiled(NamedTuple):
    """A compiled program: its cost, bytes of arguments on one device, and result shapes."""

    cost: Cost
    argument_bytes: int
    result: Any


def _spec(x: Any) -> str:
    """Return a text that is equal for equal placements of an array."""
    sharding = getattr(x, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return ""
    axes = list(getattr(sharding, "spec", (sharding,)))
    while axes and axes[-1] is None:
        axes.pop()
    return str(axes)


def _compile(program: "Program", args: Sequence[Any], shape: Callable[[Any], Any]) -> _Compiled:
    """Compile a program for the shapes of its arguments and read off its cost."""
    shapes = [a if k in program.static else jax.tree.map(shape, a) for k, a in enumerate(args)]
    traced = program.jitted.trace(*shapes)
    work = flops(traced.jaxpr.jaxpr)
    lowered, begin = traced.lower(), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        seconds = time.perf_counter() - begin
        cost = Cost("", 0, work, seconds=seconds, failed="does not fit")
        return _Compiled(cost, 0, jax.tree.map(shape, lowered.out_info))
    seconds = time.perf_counter() - begin
    sizes, told = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )
    collectives = dict(Counter(COLLECTIVE.findall(compiled.as_text())))
    moved = told.get("bytes accessed", 0.0)
    cost = Cost("", 0, work, moved, memory, 0, collectives, seconds)
    result = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return _Compiled(cost, sizes.argument_size_in_bytes, result)


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


def _dims(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def flops(jaxpr: core.Jaxpr) -> float:
    """Count the floating-point operations of a program's matrix products.

    Args:
      jaxpr: The traced program. Loops of unknown length count once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        shapes = [_dims(v) for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            products = math.prod(_dims(eqn.outvars[0]))
            total += 2.0 * products * math.prod(shapes[0][i] for i in contracted)
        inner = [flops(j) for j in core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total
