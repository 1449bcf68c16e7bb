"""The prompts that a circuit is learned from: what is run, what absent edges carry instead, and what is compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.replacement import MeanActivations, mean_activations
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.context import AttentionContext
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.run import prepare_metric
from tljax.patching.metrics.evaluation import Measure
from tljax.processes import as_numpy
from tljax.text import positions
from tljax.text.alignment import read_alignment
from tljax.text.inputs import ModelInput, prepare
from tljax.typing import Params

Ablation = Literal["patching", "zero", "mean", "positional_mean", "optimal"]
"""What absent edges carry: the source run's value, zero, a mean, the mean of each position, a learned constant."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids ``[prompt, pos]`` with their positions and padding; ``None`` as in :class:`AttentionContext`."""

    tokens: jax.Array
    positions: jax.Array | None = None
    token_mask: jax.Array | None = None

    @classmethod
    def of(cls, given: ModelInput) -> "Prompts":
        """Takes them from a checked input."""
        tokens = jnp.asarray(given.value)
        batch, context = tokens.shape, AttentionContext.of(given)
        placed = None if context.positions is None else jnp.broadcast_to(context.positions, batch)
        return cls(tokens, placed, context.token_mask)

    @property
    def context(self) -> AttentionContext:
        """Positions and padding, as a run takes them."""
        return AttentionContext(self.positions, self.token_mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Base prompts, and what absent edges carry in them. A pytree; axes named ``prompt`` are all of one size.

    Attributes:
        base: the prompts.
        last: the last token of each prompt, ``[prompt]``.
        final: final residual stream of the unpatched run there, ``[prompt, d_model]``.
        metric: the metric, as a pytree whose leaves may have a leading axis ``prompt``; ``None`` if there is none, or
            it is a Python function.
        baseline: the metric of the unpatched run, ``[prompt]`` or ``[]``; ``None`` without a metric.
        source: the prompts whose values absent edges carry.
        aligned: for each base token the source token's position, -1 where there is none, ``[prompt, pos]``; ``None``
            if all tokens match.
        means: constants in place of ``source``: activations by full name, ``[position or 1, ...]``.
        ranks: which of the positions of ``means`` each token is at, ``[prompt or 1, pos or 1]``.
    """

    base: Prompts
    last: jax.Array
    final: jax.Array
    metric: Any = None
    baseline: jax.Array | None = None
    source: Prompts | None = None
    aligned: jax.Array | None = None
    means: dict[str, jax.Array] | None = None
    ranks: jax.Array | None = None

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return self.last.shape[0]

    def take(self, rows: Any) -> "Pairs":
        """Returns some of the prompts, by number ``[row]``."""
        count = self.n_prompts

        def taken(leaf: Any) -> Any:
            return leaf[rows] if jnp.ndim(leaf) and leaf.shape[0] == count else leaf

        shared = dataclasses.replace(self, means=None)
        return dataclasses.replace(jax.tree.map(taken, shared), means=self.means)


def read_pairs(
    model: HookedTransformer,
    graph: ResidualGraph,
    prompts: Any,
    source: Any,
    ablation: Any,
    metric: Any,
    align: Any,
    batch_size: int,
) -> tuple[Pairs, Measure | None]:
    """Reads the prompts, and runs what is needed of the unpatched model.

    Args:
        model, graph: the model and its graph.
        prompts, source, ablation, metric, align, batch_size: as in
            :func:`~tljax.circuits.search.learned.learn_circuit`.

    Returns:
        The pairs, and the prepared metric.

    Raises:
        InputError: prompts that do not match, a source that is missing, a metric that cannot be taken apart by prompt.
    """
    if model._hooks.entries:
        raise InputError("The model carries hooks, which circuits leave out. Take them off: model.reset_hooks().")
    graph.check(model.cfg)
    given = prepare(model.cfg, model._tokenizer, prompts)
    count, length = given.batch_and_pos
    text = np.ones((count, length), bool) if given.text is None else np.asarray(given.text)
    if not text.any(axis=1).all():
        raise InputError(f"Prompt {int(np.argmin(text.any(axis=1)))} has no token: all of it is padding.")
    base, last = Prompts.of(given), np.where(text, np.arange(length), -1).max(axis=1)
    streams = []
    for rows, kept in in_batches(count, batch_size):
        final = as_numpy(_run(model, base, rows, ())[0])[:kept]
        streams.append(final[np.arange(kept), last[rows[:kept]]] if metric is None else final)
    finals, measure = np.concatenate(streams), None
    if metric is None:
        pairs = Pairs(base, jnp.asarray(last), jnp.asarray(finals))
    else:
        measure = _measure(model, base, finals, given.text, metric, batch_size)
        by_prompt = measure.metric if measure.how == "compiled" else None
        at_last = jnp.asarray(finals[np.arange(count), last])
        pairs = Pairs(base, jnp.asarray(last), at_last, by_prompt, measure.baseline)
    return _with_replacement(model, graph, pairs, prompts, text, source, ablation, align, batch_size), measure


def replacement_of(cfg: HookedTransformerConfig, params: Params, graph: ResidualGraph, pairs: Pairs) -> jax.Array:
    """Computes what absent edges carry, ``[prompt or 1, pos or 1, writer, d_model]``; traceable."""
    names = writer_points(graph)
    if pairs.means is not None:
        assert pairs.ranks is not None
        seen = {name: pairs.means[name][pairs.ranks] for name in names}
        return writer_outputs(cfg, params, graph, seen)
    assert pairs.source is not None
    seen = _activations(cfg, params, pairs.source, names)
    if pairs.aligned is not None:
        own, aligned = _activations(cfg, params, pairs.base, names), pairs.aligned
        seen = {name: _lined_up(seen[name], own[name], aligned) for name in names}
    return writer_outputs(cfg, params, graph, seen)


def in_batches(count: int, size: int) -> list[tuple[np.ndarray, int]]:
    """Returns numbers of prompts, ``size`` at a time, and how many are new: the last prompt fills up the last batch."""
    size = min(size, count)
    starts = range(0, count, size)
    return [(np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)) for start in starts]


def _run(model: HookedTransformer, prompts: Prompts, rows: np.ndarray, names: tuple[str, ...]) -> tuple[Any, Any]:
    """Runs some of the prompts to the final residual stream, and records activations."""
    some: Prompts = jax.tree.map(lambda leaf: leaf[rows], prompts)
    return run_forward(
        model.cfg, model.params, some.tokens, some.context, hooks=HookDictionary(), names=names, stop=model.cfg.n_layers
    )


def _activations(
    cfg: HookedTransformerConfig, params: Params, prompts: Prompts, names: tuple[str, ...]
) -> Mapping[str, jax.Array]:
    hooks, stop = HookDictionary(), cfg.n_layers
    return run_forward(cfg, params, prompts.tokens, prompts.context, hooks=hooks, names=names, stop=stop)[1]


def _lined_up(source: jax.Array, own: jax.Array, aligned: jax.Array) -> jax.Array:
    """Moves a source's activations ``[prompt, pos, ...]`` to the base's tokens; those without a match keep ``own``."""
    there = jnp.expand_dims(aligned, tuple(range(2, source.ndim)))
    moved = jnp.take_along_axis(source, jnp.maximum(there, 0), axis=1)
    return jnp.where(there >= 0, moved, own)


def _measure(
    model: HookedTransformer, base: Prompts, finals: np.ndarray, text: Any, metric: Any, batch_size: int
) -> Measure:
    """Prepares a metric, and refuses one that cannot be learned from."""
    count, length = base.tokens.shape
    known = None if text is None else np.asarray(text)
    run = BaseRun({}, jnp.asarray(finals), np.asarray(base.tokens), base.context, length, known)
    measure = prepare_metric(metric, model, run)
    if measure.how != "compiled" and count > batch_size:
        raise InputError(
            f"The metric is a Python function, which cannot be taken apart into {batch_size} of {count} prompts: what "
            "it compares may belong to each. Use LogitDiff or another metric of tljax.patching, a pytree of your own, "
            f"or batch_size={count}."
        )
    noise = np.random.default_rng(0).normal(size=finals.shape) * finals.std()
    slope = jax.grad(lambda stream: measure.traced(stream).sum())(
        jnp.asarray(finals + 0.1 * noise.astype(finals.dtype))
    )
    if not np.any(np.asarray(slope)):
        raise InputError(
            "The metric has a gradient of zero, as accuracy and other counts have, so that nothing can be learned from "
            "it. Use a smooth one: LogitDiff, LogProb, or metric=None for the KL divergence from the model."
        )
    return measure


def _with_replacement(
    model: HookedTransformer,
    graph: ResidualGraph,
    pairs: Pairs,
    prompts: Any,
    text: np.ndarray,
    source: Any,
    ablation: Any,
    align: Any,
    batch_size: int,
) -> Pairs:
    """Returns the pairs with what absent edges carry."""
    if isinstance(ablation, Mapping):
        return with_constants(pairs, _constants(model, graph, ablation), text)
    if ablation == "zero":
        zero = dict.fromkeys(writer_points(graph), 0.0)
        return with_constants(pairs, _constants(model, graph, zero), text)
    if ablation == "patching":
        if source is None:
            raise InputError(
                'ablation="patching" gives absent edges the values of another run: pass its prompts as source=. '
                'Without one, choose ablation="mean", "zero" or "optimal".'
            )
        given = prepare(model.cfg, model._tokenizer, source)
        aligned = _alignment(pairs, text, given, align)
        return dataclasses.replace(pairs, source=Prompts.of(given), aligned=aligned)
    over, by_position = prompts if source is None else source, ablation == "positional_mean"
    means = mean_activations(model, over, graph, by_position=by_position, batch_size=batch_size)
    return with_constants(pairs, means.means, text)


def with_constants(pairs: Pairs, means: dict[str, jax.Array], text: np.ndarray | None = None) -> Pairs:
    """Returns the pairs with constants as what absent edges carry.

    Args:
        pairs: the prompts.
        means: activations by full name, ``[position or 1, ...]``.
        text: which tokens are text, ``[prompt, pos]``; not needed for constants that are the same at all positions.

    Raises:
        InputError: a prompt has more tokens than there are positions.
    """
    known = next(iter(means.values())).shape[0]
    ranks = np.zeros((1, 1), np.int32)
    if known > 1:
        assert text is not None
        ranks = np.maximum(positions.ranks(text), 0)
        if ranks.max() >= known:
            raise InputError(
                f"There are constants for {known} positions, and the longest prompt has {ranks.max() + 1} tokens. "
                'Average over prompts of that length, or take ablation="mean".'
            )
    return dataclasses.replace(pairs, source=None, aligned=None, means=means, ranks=jnp.asarray(ranks))


def _constants(model: HookedTransformer, graph: ResidualGraph, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Checks constants by full name, and gives each an axis of positions, ``[position or 1, ...]``."""
    table, names, dtype = point_table(model.cfg), writer_points(graph), model.cfg.jnp_dtype
    if isinstance(given, MeanActivations):
        given = given.means
    if wrong := set(given) ^ set(names):
        raise InputError(f"ablation= as a mapping names each of writer_points(graph) and no other; see {min(wrong)!r}.")
    shapes = {name: table[name].shape(1, 1)[2:] for name in names}
    found = {}
    for name, shape in shapes.items():
        value = jnp.asarray(given[name], dtype)
        by_position = value.ndim == len(shape) + 1
        try:
            fits = np.broadcast_shapes(value.shape[by_position:], shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"ablation[{name!r}] has shape {value.shape}; it is {shape}, or [position, ...] of these.")
        found[name] = jnp.broadcast_to(value, (len(value) if by_position else 1, *shape))
    if len({len(value) for value in found.values()}) > 1:
        raise InputError("ablation= holds different numbers of positions for its hook points: give all for the same.")
    return found


def _text_of(given: ModelInput) -> np.ndarray:
    return np.ones(given.batch_and_pos, bool) if given.text is None else np.asarray(given.text)


def _alignment(pairs: Pairs, text: np.ndarray, source: ModelInput, align: Any) -> jax.Array | None:
    """Checks an alignment, and returns it; ``None`` if all tokens match as they stand."""
    shape, count = pairs.base.tokens.shape, source.batch_and_pos[0]
    if count != shape[0]:
        raise InputError(f"There are {shape[0]} prompts and {count} source prompts: they go in pairs, one for each.")
    other = _text_of(source)
    places, own = read_alignment(align, text, other)
    if align is None and other.shape == shape and (other == text).all():
        return None
    return jnp.asarray(np.where(own | ~text, -1, places), jnp.int32)
