"""``ActivationCache``: the activations of a run, by hook name, with TransformerLens's short forms."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jax.core import Tracer

from tljax.cache import access, attribution, decomposition, heads, io, neurons, padding, residual
from tljax.cache.slices import SliceInput, apply_slice
from tljax.config import HookedTransformerConfig
from tljax.devices import resolve_device
from tljax.elsewhere import CACHE, SaysWhatInstead
from tljax.errors import CacheError, UnknownHookError
from tljax.fingerprint import Fingerprint, WeightSample, fingerprint_of, sample_of
from tljax.hooks.names import resolve
from tljax.hooks.points import point_table
from tljax.typing import DeviceLike

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer


class _Carried:
    """A sample of the model's weights, kept in the pytree structure of a cache; all instances compare equal.

    So caches of two models with one config can be added, and share compiled programs. Under trace the sample is
    dropped: otherwise a program would return the sample of the model it was first traced for.
    """

    def __init__(self, weights: WeightSample | None) -> None:
        self.weights = weights

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Carried)

    def __hash__(self) -> int:
        return hash(_Carried)


class ArraysByName(Mapping[str, jax.Array], SaysWhatInstead):
    """Base of caches: an immutable mapping from hook name to an array of the activation's shape, and a pytree of them.

    Args:
        cache_dict: arrays by full hook name.
        model: the model that made them; analyses use its config, and some its weights. It is not part of the pytree: a
            cache that went through ``jit`` or ``vmap`` needs :meth:`with_model` for the weights. The pytree does hold
            the :attr:`fingerprint` that identifies the model (``jit`` and ``vmap`` keep only its config).
        has_batch_dim: whether the activations still have their batch axis.
        cfg: the model's config, where there is no model.
        token_mask: ``[batch, pos]``, true at text, false at padding; ``None`` where nothing is padded.
        key_mask: the same along ``key_pos``, where fewer positions than keys were kept.

    Attributes:
        cache_dict: the arrays by full name.
        cfg: the model's config.
        has_batch_dim: as given.
    """

    _instead = CACHE
    _kept_by = "include it in names_filter"
    """What to do for a point that is not there."""

    @access.checked
    def __init__(
        self,
        cache_dict: Mapping[str, jax.Array],
        model: "HookedTransformer | None" = None,
        has_batch_dim: bool = True,
        cfg: HookedTransformerConfig | None = None,
        *,
        token_mask: Any = None,
        key_mask: Any = None,
    ) -> None:
        config = model.cfg if model is not None else cfg
        if config is None:
            raise CacheError(f"{type(self).__name__} needs the model (or its cfg) that the activations came from.")
        self.cache_dict = dict(cache_dict)
        self.cfg: HookedTransformerConfig = config
        self.has_batch_dim = has_batch_dim
        self._model = model
        self._weights: WeightSample | None = None  # of a model that is not attached
        self._padding = (padding.to_offsets(token_mask), padding.to_offsets(key_mask))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        keyed = [(jax.tree_util.DictKey(name), value) for name, value in self.cache_dict.items()]
        padding_key = jax.tree_util.GetAttrKey("padding")
        carried = _Carried(self.fingerprint.weights if _are_known(self.cache_dict.values()) else None)
        aux = tuple(self.cache_dict), self.cfg, self.has_batch_dim, carried
        return [*keyed, (padding_key, self._padding)], aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[Any]) -> Self:
        names, cfg, has_batch_dim, carried = aux
        cache = cls(dict(zip(names, children[:-1], strict=True)), cfg=cfg, has_batch_dim=has_batch_dim)
        cache._padding = children[-1]
        cache._weights = carried.weights if _are_known(children[:-1]) else None
        return cache

    @property
    def fingerprint(self) -> Fingerprint:
        """Identity of the model that made the cache: its config, weight processing, and a sample of its weights."""
        return Fingerprint(self.cfg, self._weights if self._model is None else sample_of(self._model.params))

    @property
    def model(self) -> "HookedTransformer":
        """The model that made the cache.

        Raises:
            CacheError: the cache went through ``jit``, ``vmap`` or a file, which drop the model.
        """
        if self._model is None:
            raise CacheError(
                "This cache no longer knows its model (it came out of jit, vmap or a file). "
                "Attach it: cache = cache.with_model(model)."
            )
        return self._model

    @access.checked
    def check_model(self, model: "HookedTransformer", what: str = "This cache") -> None:
        """Checks that ``model`` made the cache, as far as is known; free if the cache came from ``model`` itself.

        Raises:
            CacheError: another model made it; the message says what differs.
        """
        if self._model is not None and self._model.params is model.params and self.cfg is model.cfg:
            return
        if differences := self.fingerprint.differences(fingerprint_of(model)):
            more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
            raise CacheError(
                f"{what} was made by a model with {self.cfg.n_layers} layers of width {self.cfg.d_model}, "
                f"{self.cfg.model_name!r}, that is not this one: {'; '.join(differences[:4])}{more}. Run its prompts "
                "on this model. If you mean to put one model's activations into another, pass cache.as_if_from(model)."
            )

    def with_model(self, model: "HookedTransformer") -> Self:
        """Returns the same cache with its model attached.

        Raises:
            CacheError: another model made it; :meth:`as_if_from` attaches it all the same.
        """
        self.check_model(model)
        return self.as_if_from(model)

    def as_if_from(self, model: "HookedTransformer") -> Self:
        """Returns the same activations as if ``model`` had made them: for patching from one model into another.

        ``sweep(tuned, prompt, base_cache.as_if_from(tuned), metric, "resid_pre")``
        """
        cache = type(self)(self.cache_dict, model, self.has_batch_dim)
        cache._padding = self._padding
        return cache

    def _map(self, function: Callable[[Any], Any], has_batch_dim: bool | None = None) -> Self:
        """Applies a function to every array, including the padding marks."""
        batch = self.has_batch_dim if has_batch_dim is None else has_batch_dim
        kept = {name: function(value) for name, value in self.cache_dict.items()}
        return self._like(kept, batch, tuple(None if mark is None else function(mark) for mark in self._padding))

    def _like(self, cache_dict: Mapping[str, jax.Array], has_batch_dim: bool, marks: Any) -> Self:
        """Returns a cache of other arrays of the same model."""
        cache = type(self)(cache_dict, self._model, has_batch_dim, self.cfg)
        cache._padding, cache._weights = marks, self._weights
        return cache

    @property
    def token_mask(self) -> jax.Array | None:
        """``[batch, pos]``, ``True`` at text and ``False`` at padding; ``None`` where nothing is padded."""
        return padding.to_mask(self._padding[0])

    @property
    def key_mask(self) -> jax.Array | None:
        """The mask along ``key_pos``, ``[batch, key_pos]``: :attr:`token_mask` unless ``pos_slice`` dropped queries."""
        tokens, keys = self._padding
        return padding.to_mask(tokens if keys is None else keys)

    def with_activations(self, cache_dict: Mapping[str, jax.Array]) -> Self:
        """Returns a cache of other activations of the same run."""
        return self._like(cache_dict, self.has_batch_dim, self._padding)

    def without_padding(self, cache_dict: Mapping[str, jax.Array]) -> Self:
        """Returns a cache of other, unpadded activations of the same model."""
        return self._like(cache_dict, self.has_batch_dim, (None, None))

    unpad = padding.unpad

    def full_name(self, key: Any) -> str:
        """Returns the full hook name that a key stands for.

        Raises:
            UnknownHookError: the cache does not hold it (says whether the model does, and the nearest names).
        """
        if isinstance(key, str) and key in self.cache_dict:
            return key
        gradient = isinstance(key, str) and key.endswith("_grad")
        wanted = key.removesuffix("_grad") if gradient else key
        if isinstance(key, tuple) and isinstance(key[0], str) and key[0].endswith("_grad"):
            gradient, wanted = True, (key[0].removesuffix("_grad"), *key[1:])
        table = point_table(self.cfg)
        try:
            name = resolve(wanted, table, self.cfg.n_layers)
        except UnknownHookError as error:
            raise type(error)(f"{error} cache.keys() lists what was kept in this cache.") from None
        name += "_grad" if gradient else ""
        if name not in self.cache_dict:
            how = "run with incl_bwd=True" if gradient else self._kept_by
            raise UnknownHookError(f"{name!r} was not kept in this cache ({len(self)} activations): {how}.")
        return name

    def __getitem__(self, key: Any) -> jax.Array:
        return self.cache_dict[self.full_name(key)]

    def __contains__(self, key: object) -> bool:
        try:
            self.full_name(key)
        except UnknownHookError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__} with keys {list(self.cache_dict)}"

    @property
    def nbytes(self) -> int:
        """Size of the activations in bytes."""
        return sum(value.nbytes for value in self.cache_dict.values())

    def to(self, device: DeviceLike) -> Self:
        """Returns the cache on another device (``"cpu"``, ``"gpu"``, a jax device or a sharding)."""
        target = resolve_device(device)
        return self._map(lambda value: jax.device_put(value, target))

    def remove_batch_dim(self) -> Self:
        """Returns the cache without its batch axis of size one.

        Raises:
            CacheError: the batch is larger than one (names the sizes).
        """
        if not self.has_batch_dim:
            return self
        if wide := {value.shape[0] for value in self.cache_dict.values()} - {1}:
            raise CacheError(
                f"remove_batch_dim needs a batch of one; this cache has batch size {sorted(wide)}. "
                "Pick a prompt with cache.apply_slice_to_batch_dim(0)."
            )
        return self._map(lambda value: value[0], has_batch_dim=False)

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> Self:
        """Returns the cache of some prompts; a number drops the batch axis."""
        if not self.has_batch_dim:
            raise CacheError("This cache has no batch axis left to slice.")
        one = isinstance(batch_slice, int | np.integer)
        return self._map(lambda value: apply_slice(value, batch_slice, 0), has_batch_dim=not one)

    stack_activation = residual.stack_activation


@jax.tree_util.register_pytree_with_keys_class
class ActivationCache(ArraysByName):
    """An immutable mapping from hook name to activation, and a pytree whose leaves are the activations.

    ``cache["blocks.5.hook_resid_post"]``, ``cache["resid_post", 5]``, ``cache["pattern", -1]``, ``cache["q0"]`` and
    ``cache["scale", 1, "ln1"]`` all work. Methods return new caches.

    Its analyses are pure functions of the cache and its model, and work under ``jax.jit`` and ``jax.vmap`` (over
    prompts) with both as arguments:
    ``jax.jit(lambda model, cache: cache.with_model(model).stack_head_results())(model, cache)``. Arguments and
    attributes are those of :class:`ArraysByName`.
    """

    @property
    def has_embed(self) -> bool:
        """Whether the token embedding was kept."""
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        """Whether a learned position embedding was kept."""
        return "hook_pos_embed" in self.cache_dict

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as one safetensors file that records which model made it."""
        io.save(Path(path), self.cache_dict, self.fingerprint, self.has_batch_dim, self._padding)

    @classmethod
    @access.checked
    def load(cls, path: str | os.PathLike[str], model: "HookedTransformer | None" = None) -> "ActivationCache":
        """Reads a cache that :meth:`save` wrote.

        Args:
            path: the file.
            model: the model that made it, to attach. To attach another: ``load(path).as_if_from(model)``.

        Raises:
            CacheError: the file is missing, damaged, or not a tljax cache; or ``model`` did not make it.
        """
        stored = io.load(Path(path))
        cache = cls(stored.activations, None, stored.has_batch_dim, stored.origin.cfg)
        cache._padding, cache._weights = stored.padding, stored.origin.weights
        if model is None:
            return cache
        cache.check_model(model, f"The cache in {path}")
        return cache.as_if_from(model)

    # Decompositions of the residual stream and the logits

    accumulated_resid = residual.accumulated_resid
    decompose_resid = residual.decompose_resid
    compute_head_results = heads.compute_head_results
    stack_head_results = heads.stack_head_results
    get_neuron_results = neurons.get_neuron_results
    stack_neuron_results = neurons.stack_neuron_results
    get_full_resid_decomposition = decomposition.get_full_resid_decomposition
    logit_attrs = attribution.logit_attrs
    logit_bias = attribution.logit_bias
    logit_lens = attribution.logit_lens
    apply_ln_to_stack = residual.apply_ln_to_stack


def _are_known(values: Iterable[Any]) -> bool:
    """Whether all values are concrete arrays, not traced by any transformation."""
    return all(isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer) for value in values)
