"""REAP: remove the experts of a mixture that add least to the tokens routed to them."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Model, experts_of
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.experts import Routed
from models.sharding import tree_to_host
from models.surgery import keep_experts
from pruning.budget import all_experts, all_shapes
from pruning.figures import kept_map
from pruning.structured.select_core import drop_lowest
from pruning.types import SAME_SHAPES, BlockSink, Outcome, Request, reject_weight_settings

Score = Literal["reap", "frequency", "norm"]
USAGE_KEY = "use of experts"  # not the score: all scores are made of the same sums
LABELS: Mapping[Score, str] = {
    "reap": "mean weight times output norm of experts",
    "frequency": "tokens of experts",
    "norm": "mean output norm of experts",
}


class Usage(NamedTuple):
    """Use of experts, each entry [e].

    Attributes:
      weighted: Sum over the expert's tokens of its weight times the norm of its output.
      norms: Sum over the tokens of the norm of the output.
      tokens: Tokens routed to the expert.
    """

    weighted: jax.Array
    norms: jax.Array
    tokens: jax.Array


def _start_usage(channels: int) -> Usage:
    return Usage(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def _update_usage(state: Usage, outputs: Routed) -> Usage:
    norms = jnp.linalg.norm(outputs.x.astype(jnp.float32), axis=2)  # [tiles r], 0 without a token
    return Usage(
        state.weighted + outputs.sum_by_expert(jnp.sum(outputs.weight * norms, axis=1)),
        state.norms + outputs.sum_by_expert(jnp.sum(norms, axis=1)),
        state.tokens + outputs.tokens.astype(jnp.float32),
    )


def _needs_experts(*_: Any) -> Any:
    raise TypeError("usage is a statistic of experts")


usage = Observer(_needs_experts, _needs_experts, Observer(_start_usage, _update_usage))


def saliency(seen: Usage, score: Score) -> np.ndarray:
    """Return the score of each expert, float64 [e].

    Source: Lasby et al. 2025 (arXiv 2510.13999), eq. 9, for "reap".

    Args:
      seen: Use of the experts, on the host.
      score: "reap" the mean over an expert's tokens of its weight times the norm of its output;
        "frequency" the number of tokens; "norm" the mean norm of the output.
    """
    tokens = np.asarray(seen.tokens, np.float64)
    if score == "frequency":
        return tokens
    total = seen.weighted if score == "reap" else seen.norms
    # An expert that no token reached adds nothing.
    return np.asarray(total, np.float64) / np.maximum(tokens, 1)


@dataclasses.dataclass(frozen=True)
class Reap:
    """REAP (Lasby et al. 2025): remove the experts that add least to the tokens routed to them.

    Every block loses as many experts, and its router their rows, so that the result is the stock
    type with fewer experts. A token of a removed expert goes to the next one in its router's order.

    Args:
      score: "reap" the mean over the tokens routed to an expert of the router's weight times the
        norm of the expert's output; "frequency" the number of tokens; "norm" the mean norm of the
        output.
    """

    score: Score = "reap"

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that the shapes of what stays are the same."""
        return SAME_SHAPES

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return that every score is one of activations."""
        return True

    @property
    def scores_key(self) -> Hashable:
        """Return what the use of experts, which scores are made of, depends on."""
        return USAGE_KEY

    def _removed(self, model: Model, request: Request) -> int:
        """Return the number of experts that each block loses."""
        return round(request.sparsity * max(all_experts(model)))

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("reap", request)
        experts = max(all_experts(model))
        if not experts:
            raise InputError(
                "removes experts, and this model has none",
                "choose flap, llmrank or wanda_sp for heads and neurons",
                field="method",
                value="reap",
            )
        most = experts - model.arch.config.static.router.k
        if self._removed(model, request) > most:
            raise InputError(
                f"leaves fewer experts than a token takes, {experts - most} of {experts}",
                f"give at most {most / experts:.4g}",
                field="sparsity",
                value=request.sparsity,
            )

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        count = self._removed(model, request)

        def weigh(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            seen = tree_to_host(stats["experts.down"])._asdict() if experts_of(block) else None
            return block, seen

        # Of the dense model: what one block lost does not change the next's scores.
        seen = calibrate_blocks(
            model,
            tokens,
            runtime,
            weigh,
            watch={"experts.down": usage},
            propagate="dense",
            name="weighing experts",
            key=USAGE_KEY,
        )

        def cut(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            if seen[i] is None:
                sink(i, block)
                return block, None
            scores = saliency(Usage(**seen[i]), self.score)
            keep = drop_lowest(scores, count)
            block = keep_experts(block, keep) if count else block
            sink(i, block)
            return block, (keep, scores)

        records = calibrate_blocks(
            model, tokens, runtime, cut, watch={}, propagate="pruned", name="removing experts"
        )
        return self._outcome(model, request, records)

    def _outcome(self, model: Model, request: Request, records: list[Any]) -> Outcome:
        """Return the outcome: the experts that stay, and the scores of all."""
        kept = [None if r is None else np.flatnonzero(r[0]) for r in records]
        asked = tuple(
            {slot: request.sparsity for slot in shapes if slot.startswith("experts.")}
            for shapes in all_shapes(model)
        )
        return Outcome(
            asked=asked,
            kept_experts=tuple(None if k is None else tuple(map(int, k)) for k in kept),
            details={
                "kept_experts": [None if k is None else [int(e) for e in k] for k in kept],
                "expert_scores": [
                    None if r is None else [float(f"{s:.6g}") for s in r[1]] for r in records
                ],
                "expert_score": LABELS[self.score],
            },
            figures=(kept_map("experts", [r[0] for r in records if r is not None]),),
        )
