"""SLEB over a model: remove whole blocks, or their halves, one after the other."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from calibration.runtime import Runtime
from calibration.states import OFFLOADS
from models.arch import Arch, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.budget import all_shapes
from pruning.structured.sleb_figures import search_figures
from pruning.structured.sleb_paths import Path, Unit
from pruning.structured.sleb_runner import Runner, silenced
from pruning.structured.sleb_search import SearchResult, search_units, writers_of
from pruning.structured.sleb_trials import Trial
from pruning.types import BlockSink, Outcome, Request, reject_weight_settings

Kind = Literal["blocks", "sublayers"]
Search = Literal["greedy", "perplexity", "influence"]
GIB = 1 << 30


def _sublayer(arch: Arch, writer: str) -> tuple[str, ...]:
    """Return the linears that serve only `writer`, itself last.

    Slots stand in the order of the forward pass, so these are the ones after the writer before.
    """
    names = [s.name for s in arch.slots]
    end = names.index(writer) + 1
    start = 0
    for other in writers_of(arch):
        after = names.index(other) + 1
        if after < end:
            start = max(start, after)
    return tuple(names[start:end])


def _units(arch: Arch, blocks: int, kind: Kind) -> list[Unit]:
    """Return all units in the order of the forward pass; reports name them by index."""
    writers = writers_of(arch)
    attention = arch.group("heads").reader.name
    # All experts of a block are one part.
    feed_forward = tuple(w for w in writers if w != attention)
    parts = [writers] if kind == "blocks" else [(attention,), feed_forward]
    return [Unit(i, part) for i in range(blocks) for part in parts]


def _by_unit(
    phases: Sequence[Mapping[int, Trial]],
    field: Literal["loss", "stopped_at"],
    units: int,
) -> list[list[float | None]]:
    """Return a figure of each unit's trial, by phase; None where a unit was not tried."""
    rows = []
    for trials in phases:
        rows.append([getattr(trials[u], field) if u in trials else None for u in range(units)])
    return rows


def _details(
    runner: Runner, result: SearchResult, units: Sequence[Unit], kind: Kind
) -> dict[str, Any]:
    """Return the figures of a search for the report."""
    count = len(units)
    cache: dict[str, Any] = {
        "surviving_every": runner.shared.limits.every,
        "candidates_every": runner.own.limits.every,
        "blocks_held": runner.blocks_held,
    }
    for memory, shared, own in zip(OFFLOADS, runner.shared.most, runner.own.most, strict=True):
        cache[f"{memory}_bytes"] = shared + own
    details = {
        "removal_order": result.removed,
        "losses": _by_unit(result.phases, "loss", count),
        "stopped_at": _by_unit(result.phases, "stopped_at", count),
        "influence": [result.influence.get(u) for u in range(count)],
        "block_evaluations": {
            "run": result.evaluations,
            "plain_search": result.plain_evaluations,
        },
        "cache": cache,
    }
    if kind == "sublayers":
        removed = [units[u] for u in result.removed]
        details["removed_parts"] = [[unit.block, unit.writers[0]] for unit in removed]
    return details


def _warnings(result: SearchResult) -> Iterator[str]:
    """Yield the candidates without a finite loss, and the zeros that stay in the file."""
    for p, trials in enumerate(result.phases, start=1):
        lost = sorted(u for u, t in trials.items() if t.loss is None and t.stopped_at is None)
        if lost:
            names = ", ".join(map(str, lost))
            yield f"phase {p}: the loss without {names} is not finite, so it was not chosen"
    halves = sum(bool(piece.silent) for piece in result.path)
    if halves:
        yield f"{halves} blocks have one part zeroed in place: the file holds its zeros"


def _write_blocks(model: Model, path: Path, sink: BlockSink) -> None:
    """Hand the pieces that stay to the sink.

    Of a removed sublayer every linear is zeroed, so that all of it counts as removed.
    """
    for new, piece in enumerate(path):
        # A block that lost all its parts is not in the path at all.
        names = [name for w in piece.silent for name in _sublayer(model.arch, w)]
        sink(new, silenced(model.blocks[piece.block], names))


def _rounds(search: Search, n: int) -> int:
    """Return the number of phases of trials that remove n units."""
    return {"greedy": n, "perplexity": min(n, 1), "influence": 0}[search]


@dataclasses.dataclass(frozen=True)
class Sleb:
    """SLEB (Song et al. 2024, algorithm 1): remove the block that is missed least, repeatedly.

    Losses are those of the official code: the sum over windows of the mean cross-entropy times the
    window's length.

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
        vocabulary, or of the windows) exceeds the lowest whole loss of its phase: the same order
        with less work (docs/methods/sleb.md). "official" computes every loss, as the authors' code
        does.
    """

    blocks: int | None = None
    early_barrier: int = 1  # both barriers as in the official code
    latter_barrier: int = 1
    search: Search = "greedy"
    units: Kind = "blocks"
    device_gib: float = 2.0
    host_gib: float = 4.0
    disk_gib: float = 0.0
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        numbers = {
            "blocks": self.blocks or 0,
            "early_barrier": self.early_barrier,
            "latter_barrier": self.latter_barrier,
            "device_gib": self.device_gib,
            "host_gib": self.host_gib,
            "disk_gib": self.disk_gib,
        }
        for field, value in numbers.items():
            if not value >= 0:  # so that NaN is refused too
                raise InputError(
                    "of sleb must not be negative", "give 0 or more", field=field, value=value
                )

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that blocks are left out, and the shapes of what stays do not change."""
        return ShapeChange(shallower=True)

    @property
    def sets_sparsity(self) -> bool:
        """Return whether `blocks` says how much to remove."""
        return self.blocks is not None

    @property
    def reads_activations(self) -> bool:
        """Return that losses and influence are those of the windows."""
        return True

    def _choice(self, model: Model, request: Request) -> tuple[int, dict[int, Unit]]:
        """Return the number of units to remove, and the candidates by index."""
        total = len(model.blocks)
        units = _units(model.arch, total, self.units)
        n = self.blocks
        if n is None:
            n = round(request.sparsity * len(units))
        last = total - self.latter_barrier
        candidates = {
            u: unit for u, unit in enumerate(units) if self.early_barrier <= unit.block < last
        }
        most = max(min(len(candidates), len(units) - 1), 0)  # something must stay
        if n > most:
            raise InputError(
                f"cannot remove {n} of {len(units)} {self.units} with "
                f"early_barrier={self.early_barrier} and latter_barrier={self.latter_barrier}",
                f"ask for {most} or fewer",
            )
        return n, candidates

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("sleb", request)
        if self.units == "sublayers" and not model.arch.residual:
            raise InputError(
                "of sleb needs parts that only add to the residual stream; here a norm follows",
                'give units="blocks"',
                field="units",
                value=self.units,
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
        # The report compares fractions, so a number of units becomes one.
        asked = request.sparsity if self.blocks is None else n / len(units)
        room = [int(gib * GIB) for gib in (self.device_gib, self.host_gib, self.disk_gib)]
        runner = Runner(model, tokens, runtime, room)
        rounds = _rounds(self.search, n)
        # Either way the same units go: a candidate that is stopped could not be the best.
        stop_early = self.variant == "corrected"
        result = search_units(runner, candidates, n, rounds, stop_early, runtime)
        _write_blocks(model, result.path, sink)
        shapes = all_shapes(model)
        details = _details(runner, result, units, self.units)
        parts = details.get("removed_parts")
        return Outcome(
            asked=tuple(dict.fromkeys(slots, asked) for slots in shapes),
            kept_blocks=tuple(piece.block for piece in result.path),
            details=details,
            warnings=tuple(_warnings(result)),
            figures=search_figures(details["losses"], result.removed, parts),
        )
