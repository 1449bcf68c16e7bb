"""The sites of interchanges (a layer, a position in each prompt, a head), and the activations that they need."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import entry
from tljax.errors import InputError, nearest
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.names import ActName, resolve
from tljax.hooks.points import HookPointSpec, layer_of, point_table, stage_of
from tljax.interchange.pairs import InterchangePairs, entries_of, numbers_in, source_mask
from tljax.memory import batch_budget
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.context import AttentionContext
from tljax.patching.naming import named_points
from tljax.sizes import chunks, power_of_two_within
from tljax.text.batch import Batch
from tljax.text.inputs import prepare

_MANY, _FEW = 128, 32
"""Prompts that run together, so that any number of them shares two sets of programs."""

Positions = Sequence[int | str] | int | str | None


@dataclasses.dataclass(frozen=True)
class Point:
    """The activation that is interchanged, in any layer.

    Attributes:
        relative: its name within a block.
        spec: its row of the hook table, in one layer.
        layers: the layers asked for, in order.
    """

    relative: str
    spec: HookPointSpec
    layers: tuple[int, ...]

    @property
    def width(self) -> int:
        """Size of the last axis."""
        return dict(self.spec.sizes)[self.spec.axes[-1]]

    @property
    def n_heads(self) -> int | None:
        """Number of heads; ``None`` without an axis of heads."""
        return dict(self.spec.sizes)["head"] if "head" in self.spec.axes else None

    def name(self, layer: int) -> str:
        """Returns the full name in a layer."""
        return f"blocks.{layer}.{self.relative}"


def point_of(model: HookedTransformer, activation_name: ActName, layers: Any = None) -> Point:
    """Resolves an activation name for some layers.

    Raises:
        InputError: the point is not inside a block, or its axes are not batch, position, perhaps head, and one more.
        UnknownHookError: the model has no such point.
    """
    names, numbers = named_points(model.cfg, activation_name, layers)
    spec = point_table(model.cfg)[names[0]]
    if layer_of(names[0]) is None:
        raise InputError(
            f"{names[0]} is outside the blocks. An interchange of the embedding is one at blocks.0.hook_resid_pre, of "
            f"the final stream one at blocks.{model.cfg.n_layers - 1}.hook_resid_post."
        )
    if spec.axes[:2] != ("batch", "pos") or len(spec.axes) - ("head" in spec.axes) != 3 or spec.holds_numbers:
        raise InputError(
            f"{names[0]} has axes {spec.axes}: an interchange needs a vector for each position (and head), such as "
            "resid_post, attn_out, mlp_out, z or mlp_post."
        )
    return Point(stage_of(names[0])[1], spec, tuple(sorted(numbers)))


def point_at(model: HookedTransformer, hook_name: ActName) -> Point:
    """Resolves the name of one point."""
    return point_of(model, resolve(hook_name, point_table(model.cfg), model.cfg.n_layers))


@dataclasses.dataclass(frozen=True)
class Places:
    """Positions of sites: an entry of the padded array for each pair.

    Attributes:
        labels: a text for each.
        base: int32 ``[place, pair]``.
        source: the same in the source prompts.
    """

    labels: tuple[str, ...]
    base: np.ndarray
    source: np.ndarray


def read_places(
    pairs: InterchangePairs, pos: Positions = None, source_pos: Positions = None, tokens: Sequence[str] = ()
) -> Places:
    """Reads positions of sites.

    Args:
        pairs: the pairs.
        pos: numbers, counted in each base prompt's text, or names of ``pairs.named_pos``; ``None`` for every position
            of the shortest base prompt.
        source_pos: for numbers, the positions in the sources; ``None`` means the same.
        tokens: labels for numbered positions: the tokens of a prompt.

    Raises:
        InputError: a position outside a prompt, a name that the pairs lack, or other numbers of positions.
    """
    base_mask, theirs_mask = np.asarray(pairs.base.mask), source_mask(pairs.source)
    chosen = _listed(range(int(base_mask.sum(axis=1).min())) if pos is None else pos, "pos")
    theirs = chosen if source_pos is None else _listed(source_pos, "source_pos")
    if len(chosen) != len(theirs):
        raise InputError(f"pos has {len(chosen)} positions and source_pos {len(theirs)}: give one for each.")
    labels, base, source = [], [], []
    for one, other in zip(chosen, theirs, strict=True):
        if isinstance(one, str):
            if one not in pairs.named_pos:
                known = list(pairs.named_pos)
                raise InputError(f"The pairs name no position {one!r}, only {known}.{nearest(one, known)}")
            here, there = pairs.named_pos[one]
        else:
            here, there = numbers_in(base_mask, one, "pos"), numbers_in(theirs_mask, other, "source_pos")
        base.append(entries_of(base_mask, here))
        source.append(entries_of(theirs_mask, there))
        is_token = not isinstance(one, str) and -len(tokens) <= one < len(tokens)
        labels.append(tokens[one] if is_token else str(one))  # type: ignore[call-overload]
    return Places(tuple(labels), np.stack(base), np.stack(source))


def _listed(pos: Any, name: str) -> list[int | str]:
    listed = [pos] if isinstance(pos, str | int | np.integer) else list(pos)
    wrong = [one for one in listed if isinstance(one, bool) or not isinstance(one, str | int | np.integer)]
    if wrong or not listed:
        raise InputError(
            f"{name} takes whole numbers and names of positions; got {wrong[0] if wrong else 'none'!r}. Positions "
            "that differ from pair to pair get a name: InterchangePairs.of(..., pos={'name': [3, 5, ...]})."
        )
    if len(set(listed)) < len(listed):
        raise InputError(f"{name}={listed} names a position twice.")
    return [one if isinstance(one, str) else int(one) for one in listed]


def read_heads(point: Point, heads: Any) -> tuple[int, ...] | None:
    """Returns the heads to take as sites, all by default; ``None`` where the point has none.

    Raises:
        InputError: a head that does not exist, or heads at a point without them.
    """
    if point.n_heads is None:
        if heads is not None:
            raise InputError(f"{point.name(point.layers[0])} has no axis of heads: leave heads= out.")
        return None
    every = range(point.n_heads) if heads is None else np.atleast_1d(np.asarray(heads)).tolist()
    return tuple(entry(head, point.n_heads, "head", "heads") for head in every)


@dataclasses.dataclass(frozen=True)
class AtLayer:
    """What the sites of one layer need.

    Attributes:
        layer: the layer.
        stream: residual stream of the base runs entering it, ``[pair, pos, d_model]``.
        sources: the point's activations in the source runs, ``[pair, source_pos, (head,) d]``.
    """

    layer: int
    stream: jax.Array
    sources: jax.Array


def climb(model: HookedTransformer, pairs: InterchangePairs, point: Point) -> Iterator[AtLayer]:
    """Yields what the sites of each layer need, running base and source prompts once, a layer at a time.

    Raises:
        InputError: the model carries hooks, activations are not finite, or the cache lacks a point.
    """
    if model._hooks.entries:
        raise InputError(
            "The model carries hooks, which an interchange would run on parts of the batch. Use model.reset_hooks(), "
            "or build the change into the weights."
        )
    base = _Runner(model, pairs.base)
    source = _Runner(model, pairs.source) if isinstance(pairs.source, Batch) else None
    for layer in point.layers:
        stream = base.enter(layer)
        if source is None:
            assert isinstance(pairs.source, ActivationCache)
            sources = _from_cache(pairs, pairs.source, point.name(layer))
        else:
            source.enter(layer)
            sources = source.record(layer, point.name(layer))
        for what, array, mask in (
            ("base", stream, np.asarray(pairs.base.mask)), ("source", sources, source_mask(pairs.source)),
        ):  # fmt: skip
            finite = np.asarray(jnp.isfinite(array).all(axis=tuple(range(2, array.ndim)))) | ~mask
            if not finite.all():
                pair, place = map(int, np.argwhere(~finite)[0])
                raise InputError(
                    f"The {what} run of pair {pair} has numbers that are not finite at layer {layer}, position "
                    f"{place}: nothing can be learned from them."
                )
        yield AtLayer(layer, stream, sources)


def _from_cache(pairs: InterchangePairs, cache: ActivationCache, name: str) -> jax.Array:
    if name not in cache:
        raise InputError(
            f"The source cache does not hold {name}. Record it for every layer: "
            f"model.run_with_cache(source, names_filter=lambda name: name.endswith({name.split('.', 2)[2]!r}))."
        )
    return jnp.asarray(cache[name])


class _Runner:
    """Prompts on their way through the layers, some rows at a time."""

    def __init__(self, model: HookedTransformer, batch: Batch) -> None:
        self._cfg, self._params = model.cfg, model.params
        self._prepared = prepare(model.cfg, model._tokenizer, batch)
        self._context = AttentionContext.of(self._prepared)
        self._layer, self._stream = None, None
        cfg, (count, length) = model.cfg, batch.shape
        per_row = length * (8 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 2 * cfg.n_heads * length) * cfg.jnp_dtype.itemsize
        fitting = power_of_two_within(max(1, batch_budget() // per_row))
        self._parts = list(chunks(count, min(_MANY, fitting), min(_FEW, fitting)))

    def enter(self, layer: int) -> jax.Array:
        """Runs up to a layer and returns the residual stream entering it."""
        if self._layer is None or layer > self._layer:
            value = self._prepared.value if self._stream is None else self._stream
            self._stream, self._layer = self._run(value, self._layer, layer)[0], layer
        assert self._stream is not None
        return self._stream

    def record(self, layer: int, name: str) -> jax.Array:
        """Returns a point's activations in the layer that was entered."""
        return self._run(self._stream, layer, layer + 1, (name,))[1][name]

    def _run(self, value: Any, start: int | None, stop: int, names: tuple[str, ...] = ()) -> Any:
        parts, count = [], len(value)
        for first, size in self._parts:
            rows = np.arange(first, first + size) % count  # the first rows fill the last part up
            parts.append(run_forward(
                self._cfg, self._params, value[rows], rows_of(self._context, rows), hooks=HookDictionary(), names=names,
                start=start, stop=stop,
            ))  # fmt: skip
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[:count], *parts)


def rows_of(context: AttentionContext, rows: Any) -> AttentionContext:
    """Returns the context of some rows of a batch."""
    return AttentionContext(
        None if context.positions is None else context.positions[rows],
        None if context.token_mask is None else context.token_mask[rows],
    )
