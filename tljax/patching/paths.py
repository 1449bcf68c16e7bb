"""Path patching: a change that travels along chosen edges only, with everything else as in the base run.

A sender's new output reaches a receiver directly through the residual stream (and, unless they are frozen too, through
the MLPs in between), while every attention layer in between keeps the base run's output (Wang et al. 2022,
"Interpretability in the Wild"). First, what each receiver would then read is computed; second, the base run is patched
with it at the receivers, and everything after them is recomputed.
"""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.names import ActName
from tljax.hooks.points import ENTRY, block_points, embedding_points, point_table, stage_of
from tljax.hooks.splices import refuse_splices
from tljax.memory import how_many
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.activations import scaled
from tljax.modules.context import AttentionContext
from tljax.modules.stack import block_module
from tljax.numerics import matmul_precision
from tljax.patching.assembly import as_result
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.edits import GridEdits, TakeRows, expand, picks
from tljax.patching.engine.engine import Engine, Reach, enter
from tljax.patching.engine.packing import BatchLayout, Rows
from tljax.patching.engine.report import join_reports
from tljax.patching.engine.run import Measured, Metrics, Reduce, batch_limits, measure_edits
from tljax.patching.engine.sites import Sites, find_rows, place
from tljax.patching.receivers import Receiver, read_receivers
from tljax.patching.result import PatchingResult
from tljax.patching.sources import read_source
from tljax.patching.sweep import prepare_sweep, site_grid
from tljax.processes import as_numpy
from tljax.progress import Progress
from tljax.quantized_weight import as_floats
from tljax.scale.batch import gathered, n_groups, spread
from tljax.text.padding import pad_axis

_LETTERS = {"batch": "b", "pos": "p", "head": "h", "d_head": "e", "d_model": "d"}


@typed
def path_patch(
    model: HookedTransformer,
    corrupted: Any,
    source: Any,
    metric: Metrics,
    receivers: Sequence[tuple[Any, ...] | str] | str,
    sender: ActName = "z",
    axes: Sequence[str] = ("head",),
    *,
    freeze_mlps: bool = False,
    layers: Sequence[int] | int | None = None,
    at: Mapping[str, Any] | None = None,
    reduce: Reduce = "mean",
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> PatchingResult:
    """Patches the paths from each sender to a set of receivers, one sender at a time.

    Args:
        model: the model, without hooks.
        corrupted, metric, reduce, max_batch, progress: as in :func:`~tljax.patching.sweep`.
        source: where the senders' new outputs come from: another prompt, a cache, or a hook (as in
            :func:`~tljax.patching.sweep`).
        receivers: what the change may reach, all patched together: ``("q", 9, 6)`` for the queries of head 6 of layer 9
            (``"k"`` and ``"v"`` for keys and values; ``("k", 9)`` for all heads), ``("mlp", 9)`` for the input of an
            MLP; or ``"logits"``, given alone.
        sender: the activation sent: ``"z"`` or ``"result"`` (head outputs), ``"mlp_out"``, ``"attn_out"``,
            ``"embed"`` or ``"pos_embed"``.
        axes: axes of the sender's activation, as in :func:`~tljax.patching.sweep`; by default ``("head",)``.
        freeze_mlps: whether MLPs between sender and receiver keep the base run's output too, so that only the direct
            edge counts; by default they are recomputed, as in the paper.
        layers, at: the senders to try, as in :func:`~tljax.patching.sweep`; ``at={"pos": -1}`` sends from the last
            position only.

    Returns:
        The metric for each sender, ``["layer", *axes]``; for senders that come after all receivers, the baseline.

    Raises:
        InputError: a receiver that does not exist, a sender that is not added to the residual stream.
    """
    refuse_paths(model)
    wanted = read_receivers(model.cfg, receivers)
    setup = prepare_sweep(model, corrupted, sender, layers, extra=_frozen_names(model.cfg))
    if setup.spec.adds_to is None:
        rows = (*block_points(model.cfg, model.cfg.layer_kind(0)), *embedding_points(model.cfg))
        senders = ", ".join(repr(row.name) for row in rows if row.adds_to is not None)
        raise InputError(
            f"A sender is added to the residual stream: one of {senders}; got {stage_of(setup.spec.name)[1]!r}."
        )
    read = read_source(model, setup.base, source, setup.names)
    tried = site_grid(model, setup, lambda spec: read.values(spec)[None], axes, at, tolerance=read.tolerance)
    sites = tried.sites
    stream_bytes = setup.base.final.nbytes * len({receiver.layer for receiver in wanted})
    group = how_many(stream_bytes)
    parts = [
        _patch_receivers(
            model, setup.base, sites.take(np.arange(first, min(first + group, len(sites)))), wanted, metric,
            freeze_mlps, read.final, max_batch, progress,
        )
        for first in range(0, len(sites), group)
    ]  # fmt: skip
    return as_result(_joined(parts), tried.sizes, tried.names, reduce, f"path from {setup.name}", tried.labels)


def refuse_paths(model: HookedTransformer) -> None:
    """Raises InputError if the model carries hooks or normalises its residual stream: paths cannot be followed then."""
    if model.cfg.use_normalization_of_residual:
        raise InputError(
            "Path patching follows what heads and MLPs add to the residual stream from layer to layer, and this model "
            "normalises the whole stream after each addition (use_normalization_of_residual), so that nothing added "
            "is found again in later layers. Patch activations with sweep instead."
        )
    refuse_splices(
        model.cfg.splices,
        "Path patching follows what heads and MLPs add to the residual stream",
        "Patch its features with sweep instead, or take it out: model.without_dictionaries().",
    )
    if model._hooks.entries:
        raise InputError(
            "This model carries hooks, and path patching runs the model without them: pass model.reset_hooks(). (Only "
            "a sweep takes a model with hooks.)"
        )


def _frozen_names(cfg: HookedTransformerConfig) -> tuple[str, ...]:
    parts = ("hook_attn_out",) if cfg.attn_only else ("hook_attn_out", "hook_mlp_out", "hook_mlp_in")
    return tuple(f"blocks.{layer}.{part}" for layer in range(cfg.n_layers) for part in parts)


def _patch_receivers(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    receivers: Sequence[Receiver],
    metric: Metrics,
    freeze_mlps: bool,
    clean_final: Any,
    max_batch: int | Literal["auto"],
    progress: bool | None,
) -> Measured:
    """Measures the base run patched at the receivers, for each sender."""
    layers = {receiver.layer for receiver in receivers}
    streams, forking = forked_streams(model, base, sites, layers, freeze_mlps, max_batch, progress)
    tables: dict[tuple[int, str], jax.Array] = {}
    masks: dict[tuple[int, str], np.ndarray] = {}
    changed: dict[tuple[int, str], np.ndarray] = {}
    for receiver in receivers:
        key = receiver.layer, receiver.point
        if key not in tables:
            stream, old = streams[receiver.layer], as_numpy(base.residual(receiver.layer))[:, : base.length]
            if receiver.point == "hook_mlp_in":
                stream, old = _entering_mlp(model, base, sites, receiver.layer, stream)
            tables[key] = _read(model, base, receiver, stream)
            changed[key] = (stream != old[None]).any(axis=-1)
            masks[key] = np.zeros(tables[key].shape[3], bool)
        masks[key][slice(None) if receiver.head is None else receiver.head] = True
    points = {point for _, point in tables}
    every_token = {point for point in points if point_table(model.cfg)[f"blocks.0.{point}"].every_token}
    edits = ReceiverEdits(tables, masks, changed, frozenset(every_token), base)
    measured = measure_edits(
        model, base, len(sites), lambda end: edits.rows(model.cfg, end), edits, metric, clean_final, max_batch, progress
    )
    report = dataclasses.replace(measured.report, flops=measured.report.flops + forking)
    return dataclasses.replace(measured, report=report)


def _joined(parts: Sequence[Measured]) -> Measured:
    """Joins the measurements of consecutive groups of sites."""
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    return dataclasses.replace(parts[0], values=values, report=join_reports([part.report for part in parts]))


def forked_streams(
    model: HookedTransformer,
    base: BaseRun,
    sites: Sites,
    layers: set[int],
    freeze_mlps: bool,
    max_batch: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> tuple[dict[int, np.ndarray], float]:
    """Computes the residual streams entering ``layers`` for each sender, with later attention frozen to the base run.

    Returns:
        For each layer, ``[sender, batch, pos, d_model]`` (layer ``n_layers`` is the final residual stream), and the
        FLOPs spent.
    """
    edits = FrozenEdits(place(model.cfg, base, sites), base, freeze_mlps and not model.cfg.attn_only)
    rows = find_rows(model.cfg, base, sites, base.length)
    with Progress(int((rows.layer < max(layers)).sum()), progress, "senders") as bar:
        engine = Engine(
            model, base, Reach(base.length, None), batch_limits(model.cfg, model.params, base, max_batch), bar.advance
        )
        streams = engine.streams(rows, edits, len(sites), sorted(layers))
    if edits.sender.spec.name == ENTRY:
        for layer, stream in streams.items():
            enter(stream, rows.take(np.flatnonzero(rows.layer == layer)), edits, None)
    return streams, engine.spent.flops


@dataclasses.dataclass(frozen=True)
class FrozenEdits:
    """A sender's edits, with later attention layers (and MLPs, if ``freeze_mlps``) frozen to the base run's outputs."""

    sender: GridEdits
    base: BaseRun
    freeze_mlps: bool

    @property
    def signature(self) -> Hashable:
        return "frozen", self.sender.signature, self.freeze_mlps

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        slots = self.sender.slots(layer, layout, queries)
        joined = np.where(layout.is_row, layout.rows.layer[layout.number], layer + 1)
        point = self.sender.spec.name
        above = joined <= layer if point == ENTRY else joined < layer
        mlp = above if point == ENTRY else joined <= layer
        slots["hook_attn_out"] = (*slots.get("hook_attn_out", ()), self._freeze("hook_attn_out", layer, layout, above))
        if self.freeze_mlps:
            slots["hook_mlp_out"] = (self._freeze("hook_mlp_out", layer, layout, mlp),)
        return slots

    def _freeze(self, point: str, layer: int, layout: BatchLayout, rows: np.ndarray) -> TakeRows:
        table = self.base.activations[f"blocks.{layer}.{point}"]
        return TakeRows(table, layout.source, [layout.by_token(rows)[..., None]])

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        return self.sender.final(rows, pos)


def _read(model: HookedTransformer, base: BaseRun, receiver: Receiver, stream: np.ndarray) -> jax.Array:
    """Returns what a receiver reads of each sender's residual stream, ``[sender, batch, pos, ...]``."""
    if receiver.point in (ENTRY, "hook_mlp_in"):
        return jnp.asarray(gathered(stream, model.params))
    return read_heads(model, base, receiver.layer, receiver.point[-1], stream)


def read_heads(
    model: HookedTransformer, base: BaseRun, layer: int, letter: str, stream: np.ndarray | jax.Array
) -> jax.Array:
    """Computes queries, keys or values from residual streams entering a layer.

    Args:
        model, base: the model and its unpatched run.
        layer: the layer.
        letter: ``"q"``, ``"k"`` or ``"v"``.
        stream: ``[sender, batch, pos, d_model]``.

    Returns:
        ``[sender, batch, pos, head, d_head]``, before any rotation.
    """
    module, lanes, placed = block_module(model.cfg, layer), n_groups(model.params), base.context.pos_embed
    padded = -(-len(stream) // lanes) * lanes

    def by_lane(array: Any) -> Any:
        """Each group of devices that prompts are spread over reads for its own senders."""
        return spread(pad_axis(array, padded, 0).reshape(lanes, -1, model.cfg.d_model), model.params, move=True)

    if placed is not None:
        placed = by_lane(jnp.broadcast_to(placed[None, :, : stream.shape[2]], stream.shape))
    context = AttentionContext(pos_embed=placed)
    heads = gathered(_project(module, letter, model.params["blocks"][layer], by_lane(stream), context), model.params)
    return heads.reshape(padded, *stream.shape[1:3], *heads.shape[2:])[: len(stream)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _project(module: Any, letter: str, params: Any, stream: jax.Array, context: AttentionContext) -> jax.Array:
    """Computes queries, keys or values from residual streams ``[lane, token, d_model]``."""
    with matmul_precision(module.cfg):
        return module.apply({"params": params}, stream, context, letter, method="read_heads")


def _entering_mlp(
    model: HookedTransformer, base: BaseRun, sites: Sites, layer: int, stream: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the MLP's input for each sender and in the base run; attention is frozen but for this layer's senders."""
    read = as_numpy(base.activations[f"blocks.{layer}.hook_mlp_in"])[:, : base.length]
    if model.cfg.parallel_attn_mlp:
        return stream, read
    entering = as_numpy(base.residual(layer))[:, : base.length]
    forked = np.where(stream == entering[None], read[None], stream + (read - entering)[None])
    own = np.flatnonzero(sites.layer == layer)
    if len(own) and "hook_attn_out" in (sites.point, sites.row.adds_to):
        forked[own] = read[None] + _sent(model, base, sites.take(own), layer)
    return forked, read


def _sent(model: HookedTransformer, base: BaseRun, sites: Sites, layer: int) -> np.ndarray:
    """Computes what senders inside one attention layer add to its output, ``[sender, batch, pos, d_model]``."""
    axes, site = sites.row.axes, np.arange(len(sites))[:, None, None]
    difference = sites.values[layer][0] - base.activations[sites.full_name(layer)]
    inputs, operands = ["".join(_LETTERS[axis] for axis in axes)], [difference]
    for axis, size in zip(axes[1:], difference.shape[1:], strict=True):
        inputs.append("sb" + _LETTERS[axis])
        picked = picks(sites, axis, site, np.arange(size)[None, None], np.arange(len(difference))[None, :, None])
        operands.append(jnp.asarray(picked, difference.dtype))
    if sites.point == "attn.hook_z":
        inputs.append("hed")
        operands.append(as_floats(model.params["blocks"][layer]["attn"]["W_O"]))
    with matmul_precision(model.cfg):
        sent = jnp.einsum(f"{','.join(inputs)}->sbpd", *operands)
    if sites.point != "hook_attn_out":
        sent = added_by_attention(model, layer, sites.point, base.activations[sites.full_name(layer)], sent)
    return as_numpy(sent)[:, :, : base.length]


def added_by_attention(
    model: HookedTransformer, layer: int, point: str, heads: jax.Array, change: jax.Array
) -> jax.Array:
    """Computes the change in what attention adds to the residual stream when its combined heads change by ``change``.

    Args:
        model: the model.
        layer: the layer.
        point: ``"attn.hook_z"`` or ``"attn.hook_result"``.
        heads: activation at the point without the change, ``[batch, pos, head, d_head or d_model]``.
        change: changes of the combined heads, ``[change, batch, pos, d_model]``.
    """
    module, params = block_module(model.cfg, layer), model.params["blocks"][layer]
    if not model.cfg.has_norms_after:
        return scaled(change, model.cfg.residual_multiplier)
    return _added(module, point == "attn.hook_z", params, heads, change)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _added(module: Any, is_z: bool, params: Any, heads: jax.Array, change: jax.Array) -> jax.Array:
    attn = params["attn"]
    with matmul_precision(module.cfg):
        combined = jnp.einsum("bphe,hed->bpd", heads, as_floats(attn["W_O"])) if is_z else heads.sum(axis=2)
    whole = (combined + attn["b_O"][None, None])[None]
    before, after = (
        module.apply({"params": params}, value, method="attention_output") for value in (whole, whole + change)
    )
    return after - before


@dataclasses.dataclass(frozen=True)
class ReceiverEdits:
    """Edits at all receivers at once, for each sender.

    Attributes:
        tables: by layer and point, what the receivers read, ``[sender, batch, pos, ...]``.
        masks: by layer and point, which heads are receivers.
        changed: by layer and point, where ``tables`` differ from the base run, ``[sender, batch, pos]``.
        every_token: points that hold every packed token even in a block that computes only some tokens' outputs.
        base: the base run.
    """

    tables: Mapping[tuple[int, str], jax.Array]
    masks: Mapping[tuple[int, str], np.ndarray]
    changed: Mapping[tuple[int, str], np.ndarray]
    every_token: frozenset[str]
    base: BaseRun

    def rows(self, cfg: HookedTransformerConfig, end: int) -> Rows:
        """Returns the senders and prompts whose receivers read something else than in the base run."""
        shape = next(iter(self.changed.values())).shape[:2]
        first, entry = np.full(shape, self.base.length), np.full(shape, cfg.n_layers)
        for (layer, _), changed in self.changed.items():
            found = np.where(changed.any(-1), changed.argmax(-1), self.base.length)
            first = np.minimum(first, found)
            entry = np.where(found < end, np.minimum(entry, layer), entry)
        site, prompt = np.nonzero(first < end)
        start = first[site, prompt] if cfg.attention_dir == "causal" else np.zeros(len(site), int)
        return Rows(site, prompt, entry[site, prompt], start)

    @property
    def signature(self) -> Hashable:
        return "receivers", *dict.fromkeys(point for _, point in self.tables)

    def slots(self, layer: int, layout: BatchLayout, queries: np.ndarray | None) -> dict[str, tuple[TakeRows, ...]]:
        return {
            point: (self._write(layer, point, layout, queries),)
            for point in dict.fromkeys(point for _, point in self.tables)
        }

    def _write(self, layer: int, point: str, layout: BatchLayout, queries: np.ndarray | None) -> TakeRows:
        key = (layer, point)
        here = key in self.tables
        key = key if here else next(other for other in self.tables if other[1] == point)
        table = self.tables[key]
        tokens = layout.tokens(last=queries is not None and point not in self.every_token)
        site, pos = layout.rows.site[tokens.row], np.minimum(tokens.pos, self.base.length - 1)
        entry = (site * table.shape[1] + tokens.prompt) * table.shape[2] + pos
        factors = [expand(tokens.is_real & here, (0, 1), table.ndim - 1)]
        if table.ndim == 5:
            factors.append(self.masks[key][None, None, :, None])
        return TakeRows(table, entry.astype(np.int32), factors)

    def final(self, rows: Rows, pos: int | None) -> tuple[np.ndarray, np.ndarray]:
        (table,) = self.tables.values()
        values = as_numpy(table)[rows.site, rows.prompt]
        values = values if pos is None else values[:, pos : pos + 1]
        return values, np.ones((*values.shape[:2], 1), bool)
