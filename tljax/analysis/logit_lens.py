"""The logit lens: residual stream vectors read as logits, directly or after a fitted map."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tljax.cache.access import position_cut
from tljax.cache.activation_cache import ActivationCache
from tljax.cache.attribution import token_ids
from tljax.cache.slices import SliceInput
from tljax.checks import typed, whole
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.hooks.splices import value_after
from tljax.model.hooked_transformer import HookedTransformer
from tljax.model.losses import log_probabilities
from tljax.modules.readout import Readout, by_positions
from tljax.text.batch import Batch
from tljax.text.methods import token_labels
from tljax.viz.lens_table import FigureOptions, TableOptions, logit_lens_figure, logit_lens_table


@runtime_checkable
class StreamLens(Protocol):
    """A map from each depth of the residual stream to the last, such as a ``TunedLens`` or a ``JacobianLens``."""

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths it maps from; ``n`` is the input of layer ``n``, and ``n_layers`` the final stream, unmapped."""
        ...

    def check(self, model: HookedTransformer) -> None:
        """Raises InputError if the lens was not fitted on this model's residual stream."""
        ...

    def carry(self, stack: jax.Array, depths: Sequence[int]) -> jax.Array:
        """Maps vectors ``[depth, ..., d_model]`` to the final stream, each by the map of its depth."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LensReadout:
    """The most likely next tokens for vectors of the residual stream; a pytree.

    Leading axes are those of the vectors; from :func:`logit_lens` they are ``[depth, batch, pos]``.

    Attributes:
        top_ids: the most likely tokens ``[..., k]``, likeliest first.
        top_log_probs: their log-probabilities in nats, ``[..., k]``.
        entropy: entropy of the whole distribution in nats, ``[...]``.
        target_log_probs: log-probabilities of the targets in nats, ``[..., target]``; ``None`` without targets.
        target_ranks: ranks of the targets, 0 for the likeliest token, ``[..., target]``.
        tokens: the prompt ``[batch, pos]``; ``None`` if it is not known (from a cache), or without position axis.
        token_mask: ``[batch, pos]``, ``False`` at padding; ``None`` if there is no padding or no position axis.
        labels: names of the depths, ``("0_pre", …, "final_post")``.
    """

    top_ids: Int[Array, "*lead k"]
    top_log_probs: Float[Array, "*lead k"]
    entropy: Float[Array, "*lead"]
    target_log_probs: Float[Array, "*lead target"] | None = None
    target_ranks: Int[Array, "*lead target"] | None = None
    tokens: Int[Array, "*prompts pos"] | None = None
    token_mask: Bool[Array, "*prompts pos"] | None = None
    labels: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __repr__(self) -> str:
        depths = f", depths {', '.join(self.labels)}" if self.labels else ""
        return f"LensReadout of {list(self.entropy.shape)} vectors, top {self.top_ids.shape[-1]}{depths}"

    def top_tokens(self, model: HookedTransformer) -> Any:
        """Returns the most likely tokens as strings, in nested lists ``[...][k]``."""
        return _texts(model, self.top_ids)

    @functools.partial(typed, receiver=logit_lens_table)
    def table(self, model: HookedTransformer, index: int = 0, **options: Unpack[TableOptions]) -> Any:
        """Draws the most likely token at each depth and position of one prompt, for a notebook (offline HTML).

        Args:
            model: the model, for its tokenizer.
            index: which prompt of the batch.
            **options: options of :func:`tljax.viz.logit_lens_table`.
        """
        return logit_lens_table(*self._cells(model, index), **options)

    @functools.partial(typed, receiver=logit_lens_figure)
    def figure(self, model: HookedTransformer, index: int = 0, **options: Unpack[FigureOptions]) -> Any:
        """Draws the same table as a matplotlib figure; ``path=`` saves it."""
        return logit_lens_figure(*self._cells(model, index), **options)

    def _cells(self, model: HookedTransformer, index: int) -> tuple[Any, Any, Sequence[str], Any]:
        if self.top_ids.ndim != 4:
            raise InputError(
                f"A table needs depths and positions, [depth, batch, pos, k]; this readout has shape "
                f"{self.top_ids.shape}. Leave pos a range rather than a number."
            )
        batch, positions = self.top_ids.shape[1:3]
        if not -batch <= index < batch:
            raise InputError(f"index={index} is out of range: there are {batch} prompts.")
        text = np.arange(positions) if self.token_mask is None else np.flatnonzero(np.asarray(self.token_mask[index]))
        tokens = [str(n) for n in range(len(text))]
        if self.tokens is not None and self.tokens.shape[1] == positions:
            tokens = token_labels(model, self.tokens[index][text])
        ids, probabilities = self.top_ids[:, index, text], jnp.exp(self.top_log_probs[:, index, text])
        return _texts(model, ids), probabilities, self.labels, tokens


@typed
def readout(
    model: HookedTransformer,
    vectors: Any,
    targets: Any = None,
    top_k: int = 5,
    chunk_size: int = 64,
) -> LensReadout:
    """Reads vectors of the residual stream as next-token predictions: final norm, unembedding, soft cap.

    Args:
        model: the model.
        vectors: ``[..., d_model]``: activations, directions of a probe or a sparse autoencoder, rows of ``W_out``.
        targets: a token, or several (strings that are one token each, or ids), to report besides the likeliest.
        top_k: how many of the likeliest tokens to keep.
        chunk_size: how many vectors are held as logits at once.

    Raises:
        InputError: vectors of another width, ``top_k`` out of range, ids outside the vocabulary.
        TokenizerError: a target is not one token.
    """
    vectors = jnp.asarray(vectors)
    if vectors.shape[-1:] != (model.cfg.d_model,):
        raise InputError(f"vectors must be [..., d_model={model.cfg.d_model}], got shape {vectors.shape}.")
    whole(chunk_size, "chunk_size", at_least=1)
    if not 1 <= whole(top_k, "top_k") <= model.cfg.d_vocab_out:
        raise InputError(f"top_k={top_k} is out of range: the output vocabulary has {model.cfg.d_vocab_out} tokens.")
    wanted = None
    if targets is not None:
        wanted = jnp.atleast_1d(token_ids(model, targets, None)[0])
        if wanted.ndim != 1:
            raise InputError(f"targets must be a token or a list of tokens, got ids of shape {wanted.shape}.")
    rows = vectors.reshape(1, -1, model.cfg.d_model)
    along = () if wanted is None else (jnp.broadcast_to(wanted, (*rows.shape[:2], len(wanted))),)
    end = Readout.of(model.cfg, model.params)
    found = by_positions(_Reading(int(top_k)), end, rows, *along, at_once=int(chunk_size))
    return LensReadout(**{name: value.reshape(*vectors.shape[:-1], *value.shape[2:]) for name, value in found.items()})


@typed
def logit_lens(
    model: HookedTransformer,
    input: Any = None,
    *,
    cache: ActivationCache | None = None,
    lens: StreamLens | None = None,
    layers: Sequence[int] | None = None,
    incl_mid: bool = False,
    pos: SliceInput = None,
    targets: Any = None,
    top_k: int = 5,
    tokens: Any = None,
) -> LensReadout:
    """Reads the model's next-token prediction at each depth of the residual stream (nostalgebraist 2020).

    The full logits of every depth are never held at once; ``cache.logit_lens()`` gives those.

    Args:
        model: the model.
        input: prompts of any lengths, as the model takes them.
        cache: a cache to read instead, with ``resid_pre`` of each layer and the last ``resid_post``.
        lens: a fitted map from each depth to the final stream, applied first: a ``TunedLens`` or a ``JacobianLens``.
        layers: the depths, ``n`` for the input of layer ``n`` and ``n_layers`` for the final stream; by default all,
            or all that ``lens`` has.
        incl_mid: whether to read the streams between attention and MLP, too.
        pos: positions of each prompt's text to keep; a number drops the axis.
        targets, top_k: as in :func:`readout`.
        tokens: the prompt ``[batch, pos]`` of ``cache``, for tables and figures.

    Returns:
        The readout, ``[depth, batch, pos]``. Values at padding are meaningless.

    Raises:
        InputError: neither or both of input and cache; depths out of range or unknown to the lens; a lens of another
            model.
        CacheError: a cache that another model made.
    """
    if (input is None) == (cache is None):
        raise InputError("logit_lens reads a prompt or a cache: give input or cache=, one of them.")
    chosen = _depths(model.cfg, lens, layers)
    if incl_mid and (lens is not None or layers is not None):
        raise InputError("incl_mid=True reads every depth by the plain logit lens: leave lens= and layers= out.")
    if lens is not None:
        lens.check(model)
    if cache is not None:
        kept = cache.with_model(model) if isinstance(cache, ActivationCache) else cache
        tokens = None if tokens is None else jnp.atleast_2d(jnp.asarray(tokens))
    else:
        prompts = _prompts(model, input)
        tokens = prompts.tokens if isinstance(prompts, Batch) else prompts
        names = [name for n in chosen for name in _streams(model.cfg, n, incl_mid)]
        _, kept = model.run_with_cache(prompts, return_type=None, names_filter=names)
    if incl_mid:
        stack, labels = kept.accumulated_resid(incl_mid=True, pos_slice=pos, return_labels=True)
    else:
        values = [kept[_streams(model.cfg, n)[0]] for n in chosen]
        taken = position_cut(kept, pos, values[0])
        stack = jnp.stack(values if taken is None else [taken(value, -2) for value in values])
        labels = ["final_post" if n == model.cfg.n_layers else f"{n}_pre" for n in chosen]
        stack = stack if lens is None else lens.carry(stack, chosen)
    tokens, token_mask = _cut_prompts(kept, tokens, pos)
    found = readout(model, stack, targets, top_k)
    return dataclasses.replace(found, labels=tuple(labels), tokens=tokens, token_mask=token_mask)


def _cut_prompts(cache: ActivationCache, tokens: Any, pos: SliceInput) -> tuple[Any, Any]:
    """Returns a readout's tokens and padding mask, each ``None`` if it is unknown or has no position axis."""
    mask = cache.token_mask
    known = [array for array in (tokens, mask) if array is not None]
    if not known:
        return None, None
    taken = position_cut(cache, pos, known[0], -1)
    if taken is None:
        return tokens, mask
    if taken.drops_axis:
        return None, None
    tokens = None if tokens is None else jnp.maximum(taken(tokens, -1), 0)
    return tokens, None if mask is None else taken(mask, -1)


def _texts(model: HookedTransformer, ids: Any) -> Any:
    """Returns ids of any shape as strings in nested lists."""
    ids = np.asarray(ids)
    known = np.unique(ids)
    texts = dict(zip(known.tolist(), token_labels(model, known), strict=True))
    return np.vectorize(lambda n: texts[int(n)], otypes=[object])(ids).tolist()


def _prompts(model: HookedTransformer, input: Any) -> jax.Array | Batch:
    """Returns tokens ``[batch, pos]``, or a batch if prompts may have different lengths."""
    if isinstance(input, str):
        return model.to_tokens(input, truncate=False)
    if isinstance(input, list):
        return model.to_batch(input)
    return input if isinstance(input, Batch) else jnp.atleast_2d(jnp.asarray(input))


def stream_name(cfg: HookedTransformerConfig, depth: int) -> str:
    """Returns the name of the activation at a depth of the residual stream."""
    return _streams(cfg, depth)[0]


def _streams(cfg: HookedTransformerConfig, depth: int, incl_mid: bool = False) -> tuple[str, ...]:
    if depth == cfg.n_layers:
        return (value_after(f"blocks.{depth - 1}.hook_resid_post", cfg.splices),)
    names = (f"blocks.{depth}.hook_resid_pre", f"blocks.{depth}.hook_resid_mid")
    return names if incl_mid and cfg.has_resid_mid else names[:1]


def _depths(cfg: HookedTransformerConfig, lens: StreamLens | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    known = tuple(range(cfg.n_layers + 1)) if lens is None else lens.depths
    if layers is None:
        return known
    chosen = tuple(whole(n, "a depth of layers") + (cfg.n_layers + 1 if n < 0 else 0) for n in layers)
    if not chosen or any(n not in known for n in chosen):
        raise InputError(
            f"layers={list(layers)} are not all depths that this {'model' if lens is None else 'lens'} has: "
            f"{list(known)}, where n is the input of layer n and {cfg.n_layers} the end."
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What is kept of the logits of streams ``[batch, pos, d_model]``, and of targets ``[batch, pos, target]``."""

    top_k: int

    def __call__(self, end: Readout, streams: jax.Array, targets: jax.Array | None = None) -> dict[str, Any]:
        log_probs = log_probabilities(end.logits(streams))
        top_log_probs, top_ids = jax.lax.top_k(log_probs, self.top_k)
        entropy = jnp.sum(jax.scipy.special.entr(jnp.exp(log_probs)), axis=-1)
        found: dict[str, Any] = {"top_ids": top_ids, "top_log_probs": top_log_probs, "entropy": entropy}
        if targets is not None:
            own = jnp.take_along_axis(log_probs, targets, axis=-1, mode="fill")
            # Of the others alone: compiled, a target's own number may be computed twice, with another rounding.
            ids = jnp.arange(log_probs.shape[-1], dtype=targets.dtype)[None, None]
            better = [
                ((log_probs > own[..., n, None]) & (ids != targets[..., n, None])).sum(-1, jnp.int32)
                for n in range(own.shape[-1])
            ]
            found |= {"target_log_probs": own, "target_ranks": jnp.stack(better, -1)}
        return found
