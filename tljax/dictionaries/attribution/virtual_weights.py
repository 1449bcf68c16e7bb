"""Weights between features: from one dictionary's decoder to another's encoder, and features that look alike."""

from typing import Any

import jax.numpy as jnp

from tljax.cache.access import centres
from tljax.checks import entry, typed, whole
from tljax.dictionaries.attribution.directions import (
    STREAM,
    chosen_features,
    decoder_rows,
    stream_directions,
    written_at,
)
from tljax.dictionaries.dictionary import Dictionary, TopFeatures
from tljax.errors import ConfigError, DictionaryError, InputError
from tljax.hooks.points import layer_of, point_table, stage_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.activations import scaled
from tljax.modules.norm import norm_gain
from tljax.numerics import widened
from tljax.weights.circuits import why_no_matrix
from tljax.weights.factored_matrix import FactoredMatrix

_BEFORE_GAIN = {"ln1.hook_normalized": "ln1", "ln2.hook_normalized": "ln2"}
_AFTER_GAIN = {"mlp.hook_in": "ln2"}


@typed
def virtual_weights(
    source: Dictionary,
    target: Dictionary,
    model: HookedTransformer | None = None,
    *,
    features: Any = None,
    target_features: Any = None,
    through: tuple[int, int] | None = None,
) -> FactoredMatrix:
    """Computes the virtual weights from the features of one dictionary to those of a later one.

    Entry ``[i, j]`` is what one unit of the source's feature ``i`` adds to the pre-activation of the target's feature
    ``j`` directly, along the residual stream: the decoder's row times the encoder's column, ``W_dec @ W_enc``. A
    target that reads a normalised stream sees it through the norm's linear part (centring, weight), and the entries are
    to be divided by the norm's scale of a run. ``through`` takes the path of one attention head instead, ``W_dec @ W_V
    @ W_O @ W_enc``, for an attention pattern of 1 and without ``ln1``'s scale.

    Args:
        source: the dictionary whose features write.
        target: the dictionary whose features read, of a later point.
        model: the model; needed to leave ``attn.hook_z`` or ``mlp.hook_post``, for a norm, and for ``through``.
        features, target_features: numbers of features of each; all by default.
        through: layer and head.

    Returns:
        ``[feature, target_feature]`` as a :class:`~tljax.FactoredMatrix`; ``.AB`` forms the product.

    Raises:
        DictionaryError: widths that differ, a target that does not read the residual stream, or that comes first.
        InputError: a feature or a head that does not exist.

    >>> import jax
    >>> from tljax.dictionaries import Dictionary, DictionaryConfig
    >>> def made(seed):
    ...     one, other = jax.random.normal(jax.random.key(seed), (2, 4, 6))
    ...     params = {"W_enc": one, "W_dec": other.T, "b_enc": jnp.zeros(6), "b_dec": jnp.zeros(4)}
    ...     return Dictionary(params, DictionaryConfig(d_in=4, d_sae=6))
    >>> virtual_weights(made(0), made(1)).shape
    (6, 6)
    """
    rows = chosen_features(source, features)
    columns = chosen_features(target, target_features)
    _check_order(source, target, model, through)
    leaving = decoder_rows(source, rows) if model is None else stream_directions(model, source, rows)
    if model is None and _relative(written_at(source)) in ("attn.hook_z", "mlp.hook_post"):
        raise DictionaryError(
            f"{source!r} writes before the residual stream: give the model, whose weights lead there."
        )
    if through is not None:
        leaving = _through_head(model, leaving, through)
    encoder = target.W_enc[:, jnp.asarray(columns)].astype(leaving.dtype)
    if target.cfg.normalize_activations == "constant_scalar_rescale":
        encoder = encoder * target.cfg.scale
    encoder = _before_reading(model, target, encoder, through)
    if leaving.shape[-1] != encoder.shape[0]:
        raise DictionaryError(
            f"{source!r} writes {leaving.shape[-1]} numbers and {target!r} reads {encoder.shape[0]}: they do not share "
            "a residual stream."
        )
    return FactoredMatrix(leaving, encoder)


@typed
def similar_features(
    dictionary: Dictionary, feature: int, k: int = 10, *, other: Dictionary | None = None
) -> TopFeatures:
    """Finds the features whose decoder directions are most alike, by cosine.

    Args:
        dictionary: the dictionary.
        feature: one of its features.
        k: how many others.
        other: another dictionary of the same width, to look in instead.

    Returns:
        Cosines and numbers, ``[k]`` each, most alike first; without the feature itself.

    Raises:
        DictionaryError: ``other`` has another width.
        InputError: a feature that does not exist.
    """
    number = entry(feature, dictionary.cfg.d_sae, "feature", "features")
    looked_in = dictionary if other is None else other
    if looked_in.cfg.output_width != dictionary.cfg.output_width:
        raise DictionaryError(
            f"Directions of {dictionary.cfg.output_width} and {looked_in.cfg.output_width} numbers do not compare."
        )
    k = whole(k, "k", at_least=1)
    rows, own = looked_in.W_dec, dictionary.W_dec[number].astype(looked_in.dtype)
    norms = looked_in.decoder_norms * jnp.linalg.norm(own)
    cosines = jnp.matmul(rows, own, precision="highest") / jnp.where(norms == 0, 1, norms)
    if other is None:
        cosines = cosines.at[number].set(-jnp.inf)
    order = jnp.argsort(-cosines)[: min(k, len(cosines) - (other is None))]
    return TopFeatures(cosines[order], order)


def _relative(name: str | None) -> str:
    return "hook_resid_pre" if name is None else stage_of(name)[1]


def _through_head(model: HookedTransformer | None, rows: Any, through: tuple[int, int]) -> Any:
    if model is None:
        raise InputError("through= goes through the weights of a head: give the model too.")
    layer = entry(through[0], model.cfg.n_layers, "layer", "layers")
    head = entry(through[1], model.cfg.n_heads, "head", "heads")
    if (reason := why_no_matrix(model.cfg, "OV")) is not None:
        raise ConfigError(f"This model's heads have no OV matrix: {reason}.")
    if model.cfg.has_norms_after:
        raise ConfigError("A norm follows attention in this model (ln1_post), so a head's output is no linear path.")
    attention = model.blocks[layer].attn
    group = model.cfg.n_heads // attention.W_V.shape[0]
    reading = _normed(model, layer, "ln1", attention.W_V[head // group].astype(rows.dtype))
    values = jnp.matmul(rows, reading, precision="highest")
    moved = jnp.matmul(values, attention.W_O[head].astype(rows.dtype), precision="highest")
    return scaled(moved, model.cfg.residual_multiplier)


def _normed(model: HookedTransformer, layer: int, norm: str, columns: Any, gain: bool = True) -> Any:
    """Returns weights ``[d_model, n]`` as they read the stream before a norm, through its centring and its weight."""
    cfg = model.cfg
    if cfg.normalization_type is None or not cfg.has_norms_before:
        return columns
    weight = norm_gain(cfg, model.params["blocks"][layer].get(norm, {})) if gain else None
    columns = columns if weight is None else columns * weight.astype(columns.dtype)[:, None]
    return columns - columns.mean(axis=0, keepdims=True) if centres(cfg, layer) else columns


def _before_reading(
    model: HookedTransformer | None, target: Dictionary, encoder: Any, through: tuple[int, int] | None
) -> Any:
    """Returns the encoder as it reads the residual stream itself."""
    encoder = encoder.astype(widened(encoder.dtype))
    name = target.cfg.tap.reads
    relative = _relative(name)
    if relative in STREAM or relative == "hook_mlp_in":
        return encoder
    if relative == "hook_attn_out" and through is not None and through[0] == layer_of(name or ""):
        return encoder
    if relative in _BEFORE_GAIN or relative in _AFTER_GAIN:
        if model is None:
            raise DictionaryError(f"{target!r} reads the stream through a norm: give the model, whose norm it is.")
        gain = relative in _AFTER_GAIN or bool(target.cfg.tap.gain)
        return _normed(model, layer_of(name or "") or 0, (_AFTER_GAIN | _BEFORE_GAIN)[relative], encoder, gain)
    raise DictionaryError(
        f"{target!r} does not read the residual stream, so nothing that another dictionary writes reaches it directly. "
        "Take the edges of a circuit, feature_circuit(...), which follow any path."
    )


def _check_order(
    source: Dictionary, target: Dictionary, model: HookedTransformer | None, through: tuple[int, int] | None
) -> None:
    first, last = written_at(source), target.cfg.tap.reads
    if first is None or last is None:
        return
    if model is not None:
        order = {name: place for place, name in enumerate(point_table(model.cfg))}
        if missing := [name for name in (first, last) if name not in order]:
            raise DictionaryError(f"The model has no point {missing[0]}: the dictionaries belong to another model.")
        backwards = order[first] > order[last]
    else:
        backwards = (layer_of(first) or 0) > (layer_of(last) or 0)
    if backwards:
        raise DictionaryError(
            f"{target!r} reads before {source!r} writes, so there are no weights between them. Swap the two?"
        )
    if through is not None and not (layer_of(first) or 0) <= through[0] <= (layer_of(last) or 0):
        raise InputError(f"through=({through[0]}, {through[1]}): this head is not between {first} and {last}.")
