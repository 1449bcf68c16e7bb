"""Prompts in batches: the base and source prompts of each, and the metric of its prompts alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, whole
from tljax.circuits.graph import ResidualGraph
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.memory import batch_budget
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.context import AttentionContext
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.run import prepare_metric
from tljax.patching.metrics.evaluation import Measure
from tljax.patching.metrics.metrics import DeclaredMetric
from tljax.sizes import prompt_length
from tljax.text.alignment import read_alignment
from tljax.text.batch import Batch
from tljax.text.inputs import prepare


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Base prompts, and what belongs to each.

    Attributes:
        base: the prompts.
        source: as many prompts that replacements come from; ``None`` if they come from elsewhere.
        align: ``[batch, pos]``, the source's entry for each entry of the base's array; ``None`` if texts have equal
            lengths.
    """

    base: Batch
    source: Batch | None
    align: np.ndarray | None

    @classmethod
    def of(cls, model: HookedTransformer, prompt: Any, source: Any, align: Any) -> "Pairs":
        """Makes pairs of prompts.

        Raises:
            InputError: prompts that are traced, another number of them on either side, or an alignment that does not
                fit.
        """
        if is_traced(prompt, source):
            raise InputError("Edge scores are planned on concrete tokens: call edge_scores outside jax.jit and vmap.")
        base = model.to_batch(prompt)
        other = None if source is None else model.to_batch(source)
        if other is not None and len(other) != len(base):
            raise InputError(
                f"There are {len(base)} base prompts and {len(other)} source prompts: give one for each, in order."
            )
        if align is not None and other is not None:
            align = np.asarray(align)
            read_alignment(align, np.asarray(base.mask), np.asarray(other.mask))  # before it is cut into batches
        return cls(base, other, align)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def n_positions(self) -> int:
        """Number of tokens of the longest base prompt."""
        return int(np.asarray(self.base.mask).sum(axis=1).max())

    def rows(self, rows: slice) -> "Pairs":
        """Returns some of the pairs."""
        if rows == slice(0, len(self)):
            return self
        source = None if self.source is None else _rows(self.source, rows)
        return Pairs(_rows(self.base, rows), source, None if self.align is None else self.align[rows])


def _rows(batch: Batch, rows: slice) -> Batch:
    return jax.tree.map(lambda part: jax.device_put(np.asarray(part)[rows]), batch)


def run_pairs(model: HookedTransformer, batch: Batch, names: tuple[str, ...]) -> BaseRun:
    """Runs prompts, keeping some activations besides residual streams."""
    return run_base(model, prepare(model.cfg, model._tokenizer, batch), names)


def slices(
    cfg: HookedTransformerConfig, graph: ResidualGraph, pairs: Pairs, size: int | Literal["auto"]
) -> Iterator[slice]:
    """Yields the rows of each batch: ``size`` prompts, or as many as memory allows."""
    if size == "auto":
        length = prompt_length(pairs.base.shape[1], cfg.n_ctx)
        width = max(4, cfg.jnp_dtype.itemsize)
        # two runs' writers, streams, keys and values, and gradients; one block's intermediate results
        token = 10 * cfg.d_model * cfg.n_layers + 8 * (cfg.d_mlp or 0) + 4 * cfg.n_heads * length
        size = max(1, batch_budget() // (width * length * token))
        size = -(-len(pairs) // -(-len(pairs) // size))
    size = whole(size, "batch_size", at_least=1)
    for first in range(0, len(pairs), size):
        yield slice(first, min(first + size, len(pairs)))


@dataclasses.dataclass(frozen=True)
class SomePrompts:
    """A metric of all prompts, evaluated where only some of them differ from the base run.

    Attributes:
        measure: the metric of all prompts.
        finals: their final residual streams in the base run, ``[batch, pos, d_model]``.
        rows: the prompts that differ.
    """

    measure: Measure
    finals: jax.Array
    rows: slice

    @property
    def baseline(self) -> jax.Array:
        """The metric of the base run, a number or one for each prompt that may differ."""
        return self._own(self.measure.baseline)

    def traced(self, residual: jax.Array) -> jax.Array:
        """Evaluates the metric, as :meth:`~tljax.patching.metrics.evaluation.Measure.traced` does."""
        return self._own(self.measure.traced(self.finals.at[self.rows].set(residual)))

    def _own(self, value: jax.Array) -> jax.Array:
        return value[self.rows] if value.ndim else value


class PerBatch:
    """A metric for prompts that run in batches.

    A metric of tljax.patching is cut to the prompts of a batch; any other is evaluated on all prompts, with those
    outside the batch as in the base run, which therefore runs first.

    Args:
        metric: the metric of all prompts.
        model: the model.
        pairs: all prompts.
        batches: the rows of each batch.

    Attributes:
        metric: the metric of all prompts.
    """

    def __init__(self, metric: Any, model: HookedTransformer, pairs: Pairs, batches: Sequence[slice]) -> None:
        self.metric, self._model = metric, model
        self._whole: Measure | None = None
        self._finals: jax.Array | None = None
        self._is_cut = len(batches) > 1 and _has_rows(metric, len(pairs))
        if len(batches) > 1 and not self._is_cut:
            finals = jnp.concatenate([run_pairs(model, pairs.rows(rows).base, ()).final for rows in batches])
            text = np.asarray(pairs.base.mask)
            length = text.shape[1]
            tokens, context = np.asarray(pairs.base.tokens), AttentionContext()
            base = BaseRun({}, finals, tokens, context, length, None if text.all() else text)
            self._whole, self._finals = prepare_metric(metric, model, base), finals[:, :length]

    def measure(self, base: BaseRun, rows: slice) -> Measure | SomePrompts:
        """Returns the metric for the prompts of a batch, given their base run."""
        if self._whole is not None and self._finals is not None:
            return SomePrompts(self._whole, self._finals, rows)
        return prepare_metric(self._of(rows), self._model, base)

    def of_source(self, source: BaseRun, rows: slice) -> jax.Array | None:
        """Returns the metric of source prompts of other lengths; ``None`` if it cannot be told what it is there."""
        metric = self._of(rows)
        if not isinstance(metric, DeclaredMetric) or self._whole is not None:
            return None
        try:
            return prepare_metric(metric, self._model, source).baseline
        except InputError:  # it compares with logits, or tokens, of the base prompts
            return None

    def _of(self, rows: slice) -> Any:
        if not self._is_cut:
            return self.metric
        return jax.tree.map(lambda leaf: leaf[rows] if np.ndim(leaf) else leaf, self.metric)


def _has_rows(metric: Any, n_prompts: int) -> bool:
    """Whether each array of a metric has one entry for each prompt, so that it can be cut to some of them."""
    if not isinstance(metric, DeclaredMetric):
        return False
    leaves = jax.tree.leaves(metric)
    numbers = jax.Array | np.ndarray | np.generic | int | float
    return all(isinstance(leaf, numbers) and np.shape(leaf)[:1] in ((), (n_prompts,)) for leaf in leaves)
