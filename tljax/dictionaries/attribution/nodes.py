"""The nodes of a run: the active features and the error terms of the dictionaries that are spliced into a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.contraction import changed
from tljax.checks import is_traced
from tljax.dictionary_params import dictionaries_in, without_dictionaries
from tljax.errors import InputError
from tljax.fingerprint import Fingerprint, WeightSample, sample_of
from tljax.hooks.interventions import Zero
from tljax.hooks.names import resolve
from tljax.hooks.points import layer_of, point_table
from tljax.hooks.splices import ACTS_POST, ERROR
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.base_run import BaseRun, run_base
from tljax.patching.engine.sites import Sites
from tljax.patching.sources import Source, read_source
from tljax.text.inputs import prepare


@dataclasses.dataclass(frozen=True)
class SplicedPoint:
    """A point with a dictionary.

    Attributes:
        name: the point that the dictionary writes, such as ``"blocks.2.hook_resid_pre"``.
        features: full name of the point that holds its features.
        error: full name of the point that holds its error term; ``None`` if that is dropped.
        d_sae: number of features.
    """

    name: str
    features: str
    error: str | None
    d_sae: int

    @property
    def layer(self) -> int | None:
        """Its layer; ``None`` at the embedding."""
        return layer_of(self.name)

    @property
    def written(self) -> tuple[str, ...]:
        """The points of its nodes."""
        return (self.features,) if self.error is None else (self.features, self.error)


def spliced_points(model: HookedTransformer, points: Sequence[str] | str | None = None) -> tuple[SplicedPoint, ...]:
    """Returns the points with dictionaries in firing order, all or those of these names.

    Raises:
        InputError: the model carries no dictionary, or none at a name that is given.
    """
    table, cfg = point_table(model.cfg), model.cfg
    splices = {splice.writes: splice for splice in cfg.splices}
    if not splices:
        raise InputError(
            "This model carries no dictionaries, so it has no features: splice them in first, "
            'model.with_dictionaries({"blocks.2.hook_resid_pre": dictionary}).'
        )
    names = list(splices)
    if points is not None:
        given = (points,) if isinstance(points, str) else points
        names = [resolve(name.removesuffix(f".{ACTS_POST}"), table, cfg.n_layers) for name in given]
        if without := [name for name in names if name not in splices]:
            raise InputError(f"There is no dictionary at {without[0]}: the model carries some at {', '.join(splices)}.")
    found = [name for name in table if name in names]
    return tuple(
        SplicedPoint(name, f"{name}.{ACTS_POST}", error if error in table else None, splices[name].d_sae)
        for name, error in ((name, f"{name}.{ERROR}") for name in found)
    )


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A run with its nodes, and what they are patched to.

    Attributes:
        base: the unpatched run, which holds the activations of all nodes.
        points: the points with dictionaries.
        source: where the values come from.
        ablation: ``"zero"``, or ``"source"``.
        values: what each node's point is patched to, by full name, ``[batch, padded_pos, ...]``.
        text: ``[batch, length]``, ``False`` at padding.
    """

    base: BaseRun
    points: tuple[SplicedPoint, ...]
    source: Source
    ablation: str
    values: dict[str, jax.Array]
    text: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the points of all nodes."""
        return tuple(name for point in self.points for name in point.written)

    @property
    def ranks(self) -> np.ndarray:
        """Each token's position in its own prompt's text, ``[batch, length]``."""
        return np.cumsum(self.text, axis=1) - 1

    def delta(self, name: str) -> np.ndarray:
        """Returns what a patch of a whole point adds, ``[batch, length, ...]``."""
        return np.asarray(changed(self.values[name], self.base.activations[name]))[:, : self.base.length]

    def held(self, name: str) -> np.ndarray:
        """Returns a point's activation, ``[batch, length, ...]``."""
        return np.asarray(self.base.activations[name])[:, : self.base.length]


def prepare_nodes(model: HookedTransformer, prompt: Any, source: Any, points: Any = None) -> Nodes:
    """Runs the model and reads the values that nodes are patched to; without a source these are zeros.

    Raises:
        InputError: no dictionaries, prompts of different lengths, or a call inside a transformation.
    """
    found = spliced_points(model, points)
    names = tuple(name for point in found for name in point.written)
    prepared = prepare(model.cfg, model._tokenizer, prompt)
    if is_traced(prepared.value):
        raise InputError("Which features are active is read from numbers: call this outside jax.jit, grad and vmap.")
    base = run_base(model, prepared, names)
    read = read_source(model, base, Zero() if source is None else source, names)
    table = point_table(model.cfg)
    values = {name: read.values(table[name]) for name in names}
    text = np.ones((base.batch, base.length), bool) if base.text is None else base.text
    return Nodes(base, found, read, "zero" if source is None else "source", values, text)


def active(nodes: Nodes, point: SplicedPoint, min_activation: float, k: int | None) -> np.ndarray:
    """Returns which features of a point count as nodes, boolean ``[batch, length, d_sae]``.

    These are the features larger in size than ``min_activation`` in the run or in the source, as far as the patch
    changes them; of each token only the ``k`` largest.
    """
    here = np.abs(nodes.held(point.features))
    size = here if nodes.ablation == "zero" else np.maximum(here, np.abs(here + nodes.delta(point.features)))
    chosen = (size > min_activation) & (nodes.delta(point.features) != 0) & nodes.text[..., None]
    if k is not None and k < point.d_sae:
        ranked = np.where(chosen, size, -1)
        last = -np.partition(-ranked, k - 1, axis=-1)[..., k - 1 : k]
        chosen &= ranked >= last
    return chosen


@dataclasses.dataclass(frozen=True)
class Grid:
    """Nodes of one point, as sites of a sweep: each patches one node of each prompt.

    Attributes:
        sites: the sites.
        row: which node of the list each site patches in each prompt, ``[site, batch]``; -1 for none.
    """

    sites: Sites
    row: np.ndarray


def sites_of(model: HookedTransformer, nodes: Nodes, name: str, prompt: Any, pos: Any, feature: Any = None) -> Grid:
    """Makes sites of nodes of one point; the prompts' own lists run side by side.

    Args:
        model, nodes: the model and its run.
        name: full name of the point.
        prompt, pos: of each node, ``[node]``; positions of the array, padding included.
        feature: of each node, ``[node]``; ``None`` for the error term.
    """
    base = nodes.base
    own = [np.flatnonzero(prompt == number) for number in range(base.batch)]
    row = np.full((max(map(len, own)), base.batch), -1)
    for number, rows in enumerate(own):
        row[: len(rows), number] = rows
    chosen = {"pos": np.where(row < 0, -1, np.asarray(pos)[row])}
    if feature is not None:
        chosen["feature"] = np.where(row < 0, -1, np.asarray(feature)[row])
    layer = layer_of(name) or 0
    spec, count = point_table(model.cfg)[name], len(row)
    sites = Sites(
        spec, np.full(count, layer), {layer: jnp.asarray(nodes.values[name])[None]}, np.zeros(count, int), chosen, {},
        nodes.source.tolerance,
    )  # fmt: skip
    return Grid(sites, row)


def plain_fingerprint(model: HookedTransformer) -> Fingerprint:
    """Returns the fingerprint of a model without its dictionaries."""
    return Fingerprint(model.cfg.without_splices, sample_of(without_dictionaries(model.params)))


def dictionary_samples(model: HookedTransformer, points: Sequence[str]) -> tuple[WeightSample | None, ...]:
    """Returns a sample of the weights of the dictionary at each point."""
    held = dictionaries_in(model.params)
    return tuple(sample_of(held[point].params) for point in points)
