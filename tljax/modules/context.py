"""What attention needs to know of a run besides the residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tljax.hooks.point import Window
from tljax.modules.packing import Packing
from tljax.modules.past import Past
from tljax.text.inputs import ModelInput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What attention needs to know of the run besides the residual stream.

    Attributes:
        positions: ``[batch, pos]`` position of each token; ``None`` means 0, 1, 2, …
        token_mask: ``[batch, pos]`` boolean, ``False`` at padding; ``None`` means no padding.
        score_divisor: scalar that divides the scores besides ``attn_scale`` (a layer's own); ``None`` means one.
        past: keys and values of earlier tokens; the run then holds only what follows them.
        pasts: those of every layer, before :func:`~tljax.forward.forward.context_of_layer` picks one.
        window: which part of a longer text the run holds, for interventions.
        lengths: ``[1, token]``, tokens in the text of each token of a packed run, where ``positions`` do not show them.
        pos_embed: ``[batch or 1, pos or more, d_model]``, position embeddings that queries and keys read (shortformer).
        text: ``[batch, pos]``, ``False`` at padding, of the whole text (with a window, its whole room), for
            interventions that count positions; ``None`` where nothing is padded or it is not known.
        packing: how rows are laid out in a packed run (``[row, pos]`` is then the shape of ``token_mask``).
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

    @classmethod
    def of(cls, given: ModelInput) -> "AttentionContext":
        """What a checked input says of its positions and padding."""
        return cls(given.positions, given.token_mask, text=given.text)

    def positions_for(self, length: int) -> jax.Array:
        """Positions ``[batch or 1, pos]``."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.positions is None else self.positions

    def lengths_for(self, positions: jax.Array) -> jax.Array:
        """Tokens in the text of each token, ``[batch or 1, pos or 1]``, padding and what follows not counted."""
        return positions.max(axis=-1, keepdims=True) + 1 if self.lengths is None else self.lengths

    def computed(self, x: jax.Array) -> jax.Array:
        """The tokens ``[batch, pos, ...]`` whose output is wanted: all of them unless a packed run says otherwise."""
        return x if self.packing is None or self.packing.computed is None else x[:, self.packing.computed]
