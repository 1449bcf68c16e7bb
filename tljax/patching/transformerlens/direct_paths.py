"""TransformerLens's direct-path patching: one head's output into one other head's input, along that edge alone."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.points import point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.numerics import matmul_precision
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.run import measure_sites
from tljax.patching.engine.sites import Sites, grid
from tljax.patching.paths import added_by_attention, read_heads, refuse_paths
from tljax.patching.sources import read_source, rounding
from tljax.patching.sweep import Setup, prepare_sweep
from tljax.quantized_weight import as_floats

Component = Literal["q", "k", "v"]


@typed
def get_act_patch_direct_path(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Any,
    src_layer: int,
    src_head: int,
    component: Component = "q",
    verbose: bool = True,
) -> jax.Array:
    """Patches the direct edges from one head to every later head, one edge at a time, exactly.

    The receiving head's queries (keys, values) read the residual stream with the source head's clean output in place
    of its corrupted one; everything else the head reads, and every other head, is as in the corrupted run.

    Args:
        model: the model.
        corrupted_tokens: the run that is patched.
        clean_cache: holds ``z`` of the source's layer.
        corrupted_cache: not used, because the corrupted prompts are run anyway; an argument as in TransformerLens.
        patching_metric: takes logits ``[batch, pos, d_vocab]``, returns one number.
        src_layer, src_head: the sending head.
        component: the input of the receiving head: ``"q"``, ``"k"`` or ``"v"``.
        verbose: whether to show a progress bar on long sweeps.

    Returns:
        ``[layer, head]`` (``[layer, kv_head]`` for keys and values), zero up to the source's layer.

    Raises:
        InputError: no such head or component, or a cache that does not match.
    """
    layer = _in_range("src_layer", src_layer, model.cfg.n_layers)
    head = _in_range("src_head", src_head, model.cfg.n_heads)
    grid_of_all = _direct_paths(
        model, corrupted_tokens, clean_cache, patching_metric, [(layer, head)], component, verbose
    )
    return jax.device_put(grid_of_all[0])


@typed
def get_act_patch_direct_path_all_sources(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Any,
    component: Component = "q",
    verbose: bool = True,
) -> jax.Array:
    """Patches the direct edges from every head to every later head, one edge at a time.

    Args:
        model, corrupted_tokens, clean_cache, corrupted_cache, patching_metric, component, verbose: as in
            :func:`get_act_patch_direct_path`; the clean cache holds ``z`` of every layer.

    Returns:
        ``[source layer, source head, layer, head]``.
    """
    cfg = model.cfg
    senders = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    paths = _direct_paths(model, corrupted_tokens, clean_cache, patching_metric, senders, component, verbose)
    return jax.device_put(paths.reshape(cfg.n_layers, cfg.n_heads, *paths.shape[1:]))


def _in_range(name: str, number: int, size: int) -> int:
    if not (isinstance(number, int | np.integer) and -size <= number < size):
        raise InputError(f"{name}={number} does not exist: there are {size}, numbered 0 to {size - 1}.")
    return int(number) % size


def _direct_paths(
    model: HookedTransformer,
    corrupted: Any,
    clean_cache: Any,
    metric: Any,
    senders: Sequence[tuple[int, int]],
    component: str,
    verbose: bool,
) -> np.ndarray:
    """Returns the metric of each edge, ``[sender, layer, head]``; zero where there is no edge."""
    cfg = model.cfg
    if component not in ("q", "k", "v"):
        raise InputError(f'component={component!r} is not one of "q", "k" and "v".')
    receivers = tuple(f"blocks.{layer}.attn.hook_{component}" for layer in range(cfg.n_layers))
    refuse_paths(model)
    setup = prepare_sweep(model, corrupted, "z", sorted({layer for layer, _ in senders}), extra=receivers)
    heads = cfg.n_heads if component == "q" else cfg.kv_heads
    paths = np.zeros((len(senders), cfg.n_layers, heads), np.float32)
    later = [layer for layer in range(1, cfg.n_layers) if any(source < layer for source, _ in senders)]
    if not later:
        return paths
    sent = _sent(model, setup, clean_cache, senders)
    values, coordinates = {}, []
    for layer in later:
        here = [number for number, (source, _) in enumerate(senders) if source < layer]
        values[layer] = _received(model, setup.base, layer, component, sent[np.asarray(here)])
        cells = grid({"variant": range(len(here)), "head": range(heads)})
        coordinates.append((np.full(len(cells["head"]), layer), np.asarray(here)[cells["variant"]], cells))
    layer = np.concatenate([layers for layers, _, _ in coordinates])
    sender = np.concatenate([numbers for _, numbers, _ in coordinates])
    variant = np.concatenate([cells["variant"] for _, _, cells in coordinates])
    head = np.concatenate([cells["head"] for _, _, cells in coordinates])
    sites = Sites(point_table(cfg)[receivers[0]], layer, values, variant, {"head": head}, {}, rounding(cfg))
    measured = measure_sites(model, setup.base, sites, metric, progress=None if verbose else False)
    if measured.several or measured.baseline["metric"].ndim:
        raise InputError(
            "Direct paths take one metric that returns one number: average it over prompts, or use path_patch."
        )
    paths[sender, layer, head] = measured.values["metric"]
    return paths


def _sent(model: HookedTransformer, setup: Setup, cache: Any, senders: Sequence[tuple[int, int]]) -> np.ndarray:
    """Computes what senders add to the stream beyond the corrupted run, ``[sender, batch, padded_pos, d_model]``."""
    read = read_source(model, setup.base, cache, setup.names)
    added = {}
    for layer, name in zip(setup.layers, setup.names, strict=True):
        difference = read.values(setup.spec_at(layer)) - setup.base.activations[name]
        with matmul_precision(model.cfg):
            W_O = as_floats(model.params["blocks"][layer]["attn"]["W_O"])
            out = jnp.einsum("bphe,hed->hbpd", difference, W_O)
        added[layer] = np.asarray(added_by_attention(model, layer, "attn.hook_z", setup.base.activations[name], out))
    return np.stack([added[layer][head] for layer, head in senders])


def _received(model: HookedTransformer, base: BaseRun, layer: int, component: str, sent: np.ndarray) -> jax.Array:
    """Computes queries, keys or values with each sender's change, ``[sender, batch, padded_pos, head, d_head]``."""
    streams = np.asarray(base.residual(layer))[None] + sent
    heads = read_heads(model, base, layer, component, streams[:, :, : base.length])
    spec_name = f"blocks.{layer}.attn.hook_{component}"
    whole = jnp.broadcast_to(base.activations[spec_name][None], (len(sent), *base.activations[spec_name].shape))
    return whole.at[:, :, : base.length].set(heads)
