"""The losses of dictionaries: pure functions of parameters, rows of a batch, coefficients and dead features.

Every loss is a mean over tokens, so that a batch can be gone through in chunks: a chunk gives its share of the mean.
Names of the terms are SAELens's. Published forms: L1 with decoder norms (Anthropic, April 2024), gated
(arXiv:2404.16014), JumpReLU (arXiv:2407.14435), TopK with AuxK (arXiv:2406.04093), BatchTopK (arXiv:2412.06410),
Matryoshka (arXiv:2503.17547).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.matching_pursuit import pursue
from tljax.dictionaries.maths.normalization import Factors
from tljax.dictionaries.training.auxiliary import auxiliary_loss
from tljax.dictionaries.training.coefficients import Numbers
from tljax.dictionaries.training.config import TOP_K, TrainingConfig
from tljax.dictionaries.training.estimators import jumprelu, rectangle, step
from tljax.dictionaries.training.pieces import Pieces, find_pieces
from tljax.dictionaries.training.rows import add_row, column_sums, scale_columns, square_sum
from tljax.dictionaries.training.selection import Cut, cut_rows
from tljax.dictionaries.training.sparse_products import decoded

Params = Mapping[str, jax.Array]


class Setting(NamedTuple):
    """What a loss depends on besides parameters and rows.

    Attributes:
        numbers: the coefficients at this step, and other numbers of the run.
        dead: mask of dead features, ``[d_sae]``.
        any_dead: whether there are any, in any member of a stack; a scalar that is the same for all members.
        cut: the selection of the whole batch, of ``batchtopk``.
        tokens: number of tokens that the mean is over.
        sparse: whether active features are looked for, to decode only those where they are few.
    """

    numbers: Numbers
    dead: jax.Array
    any_dead: jax.Array
    cut: Cut | None
    tokens: int
    sparse: bool = False


class Rows(NamedTuple):
    """Some rows of a batch.

    Attributes:
        x: what is encoded, normalised and less ``b_dec`` where that is subtracted, ``[rows, d_in]``; matching pursuit,
            whose encoder is no linear map, subtracts it itself.
        raw: the same before that.
        y: what is reconstructed, ``[rows, d_out]``.
        factors: what undoes the normalisation.
        first: number of the first row in the batch.
    """

    x: jax.Array
    raw: jax.Array
    y: jax.Array
    factors: Factors
    first: jax.Array | int


class Outcome(NamedTuple):
    """What some rows gave.

    Attributes:
        terms: terms of the loss, their sum is the total.
        fired: in how many rows each feature fired, ``[d_sae]``.
        error: sum of squared errors.
    """

    terms: dict[str, jax.Array]
    fired: jax.Array
    error: jax.Array


class _Code(NamedTuple):
    """What the encoder makes of some rows.

    Attributes:
        features: that are decoded, ``[rows, d_sae]``.
        terms: that make them sparse.
        support: mask of what is not 0 in them, nor in any gradient by the pre-activations; ``None`` if it is unknown.
        pieces: the same as lists; ``None`` where they are not looked for.
    """

    features: jax.Array
    terms: dict[str, jax.Array]
    support: jax.Array | None = None
    pieces: Pieces | None = None


def decoder_norms(W_dec: jax.Array, n_sources: int | None) -> jax.Array:
    """Returns the norm of each decoder row, ``[d_sae]``, with derivative 0 at rows of zeros.

    Args:
        W_dec: ``[d_sae, d_out]``.
        n_sources: of a crosscoder, whose rows count the sum of their norms in each source.
    """
    parts = W_dec.reshape(W_dec.shape[0], n_sources or 1, -1)
    squares = (parts**2).sum(axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0).sum(axis=-1)


def loss_of_rows(
    params: Params, norms: jax.Array, u: jax.Array, rows: Rows, setting: Setting, cfg: TrainingConfig
) -> tuple[jax.Array, tuple[Outcome, jax.Array, jax.Array, Pieces | None]]:
    """Computes the share of some rows in a loss.

    Args:
        params: the parameters; ``W_enc`` is not read.
        norms: of the decoder rows, ``[d_sae]``.
        u: ``x @ W_enc``, ``[rows, d_sae]``; ignored by matching pursuit.
        rows: the rows.
        setting: what else the loss depends on.
        cfg: what is computed.

    Returns:
        The total, and ``(outcome, features [rows, d_sae], reconstruction [rows, d_out], pieces)``; the pieces hold the
        support of the features and, but for the auxiliary loss of dead features, of the gradient by ``u``.
    """
    numbers, share = setting.numbers, 1 / setting.tokens
    code = _features_and_penalty(params, norms, u, rows, setting, cfg)
    features, sparsity = code.features, code.terms
    outputs = _decode(code, params, cfg)
    output = rows.factors.undo(outputs[-1])
    if "W_skip" in params:
        output = output + rows.raw @ params["W_skip"].T
    error = square_sum(output - rows.y)
    terms = {"mse_loss": error * share} | sparsity
    if cfg.architecture in TOP_K:
        terms["auxiliary_reconstruction_loss"] = numbers["aux_loss_coefficient"] * _auxiliary(
            params, norms, u, rows, setting, cfg, [rows.factors.undo(one) for one in outputs[:-1]] + [output]
        )
    for width, one in zip(cfg.matryoshka_widths[:-1], outputs[:-1], strict=True):
        terms[f"inner_mse_loss_{width}"] = square_sum(rows.factors.undo(one) - rows.y) * share
    fired = column_sums(jax.lax.stop_gradient(features != 0).astype(features.dtype))
    total = jnp.stack(list(terms.values())).sum()
    shown = scale_columns(features, norms) if cfg.selects_by_norm else features
    return total, (Outcome(terms, fired, error), shown, output, code.pieces)


def _features_and_penalty(
    params: Params, norms: jax.Array, u: jax.Array, rows: Rows, setting: Setting, cfg: TrainingConfig
) -> _Code:
    """Returns the features that are decoded, and the terms that make them sparse."""
    numbers, share = setting.numbers, 1 / setting.tokens
    match cfg.architecture:
        case "gated":
            return _gated(params, norms, u, rows, setting, cfg)
        case "matching_pursuit":
            x = add_row(rows.x, -params["b_dec"]) if cfg.subtracts_b_dec else rows.x
            return _Code(pursue(x, params["W_dec"], cfg.dictionary_config()), {})
        case "jumprelu":
            return _jumprelu(params, norms, u, setting, cfg)
        case "standard":
            features = jax.nn.relu(add_row(u, params["b_enc"]))
            l1 = _penalty(features, norms, cfg.lp_norm) * share
            return _code(features, {"l1_loss": numbers["l1_coefficient"] * l1}, features != 0, setting)
    h = add_row(u, params["b_enc"])
    keeps = _kept(h, norms, rows, setting, cfg)
    if cfg.architecture == "abstopk":
        return _code(jnp.where(keeps, h, 0), {}, keeps, setting)
    features = jnp.where(keeps, jax.nn.relu(h), 0)
    return _code(features, {}, features != 0, setting)


def _code(features: jax.Array, terms: dict[str, jax.Array], support: jax.Array, setting: Setting) -> _Code:
    return _Code(features, terms, support, find_pieces(support) if setting.sparse else None)


def _kept(h: jax.Array, norms: jax.Array, rows: Rows, setting: Setting, cfg: TrainingConfig) -> jax.Array:
    """Returns the mask of the features that are kept."""
    values = jax.lax.stop_gradient(h)
    values = values * jax.lax.stop_gradient(norms)[None] if cfg.selects_by_norm else values
    if setting.cut is not None:
        return setting.cut.keeps(values, rows.first)
    values = jnp.abs(values) if cfg.architecture == "abstopk" else values
    return cut_rows(values, setting.numbers["k"], cfg.k or 1).keeps(values)


def _penalty(features: jax.Array, norms: jax.Array, p: float) -> jax.Array:
    """Returns the sum over tokens of ``(sum_i (f_i norm_i)^p)^(1/p)``; the derivative at 0 is 0."""
    if p == 1:
        return column_sums(features) @ norms
    weighted = scale_columns(features, norms)
    powers = jnp.where(weighted > 0, jnp.where(weighted > 0, weighted, 1) ** p, 0).sum(axis=-1)
    return jnp.where(powers > 0, jnp.where(powers > 0, powers, 1) ** (1 / p), 0).sum()


def _gated(params: Params, norms: jax.Array, u: jax.Array, rows: Rows, setting: Setting, cfg: TrainingConfig) -> _Code:
    share = 1 / setting.tokens
    gate = add_row(u, params["b_gate"])
    magnitude = add_row(scale_columns(u, jnp.exp(params["r_mag"])), params["b_mag"])
    features = jnp.where(gate > 0, jax.nn.relu(magnitude), 0)
    open_gate = jax.nn.relu(gate)
    l1 = _penalty(open_gate, norms, 1.0) * share
    support = ~(gate <= 0)
    pieces = find_pieces(support) if setting.sparse else None
    W_dec, b_dec = params["W_dec"], params["b_dec"]
    if cfg.gated_stop_gradient:
        W_dec, b_dec = jax.lax.stop_gradient((W_dec, b_dec))
    through_gate = rows.factors.undo(add_row(decoded(open_gate, W_dec, pieces), b_dec))
    terms = {
        "l1_loss": setting.numbers["l1_coefficient"] * l1,
        "auxiliary_reconstruction_loss": square_sum(rows.y - through_gate) * share,
    }
    return _Code(features, terms, support, pieces)


def _jumprelu(params: Params, norms: jax.Array, u: jax.Array, setting: Setting, cfg: TrainingConfig) -> _Code:
    numbers, share = setting.numbers, 1 / setting.tokens
    h, threshold, to_input = add_row(u, params["b_enc"]), params["threshold"], cfg.jumprelu_ste_to_input
    bandwidth = numbers["jumprelu_bandwidth"]
    features = jumprelu(h, threshold, bandwidth, to_input)
    if cfg.jumprelu_sparsity_loss == "tanh":
        active = jnp.tanh(numbers["jumprelu_tanh_scale"] * scale_columns(features, norms))
    else:
        active = step(h, threshold, bandwidth, to_input)
    if cfg.l0_target is not None:
        target = numbers["l0_target"]
        l0 = (2 / target * (active.sum(axis=-1) - target) ** 2).sum()
    else:
        l0 = column_sums(active).sum()
    terms = {"l0_loss": numbers["l0_coefficient"] * l0 * share}
    if cfg.pre_act_loss_coefficient is not None:
        short = jax.nn.relu(threshold[None] - h)
        weights = jnp.where(setting.dead, norms, 0)
        terms["pre_act_loss"] = numbers["pre_act_loss_coefficient"] * (column_sums(short) @ weights) * share
        return _Code(features, terms)
    return _code(features, terms, (features != 0) | (rectangle(h, threshold, bandwidth) != 0), setting)


def _decode(code: _Code, params: Params, cfg: TrainingConfig) -> list[jax.Array]:
    """Returns the reconstructions from each prefix of the features; the last one is from all."""
    outputs, start, output = [], 0, None
    has_bias = cfg.architecture != "matching_pursuit" or cfg.subtracts_b_dec
    for width in cfg.matryoshka_widths or (cfg.d_sae,):
        pieces = code.pieces
        if pieces is not None and code.support is not None and width - start < cfg.d_sae:
            pieces = find_pieces(code.support[:, start:width])
        part = decoded(code.features[:, start:width], params["W_dec"][start:width], pieces)
        part = add_row(part, params["b_dec"]) if start == 0 and has_bias else part
        output = part if output is None else output + part
        outputs.append(output)
        start = width
    return outputs


def _auxiliary(
    params: Params,
    norms: jax.Array,
    u: jax.Array,
    rows: Rows,
    setting: Setting,
    cfg: TrainingConfig,
    outputs: list[jax.Array],
) -> jax.Array:
    """Returns the auxiliary loss of dead features: one for all, or one for the new features of each prefix."""
    if cfg.matryoshka_aux_loss:
        spans = list(zip((0, *cfg.matryoshka_widths[:-1]), cfg.matryoshka_widths, outputs, strict=True))
    else:
        spans = [(0, cfg.d_sae, outputs[-1])]
    share = 1 / setting.tokens
    residuals = tuple(jax.lax.stop_gradient(rows.y - output) for _, _, output in spans)

    def losses(u: jax.Array, b_enc: jax.Array, W_dec: jax.Array, norms: jax.Array) -> jax.Array:
        h = add_row(u, b_enc)
        parts = [
            auxiliary_loss(
                h[:, start:end], W_dec[start:end], norms[start:end], setting.dead[start:end], residual, cfg, rows.x
            )
            for (start, end, _), residual in zip(spans, residuals, strict=True)
        ]
        return jnp.stack(parts).sum() * share

    def none(u: jax.Array, b_enc: jax.Array, W_dec: jax.Array, norms: jax.Array) -> jax.Array:
        return jnp.zeros((), u.dtype)

    still = jax.lax.stop_gradient(norms)
    return jax.lax.cond(setting.any_dead, losses, none, u, params["b_enc"], params["W_dec"], still)
