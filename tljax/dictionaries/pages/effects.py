"""What a feature does to the output: its direction in the logits, and the loss without it."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.access import centres
from tljax.cache.attribution import logit_directions
from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.running import Run, Runs
from tljax.dictionaries.evaluation.sites import AnyDictionary, Sites
from tljax.dictionaries.evaluation.weights import decoder_rows
from tljax.hooks.interventions import Replace
from tljax.hooks.points import layer_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.batch import Batch

CONVENTION = (
    "decoder row (through W_O or W_out where the dictionary writes heads or neurons), centred if the final norm "
    "centres, times the final norm's weight and W_U, less the mean over the vocabulary; the final norm's scale and "
    "later layers are left out"
)
"""How effects on logits are computed, in words."""


def logit_effects(model: HookedTransformer, dictionary: AnyDictionary, features: np.ndarray) -> np.ndarray | None:
    """Computes the direct effect of features on every logit, for one unit of activation.

    Args:
        model: the model.
        dictionary: the dictionary.
        features: numbers of features, ``[n]``.

    Returns:
        ``[n, d_vocab_out]``, see ``CONVENTION``; ``None`` if what the dictionary writes does not lead to the residual
        stream by one matrix.
    """
    sites = Sites.of(dictionary, model)
    directions = _in_the_stream(model, dictionary, sites, decoder_rows(dictionary)[features])
    if directions is None:
        return None
    if centres(model.cfg, model.cfg.n_layers):
        directions = directions - directions.mean(-1, keepdims=True)
    unembedding = logit_directions(model, jnp.arange(model.cfg.d_vocab_out))
    logits = jnp.matmul(jnp.asarray(directions, unembedding.dtype), unembedding.T, precision="highest")
    effects = np.asarray(logits * model.cfg.logits_multiplier, np.float64)
    return effects - effects.mean(-1, keepdims=True)


def _in_the_stream(
    model: HookedTransformer, dictionary: AnyDictionary, sites: Sites, rows: np.ndarray
) -> np.ndarray | None:
    """Returns decoder rows as directions of the residual stream ``[n, d_model]``, summed over the sites written."""
    parts = np.split(rows, len(sites.writes), axis=-1)
    total = 0.0
    for part, name, head in zip(parts, sites.writes, sites.heads, strict=True):
        layer, last = layer_of(name), name.rsplit(".", 1)[-1]
        if last.startswith(("hook_resid", "hook_mlp_out", "hook_attn_out", "hook_embed", "hook_pos_embed")):
            total = total + part
        elif name.endswith("attn.hook_z") and layer is not None:
            W_O = np.asarray(model.blocks[layer].attn.W_O, np.float64)
            total = total + part @ (W_O if head is None else W_O[head]).reshape(part.shape[-1], -1)
        elif name.endswith("mlp.hook_post") and layer is not None:
            total = total + part @ np.asarray(model.blocks[layer].mlp.W_out, np.float64)
        else:
            return None
    return np.asarray(total)


def ablation_loss_changes(
    model: HookedTransformer, dictionary: AnyDictionary, feature: int, prompts: Batch, batch_size: int
) -> np.ndarray:
    """Computes how much the loss rises without a feature.

    The feature is taken out of the activation at every token, ``x - (decode(f) - decode(f without it))``: all else, the
    dictionary's error included, stays.

    Args:
        model: the model.
        dictionary: a sparse autoencoder or transcoder.
        feature: the feature.
        prompts: the prompts.
        batch_size: prompts in one run.

    Returns:
        ``[prompt, pos]``, nats, for the token after each; NaN where none follows.
    """
    sites = Sites.of(dictionary, model)
    runs = Runs(prompts, batch_size, np.zeros(0, int))
    changes = []
    for run in runs:
        clean, cache = model.run_with_cache(run.batch, names_filter=sites.names)
        values = {name: cache[name] for name in sites.names}
        written = without_feature(dictionary, sites, values, jnp.asarray(feature))
        hooks = [(name, Replace(value)) for name, value in zip(sites.writes, written, strict=True)]
        ablated = model.run_with_hooks(run.batch, fwd_hooks=hooks)
        change = _loss(model, ablated, run) - _loss(model, clean, run)
        changes.append(change[: len(run.rows)])
    table = np.concatenate(changes)
    followed = np.pad(runs.mask[:, 1:], ((0, 0), (0, 1)))
    return np.where(followed, np.pad(table, ((0, 0), (0, 1))), np.nan)


def _loss(model: HookedTransformer, logits: jax.Array, run: Run) -> np.ndarray:
    return np.asarray(model.loss_fn(logits, run.batch, per_token=True), np.float64)


@functools.partial(jax.jit, static_argnames="sites")
def without_feature(
    dictionary: AnyDictionary, sites: Sites, values: Mapping[str, jax.Array], feature: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns what is at each point written when a feature is taken out."""
    inputs = [sites.part(values[name], site) for site, name in enumerate(sites.reads)]
    if isinstance(dictionary, Dictionary):
        features = dictionary.encode(inputs[0])
        less = features.at[..., feature].set(0)
        removed = [dictionary.decode(features, inputs[0]) - dictionary.decode(less, inputs[0])]
    elif isinstance(dictionary, CrossLayerTranscoder):
        features = dictionary.encode(jnp.stack(inputs))
        layer, own = jnp.divmod(feature, dictionary.cfg.d_sae)
        removed = list(dictionary.decode(features) - dictionary.decode(features.at[layer, ..., own].set(0)))
    else:
        stacked = jnp.stack(inputs, axis=-2)
        features = dictionary.encode(stacked)
        difference = dictionary.decode(features) - dictionary.decode(features.at[..., feature].set(0))
        removed = [difference[..., source, :] for source in range(len(inputs))]
    written = []
    for site, (name, part) in enumerate(zip(sites.writes, removed, strict=True)):
        old = sites.part(values[name], site)
        written.append(sites.put(values[name], old - part.reshape(old.shape).astype(old.dtype), site))
    return tuple(written)
