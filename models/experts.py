"""Mixtures of experts: routing, and grouped matrix products over tokens sorted by expert.

A token runs through the `k` experts that its router weighs highest. Tokens are sorted by expert and
laid out in tiles, each of one expert, so that an expert's matrices meet its own tokens only.

Letters: b windows, t positions, N = b t tokens, d hidden size, e experts, k experts of a token, f
neurons of an expert, r rows of a tile.

Source: Shazeer et al. 2017, section 2; Gale et al. 2022 (MegaBlocks), section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from models.layers import Linear, linear
from models.precision import product

# Rows of a tile, if experts have as many tokens: enough to keep a matrix unit busy.
MOST_ROWS = 128


@struct.dataclass
class Expert:
    """Parameters of one expert, a gated feed-forward part.

    Attributes:
      gate: Gate projection, [f d].
      up: Up projection, [f d].
      down: Down projection, [d f].
    """

    gate: Linear
    up: Linear
    down: Linear


class RouterConfig(NamedTuple):
    """Static settings of a router.

    Attributes:
      k: Experts of a token.
      renormalise: True if the weights of a token's experts are made to sum to one.
    """

    k: int
    renormalise: bool


class Routed(NamedTuple):
    """Activations of each expert's tokens, in tiles of one expert each.

    Attributes:
      x: Activations, [tiles r c]; zeros in rows without a token.
      expert: Expert of each tile, int32 [tiles].
      present: True for rows that hold a token, bool [tiles r].
      weight: Router's weight of a row's expert for its token, float32 [tiles r].
      window: Window that a row's token comes from, int32 [tiles r]; b in rows without one.
      tokens: Number of tokens of each expert, int32 [e].
      windows: Number of windows, b.
    """

    x: jax.Array
    expert: jax.Array
    present: jax.Array
    weight: jax.Array
    window: jax.Array
    tokens: jax.Array
    windows: int

    def sum_by_expert(self, values: jax.Array) -> jax.Array:
        """Sum values of the tiles, [tiles ...], by expert, [e ...]."""
        return jax.ops.segment_sum(values, self.expert, len(self.tokens))


# Tap with the number of tokens of each expert, [e].
EXPERT_TOKENS = "experts.tokens"


def split_name(name: str) -> tuple[str, int | None, str]:
    """Split the name of an expert's tap or slot, such as "experts.3.up".

    Args:
      name: Name of a tap or slot.

    Returns:
      Field of the block, expert's number and field of the expert, such as ("experts", 3, "up"); the
      name itself, None and "" where it is no expert's.
    """
    root, _, rest = name.partition(".")
    number, _, field = rest.partition(".")
    return (root, int(number), field) if field else (name, None, "")


def expert_of(name: str) -> tuple[str, int | None]:
    """Return what all experts' taps or slots share with one such as "experts.3.in", and its number.

    Args:
      name: Name of a tap or slot.

    Returns:
      Name that all experts share, such as "experts.in", and the expert's number; the name itself
      and None where it is no expert's.
    """
    root, number, field = split_name(name)
    return (name, None) if number is None else (f"{root}.{field}", number)


class Layout(NamedTuple):
    """Places of the tokens in tiles.

    Attributes:
      row: Row of each token for each of its experts, counted over all tiles, int32 [N k].
      token: Token of each row, int32 [tiles*r]; N in rows without one.
      expert: Expert of each tile, int32 [tiles].
      tiles: Tiles of each expert, int32 [e].
      tokens: Tokens of each expert, int32 [e].
      rows: Rows of a tile, r.
    """

    row: jax.Array
    token: jax.Array
    expert: jax.Array
    tiles: jax.Array
    tokens: jax.Array
    rows: int


def route(config: RouterConfig, router: Linear, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of each token.

    Args:
      config: Settings of the router.
      router: Its projection, [e d].
      x: Tokens, [N d].

    Returns:
      Weights of the experts, float32 [N k], and their indices, int32 [N k].
    """
    # The softmax is over all experts, those of lower weight too.
    shares = jax.nn.softmax(linear(router, x).astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(shares, config.k)
    if config.renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def rows_of_tile(assigned: int, experts: int) -> int:
    """Return the rows of a tile: a power of two near the tokens that an expert gets.

    Args:
      assigned: Tokens times experts of each.
      experts: Number of experts.
    """
    # With far more rows most would be empty; with far fewer an expert's weights are read often.
    return min(MOST_ROWS, 1 << max(0, (assigned // experts).bit_length() - 1))


def lay_out(chosen: jax.Array, experts: int) -> Layout:
    """Sort tokens by expert into tiles.

    Args:
      chosen: Experts of each token, int32 [N k].
      experts: Number of experts.

    Returns:
      Places of the tokens.
    """
    n, k = chosen.shape
    assigned = n * k
    rows = rows_of_tile(assigned, experts)
    # Static: each expert's last tile may be filled in part.
    count = assigned // rows + (min(experts, assigned) if rows > 1 else 0)
    flat = chosen.reshape(-1)
    tokens = jnp.bincount(flat, length=experts).astype(jnp.int32)
    tiles = -(-tokens // rows)
    order = jnp.argsort(flat, stable=True)
    # Place within the expert, then after the tiles of the experts before it.
    place = jnp.arange(assigned) - (jnp.cumsum(tokens) - tokens)[flat[order]]
    sorted_rows = (jnp.cumsum(tiles) - tiles)[flat[order]] * rows + place
    row = jnp.zeros(assigned, jnp.int32).at[order].set(sorted_rows.astype(jnp.int32))
    token = jnp.full(count * rows, n, jnp.int32).at[row].set(jnp.arange(assigned) // k)
    expert = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(count), side="right")
    # Tiles behind the last token belong to no expert; their rows are zeros.
    expert = jnp.minimum(expert, experts - 1).astype(jnp.int32)
    return Layout(row.reshape(n, k), token, expert, tiles, tokens, rows)


def grouped_linear(w: jax.Array, x: jax.Array, layout: Layout) -> jax.Array:
    """Multiply each tile by the matrix of its expert.

    Args:
      w: Matrices, [e out in].
      x: Tiles, [tiles r in].
      layout: Places of the tokens.

    Returns:
      Products, [tiles r out].
    """

    def by_tile(w: jax.Array, x: jax.Array) -> jax.Array:
        def multiply(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, expert = args
            return product("ri,oi->ro", rows, w[expert])

        return jax.lax.map(multiply, (x, layout.expert))

    def ragged(w: jax.Array, x: jax.Array) -> jax.Array:
        # Rows of the tiles behind the last token are in no group: they come out as zeros.
        sizes = layout.tiles * layout.rows
        y = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1]), w.transpose(0, 2, 1), sizes)
        return y.reshape(*x.shape[:-1], -1)

    # TPUs have a kernel for ragged products. Elsewhere XLA multiplies all tokens by every expert:
    # 36 times the time of tiles on a CPU, with 32 experts of which a token takes 4.
    return jax.lax.platform_dependent(w, x, tpu=ragged, default=by_tile)


def run_experts(
    config: RouterConfig,
    router: Linear,
    experts: Sequence[Expert],
    act: Callable[[jax.Array], jax.Array],
    x: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
    """Run every token through its experts.

    Args:
      config: Settings of the router.
      router: Its projection, [e d].
      experts: Experts, all of one width.
      act: Activation of the gates.
      x: Inputs, [b t d].

    Returns:
      Weighted sum of the experts' outputs, [b t d], and taps: as Routed the experts' "in" and
      "mid", the inputs of their linears, and "gate", "up" and "down", the outputs; as "tokens" the
      number of tokens of each expert, int32 [e].
    """
    b, t, d = x.shape
    with jax.named_scope("routing"):
        tokens = x.reshape(b * t, d)
        weights, chosen = route(config, router, tokens)
        layout = lay_out(chosen, len(experts))
    # Row N of zeros stands for rows without a token.
    inputs = jnp.concatenate([tokens, jnp.zeros((1, d), x.dtype)])[layout.token]
    tiles = inputs.reshape(-1, layout.rows, d)
    row_weights = jnp.zeros(len(layout.token)).at[layout.row].set(weights)
    shape = (-1, layout.rows)
    routed = Routed(
        tiles,
        layout.expert,
        (layout.token < b * t).reshape(shape),
        row_weights.reshape(shape),
        (layout.token // t).reshape(shape),
        layout.tokens,
        b,
    )

    def linears(name: str, x: jax.Array) -> jax.Array:
        # One array for all experts: a tile's expert is data.
        return grouped_linear(jnp.stack([getattr(p, name).w for p in experts]), x, layout)

    with jax.named_scope("experts"):
        gate, up = linears("gate", tiles), linears("up", tiles)
        mid = act(gate) * up
        down = linears("down", mid)
    with jax.named_scope("experts_combined"):
        # float32, so that the sum over a token's experts is rounded once.
        of_token = down.reshape(-1, d)[layout.row].astype(jnp.float32)
        y = jnp.einsum("nkd,nk->nd", of_token, weights).astype(x.dtype).reshape(b, t, d)
    taps = {"in": tiles, "gate": gate, "up": up, "mid": mid, "down": down}
    of_experts = {name: routed._replace(x=tap) for name, tap in taps.items()}
    return y, {"tokens": layout.tokens, **of_experts}
