"""From the state of training to the dictionary that is used: folds, thresholds, firing rates."""

import json

import jax
import jax.numpy as jnp

from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.folding import fold_W_dec_norm
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.losses import decoder_norms
from tljax.dictionaries.training.preparation import Preparation, Whitening
from tljax.dictionaries.training.step import TrainingState

_SMALLEST = 1e-8


def finished(state: TrainingState, cfg: TrainingConfig, preparation: Preparation) -> Dictionary | Crosscoder:
    """Returns the dictionary that takes raw activations.

    The scale or whitening of activations is folded into the weights. A dictionary that selects by decoder norms has
    them folded, and a ``batchtopk`` one becomes ``jumprelu`` with one threshold for all features: what SAELens saves.
    """
    params, threshold = dict(state.params), state.threshold
    if cfg.n_sources:
        return _crosscoder(params, threshold, cfg, preparation)
    params, threshold = _folded(params, threshold, cfg, preparation)
    config = cfg.dictionary_config().replace(
        normalize_activations=cfg.normalize_activations
        if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
        else "none",
        rescale_acts_by_decoder_norm=cfg.selects_by_norm and preparation.whitening is None,
        metadata=_metadata(state, cfg),
    )
    if cfg.architecture == "matching_pursuit" and preparation.scale_in is not None:
        config = config.replace(residual_threshold=config.residual_threshold / float(preparation.scale_in))
    rates = jnp.log10(state.fired / jnp.maximum(state.tokens, 1) + 1e-10)
    dictionary = Dictionary(params, config, rates)
    if config.rescale_acts_by_decoder_norm:
        dictionary = fold_W_dec_norm(dictionary)
    if cfg.architecture != "batchtopk":
        return dictionary
    level = jnp.full(cfg.d_sae, threshold, params["W_dec"].dtype)
    config = dictionary.cfg.replace(architecture="jumprelu", k=None, matryoshka_widths=())
    return Dictionary({**dictionary.params, "threshold": level}, config, rates)


def _folded(
    params: dict[str, jax.Array], threshold: jax.Array, cfg: TrainingConfig, preparation: Preparation
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns parameters, and ``batchtopk``'s threshold, for raw activations."""
    if preparation.whitening is not None:
        return _unwhitened(params, threshold, cfg, preparation.whitening)
    scale_in, scale_out = preparation.scale_in, preparation.scale_out
    if scale_in is None or scale_out is None:
        return params, threshold
    params |= {name: params[name] / scale_out for name in ("W_dec", "b_dec")}
    if "W_enc" in params:
        params["W_enc"] = params["W_enc"] * scale_in
    if cfg.architecture == "matching_pursuit":  # features are products with decoder rows
        params["W_dec"] = params["W_dec"] * scale_out
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"] * (scale_in / scale_out)
    return params, threshold / scale_out if cfg.selects_by_norm else threshold


def _unwhitened(
    params: dict[str, jax.Array], threshold: jax.Array, cfg: TrainingConfig, whitening: Whitening
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Folds the whitening: ``((x - mean) whiten - b_dec) W_enc`` is ``(x - b) (whiten W_enc)`` with the new ``b``."""
    mean, whiten, colour = whitening
    if cfg.selects_by_norm:  # by the norms under whitening: they are folded before it is undone
        norms = jnp.maximum(decoder_norms(params["W_dec"], None), _SMALLEST)
        params |= {
            "W_enc": params["W_enc"] * norms[None], "b_enc": params["b_enc"] * norms,
            "W_dec": params["W_dec"] / norms[:, None],
        }  # fmt: skip
    with jax.default_matmul_precision("highest"):
        params["W_enc"] = whiten @ params["W_enc"]
        params["W_dec"] = params["W_dec"] @ colour
        params["b_dec"] = params["b_dec"] @ colour + mean
        if not cfg.subtracts_b_dec:
            params |= {name: params[name] - mean @ params["W_enc"] for name in ("b_enc",)}
    return params, threshold


def _crosscoder(
    params: dict[str, jax.Array], threshold: jax.Array, cfg: TrainingConfig, preparation: Preparation
) -> Crosscoder:
    n, d, f = cfg.n_sources or 1, cfg.d_in, cfg.d_sae
    norms = jnp.maximum(decoder_norms(params["W_dec"], n), _SMALLEST)
    scale = jnp.ones(n) if preparation.scale_in is None else preparation.scale_in
    W_enc = params["W_enc"].reshape(n, d, f)
    W_dec, b_dec = params["W_dec"].reshape(f, n, d), params["b_dec"].reshape(n, d)
    b_enc, config = params["b_enc"], cfg.crosscoder_config()
    arrays = {} if "threshold" not in params else {"threshold": params["threshold"]}
    if cfg.selects_by_norm:
        W_enc, b_enc, W_dec = W_enc * norms[None, None], b_enc * norms, W_dec / norms[:, None, None]
    if cfg.architecture == "batchtopk":
        arrays["threshold"] = jnp.full(f, threshold, W_dec.dtype)
        config = cfg.replace(architecture="jumprelu", k=None, rescale_acts_by_decoder_norm=False).crosscoder_config()
    arrays |= {
        "W_enc": W_enc * scale[:, None, None], "b_enc": b_enc,
        "W_dec": W_dec / scale[None, :, None], "b_dec": b_dec / scale[:, None],
    }  # fmt: skip
    return Crosscoder(arrays, config)


def _metadata(state: TrainingState, cfg: TrainingConfig) -> tuple[tuple[str, str], ...]:
    architecture = "matryoshka_batchtopk" if cfg.matryoshka_widths else cfg.architecture
    facts = {
        "training_architecture": architecture,
        "l0": float(state.fired.sum() / jnp.maximum(state.tokens, 1)),
        "num_dead_features": int((state.quiet > cfg.dead_feature_window).sum()),
    }
    return tuple((name, json.dumps(value)) for name, value in facts.items())
