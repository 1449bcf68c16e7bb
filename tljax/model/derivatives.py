"""Runs with derivatives at hook points: gradients, directional derivatives, products with the Hessian."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from tljax.cache.activation_cache import ActivationCache
from tljax.cache.derivative_cache import DerivativeCache
from tljax.cache.slices import SliceInput
from tljax.checks import is_traced
from tljax.devices import resolve_device
from tljax.errors import InputError
from tljax.forward.backward import Moves, pull_back, push_forward, zero_offsets
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.interventions import Add
from tljax.hooks.names import select
from tljax.hooks.points import point_table
from tljax.model.caching import CachingMethods, Keep
from tljax.model.measured import Measured
from tljax.model.metrics import Metric, check_slope, differentiable, slope
from tljax.model.running import reached_names, typed_run, uses_head
from tljax.offload import is_offloaded
from tljax.text.inputs import LayerBounds, ModelInput
from tljax.typing import DeviceLike, InputOptions, NamesFilter

Metrics = Callable[..., Any] | Mapping[str, Callable[..., Any]]
"""A function of the logits, or several by name."""
Directions = Mapping[Any, Any]
"""Hook name → a direction to move along: an array that broadcasts to the activation, or an ``Add`` with positions."""


class GradOutput(NamedTuple):
    """What :meth:`~tljax.HookedTransformer.run_with_grads` returns."""

    value: Any
    cache: ActivationCache
    grads: Any


class JVPOutput(NamedTuple):
    """What :meth:`~tljax.HookedTransformer.run_with_jvp` returns."""

    value: Any
    tangent: Any
    cache: ActivationCache
    tangents: DerivativeCache


class HVPOutput(NamedTuple):
    """What :meth:`~tljax.HookedTransformer.run_with_hvp` returns."""

    value: Any
    grads: Any
    products: Any


class DerivativeMethods(CachingMethods):
    """Methods that run the model and differentiate the run at hook points."""

    @typed_run
    def run_with_grads(
        self,
        input: Any,
        metric: Metrics,
        names_filter: NamesFilter = None,
        *,
        device: DeviceLike = None,
        remove_batch_dim: bool = False,
        pos_slice: SliceInput = None,
        remat: bool = False,
        **options: Unpack[InputOptions],
    ) -> GradOutput:
        """Runs the model, and differentiates metrics of its logits with respect to activations.

        One forward pass, and one backward pass for each metric. Hooks of the model apply, also those of
        ``dir="bwd"``: what they return is the gradient at their point, and flows on to earlier ones.

        Args:
            input: as in :meth:`__call__`.
            metric: a function of the logits ``[batch, pos, d_vocab_out]`` that returns a number, or one for each prompt
                ``[batch]``; or several by name. It is traced, so it computes with ``jnp`` and does not take numbers
                out. Metrics of :mod:`tljax.patching` count positions in each prompt's text. Where all that are given
                are such metrics, no logits of all positions are made: one position is unembedded for a metric that
                reads one, and some at a time for ``Loss`` and for ``KL`` over all.
            names_filter: the points to keep and to differentiate at, as in :meth:`run_with_cache`.
            device, remove_batch_dim, pos_slice: as in :meth:`run_with_cache`, for activations and gradients.
            remat: compute each block again in the backward pass instead of keeping what is inside: memory for one
                block and the residual streams between them, for one more forward pass. A model whose blocks stay on
                the host (``offload="host"``) does so always.
            **options: as in :meth:`__call__`.

        Returns:
            ``(value, cache, grads)``. ``value`` is what the metric returned, ``grads`` a
            :class:`~tljax.cache.DerivativeCache`: at each point the gradient of the metric, summed over prompts, with
            respect to the activation after its hooks. No prompt depends on another, so each row is the gradient of its
            own prompt's metric. The gradient has the activation's name and shape, in float32 or wider. With
            several metrics ``value`` and ``grads`` are dicts by their names. ``cache["z", 3] * grads["z", 3]`` is the
            first-order effect of each entry.

        Raises:
            InputError: a metric cannot be differentiated, reads padding, or has a gradient that is not finite; a named
                point has no gradient.
            UnknownHookError: a name or filter matches nothing.

        Warns:
            ZeroGradientWarning: a metric is flat at this run, so that its gradients say nothing.
            LargeCacheWarning: activations and gradients will take more than a quarter of the free memory.

        Under ``jax.jit``, ``jax.grad`` and ``jax.vmap`` what depends on numbers is not checked. Recompiles as
        :meth:`__call__` does; a metric that is a pytree compiles once, whatever numbers it holds.
        """
        prepared, bounds = self._read(input, None, options)
        names = reached_names(names_filter, self.cfg, *bounds)
        offsets = zero_offsets(self.cfg, names, self._hooks, *prepared.batch_and_pos)
        self._refuse_without_derivative(names_filter, offsets)
        keep = Keep.of(self.cfg, prepared, pos_slice, resolve_device(device))
        measured = Measured.of(metric, prepared, self.cfg, self.params, self._uses_head(names))
        self._warn_if_large(names, prepared, keep, copies=1 + len(measured.metrics))
        recomputed = remat or is_offloaded(self.params)

        def run(hooks: HookDictionary) -> tuple[jax.Array, dict[str, Any]]:
            return self._end(prepared, bounds, hooks, names, keep, measured.on_stream, recomputed)

        end, cache, gradients = pull_back(run, self._hooks, offsets)
        values, kept = {}, {}
        for name, one in measured.metrics.items():
            values[name], found = slope(one, end)
            check_slope(one, name, end, found, measured.text)
            kept[name] = gradients(found)
            _check_finite(kept[name], name)
        wrap = _Wrapper(self, keep, prepared, remove_batch_dim)
        grads = {name: wrap.derivatives(keep(found)) for name, found in kept.items()}
        return GradOutput(measured.by_name(values), wrap.activations(cache), measured.by_name(grads))

    @typed_run
    def run_with_jvp(
        self,
        input: Any,
        directions: Directions,
        metric: Metrics | None = None,
        names_filter: NamesFilter = None,
        *,
        device: DeviceLike = None,
        remove_batch_dim: bool = False,
        pos_slice: SliceInput = None,
        **options: Unpack[InputOptions],
    ) -> JVPOutput:
        """Runs the model, with the change of everything to first order as activations move along directions.

        This is a Jacobian-vector product (forward mode, :func:`jax.jvp`): one pass, whatever number of activations,
        logits and metrics one wants the change of.

        Args:
            input: as in :meth:`__call__`.
            directions: hook name to a direction there, all moved along at once: an array that broadcasts to the
                activation, or a :class:`tljax.Add` that also says where, ``{("resid_post", 3): tljax.Add(v, pos=-1)}``.
                An activation moves after its hooks.
            metric: as in :meth:`run_with_grads`; ``None`` means the logits themselves.
            names_filter: the points to keep, as in :meth:`run_with_cache`.
            device, remove_batch_dim, pos_slice, **options: as in :meth:`run_with_cache`.

        Returns:
            ``(value, tangent, cache, tangents)``: the metric (or logits), its derivative along the directions, of the
            same shape; the activations, and their derivatives by the same names.

        Raises:
            InputError: a metric cannot be differentiated; there is no direction, or one where whole numbers are.
            InterventionError: a direction does not fit the activation.
        """
        prepared, bounds = self._read(input, None, options)
        names = reached_names(names_filter, self.cfg, *bounds)
        moves, hooks = self._moves(directions, bounds, prepared), self._hooks.without(None, "bwd", True)
        keep = Keep.of(self.cfg, prepared, pos_slice, resolve_device(device))
        self._warn_if_large(names, prepared, keep, copies=2)
        if metric is None:
            measured = Measured({"": lambda logits: logits}, False, None, False)
        else:
            measured = Measured.of(metric, prepared, self.cfg, self.params, self._uses_head((*names, *moves.names)))

        def run(hooks: HookDictionary) -> tuple[Any, dict[str, Any]]:
            end, cache = self._end(prepared, bounds, hooks, names, keep, measured.on_stream)
            evaluate = differentiable if metric is not None else _same
            return {name: evaluate(one, end) for name, one in measured.metrics.items()}, cache

        (values, cache), (changes, tangents) = push_forward(run, hooks, moves)
        wrap = _Wrapper(self, keep, prepared, remove_batch_dim)
        real = {name: change for name, change in tangents.items() if not point_table(self.cfg)[name].holds_numbers}
        return JVPOutput(
            measured.by_name(values), measured.by_name(changes), wrap.activations(cache), wrap.derivatives(real)
        )

    @typed_run
    def run_with_hvp(
        self,
        input: Any,
        metric: Metrics,
        directions: Directions,
        names_filter: NamesFilter = None,
        *,
        device: DeviceLike = None,
        remove_batch_dim: bool = False,
        pos_slice: SliceInput = None,
        remat: bool = False,
        **options: Unpack[InputOptions],
    ) -> HVPOutput:
        """Runs the model, and multiplies the Hessian of metrics at hook points with directions.

        The change of :meth:`run_with_grads`'s gradients to first order as activations move along ``directions``, by
        forward over reverse mode: about twice the work of the gradients. No Hessian is made.

        Args:
            input, metric, device, remove_batch_dim, pos_slice, remat, **options: as in :meth:`run_with_grads`.
            directions: as in :meth:`run_with_jvp`.
            names_filter: the points whose gradients change; ``None`` means those of ``directions``.

        Returns:
            ``(value, grads, products)``: the metric, its gradients, and ``H @ direction`` at each point, where ``H`` is
            the Hessian of the metric summed over prompts, from the directions' points to this one.

        Raises:
            InputError: as :meth:`run_with_grads` and :meth:`run_with_jvp`.
        """
        prepared, bounds = self._read(input, None, options)
        moves = self._moves(directions, bounds, prepared)
        wanted = list(dict.fromkeys(moves.names)) if names_filter is None else names_filter
        names = reached_names(wanted, self.cfg, *bounds)
        size = prepared.batch_and_pos
        offsets = zero_offsets(self.cfg, names, moves.added(self._hooks, moves.tangents), *size)
        self._refuse_without_derivative(wanted, offsets)
        keep = Keep.of(self.cfg, prepared, pos_slice, resolve_device(device))
        measured = Measured.of(metric, prepared, self.cfg, self.params, self._uses_head((*names, *moves.names)))

        def run(hooks: HookDictionary) -> tuple[dict[str, jax.Array], dict[str, Any]]:
            end, _ = self._end(prepared, bounds, hooks, (), None, measured.on_stream, remat)
            return {name: differentiable(one, end) for name, one in measured.metrics.items()}, {}

        def gradients(values: Sequence[jax.Array]) -> tuple[Any, Any]:
            found, _, pull = pull_back(run, moves.added(self._hooks, values), offsets)
            nothing = {name: jnp.zeros_like(value) for name, value in found.items()}
            return found, {name: pull(nothing | {name: jnp.ones_like(found[name])}) for name in found}

        (values, grads), (_, products) = moves.derivative(gradients)
        wrap = _Wrapper(self, keep, prepared, remove_batch_dim)

        def wrapped(kept: Mapping[str, dict[str, jax.Array]]) -> Any:
            for name, one in kept.items():
                _check_finite(one, name)
            ordered = {name: {point: one[point] for point in reversed(list(offsets))} for name, one in kept.items()}
            return measured.by_name({name: wrap.derivatives(keep(one)) for name, one in ordered.items()})

        return HVPOutput(measured.by_name(values), wrapped(grads), wrapped(products))

    def _end(
        self,
        prepared: ModelInput,
        bounds: LayerBounds,
        hooks: HookDictionary,
        names: tuple[str, ...],
        keep: Keep | None,
        on_stream: bool,
        remat: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns what metrics take, the logits or the final residual stream, and the named activations."""
        to = (bounds[0], self.cfg.n_layers) if on_stream else bounds
        return self._run(prepared, to, hooks, "logits", names=names, keep=keep, remat=remat)

    def _uses_head(self, names: Sequence[str]) -> bool:
        """Whether a run needs the points after the blocks as they are at all positions."""
        return uses_head((*names, *(entry.name for entry in self._hooks.entries)))

    def _moves(self, directions: Directions, bounds: LayerBounds, prepared: ModelInput) -> Moves:
        """Reads what was given as ``directions=``."""
        if not isinstance(directions, Mapping) or not directions:
            raise InputError(
                "directions= maps hook names to directions, and holds at least one: "
                f'{{("resid_post", 3): vector}}; got {directions!r}.'
            )
        adds = [(name, one if isinstance(one, Add) else Add(one)) for name, one in directions.items()]
        table = point_table(self.cfg)
        hooks = HookDictionary().add(adds, table, self.cfg.n_layers)
        for entry in hooks.entries:
            reached_names(entry.name, self.cfg, *bounds)
            if table[entry.name].holds_numbers:
                raise InputError(f"{entry.name} holds whole numbers: nothing moves there by a small step.")
        hooks.check(table, *prepared.batch_and_pos, prepared.text)
        return Moves.of(hooks, self.cfg)

    def _refuse_without_derivative(self, names_filter: NamesFilter, offsets: Mapping[str, Any]) -> None:
        """Refuses points named one by one that have no gradient; a predicate or ``None`` leaves them out."""
        if names_filter is None or callable(names_filter):
            return
        alone = (
            [names_filter] if isinstance(names_filter, str | tuple) else [n for n in names_filter if not callable(n)]
        )
        table = point_table(self.cfg)
        named = dict.fromkeys(name for one in alone for name in select(one, table, self.cfg.n_layers))
        if missing := [name for name in named if name not in offsets]:
            why = (
                "holds whole numbers" if table[missing[0]].holds_numbers
                else "fires three times in a block whose queries, keys and values have inputs of their own"
            )  # fmt: skip
            raise InputError(
                f"{missing[0]} has no gradient: it {why}. Leave it out of names_filter; run_with_cache keeps it."
            )


def _same(_: Metric, logits: jax.Array) -> jax.Array:
    return logits


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """Makes the caches that a run returns."""

    model: Any
    keep: Keep
    prepared: ModelInput
    remove_batch_dim: bool

    def activations(self, cache: dict[str, Any]) -> ActivationCache:
        return self._trimmed(ActivationCache(cache, self.model, **self.keep.masks(self.prepared.text)))

    def derivatives(self, found: dict[str, Any]) -> DerivativeCache:
        return self._trimmed(DerivativeCache(found, self.model, **self.keep.masks(self.prepared.text)))

    def _trimmed(self, cache: Any) -> Any:
        return cache.remove_batch_dim() if self.remove_batch_dim else cache


def _check_finite(gradients: Mapping[str, jax.Array], metric: str) -> None:
    """Raises InputError if the gradient is not finite at the earliest point, to which the others lead."""
    if not gradients or is_traced(gradients):
        return
    name, earliest = list(gradients.items())[-1]
    if not bool(jnp.isfinite(earliest).all()):
        called = f" of the metric {metric!r}" if metric else ""
        raise InputError(
            f"The gradient{called} is not finite at {name}, though that at the logits is. A backward hook may do "
            'that; in float16 numbers overflow: run the model in bfloat16 or float32, model.to("bfloat16").'
        )
