"""SparseLLM over a model: attention through SparseGPT, the feed-forward part of each block jointly."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import gram
from calibration.passes import BlockResult, Rehearse, observe, overflow, rehearse_fold
from calibration.states import States
from models.arch import Arch, Block, Model
from models.errors import InputError
from pruning.types import Allocation, BlockSink, Layerwise, Method, Outcome, Request, not_refined
from pruning.walk import walk
from pruning.weights import patterns, sparsegpt
from pruning.weights.per_linear import (
    allocate,
    asked_of,
    by_name,
    counts_of,
    every_tap,
    figures,
    fits,
    rehearse_taps,
    rule_of,
    solve_block,
)
from pruning.weights.sparsellm_core import Counts, Ffn, Penalties, Settings, Solved, solve_corrected
from pruning.weights.sparsellm_official_core import Aux, solve_official

KNOWN = (
    "relu",
    "silu",
    "swish",
)  # activations with an auxiliary update: relu without a gate, the others with one
ONCE = (
    1,
    30,
    31,
)  # blocks that the released code for gated models iterates once, whatever the model's depth
RELEASED = {True: Penalties(5.0, 5.0, 5.0), False: Penalties(0.1, 0.1, 0.1)}  # with a gate, without
SOUND = Penalties(0.01, 10.0, 1.0)
RIDGE = 1.0  # the corrected variant's; SparseGPT's 0.01 fits the calibration text more than the model (BUILD_NOTES.md)
PART = "feed-forward"  # what the report calls the part's figures


class _Names(NamedTuple):
    """The slots of the feed-forward part, the taps that enter it and its W2."""

    one: str
    gate: str | None
    two: str
    enters: str
    inside: str

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.one, self.gate, self.two)))


@functools.cache
def _names(arch: Arch) -> _Names:
    group = arch.group("neurons")
    *gate, one = (w.name for w in group.writers)
    return _Names(
        one,
        gate[0] if gate else None,
        group.reader.name,
        arch.tap(one),
        arch.tap(group.reader.name),
    )


def _ffn(arch: Arch, block: Block) -> Ffn:
    n = _names(arch)
    parts = Ffn(
        getattr(block, n.one), getattr(block, n.gate) if n.gate else None, getattr(block, n.two)
    )
    return jax.tree.map(lambda w: w.astype(jnp.float32), parts)


def _with_ffn(arch: Arch, block: Block, ffn: Ffn) -> Block:
    """The block with the part's matrices, in its own types."""
    parts = {name: p for name, p in zip(_names(arch)[:3], ffn, strict=True) if name and p}
    old = {name: getattr(block, name) for name in parts}
    return block.replace(
        **{name: old[name].replace(w=p.w.astype(old[name].w.dtype)) for name, p in parts.items()}
    )


@functools.partial(jax.jit, static_argnums=0)
def _activations(arch: Arch, block: Block, x: jax.Array) -> dict[str, jax.Array]:
    taps, n = arch.block(block, x)[1], _names(arch)
    return {name: taps[name].astype(jnp.float32) for name in (*n.slots, n.enters, n.inside)}


@functools.partial(jax.jit, static_argnames=("arch", "c"))
def _solve_official(
    arch: Arch,
    block: Block,
    t: Mapping[str, jax.Array],
    h1: jax.Array,
    h2: jax.Array,
    counts: Counts,
    c: Settings,
) -> Solved:
    n = _names(arch)
    aux = Aux(t[n.one], t[n.gate] if n.gate else None, t[n.inside])
    return solve_official(_ffn(arch, block), t[n.enters], t[n.two], aux, h1, h2, counts, c)


@functools.partial(jax.jit, static_argnames="arch")
def _aims(arch: Arch, dense: Block, pruned: Block, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What enters the feed-forward part behind pruned attention, and what should leave it, [b t d] in x's type: its dense output, and where
    it is added to the residual stream (no norm after it) what the pruned attention got wrong there.

    All from what linears give: the stream itself, whose largest channels are thousands, would leave few digits of a bfloat16 difference.
    """
    n, attention = _names(arch), arch.group("heads").reader.name
    taps = arch.block(pruned, x)[1]
    if not arch.residual:
        return taps[n.enters], taps[n.two]
    want = arch.block(dense, x)[1]
    lacks = want[attention].astype(jnp.float32) - taps[attention]
    return taps[n.enters], (want[n.two] + lacks).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("arch", "c"))
def _solve_corrected(
    arch: Arch,
    block: Block,
    x: tuple[jax.Array, ...],
    y: tuple[jax.Array, ...],
    counts: Counts,
    c: Settings,
) -> Solved:
    return solve_corrected(_ffn(arch, block), x, y, counts, c)


@jax.jit
def _stack(*parts: jax.Array) -> jax.Array:
    return jnp.stack(parts)


def _together(parts: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Micro-batches [b t d] as [micro-batches b t d], the last alone if it is smaller. Empties the list: they would lie there twice."""
    sizes = dict.fromkeys(map(len, parts))
    found = tuple(_stack(*(p for p in parts if len(p) == size)) for size in sizes)
    parts.clear()
    return found


class _Run(NamedTuple):
    """What stays the same from block to block."""

    arch: Arch
    settings: Settings
    official: bool

    def _official(
        self, i: int, dense: Block, xs: States, h1: jax.Array, h2: jax.Array, counts: Counts
    ) -> Solved:
        parts = [_activations(self.arch, dense, x) for x in xs]
        together = {name: jnp.concatenate([p[name] for p in parts]) for name in parts[0]}
        once = i in ONCE and _names(self.arch).gate is not None
        c = self.settings._replace(iterations=1) if once else self.settings
        return _solve_official(self.arch, dense, together, h1, h2, counts, c)

    def _corrected(self, dense: Block, pruned: Block, xs: States, counts: Counts) -> Solved:
        enters, leaves = [], []  # type: list[jax.Array], list[jax.Array]
        for states in xs:
            for part, into in zip(
                _aims(self.arch, dense, pruned, states), (enters, leaves), strict=True
            ):
                into.append(part)
        x, y = _together(enters), _together(leaves)
        return _solve_corrected(self.arch, dense, x, y, counts, self.settings)

    def block(
        self, i: int, block: Block, xs: States, counts: Mapping[str, Any]
    ) -> tuple[Block, dict[str, dict[str, float]], list[float]]:
        """Block i pruned: (the block, the solvers' figures, the part's error after each iteration)."""
        arch, rule, n = self.arch, self.settings.rule, _names(self.arch)
        attention = {name: count for name, count in counts.items() if name not in n.slots}
        watched = [s.reads for s in arch.slots if self.official or s.name in attention]
        stats = observe(arch, dict.fromkeys(watched, gram), i, block, xs)
        new, notes = solve_block(
            arch,
            every_tap(arch, sparsegpt.pruner(self.settings.damp, rule)),
            block,
            stats,
            attention,
        )
        mine = Counts(tuple(counts[name] for name in (n.one, n.gate) if name), counts[n.two])
        if self.official:
            h1, h2 = (sparsegpt.hessian(stats[tap]) for tap in (n.enters, n.inside))
            solved = self._official(i, block, xs, h1, h2, mine)
        else:
            solved = self._corrected(block, new, xs, mine)
        found = figures(i, {**notes, PART: {"damping": solved.damping}})
        losses = [float(x) for x in solved.losses]
        if self.official and not np.isfinite(losses[-1]):
            raise InputError(
                f'block {i}: the released alternation diverged, as it does on this model: use variant="corrected"'
            )
        if not np.any(np.isfinite(losses)):
            raise overflow(i)
        return _with_ffn(arch, new, solved.ffn), found, losses

    def rehearse(
        self, model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        """What `block` compiles for all blocks of a model of shapes, told to `run`."""
        arch, settings, block, n = self.arch, self.settings, model.blocks[0], _names(self.arch)
        solved = [s.reads for s in arch.slots if s.name not in n.slots]
        watch = dict.fromkeys([s.reads for s in arch.slots] if self.official else solved, gram)
        x, stats = rehearse_fold(
            model, tokens, run, watch=watch, propagate="pruned", batch=request.batch
        )
        pruners = dict.fromkeys(solved, sparsegpt.pruner(settings.damp, settings.rule))
        blocks, steps = len(model.blocks), -(-tokens.shape[0] // request.batch)
        rehearse_taps(arch, pruners, settings.rule, block, stats, request, run, blocks)
        mine: list[Any] = [
            settings.rule.counts(getattr(block, name).w.shape, np.asarray(request.sparsity))
            for name in n.slots
        ]
        counts, calls = Counts(tuple(mine[:-1]), mine[-1]), {"calls": steps * blocks}
        if self.official:
            parts = [
                run("activations", functools.partial(_activations, arch), block, x, **calls)
            ] * steps
            every = run(
                "activations together",
                lambda ps: jax.tree.map(lambda *p: jnp.concatenate(p), *ps),
                parts,
                calls=blocks,
            )
            h1, h2 = (
                run(f"{tap}: H", sparsegpt.hessian, stats[tap], calls=blocks)
                for tap in (n.enters, n.inside)
            )
            solve = functools.partial(_solve_official, arch, c=settings)
            run(
                "alternation",
                lambda b, t, h1, h2: solve(b, t, h1, h2, counts),
                block,
                every,
                h1,
                h2,
                calls=blocks,
            )
        else:
            pair = run("targets", functools.partial(_aims, arch), block, block, x, **calls)
            every = [run("targets together", _stack, *[p] * steps, calls=blocks) for p in pair]
            run(
                "alternation",
                lambda b, x, y: _solve_corrected(arch, b, (x,), (y,), counts, settings),
                block,
                *every,
                calls=blocks,
            )


def _settings(
    arch: Arch,
    request: Request,
    damp: float,
    ridge: float | None,
    penalties: tuple[float | None, ...],
    iterations: int,
    official: bool,
) -> Settings:
    gated, act = _names(arch).gate is not None, arch.config.act
    if act not in KNOWN or (act == "relu") == gated:
        raise InputError(
            f"sparsellm: no update of the auxiliary activations is known for {act}: use sparsegpt"
        )
    default = RELEASED[gated] if official else SOUND
    rule = rule_of(request, patterns.per_column_block(sparsegpt.COLUMNS))
    filled = Penalties(*(d if x is None else x for d, x in zip(default, penalties, strict=True)))
    return Settings(act, rule, damp, RIDGE if ridge is None else ridge, filled, iterations)


def _outcome(
    allocation: Allocation,
    covered: int,
    found: list[Any],
    losses: list[list[float]],
    official: bool,
    damp: float,
) -> Outcome:
    asked = tuple(b if i < covered else {} for i, b in enumerate(asked_of(allocation.budget)))
    kept = [None if not x else len(x) - 1 if official else int(np.nanargmin(x)) for x in losses]
    details = {**allocation.details, "loss": losses, "iteration_kept": kept, **by_name(found)}
    same = [i for i, (k, x) in enumerate(zip(kept, losses, strict=True)) if k == 0 and len(x) > 1]
    warnings = [
        f"block {i}: no iteration was better than SparseGPT's solution, which stays" for i in same
    ]
    return Outcome(
        asked,
        details=details,
        warnings=(*allocation.warnings, *warnings, *sparsegpt.raised(details, damp)),
    )


def sparsellm(
    iterations: int = 4,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    first_half: bool = False,
    damp: float = 0.01,
    ridge: float | None = None,
    variant: Literal["corrected", "official"] = "corrected",
) -> Method:
    """SparseLLM (Bai et al. 2024): attention through SparseGPT, the feed-forward part of each block pruned as a whole.

    Args:
      iterations: of the alternation; the first is SparseGPT.
      alpha: penalty on what leaves W1 and its gate. None: as released in the official variant (0.1 for OPT, 5 for LLaMA), else 0.01.
      beta: of the part's output. None: as released (0.1, 5), else 10.
      gamma: of what enters W2. None: as released (0.1, 5), else 1.
      first_half: prune only the first half of the blocks, as the paper's tables do; the others stay dense.
      damp: SparseGPT's.
      ridge: how firmly the corrected variant's fits hold to the weights they start from: what they add to H's diagonal, as a share of its
        mean. None: 1. At 0.01 they follow the calibration text, and other text is the worse for it (BUILD_NOTES.md).
      variant: "official" is the released code to the letter, which diverges on SmolLM2 and on tiny OPT models. "corrected" has the same
        objective with sums over tokens and Cholesky factors in place of pseudo-inverses, W2 fitted to what W1 and its gate really give,
        and the output that makes good what pruned attention got wrong as its target; the best iteration stays. At 70 % on SmolLM2-135M it
        gives perplexity 88 where SparseGPT gives 145 (BUILD_NOTES.md), so it is the default.
    """
    if iterations < 1:
        raise InputError(f"sparsellm: iterations={iterations} must be at least 1")
    if not damp >= 0 or any(x is not None and not x > 0 for x in (alpha, beta, gamma)):
        raise InputError("sparsellm: alpha, beta and gamma must be positive, and damp not negative")
    official = variant == "official"
    if ridge is not None and (official or not ridge >= 0):
        raise InputError(
            "sparsellm: ridge must not be negative, and belongs to the corrected variant"
        )

    def settings_of(model: Model, request: Request) -> Settings:
        return _settings(
            model.arch, request, damp, ridge, (alpha, beta, gamma), iterations, official
        )

    def check(model: Model, request: Request) -> None:
        not_refined("sparsellm", model, request)
        fits(model, settings_of(model, request).rule)

    def method(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        settings = settings_of(model, request)
        run = _Run(model.arch, settings, official)
        # Budgets are tried with SparseGPT, which the alternation starts from.
        allocation = allocate(
            model, tokens, request, Layerwise(sparsegpt.pruner(damp, settings.rule), settings.rule)
        )
        covered = len(model.blocks) // 2 if first_half else len(model.blocks)

        def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
            found: dict[str, dict[str, float]] = {}
            losses: list[float] = []
            if i < covered and (
                counts := counts_of(model.arch, settings.rule, block, allocation.budget[i])
            ):
                block, found, losses = run.block(i, block, xs, counts)
            sink(i, block)
            return BlockResult(block, record=(found, losses))

        records = walk(model, tokens, request, visit, "pruning")
        return _outcome(
            allocation, covered, [f for f, _ in records], [x for _, x in records], official, damp
        )

    def rehearse(
        model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        settings = settings_of(model, request)
        half = (
            model._replace(blocks=model.blocks[: len(model.blocks) // 2]) if first_half else model
        )
        _Run(model.arch, settings, official).rehearse(half, tokens, request, run)

    return Method(method, check=check, rehearse=rehearse)
