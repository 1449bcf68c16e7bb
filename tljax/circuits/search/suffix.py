"""Runs circuits from a layer on, where all edges below it are present: the unpatched run holds below that layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.replacement import read_replacement
from tljax.circuits.running import Chunk, CircuitRuns
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import ENTRY
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.metrics.evaluation import Measure, PositionNotKept
from tljax.processes import as_numpy

_FEW, _MANY = 4, 16
"""Numbers of masks that run at once. There are no others, because each is a set of programs to compile."""


@dataclasses.dataclass(frozen=True, eq=False)
class SuffixRuns:
    """Runs of circuits on prompts, each from the lowest layer where an edge is absent.

    Attributes:
        model, graph: the model and its graph.
        prompts: the prompts by chunk, with their unpatched runs.
        measure: the metric, prepared.
        length: length of the prompts' array.
        most: most masks that run at once.
    """

    model: HookedTransformer
    graph: ResidualGraph
    prompts: tuple["_Prompts", ...]
    measure: Measure
    length: int
    most: int

    @classmethod
    def of(cls, runs: CircuitRuns, measure: Measure) -> "SuffixRuns":
        """Runs the prompts unpatched and keeps what runs of circuits start from."""
        prompts = tuple(_Prompts.of(runs.model, runs.graph, chunk) for chunk in runs.chunks)
        most = _MANY if runs.max_batch is None else min(runs.max_batch, _MANY)
        return cls(runs.model, runs.graph, prompts, measure, runs.base.length, most)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of masks that run at once."""
        return min(self.most, _FEW), self.most

    def metrics(self, masks: np.ndarray, start: int) -> np.ndarray:
        """Measures circuits, averaged over prompts, ``[mask]``.

        Args:
            masks: ``[mask, writer, reader]``, at most ``most`` of them.
            start: the layer below which every edge is present; ``n_layers`` if only edges to the logits are absent.

        Raises:
            InputError: a metric that is not finite.
        """
        few, many = self.sizes
        size = few if len(masks) <= few else many
        filled = np.concatenate([masks, np.repeat(masks[-1:], size - len(masks), axis=0)])[:, None, None]
        finals = [prompts.finals(self.model, self.graph, filled, start) for prompts in self.prompts]
        together = np.concatenate([final[: len(masks), :, : self.length] for final in finals], axis=1)
        try:
            values = self.measure(together)
        except PositionNotKept:  # it read what it had not read of the base run
            values = self.measure(together)
        means = as_numpy(values).astype(np.float64).reshape(len(masks), -1).mean(axis=1)
        if not np.isfinite(means).all():
            raise InputError(
                f"The metric of a circuit is {means[~np.isfinite(means)][0]}: no edge can be judged by it. Take a "
                "metric that is finite whatever the logits are, such as KL or LogitDiff."
            )
        return means


@dataclasses.dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts that run together.

    Attributes:
        chunk: the prompts.
        own, carried: activations of writers in the unpatched run, and those that absent edges carry instead.
        streams: for each layer, the residual stream entering it; last the final one.
    """

    chunk: Chunk
    own: dict[str, jax.Array]
    carried: dict[str, jax.Array]
    streams: tuple[jax.Array, ...]

    @classmethod
    def of(cls, model: HookedTransformer, graph: ResidualGraph, chunk: Chunk) -> "_Prompts":
        cfg, base = model.cfg, chunk.base
        writers, entries = writer_points(graph), [f"blocks.{layer}.{ENTRY}" for layer in range(cfg.n_layers)]
        final, seen = run_forward(
            cfg, model.params, base.tokens, base.context, hooks=HookDictionary(), names=(*writers, *entries),
            stop=cfg.n_layers,
        )  # fmt: skip
        own = {name: seen[name] for name in writers}
        base = dataclasses.replace(base, activations=own)
        found = read_replacement(model, base, graph, chunk.source, chunk.ablation, align=chunk.align)
        return cls(chunk, own, found.activations, (*(seen[name] for name in entries), final))

    def finals(self, model: HookedTransformer, graph: ResidualGraph, masks: np.ndarray, start: int) -> np.ndarray:
        """Returns the final residual streams, ``[mask, batch, pos, d_model]``."""
        cfg, params, base = model.cfg, model.params, self.chunk.base
        carried = writer_outputs(cfg, params, graph, self.carried)
        carried = jnp.broadcast_to(carried, (*base.final.shape[:2], *carried.shape[2:]))
        if start == 0 or cfg.has_norms_after:  # such a run starts at the tokens
            stream = masked_stream(cfg, params, graph, base.tokens, base.context, masks, carried)
        else:
            lacking = carried - writer_outputs(cfg, params, graph, self.own)
            below = graph.writers_of(start - 1).stop
            stream = masked_stream(
                cfg, params, graph, self.streams[start], base.context, masks, carried, start=start,
                lacking=lacking[:, :, :below],
            )  # fmt: skip
        return as_numpy(stream[:, : self.chunk.count])
