"""SLEB over a model: whole blocks (or their two halves) leave, one after the other, each time the one that is missed least."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from calibration.states import OFFLOADS
from models.arch import Arch, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.structured.sleb_figures import search_figures
from pruning.structured.sleb_runner import (
    Candidate,
    Path,
    Runner,
    Trial,
    Unit,
    silenced,
    try_all,
    without,
)
from pruning.types import SAME_SHAPES, BlockSink, Outcome, Request, reject_weight_settings

Kind = Literal["blocks", "sublayers"]
Search = Literal["greedy", "perplexity", "influence"]
GIB = 1 << 30


def _writers(arch: Arch) -> tuple[str, ...]:
    """The linears of a block that write to the residual stream."""
    return tuple(s.name for s in arch.slots if s.feeds == "next")


def _part(arch: Arch, writer: str) -> tuple[str, ...]:
    """The linears that nothing but `writer` is there for, itself last: slots stand in their order, so those since the writer before."""
    names = [s.name for s in arch.slots]
    start = max(
        (names.index(w) + 1 for w in _writers(arch) if names.index(w) < names.index(writer)),
        default=0,
    )
    return tuple(names[start : names.index(writer) + 1])


def _units(arch: Arch, blocks: int, kind: Kind) -> list[Unit]:
    """All units of a model in the order of its forward pass: their indices are what reports speak of."""
    every = _writers(arch)
    parts = [every] if kind == "blocks" else [(w,) for w in every]
    return [Unit(i, part) for i in range(blocks) for part in parts]


class Trace(NamedTuple):
    """A search's result: the path that is left, the units removed in order, each phase's trials and the order they were made in, the
    influences it knew, and by phase what was run and what the plain search would have run (blocks times windows)."""

    path: Path
    removed: list[int]
    phases: list[dict[int, Trial]]
    influence: dict[int, float]
    evaluations: list[int]
    plain: list[int]


def _lowest(values: Mapping[int, float | None], n: int, what: str) -> list[int]:
    """The n units of lowest finite value, the earliest of a tie; InputError if there are not so many."""
    finite = sorted((v, u) for u, v in values.items() if v is not None and np.isfinite(v))
    if len(finite) < n:
        raise InputError(
            f"{what} is finite without {len(finite)} of {len(values)} candidates, {n} must go: try --dtype=float32 or other calibration"
        )
    return [u for _, u in finite[:n]]


def _after(path: Path, gone: Sequence[Unit], writers: tuple[str, ...]) -> Path:
    for unit in gone:
        path = without(path, unit, writers).path
    return path


def _influences(
    runner: Runner, path: Path, units: Mapping[int, Unit], batches: Sequence[int], runtime: Runtime
) -> dict[int, float]:
    """Each unit's influence over these micro-batches, the mean over their windows."""
    advance, found = runtime.progress("measuring influence", len(batches)), []
    for m in batches:
        found.append(runner.influences(m, path, units, _writers(runner.arch)))
        advance()
    sizes = [runner.sizes[m] for m in batches]
    return {u: float(np.average([f[u] for f in found], weights=sizes)) for u in units}


def _phase(
    runner: Runner,
    candidates: Mapping[int, Candidate],
    best: int,
    stop: bool,
    advance: Callable[[], None],
    runtime: Runtime,
) -> tuple[dict[int, Trial], int]:
    """`try_all` as a durable step: the trials, and what was run for them."""

    def compute() -> Any:
        before = runner.evaluations
        trials = try_all(runner, candidates, best, stop, advance)
        return [[u, *t] for u, t in trials.items()], runner.evaluations - before

    paths = tuple((u, candidate.path) for u, candidate in candidates.items())
    trials, run = runtime.step(compute, ("losses", runner.digest, paths, best, stop))
    return {u: Trial(*t) for u, *t in trials}, run


def _search(
    runner: Runner, units: Mapping[int, Unit], n: int, rounds: int, stop: bool, runtime: Runtime
) -> Trace:
    """Remove `n` of the units in `rounds` phases of trials: as many as go (greedy), one, or none, which leaves it to their influence."""
    writers, order = _writers(runner.arch), list(units)
    path: Path = tuple((i, ()) for i in range(runner.depth))
    influence: dict[int, float] = {}
    if not n:
        return Trace(path, [], [], {}, [], [])
    if stop or not rounds:  # the first micro-batch is enough to put candidates in an order
        seen = range(len(runner.sizes) if not rounds else 1)
        key = ("influences", runner.digest, tuple(units.items()), seen)
        found = runtime.step(lambda: _influences(runner, path, units, seen, runtime), key)
        influence = {int(u): x for u, x in found.items()}
        order = sorted(order, key=lambda u: (influence[u], u))
    if not rounds:
        removed = _lowest(influence, n, "the influence")
        return Trace(
            _after(path, [units[u] for u in removed], writers),
            removed,
            [],
            influence,
            [runner.evaluations],
            [runner.evaluations],
        )
    advance = runtime.progress("trying removals", sum(len(order) - p for p in range(rounds)))
    trace = Trace(path, [], [], influence, [], [])
    for _ in range(rounds):
        candidates = {u: without(path, units[u], writers) for u in order}
        trials, run = _phase(runner, candidates, n // rounds, stop, advance, runtime)
        gone = _lowest({u: t.loss for u, t in trials.items()}, n // rounds, "the loss")
        for piece in [path[candidates[u].shared] for u in gone]:
            runner.forget(piece)
        path = _after(path, [units[u] for u in gone], writers)
        trace.phases.append(trials)
        trace.removed.extend(gone)
        trace.evaluations.append(run)
        trace.plain.append(sum(len(c.path) for c in candidates.values()) * sum(runner.sizes))
        order = [
            u
            for u in (sorted(order, key=lambda u: (trials[u].guess, u)) if stop else order)
            if u not in gone
        ]
    return trace._replace(path=path)


def _by_unit(
    phases: Sequence[Mapping[int, Trial]], field: str, units: int
) -> list[list[float | None]]:
    """A list a phase of a figure of each unit's trial, None where it has none."""
    return [
        [getattr(trials[u], field) if u in trials else None for u in range(units)]
        for trials in phases
    ]


def _details(runner: Runner, trace: Trace, units: Sequence[Unit], kind: Kind) -> dict[str, Any]:
    (shared, own), count = runner.stores, len(units)
    found: dict[str, Any] = {
        "removal_order": trace.removed,
        "losses": _by_unit(trace.phases, "loss", count),
        "stopped_at": _by_unit(trace.phases, "passed", count),
        "influence": [trace.influence.get(u) for u in range(count)],
        "block_evaluations": {
            "run": trace.evaluations,
            "plain_search": trace.plain,
        },  # blocks times windows, a phase
        "cache": {
            "surviving_every": shared.room.every,
            "candidates_every": own.room.every,
            "blocks_held": runner.held,
            **{
                f"{tier}_bytes": a + b
                for tier, a, b in zip(OFFLOADS, shared.most, own.most, strict=True)
            },
        },
    }
    if kind == "sublayers":
        found["removed_parts"] = [[units[u].block, units[u].writers[0]] for u in trace.removed]
    return found


def _warnings(trace: Trace) -> Iterator[str]:
    """Candidates that cannot be compared, and what is zero but still in the file."""
    for p, trials in enumerate(trace.phases, start=1):
        if lost := [str(u) for u, t in trials.items() if t.loss is None and t.passed is None]:
            yield f"phase {p}: the loss without {', '.join(sorted(lost, key=int))} is not finite, so it was not chosen"
    if halves := sum(bool(silent) for _, silent in trace.path):
        yield f"{halves} blocks have one part zeroed in place: the file holds its zeros"


def _finish(model: Model, path: Path, sink: BlockSink) -> None:
    """Hand over what is left, numbered anew; of a removed part every linear is zeroed, so that all of it counts as gone."""
    for new, (i, silent) in enumerate(path):
        sink(
            new, silenced(model.blocks[i], [name for w in silent for name in _part(model.arch, w)])
        )


def _candidates(
    arch: Arch, total: int, n: int, kind: Kind, early: int, latter: int
) -> dict[int, Unit]:
    """The units that the barriers leave to choose from; InputError if they are too few for `n`, or nothing would stay."""
    units = _units(arch, total, kind)
    inside = {u: unit for u, unit in enumerate(units) if early <= unit.block < total - latter}
    most = min(len(inside), len(units) - 1)
    if n > most:
        raise InputError(
            f"cannot remove {n} of {len(units)} {kind} with early_barrier={early} and latter_barrier={latter}: "
            f"ask for {max(most, 0)} or fewer"
        )
    return inside


def _room(device_gib: float, host_gib: float, disk_gib: float) -> list[int]:
    """Bytes by tier; InputError for negative ones."""
    if not min(device_gib, host_gib, disk_gib) >= 0:
        raise InputError(
            f"sleb: device_gib={device_gib}, host_gib={host_gib} and disk_gib={disk_gib} must not be negative"
        )
    return [int(gib * GIB) for gib in (device_gib, host_gib, disk_gib)]


def _rounds(search: Search, n: int) -> int:
    """Phases of trials until n units are gone."""
    return {"greedy": n, "perplexity": min(n, 1), "influence": 0}[search]


@dataclasses.dataclass(frozen=True)
class Sleb:
    """SLEB (Song et al. 2024, algorithm 1): remove the block whose absence costs the least loss, again and again.

    Losses are the authors' code's: the sum over windows of the mean cross-entropy times the window's
    length.

    Args:
      blocks: Units to remove; None: the request's sparsity is the fraction of them.
      early_barrier: Blocks at the start that must stay.
      latter_barrier: Blocks at the end that must stay.
      search: "greedy" is SLEB; "perplexity" takes the units of lowest loss after the first phase
        (Shortened LLaMA, Kim et al. 2024); "influence" those whose output is most like their input
        (ShortGPT, Men et al. 2024), without a loss.
      units: "blocks", or "sublayers", where a block's attention and feed-forward part are removed
        separately; a part removed alone is zeroed.
      device_gib: Room on the devices for hidden states between blocks, which saves running blocks
        again; no result depends on it.
      host_gib: Room on the host for those that do not fit there.
      disk_gib: Room in the temporary directory for those that fit on neither.
      variant: "corrected", the default, stops a candidate when a part of its loss (over part of the
        vocabulary, or of the windows) exceeds the lowest whole loss of its phase: the same order with
        less work (docs/methods/sleb.md). "official" computes every loss, as the authors' code does.
    """

    blocks: int | None = None
    early_barrier: int = 1
    latter_barrier: int = 1
    search: Search = "greedy"
    units: Kind = "blocks"
    device_gib: float = 2.0
    host_gib: float = 4.0
    disk_gib: float = 0.0
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        barriers = min(self.early_barrier, self.latter_barrier)
        if barriers < 0 or (self.blocks is not None and self.blocks < 0):
            raise InputError(
                f"sleb: blocks={self.blocks}, early_barrier={self.early_barrier} and "
                f"latter_barrier={self.latter_barrier} must not be negative"
            )
        _room(self.device_gib, self.host_gib, self.disk_gib)

    @property
    def shape_change(self) -> ShapeChange:
        """Return that the shapes of what stays do not change."""
        return SAME_SHAPES

    @property
    def sets_sparsity(self) -> bool:
        """Return whether `blocks` says how much to remove."""
        return self.blocks is not None

    def _choice(self, model: Model, request: Request) -> tuple[int, dict[int, Unit]]:
        """Return the number of units to remove, and the candidates by index."""
        total = len(model.blocks)
        n = self.blocks
        if n is None:
            n = round(request.sparsity * len(_units(model.arch, total, self.units)))
        candidates = _candidates(
            model.arch, total, n, self.units, self.early_barrier, self.latter_barrier
        )
        return n, candidates

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("sleb", request)
        if self.units == "sublayers" and not model.arch.residual:
            raise InputError(
                'sleb: units="sublayers" needs parts that only add to the residual stream; here a '
                "norm follows",
                'use units="blocks"',
            )
        self._choice(model, request)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        total = len(model.blocks)
        units = _units(model.arch, total, self.units)
        n, candidates = self._choice(model, request)
        asked = request.sparsity if self.blocks is None else n / len(units)
        room = _room(self.device_gib, self.host_gib, self.disk_gib)
        runner = Runner(model, tokens, runtime, room)
        rounds = _rounds(self.search, n)
        stop = self.variant == "corrected"
        trace = _search(runner, candidates, n, rounds, stop, runtime)
        _finish(model, trace.path, sink)
        slots = [slot.name for slot in model.arch.slots]
        details = _details(runner, trace, units, self.units)
        parts = details.get("removed_parts")
        return Outcome(
            asked=tuple(dict.fromkeys(slots, asked) for _ in range(total)),
            kept_blocks=tuple(i for i, _ in trace.path),
            details=details,
            warnings=tuple(_warnings(trace)),
            figures=search_figures(details["losses"], trace.removed, parts),
        )
