"""Runs circuits on prompts: prepares what absent edges carry, and runs stacks of masks in chunks that fit into memory.

Prompts run a few at a time and masks a few at a time, so that a data set and a whole curve of circuits need no more
memory than one chunk of both. Prompts and masks are padded to standard sizes, so that programs are shared.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import is_traced, whole
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.replacement import Ablation, MeanActivations, mean_activations, read_replacement
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.errors import InputError
from tljax.memory import batch_budget
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.run import prepare_metric
from tljax.patching.metrics.evaluation import Measure, PositionNotKept
from tljax.patching.metrics.reads import unembed
from tljax.progress import Progress
from tljax.sizes import chunks, power_of_two_within, prompt_length
from tljax.text import positions
from tljax.text.inputs import ModelInput, prepare
from tljax.text.padding import pad_axis

_MOST_MASKS = 16
"""Most masks that run at once; more would not be faster."""


class RunOptions(TypedDict, total=False):
    """Options of a circuit's run, documented at :meth:`Circuit.run`."""

    ablation: Ablation
    align: Any
    batch_size: int | Literal["auto"]
    max_batch: int | Literal["auto"]
    progress: bool | None


@dataclasses.dataclass(frozen=True)
class CircuitRuns:
    """Prompts, and what absent edges carry in them: everything of a run but the circuits.

    Attributes:
        model: the model, without hooks.
        graph: its graph.
        base: the prompts' unpatched run, without activations.
        chunks: prompts that run together.
        max_batch: most masks at once.
    """

    model: HookedTransformer
    graph: ResidualGraph
    base: BaseRun
    chunks: tuple["Chunk", ...]
    max_batch: int

    @property
    def text(self) -> np.ndarray:
        """Which entries of the prompts' array are text, ``[batch, pos]``."""
        base = self.base
        return np.ones((base.batch, base.length), bool) if base.text is None else base.text

    def measure(self, metric: Any) -> Measure:
        """Prepares a metric for runs of these prompts."""
        with known():
            return prepare_metric(metric, self.model, self.base)

    def streams(self, masks: Any) -> jax.Array:
        """Computes the final residual streams of circuits, differentiable in the masks.

        Args:
            masks: ``[mask, batch or 1, pos or 1, writer, reader]``, positions being those of the prompts' array.

        Returns:
            ``[mask, batch, pos, d_model]``.
        """
        parts = [self._finals(masks, chunk, None) for chunk in self.chunks]
        return jnp.concatenate([jnp.concatenate(part) for part in parts], axis=1)

    def metrics(self, masks: Any, measure: Measure, progress: bool | None = None) -> jax.Array:
        """Measures circuits, ``[mask]`` or ``[mask, batch]``; differentiable in traced masks.

        Args:
            masks: as in :meth:`streams`.
            measure: what :meth:`measure` returned.
            progress: whether to show a progress bar.
        """
        if is_traced(masks, self.model.params):
            return jax.vmap(measure.traced)(self.streams(masks))
        only = measure.positions[0] if measure.positions is not None and len(measure.positions) == 1 else None
        with known(), Progress(len(masks) * len(self.chunks), progress, "circuits", "run") as bar:
            try:
                return measure(self._on_host(masks, only, bar), only)
            except PositionNotKept:  # it read what it had not read of the base run
                return measure(self._on_host(masks, None, bar))

    def logits(self, masks: Any) -> jax.Array:
        """Computes the logits of circuits, ``[mask, batch, pos, d_vocab_out]``."""
        head = {name: self.model.params[name] for name in ("ln_final", "unembed") if name in self.model.params}
        return unembed(self.model.cfg.computation, head, self.streams(masks))

    def laid_out(self, mask: Any, axis_names: Sequence[str]) -> Any:
        """Returns a circuit's mask ``[*axes, writer, reader]`` as :meth:`streams` takes it.

        Raises:
            InputError: other prompts or positions than those of the mask.
        """
        own = [axis for axis in axis_names if axis in ("batch", "pos")]
        sizes = dict(zip(axis_names, mask.shape[:-2], strict=True))
        for axis, size, what in (("batch", self.base.batch, "prompts"), ("pos", self.base.length, "positions")):
            if axis in own and sizes[axis] != size:
                raise InputError(f"The circuit has a mask for each of {sizes[axis]} {what}; these prompts have {size}.")
        shape = [sizes[axis] if axis in own else 1 for axis in ("batch", "pos")]
        masks = mask.reshape(-1, *shape, *mask.shape[-2:])
        if "pos" not in own:
            return masks
        ranks = np.maximum(positions.ranks(self.text), 0)
        if (ranks[self.text] == np.broadcast_to(np.arange(self.base.length), ranks.shape)[self.text]).all():
            return masks
        xp: Any = np if isinstance(masks, np.ndarray) else jnp
        spread = xp.broadcast_to(masks, (len(masks), self.base.batch, *masks.shape[2:]))
        return xp.take_along_axis(spread, ranks[None, :, :, None, None], axis=2)

    def _on_host(self, masks: Any, only: int | None, bar: Progress) -> np.ndarray:
        finals = []
        for chunk in self.chunks:
            finals.append(np.concatenate([np.asarray(part) for part in self._finals(masks, chunk, only)]))
            bar.advance(len(masks))
        return np.concatenate(finals, axis=1)

    def _finals(self, masks: Any, chunk: "Chunk", only: int | None) -> list[jax.Array]:
        """Returns the final streams of one chunk of prompts, for each chunk of masks."""
        own = masks[:, chunk.rows] if masks.shape[1] > 1 else masks
        xp = np if isinstance(own, np.ndarray) else jnp
        base, finals = chunk.base, []
        if own.shape[2] > 1:
            own = pad_axis(own, base.padded_length, axis=2)
        replacement = chunk.replacement(self.model, self.graph)
        cfg, params = self.model.cfg, self.model.params
        for first, size in self._mask_chunks(len(own)):
            some = own[first : first + size]
            filled = xp.concatenate([some, xp.repeat(some[-1:], size - len(some), axis=0)])
            stream = masked_stream(cfg, params, self.graph, base.tokens, base.context, filled, replacement)
            where = slice(base.length) if only is None else slice(only, only + 1)
            finals.append(stream[: len(some), : chunk.count, where])
        return finals

    def _mask_chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Yields start and size of chunks of masks: powers of two, so that few programs serve any number of masks."""
        many = power_of_two_within(max(1, min(count, self.max_batch, _MOST_MASKS)))
        return chunks(count, many, max(1, many // 4))


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Prompts that run together.

    Attributes:
        rows: their numbers; the last one may be repeated to fill the chunk.
        count: how many of them count.
        base: their unpatched run, with activations only where ``align`` needs them.
        source, ablation, align: what absent edges carry, as in
            :func:`~tljax.circuits.replacement.read_replacement`.
    """

    rows: np.ndarray
    count: int
    base: BaseRun
    source: Any
    ablation: Ablation
    align: np.ndarray | None

    def replacement(self, model: HookedTransformer, graph: ResidualGraph) -> jax.Array:
        """Computes what absent edges carry, ``[batch, padded_pos, writer, d_model]``: one shape for every ablation."""
        with known():
            found = read_replacement(model, self.base, graph, self.source, self.ablation, align=self.align)
            carried = writer_outputs(model.cfg, model.params, graph, found.activations)
            return jnp.broadcast_to(carried, (*self.base.final.shape[:2], *carried.shape[2:]))


def prepare_runs(
    model: HookedTransformer,
    graph: ResidualGraph,
    prompt: Any,
    source: Any = None,
    *,
    ablation: Ablation = "patching",
    align: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    max_batch: int | Literal["auto"] = "auto",
) -> CircuitRuns:
    """Runs the prompts unpatched, and prepares what absent edges carry.

    Args:
        model: the model, without hooks.
        graph: its graph.
        prompt: the prompts.
        source, ablation, align: as in :func:`~tljax.circuits.replacement.read_replacement`.
        batch_size: prompts that run at once; ``"auto"`` goes by the free memory.
        max_batch: most masks that run at once; ``"auto"`` goes by the free memory.

    Raises:
        InputError: a model with hooks, another model's graph, traced prompts, or a source that does not fit.
    """
    graph.check(model.cfg)
    if model._hooks.entries:
        raise InputError(
            "This model carries hooks, and circuits run without them: pass model.reset_hooks(). What absent edges "
            "carry may be anything: give it as ablation=."
        )
    if is_traced(prompt, source, model.params):
        raise InputError(
            "Circuits run on known prompts and parameters: under jax.jit, grad and vmap only masks may be traced. Make "
            "prompts and model outside, and let the function close over them."
        )
    with known():
        prepared = prepare(model.cfg, model._tokenizer, prompt)
        batch, length = prepared.batch_and_pos
        source, ablation = _read_once(model, graph, source, ablation, batch_size)
        if isinstance(source, ModelInput) and source.batch_and_pos[0] != batch:
            n = source.batch_and_pos[0]
            raise InputError(f"There are {batch} base prompts and {n} source prompts: give one for each.")
        width = prompt_length(length, model.cfg.n_ctx)
        affordable = max(1, _affordable(model, graph) // width)
        at_once = affordable if batch_size == "auto" else whole(batch_size, "batch_size", at_least=1)
        at_once = batch if isinstance(source, ActivationCache) else min(at_once, batch)
        parts = []
        for first in range(0, batch, at_once):
            rows = np.minimum(np.arange(first, first + at_once), batch - 1)
            own = {"source": _some(source, rows), "ablation": _some(ablation, rows, batch), "align": _some(align, rows)}
            run = run_base(model, _some(prepared, rows), writer_points(graph))
            run = run if align is not None else dataclasses.replace(run, activations={})
            parts.append(Chunk(rows, min(at_once, batch - first), run, **own))
    most = max(1, affordable // at_once)
    most = most if max_batch == "auto" else min(most, whole(max_batch, "max_batch", at_least=1))
    return CircuitRuns(model, graph, _joined(parts), tuple(parts), most)


def known() -> Any:
    """Returns a context in which known arrays stay known, also under a caller's ``jit``."""
    return jax.ensure_compile_time_eval()


def _read_once(
    model: HookedTransformer, graph: ResidualGraph, source: Any, ablation: Ablation, batch_size: int | Literal["auto"]
) -> tuple[Any, Ablation]:
    """Returns source and ablation in a form whose prompts can run a few at a time."""
    if isinstance(ablation, str) and ablation in ("mean", "positional_mean") and source is not None:
        size = 32 if batch_size == "auto" else batch_size
        by_position = ablation == "positional_mean"
        return None, mean_activations(model, source, graph, by_position=by_position, batch_size=size)
    if ablation == "patching" and source is not None and not isinstance(source, Mapping | ActivationCache):
        return prepare(model.cfg, model._tokenizer, source), ablation
    return source, ablation


def _some(given: Any, rows: np.ndarray, batch: int | None = None) -> Any:
    """Returns the part of prompts, of an alignment, or of constants by hook name that belongs to some prompts."""
    if isinstance(given, ModelInput):
        parts: dict[str, Any] = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        parts = {name: None if part is None else np.asarray(part)[rows] for name, part in parts.items()}
        return ModelInput(**parts)
    if isinstance(given, Mapping) and not isinstance(given, MeanActivations | ActivationCache):
        return {
            name: value[rows] if np.shape(value)[:1] == (batch,) != (1,) else value for name, value in given.items()
        }
    return np.asarray(given)[rows] if batch is None and isinstance(given, np.ndarray | jax.Array | list) else given


def _joined(parts: Sequence[Chunk]) -> BaseRun:
    """Returns the runs of all prompts as one, without activations."""
    runs = [part.base for part in parts]
    if len(runs) == 1:
        return dataclasses.replace(runs[0], activations={})
    final = jnp.concatenate([part.base.final[: part.count] for part in parts])
    tokens = np.concatenate([part.base.tokens[: part.count] for part in parts])
    texts = [part.base.text[: part.count] for part in parts if part.base.text is not None]
    text = np.concatenate(texts) if texts else None
    return dataclasses.replace(runs[0], activations={}, final=final, tokens=tokens, text=text)


def _affordable(model: HookedTransformer, graph: ResidualGraph) -> int:
    """Returns how many tokens of masked runs fit into memory: each holds what every writer lacks, and reads apart."""
    cfg = model.cfg
    layer = max(len(range(graph.n_readers)[graph.readers_of(layer)]) for layer in range(graph.n_layers))
    per_token = cfg.jnp_dtype.itemsize * cfg.d_model * (2 * graph.n_writers + 2 * layer)
    return batch_budget(next(iter(jax.tree.leaves(model.params)[0].devices()))) // per_token
