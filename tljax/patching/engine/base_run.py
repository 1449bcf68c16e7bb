"""The unpatched run a sweep starts from: every layer's residual stream, keys and values, and the patched activations.

Prompts are padded on the right to one of a few standard lengths, and the padding is masked, so that prompts of
different lengths share compiled programs.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tljax.forward.forward import POSITIONS, excludes_tokens, run_forward
from tljax.hooks.points import ENTRY, point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.attention import KEYS_AND_VALUES
from tljax.modules.context import AttentionContext
from tljax.processes import as_numpy
from tljax.scale.batch import on_devices
from tljax.sizes import prompt_length
from tljax.text.inputs import ModelInput
from tljax.text.padding import pad_axis


@dataclasses.dataclass(frozen=True)
class BaseRun:
    """One unpatched run.

    Attributes:
        activations: activations by full name, ``[batch, padded_pos, ...]``, padded along every position axis.
        final: final residual stream, ``[batch, padded_pos, d_model]``.
        tokens: token ids, ``[batch, padded_pos]``.
        context: positions and mask, ``[batch, padded_pos]``, and the position embeddings if blocks read them.
        length: the prompts' length; positions from there on are padding.
        text: ``[batch, length]``, ``False`` at the prompts' own padding; ``None`` if there is none or it is unknown.
    """

    activations: dict[str, jax.Array]
    final: jax.Array
    tokens: np.ndarray
    context: AttentionContext
    length: int
    text: np.ndarray | None = None

    @property
    def n_positions(self) -> int:
        """Number of tokens of the longest prompt."""
        return self.length if self.text is None else int(self.text.sum(axis=1).max())

    @property
    def batch(self) -> int:
        return self.final.shape[0]

    @property
    def padded_length(self) -> int:
        return self.final.shape[1]

    def residual(self, layer: int) -> jax.Array:
        """Returns the residual stream entering a layer, or leaving the last one, ``[batch, padded_pos, d_model]``."""
        return self.activations.get(f"blocks.{layer}.{ENTRY}", self.final)


def run_base(model: HookedTransformer, prepared: ModelInput, names: Sequence[str]) -> BaseRun:
    """Runs the model on padded prompts, keeping what a sweep needs.

    Args:
        model: the model. Hooks that it carries apply; if it has any, prompts are not padded, because a hook may count
            positions from the end.
        prepared: the prompts, token ids ``[batch, pos]``.
        names: full names to keep besides residual streams, keys and values.
    """
    cfg = model.cfg
    batch, length = prepared.batch_and_pos
    model._hooks.check(point_table(cfg), batch, length, prepared.text)
    padded_length = length if model._hooks.entries else prompt_length(length, cfg.n_ctx)
    tokens = pad_axis(as_numpy(prepared.value), padded_length)
    given = AttentionContext.of(prepared)
    positions = np.arange(length, dtype=np.int32)[None] if given.positions is None else as_numpy(given.positions)
    mask = np.ones((batch, length), bool) if given.token_mask is None else as_numpy(given.token_mask)
    positions = np.broadcast_to(positions, (batch, length))
    context = AttentionContext(
        *(on_devices(pad_axis(array, padded_length), model.params) for array in (positions, mask)),
        text=given.text,
        tokens=jax.device_put(tokens) if excludes_tokens(cfg) else None,
    )
    needed = (ENTRY, *KEYS_AND_VALUES)
    positions = [POSITIONS] if cfg.positional_embedding_type == "shortformer" else []
    blocks = [f"blocks.{layer}.{part}" for layer in range(cfg.n_layers) for part in needed]
    kept = dict.fromkeys([*names, *positions, *blocks])
    final, activations = run_forward(
        cfg, model.params, tokens, context, hooks=model._hooks, names=tuple(kept), stop=cfg.n_layers
    )
    context = dataclasses.replace(context, pos_embed=activations[POSITIONS]) if positions else context
    text = None if given.text is None else as_numpy(given.text)
    return BaseRun(activations, final, tokens, context, length, text)
