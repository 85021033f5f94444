"""SLEB over a model: remove whole blocks, or their halves, one after the other."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from calibration.runtime import Runtime
from models.arch import Arch, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.budget import all_shapes
from pruning.structured.depth_cuts import Remains
from pruning.structured.depth_repair import (
    Repair,
    check_repair,
    default_repair,
    repair_and_write,
)
from pruning.structured.sleb_evolution import search_by_evolution
from pruning.structured.sleb_figures import (
    merge_figures,
    search_details,
    search_figures,
    search_warnings,
)
from pruning.structured.sleb_finalists import Judge, repaired_loss
from pruning.structured.sleb_paths import Path, Piece, Unit
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_search import SearchResult, given_units, search_units, writers_of
from pruning.structured.sleb_similarity import search_by_similarity
from pruning.types import BlockSink, Outcome, Request, reject_weight_settings

Kind = Literal["blocks", "sublayers"]
Search = Literal["greedy", "perplexity", "influence", "similarity", "contiguous", "evolution"]
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


def _silent_linears(arch: Arch, path: Path) -> dict[Piece, tuple[str, ...]]:
    """Return the linears to zero in each piece.

    Of a removed sublayer every linear is zeroed, so that all of it counts as removed.
    """
    # A block that lost all its parts is not in the path at all.
    return {
        piece: tuple(name for w in piece.silent for name in _sublayer(arch, w)) for piece in path
    }


def _rounds(search: Search, n: int) -> int:
    """Return the number of phases of trials that remove n units."""
    return {"greedy": n, "influence": 0}.get(search, min(n, 1))


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
        (ShortGPT, Men et al. 2024), without a loss; "similarity" those whose input is most like
        that of the block before (FlattenGPT, Xu et al. 2026); "contiguous" the neighbours that are
        missed least together; "evolution" swaps units of the best set so far (EvoPress, Sieberling
        et al. 2025), by the divergence of predictions from the dense model's.
      remove: Units to remove, such as another run's `removal_order`; None: they are searched for.
        Barriers do not hold for them.
      repair: "none"; "scale" divides what is added behind each cut by the factor that the stream
        lacks (Prune&Comp, Chen et al. 2026); "refit" fits the last linear before each cut to the
        dense stream behind it; "scale+refit" does both; "flatten" merges what is removed into the
        block before the cut (FlattenGPT, Xu et al. 2026). None: "none" in the official variant;
        else "refit", or "scale" where norms follow the branches.
      finalists: Candidates of each phase, those of lowest loss, that are repaired and judged by the
        loss they then have; 0: the plain loss decides.
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
    remove: Sequence[int] | None = None
    repair: Repair | None = None
    finalists: int = 0
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
            "finalists": self.finalists,
            "device_gib": self.device_gib,
            "host_gib": self.host_gib,
            "disk_gib": self.disk_gib,
        }
        if self.remove is not None:
            # A tuple, because methods are compared and hashed by value.
            object.__setattr__(self, "remove", tuple(self.remove))
            self._check_remove(self.remove)
        for field, value in numbers.items():
            if not value >= 0:  # so that NaN is refused too
                raise InputError(
                    "of sleb must not be negative", "give 0 or more", field=field, value=value
                )

    def _check_remove(self, remove: Sequence[int]) -> None:
        """Raise InputError for units named together with a search, or twice."""
        searched = {"blocks": self.blocks, "search": self.search}
        for field, value in searched.items():
            if value not in (None, "greedy"):
                raise InputError(
                    "of sleb contradicts `remove`", "leave it out", field=field, value=value
                )
        if len(set(remove)) < len(remove):
            raise InputError(
                "of sleb names one twice", "name each once", field="remove", value=list(remove)
            )

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that blocks are left out, and the shapes of what stays do not change."""
        return ShapeChange(shallower=True)

    @property
    def sets_sparsity(self) -> bool:
        """Return whether `blocks` or `remove` says how much to remove."""
        return self.blocks is not None or self.remove is not None

    @property
    def reads_activations(self) -> bool:
        """Return whether a search or a repair reads the windows."""
        repair = self.repair or ("none" if self.variant == "official" else "refit")
        return self.remove is None or repair != "none"

    def _repair(self, arch: Arch) -> Repair:
        """Return the repair that is asked for, or the variant's."""
        if self.repair is not None:
            return self.repair
        return "none" if self.variant == "official" else default_repair(arch)

    def _choice(self, model: Model, request: Request) -> tuple[int, dict[int, Unit]]:
        """Return the number of units to remove, and the candidates by index."""
        total = len(model.blocks)
        units = _units(model.arch, total, self.units)
        if self.remove is not None:
            self._check_units(self.remove, len(units))
            return len(self.remove), dict(enumerate(units))
        n = self.blocks
        if n is None:
            n = round(request.sparsity * len(units))
        # The first block has none before it to be compared with.
        first = max(self.early_barrier, int(self.search == "similarity"))
        last = total - self.latter_barrier
        candidates = {u: unit for u, unit in enumerate(units) if first <= unit.block < last}
        most = max(min(len(candidates), len(units) - 1), 0)  # something must stay
        if n > most:
            raise InputError(
                f"cannot remove {n} of {len(units)} {self.units} with "
                f"early_barrier={self.early_barrier} and latter_barrier={self.latter_barrier}",
                f"ask for {most} or fewer",
            )
        return n, candidates

    def _check_units(self, remove: Sequence[int], count: int) -> None:
        """Raise InputError for units that the model does not have, or for all of them."""
        wrong = [u for u in remove if not 0 <= u < count]
        if wrong or len(remove) == count:
            what = f"{wrong[0]} is none of them" if wrong else "something must stay"
            raise InputError(
                f"of sleb must be some of the {count} {self.units}, and {what}",
                f"name some from 0 to {count - 1}",
                field="remove",
                value=list(remove),
            )

    def without_search(self, model: Model, request: Request) -> "Sleb":
        """Return the method that removes as many units without trying any.

        A part of a block is zeroed in place while the other part stays, so parts of as many
        blocks as possible go: no choice leaves a larger file.

        Args:
          model: Only its architecture is read.
          request: Its sparsity says how many, if nothing else does.
        """
        if self.remove is not None:
            return self
        n, candidates = self._choice(model, request)
        parts = 2 if self.units == "sublayers" else 1
        order = sorted(candidates, key=lambda unit: (unit % parts, unit))
        return dataclasses.replace(
            self, blocks=None, search="greedy", finalists=0, remove=order[:n]
        )

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
        whole = {"repair": self.repair == "flatten", "search": self.search == "similarity"}
        for field in (name for name, holds in whole.items() if holds and self.units != "blocks"):
            raise InputError(
                "of sleb is for whole blocks",
                'give units="blocks"',
                field=field,
                value=getattr(self, field),
            )
        repair = self._repair(model.arch)
        check_repair(model.arch, repair)
        plain = self.remove is not None or self.search != "greedy" or repair == "none"
        if self.finalists and plain:
            raise InputError(
                "of sleb is for the greedy search with a repair",
                "give 0",
                field="finalists",
                value=self.finalists,
            )
        self._choice(model, request)

    def _search(
        self, model: Model, tokens: np.ndarray, request: Request, runtime: Runtime
    ) -> tuple[SearchResult, Runner | None]:
        """Return the units to remove, and the runner that tried them."""
        n, candidates = self._choice(model, request)
        if self.remove is not None:
            depth, writers = len(model.blocks), writers_of(model.arch)
            return given_units(depth, candidates, self.remove, writers), None
        room = [int(gib * GIB) for gib in (self.device_gib, self.host_gib, self.disk_gib)]
        runner = Runner(model, tokens, runtime, room)
        if self.search == "evolution" and n:
            return search_by_evolution(runner, candidates, n, request.seed, runtime), runner
        if self.search == "similarity" and n:
            return search_by_similarity(runner, candidates, n, runtime), runner
        rounds = _rounds(self.search, n)
        # Either way the same units go: a candidate that is stopped could not be the best.
        stop_early = self.variant == "corrected"
        contiguous = self.search == "contiguous"
        judge = self._judge(model, tokens, runtime)
        result = search_units(runner, candidates, n, rounds, stop_early, runtime, contiguous, judge)
        return result, runner

    def _judge(self, model: Model, tokens: np.ndarray, runtime: Runtime) -> Judge | None:
        """Return the judge of the best candidates of each phase; None where none is asked for."""
        if not self.finalists:
            return None
        repair = self._repair(model.arch)

        def loss(path: Path) -> float:
            silent = _silent_linears(model.arch, path)
            remains = Remains(model, path, writers_of(model.arch), silent)
            return repaired_loss(remains, tokens, runtime, repair)

        return Judge(self.finalists, loss, repair)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        arch, total = model.arch, len(model.blocks)
        units = _units(arch, total, self.units)
        result, runner = self._search(model, tokens, request, runtime)
        details = search_details(runner, result, units, self.units == "sublayers")
        runner = None  # its states and blocks need the memory that the repair may take
        silent = _silent_linears(arch, result.path)
        remains = Remains(model, result.path, writers_of(arch), silent)
        details |= repair_and_write(remains, tokens, runtime, sink, self._repair(arch))
        # The report compares fractions, so a number of units becomes one.
        asked = len(result.removed) / len(units) if self.sets_sparsity else request.sparsity
        shapes = all_shapes(model)
        together = len(result.removed) if self.search == "contiguous" else 1
        return Outcome(
            asked=tuple(dict.fromkeys(slots, asked) for slots in shapes),
            kept_blocks=tuple(piece.block for piece in result.path),
            details=details,
            warnings=tuple(search_warnings(result)),
            figures=search_figures(
                details["losses"], result.removed, details.get("removed_parts"), together
            )
            + merge_figures(details["cuts"]),
        )
