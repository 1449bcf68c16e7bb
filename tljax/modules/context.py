"""``AttentionContext``: the data of a run that attention needs besides the residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tljax.hooks.point import Window
from tljax.modules.packing import Packing, taken
from tljax.modules.past import Past
from tljax.text.inputs import ModelInput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """Data of a run that attention needs besides the residual stream.

    Attributes:
        positions: ``[batch, pos]`` position of each token; ``None`` means 0, 1, 2, …
        token_mask: ``[batch, pos]`` boolean, ``False`` at padding; ``None`` means no padding.
        score_divisor: the layer's own divisor of the scores, a scalar on top of ``attn_scale``; ``None`` means one.
        past: keys and values of earlier tokens; the run then holds only what follows them.
        pasts: the ``past`` of every layer, before :func:`~tljax.forward.forward.context_of_layer` picks one.
        window: which part of a longer text the run holds, for interventions.
        lengths: ``[1, token]``, length of the text of each token in a packed run, if ``positions`` do not show it.
        pos_embed: ``[batch or 1, pos or more, d_model]``, position embeddings that queries and keys read (shortformer).
        text: mask ``[batch, pos]`` of the whole text (with a window, of its whole capacity), ``False`` at padding, for
            interventions that count positions; ``None`` if nothing is padded or it is not known.
        tokens: ids ``[batch, pos]`` of the tokens, if a spliced dictionary leaves some of them out.
        packing: how rows are laid out in a packed run (``[lane * row, pos]`` is then the shape of ``token_mask``).
    """

    positions: jax.Array | None = None
    token_mask: jax.Array | None = None
    score_divisor: jax.Array | np.float32 | None = None
    lengths: jax.Array | None = None
    packing: Packing | None = None
    past: Past | None = None
    pasts: tuple[Past, ...] | None = None
    window: Window | None = None
    pos_embed: jax.Array | None = None
    text: jax.Array | None = None
    tokens: jax.Array | np.ndarray | None = None

    @classmethod
    def of(cls, given: ModelInput) -> "AttentionContext":
        """Makes the context of a checked input, from its positions and padding."""
        return cls(given.positions, given.token_mask, text=given.text)

    def positions_for(self, length: int) -> jax.Array:
        """Returns positions ``[batch or 1, pos]``."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.positions is None else self.positions

    def lengths_for(self, positions: jax.Array) -> jax.Array:
        """Returns the length of each token's text, ``[batch or 1, pos or 1]``, without padding and tokens to come."""
        return positions.max(axis=-1, keepdims=True) + 1 if self.lengths is None else self.lengths

    def computed(self, x: jax.Array) -> jax.Array:
        """Returns the tokens ``[batch, pos, ...]`` whose output is needed: all, unless a packed run selects some."""
        return x if self.packing is None or self.packing.computed is None else taken(x, self.packing.computed)
