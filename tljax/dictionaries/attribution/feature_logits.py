"""Direct logit attribution of features: which tokens a feature promotes, which features promote an answer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.access import refuse_norms_of_the_stream
from tljax.cache.activation_cache import ActivationCache
from tljax.cache.attribution import token_ids
from tljax.checks import typed, whole
from tljax.dictionaries.attribution.directions import (
    chosen_features,
    final_readout,
    stream_directions,
    through_to_stream,
    written_at,
)
from tljax.dictionaries.dictionary import Dictionary
from tljax.errors import DictionaryError, InputError
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureLogits:
    """The tokens whose logits a unit of each feature raises and lowers most, directly.

    Values are logits for one unit of activation times the final norm's scale of the run: divide by that scale (the
    cache's ``ln_final.hook_scale``) for a prompt. A soft cap of the logits is not applied.

    Attributes:
        features: numbers of the features, ``[feature]``.
        raised, lowered: ids of the tokens, ``[feature, k]``, strongest first.
        raised_by, lowered_by: by how much, ``[feature, k]``.
        mean, deviation: of all tokens' values, ``[feature]``; a feature whose strongest tokens stand out from these
            speaks of tokens.
        tokens: the texts of ``raised`` and ``lowered``, by id; empty without a tokenizer.
        convention: what the values are, in words.
    """

    features: np.ndarray
    raised: np.ndarray
    raised_by: np.ndarray
    lowered: np.ndarray
    lowered_by: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    tokens: dict[int, str]
    convention: str

    def table(self, k: int = 20) -> str:
        """Returns the first ``k`` features as a table in text, a line each."""
        lines = [f"feature  raises {'':<34} lowers"]
        for row, feature in enumerate(self.features[:k]):
            up, down = (
                ", ".join(f"{self._text(token)} {value:+.2f}" for token, value in zip(ids[row], by[row], strict=True))
                for ids, by in ((self.raised, self.raised_by), (self.lowered, self.lowered_by))
            )
            lines.append(f"{feature:>7}  {up:<41} {down}")
        left = len(self.features) - len(lines) + 1
        return "\n".join((*lines, *([f"and {left} more"] if left > 0 else [])))

    def __repr__(self) -> str:
        return f"FeatureLogits of {len(self.features)} features ({self.convention})"

    def __str__(self) -> str:
        return f"{self.table()}\n{self.convention}"

    def _text(self, token: int) -> str:
        return repr(self.tokens[int(token)]) if int(token) in self.tokens else str(token)


@typed
def feature_logits(
    model: HookedTransformer, dictionary: Dictionary, features: Any = None, *, k: int = 10, norm: bool = True
) -> FeatureLogits:
    """Computes which tokens' logits features raise and lower most, directly through the unembedding.

    A feature's direction in the residual stream goes through the linear part of the final norm (the mean is taken out
    under a layer norm, the weight applies where it is not folded into ``W_U``) and through ``W_U``. Whether ``W_U`` is
    centred is the model's own processing (``center_unembed``). What later layers do with the feature is left out.

    Args:
        model: the model.
        dictionary: a dictionary of one of its points.
        features: numbers of features; all by default.
        k: number of tokens.
        norm: ``False`` leaves the norm out, ``W_dec @ W_U``, as some dashboards do.

    Returns:
        For each feature ``k`` tokens each way.

    Raises:
        DictionaryError: features whose directions in the stream are not fixed, or of another width.
        InputError: a feature that does not exist.
    """
    refuse_norms_of_the_stream(model.cfg, "feature_logits")
    numbers = chosen_features(dictionary, features)
    k = whole(k, "k", at_least=1, at_most=model.cfg.d_vocab_out)
    readout = final_readout(model) if norm else model.W_U.astype(jnp.float32)
    at_once = max(1, how_many(4 * 4 * model.cfg.d_vocab_out))
    parts = []
    for first in range(0, len(numbers), at_once):
        directions = stream_directions(model, dictionary, numbers[first : first + at_once])
        parts.append([np.asarray(one) for one in _strongest(directions, readout.astype(directions.dtype), k)])
    raised_by, raised, lowered_by, lowered, mean, deviation = (np.concatenate(one) for one in zip(*parts, strict=True))
    texts: dict[int, str] = {}
    if model.tokenizer is not None:
        ids = np.unique(np.concatenate([raised.ravel(), lowered.ravel()]))
        texts = dict(zip(map(int, ids), map(str, model.to_str_tokens(ids)), strict=True))
    how = "final norm's linear part and W_U" if norm else "W_U alone, without the final norm"
    capped = ", before the soft cap" if model.cfg.output_logits_soft_cap > 0 else ""
    said = f"logits for one unit of activation through {how}, times the norm's scale{capped}"
    return FeatureLogits(
        numbers,
        raised,
        raised_by,
        lowered,
        -lowered_by,
        mean,
        deviation,
        texts,
        said if norm else said.replace(", times the norm's scale", ""),
    )


@jax.jit
def _products(directions: jax.Array, readout: jax.Array) -> jax.Array:
    return jnp.matmul(directions, readout, precision="highest")


def _strongest(directions: jax.Array, readout: jax.Array, k: int) -> tuple[jax.Array, ...]:
    logits = _products(directions, readout)
    return (*jax.lax.top_k(logits, k), *jax.lax.top_k(-logits, k), logits.mean(axis=1), logits.std(axis=1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DirectFeatureAttribution:
    """What each feature of a dictionary adds directly to a logit, or to a difference of two, at a position of a prompt.

    Attributes:
        attribution: ``[batch, d_sae]``; 0 for features that are not active.
        activations: the features, ``[batch, d_sae]``.
        bias: what the dictionary's bias adds, ``[batch]``; of skip transcoders also what the skip connection does.
        error: what the part of the activation adds that the dictionary does not reconstruct, ``[batch]``.
        total: what the whole activation adds, ``[batch]``: the sum of the three.
        point: where the dictionary writes.
    """

    attribution: np.ndarray
    activations: np.ndarray
    bias: np.ndarray
    error: np.ndarray
    total: np.ndarray
    point: str

    @typed
    def top(self, k: int = 10) -> list[tuple[int, float]]:
        """Returns the ``k`` features that add most, on average over prompts, largest in size first."""
        whole(k, "k", at_least=1)
        mean = self.attribution.mean(axis=0)
        order = np.argsort(-np.abs(mean), kind="stable")[:k]
        return [(int(feature), float(mean[feature])) for feature in order if mean[feature] != 0]

    def __repr__(self) -> str:
        best = ", ".join(f"{feature}: {value:+.3g}" for feature, value in self.top(3))
        total, error = float(self.total.mean()), float(self.error.mean())
        return f"DirectFeatureAttribution at {self.point}: {total:+.3g} in all, {error:+.3g} of it error; {best}"


@typed
def direct_feature_attribution(
    model: HookedTransformer,
    dictionary: Dictionary,
    prompt: Any,
    answer: Any,
    wrong: Any = None,
    *,
    pos: int = -1,
) -> DirectFeatureAttribution:
    """Computes what each active feature of a prompt adds directly to the logit of an answer.

    Activation times direction, through the final norm with its scale of this very run, and the unembedding, as
    :func:`tljax.analysis.direct_logit_attribution` does it for heads and neurons. Soft caps are left out.

    Args:
        model: the model.
        dictionary: a dictionary of one of its points; where it belongs must be known.
        prompt: text, a list of texts, or token ids.
        answer: a string that is one token, an id, or one for each prompt.
        wrong: as many tokens whose logits are subtracted.
        pos: the position whose logits are read, counted in each prompt's text.

    Raises:
        DictionaryError: the dictionary does not say where it belongs, or does not fit the model.
    """
    refuse_norms_of_the_stream(model.cfg, "direct_feature_attribution")
    written, reads = written_at(dictionary), dictionary.cfg.tap.reads
    if written is None or reads is None:
        raise DictionaryError(
            f"{dictionary!r} does not say where it reads (cfg.tap.reads is None): give its config a tap, "
            'dictionary.replace(cfg=dataclasses.replace(cfg, tap=Tap(reads="blocks.2.hook_resid_pre"))).'
        )
    ids, others = token_ids(model, answer, wrong)
    if ids.ndim > 1:
        raise InputError(f"Give one answer, or one for each prompt; got tokens of shape {ids.shape}.")
    scale_name = "ln_final.hook_scale" if model.cfg.normalization_type is not None else written
    _, cache = model.run_with_cache(prompt, names_filter=[*dict.fromkeys([reads, written, scale_name])])
    assert isinstance(cache, ActivationCache)
    x, y, scale = (_at(cache, name, pos) for name in (reads, written, scale_name))
    if (head := dictionary.cfg.tap.head) is not None:
        x, y = x[:, head], y[:, head]
    if ids.ndim and len(ids) != len(x):
        raise InputError(f"There are {len(x)} prompts and {len(ids)} answers: give one answer, or one each.")
    direction = final_readout(model, jnp.atleast_1d(ids)).T  # [batch or 1, d_model]
    direction = direction if others is None else direction - final_readout(model, jnp.atleast_1d(others)).T
    if model.cfg.normalization_type is not None:
        direction = direction / scale.reshape(-1, 1).astype(direction.dtype)
    direction = jnp.broadcast_to(direction, (len(x), model.cfg.d_model))
    return _attributed(model, dictionary, x, y, direction, written)


def _attributed(
    model: HookedTransformer, dictionary: Dictionary, x: jax.Array, y: jax.Array, direction: jax.Array, written: str
) -> DirectFeatureAttribution:
    """Splits the direct contribution of activations ``y`` ``[batch, ...]``, of which the dictionary read ``x``."""
    encoded = dictionary.encode_at(x)
    features = encoded.features if encoded.predicted is None else encoded.features + encoded.predicted
    slopes = jnp.matmul(direction, stream_directions(model, dictionary).T.astype(direction.dtype), precision="highest")
    undone = jnp.asarray(encoded.factors.scale, direction.dtype)
    if dictionary.cfg.normalize_activations == "constant_scalar_rescale":
        undone = jnp.ones((), direction.dtype)  # the directions have it
    each = np.asarray(features * slopes * undone)
    merged = y.reshape(len(y), -1)

    def along(vectors: jax.Array) -> np.ndarray:
        stream = through_to_stream(model, dictionary, vectors.astype(direction.dtype))
        return np.asarray((stream * direction).sum(axis=-1))

    whole_of = dictionary(x).reconstruction.reshape(len(y), -1)
    total, made = along(merged), along(whole_of)
    return DirectFeatureAttribution(each, np.asarray(features), made - each.sum(axis=-1), total - made, total, written)


def _at(cache: ActivationCache, name: str, pos: int) -> jax.Array:
    """Returns an activation at one position of each prompt's text, ``[batch, ...]``."""
    value = cache[name]
    mask = cache.token_mask
    if mask is None:
        return value[:, pos]
    places = [np.flatnonzero(row)[pos] for row in np.asarray(mask)]
    return value[jnp.arange(len(value)), jnp.asarray(places)]
