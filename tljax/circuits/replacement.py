"""What edges outside a circuit carry: activations of another run, zeros, means over prompts, or constants.

Replacements are activations at the points of :func:`~tljax.circuits.writers.writer_points`, at the base run's
positions, padding included. They are small, and what writers write is linear in them
(:func:`~tljax.circuits.writers.outputs_of`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import check_type, typed, whole
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.writers import writer_points
from tljax.errors import InputError, nearest
from tljax.hooks.points import point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.edits import expand
from tljax.patching.sources import cached
from tljax.text import positions
from tljax.text.alignment import read_alignment
from tljax.text.batch import Batch
from tljax.text.inputs import ModelInput, prepare
from tljax.text.padding import pad_axis

AblationKind = Literal["patching", "zero", "mean", "positional_mean"]
Ablation = AblationKind | Mapping[str, Any]
"""A kind, :class:`MeanActivations`, or constants by full hook name that broadcast to ``[batch, pos, ...]``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanActivations(Mapping[str, jax.Array]):
    """Means of writers' activations over prompts, to ablate with: ``ablation=mean_activations(model, prompts)``.

    Attributes:
        means: by full hook name, ``[pos or 1, ...]``; positions are those of the text, whatever side padding is on.
        by_position: whether every position has a mean of its own.
        n_prompts: over how many prompts.
    """

    means: dict[str, jax.Array]
    by_position: bool = dataclasses.field(metadata={"static": True})
    n_prompts: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> jax.Array:
        return self.means[name]

    def __iter__(self) -> Any:
        return iter(self.means)

    def __len__(self) -> int:
        return len(self.means)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What absent edges carry in a run.

    Attributes:
        activations: by full hook name, ``[batch or 1, padded_pos or 1, ...]``, those of
            :func:`~tljax.circuits.writers.writer_points`.
        run: the source's run at its own positions, for the metric of the source; ``None`` unless values come from one.
    """

    activations: dict[str, jax.Array]
    run: BaseRun | None = None


def read_replacement(
    model: HookedTransformer,
    base: BaseRun,
    graph: ResidualGraph,
    source: Any,
    ablation: Ablation = "patching",
    *,
    align: Any = None,
    batch_size: int = 32,
) -> Replacement:
    """Computes what absent edges carry, at the base run's positions.

    Args:
        model: the model.
        base: the base run, which keeps :func:`~tljax.circuits.writers.writer_points` if ``align`` is given.
        graph: the graph.
        source: for ``"patching"`` the prompts whose run values come from, one for each base prompt, or an
            ``ActivationCache`` of them; for means the prompts to average over. The other kinds need none.
        ablation: ``"patching"``; ``"zero"``; ``"mean"``, the mean over prompts of the mean over a prompt's tokens;
            ``"positional_mean"``, for each position in the text the mean over the prompts that have it;
            :class:`MeanActivations`; or constants by hook name, which broadcast to ``[batch, pos, ...]``.
        align: ``[batch, pos]``, for each entry of the base prompts' array the entry of the source's array that it
            takes its value from, or -1 to keep the base run's own; by default texts of equal lengths are taken position
            by position.
        batch_size: prompts that run at once for means.

    Raises:
        InputError: no source where one is needed, lengths that differ without ``align``, an alignment that does not
            fit, a position that no prompt of a mean has, or constants that do not fit.
    """
    if align is not None and ablation != "patching":
        raise InputError('align= says which source token stands for which: it belongs to ablation="patching".')
    names = writer_points(graph)
    if isinstance(ablation, Mapping):
        _check_names(ablation, names)
        if isinstance(ablation, MeanActivations):
            return Replacement(_placed(base, ablation))
        return Replacement({name: _constant(model, base, name, ablation[name]) for name in names})
    check_type(ablation, AblationKind, "ablation")
    if ablation == "zero":
        table, dtype = point_table(model.cfg), model.cfg.jnp_dtype
        return Replacement({name: jnp.zeros(table[name].shape(1, 1), dtype) for name in names})
    if source is None:
        need = "the prompts that values come from" if ablation == "patching" else "the prompts to average over"
        raise InputError(f"ablation={ablation!r} needs source=, {need}; only zero and given values need none.")
    if ablation == "patching":
        return _from_source(model, base, names, source, align)
    by_position = ablation == "positional_mean"
    means = mean_activations(model, source, graph, by_position=by_position, batch_size=batch_size)
    return Replacement(_placed(base, means))


@typed
def mean_activations(
    model: HookedTransformer,
    prompts: Any,
    graph: ResidualGraph | None = None,
    *,
    by_position: bool = False,
    batch_size: int = 32,
) -> MeanActivations:
    """Computes means of what writers write over prompts, batch by batch, to ablate with.

    Args:
        model: the model.
        prompts: texts, token ids ``[batch, pos]`` or a ``Batch``, as many as you like. Padding does not count.
        graph: the graph; by default the model's.
        by_position: whether each position of the text has its own mean, over the prompts that have it. Otherwise the
            mean over prompts of the mean over each prompt's tokens.
        batch_size: prompts that run at once.

    Example:
        >>> model = HookedTransformer.from_pretrained("tljax-tiny")
        >>> means = mean_activations(model, ["The cat sat", "A dog ran away"])
        >>> means["blocks.0.attn.hook_z"].shape
        (1, 4, 16)
    """
    graph = ResidualGraph.of(model) if graph is None else graph
    graph.check(model.cfg)
    names, batch = writer_points(graph), model.to_batch(prompts)
    size = min(whole(batch_size, "batch_size", at_least=1), len(batch))
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    totals: dict[str, np.ndarray] = {}
    for first in range(0, len(batch), size):
        chosen = np.arange(first, first + size)
        rows, counted = np.minimum(chosen, len(batch) - 1), chosen < len(batch)  # one shape, so one set of programs
        some = Batch.from_mask(tokens[rows], mask[rows], batch.padding_side)
        run = run_base(model, prepare(model.cfg, model._tokenizer, some), names)
        text = pad_axis(mask[rows] & counted[:, None], run.padded_length)
        for name in names:
            total = np.asarray(_total(run.activations[name], text, by_position), np.float64)
            totals[name] = totals.get(name, 0) + total
    counts = np.arange(mask.shape[1])[None] < mask.sum(axis=1)[:, None] if by_position else np.ones((len(batch), 1))
    divisor = counts.sum(axis=0).astype(np.float64)
    dtype, kept = model.cfg.jnp_dtype, int((divisor > 0).sum())
    means = {
        name: jnp.asarray(total[:kept] / divisor[:kept].reshape(-1, *(1,) * (total.ndim - 1)), dtype)
        for name, total in totals.items()
    }
    return MeanActivations(means, by_position, len(batch))


@functools.partial(jax.jit, static_argnums=2)
def _total(value: jax.Array, text: jax.Array, by_position: bool) -> jax.Array:
    """Sums an activation ``[batch, pos, ...]`` over prompts, by position of the text, or of its mean over positions."""
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if by_position:
        places, there = positions.find(text, np.arange(text.shape[1]))
        taken = jnp.take_along_axis(value, _spread(places, value.ndim), axis=1)
        return jnp.where(_spread(there, value.ndim), taken, 0).sum(axis=0)
    counted = jnp.where(_spread(text, value.ndim), value, 0).sum(axis=1, keepdims=True)
    lengths = jnp.maximum(text.sum(axis=1, keepdims=True), 1).astype(value.dtype)
    return (counted / _spread(lengths, value.ndim)).sum(axis=0)


def _spread(array: jax.Array, ndim: int) -> jax.Array:
    """Returns ``[batch, pos]`` with trailing axes of size 1."""
    return array.reshape(*array.shape, *(1,) * (ndim - array.ndim))


def _text_of(base: BaseRun) -> np.ndarray:
    """Returns which entries of the prompts' array are text, ``[batch, length]``."""
    return np.ones((base.batch, base.length), bool) if base.text is None else base.text


def _placed(base: BaseRun, means: MeanActivations) -> dict[str, jax.Array]:
    """Returns means at the base run's positions."""
    if not means.by_position:
        return {name: mean[None] for name, mean in means.items()}
    longest, text = next(iter(means.values())).shape[0], _text_of(base)
    if base.n_positions > longest:
        raise InputError(
            f"There is no mean for position {longest}: the longest prompt averaged over has {longest} tokens, the "
            f'longest base prompt {base.n_positions}. Average over prompts of that length, or take ablation="mean".'
        )
    rows = text[:1] if (text == text[:1]).all() else text
    ranks = pad_axis(np.maximum(positions.ranks(rows), 0), base.padded_length)
    return {name: mean[ranks] for name, mean in means.items()}


def _check_names(given: Mapping[str, Any], names: Sequence[str]) -> None:
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"{unknown[0]!r} is no hook point of this graph's writers.{nearest(str(unknown[0]), names)}")
    if absent := [name for name in names if name not in given]:
        raise InputError(f"The ablation lacks values for {absent[0]}: give one for each of writer_points(graph).")


def _constant(model: HookedTransformer, base: BaseRun, name: str, value: Any) -> jax.Array:
    value, shape = jnp.asarray(value), point_table(model.cfg)[name].shape(base.batch, base.length)
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"The values for {name} have shape {value.shape}, which does not broadcast to {shape}.")
    value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape).astype(model.cfg.jnp_dtype)
    return pad_axis(value, base.padded_length) if value.shape[1] > 1 else value


def _from_source(model: HookedTransformer, base: BaseRun, names: Sequence[str], source: Any, align: Any) -> Replacement:
    run, cache = None, source if isinstance(source, ActivationCache) else None
    if cache is not None:
        cache.check_model(model, "The cache to patch from")
        if absent := [name for name in names if name not in cache]:
            raise InputError(f"The cache lacks {absent[0]}: record it with names_filter=list(writer_points(graph)).")
        found = {name: cached(cache, name) for name in names}
        batch, length = found[names[0]].shape[:2]
        mask = getattr(cache, "token_mask", None)
        text = np.ones((batch, length), bool) if mask is None else np.atleast_2d(np.asarray(mask, bool))
    elif isinstance(source, Mapping):
        raise InputError("source= is prompts or a cache; pass values by hook name as ablation=.")
    else:
        prepared = source if isinstance(source, ModelInput) else prepare(model.cfg, model._tokenizer, source)
        run = run_base(model, prepared, names)
        found, text = run.activations, _text_of(run)
    if len(text) != base.batch:
        raise InputError(f"There are {base.batch} base prompts and {len(text)} source prompts: give one for each.")
    places, own = read_alignment(align, _text_of(base), text)
    as_it_is = not own.any() and (places == np.arange(places.shape[1])).all()
    if run is not None and as_it_is and run.padded_length == base.padded_length:
        return Replacement({name: found[name] for name in names}, run)
    places, own = (pad_axis(array, base.padded_length) for array in (places, own))
    return Replacement(
        {name: _taken(found[name], base.activations[name] if own.any() else None, places, own) for name in names}, run
    )


def _taken(value: jax.Array, base: jax.Array | None, places: np.ndarray, own: np.ndarray) -> jax.Array:
    taken = jnp.take_along_axis(value, expand(places.astype(np.int32), (0, 1), value.ndim), axis=1)
    return taken if base is None else jnp.where(expand(own, (0, 1), value.ndim), base, taken)
