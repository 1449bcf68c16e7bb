"""Codes: the strongest features of each token, stored so that dashboards and densities need no model."""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax import checks
from tljax.dictionaries.dictionary import Dictionary
from tljax.errors import DictionaryError, HarvestError
from tljax.fingerprint import sample_of
from tljax.harvest.collecting import Arrays, Collected, Headers
from tljax.harvest.documents import Prompts
from tljax.harvest.harvest import HarvestOptions, to_disk
from tljax.harvest.index import CODES
from tljax.harvest.points import Point, read_points, run_to_points
from tljax.harvest.store import Store
from tljax.harvest.stored import StoredArray, as_dtype
from tljax.harvest.windows import Windows
from tljax.model.hooked_transformer import HookedTransformer

_FEATURES, _VALUES = "features", "values"


class FeatureActivations(NamedTuple):
    """Where a feature is active.

    Attributes:
        rows: numbers of the stored tokens, ascending, ``[n]``.
        values: the feature's activations there, float32 ``[n]``.
    """

    rows: np.ndarray
    values: np.ndarray


class Codes:
    """Keeps the ``k`` strongest features of each token, and for every feature how often and how strongly it is active.

    Args:
        dictionary: what encodes.
        point: what it reads.
        k: how many features to keep.
    """

    def __init__(self, dictionary: Dictionary, point: Point, k: int) -> None:
        self.dictionary, self.points, self.k = dictionary, (point,), k

    @property
    def headers(self) -> Headers:
        narrow = self.dictionary.cfg.d_sae <= 2**16
        return {
            _VALUES: (np.dtype(jnp.bfloat16), self.k),
            _FEATURES: (np.dtype(np.uint16 if narrow else np.uint32), self.k),
        }

    def describe(self) -> dict[str, Any]:
        cfg, sample = self.dictionary.cfg, sample_of(self.dictionary.params)
        digest = "" if sample is None else hashlib.blake2b(sample.values, digest_size=16).hexdigest()
        stated = {"architecture": cfg.architecture, "d_in": cfg.d_in, "d_sae": cfg.d_sae, "weights": digest}
        return {"dictionary": stated, "point": self.points[0].name, "k": self.k}

    def collect(self, model: HookedTransformer, windows: Windows, kept: np.ndarray) -> Collected:
        (values,) = run_to_points(model, self.points, windows)
        return _encode(self.dictionary, values, kept, self.k, self.headers[_FEATURES][0].name)

    def merge(self, total: Arrays, added: Mapping[str, Any]) -> Arrays:
        return merge_counts(total, added)


@functools.partial(jax.jit, static_argnames=("k", "number"))
def _encode(dictionary: Dictionary, values: jax.Array, kept: jax.Array, k: int, number: str) -> Collected:
    """Encodes activations ``[window, pos, ...]`` and keeps the ``k`` features of the largest magnitude."""
    codes = dictionary.encode(values.reshape(*values.shape[:2], -1)).reshape(len(kept), -1)
    codes = jnp.where(kept[:, None], codes, 0)
    finite = jnp.isfinite(codes).all()[None]
    _, index = jax.lax.top_k(jnp.abs(codes), k)
    strongest = jnp.take_along_axis(codes, index, axis=1)
    active = codes != 0
    sums = {
        "fired": active.sum(axis=0), "total": codes.astype(jnp.float32).sum(axis=0),
        "largest": codes.astype(jnp.float32).max(axis=0), "cut": (active.sum(axis=1) > k).sum(),
    }  # fmt: skip
    rows = (strongest.astype(jnp.bfloat16), index.astype(number))
    return Collected(rows, kept, finite, sums)


def merge_counts(total: Mapping[str, np.ndarray], added: Mapping[str, Any]) -> Arrays:
    """Adds up counts and sums of features, and takes the larger of their largest values."""
    wide = {"fired": np.int64, "total": np.float64, "largest": np.float32, "cut": np.int64}
    here = {name: np.asarray(added[name], dtype) for name, dtype in wide.items()}
    if not total:
        return here
    return {
        name: np.maximum(total[name], here[name]) if name == "largest" else total[name] + here[name] for name in wide
    }


@functools.partial(checks.typed, receiver=to_disk)
def harvest_codes(
    model: HookedTransformer,
    dictionary: Dictionary,
    prompts: Prompts,
    directory: str | os.PathLike[str],
    *,
    k: int = 64,
    point: Any = None,
    **options: Unpack[HarvestOptions],
) -> "CodeStore":
    """Runs prompts through a model and a dictionary, and stores each token's strongest features.

    A token takes ``4 * k`` bytes (``6 * k`` with more than 65,536 features): feature numbers, and values in bfloat16.
    How often each feature is active, and its sum and its largest value, are counted over all features, kept or not.

    Args:
        model: the model.
        dictionary: what encodes.
        prompts, directory: as in :func:`harvest`.
        k: how many features to keep of each token, those of the largest magnitude. ``store.share_cut`` says how many
            tokens had more.
        point: the hook point to encode; ``None`` means the one that the dictionary names (``cfg.tap.reads``).
        **options: as in :func:`harvest`, but for ``dtype``, ``covariance`` and ``max_norm_ratio``.

    Returns:
        The store.

    Raises:
        DictionaryError: the dictionary names no point, or does not fit the one named.
        HarvestError, InputError, UnknownHookError: as :func:`harvest`.
    """
    reads = dictionary.cfg.tap.reads if point is None else point
    if reads is None:
        raise DictionaryError("The dictionary does not say which hook point it reads: name it, point=.")
    found = read_points(model, reads)
    if len(found) != 1 or found[0].width != dictionary.cfg.d_in:
        given = ", ".join(f"{one.name} ({one.width} wide)" for one in found)
        raise DictionaryError(
            f"{dictionary!r} does not fit {given}: it encodes one point that is {dictionary.cfg.d_in} wide."
        )
    number = checks.whole(k, "k", at_least=1, at_most=dictionary.cfg.d_sae)
    to_disk(CODES, model, prompts, Codes(dictionary, found[0], number), Path(directory), **options)
    return CodeStore.open(directory)


class CodeStore(Store):
    """The strongest features of many tokens, memory-mapped; ``codes.of(feature)`` says where a feature is active."""

    _FORM = CODES

    @classmethod
    @checks.typed
    def open(cls, directory: str | os.PathLike[str], *, partial: bool = False) -> "CodeStore":
        """Opens a store of codes; as :meth:`ActivationStore.open`."""
        return cls._open(directory, partial)

    def __repr__(self) -> str:
        return (
            f"CodeStore({len(self)} tokens, {self.k} of {self.d_sae} features at {self.point}, {str(self.directory)!r})"
        )

    @property
    def k(self) -> int:
        """Features kept of each token."""
        return self.index.recipe["k"]

    @property
    def d_sae(self) -> int:
        """Features of the dictionary."""
        return self.index.recipe["dictionary"]["d_sae"]

    @property
    def point(self) -> str:
        """The hook point that was encoded."""
        return self.index.recipe["point"]

    @property
    def features(self) -> StoredArray:
        """Numbers of the kept features, strongest first, ``[token, k]``."""
        return self._array(_FEATURES)

    @property
    def values(self) -> StoredArray:
        """Their activations, bfloat16 ``[token, k]``; 0 where fewer features are active."""
        return self._array(_VALUES)

    @functools.cached_property
    def _counts(self) -> Arrays:
        total: Arrays = {}
        for shard in self._shards:
            total = merge_counts(total, shard.sums)
        return total

    @property
    def density(self) -> np.ndarray:
        """Share of the tokens at which each feature is active, float64 ``[d_sae]``; of all features, kept or not."""
        return self._counts["fired"] / len(self)

    @property
    def largest(self) -> np.ndarray:
        """Largest activation of each feature, float32 ``[d_sae]``."""
        return self._counts["largest"]

    @property
    def mean(self) -> np.ndarray:
        """Mean activation of each feature over all tokens, float64 ``[d_sae]``."""
        return self._counts["total"] / len(self)

    @property
    def share_cut(self) -> float:
        """Share of the tokens with more active features than were kept."""
        return float(self._counts["cut"]) / len(self)

    def check_dictionary(self, dictionary: Dictionary) -> None:
        """Raises HarvestError, with the difference, if the codes are of another dictionary."""
        point = Point(self.point, (), (dictionary.cfg.d_in,))
        here, there = Codes(dictionary, point, 1).describe()["dictionary"], self.index.recipe["dictionary"]
        if found := [
            f"{name}={there[name]!r} there, {here[name]!r} here" for name in here if here[name] != there[name]
        ]:
            raise HarvestError(f"{self.directory} holds codes of another dictionary: {'; '.join(found)}.")

    def of(self, features: int | Sequence[int]) -> Any:
        """Returns where features are active, of those kept.

        Reads all codes once, whatever the number of features: ask for many at once.

        Args:
            features: a feature's number, or several.

        Returns:
            :class:`FeatureActivations`, or a dict of them by feature.
        """
        several = not isinstance(features, int | np.integer)
        numbers = [
            checks.entry(one, self.d_sae, "feature", "features", HarvestError)
            for one in (features if several else [features])  # type: ignore[union-attr]
        ]
        wanted = np.zeros(self.d_sae, bool)
        wanted[numbers] = True
        rows, found, values = [], [], []
        start = 0
        for ids, strengths in zip(self.features.shards, self.values.shards, strict=True):
            token, place = np.nonzero(wanted[ids])
            strength = as_dtype(strengths[token, place], np.float32)
            active = strength != 0
            rows.append(start + token[active])
            found.append(ids[token, place][active].astype(np.int64))
            values.append(strength[active])
            start += len(ids)
        whose, row, value = np.concatenate(found), np.concatenate(rows), np.concatenate(values)
        order = np.argsort(whose, kind="stable")
        whose, row, value = whose[order], row[order], value[order]
        bounds = {one: np.searchsorted(whose, [one, one + 1]) for one in numbers}
        of = {one: FeatureActivations(row[low:high], value[low:high]) for one, (low, high) in bounds.items()}
        return of if several else of[numbers[0]]
