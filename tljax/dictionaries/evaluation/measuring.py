"""What is measured of a batch: the compiled part of an evaluation."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tljax.dictionaries.evaluation.sites import AnyDictionary, Sites, apply_dictionary
from tljax.model.losses import divergences, log_probabilities, next_tokens
from tljax.modules.readout import Readout, by_positions


class SiteMeasures(NamedTuple):
    """What :func:`measure_site` returns; sums are over tokens that count.

    Attributes:
        tokens: ``[batch, pos, len(TOKEN_SUMS)]``, zero at tokens that do not count.
        massive: ``[batch, pos]``, whether a token counts and its norm is huge.
        targets, errors: sums over each prompt, ``[batch, width]``.
        massive_targets, massive_errors: sums over massive tokens, ``[batch, width]``.
        position_targets, position_errors: sums over prompts, ``[pos, width]``.
        fired: tokens at which each feature is active, ``[d_sae]``.
        prompts_fired: prompts with such a token, ``[d_sae]``.
        activation: each feature's sum, ``[d_sae]``.
        largest: each feature's largest activation, ``[d_sae]``.
        replacements: values to put at ``Sites.writes``: the reconstruction, and at tokens that do not count the value
            as it was.
    """

    tokens: Float[Array, "batch pos column"]
    massive: Bool[Array, "batch pos"]
    targets: Float[Array, "batch width"]
    errors: Float[Array, "batch width"]
    massive_targets: Float[Array, "batch width"]
    massive_errors: Float[Array, "batch width"]
    position_targets: Float[Array, "pos width"]
    position_errors: Float[Array, "pos width"]
    fired: Float[Array, " d_sae"]
    prompts_fired: Float[Array, " d_sae"]
    activation: Float[Array, " d_sae"]
    largest: Float[Array, " d_sae"]
    replacements: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnames="sites")
def centre_of(
    dictionary: AnyDictionary, sites: Sites, values: Mapping[str, jax.Array], counts: Bool[Array, "batch pos"]
) -> Float[Array, " width"]:
    """Returns the mean of what is reconstructed over the tokens that count."""
    targets = apply_dictionary(dictionary, sites, values).targets
    return _mean(targets, counts)


@functools.partial(jax.jit, static_argnames="sites")
def measure_site(
    dictionary: AnyDictionary,
    sites: Sites,
    values: Mapping[str, jax.Array],
    counts: Bool[Array, "batch pos"],
    shift: Float[Array, " width"],
    massive: jax.Array,
) -> SiteMeasures:
    """Measures a reconstruction.

    Args:
        dictionary, sites: what is evaluated, and where.
        values: activations of the clean run, by name.
        counts: which tokens count.
        shift: a vector near the targets' mean; sums are taken of the difference, so that float32 keeps the variance of
            activations whose mean is large.
        massive: a token is massive from this many times the batch's median norm on.
    """
    made = apply_dictionary(dictionary, sites, values)
    x, x_hat, features = made.targets, made.outputs, made.features
    error, centred = x - x_hat, x - shift[None, None]
    norm_in, norm_out = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(x_hat, axis=-1)
    norms = norm_in * norm_out
    product, squared_error = jnp.sum(x * x_hat, axis=-1), jnp.sum(error**2, axis=-1)
    columns = (
        jnp.ones_like(norm_in),
        jnp.sum(features != 0, axis=-1).astype(jnp.float32),
        jnp.sum(jnp.abs(features), axis=-1).astype(jnp.float32),
        jnp.sum(centred**2, axis=-1),
        norm_in,
        norm_out,
        norm_out**2,
        product,
        squared_error,
        norm_out / norm_in,
        jnp.where(norms > 0, product / norms, 0),
        squared_error / jnp.sum((x - _mean(x, counts)[None, None]) ** 2, axis=-1),
        squared_error / norm_in**2,
    )
    tokens = jnp.where(counts[..., None], jnp.stack(columns, axis=-1), 0)
    huge = counts & (norm_in >= massive * jnp.nanmedian(jnp.where(counts, norm_in, jnp.nan)))
    active = (features != 0) & counts[..., None]
    sizes = jnp.where(counts[..., None], features, 0).astype(jnp.float32)
    replacements = tuple(
        sites.put(values[name], _keep(counts, part, sites.part(values[name], site)), site)
        for site, (name, part) in enumerate(zip(sites.writes, made.parts, strict=True))
    )
    return SiteMeasures(
        tokens=tokens,
        massive=huge,
        targets=_total(centred, counts),
        errors=_total(error, counts),
        massive_targets=_total(centred, huge),
        massive_errors=_total(error, huge),
        position_targets=_position_total(centred, counts),
        position_errors=_position_total(error, counts),
        fired=active.sum((0, 1)).astype(jnp.float32),
        prompts_fired=active.any(1).sum(0).astype(jnp.float32),
        activation=sizes.sum((0, 1)),
        largest=sizes.max((0, 1)),
        replacements=replacements,
    )


@jax.jit
def measure_losses(
    ends: tuple[Float[Array, "batch pos width"], ...],
    readout: Readout | None,
    tokens: Int[Array, "batch pos"],
    text: Bool[Array, "batch pos"],
    counts: Bool[Array, "batch pos"],
) -> Float[Array, "batch pos column"]:
    """Measures next-token losses and divergences, ``[batch, pos, len(LOSS_SUMS)]``, zero where they do not count.

    The loss at a position is that of the next token, and counts if the position does and the next is text.

    Args:
        ends: final residual streams of the clean, the spliced and the ablated run.
        readout: the end of the model, for some positions at a time; ``None`` if ``ends`` are the logits already.
        tokens, text: the prompts and which of their tokens are text.
        counts: which tokens count.
    """
    clean, spliced, ablated = ends
    vocab = clean.shape[-1] if readout is None else readout.module.cfg.d_vocab_out
    following, counted = next_tokens(tokens, text, vocab)
    with_next = jnp.pad(counted, ((0, 0), (0, 1))) & counts
    ids = jnp.pad(following, ((0, 0), (0, 1)))
    if readout is None:
        losses, distances = _compared(clean, spliced, ablated, ids)
    else:
        losses, distances = by_positions(_read, readout, clean, spliced, ablated, ids, n_logits=3)
    of_tokens = jnp.where(with_next[..., None], losses, 0)
    of_distributions = jnp.where(counts[..., None], distances, 0)
    numbers = jnp.stack([counts.astype(jnp.float32), with_next.astype(jnp.float32)], axis=-1)
    return jnp.concatenate([numbers, of_tokens, of_distributions], axis=-1)


def _read(readout: Readout, *parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    *streams, ids = parts
    return _compared(*map(readout.logits, streams), ids)


def _compared(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of all runs, and the divergences of all but the first from it, ``[batch, pos, run]``."""
    *logits, ids = parts
    log_probs = [log_probabilities(one) for one in logits]
    losses = [-jnp.take_along_axis(own, ids[..., None], axis=-1, mode="fill")[..., 0] for own in log_probs]
    return jnp.stack(losses, -1), jnp.stack([divergences(log_probs[0], own) for own in log_probs[1:]], -1)


def _mean(x: Float[Array, "batch pos width"], counts: Bool[Array, "batch pos"]) -> Float[Array, " width"]:
    weights = counts.astype(x.dtype) / jnp.maximum(counts.sum(), 1).astype(x.dtype)
    return jnp.einsum("bpd,bp->d", x, weights, precision="highest")


def _total(x: Float[Array, "batch pos width"], counts: Bool[Array, "batch pos"]) -> Float[Array, "batch width"]:
    return jnp.einsum("bpd,bp->bd", x, counts.astype(x.dtype), precision="highest")


def _position_total(x: Float[Array, "batch pos width"], counts: Bool[Array, "batch pos"]) -> Float[Array, "pos width"]:
    return jnp.einsum("bpd,bp->pd", x, counts.astype(x.dtype), precision="highest")


def _keep(counts: Bool[Array, "batch pos"], new: jax.Array, old: jax.Array) -> jax.Array:
    shape = (*counts.shape, *(1,) * (new.ndim - 2))
    return jnp.where(counts.reshape(shape), new.astype(old.dtype), old)
