"""The loss of a batch and its gradients, chunk by chunk.

With B tokens, widths d and F features, a step needs five matrix products of ``2 B d F`` operations: ``x W_enc``,
``f W_dec``, and the gradients of ``f``, ``W_dec`` and ``W_enc``. Differentiating ``(x - b_dec) W_enc`` as it stands
takes a sixth for the gradient of ``b_dec``; here the gradient is summed over tokens first. Where few features are
active, a CPU does all but ``x W_enc`` row by row (:mod:`tljax.dictionaries.training.sparse_products`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax import checks
from tljax.dictionaries.maths.normalization import Factors, normalize
from tljax.dictionaries.training.coefficients import Numbers, numbers_of, structure_of
from tljax.dictionaries.training.config import TOP_K, TrainingConfig
from tljax.dictionaries.training.losses import Outcome, Params, Rows, Setting, decoder_norms, loss_of_rows
from tljax.dictionaries.training.pieces import Pieces
from tljax.dictionaries.training.rows import column_sums
from tljax.dictionaries.training.selection import Cut, cut_batch
from tljax.dictionaries.training.sparse_products import outer_sums, pays

_CHUNK_BYTES = 32 * 2**20
"""Size of ``[rows, d_sae]`` for a chunk of rows on a CPU: larger ones are fresh memory in every step, which costs page
faults, and do not stay in the cache."""


class BatchLoss(NamedTuple):
    """What :func:`loss_and_gradients` returns besides gradients.

    Attributes:
        total: the loss.
        outcome: its terms, in how many tokens each feature fired, the squared error.
        cut: the selection of the batch, of ``batchtopk``.
    """

    total: jax.Array
    outcome: Outcome
    cut: Cut | None


class _Sums(NamedTuple):
    """Sums over tokens: loss, gradients, and the gradients of the decoder norms and of ``x W_enc``."""

    total: jax.Array
    outcome: Outcome
    grads: dict[str, jax.Array]
    of_norms: jax.Array
    of_u: jax.Array


class Losses(NamedTuple):
    """The loss of a batch.

    Attributes:
        total: the sum of the terms.
        terms: by SAELens's names: ``mse_loss``, ``l1_loss``, ``l0_loss``, ``auxiliary_reconstruction_loss``,
            ``pre_act_loss``, ``inner_mse_loss_<width>``.
        features: ``[tokens, d_sae]``; times the decoder norms where the dictionary selects by them.
        reconstruction: ``[tokens, d_out]``.
        smallest: the smallest feature kept, of ``batchtopk``; infinity if none is positive.
    """

    total: jax.Array
    terms: dict[str, jax.Array]
    features: jax.Array
    reconstruction: jax.Array
    smallest: jax.Array | None


@checks.typed
def dictionary_loss(
    params: Mapping[str, jax.Array],
    activations: jax.Array,
    cfg: TrainingConfig,
    *,
    targets: jax.Array | None = None,
    coefficients: Mapping[str, float | jax.Array] | None = None,
    dead: jax.Array | None = None,
) -> Losses:
    """Computes the loss of a dictionary: a pure function, for ``jax.grad`` with respect to ``params``.

    Args:
        params: by the names of :class:`~tljax.dictionaries.Dictionary`; matrices of crosscoders with sources merged,
            ``[n * d_in, d_sae]``.
        activations: ``[tokens, d_in]``, in units of training (a norm scale is not applied here).
        cfg: the settings.
        targets: what a transcoder reconstructs, ``[tokens, d_out]``.
        coefficients: values that replace those of the config, by the config's names, as warm-up gives them at a step.
        dead: mask of dead features, ``[d_sae]``; ``None`` means none is.

    Returns:
        The total, its terms, features and reconstruction.

    >>> cfg = TrainingConfig(d_in=4, d_sae=8, l1_coefficient=0.1)
    >>> from tljax.dictionaries.training import initial_parameters
    >>> params = initial_parameters(cfg)
    >>> sorted(dictionary_loss(params, jnp.ones((3, 4)), cfg).terms)
    ['l1_loss', 'mse_loss']
    """
    numbers = numbers_of(cfg, 1) | {name: jnp.float32(value) for name, value in (coefficients or {}).items()}
    structure = structure_of(cfg, cfg.k)
    x = jnp.asarray(activations)
    y = x if targets is None else jnp.asarray(targets)
    mask = jnp.zeros(cfg.d_sae, bool) if dead is None else jnp.asarray(dead, bool)
    with jax.default_matmul_precision(cfg.precision):
        norms = decoder_norms(params["W_dec"], cfg.n_sources)
        rows = _rows(params, x, y, 0, structure)
        u = _encoded(params, rows.x, structure)
        cut = _cut(params, jax.lax.stop_gradient(u), norms, numbers, structure, jnp.float32(0))
        setting = Setting(numbers, mask, mask.any(), cut, x.shape[0])
        total, (outcome, features, output, _) = loss_of_rows(params, norms, u, rows, setting, structure)
    return Losses(total, outcome.terms, features, output, None if cut is None else cut.value)


def loss_and_gradients(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    numbers: Numbers,
    dead: jax.Array,
    cfg: TrainingConfig,
    guess: jax.Array,
    axis_name: str | None = None,
) -> tuple[dict[str, jax.Array], BatchLoss]:
    """Computes the loss of a batch and its gradients in chunks of rows.

    Args:
        params: the parameters.
        x: ``[tokens, d_in]``.
        y: ``[tokens, d_out]``.
        numbers: the numbers of the run at this step.
        dead: mask of dead features.
        cfg: what is computed.
        guess: of the batch's threshold; see :func:`~tljax.dictionaries.training.selection.cut_batch`.
        axis_name: of the members, where a stack is mapped over.
    """
    tokens = x.shape[0]
    any_dead = dead.any() if axis_name is None else jax.lax.psum(dead.sum(dtype=jnp.int32), axis_name) > 0
    norms, pull_norms = jax.vjp(lambda W_dec: decoder_norms(W_dec, cfg.n_sources), params["W_dec"])
    rest = {name: value for name, value in params.items() if name != "W_enc"}
    u = cut = None
    if cfg.architecture == "batchtopk":
        u = _encoded(params, _rows(params, x, y, 0, cfg).x, cfg)
        cut = _cut(params, u, norms, numbers, cfg, guess)
    sparse = axis_name is None and "W_enc" in params and pays(cfg.width_in, cfg.d_sae)
    setting = Setting(numbers, dead, any_dead, cut, tokens, sparse)
    differentiate = jax.value_and_grad(loss_of_rows, argnums=(0, 1, 2), has_aux=True)

    def chunk(first: jax.Array | int, part: tuple[jax.Array, ...]) -> _Sums:
        rows = _rows(params, part[0], part[1], first, cfg)
        own = part[2] if u is not None else _encoded(params, rows.x, cfg)
        (total, (outcome, _, _, pieces)), (grads, of_norms, of_u) = differentiate(rest, norms, own, rows, setting, cfg)
        if "W_enc" in params:
            grads = {**grads, "W_enc": _of_encoder(rows.x, of_u, pieces, setting, cfg)}
        return _Sums(total, outcome, grads, of_norms, column_sums(of_u))

    parts = (x, y) if u is None else (x, y, u)
    sums = _over_chunks(chunk, parts, cfg.d_sae)
    grads = dict(sums.grads)
    if "W_enc" in params:
        grads["W_enc"] = grads["W_enc"].T
    grads["W_dec"] = grads["W_dec"] + pull_norms(sums.of_norms)[0]
    if "W_enc" in params and cfg.subtracts_b_dec:
        grads["b_dec"] = grads["b_dec"] - params["W_enc"] @ sums.of_u
    return grads, BatchLoss(sums.total, sums.outcome, cut)


def _of_encoder(
    x: jax.Array, of_u: jax.Array, pieces: Pieces | None, setting: Setting, cfg: TrainingConfig
) -> jax.Array:
    """Returns the gradient of ``W_enc`` transposed, ``[d_sae, d_in]``, so that a feature is a row."""
    if pieces is None:
        return of_u.T @ x
    few = pieces.fits & ~setting.any_dead if cfg.architecture in TOP_K else pieces.fits
    return outer_sums(of_u, x, pieces, few)


def _rows(params: Params, x: jax.Array, y: jax.Array, first: jax.Array | int, cfg: TrainingConfig) -> Rows:
    factors, normalised = Factors(), x
    if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        normalised, factors = normalize(x, cfg.dictionary_config())
    if cfg.subtracts_b_dec and "W_enc" in params:
        normalised = normalised - jax.lax.stop_gradient(params["b_dec"])[None]
    return Rows(normalised, x, y, factors, first)


def _encoded(params: Params, x: jax.Array, cfg: TrainingConfig) -> jax.Array:
    """Returns ``(x - b_dec) W_enc``; ``x`` has ``b_dec`` subtracted, and this adds the derivative by it."""
    if "W_enc" not in params:
        return jnp.zeros((x.shape[0], cfg.d_sae), x.dtype)
    u = x @ params["W_enc"]
    if not cfg.subtracts_b_dec:
        return u
    nothing = jax.lax.stop_gradient(params["b_dec"]) - params["b_dec"]
    return u + (nothing @ jax.lax.stop_gradient(params["W_enc"]))[None]


def _cut(
    params: Params, u: jax.Array, norms: jax.Array, numbers: Numbers, cfg: TrainingConfig, guess: jax.Array
) -> Cut | None:
    if cfg.architecture != "batchtopk":
        return None
    b_enc, weights = jax.lax.stop_gradient((params["b_enc"], norms))

    def values_of(block: jax.Array) -> jax.Array:
        h = block + b_enc[None]
        return h * weights[None] if cfg.selects_by_norm else h

    keep = numbers["k"].astype(jnp.int32) * u.shape[0]
    return cut_batch(values_of, u, keep, guess)


def _over_chunks(chunk: Callable[..., _Sums], parts: tuple[jax.Array, ...], d_sae: int) -> _Sums:
    """Returns the sum over chunks of rows of what ``chunk(first row, parts)`` returns."""
    tokens = parts[0].shape[0]
    size = rows_at_once(tokens, d_sae)
    if size == tokens:
        return chunk(0, parts)
    firsts = jnp.arange(0, tokens, size, dtype=jnp.int32)
    split = tuple(part.reshape(-1, size, *part.shape[1:]) for part in parts)
    shapes = jax.eval_shape(lambda: chunk(firsts[0], tuple(part[0] for part in split)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: _Sums, inputs: tuple[Any, ...]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, chunk(*inputs)), None

    return jax.lax.scan(add, zeros, (firsts, split))[0]


def rows_at_once(tokens: int, d_sae: int) -> int:
    """Returns how many rows of a batch are gone through at once: a divisor of their number."""
    if jax.default_backend() != "cpu":
        return tokens
    most = max(1, _CHUNK_BYTES // (4 * d_sae))
    if tokens <= most:
        return tokens
    best = next(size for size in range(most, 0, -1) if tokens % size == 0)
    return best if best * 8 >= most else tokens
