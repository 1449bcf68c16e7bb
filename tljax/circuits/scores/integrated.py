"""The runs along which edge scores take gradients: one run, or several between the base run and the replaced one."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.integrated import nodes_of_grid
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.scores.gradients import Edits, Path, follow, full_context
from tljax.circuits.writers import EMBED, HEADS, MLP
from tljax.config import HookedTransformerConfig
from tljax.hooks.interventions import Add, Chain, Replace, Scale
from tljax.hooks.points import ENTRY
from tljax.memory import how_many
from tljax.modules.context import AttentionContext
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.run import batch_limits
from tljax.processes import as_numpy
from tljax.typing import Params

Grid = Literal["gauss", "midpoint", "left", "right", "both"]
"""Where points lie between base (0) and replacement (1): ``"left"`` includes base, ``"right"`` the replacement."""

_MID = "hook_resid_mid"
_SHARE = 3
"""The part of the working memory that runs of one batch may hold is one over this."""


def points_of(grid: Grid, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far from base to replacement each point of a grid lies, and its weight.

    ``"both"`` has one point more than steps, all of equal weight.

    >>> [array.tolist() for array in points_of("right", 4)]
    [[0.25, 0.5, 0.75, 1.0], [0.25, 0.25, 0.25, 0.25]]
    """
    if grid == "both":
        return np.linspace(0, 1, steps + 1), np.full(steps + 1, 1 / (steps + 1))
    return nodes_of_grid(grid, steps)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Both ends of a path: the base run, and what is put into it.

    Attributes:
        cfg, params, graph: the model and its graph.
        base: the base run, with the activations of :func:`~tljax.circuits.writers.writer_points`.
        context: its positions and padding, for blocks run on their own.
        replacement: activations that are put in, by full name, ``[batch or 1, pos or 1, ...]``.
        changes: replacement minus base, ``[batch, pos, ...]``, zero at padding.
        text: which entries of the padded prompts are text, ``[batch, pos]``.
        source: the run that replacements come from, if it stands at the base's own positions.
        keeps_heads: whether :attr:`Path.activations` must have every layer's ``hook_z``.
    """

    cfg: HookedTransformerConfig
    params: Params
    graph: ResidualGraph
    base: BaseRun
    context: AttentionContext
    replacement: Mapping[str, jax.Array]
    changes: Mapping[str, jax.Array]
    text: np.ndarray
    source: BaseRun | None
    keeps_heads: bool

    @classmethod
    def of(
        cls, model: Any, graph: ResidualGraph, base: BaseRun, replacement: Any, source: BaseRun | None, heads: bool
    ) -> "Ends":
        """Makes the ends of a path from a base run and the activations that are put into it."""
        cfg, params = model.cfg, model.params
        text = np.arange(base.padded_length) < np.full((base.batch, 1), base.length)
        if base.text is not None:
            text[:, : base.length] &= base.text
        changes = {name: _change(value, base.activations[name], text) for name, value in replacement.items()}
        context = full_context(cfg, params, base.context, base.residual(0))
        return cls(cfg, params, graph, base, context, replacement, changes, text, source, heads)

    @property
    def heads(self) -> tuple[str, ...]:
        """Full names of every layer's ``hook_z``, if paths must keep them."""
        return tuple(f"blocks.{n}.{HEADS}" for n in range(self.cfg.n_layers)) if self.keeps_heads else ()

    def path_of(self, run: BaseRun) -> Path:
        """Returns a run that changes nothing."""
        streams = tuple(run.residual(layer) for layer in range(self.cfg.n_layers))
        return Path(streams, run.final, {name: run.activations[name] for name in self.heads})

    @property
    def runs_at_once(self) -> int:
        """How many runs of the base's prompts fit into one batch; one, where heads' changes differ between runs."""
        if self.keeps_heads:
            return 1
        limits = batch_limits(self.cfg, self.params, self.base, "auto")
        batch, length = self.base.tokens.shape
        held = 5 * self.cfg.n_layers * self.base.final.nbytes  # streams, and gradients at four projections
        return max(1, min(limits.tokens // (batch * length), limits.rows // batch, how_many(_SHARE * held)))

    def context_of(self, copies: int) -> AttentionContext:
        """Returns the context of a batch that holds the base's prompts several times, one copy after another."""
        if copies == 1:
            return self.context
        return jax.tree.map(lambda array: jnp.concatenate([array] * copies), self.context)

    def follow(self, edits: Edits, names: tuple[str, ...] = (), layer: int | None = None, copies: int = 1) -> Path:
        """Runs the base's prompts with some activations changed, from a layer on if nothing changes before it.

        ``copies`` of the prompts, one after another, make one batch.
        """
        before = () if layer is None else tuple(self.base.residual(n) for n in range(layer))
        value = np.concatenate([self.base.tokens] * copies) if layer is None else self.base.residual(layer)
        names = tuple(dict.fromkeys((*self.heads, *names)))
        late = names if layer is None else tuple(name for name in names if int(name.split(".")[1]) >= layer)
        context = self.context_of(copies)
        path = follow(self.cfg, self.params, value, context, edits, late, start=layer, before=before)
        early = {name: self.base.activations[name] for name in names if name not in path.activations}
        return dataclasses.replace(path, activations={**early, **path.activations})

    def between(self, name: str, place: float) -> jax.Array:
        """Returns an activation that lies ``place`` of the way from base to replacement."""
        base = self.base.activations[name]
        return (base + jnp.asarray(place, self.changes[name].dtype) * self.changes[name]).astype(base.dtype)


@jax.jit
def _change(replacement: jax.Array, base: jax.Array, text: jax.Array) -> jax.Array:
    wide = jnp.promote_types(base.dtype, jnp.float32)
    counted = text.reshape(*text.shape, *(1,) * (base.ndim - 2))
    return jnp.where(counted, replacement.astype(wide) - base.astype(wide), 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """A run at which gradients are taken.

    Attributes:
        path: the run; or several of the same prompts in one batch, one after another.
        weights: the share of the score that each of them has.
        changes: what activations change by when an edge carries its replacement.
    """

    path: Path
    weights: tuple[float, ...]
    changes: Mapping[str, jax.Array]

    def paths(self) -> Iterator[slice]:
        """Yields the rows of each run."""
        batch = self.path.final.shape[0] // len(self.weights)
        for number in range(len(self.weights)):
            yield slice(number * batch, (number + 1) * batch)


def at_base(ends: Ends) -> Iterator[Step]:
    """Yields the base run alone (EAP, Syed et al. 2023)."""
    yield Step(ends.path_of(ends.base), (1.0,), ends.changes)


def along_inputs(ends: Ends, places: np.ndarray, weights: np.ndarray) -> Iterator[Step]:
    """Yields runs whose token embeddings lie between base and source (EAP-IG-inputs, Hanna et al. 2024)."""
    known = [place == 0 or (place == 1 and ends.source is not None) for place in places]
    for place, weight in zip(places[known], weights[known], strict=True):
        yield Step(input_path(ends, place), (float(weight),), ends.changes)
    rest = np.flatnonzero(~as_numpy(known))
    for group in np.array_split(rest, -(-len(rest) // ends.runs_at_once)) if len(rest) else ():
        between = jnp.concatenate([ends.between(EMBED, float(places[number])) for number in group])
        path = ends.follow({EMBED: Replace(between)}, copies=len(group))
        yield Step(path, tuple(map(float, weights[group])), ends.changes)


def input_path(ends: Ends, place: float) -> Path:
    """Runs the base's prompts with token embeddings ``place`` of the way to the source's."""
    if place == 0:
        return ends.path_of(ends.base)
    if place == 1 and ends.source is not None:
        return ends.path_of(ends.source)
    return ends.follow({EMBED: Replace(ends.between(EMBED, place))})


def along_activations(ends: Ends, places: np.ndarray, weights: np.ndarray) -> Iterator[Step]:
    """Yields runs in each of which one output lies in between: the embedding's, an attention layer's, an MLP's.

    (EAP-IG-activations, Hanna et al. 2024.)
    """
    branches = (HEADS,) if ends.graph.attn_only else (HEADS, MLP)
    outputs = [(EMBED, None)]
    outputs += [(f"blocks.{layer}.{name}", layer) for layer in range(ends.cfg.n_layers) for name in branches]
    for name, layer in outputs:
        for place, weight in zip(places, weights, strict=True):
            path = ends.follow({name: Replace(ends.between(name, place))}, layer=layer)
            yield Step(path, (weight / len(outputs),), ends.changes)


def along_masks(ends: Ends, places: np.ndarray, weights: np.ndarray) -> Iterator[Step]:
    """Yields runs in which every edge mixes its writer's output with the replacement (mask-IG).

    All edges mix alike, so that every reader of a place reads the same stream, to which writers add a mixture of what
    they wrote and the replacement. An edge's change is the replacement minus what its writer wrote in that run.
    """
    for place, weight in zip(places, weights, strict=True):
        path = mixed_path(ends, place)
        yield Step(path, (weight,), _changes_in(ends, path, place))


def mixed_path(ends: Ends, place: float) -> Path:
    """Runs the base's prompts with every edge ``place`` of the way to its replacement."""
    names = (*_mixed(ends), *_experts(ends))
    if place == 0:
        path = ends.path_of(ends.base)
        return dataclasses.replace(path, activations={name: ends.base.activations[name] for name in names})
    replaced = {name: ends.base.activations[name] + ends.changes[name] for name in _mixed(ends)}
    edits: Edits = {name: _mixture(value, place) for name, value in replaced.items()}
    edits = {EMBED: Replace(ends.between(EMBED, place)), **edits}
    middle = () if ends.graph.attn_only or ends.graph.parallel_attn_mlp else (_MID,)
    extra = [f"blocks.{layer}.{name}" for layer in range(ends.cfg.n_layers) for name in middle]
    return ends.follow(edits, (*names, *(extra if place == 1 else ())))


def _mixture(value: jax.Array, place: float) -> Chain:
    share = jnp.asarray(place, jnp.promote_types(value.dtype, jnp.float32))
    return Chain(Scale(1 - share), Add(value * share))


def _mixed(ends: Ends) -> tuple[str, ...]:
    """Returns full names of what blocks write, mixed by :func:`mixed_path`."""
    return tuple(name for name in ends.changes if name.endswith((HEADS, MLP)))


def _experts(ends: Ends) -> tuple[str, ...]:
    return tuple(name for name in ends.changes if name != EMBED and not name.endswith((HEADS, MLP)))


def _changes_in(ends: Ends, path: Path, place: float) -> dict[str, jax.Array]:
    """Returns replacement minus what writers wrote in a mixed run, before it was mixed."""
    found = {EMBED: ends.changes[EMBED]}
    wrote = path.activations if place < 1 else _unmixed(ends, path)
    for name in ends.changes:
        if name == EMBED:
            continue
        # of what was written and then mixed, the change from there is (1 - place) of the one before
        share = 1 - place if place < 1 and name in _mixed(ends) else 1.0
        moved = _change(wrote[name], ends.base.activations[name], ends.text)
        found[name] = (ends.changes[name] - moved) / share
    return found


def _unmixed(ends: Ends, path: Path) -> Mapping[str, jax.Array]:
    """Runs blocks on the streams of a wholly replaced run, to see what writers write there."""
    edits: dict[str, Any] = {}
    for layer, stream in enumerate(path.streams):
        edits[f"blocks.{layer}.{ENTRY}"] = Replace(stream)
        middle = path.activations.get(f"blocks.{layer}.{_MID}")
        if middle is not None:
            edits[f"blocks.{layer}.hook_mlp_in"] = Replace(middle)
    return ends.follow(edits, (*_mixed(ends), *_experts(ends))).activations
