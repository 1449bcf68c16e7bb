"""The terms of a dictionary's loss token by token, for batches in which some tokens do not count.

:func:`~tljax.dictionaries.training.losses.loss_of_rows` is a mean over all rows that it is given. Here it is mapped
over single rows, so that padding can be left out of the mean, and out of what ``batchtopk`` selects.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.normalization import Factors, normalize
from tljax.dictionaries.training.coefficients import Numbers
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.losses import Params, Rows, Setting, decoder_norms, loss_of_rows
from tljax.dictionaries.training.selection import Cut, cut_batch


class TokenLosses(NamedTuple):
    """What :func:`token_losses` returns; sums and means are over the tokens that count.

    Attributes:
        terms: the mean of each term of the loss, by SAELens's names.
        reconstruction: ``[tokens, d_out]``, in units of training.
        fired: in how many tokens each feature fired, ``[d_sae]``.
        cut: the selection of the batch, of ``batchtopk``.
    """

    terms: dict[str, jax.Array]
    reconstruction: jax.Array
    fired: jax.Array
    cut: Cut | None


def token_losses(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    counts: jax.Array,
    numbers: Numbers,
    dead: jax.Array,
    cfg: TrainingConfig,
    guess: jax.Array,
) -> TokenLosses:
    """Encodes and reconstructs tokens, and computes the terms of the loss; to be differentiated by ``params``.

    Args:
        params: the parameters.
        x: ``[tokens, d_in]``, in units of training.
        y: ``[tokens, d_out]``.
        counts: which tokens count, ``[tokens]``.
        numbers: the numbers of the run at this step.
        dead: mask of dead features.
        cfg: what is computed.
        guess: of the batch's threshold; see :func:`~tljax.dictionaries.training.selection.cut_batch`.
    """
    factors, inputs = Factors(), x
    if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        inputs, factors = normalize(x, cfg.dictionary_config())
    if cfg.subtracts_b_dec:
        inputs = inputs - params["b_dec"][None]
    norms, u = decoder_norms(params["W_dec"], None), inputs @ params["W_enc"]
    cut = _cut(params, u, norms, counts, numbers, cfg, guess) if cfg.architecture == "batchtopk" else None
    setting = Setting(numbers, dead, dead.any(), cut, 1)

    def one_token(
        u: jax.Array, inputs: jax.Array, x: jax.Array, y: jax.Array, factors: Factors, number: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        own = jax.tree.map(lambda leaf: leaf[None] if jnp.ndim(leaf) else leaf, factors)
        rows = Rows(inputs[None], x[None], y[None], own, number)
        _, (outcome, _, output, *_) = loss_of_rows(params, norms, u[None], rows, setting, cfg)
        return outcome.terms, outcome.fired, output[0]

    numbered = jnp.arange(x.shape[0], dtype=jnp.int32)
    of_factors = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, factors)
    mapped = jax.vmap(one_token, in_axes=(0, 0, 0, 0, of_factors, 0))
    terms, fired, output = mapped(u, inputs, x, y, factors, numbered)
    return TokenLosses(
        {name: mean_of(term, counts) for name, term in terms.items()},
        output,
        jnp.where(counts[:, None], fired, 0).sum(axis=0),
        cut,
    )


def mean_of(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the mean of values over the tokens that count, in float32."""
    kept = jnp.where(counts, values.astype(jnp.float32), 0)
    return kept.sum() / jnp.maximum(counts.sum(dtype=jnp.int32), 1).astype(jnp.float32)


def _cut(
    params: Params, u: jax.Array, norms: jax.Array, counts: jax.Array, numbers: Numbers, cfg: TrainingConfig,
    guess: jax.Array,
) -> Cut:  # fmt: skip
    """Selects among the tokens that count, ``k`` for each of them."""
    u, b_enc, weights = jax.lax.stop_gradient((u, params["b_enc"], norms))
    h = u + b_enc[None]
    values = h * weights[None] if cfg.selects_by_norm else h
    keep = numbers["k"].astype(jnp.int32) * counts.sum(dtype=jnp.int32)
    return cut_batch(lambda block: block, jnp.where(counts[:, None], values, 0), keep, guess)
