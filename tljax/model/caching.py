"""Runs that keep activations."""

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.memory import cache_bytes, warn_if_large
from tljax.cache.slices import SliceInput, is_full, read_slice
from tljax.checks import is_traced
from tljax.config import HookedTransformerConfig
from tljax.devices import resolve_device
from tljax.errors import InputError
from tljax.forward.backward import pull_back, zero_offsets
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import point_table
from tljax.model.running import RunMethods, reached_names, refuse_persistent_hooks, typed_run
from tljax.text.inputs import LayerBounds, ModelInput
from tljax.text.positions import NoPosition, TextCut, may_pad, text_cut
from tljax.typing import DeviceLike, InputOptions, NamesFilter, ReturnType


class CachingMethods(RunMethods):
    """Methods that run the model, including those that keep activations."""

    @typed_run
    def run_with_cache(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        *,
        names_filter: NamesFilter = None,
        device: DeviceLike = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        incl_bwd: bool = False,
        pos_slice: SliceInput = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **options: Unpack[InputOptions],
    ) -> tuple[Any, Any]:
        """Runs the model and keeps activations.

        Args:
            input, return_type: as in :meth:`__call__`.
            names_filter: which points to keep: a name, a list, a predicate on full names; ``None`` keeps every point
                that is not optional. Compiled programs materialise and return only these points.
            device: where to put the activations, layer by layer (``"cpu"`` spares GPU memory).
            remove_batch_dim: drop the batch axis (batch of one).
            return_cache_object: ``False`` returns a plain dict.
            incl_bwd: also keep ``name + "_grad"``, the gradient of the loss at each point; needs a scalar loss.
            pos_slice: positions to keep (query positions of patterns), of each prompt's own text; a number keeps an
                axis of one.
            reset_hooks_end, clear_contexts: as in :meth:`run_with_hooks`.
            loss_per_token, stop_at_layer, **options: as in :meth:`__call__`.

        Returns:
            The model's output, and an :class:`~tljax.cache.ActivationCache`.

        Warns:
            LargeCacheWarning: the cache will take more than a quarter of the free memory.
        """
        refuse_persistent_hooks(reset_hooks_end)
        target = resolve_device(device)
        prepared, bounds = self._read(input, stop_at_layer, options)
        names = reached_names(names_filter, self.cfg, *bounds)
        keep = Keep.of(self.cfg, prepared, pos_slice, target)
        self._warn_if_large(names, prepared, keep, copies=1 + incl_bwd)
        if incl_bwd:
            if return_type != "loss" or loss_per_token or stop_at_layer is not None:
                raise InputError(
                    'incl_bwd=True differentiates a scalar: call run_with_cache(input, return_type="loss", '
                    "incl_bwd=True). For another metric call run_with_grads(input, metric)."
                )
            output, cache = self._run_with_gradients(prepared, bounds, names, keep)
        else:
            output, cache = self._run(prepared, bounds, self._hooks, return_type, loss_per_token, names, keep)
            self._warn_of_idle_hooks((output, cache))
        if return_cache_object or remove_batch_dim:
            wrapped = ActivationCache(cache, self, **keep.masks(prepared.text))  # type: ignore[arg-type]
            wrapped = wrapped.remove_batch_dim() if remove_batch_dim else wrapped
            return output, (wrapped if return_cache_object else wrapped.cache_dict)
        return output, cache

    def _run_with_gradients(
        self, prepared: ModelInput, bounds: LayerBounds, names: tuple[str, ...], keep: "Keep"
    ) -> tuple[Any, dict[str, Any]]:
        def run(hooks: HookDictionary) -> tuple[Any, dict[str, Any]]:
            return self._run(prepared, bounds, hooks, "loss", names=names, keep=keep)

        offsets = zero_offsets(self.cfg, names, self._hooks, *prepared.batch_and_pos)
        loss, cache, gradients = pull_back(run, self._hooks, offsets)
        kept = keep(gradients(jnp.ones_like(loss)))
        return loss, cache | {f"{name}_grad": value for name, value in kept.items()}

    def _warn_if_large(self, names: tuple[str, ...], prepared: ModelInput, keep: "Keep", copies: int = 1) -> None:
        """Warns of a cache that takes much of the free memory, ``copies`` times: with its gradients, say."""
        if names and not is_traced(prepared.value):
            batch, pos = prepared.batch_and_pos
            kept = len(_positions(pos, keep.pos_slice))
            device = keep.device if isinstance(keep.device, jax.Device) else None
            warn_if_large(copies * cache_bytes(self.cfg, names, batch, pos) * kept // pos, copies * len(names), device)


def _text_cut(prepared: ModelInput, pos_slice: SliceInput) -> TextCut | None:
    """Returns the positions to keep of each prompt if the run has padding; ``None`` if every row keeps the same."""
    mask = prepared.text
    if is_full(pos_slice) or mask is None or not may_pad(mask):
        return None
    index = read_slice(pos_slice, mask.shape[-1])
    try:
        return text_cut(mask, index if isinstance(index, slice) else np.atleast_1d(index))
    except NoPosition as error:
        raise InputError(f"pos_slice={pos_slice!r}: {error}") from None


def _positions(pos: int, pos_slice: SliceInput) -> np.ndarray:
    if is_full(pos_slice):
        return np.arange(pos, dtype=np.int32)
    index = read_slice(pos_slice, pos)
    try:
        return np.atleast_1d(np.arange(pos, dtype=np.int32)[index])
    except IndexError as error:
        raise InputError(f"pos_slice={pos_slice!r} is out of range for {pos} positions.") from error


@functools.partial(jax.jit, static_argnums=1)
def _take_positions(
    values: dict[str, jax.Array], axes: tuple[tuple[str, int], ...], positions: jax.Array
) -> dict[str, jax.Array]:
    return {name: jnp.take(values[name], positions, axis=axis) for name, axis in axes}


@functools.partial(jax.jit, static_argnums=1)
def _take_of_text(
    values: dict[str, jax.Array], axes: tuple[tuple[str, int], ...], taken: TextCut
) -> dict[str, jax.Array]:
    return {name: taken(values[name], axis, 0) for name, axis in axes}


@dataclasses.dataclass(frozen=True)
class Keep:
    """A function that slices the positions of a stage's recorded activations and moves them to a device.

    ``taken`` holds the positions to keep of each prompt, if some prompts have padding.
    """

    cfg: HookedTransformerConfig
    pos_slice: SliceInput = None
    device: Any = None
    taken: TextCut | None = None

    @classmethod
    def of(cls, cfg: HookedTransformerConfig, prepared: ModelInput, pos_slice: SliceInput, device: Any) -> "Keep":
        """Returns the function for one input's run."""
        return cls(cfg, pos_slice, device, _text_cut(prepared, pos_slice))

    def __call__(self, recorded: dict[str, Any]) -> dict[str, Any]:
        """Returns the activations as they are kept."""
        if recorded and not is_full(self.pos_slice):
            table = point_table(self.cfg)
            named = {name: table[name.removesuffix("_grad")].axes for name in recorded}
            axes = tuple((name, axis.index("pos" if "pos" in axis else "query_pos")) for name, axis in named.items())
            length = recorded[axes[0][0]].shape[axes[0][1]]
            if self.taken is not None:
                recorded = _take_of_text(recorded, axes, self.taken)
            else:
                recorded = _take_positions(recorded, axes, _positions(length, self.pos_slice))
        return recorded if self.device is None else jax.device_put(recorded, self.device)

    def masks(self, token_mask: Any) -> dict[str, Any]:
        """Returns the masks that :class:`ActivationCache` takes for the kept positions, from ``[batch, pos]``."""
        if token_mask is None or is_full(self.pos_slice):
            return {"token_mask": token_mask}
        if self.taken is not None:
            return {"token_mask": self.taken.mask, "key_mask": token_mask}
        kept = _positions(token_mask.shape[-1], self.pos_slice)
        return {"token_mask": token_mask[..., kept], "key_mask": token_mask}
