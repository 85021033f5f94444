"""The plan of a run has its programs, as often as the run calls them, and at least its memory."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model
from models.programs import Program, Recorder, record_programs
from models.sharding import make_mesh
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Method, Request
from reference.small import model, tokens

pytestmark = pytest.mark.slow

# Method, allocation and refinement of each run. SLEB's official search tries every candidate to the
# end; the corrected one stops early, and its plan is the most it may do.
RUNS = [
    ("magnitude", {}, "uniform", {}, "none"),
    ("wanda", {}, "uniform", {}, "none"),
    ("multiflow", {}, "uniform", {}, "none"),
    ("sparsegpt", {}, "uniform", {}, "none"),
    ("admm", {}, "uniform", {}, "none"),
    ("admm", {"targets": "own"}, "uniform", {}, "none"),
    ("sparsellm", {}, "uniform", {}, "none"),
    ("sparsellm", {"variant": "official"}, "uniform", {}, "none"),
    ("llmrank", {}, "uniform", {}, "none"),
    ("llmrank", {"units": "rows"}, "uniform", {}, "none"),
    ("llmrank", {"repair": "refit"}, "uniform", {}, "none"),
    ("flap", {}, "uniform", {}, "none"),
    ("flap", {"structure": "UL-UM", "variant": "official"}, "uniform", {}, "none"),
    ("flap", {}, "evopress", {"generations": 2, "offspring": 4, "samples": 4}, "none"),
    ("wanda_sp", {}, "uniform", {}, "none"),
    ("magnitude_sp", {}, "uniform", {}, "none"),
    ("sleb", {"blocks": 2, "latter_barrier": 0, "variant": "official"}, "uniform", {}, "none"),
    ("sleb", {"blocks": 1, "search": "influence"}, "uniform", {}, "none"),
    ("sleb", {"blocks": 1, "search": "similarity"}, "uniform", {}, "none"),
    (
        "sleb",
        {
            "blocks": 1,
            "latter_barrier": 0,
            "variant": "official",
            "repair": "refit",
            "finalists": 2,
        },
        "uniform",
        {},
        "none",
    ),
    ("sleb", {"remove": (1,), "repair": "flatten"}, "uniform", {}, "none"),
    ("sleb", {"remove": (1,), "repair": "scale"}, "uniform", {}, "none"),
    ("sleb", {"remove": (0, 2), "repair": "scale+refit"}, "uniform", {}, "none"),
    ("ria", {}, "uniform", {}, "none"),
    ("wanda", {}, "owl", {}, "none"),
    ("wanda", {}, "dlp", {}, "none"),
    ("wanda", {}, "lsa", {}, "none"),
    ("wanda", {}, "atp", {"trials": 2, "samples": 2}, "none"),
    ("sparsegpt", {}, "evopress", {"generations": 2, "offspring": 4, "samples": 4}, "none"),
    ("wanda", {}, "alpha", {}, "none"),
    ("wanda", {}, "neuroal", {"step": "row"}, "none"),
    ("wanda", {}, "neuroal", {"variant": "official"}, "none"),
    ("sparsegpt", {}, "owl", {}, "none"),
    ("sparsegpt", {}, "uniform", {}, "dsnot"),
]
# What JAX compiles outside programs: single operations on small arrays, no matrix product.
SMALL = {
    "_identity_fn",
    "_multi_slice",
    "_threefry_fold_in",
    "_threefry_seed",
    "_uniform",
    "broadcast_in_dim",
    "convert_element_type",
    "dynamic_slice",
    "stage",
    "squeeze",
}


class Measured(Recorder):
    """Counts calls, and the most bytes of arrays alive around one beside those before the run."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.most = alive(), 0

    def call(self, program: Program, name: str, args: Sequence[Any]) -> Any:
        result = super().call(program, name, args)
        self.most = max(self.most, alive() - self.before)
        return result


def alive() -> int:
    """Return the bytes of all arrays that are alive."""
    return sum(x.nbytes for x in jax.live_arrays())


def names(run: tuple) -> str:
    method, arguments, allocation, options, refine = run
    parts = (method, *arguments.values(), allocation, *options.values(), refine)
    return "-".join(str(part) for part in parts if part not in ("uniform", "none"))


def request(allocation: str, options: dict, refine: str) -> Request:
    """Return the request at half of the weights; the sparsity of "uniform" needs no allocator."""
    allocator = None if allocation == "uniform" else ALLOCATIONS[allocation](**options)
    return Request(0.5, None, allocator, REFINEMENTS[refine]())


def record(recorder: Recorder, m: Model, method: Method, asked: Request, runtime: Runtime) -> None:
    with record_programs(recorder):
        method.run(m, tokens(), asked, runtime, lambda i, block: None)


@contextlib.contextmanager
def compiled_functions() -> Iterator[set[str]]:
    """Collect the names of all functions that JAX compiles."""
    seen: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, log: logging.LogRecord) -> None:
            for name in re.findall(r"^Compiling (?:jit\()?([\w<>]+)", log.getMessage()):
                seen.add(name)

    handler, logger = Handler(), logging.getLogger("jax._src.interpreters.pxla")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield seen
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@pytest.mark.parametrize("run", RUNS, ids=names)
def test_the_plan_has_the_calls_and_the_memory_of_the_run(run: tuple) -> None:
    name, arguments, allocation, options, refine = run
    m, method = model("llama"), METHODS[name](**arguments)
    # Blocks of the host, which take memory of the device once they are there, as in the plan.
    m = m._replace(blocks=jax.tree.map(np.asarray, m.blocks))
    asked, mesh = request(allocation, options, refine), make_mesh("data=1")
    runtime = Runtime(batch=4, mesh=mesh)
    counted = Measured()
    jax.clear_caches()  # so that everything the run needs is compiled, and logged
    with compiled_functions() as compiled:
        record(counted, m, method, asked, runtime)
    planned = Recorder(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), m.blocks)
    record(planned, m._replace(blocks=shapes), method, asked, runtime)
    assert calls(counted) == calls(planned)
    assert compiled - SMALL - counted.functions == set(), "work outside the programs of the plan"
    assert 0 < counted.most <= planned.peak["device"]


def calls(recorder: Recorder) -> Counter:
    """Return how often each program is called, whatever the shapes."""
    count: Counter = Counter()
    for cost in recorder.costs:
        count[cost.name] += cost.calls
    return count


def test_the_plan_of_a_search_that_stops_early_is_the_most_it_may_do() -> None:
    m, mesh = model("llama"), make_mesh("data=1")
    runtime = Runtime(batch=2, mesh=mesh)
    method = METHODS["sleb"](blocks=2, early_barrier=0, latter_barrier=0)
    counted, planned = Recorder(), Recorder(mesh)
    record(counted, m, method, Request(0.5), runtime)
    record(planned, m, method, Request(0.5), runtime)
    run, plan = calls(counted), calls(planned)
    assert run.keys() == plan.keys()
    assert all(run[name] <= plan[name] for name in run)


def test_the_plan_counts_what_stays_on_the_device() -> None:
    """SLEB holds the whole model and a store of hidden states."""
    m, mesh = model("llama"), make_mesh("data=1")
    planned = Recorder(mesh)
    method = METHODS["sleb"](blocks=1)
    record(planned, m, method, Request(0.5), Runtime(batch=2, mesh=mesh))
    parameters = sum(x.nbytes for x in jax.tree.leaves((m.non_block, m.blocks)))
    states = tokens().size * m.blocks[0].q.w.shape[1] * 4
    stored = (len(m.blocks) - 1) * states
    assert planned.peak["device"] > parameters + stored
    assert np.isfinite(planned.peak["device"])
