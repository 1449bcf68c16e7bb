"""Detection of heads whose attention matches a pattern: TransformerLens's ``detect_head``."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.cache.activation_cache import ActivationCache
from tljax.checks import typed
from tljax.errors import InputError, nearest
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.warned import level_of_caller

ERROR_MEASURES = ("mul", "abs")


class PatternValuesWarning(UserWarning):
    """Warning of a detection pattern with values other than 0 and 1 under ``error_measure="mul"``."""


def get_previous_token_head_detection_pattern(tokens: Any) -> Float[np.ndarray | Array, "pos pos"]:
    """Returns the pattern with 1 from every token to the one before it, for ids ``[pos]`` or ``[1, pos]``."""
    return np.eye(_row(tokens).size, k=-1, dtype=np.float32)


def get_duplicate_token_head_detection_pattern(tokens: Any) -> Float[np.ndarray | Array, "pos pos"]:
    """Returns the pattern with 1 from every token to each earlier occurrence of the same token."""
    row = _row(tokens)
    return _xp(row).tril(row[:, None] == row[None], k=-1).astype(np.float32)


def get_induction_head_detection_pattern(tokens: Any) -> Float[np.ndarray | Array, "pos pos"]:
    """Returns the pattern with 1 from every token to the token after each earlier occurrence of the same token."""
    same = get_duplicate_token_head_detection_pattern(tokens)
    xp = _xp(same)
    return xp.tril(xp.pad(same, ((0, 0), (1, 0)))[:, :-1])


PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}
HEAD_NAMES = tuple(PATTERNS)


def get_supported_heads() -> None:
    """Prints the names of the detection patterns."""
    print(f"Supported heads: {HEAD_NAMES}")


@typed
def detect_head(
    model: HookedTransformer,
    seq: Any,
    detection_pattern: Any,
    heads: Sequence[tuple[int, int]] | Mapping[int, Sequence[int]] | None = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> Float[Array, "layer head"]:
    """Scores how closely the attention of every head matches a detection pattern.

    Args:
        model: the model.
        seq: one prompt, as a text or token ids ``[pos]`` or ``[1, pos]``; or several, as a list of texts or ids
            ``[batch, pos]``, whose scores are averaged.
        detection_pattern: ``"previous_token_head"``, ``"duplicate_token_head"``, ``"induction_head"``, or a lower
            triangular matrix ``[pos, pos]``, query first.
        heads: ``(layer, head)`` pairs, or a mapping from layer to heads; all other heads get -1.
        cache: the cache of a run of ``seq`` to read instead of running it, with or without batch axis; one prompt only.
        exclude_bos: whether to leave out attention to the first token.
        exclude_current_token: whether to leave out attention of tokens to themselves.
        error_measure: ``"mul"``: the share of attention where the pattern is 1 (each entry weighted by the pattern).
            ``"abs"``: 1 minus the absolute difference, summed over keys and averaged over queries; between -1 and 1,
            rounded to three decimals as in TransformerLens.

    Returns:
        ``[layer, head]``; 0 under ``"mul"`` where the exclusions leave no attention.

    Raises:
        InputError: an unknown pattern or measure, a pattern of another size or not lower triangular, heads that the
            model does not have, one cache for several prompts.
        TokenizerError: text, and a model without a tokenizer.
    """
    _check_measure(error_measure)
    prompts = _prompts(model, seq)
    if cache is not None and len(prompts) > 1:
        raise InputError(
            f"One cache holds one prompt, and these are {len(prompts)}: leave cache out, or pass one prompt."
        )
    wanted = [_pattern(detection_pattern, row, error_measure) for row in prompts]
    chosen = _chosen(model, heads)
    total: Any = 0
    for size in sorted({row.size for row in prompts}):  # prompts of one length run together
        alike = [index for index, row in enumerate(prompts) if row.size == size]
        attention = _attention(model, _stacked([prompts[index] for index in alike]), cache)
        patterns = _stacked([wanted[index] for index in alike])
        total += _scores(attention, patterns, exclude_bos, exclude_current_token, error_measure)
    mean = total / len(prompts)
    return mean if chosen is None else jnp.where(chosen, mean, -1)


@typed
def compute_head_attention_similarity_score(
    attention_pattern: Any,
    detection_pattern: Any,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: str,
) -> jax.Array:
    """The score of :func:`detect_head` for attention ``[..., pos, pos]``: ``[...]``."""
    _check_measure(error_measure)
    attention = jnp.asarray(attention_pattern)
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2]:
        raise InputError(f"An attention pattern is square, [..., pos, pos]; got shape {attention.shape}.")
    wanted = _checked(detection_pattern, attention.shape[-1])
    return _similarity(attention, jnp.asarray(wanted), exclude_bos, exclude_current_token, error_measure)


@functools.partial(jax.jit, static_argnames=("exclude_bos", "exclude_current_token", "error_measure"))
def _scores(
    attention: list[jax.Array], wanted: Any, exclude_bos: bool, exclude_current_token: bool, error_measure: str
) -> Float[Array, "layer head"]:
    """Sums scores over prompts: of one ``[prompt, head, pos, pos]`` per layer, for patterns ``[prompt, pos, pos]``."""
    scores = jax.vmap(
        lambda one, pattern: _similarity(one, pattern, exclude_bos, exclude_current_token, error_measure), (1, 0)
    )(jnp.stack(attention), wanted)
    return scores.sum(axis=0)


def _similarity(attention: Any, wanted: Any, exclude_bos: bool, exclude_current_token: bool, measure: str) -> jax.Array:
    size = attention.shape[-1]
    counts = jnp.ones((size, size), bool)
    if exclude_bos:
        counts = counts.at[:, 0].set(False)
    if exclude_current_token:
        counts &= ~jnp.eye(size, dtype=bool)
    attention = attention.astype(jnp.float32)
    if measure == "mul":
        attention = jnp.where(counts, attention, 0)
        marked, whole = jnp.einsum("...qk,qk->...", attention, wanted), attention.sum((-2, -1))
        return jnp.where(whole > 0, marked / jnp.where(whole > 0, whole, 1), 0)
    difference = jnp.where(counts, jnp.abs(attention - jnp.broadcast_to(wanted, attention.shape)), 0)
    return 1 - jnp.round(difference.sum((-2, -1)) / size, 3)


def _attention(model: HookedTransformer, rows: Any, cache: ActivationCache | None) -> list[jax.Array]:
    """Returns the attention of each layer, ``[prompt, head, pos, pos]``."""
    ran: ActivationCache = cache.with_model(model) if cache is not None else _run(model, rows)
    patterns = [ran["pattern", layer] for layer in range(model.cfg.n_layers)]
    patterns = patterns if ran.has_batch_dim else [pattern[None] for pattern in patterns]
    found, size = patterns[0].shape, rows.shape[1]
    if (found[0], *found[2:]) != (len(rows), size, size):
        raise InputError(
            f"The cache holds attention [batch, head, pos, pos] of shape {found}, and the prompt has {size} tokens: "
            "pass the cache of a run of this one prompt, with all its positions."
        )
    return patterns


def _run(model: HookedTransformer, rows: Any) -> ActivationCache:
    return model.run_with_cache(rows, return_type=None, names_filter=lambda name: name.endswith("hook_pattern"))[1]


def _prompts(model: HookedTransformer, seq: Any) -> list[Any]:
    if not isinstance(seq, str) and len(seq) == 0:
        raise InputError("detect_head needs a prompt; got none.")
    if isinstance(seq, Tracer):  # traced prompts have one length
        rows = list(jnp.atleast_2d(seq))
    else:
        with jax.ensure_compile_time_eval():  # keeps concrete tokens concrete under jit
            batch = model.to_batch(seq)
            rows = [np.asarray(batch.row(index)) for index in range(len(batch))]
    if short := [index for index, row in enumerate(rows) if row.size < 2]:
        raise InputError(f"Prompt {short[0]} has {rows[short[0]].size} token: attention patterns need two or more.")
    return rows


def _xp(array: Any) -> Any:
    """Returns numpy for a concrete array, jax.numpy for a traced one."""
    return jnp if isinstance(array, Tracer) else np


def _stacked(rows: list[Any]) -> Any:
    return _xp(rows[0]).stack(rows)


def _pattern(detection_pattern: Any, row: Any, error_measure: str) -> Any:
    if isinstance(detection_pattern, str):
        if detection_pattern not in PATTERNS:
            raise InputError(
                f"{detection_pattern!r} is not a detection pattern.{nearest(detection_pattern, PATTERNS)} The names "
                f"are {', '.join(map(repr, PATTERNS))}; or pass a lower triangular matrix [pos, pos]."
            )
        return PATTERNS[detection_pattern](row)
    wanted = _checked(detection_pattern, row.size)
    if error_measure == "mul" and not np.isin(wanted, (0, 1)).all():
        warnings.warn(
            "The detection pattern has values other than 0 and 1: 'mul' weights attention by them, which is no share "
            "of attention. 'abs' compares values.",
            PatternValuesWarning,
            stacklevel=level_of_caller(),
        )
    return wanted


def _checked(detection_pattern: Any, size: int) -> Float[np.ndarray, "pos pos"]:
    wanted = np.asarray(detection_pattern, np.float32)
    if wanted.shape != (size, size):
        raise InputError(
            f"The detection pattern must be [pos, pos] = [{size}, {size}], as the prompt has {size} tokens (BOS among "
            f"them); got shape {wanted.shape}."
        )
    above = np.argwhere(np.triu(wanted, k=1) != 0)
    if len(above):
        query, key = above[0]
        raise InputError(
            f"The detection pattern must be lower triangular: no token attends to later ones, and entry "
            f"[{query}, {key}] is {wanted[query, key]:g}. Use np.tril(pattern)."
        )
    return wanted


def _chosen(model: HookedTransformer, heads: Any) -> Any:
    """Returns a mask ``[layer, head]`` of the heads asked for, or ``None`` for all."""
    if heads is None:
        return None
    pairs = [(layer, head) for layer, of in heads.items() for head in of] if isinstance(heads, Mapping) else heads
    mask = np.zeros((model.cfg.n_layers, model.cfg.n_heads), bool)
    for layer, head in pairs:
        numbers = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in (layer, head))
        if not (numbers and 0 <= layer < mask.shape[0] and 0 <= head < mask.shape[1]):
            raise InputError(
                f"There is no head ({layer}, {head}): layers are 0 to {mask.shape[0] - 1}, heads 0 to "
                f"{mask.shape[1] - 1}."
            )
        mask[layer, head] = True
    return mask


def _check_measure(error_measure: str) -> None:
    if error_measure not in ERROR_MEASURES:
        raise InputError(
            f"error_measure is 'mul' or 'abs'; got {error_measure!r}.{nearest(error_measure, ERROR_MEASURES)}"
        )


def _row(tokens: Any) -> Any:
    row = tokens if isinstance(tokens, Tracer) else np.asarray(tokens)
    if row.ndim not in (1, 2) or (row.ndim == 2 and row.shape[0] != 1):
        raise InputError(f"A pattern is made for one prompt, ids [pos] or [1, pos]; got shape {row.shape}.")
    return row.reshape(-1)
