"""AtP*'s correction for queries and keys: the true change of the attention pattern, what follows it to first order.

Kramár et al. 2024 (arXiv 2403.00745), section 3.1. Attention saturates: the gradient through a softmax that is nearly
one says nothing of what a larger change of a query or a key would do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attribution.backward import Trajectory, pull_back
from tljax.attribution.contraction import allowed_masks, of_sites
from tljax.attribution.options import AtPStar, Estimate
from tljax.errors import InputError
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Replace
from tljax.model.hooked_transformer import HookedTransformer
from tljax.numerics import widened
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.sites import Sites

_QUERIES = ("attn.hook_q", "attn.hook_rot_q", "hook_q_input")
_KEYS = ("attn.hook_k", "attn.hook_rot_k", "hook_k_input")
_SCORES, _PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"


def fixes(sites: Sites, how: Estimate) -> bool:
    """Whether the correction applies to a sweep's activation."""
    return isinstance(how.rule, AtPStar) and how.rule.qk_fix and sites.point in (*_QUERIES, *_KEYS)


def fixed_products(
    model: HookedTransformer,
    run: Trajectory,
    run_at: BaseRun,
    base: BaseRun,
    sites: Sites,
    slopes: jax.Array,
    dropped: np.ndarray | None = None,
) -> np.ndarray:
    """Estimates every site of queries or keys, ``[n, site, batch]``; arguments as for the plain estimate.

    Raises:
        InputError: sites within a head, or heads that one norm mixes.
    """
    _check(model, sites)
    patterns = {f"blocks.{layer}.{_PATTERN}": layer for layer in sites.values}
    length = base.padded_length
    shape = (base.batch, model.cfg.n_heads, length, length)
    is_query, found = sites.point in _QUERIES, {}
    for name, gradients in pull_back(run, slopes, dict.fromkeys(patterns, shape), None, dropped):
        layer = patterns[name]
        before = base.activations[sites.full_name(layer)]
        mask = functools.reduce(np.logical_and, allowed_masks(sites), np.ones((1,) * before.ndim, bool))
        values = jnp.where(mask, sites.values[layer][0], before)
        old, new = _attend(model, base, layer, None), _attend(model, base, layer, (sites.full_name(layer), values))
        found[layer] = _products(sites, old, new, gradients, is_query, model.cfg.use_attention_sinks)
    return of_sites(sites, base, found)


@dataclasses.dataclass(frozen=True)
class Attended:
    """Attention scores and pattern of a layer, ``[batch, head, query_pos, key_pos]``."""

    scores: jax.Array
    pattern: jax.Array


def _attend(model: HookedTransformer, base: BaseRun, layer: int, patch: tuple[str, jax.Array] | None) -> Attended:
    """Runs one block, with an activation replaced."""
    patches = () if patch is None else (HookEntry(patch[0], Replace(patch[1])),)
    own = [entry for entry in model._hooks.entries if entry.name != f"blocks.{layer}.hook_resid_pre"]
    names = (f"blocks.{layer}.{_SCORES}", f"blocks.{layer}.{_PATTERN}")
    _, kept = run_forward(
        model.cfg, model.params, base.residual(layer), base.context, hooks=HookDictionary((*own, *patches)),
        names=names, start=layer, stop=layer + 1,
    )  # fmt: skip
    return Attended(*(kept[name].astype(widened(kept[name].dtype)) for name in names))


def _products(
    sites: Sites, old: Attended, new: Attended, gradients: jax.Array, is_query: bool, sinks: bool
) -> jax.Array:
    """Returns each site's change of the pattern times the gradient there, ``[n, batch, *entries]``."""
    heads = sites.row.shape()[sites.row.axes.index("head")]
    if not is_query and "pos" in sites.chosen:
        products = key_effects(old.scores, new.scores, old.pattern, gradients, sinks)  # [n, batch, head, key_pos]
    else:  # queries do not meet in a softmax, and keys of one site change together
        products = _query_effects(old.pattern, new.pattern, gradients)  # [n, batch, head, query_pos]
    products = products.reshape(*products.shape[:2], heads, -1, products.shape[-1]).sum(axis=3)
    if "pos" not in sites.chosen:
        products = products.sum(axis=-1)
    if "head" not in sites.chosen:
        products = products.sum(axis=2)
    in_order = [axis for axis in ("head", "pos") if axis in sites.chosen]
    return products.transpose(0, 1, *(2 + in_order.index(axis) for axis in sites.chosen))


@jax.jit
def _query_effects(old: jax.Array, new: jax.Array, gradients: jax.Array) -> jax.Array:
    return (gradients.astype(old.dtype) * (new - old)[None]).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=4)
def key_effects(
    old: jax.Array, new: jax.Array, pattern: jax.Array, gradients: jax.Array, sinks: bool = False
) -> jax.Array:
    """Contracts the gradient with the change of the pattern when one key alone is replaced, for every key.

    Replacing column ``t`` of the scores changes row ``a`` of the pattern by ``a_t (e - 1) / (1 + a_t (e - 1))`` times
    ``(1 at t) - a``, with ``e = exp(new_t - old_t)``: no softmax is computed a second time.

    Args:
        old, new: scores before and after all keys are replaced, ``[batch, head, query_pos, key_pos]``.
        pattern: the softmax of ``old``.
        gradients: of the pattern, ``[n, batch, head, query_pos, key_pos]``.
        sinks: whether rows sum to less than one, because a key without a value takes weight.

    Returns:
        ``[n, batch, head, key_pos]``, summed over queries.
    """
    step = jnp.where(new == old, 0, new - old)
    top = jnp.argmax(pattern, axis=-1, keepdims=True)
    is_top = jnp.arange(pattern.shape[-1])[None, None, None] == top
    highest = pattern.max(axis=-1, keepdims=True)
    reads = highest > 0  # rows that are masked throughout have no weight
    total = jnp.where(is_top, old, 0).sum(axis=-1, keepdims=True) - jnp.log(jnp.where(reads, highest, 1))
    weight = jnp.where(reads & jnp.isfinite(new), jnp.exp(new - total), 0)
    others = jnp.where(is_top, 0, pattern)
    sunk = jnp.maximum(1 - pattern.sum(axis=-1, keepdims=True), 0) if sinks else jnp.zeros_like(highest)
    # 1 - a_t and g_t - a.g cancel where a_t is nearly one, so there they are summed from the other entries
    rest = jnp.where(is_top, others.sum(axis=-1, keepdims=True) + sunk, 1 - pattern)
    all_new = jnp.where(weight == 0, 0, 1 / (1 + rest / jnp.where(weight == 0, 1, weight)))
    denominator = rest + weight
    down = pattern * jnp.expm1(jnp.minimum(step, 0)) / jnp.where(denominator == 0, 1, denominator)
    share = jnp.where(step > 0, -jnp.expm1(-jnp.maximum(step, 0)) * all_new, down)
    gradients = gradients.astype(pattern.dtype)
    mean_of_others = (gradients * others[None]).sum(axis=-1, keepdims=True)
    mean = (gradients * pattern[None]).sum(axis=-1, keepdims=True)
    centred = jnp.where(is_top[None], gradients * rest[None] - mean_of_others, gradients - mean)
    return (share[None] * centred).sum(axis=-2)


def _check(model: HookedTransformer, sites: Sites) -> None:
    if within := [axis for axis in sites.chosen if axis not in ("head", "pos")]:
        raise InputError(
            f"rule='atp*' takes the change of the attention pattern for whole heads; axes= has {within[0]!r}. Give "
            "axes out of 'pos' and 'head', or leave the correction out: rule=AtPStar(qk_fix=False)."
        )
    cfg = model.cfg
    if cfg.use_qk_norm and cfg.qk_norm_span == "joint" and "rot" not in sites.point and "head" in sites.chosen:
        raise InputError(
            f"A norm of this model mixes the heads of {sites.row.name}: with rule='atp*' sweep 'rot_q' or 'rot_k', "
            "after it, or all heads of a position at once, axes=('pos',)."
        )
