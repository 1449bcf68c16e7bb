"""``FeatureActivations``: where features are active on prompts, as a sparse table."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tljax.checks import entry, typed, whole
from tljax.dictionaries.evaluation.running import Runs, excluded_ids
from tljax.dictionaries.evaluation.sites import AnyDictionary, Sites, apply_dictionary
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FeatureActivations:
    """Where features are active on prompts: one entry for each token and feature that is not zero there.

    Attributes:
        tokens: ids of the prompts ``[prompt, pos]``, padded right.
        mask: ``[prompt, pos]``, ``False`` at padding.
        counts: ``[prompt, pos]``, ``False`` also at tokens that were excluded, where nothing is recorded.
        token: for each entry, ``prompt * n_pos + pos``, in rising order.
        feature: its feature.
        value: its activation, float32.
        d_sae: number of features.
    """

    tokens: np.ndarray
    mask: np.ndarray
    counts: np.ndarray
    token: np.ndarray
    feature: np.ndarray
    value: np.ndarray
    d_sae: int

    def __repr__(self) -> str:
        prompts, n = self.tokens.shape[0], self.n_tokens
        return (
            f"FeatureActivations({prompts} prompts, {n} tokens, {self.d_sae} features, {len(self.value) / n:.1f} "
            "active at a token)"
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.counts.sum())

    @functools.cached_property
    def fired(self) -> np.ndarray:
        """Tokens at which each feature is active, ``[d_sae]``."""
        return np.bincount(self.feature, minlength=self.d_sae)

    @property
    def density(self) -> np.ndarray:
        """Share of the tokens that count at which each feature is active, ``[d_sae]``."""
        return self.fired / self.n_tokens

    @functools.cached_property
    def largest(self) -> np.ndarray:
        """Largest activation of each feature, ``[d_sae]``; 0 if it is never active."""
        largest = np.zeros(self.d_sae, np.float32)
        np.maximum.at(largest, self.feature, self.value)
        return largest

    @functools.cached_property
    def _by_feature(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries' order by feature, and where each feature's start."""
        order = np.argsort(self.feature, kind="stable")
        return order, np.searchsorted(self.feature[order], np.arange(self.d_sae + 1))

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens at which a feature is active (``prompt * n_pos + pos``, rising) and its values there."""
        order, starts = self._by_feature
        chosen = order[starts[feature] : starts[feature + 1]]
        return self.token[chosen], self.value[chosen]

    def dense(self, feature: int) -> np.ndarray:
        """Returns a feature's activation at each token, ``[prompt, pos]``."""
        values = np.zeros(self.tokens.size, np.float32)
        token, value = self.of(feature)
        values[token] = value
        return values.reshape(self.tokens.shape)

    def correlations(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """Computes Pearson correlations of features with all others over the tokens that count.

        Returns:
            ``[len(features), d_sae]``; NaN for features that are constant.
        """
        from scipy.sparse import csr_array

        shape = (self.tokens.size, self.d_sae)
        table = csr_array((self.value.astype(np.float64), (self.token, self.feature)), shape=shape)
        n = self.n_tokens
        mean = np.asarray(table.sum(0)).ravel() / n
        variance = np.asarray((table**2).sum(0)).ravel() / n - mean**2
        chosen = np.asarray(list(features), int)
        products = (table[:, chosen].T @ table).toarray() / n
        spread = np.sqrt(np.where(variance > 0, variance, np.nan))
        return (products - mean[chosen, None] * mean) / (spread[chosen, None] * spread)


@typed
def collect_activations(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompts: Any,
    *,
    features: Sequence[int] | None = None,
    batch_size: int = 8,
    exclude_tokens: Sequence[int] | Literal["special"] | None = None,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> FeatureActivations:
    """Runs prompts and records where features are active; pages take the result in place of prompts.

    An entry takes 16 bytes: 1,000 prompts of 128 tokens with 50 active features each are 100 MB.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: the dictionary; its tap says where it belongs.
        prompts: texts, token ids ``[batch, pos]`` or a ``Batch``.
        features: record these alone; ``None`` records all.
        batch_size: prompts in one run.
        exclude_tokens: ids of tokens at which nothing is recorded; ``"special"`` means the tokenizer's special tokens.
        prepend_bos: whether texts get a BOS token; ``None`` means ``cfg.default_prepend_bos``.
        progress: whether to show a bar; ``None`` shows one after three seconds.

    Raises:
        DictionaryError: the dictionary does not fit the model.
        InputError: no prompts, no tokens that count, a feature that does not exist, activations that are not finite.
    """
    whole(batch_size, "batch_size", at_least=1)
    sites = Sites.of(dictionary, model)
    runs = Runs.of(model, prompts, batch_size, excluded_ids(model, exclude_tokens), prepend_bos)
    kept: np.ndarray | None = None
    n_pos = runs.tokens.shape[1]
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    d_sae = 0
    with Progress(len(runs), progress, "features", "batch") as bar:
        for run in runs:
            _, cache = model.run_with_cache(run.batch, names_filter=sites.names, return_type=None)
            values = {name: cache[name] for name in sites.names}
            table = np.asarray(_features(dictionary, sites, values, run.counts))[: len(run.rows)]
            if not np.isfinite(table).all():
                raise InputError(
                    f"Features of prompt {run.rows[np.argwhere(~np.isfinite(table))[0][0]]} are not finite."
                )
            d_sae = table.shape[-1]
            if features is not None:
                kept = feature_mask(features, d_sae) if kept is None else kept
                table = np.where(kept, table, 0)
            prompt, pos, feature = np.nonzero(table)
            parts.append((run.rows[prompt] * n_pos + pos, feature, table[prompt, pos, feature].astype(np.float32)))
            bar.advance(1)
    token, feature, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    return FeatureActivations(
        tokens=runs.tokens,
        mask=runs.mask,
        counts=runs.counts,
        token=token,
        feature=feature.astype(np.int32),
        value=value,
        d_sae=d_sae,
    )


def feature_mask(features: Sequence[int], d_sae: int) -> np.ndarray:
    """Returns which features are among those given, ``[d_sae]``.

    Raises:
        InputError: one does not exist.
    """
    mask = np.zeros(d_sae, bool)
    mask[[entry(one, d_sae, "features", "features") for one in features]] = True
    return mask


@functools.partial(jax.jit, static_argnames="sites")
def _features(
    dictionary: AnyDictionary, sites: Sites, values: Mapping[str, jax.Array], counts: Bool[Array, "batch pos"]
) -> Float[Array, "batch pos d_sae"]:
    return jnp.where(counts[..., None], apply_dictionary(dictionary, sites, values).features, 0).astype(jnp.float32)
