"""One vector of activations and of features for each prompt, which probes read."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tljax.checks import entry, typed, whole
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.running import Runs, excluded_ids
from tljax.dictionaries.evaluation.sites import Sites
from tljax.errors import DictionaryError, InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress

Ablation = Literal["zero", "mean"]
"""What takes the place of features that are taken out."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PooledFeatures:
    """Activations and features of prompts, one vector of each for a prompt.

    Attributes:
        activations: ``[prompt, width]``, what the dictionary reconstructs.
        features: ``[prompt, d_sae]``.
        written: ``[prompt, d_sae]``, how much of each direction the features add to the reconstruction; the features
            themselves unless the dictionary undoes a normalisation or divides by decoder norms.
        directions: ``[d_sae, width]``, the decoder.
    """

    activations: np.ndarray
    features: np.ndarray
    written: np.ndarray
    directions: np.ndarray

    def __post_init__(self) -> None:
        n, width = np.shape(self.activations)
        d_sae = np.shape(self.features)[-1]
        shapes = {"features": (n, d_sae), "written": (n, d_sae), "directions": (d_sae, width)}
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise InputError(f"{name} has shape {np.shape(getattr(self, name))}; activations need {shape}.")

    def __repr__(self) -> str:
        return f"PooledFeatures({len(self.features)} prompts, {self.features.shape[1]} features)"

    def without(self, features: Sequence[int] | np.ndarray, ablation: Ablation = "zero") -> np.ndarray:
        """Returns the activations ``[prompt, width]`` with features taken out; the dictionary's error stays.

        Args:
            features: which.
            ablation: whether zero takes their place, or their mean over the prompts.
        """
        chosen = np.asarray(features, int)
        own = self.written[:, chosen]
        return self.activations - (own - own.mean(0) if ablation == "mean" else own) @ self.directions[chosen]


@typed
def pool_features(
    model: HookedTransformer,
    dictionary: Dictionary,
    prompts: Any,
    *,
    pos: int | None = None,
    batch_size: int = 8,
    exclude_tokens: Sequence[int] | Literal["special"] | None = None,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> PooledFeatures:
    """Runs prompts and pools activations and features over each.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: a sparse autoencoder or transcoder.
        prompts: texts, token ids ``[batch, pos]`` or a ``Batch``.
        pos: the position to read, counted in each prompt's text, negative from its end; ``None`` takes the mean over
            the tokens that count.
        batch_size: prompts in one run.
        exclude_tokens: ids of tokens that are left out of the mean; ``"special"`` means the tokenizer's special tokens.
        prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos``.
        progress: whether to show a bar; ``None`` shows one after three seconds.

    Raises:
        DictionaryError: the dictionary does not fit the model.
        InputError: no prompts, a prompt without that position or without tokens that count.
    """
    whole(batch_size, "batch_size", at_least=1)
    sites = Sites.of(dictionary, model)
    if sites.heads[0] is not None and dictionary.cfg.transcoder:
        raise DictionaryError("A transcoder of one head cannot be pooled: read it at all heads.")
    runs = Runs.of(model, prompts, batch_size, excluded_ids(model, exclude_tokens), prepend_bos)
    weights = _weights(runs, pos)
    parts = []
    with Progress(len(runs), progress, "features", "batch") as bar:
        for run in runs:
            _, cache = model.run_with_cache(run.batch, names_filter=sites.names, return_type=None)
            values = {name: cache[name] for name in sites.names}
            own = np.zeros(run.counts.shape, np.float32)
            own[: len(run.rows)] = weights[run.rows]
            pooled = _pool(dictionary, sites, values, jnp.asarray(own))
            parts.append([np.asarray(one)[: len(run.rows)] for one in pooled])
            bar.advance(1)
    activations, features, written = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not np.isfinite(activations).all():
        raise InputError(f"Activations of prompt {np.argwhere(~np.isfinite(activations))[0][0]} are not finite.")
    return PooledFeatures(
        activations=activations, features=features, written=written, directions=np.asarray(dictionary.W_dec)
    )


def _weights(runs: Runs, pos: int | None) -> np.ndarray:
    """Returns each token's weight in its prompt's vector, ``[prompt, pos]``."""
    if pos is None:
        number = runs.counts.sum(1, keepdims=True)
        if not number.all():
            raise InputError(
                f"Prompt {int(np.flatnonzero(number == 0)[0])} has no token that counts: exclude fewer tokens, or "
                "leave it out."
            )
        return (runs.counts / number).astype(np.float32)
    lengths = runs.mask.sum(1)
    weights = np.zeros(runs.mask.shape, np.float32)
    for row, length in enumerate(lengths.tolist()):
        weights[row, entry(pos, length, "pos", f"tokens in prompt {row}")] = 1
    return weights


@functools.partial(jax.jit, static_argnames="sites")
def _pool(
    dictionary: Dictionary, sites: Sites, values: Mapping[str, jax.Array], weights: Float[Array, "batch pos"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    read = sites.part(values[sites.reads[0]], 0)
    target = sites.part(values[sites.writes[0]], 0)
    encoded = dictionary.encode_at(read)
    written = encoded.features * encoded.factors.scale
    if dictionary.cfg.rescale_acts_by_decoder_norm:
        written = written / dictionary.decoder_norms[None, None]
    flat = target.reshape(*target.shape[:2], -1)
    seen = weights > 0
    return tuple(_weighted(one, weights, seen) for one in (flat, encoded.features, written))  # type: ignore[return-value]


def _weighted(
    x: Float[Array, "batch pos width"], weights: Float[Array, "batch pos"], seen: Bool[Array, "batch pos"]
) -> Float[Array, "batch width"]:
    kept = jnp.where(seen[..., None], x, 0).astype(jnp.float32)
    return jnp.einsum("bpd,bp->bd", kept, weights, precision="highest")
